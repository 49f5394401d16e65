"""Low-bit attention on this GPU beside torch's own (cuDNN and flash), in the same run.

    python -m diffuse_compress_kernels.benchmarks.gpu_attention --minutes 2 --out gpu_attention.json

Checks every tile first (against the plain computation, with guards around the output; these compile in parallel). Then,
per shape, every way is replayed as a CUDA graph in turns: whole operators, codes included, and the kernel alone with
each tile ("part ..."). A second run with the same ``--out`` goes on where the first one stopped. Without
``--tiles`` only the tiles of the table run.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffuse_compress_kernels import triton_kernels
from diffuse_compress_kernels.attention import int8_attention
from diffuse_compress_kernels.attention.plain import attend_plain
from diffuse_compress_kernels.attention.reference import attention_reference
from diffuse_compress_kernels.benchmarks.gpu_checks import Check, guarded, intact, run_checks
from diffuse_compress_kernels.benchmarks.gpu_linear import environment
from diffuse_compress_kernels.triton_kernels.attention_tables import (
    AttentionTile,
    attention_candidates,
    choose_attention,
)
from diffuse_compress_kernels.triton_kernels.timing import Arm, time_arms

__all__ = ["CASES", "Case", "check_tile", "main", "time_case"]

ROTATED_BYTES = 150 << 20
SEEN_QUERIES = 256
STOCK = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
VARIANTS = {"accurate": False, "fast": True}

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One attention: [batch, tokens, heads, depth], as diffusers lays it out."""

    batch: int
    heads: int
    queries: int
    keys: int
    depth: int
    kv_heads: int = 0
    causal: bool = False

    @property
    def flops(self) -> float:
        """Of both products; half of them under causality."""
        return 4.0 * self.batch * self.heads * self.queries * self.keys * self.depth / (1 + self.causal)

    def tensors(self, device: str, dtype: torch.dtype) -> Tensors:
        """query, key, value of N(0, 1), [B, H, S, D] views of [B, S, H, D]."""
        kv_heads = self.kv_heads or self.heads
        shapes = ((self.queries, self.heads), (self.keys, kv_heads), (self.keys, kv_heads))
        query, key, value = (
            torch.randn(self.batch, s, h, self.depth, device=device, dtype=dtype).transpose(1, 2) for s, h in shapes
        )
        return query, key, value


# The most telling ones first. Wan-14B has 40 heads, of which 8 keep a large GPU as busy.
CASES: dict[str, Case] = {
    "flux": Case(1, 24, 4608, 4608, 128),
    "wan14b 480p, 8 heads": Case(1, 8, 32760, 32760, 128),
    "pixart 1024": Case(2, 16, 4096, 4096, 72),
    "sdxl 64": Case(2, 10, 4096, 4096, 64),
    "sdxl 32": Case(2, 20, 1024, 1024, 64),
    "sd3 1024": Case(2, 24, 4429, 4429, 64),
    "wan14b text": Case(1, 40, 32760, 512, 128),
    "pixart text": Case(2, 16, 4096, 300, 72),
    "cogvideox2b, 8 heads": Case(2, 8, 17776, 17776, 64),
    "llama prefill": Case(1, 32, 4096, 4096, 128, kv_heads=8, causal=True),
}


def _run_tile(
    tensors: Tensors,
    tile: AttentionTile,
    fast: bool,
    causal: bool,
    out: torch.Tensor,
    codes: Any = None,
) -> torch.Tensor:
    query, key, value = tensors
    if codes is None:
        codes = triton_kernels.module("attention_codes").quantize_keys_values(key, value, None, fp8_values=fast)
    scale = query.shape[-1] ** -0.5
    triton_kernels.module("attention").attend(query, value, codes, None, None, scale, causal, tile, out)
    return out


def check_tile(depth: int, fast: bool, tile: AttentionTile, device: str) -> None:
    """Raise unless a tile computes what plain torch does, and writes nowhere else."""
    # The interpreter has no bf16 products.
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    case = Case(1, 4, 333, 700, depth, kv_heads=2) if device == "cuda" else Case(1, 2, 40, 140, depth)
    tensors = case.tensors(device, dtype)
    for causal in (False, True):
        out, buffer = guarded(tuple(tensors[0].shape), dtype, device)
        _run_tile(tensors, tile, fast, causal, out)
        expected = torch.empty_like(out)
        attend_plain(*tensors, None, None, depth**-0.5, causal, fast, expected)
        error = _error(expected, out)
        if not error < (0.02 if fast else 0.005) or not intact(buffer):
            raise ValueError(f"relative error {error:.1e} with causal={causal}, intact: {intact(buffer)}")


def _error(expected: torch.Tensor, found: torch.Tensor) -> float:
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def _tiles(case: Case, fast: bool, every: bool) -> list[AttentionTile]:
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    chosen = choose_attention(case.queries, case.depth, capability, fp8_values=fast)
    return [chosen, *(tile for tile in attention_candidates() if tile != chosen and every)]


