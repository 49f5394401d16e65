"""Random operands of the GPU kernels, how each kind is run on them, and what it must return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffuse_compress_kernels.triton_kernels.gemv import w4a16_gemv
from diffuse_compress_kernels.triton_kernels.reference import int8_weight_reference, w4a16_reference
from diffuse_compress_kernels.triton_kernels.w4a8 import w4a8
from diffuse_compress_kernels.triton_kernels.w4a16 import w4a16
from diffuse_compress_kernels.triton_kernels.w8a8 import w8a8

__all__ = ["KINDS", "Problem", "check", "problem", "run_kernel"]

KINDS = ("w8a8-int8", "w8a8-fp8", "w4a8", "w4a8-two-level", "w4a16", "w4a16-gemv")
GROUP_SIZE = 128
SENTINEL = 7777777
# Relative RMS against float64: one rounding of the output costs 1.7e-3 in bf16; float8 sums have about 14 bits, and
# w4a16 rounds scale and product to 16 bits.
LIMITS = {"w8a8-int8": 2.5e-3, "w4a8": 2.5e-3, "w4a8-two-level": 2.5e-3, "w8a8-fp8": 4e-3, "w4a16": 6e-3}


@dataclass
class Problem:
    """Operands by buffer set; what a kind does not use is None."""

    kind: str
    rows: int
    outputs: int
    depth: int
    x: list[torch.Tensor]
    weight: list[torch.Tensor]
    out: list[torch.Tensor]
    x_scale: torch.Tensor
    w_scale: torch.Tensor
    group_scale: list[torch.Tensor] | None
    zero_point: torch.Tensor | None
    bias: torch.Tensor | None


def problem(
    kind: str,
    rows: int,
    outputs: int,
    depth: int,
    *,
    sets: int,
    device: str,
    bias: bool = False,
    zero_point: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    """Operands of one kind of product, ``sets`` times."""

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)

    groups = -(-depth // 128)
    if kind.startswith("w4a16"):
        x = [torch.randn(rows, depth, device=device).to(dtype) for _ in range(sets)]
    elif kind == "w8a8-fp8":
        x = [
            torch.randn(rows, depth, device=device).mul(80).clamp(-448, 448).to(torch.float8_e4m3fn)
            for _ in range(sets)
        ]
    else:
        x = [codes(rows, depth).clamp(min=-127) for _ in range(sets)]
    if kind == "w8a8-fp8":
        weight = [torch.randn(outputs, depth, device=device).mul(80).to(torch.float8_e4m3fn) for _ in range(sets)]
    elif kind == "w8a8-int8":
        weight = [codes(outputs, depth) for _ in range(sets)]
    else:
        weight = [codes(outputs, groups * 64) for _ in range(sets)]
    group_scale = None
    if kind == "w4a8-two-level":
        group_scale = [torch.randint(1, 17, (outputs, groups), dtype=torch.int8, device=device) for _ in range(sets)]
        for packed in weight:
            # Two-level codes are -7..7, so that times 16 they fit into int8: no nibble is 8.
            packed.masked_fill_((packed & 0x0F) == 8, 0).masked_fill_((packed.view(torch.uint8) >> 4) == 8, 0)
    elif kind.startswith("w4a16"):
        group_scale = [torch.rand(outputs, groups, device=device) * 0.1 + 0.01 for _ in range(sets)]
    with_zero = zero_point and kind.startswith("w4a16")
    return Problem(
        kind,
        rows,
        outputs,
        depth,
        x,
        weight,
        [torch.empty(rows, outputs, dtype=dtype, device=device) for _ in range(sets)],
        torch.rand(rows, 1, device=device) * 0.1,
        torch.rand(outputs, 1, device=device) * 0.01,
        group_scale,
        torch.randint(-8, 8, (outputs, groups), dtype=torch.int8, device=device) if with_zero else None,
        torch.randn(outputs, device=device).to(dtype) if bias else None,
    )


def run_kernel(
    case: Problem, index: int, config: Any, *, out: torch.Tensor | None = None, asm: bool = True
) -> torch.Tensor:
    """y of one buffer set, in its own output or in ``out``; int32 outputs get the sums themselves."""
    out = case.out[index] if out is None else out
    x, weight = case.x[index], case.weight[index]
    group_scale = None if case.group_scale is None else case.group_scale[index]
    if case.kind == "w4a16-gemv":
        assert group_scale is not None
        return w4a16_gemv(x, weight, group_scale, case.zero_point, config, bias=case.bias, out=out, asm=asm)
    if case.kind == "w4a16":
        assert group_scale is not None
        return w4a16(x, weight, group_scale, case.zero_point, GROUP_SIZE, config, bias=case.bias, out=out, asm=asm)
    sums = out.dtype == torch.int32
    x_scale, w_scale, bias = (None, None, None) if sums else (case.x_scale, case.w_scale, case.bias)
    if case.kind.startswith("w8a8"):
        return w8a8(x, x_scale, weight, w_scale, config, bias=bias, out=out)
    return w4a8(x, x_scale, weight, w_scale, config, group_scale=group_scale, bias=bias, out=out, asm=asm)


def _expected(case: Problem) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(exact integer sums or None, float64 result)."""
    x, weight = case.x[0], case.weight[0]
    group_scale = None if case.group_scale is None else case.group_scale[0]
    if case.kind.startswith("w4a16"):
        assert group_scale is not None
        y = w4a16_reference(x, weight, group_scale, case.zero_point, GROUP_SIZE)
        return None, y if case.bias is None else y + case.bias.double()
    if case.kind.startswith("w4a8"):
        weight = int8_weight_reference(weight, group_scale, case.depth)
    sums = x.double() @ weight.double().t()
    y = sums * case.x_scale.double() * case.w_scale.double().t()
    if case.bias is not None:
        y = y + case.bias.double()
    return None if case.kind == "w8a8-fp8" else sums.long(), y


