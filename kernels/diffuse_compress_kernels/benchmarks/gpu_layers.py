"""Whole quantized layers on this GPU, input quantization included, beside cuBLAS bf16 in the same run.

    python -m diffuse_compress_kernels.benchmarks.gpu_layers --minutes 5 --out gpu_layers.json

Checks every part first (codes bit for bit those of the CPU, expanded weights exact, products near float64). Then, per
shape, every way to compute the layer is replayed as a CUDA graph in turns with the dense one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffuse_compress_kernels.benchmarks.gpu_linear import environment
from diffuse_compress_kernels.benchmarks.shapes import GPU_DECODE_SHAPES, GPU_SHAPES
from diffuse_compress_kernels.int8_linear import cpu
from diffuse_compress_kernels.triton_kernels import products
from diffuse_compress_kernels.triton_kernels.candidates import gemv_candidates
from diffuse_compress_kernels.triton_kernels.expand import expand_to_float, expand_to_int8
from diffuse_compress_kernels.triton_kernels.gemv import w4a16_gemv
from diffuse_compress_kernels.triton_kernels.launch import forget_counters
from diffuse_compress_kernels.triton_kernels.reference import (
    int8_weight_reference,
    unpack_int4_reference,
    w4a16_reference,
)
from diffuse_compress_kernels.triton_kernels.rows import quantize_rows
from diffuse_compress_kernels.triton_kernels.timing import time_arms
from diffuse_compress_kernels.triton_kernels.w4a8 import w4a8
from diffuse_compress_kernels.triton_kernels.w4a16 import w4a16

__all__ = ["Layer", "checks", "main"]

FP8 = torch.float8_e4m3fn
ROTATED_BYTES = 300 << 20
WORKSPACES = (16, 32, 64, 256)


class Layer:
    """Random operands of a layer [M, K] -> [M, N] in every format, ``sets`` times where it matters for the cache."""

    def __init__(self, rows: int, outputs: int, depth: int, sets: int, device: str = "cuda") -> None:
        groups = -(-depth // 128)
        self.shape = (rows, outputs, depth)
        self.sets = range(sets)
        self.x = [torch.randn(rows, depth, device=device).bfloat16() for _ in self.sets]
        self.dense = [torch.randn(outputs, depth, device=device).bfloat16() for _ in self.sets]
        self.int8 = [self._codes(device, outputs, depth) for _ in self.sets]
        self.fp8 = [w.to(FP8) for w in self.dense]
        self.packed = [self._codes(device, outputs, groups * 64) for _ in self.sets]
        for packed in self.packed:
            packed.masked_fill_((packed & 0x0F) == 8, 0).masked_fill_((packed.view(torch.uint8) >> 4) == 8, 0)
        self.w_scale = torch.rand(outputs, 1, device=device) * 0.01
        self.int_scale = torch.randint(1, 17, (outputs, groups), dtype=torch.int8, device=device)
        self.group_scale = torch.rand(outputs, groups, device=device) * 0.1
        self.zero_point = torch.randint(-8, 8, (outputs, groups), dtype=torch.int8, device=device)

    @staticmethod
    def _codes(device: str, *shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


Arms = dict[str, Callable[[int], object]]


def _scaled_mm(codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    return torch._scaled_mm(
        codes, weight.t(), scale_a=scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


Quantized = tuple[torch.Tensor, torch.Tensor]


def _in_registers(layer: Layer, quantized: Quantized, i: int, two: bool) -> torch.Tensor:
    codes, scale = quantized
    config = products.config_for("w4a8", codes, layer.packed[i])
    return w4a8(codes, scale, layer.packed[i], layer.w_scale, config, group_scale=layer.int_scale if two else None)


def _expanded(layer: Layer, quantized: Quantized, i: int, two: bool) -> torch.Tensor:
    codes, scale = quantized
    group_scale = layer.int_scale if two else None
    return products.w4a8_expanded(codes, scale, None, layer.packed[i], layer.w_scale, group_scale, None, torch.bfloat16)


def _w4a16_expanded(layer: Layer, i: int, megabytes: int) -> torch.Tensor:
    products.WORKSPACE_BYTES = megabytes << 20
    return products.w4a16_expanded(layer.x[i], layer.packed[i], layer.group_scale, layer.zero_point, 128, None)


def _quantizing_arms(layer: Layer) -> Arms:
    def q8(i: int) -> Quantized:
        return quantize_rows(layer.x[i], -127, 127)

    def q_fp8(i: int) -> Quantized:
        return quantize_rows(layer.x[i], -448, 448)

    bf16 = torch.bfloat16
    return {
        "w8a8": lambda i: products.int8_linear_codes(*q8(i), None, layer.int8[i], layer.w_scale, None, bf16),
        "fp8": lambda i: products.fp8_linear_codes(*q_fp8(i), layer.fp8[i], layer.w_scale, None, bf16),
        "fp8 scaled_mm": lambda i: _scaled_mm(*q_fp8(i), layer.fp8[i], layer.w_scale),
        "w4a8 in registers": lambda i: _in_registers(layer, q8(i), i, False),
        "w4a8 expanded": lambda i: _expanded(layer, q8(i), i, False),
        "w4a8 two-level in registers": lambda i: _in_registers(layer, q8(i), i, True),
        "w4a8 two-level expanded": lambda i: _expanded(layer, q8(i), i, True),
    }


def large_arms(layer: Layer) -> Arms:
    """Ways to compute a layer with many tokens."""
    x, w = layer.x, layer.dense
    arms: Arms = {
        "bf16": lambda i: torch.mm(x[i], w[i].t()),
        "part quantize int8": lambda i: quantize_rows(x[i], -127, 127),
        "part quantize fp8": lambda i: quantize_rows(x[i], -448, 448),
        "part expand int8": lambda i: expand_to_int8(layer.packed[i], layer.int_scale, layer.int8[i]),
        "part expand bf16": lambda i: expand_to_float(
            layer.packed[i], layer.group_scale, layer.zero_point, 128, layer.dense[i]
        ),
    }
    arms |= _quantizing_arms(layer)
    config = products.config_for("w4a16", x[0], layer.packed[0])
    arms["w4a16 fused"] = lambda i: w4a16(x[i], layer.packed[i], layer.group_scale, layer.zero_point, 128, config)
    for megabytes in WORKSPACES:
        arms[f"w4a16 expanded {megabytes} MiB"] = lambda i, m=megabytes: _w4a16_expanded(layer, i, m)  # type: ignore[misc]
    return arms


def few_arms(layer: Layer) -> Arms:
    """Ways to compute a layer with few tokens."""
    x, w, bf16 = layer.x, layer.dense, torch.bfloat16
    arms: Arms = {
        "bf16": lambda i: torch.mm(x[i], w[i].t()),
        "part quantize int8": lambda i: quantize_rows(x[i], -127, 127),
        "w8a8": lambda i: products.int8_linear_codes(
            *quantize_rows(x[i], -127, 127), None, layer.int8[i], layer.w_scale, None, bf16
        ),
        "w4a8": lambda i: _in_registers(layer, quantize_rows(x[i], -127, 127), i, False),
        "w4a8 two-level": lambda i: _in_registers(layer, quantize_rows(x[i], -127, 127), i, True),
    }
    config = products.config_for("w4a16", x[0], layer.packed[0])
    arms["w4a16 fused"] = lambda i: w4a16(x[i], layer.packed[i], layer.group_scale, layer.zero_point, 128, config)
    if layer.shape[0] <= 4:
        for gemv in gemv_candidates():
            arms[f"w4a16 gemv {gemv.name}"] = lambda i, c=gemv: w4a16_gemv(  # type: ignore[misc]
                x[i], layer.packed[i], layer.group_scale, layer.zero_point, c
            )
    if layer.shape[0] > 16:
        arms["w4a16 expanded 64 MiB"] = lambda i: _w4a16_expanded(layer, i, 64)
    return arms


# --- checks -----------------------------------------------------------------------------------------------------


def _relative_rms(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def _check_rows(device: str) -> str:
    """Codes and scales of every way to divide, for many magnitudes, against the CPU."""
    on_gpu = device == "cuda"
    rows = 67 if on_gpu else 7
    for depth in (64, 272, 1152, 3072, 5120, 8960, 20000) if on_gpu else (64, 272, 1152):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.randn(rows, depth) * torch.logspace(-4, 4, rows)[:, None]
            x[3] = 0
            if dtype == torch.float32:
                x[4] *= 1e-30
                x[5] = torch.linspace(-127, 127, depth) + 0.5
            x = x.to(dtype)
            expected, expected_scale = cpu.quantize_rows(x, -127, 127)
            codes, scale = quantize_rows(x.to(device), -127, 127)
            if not torch.equal(scale.cpu(), expected_scale) or not torch.equal(codes.cpu(), expected):
                wrong = int((codes.cpu() != expected).sum())
                return f"quantize_rows {depth} {dtype}: {wrong} codes of {codes.numel()} differ from the CPU's"
    return "ok"


def _check_products(device: str, dtype: torch.dtype) -> dict[str, str]:
    """Relative RMS errors against float64."""
    outputs = 272 if device == "cuda" else 16
    layer = Layer(5, outputs, 1152, 1, device)
    x, packed = layer.x[0].to(dtype), layer.packed[0]
    verdicts = {}
    weight = expand_to_int8(packed, layer.int_scale, torch.empty_like(layer.int8[0]))
    exact = torch.equal(weight.long(), int8_weight_reference(packed, layer.int_scale, 1152))
    verdicts["expand_to_int8"] = "ok" if exact else "differs"
    floats = expand_to_float(
        packed, layer.group_scale, layer.zero_point, 128, torch.empty(outputs, 1152, device=device)
    )
    codes = unpack_int4_reference(packed, 1152) - layer.zero_point.long().repeat_interleave(128, dim=1)
    exact = torch.equal(floats, codes.float() * layer.group_scale.repeat_interleave(128, dim=1))
    verdicts["expand_to_float"] = "ok" if exact else "differs"
    expected = w4a16_reference(x, packed, layer.group_scale, layer.zero_point, 128)
    for config in gemv_candidates() if device == "cuda" else gemv_candidates()[:1]:
        y = w4a16_gemv(x, packed, layer.group_scale, layer.zero_point, config)
        error = _relative_rms(y, expected)
        plain = w4a16_gemv(x, packed, layer.group_scale, layer.zero_point, config, asm=False)
        same = torch.equal(y, plain)
        verdicts[f"gemv {config.name}"] = "ok" if error < 2.5e-3 and same else f"error {error:.1e}, plain equal: {same}"
    return verdicts


def checks(device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """{"part": "ok" or what is wrong}."""
    return {"quantize_rows": _check_rows(device), **_check_products(device, dtype)}


# --- running ----------------------------------------------------------------------------------------------------


def time_shape(label: str, shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """The record of one shape."""
    rows, outputs, depth = shape
    one = rows * depth * 2 + outputs * depth // 2 + rows * outputs * 2
    sets = max(3, min(32, -(-ROTATED_BYTES // one)))
    layer = Layer(*shape, sets)
    failures: dict[str, str] = {}
    arms = few_arms(layer) if rows <= 64 else large_arms(layer)
    times = time_arms(arms, sets, rounds=rounds, failures=failures)
    del layer, arms
    forget_counters()
    torch.cuda.empty_cache()
    print(f"{label} {rows}x{outputs}x{depth}: bf16 {times['bf16']:.1f} us", flush=True)
    for name, value in times.items():
        note = f"{value:8.1f} us" if name.startswith("part") else f"{times['bf16'] / value:8.2f}"
        print(f"    {name:34s} {note}", flush=True)
    for name, text in failures.items():
        print(f"    {name}: {text}", flush=True)
    micros = {name: round(value, 2) for name, value in times.items()}
    return {"label": label, "shape": list(shape), "sets": sets, "microseconds": micros, "failures": failures}


def _shapes(which: str) -> list[tuple[str, tuple[int, int, int]]]:
    large = list(GPU_SHAPES.items())
    few = [(f"{label} M={m}", (m, *nk)) for m in (1, 16, 64) for label, nk in GPU_DECODE_SHAPES.items()]
    if which != "all":
        return large if which == "large" else few
    mixed = []
    for i in range(max(len(large), len(few))):
        mixed += large[i : i + 1] + few[i : i + 1]
    return mixed


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="no new shape after this time")
    parser.add_argument("--out", type=Path, default=Path("gpu_layers.json"), help="results, rewritten after each shape")
    parser.add_argument("--shapes", choices=("all", "large", "few"), default="all")
    parser.add_argument("--rounds", type=int, default=7, help="timed replays per arm")
    parser.add_argument("--dry-run", action="store_true", help="checks alone, on the CPU: TRITON_INTERPRET=1")
    options = parser.parse_args(arguments)
    end = time.perf_counter() + 60 * options.minutes
    device = "cpu" if options.dry_run else "cuda"
    # The interpreter has no bf16 products.
    verdicts = checks(device, torch.float16 if options.dry_run else torch.bfloat16)
    record: dict[str, Any] = {"environment": environment(device), "checks": verdicts, "shapes": []}
    print(json.dumps(record["environment"]))
    print(
        "\n".join(f"check {name}: {text}" for name, text in verdicts.items() if text != "ok") or "checks ok", flush=True
    )
    for label, shape in [] if options.dry_run else _shapes(options.shapes):
        if time.perf_counter() > end:
            print("out of time", flush=True)
            break
        record["shapes"].append(time_shape(label, shape, options.rounds))
        options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
