"""Triton linear kernels on this GPU: correctness first, then a sweep of tile shapes beside cuBLAS, on real layers.

    python -m diffuse_compress_kernels.benchmarks.gpu_linear --minutes 8 --out gpu_linear.json

Each kernel and tile shape is first compared with exact integers or float64 on fresh data, in outputs filled with a
sentinel, and its inline-assembly variant with the plain one, bit for bit; what fails is not timed. Then each shape's
arms (cuBLAS bf16, ``torch._int_mm``, ``torch._scaled_mm`` and every tile shape) are replayed as CUDA graphs in turns,
on buffers rotated past the L2 cache. Medians go to ``--out`` after every shape, so a run may be cut off at any time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from diffuse_compress_kernels.benchmarks.gpu_checks import run_checks
from diffuse_compress_kernels.benchmarks.gpu_problem import KINDS, check, problem, run_kernel
from diffuse_compress_kernels.benchmarks.shapes import GPU_DECODE_SHAPES, GPU_SHAPES
from diffuse_compress_kernels.triton_kernels.candidates import FEW_TOKENS, candidates, gemv_candidates
from diffuse_compress_kernels.triton_kernels.launch import forget_counters
from diffuse_compress_kernels.triton_kernels.rows import quantize_rows
from diffuse_compress_kernels.triton_kernels.timing import time_arms

__all__ = ["main"]

ROTATED_BYTES = 300 << 20
# Few tokens are for formats that read little: these kinds are not swept there.
LARGE_ONLY = ("w8a8-fp8", "w4a8-two-level")
SLOW_OPERATIONS = 2e12

Job = tuple[str, Any, int, bool]


def environment(device: str) -> dict[str, Any]:
    """What a number depends on besides the case."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    info: dict[str, Any] = {"device": platform.processor(), "capability": None}
    if device == "cuda":
        info = {
            "device": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return {
        **info,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }


# --- compiling and checking -------------------------------------------------------------------------------------


def _configs(kind: str, tokens: int) -> list[Any]:
    if kind == "w4a16-gemv":
        return list(gemv_candidates()) if tokens == 1 else []
    if tokens <= FEW_TOKENS and kind in LARGE_ONLY:
        return []
    return list(candidates(kind, tokens))


def _jobs(kinds: list[str], tokens: list[int]) -> list[Job]:
    """Every configuration of every kind once."""
    jobs: dict[tuple[str, str], Job] = {}
    families: set[tuple[Any, ...]] = set()
    for kind in kinds:
        for count in sorted(set(tokens)):
            for config in _configs(kind, count):
                # The plain variant compiles slowly and is the same for all tile shapes: one comparison per family.
                family = (kind, getattr(config, "tma", None), config.num_warps, count > FEW_TOKENS)
                if (kind, config.name) not in jobs:
                    jobs[kind, config.name] = (kind, config, count, family not in families)
                    families.add(family)
    return list(jobs.values())


def check_job(kind: str, config: Any, tokens: int, compare_plain: bool, device: str) -> None:
    """Raises if a configuration is wrong; compiles what the timing will run."""
    asm = device == "cuda"
    check(kind, config, tokens, device, asm=asm, compare_plain=asm and compare_plain)


def check_all(jobs: list[Job], device: str) -> dict[str, str]:
    """{"kind config": "ok", or what is wrong}."""
    place = f"diffuse_compress_kernels.benchmarks.gpu_linear:{check_job.__name__}"
    return run_checks([(f"{job[0]} {job[1].name}", place, (*job, device)) for job in jobs], device)


# --- timing -----------------------------------------------------------------------------------------------------


def _number_of_sets(rows: int, outputs: int, depth: int) -> int:
    """Buffer sets that are several times the L2 cache together."""
    one = rows * depth + outputs * depth // 2 + rows * outputs * 2
    return max(3, min(48, -(-ROTATED_BYTES // one)))


def _baselines(rows: int, outputs: int, depth: int, sets: int) -> dict[str, Callable[[int], object]]:
    x = [torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    w = [torch.randn(outputs, depth, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    y = [torch.empty(rows, outputs, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    arms: dict[str, Callable[[int], object]] = {"bf16": lambda i: torch.mm(x[i], w[i].t(), out=y[i])}
    if rows > 16:
        x8 = [t.clamp(-3, 3).mul(42).round().to(torch.int8) for t in x]
        w8 = [t.clamp(-3, 3).mul(42).round().to(torch.int8) for t in w]
        acc = torch.empty(rows, outputs, device="cuda", dtype=torch.int32)
        arms["int_mm"] = lambda i: torch._int_mm(x8[i], w8[i].t(), out=acc)
    if torch.cuda.get_device_capability() >= (8, 9):
        xf = [t.to(torch.float8_e4m3fn) for t in x]
        wf = [t.to(torch.float8_e4m3fn) for t in w]
        sx, sw = torch.rand(rows, 1, device="cuda"), torch.rand(1, outputs, device="cuda")
        arms["scaled_mm"] = lambda i: torch._scaled_mm(
            xf[i], wf[i].t(), scale_a=sx, scale_b=sw, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    arms["quantize_rows int8"] = lambda i: quantize_rows(x[i], -127, 127)
    arms["quantize_rows fp8"] = lambda i: quantize_rows(x[i], -448, 448)
    return arms


def _arms(
    kinds: list[str], rows: int, outputs: int, depth: int, verdicts: dict[str, str], sets: int
) -> dict[str, Callable[[int], object]]:
    arms = _baselines(rows, outputs, depth, sets)
    for kind in kinds:
        configs = _configs(kind, rows)
        if not configs:
            continue
        case = problem(kind, rows, outputs, depth, sets=sets, device="cuda")
        for config in configs:
            name = f"{kind} {config.name}"
            if verdicts.get(name) == "ok":
                arms[name] = lambda i, case=case, config=config: run_kernel(case, i, config)  # type: ignore[misc]
    return arms


def time_shape(
    kinds: list[str], label: str, shape: tuple[int, int, int], verdicts: dict[str, str], rounds: int
) -> dict[str, Any]:
    """The record of one shape: microseconds by arm, and ratios to cuBLAS bf16."""
    rows, outputs, depth = shape
    sets = _number_of_sets(*shape)
    start = time.perf_counter()
    failures: dict[str, str] = {}
    arms = _arms(kinds, rows, outputs, depth, verdicts, sets)
    operations = 2 * rows * outputs * depth
    times = time_arms(arms, sets, rounds=rounds if operations < SLOW_OPERATIONS else min(rounds, 5), failures=failures)
    del arms
    forget_counters()
    torch.cuda.empty_cache()
    dense = times["bf16"]
    ranked = sorted(times, key=times.__getitem__)
    best = {}
    for kind in kinds:
        mine = [name for name in ranked if name.startswith(kind + " ")]
        if mine:
            best[kind] = [mine[0].split(" ", 1)[1], round(dense / times[mine[0]], 3)]
    tops = operations / dense / 1e6
    print(f"{label} {rows}x{outputs}x{depth}: bf16 {dense:.1f} us ({tops:.0f} T)  int_mm "
          f"{dense / times.get('int_mm', float('inf')):.2f}  scaled_mm "
          f"{dense / times.get('scaled_mm', float('inf')):.2f}", flush=True)  # fmt: skip
    for kind, (name, ratio) in best.items():
        print(f"    {kind:16s} {ratio:.2f}  {name}", flush=True)
    return {
        "label": label,
        "shape": list(shape),
        "sets": sets,
        "seconds": round(time.perf_counter() - start, 1),
        "best": best,
        "microseconds": {name: round(times[name], 2) for name in ranked},
        "failures": failures,
    }


def _shapes(which: str) -> list[tuple[str, tuple[int, int, int]]]:
    large = [(label, shape) for label, shape in GPU_SHAPES.items()]
    few = [(f"{label} M={m}", (m, *nk)) for m in (1, 16, 64) for label, nk in GPU_DECODE_SHAPES.items()]
    if which == "large":
        return large
    if which == "few":
        return few
    # In turns, so that a run that is cut short has some of both.
    mixed = []
    for i in range(max(len(large), len(few))):
        mixed += large[i : i + 1] + few[i : i + 1]
    return mixed


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="stop before the first shape after this time")
    parser.add_argument("--out", type=Path, default=Path("gpu_linear.json"), help="results, rewritten after each shape")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--shapes", choices=("all", "large", "few"), default="all")
    parser.add_argument("--only", nargs="+", help="labels of shapes that contain one of these words")
    parser.add_argument("--rounds", type=int, default=9, help="timed replays per arm")
    parser.add_argument("--dry-run", action="store_true", help="checks alone, on the CPU: TRITON_INTERPRET=1")
    options = parser.parse_args(arguments)
    end = time.perf_counter() + 60 * options.minutes
    device = "cpu" if options.dry_run else "cuda"
    record: dict[str, Any] = {"environment": environment(device), "checks": {}, "shapes": []}
    print(json.dumps(record["environment"]), flush=True)
    shapes = _shapes(options.shapes)
    if options.only:
        shapes = [item for item in shapes if any(word in item[0] for word in options.only)]
    record["checks"] = check_all(_jobs(options.kinds, [shape[0] for _, shape in shapes]), device)
    options.out.write_text(json.dumps(record, indent=1))
    for label, shape in [] if options.dry_run else shapes:
        if time.perf_counter() > end:
            print("out of time", flush=True)
            break
        record["shapes"].append(time_shape(options.kinds, label, shape, record["checks"], options.rounds))
        options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