def _checks(device: str, every: bool) -> list[Check]:
    module = f"{__package__}.gpu_attention:check_tile"
    found = {}
    for case in CASES.values() if device == "cuda" else [CASES["pixart 1024"]]:
        for name, fast in VARIANTS.items():
            for tile in _tiles(case, fast, every):
                found[f"{name} {case.depth} {tile.name}"] = (case.depth, fast, tile, device)
    return [(name, module, arguments) for name, arguments in found.items()]


# --- timing -----------------------------------------------------------------------------------------------------


def _stock(backend: SDPBackend, tensors: Tensors, causal: bool) -> torch.Tensor:
    shared = tensors[0].shape[1] != tensors[1].shape[1]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=shared)


def _arms(case: Case, sets: list[Tensors], verdicts: dict[str, str], every: bool) -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    for name, backend in STOCK.items():
        arms[name] = lambda i, backend=backend: _stock(backend, sets[i], case.causal)  # type: ignore[misc]
    quantize = triton_kernels.module("attention_codes").quantize_keys_values
    out = torch.empty_like(sets[0][0])
    for name, fast in VARIANTS.items():
        operator = partial(int8_attention, causal=case.causal, fp8_values=fast)
        arms[name] = lambda i, operator=operator: operator(*sets[i])  # type: ignore[misc]
        arms[f"part codes {name}"] = lambda i, fast=fast: quantize(*sets[i][1:], None, fp8_values=fast)  # type: ignore[misc]
        codes = [quantize(key, value, None, fp8_values=fast) for _, key, value in sets]
        for tile in _tiles(case, fast, every):
            if verdicts.get(f"{name} {case.depth} {tile.name}") != "ok":
                continue
            arms[f"part {name} {tile.name}"] = lambda i, tile=tile, fast=fast, codes=codes: _run_tile(  # type: ignore[misc]
                sets[i], tile, fast, case.causal, out, codes[i]
            )
    return arms


def _errors(case: Case, tensors: Tensors) -> dict[str, float]:
    """Frobenius errors against float64, of the last queries of a head."""
    query, key, value = (x[:1, :1] for x in tensors)
    rows = slice(-SEEN_QUERIES, None)
    mask = None
    if case.causal:
        mask = torch.ones(case.queries, case.keys, dtype=torch.bool, device=query.device).tril()[rows]
    expected = attention_reference(query[:, :, rows], key, value, mask)
    errors = {}
    for name, fast in VARIANTS.items():
        found = int8_attention(query, key, value, causal=case.causal, fp8_values=fast)
        errors[name] = round(_error(expected, found[:, :, rows]), 5)
    return errors


def time_case(label: str, case: Case, verdicts: dict[str, str], rounds: int, every: bool) -> dict[str, Any]:
    """The record of one shape."""
    one = sum(x.numel() * x.element_size() for x in case.tensors("meta", torch.bfloat16))
    sets = [case.tensors("cuda", torch.bfloat16) for _ in range(max(1, min(8, -(-ROTATED_BYTES // one))))]
    errors = _errors(case, sets[0])
    failures: dict[str, str] = {}
    times = time_arms(_arms(case, sets, verdicts, every), len(sets), rounds=rounds, failures=failures)
    stock = min((times[name] for name in STOCK if name in times), default=float("nan"))
    print(f"{label} {case}: stock {stock:.1f} us, errors {errors}", flush=True)
    for name, value in times.items():
        print(
            f"    {name:34s} {value:9.1f} us {case.flops / value / 1e6:7.0f} TFLOP/s {stock / value:6.2f}", flush=True
        )
    for name, text in failures.items():
        print(f"    {name}: {text}", flush=True)
    micros = {name: round(value, 2) for name, value in times.items()}
    return {"label": label, "flops": case.flops, "errors": errors, "microseconds": micros, "failures": failures}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2, help="no new shape after this time")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_attention.json"), help="read, and rewritten by each shape"
    )
    parser.add_argument("--tiles", action="store_true", help="every candidate, not those of the table alone")
    parser.add_argument("--rounds", type=int, default=7, help="timed replays per arm")
    parser.add_argument("--dry-run", action="store_true", help="checks alone, on the CPU: TRITON_INTERPRET=1")
    options = parser.parse_args(arguments)
    end = time.perf_counter() + 60 * options.minutes
    device = "cpu" if options.dry_run else "cuda"
    here = environment(device)
    record: dict[str, Any] = {"environment": here, "checks": {}, "shapes": []}
    if options.out.exists() and not options.dry_run:
        before = json.loads(options.out.read_text())
        if {**before["environment"], "date": here["date"]} == here:
            record = before
    print(json.dumps(here), flush=True)
    todo = [check for check in _checks(device, options.tiles) if record["checks"].get(check[0]) != "ok"]
    record["checks"].update(run_checks(todo, device))
    if options.dry_run:
        print(json.dumps(record["checks"], indent=1))
    done = {shape["label"] for shape in record["shapes"]}
    for label, case in CASES.items():
        if options.dry_run or label in done:
            continue
        if time.perf_counter() > end:
            print("out of time", flush=True)
            break
        record["shapes"].append(time_case(label, case, record["checks"], options.rounds, options.tiles))
        torch.cuda.empty_cache()
        options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
