"""Quantized linear layers against dense ones on this CPU, one thread, real shapes, random weights.

    python -m diffuse_compress_kernels.benchmarks.cpu_linear --schemes w8a8 w4a8 --out cpu_linear.jsonl

Every case is checked for correctness first. Its layers and both dense baselines are then timed in turns, one call
each per round, so that a disturbance hits all of them, and the minimum of each counts. A line of JSON per timing goes
to ``--out``; a table of ratios to stdout.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress_kernels.benchmarks.shapes import LINEAR_SHAPES

__all__ = ["Case", "cases", "main", "time_in_turns"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = (64, 256, 1024, 4096)
MAX_RELATIVE_RMS = {8: 0.03, 4: 0.35, 3: 0.6, 2: 1.0}


@dataclass(frozen=True)
class Case:
    """One layer of one model with a number of input rows."""

    model: str
    layer: str
    rows: int
    outputs: int
    depth: int

    @property
    def name(self) -> str:
        return f"{self.model}/{self.layer}/M={self.rows}"

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.outputs * self.depth


def cases(models: list[str], rows: list[int]) -> Iterator[Case]:
    """Every layer of every model at every number of rows."""
    for model in models:
        for layer, (outputs, depth) in LINEAR_SHAPES[model].items():
            for count in rows:
                yield Case(model, layer, count, outputs, depth)


def time_in_turns(calls: dict[str, Callable[[], Any]], seconds: float, rounds: int) -> dict[str, float]:
    """Minimum seconds of each call, over at least ``rounds`` rounds and about ``seconds`` per call."""
    best = dict.fromkeys(calls, math.inf)
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds * len(calls)
    done = 0
    while done < rounds or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
        done += 1
    return best


def _layers(case: Case, schemes: list[str], generator: torch.Generator) -> dict[str, nn.Module]:
    """Dense layers in both dtypes and quantized ones, all with the same random weight."""
    # By name: the kernels do not depend on the package that builds layers from them.
    convert = importlib.import_module("diffuse_compress.quantization.convert")
    presets = importlib.import_module("diffuse_compress.quantization.presets")
    rtn = importlib.import_module("diffuse_compress.quantization.algorithms.rtn")
    dense = nn.Linear(case.depth, case.outputs)
    with torch.no_grad():
        dense.weight.normal_(std=0.02, generator=generator)
        dense.bias.normal_(generator=generator)
    layers: dict[str, nn.Module] = {}
    for name in schemes:
        layers[name] = convert.quantize_module(
            dense, presets.resolve_preset(name).scheme, rtn.RTNConfig(observer="minmax")
        )
    return {"fp32": dense, "bf16": nn.Linear(case.depth, case.outputs, dtype=torch.bfloat16), **layers}


def _check(case: Case, layers: dict[str, nn.Module], inputs: dict[str, torch.Tensor], schemes: list[str]) -> None:
    """Refuse to report numbers of a wrong result."""
    some = {name: x[:64] for name, x in inputs.items()}
    reference = layers["fp32"](some["fp32"])
    for name in schemes:
        for dtype, x in some.items():
            error = (layers[name](x).float() - reference).norm() / reference.norm()
            weight_bits: int = layers[name].scheme.weight.format.bits  # type: ignore[union-attr,assignment]
            if not float(error) < MAX_RELATIVE_RMS[weight_bits]:
                raise SystemExit(f"{case.name}: {name} on {dtype} is off by {float(error):.3f} (relative RMS).")


@torch.no_grad()
def run_case(case: Case, schemes: list[str], seconds: float, rounds: int) -> dict[str, float]:
    """Seconds by provider: "fp32", "bf16", and "<scheme> fp32", "<scheme> bf16" by the dtype of the input."""
    generator = torch.Generator().manual_seed(0)
    layers = _layers(case, schemes, generator)
    x = torch.randn(case.rows, case.depth, generator=generator)
    inputs = {name: x.to(dtype) for name, dtype in DTYPES.items()}
    _check(case, layers, inputs, schemes)
    calls: dict[str, Callable[[], Any]] = {}
    for dtype, value in inputs.items():
        calls[dtype] = lambda layer=layers[dtype], value=value: layer(value)  # type: ignore[misc]
        for name in schemes:
            calls[f"{name} {dtype}"] = lambda layer=layers[name], value=value: layer(value)  # type: ignore[misc]
    return time_in_turns(calls, seconds, rounds)


def environment() -> dict[str, Any]:
    """What a number depends on besides the case."""

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
        return run.stdout.strip()

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "device": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "vnni": torch.cpu._is_vnni_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.date.today().isoformat(),
    }


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _report(results: dict[Case, dict[str, float]], schemes: list[str]) -> None:
    for name in schemes:
        print(f"\n{name}: speed relative to the dense layer in the input's dtype")
        for dtype in DTYPES:
            ratios = {case: timing[dtype] / timing[f"{name} {dtype}"] for case, timing in results.items()}
            many = {case: ratio for case, ratio in ratios.items() if case.rows >= min(ROWS)}
            if many:
                worst = min(many, key=lambda case: many[case])
                mean = geometric_mean(list(many.values()))
                print(f"  {dtype}: geometric mean {mean:.2f}, worst {many[worst]:.2f} ({worst.name})")
            for rows in sorted({case.rows for case in ratios}):
                some = [ratio for case, ratio in ratios.items() if case.rows == rows]
                print(f"    M={rows:5d}: geometric mean {geometric_mean(some):.2f}, lowest {min(some):.2f}")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted(LINEAR_SHAPES), choices=sorted(LINEAR_SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="input rows M")
    parser.add_argument("--schemes", nargs="+", default=["w8a8"], help="preset names")
    parser.add_argument("--seconds", type=float, default=0.2, help="time per provider and case")
    parser.add_argument("--rounds", type=int, default=3, help="least number of repeats")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    where = environment()
    print(json.dumps(where))
    results = {}
    for case in cases(options.models, options.rows):
        timing = results[case] = run_case(case, options.schemes, options.seconds, options.rounds)
        cells = "  ".join(f"{name} {case.operations / value / 1e9:.0f}" for name, value in timing.items())
        print(f"{case.name:40s} GOP/s: {cells}", flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                for provider, value in timing.items():
                    record = {"case": case.name, "provider": provider, "ms": round(value * 1e3, 4), **where}
                    file.write(json.dumps(record) + "\n")
    _report(results, options.schemes)


if __name__ == "__main__":
    main()
