"""Time and peak memory of calibrated algorithms on a whole model of true shapes, with random weights.

    python eval/calibration_cost.py                             # Llama-3.1-8B, 128 x 2048 tokens, GPTQ, on a GPU
    python eval/calibration_cost.py --layers 4 --samples 32     # a share of it
    python eval/calibration_cost.py --model flux1_dev           # 64 calls for a 1024 x 1024 picture, w4a4
    python eval/calibration_cost.py --model flux1_dev --layers 6 --algorithms quarot,svdquant
    python eval/calibration_cost.py --tiny --device cpu         # a rehearsal without a GPU

Cost only: weights and inputs are random. The model is on the device; ``--offload`` leaves it on the CPU and calibrates
block by block on the device. One JSON line for each algorithm, or sequence of them joined by commas: {model, algorithm,
preset, seconds, peak_bytes, bytes, samples, ...}.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from datetime import date
from typing import Any

import torch

import diffuse_compress  # noqa: F401  (attaches compress)
from diffuse_compress import Calibration, QuantizationConfig
from diffuse_compress.families.published import published_config
from diffuse_compress.quantization.algorithms.base import algorithm_from_dict

LLAMA_8B: dict[str, Any] = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
TINY: dict[str, dict[str, Any]] = {
    "llama_8b": dict(
        hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, vocab_size=512
    ),
    "flux1_dev": dict(num_attention_heads=2, attention_head_dim=128, joint_attention_dim=128),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama_8b": dict(preset="w4a16", algorithms=["gptq"], layers=32, samples=128, tokens=2048),
    "flux1_dev": dict(
        preset="w4a4", algorithms=["quarot,svdquant", "svdquant", "awq,gptq"], layers=57, samples=64, tokens=4096
    ),
}
PROMPT_TOKENS = 512


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line, those that were not given by the model's defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(DEFAULTS), default="llama_8b")
    parser.add_argument("--preset")
    parser.add_argument(
        "--algorithms", "--algorithm", nargs="+", help="kinds, joined by commas where one follows another"
    )
    parser.add_argument("--layers", type=int, help="of flux1_dev, a third has two streams")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--tokens", type=int, help="of a sample; of flux1_dev, those of the picture")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--offload", action="store_true", help="the model stays on the CPU")
    parser.add_argument("--tiny", action="store_true", help="a small model and short samples")
    options = parser.parse_args(arguments)
    given = {**DEFAULTS[options.model], **(dict(layers=3, samples=4, tokens=32) if options.tiny else {})}
    for name, value in given.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def build(options: argparse.Namespace, home: torch.device) -> Any:
    """The model in bfloat16, made where it stays."""
    size = TINY[options.model] if options.tiny else {}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(home), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make = _llama if options.model == "llama_8b" else _flux
            return make(size, options.layers).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def _llama(size: dict[str, Any], layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**LLAMA_8B, **size, "num_hidden_layers": layers}))


def _flux(size: dict[str, Any], layers: int) -> Any:
    part = published_config("flux1_dev").components["transformer"]
    streams = {"num_layers": max(1, round(layers / 3)), "num_single_layers": layers - max(1, round(layers / 3))}
    cls: Any = part.model_class()
    return cls.from_config({**part.config, **size, **streams})


def samples(model: Any, options: argparse.Namespace) -> list[Any]:
    """Token ids of a text, or arguments of a call in the loop of a pipeline."""
    generator = torch.Generator().manual_seed(0)
    if options.model == "llama_8b":
        shape = (1, options.tokens)
        return [torch.randint(model.config.vocab_size, shape, generator=generator) for _ in range(options.samples)]
    texts = min(PROMPT_TOKENS, options.tokens)
    widths = {
        "hidden_states": (options.tokens, model.config.in_channels),
        "encoder_hidden_states": (texts, model.config.joint_attention_dim),
        "pooled_projections": (model.config.pooled_projection_dim,),
    }
    places = {"img_ids": torch.zeros(options.tokens, 3), "txt_ids": torch.zeros(texts, 3)}
    found = []
    for index in range(options.samples):
        drawn = {name: torch.randn(1, *width, generator=generator) for name, width in widths.items()}
        scalars = {"timestep": torch.tensor([(index + 1) / options.samples]), "guidance": torch.tensor([3.5])}
        given = {**drawn, **scalars, **places}
        found.append({name: tensor.to(model.device, torch.bfloat16) for name, tensor in given.items()})
    return found


def measure(algorithm: str, options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate a fresh model."""
    device = torch.device(options.device)
    home = torch.device("cpu") if options.offload else device
    on_gpu = device.type == "cuda"
    model = build(options, home)
    calibration = Calibration.record(model, samples(model, options), num_samples=options.samples)
    steps = [algorithm_from_dict({"kind": kind}) for kind in algorithm.split(",")]
    config = QuantizationConfig(options.preset, algorithm=steps if steps[1:] else steps[0])
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    model.compress(config, calibration=calibration, device=device if options.offload else None, measure=False)
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    width = getattr(model.config, "hidden_size", None) or model.inner_dim
    return {
        "model": f"{type(model).__name__}, {options.layers} layers of width {width}",
        "preset": options.preset,
        "algorithm": algorithm,
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


def main(arguments: list[str] | None = None) -> int:
    """Measure each algorithm once and print its line."""
    options = parse_arguments(arguments)
    for algorithm in options.algorithms:
        print(json.dumps(measure(algorithm, options)), flush=True)
        # What the last model took is free for the next.
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