def _poisoned(rows: int, outputs: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(the middle of a buffer full of a sentinel, the buffer)."""
    value = SENTINEL if dtype == torch.int32 else float("nan")
    buffer = torch.full((rows + 2, outputs + 16), value, dtype=dtype, device=device)
    return buffer[1 : rows + 1, :outputs], buffer


def _untouched(buffer: torch.Tensor) -> bool:
    """True if everything around the output still is the sentinel."""
    around = torch.cat([buffer[0], buffer[-1], buffer[1:-1, -16:].flatten()])
    return bool((around == SENTINEL).all() if buffer.dtype == torch.int32 else around.isnan().all())


def check(kind: str, config: Any, tokens: int, device: str, *, asm: bool, compare_plain: bool) -> None:
    """Raise unless the kernel is right on fresh data: sums exact, floats near float64, nothing else written."""
    big = device == "cuda"
    # Rows and outputs that no tile divides.
    rows, outputs, depth = (tokens if tokens <= 64 else 333, 720, 1152) if big else (min(tokens, 21), 80, 272)
    dtype = torch.bfloat16 if big else torch.float16
    # On a GPU without a bias, as in the timings: the compiled kernel is the same one then.
    case = problem(kind, rows, outputs, depth, sets=1, device=device, bias=not big, dtype=dtype)
    sums, expected = _expected(case)
    if sums is not None:
        out, buffer = _poisoned(rows, outputs, torch.int32, device)
        run_kernel(case, 0, config, out=out, asm=asm)
        if not torch.equal(out.long(), sums):
            raise ValueError(f"{int((out.long() != sums).sum())} of {out.numel()} sums are wrong")
        if not _untouched(buffer):
            raise ValueError("wrote outside the sums")
    # Twice: the second call finds the counters as the first has left them.
    results = []
    for variant in (asm, asm, *([False] if compare_plain and kind.startswith("w4") else [])):
        out, buffer = _poisoned(rows, outputs, dtype, device)
        run_kernel(case, 0, config, out=out, asm=variant)
        if not _untouched(buffer):
            raise ValueError("wrote outside the output")
        results.append(out)
    bad = ~results[0].isfinite()
    if bad.any():
        places = bad.nonzero()
        raise ValueError(
            f"{len(places)} values not finite, rows {int(places[:, 0].min())}..{int(places[:, 0].max())}, columns "
            f"{int(places[:, 1].min())}..{int(places[:, 1].max())}; the second call agrees on "
            f"{float((results[1].isfinite() == ~bad).float().mean()):.4f}"
        )
    error = float((results[0].double() - expected).norm() / expected.norm())
    if not error < LIMITS[kind.removesuffix("-gemv")]:
        raise ValueError(f"relative RMS error {error:.2e}")
    if not all(torch.equal(result, results[0]) for result in results[1:]):
        raise ValueError("two calls, or the assembly and the plain variant, differ")
