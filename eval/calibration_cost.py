"""Time and peak memory of a calibrated algorithm on a whole language model of true shapes, with random weights.

    python eval/calibration_cost.py                             # Llama-3.1-8B, 128 x 2048 tokens, GPTQ, on a GPU
    python eval/calibration_cost.py --layers 4 --samples 32     # a share of it
    python eval/calibration_cost.py --tiny --device cpu         # a rehearsal without a GPU

Cost only: weights and tokens are random. The model is on the device; ``--offload`` leaves it on the CPU and calibrates
block by block on the device. One JSON line: {model, algorithm, preset, seconds, peak_bytes, bytes, samples, ...}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from typing import Any

import torch

import diffuse_compress  # noqa: F401  (attaches compress)
from diffuse_compress import Calibration, QuantizationConfig
from diffuse_compress.quantization.algorithms.base import algorithm_from_dict

LLAMA_8B: dict[str, Any] = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
TINY: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, vocab_size=512
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="w4a16")
    parser.add_argument("--algorithm", default="gptq")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048, help="of a sample")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--offload", action="store_true", help="the model stays on the CPU")
    parser.add_argument("--tiny", action="store_true", help="a small model and short samples")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace, home: torch.device) -> Any:
    """The model in bfloat16, made where it stays."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {**LLAMA_8B, **(TINY if options.tiny else {}), "num_hidden_layers": options.layers}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(home), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LlamaForCausalLM(LlamaConfig(**size)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def main(arguments: list[str] | None = None) -> int:
    """Measure once and print the line."""
    options = parse_arguments(arguments)
    if options.tiny:
        options.layers, options.samples, options.tokens = 2, 4, 32
    device = torch.device(options.device)
    home = torch.device("cpu") if options.offload else device
    model = build(options, home)
    generator = torch.Generator().manual_seed(0)
    shape = (1, options.tokens)
    items = [torch.randint(model.config.vocab_size, shape, generator=generator) for _ in range(options.samples)]
    config = QuantizationConfig(options.preset, algorithm=algorithm_from_dict({"kind": options.algorithm}))
    calibration = Calibration.record(model, items, num_samples=options.samples)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    model.compress(config, calibration=calibration, device=device if options.offload else None, measure=False)
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    line = {
        "model": f"Llama, {options.layers} layers of width {model.config.hidden_size}",
        "preset": options.preset,
        "algorithm": options.algorithm,
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "samples": options.samples,
        "tokens": options.tokens,
        "offload": options.offload,
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
