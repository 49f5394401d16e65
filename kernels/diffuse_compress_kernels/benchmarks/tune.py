"""Finds the tile shapes of this GPU and keeps them where the operators look.

    python -m diffuse_compress_kernels.benchmarks.tune --seconds 20

Every candidate of every kind of product is timed on a few weights per number of tokens, most useful first, until the
time is over; what was not reached keeps the shipped choice. The table goes to ``$DIFFUSE_COMPRESS_CACHE/tiles``, by
default under ``~/.cache/diffuse_compress``, and is read by the next process.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from diffuse_compress_kernels.benchmarks.gpu_linear import environment
from diffuse_compress_kernels.benchmarks.gpu_problem import check, problem, run_kernel
from diffuse_compress_kernels.triton_kernels import capability
from diffuse_compress_kernels.triton_kernels.candidates import candidates
from diffuse_compress_kernels.triton_kernels.launch import forget_counters
from diffuse_compress_kernels.triton_kernels.products import table_path
from diffuse_compress_kernels.triton_kernels.tables import MANY, Choice, Table, save_table, table_for
from diffuse_compress_kernels.triton_kernels.tiles import TileConfig
from diffuse_compress_kernels.triton_kernels.timing import time_arms

__all__ = ["main", "tune", "tune_kind"]

# Tokens timed for a choice, and the tokens it will serve.
BUCKETS = ((4096, MANY), (16, 16), (64, 64))
WEIGHTS = ((4608, 1152), (4096, 4096))
SETS = 3
ROUNDS = 3


def tune_kind(kind: str, tokens: int, weights: tuple[tuple[int, int], ...], end: float) -> TileConfig | None:
    """The candidate with the least geometric mean of times over ``weights`` (N, K); None if time ran out first."""
    best: tuple[float, TileConfig | None] = (math.inf, None)
    cases = [problem(kind, tokens, *weight, sets=SETS, device="cuda") for weight in weights]
    for config in candidates(kind, tokens):
        if time.perf_counter() > end:
            break
        try:
            check(kind, config, min(tokens, 333), "cuda", asm=True, compare_plain=False)
            logs = []
            for case in cases:
                arms = {"this": lambda i, case=case, config=config: run_kernel(case, i, config)}
                logs.append(math.log(time_arms(arms, SETS, rounds=ROUNDS)["this"]))  # type: ignore[arg-type]
        except Exception as error:
            # Too much shared memory for this GPU, or a wrong result: not a candidate here.
            print(f"{kind} {config.name}: {error}", flush=True)
            continue
        best = min(best, (sum(logs) / len(logs), config), key=lambda item: item[0])
    forget_counters()
    return best[1]


def tune(seconds: float, kinds: tuple[str, ...] | None = None) -> tuple[Table, Path]:
    """Measure this GPU for about ``seconds`` (compiling included), save the table, and return it and its place.

    Raises:
        RuntimeError: no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tune: needs a CUDA device, this torch sees none.")
    device = torch.device("cuda", torch.cuda.current_device())
    shipped = table_for(capability(device))
    kinds = kinds or tuple(kind for kind in shipped if kind != "w8a8-fp8" or capability(device) >= (8, 9))
    found: dict[str, list[Choice]] = {}
    end = time.perf_counter() + seconds
    for tokens, serves in BUCKETS:
        for kind in kinds:
            config = tune_kind(kind, tokens, WEIGHTS, end)
            if config is not None:
                found.setdefault(kind, []).append(Choice(serves, config))
    table = {}
    for kind, choices in found.items():
        served = {choice.tokens for choice in choices}
        table[kind] = tuple(choices + [choice for choice in shipped[kind] if choice.tokens not in served])
    path = table_path(device)
    save_table(table, path, environment("cuda"))
    return table, path


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="stop with what was found after this time")
    parser.add_argument("--kinds", nargs="+", help="kinds of products; default all that this GPU has")
    options = parser.parse_args(arguments)
    table, path = tune(options.seconds, tuple(options.kinds) if options.kinds else None)
    for kind, choices in table.items():
        for choice in choices:
            tokens = "any" if choice.tokens == MANY else str(choice.tokens)
            print(f"{kind:10s} up to {tokens} tokens: {choice.config.name}")
    print(path)


if __name__ == "__main__":
    main()
