"""Time and peak memory of one denoiser call under offloading, torch.compile and LoRA, at true shapes.

    python eval/ecosystem_cost.py --out bench/ecosystem.jsonl                      # SDXL and FLUX.1-dev, on a GPU
    python eval/ecosystem_cost.py --out bench/ecosystem.jsonl --minutes 6 --calls 3 \\
        --providers dense w8a8 w4a16 nf4 --modes resident lora model leaf-stream compile
    python eval/ecosystem_cost.py --models sdxl_base --providers w4a16 --modes leaf
    python eval/ecosystem_cost.py --tiny --device cpu                              # a rehearsal without a GPU

Weights are random: speed and memory, no quality. Providers are the dense model in bfloat16, which comes first, presets,
and last, in a process of its own, bitsandbytes' NF4 where that is installed. Every line is {shape, provider, mode,
seconds, peak_bytes, device, ...} and is written as soon as it is measured; lines that --out has of this device are not
measured again, so a run that --minutes or anything else ended goes on where it was. Compare lines of one device. Modes:

    resident       everything on the device
    model          enable_model_cpu_offload: moved there for the call and back
    sequential     enable_sequential_cpu_offload: layer by layer
    block, leaf, leaf-stream   enable_group_offload
    lora, lora-fused   an adapter of rank 16 on the attention, live and fused
    graph          resident, replayed as a CUDA graph: what the GPU takes, without what starting kernels costs the host
    compile        compile_repeated_blocks (whole model where the class names no blocks)
    compile-graph  both
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import diffuse_compress  # noqa: F401  (attaches compress)
from diffuse_compress.evaluation.cost_lines import CostLines
from diffuse_compress.evaluation.denoiser_inputs import denoiser_inputs
from diffuse_compress.evaluation.true_shapes import random_denoiser

PROVIDERS = ("dense", "w8a8", "fp8", "w8a16", "w4a16", "w4a8", "nf4")
SHAPES = ("sdxl_base", "flux1_dev")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", "--shapes", dest="shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--calls", type=int, default=5, help="timed calls, after two that are not")
    parser.add_argument("--tiny", action="store_true", help="small models and inputs, to see that everything runs")
    parser.add_argument("--minutes", type=float, help="start no measurement after that time")
    parser.add_argument("--out", type=Path, help="append JSON lines here as well, and go on from those that are there")
    return parser.parse_args(arguments)


# --- models -----------------------------------------------------------------------------------------------------


def build(shape: str, provider: str, device: torch.device, tiny: bool) -> nn.Module:
    """The denoiser of a published pipeline with random weights, made and compressed on ``device``."""
    model = random_denoiser(shape, device, torch.bfloat16, tiny=tiny)
    if provider == "nf4":
        _to_nf4(model, device)
    elif provider != "dense":
        model.compress(provider, measure=False)
    return model


def _to_nf4(model: nn.Module, device: torch.device) -> None:
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            # On meta: it would draw random weights first, on the CPU.
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                module.bias is not None,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            layer.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            layer.bias = module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.to(device))  # which quantizes it


def inputs_for(shape: str, model: Any, tiny: bool) -> dict[str, Any]:
    """What a 1024x1024 picture gives the denoiser: SDXL with guidance in one batch of two, Flux with its own."""
    batch, tokens = (2, 77) if shape == "sdxl_base" else (1, 512)
    inputs = denoiser_inputs(model, batch, side=8 if tiny else 128, tokens=16 if tiny else tokens)
    return {**inputs, "timestep": inputs["timestep"][0]} if shape == "sdxl_base" else inputs


# --- modes: each puts a model in place, and may return what to do after a call ----------------------------------

After = Callable[[], Any] | None


def _model_offload(model: Any, device: torch.device) -> After:
    from accelerate import cpu_offload_with_hook

    return cpu_offload_with_hook(model, device)[1].offload


def _sequential(model: Any, device: torch.device) -> After:
    from accelerate import cpu_offload

    cpu_offload(model, device, offload_buffers=len(model._parameters) > 0)
    return None


def _group(**kwargs: Any) -> Callable[[Any, torch.device], After]:
    return lambda model, device: model.enable_group_offload(device, **kwargs)


def _compile(model: Any, device: torch.device) -> After:
    model.to(device)
    compile_one = model.compile_repeated_blocks if model._repeated_blocks else model.compile
    return compile_one(fullgraph=True)


def _adapter(model: Any, device: torch.device, *, fused: bool = False) -> After:
    from peft import LoraConfig

    model.to(device)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets, init_lora_weights="gaussian"))
    if fused:
        model.fuse_lora()
    return None


# The first take the model where it was made; the others want it on the CPU, and the last is what takes longest.
MODES: dict[str, Callable[[Any, torch.device], After]] = {
    "resident": lambda model, device: model.to(device) and None,
    "graph": lambda model, device: model.to(device) and None,
    "lora": _adapter,
    "lora-fused": lambda model, device: _adapter(model, device, fused=True),
    "model": _model_offload,
    "leaf-stream": _group(offload_type="leaf_level", use_stream=True),
    "leaf": _group(offload_type="leaf_level"),
    "block": _group(offload_type="block_level", num_blocks_per_group=1),
    "sequential": _sequential,
    "compile": _compile,
    "compile-graph": _compile,
}
ON_DEVICE = ("resident", "graph", "lora", "lora-fused")


def _replay(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(
    model: Any, mode: str, inputs: dict[str, Any], device: torch.device, calls: int, other_bytes: int = 0
) -> dict[str, Any]:
    """Median seconds of a call, and the most memory allocated on the device while calls ran, less ``other_bytes``."""
    on_gpu = device.type == "cuda"
    after = MODES[mode](model, device)

    run = partial(model, **inputs, return_dict=False)
    if mode.endswith("graph"):
        run = _replay(run)

    def call() -> float:
        started = time.perf_counter()
        run()
        if after is not None:
            after()
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    with torch.no_grad():
        for _ in range(2):
            call()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        seconds = [call() for _ in range(calls)]
    peak = torch.cuda.max_memory_allocated(device) - other_bytes if on_gpu else None
    return {"seconds": statistics.median(seconds), "peak_bytes": peak}


class Bench:
    """What is to be measured, what has been, and for how long there still is time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.lines = CostLines(partial(print, flush=True), self.device, options.out, options.minutes, tiny=options.tiny)
        self.done = {self._key(line) for line in self.lines.written() if "seconds" in line}

    def _key(self, line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line.get(name) for name in ("shape", "provider", "mode", "device", "torch", "tiny"))

    def missing(self, shape: str, provider: str) -> list[str]:
        """Modes that are still to be measured, in the order of ``MODES``."""
        line = {"shape": shape, "provider": provider, **self.lines.facts}
        return [
            mode for mode in MODES if mode in self.options.modes and self._key({**line, "mode": mode}) not in self.done
        ]

    def run(self, shape: str, provider: str) -> None:
        """Every mode of one model; whatever fails is a line with its error."""
        modes = self.missing(shape, provider)
        if not modes or self.lines.over:
            return
        try:
            master = build(shape, provider, self.device, self.options.tiny)
            inputs = inputs_for(shape, master, self.options.tiny)
        except Exception as error:
            self.lines.write(shape=shape, provider=provider, error=_text(error))
            return
        for mode in modes:
            if self.lines.over:
                break
            try:
                if mode not in ON_DEVICE:
                    master.to("cpu")
                    self.lines.free()
                # The last one needs no copy, which of FLUX.1 takes as long as some of the measurements.
                model = master if mode == modes[-1] else copy.deepcopy(master)
                other = _bytes_on(master, self.device) if model is not master else 0
                found = measure(model, mode, inputs, self.device, self.options.calls, other)
            except Exception as error:  # one mode must not cost the others
                found = {"error": _text(error)}
            self.lines.write(shape=shape, provider=provider, mode=mode, **found)
            model = None
            torch._dynamo.reset()
            self.lines.free()


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _bytes_on(model: nn.Module, device: torch.device) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device.type == device.type)


def main(arguments: list[str] | None = None) -> int:
    """Measure everything that was asked for and is not there yet, the dense model first."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    bench = Bench(options)
    others = [provider for provider in PROVIDERS if provider in options.providers and provider != "nf4"]
    for shape in options.shapes:
        for provider in others:
            bench.run(shape, provider)
            bench.lines.free()
    if "nf4" in options.providers and not others:
        for shape in options.shapes:
            bench.run(shape, "nf4")
    elif "nf4" in options.providers and not bench.lines.over:
        # A foreign CUDA library: what it does to its process must not be done to this one.
        command = [sys.executable, __file__, *arguments, "--providers", "nf4"]
        left = None if bench.until is None else bench.until - time.monotonic()
        command += [] if left is None else ["--minutes", str(left / 60)]
        try:
            status = subprocess.run(command, timeout=None if left is None else left + 120).returncode
        except subprocess.TimeoutExpired as error:
            status = _text(error)
        if status != 0:
            bench.write(provider="nf4", error=f"its process ended with {status}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
