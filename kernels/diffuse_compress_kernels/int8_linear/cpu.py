"""Integer products on the CPU, in blocks of rows and columns that stay in cache.

Eager torch makes one pass over memory per operation. On whole tensors these passes cost more than the integer GEMM
between them, so everything here runs block by block on preallocated scratch:

    codes = round(x / scale) + zero_point                     fp32 -> int8, one block of rows
    acc   = codes @ weight.T                                  int32, exact
    y     = (acc - zero_point * rowsum(weight)) * scale * weight_scale + bias      fp32, rounded once to x's dtype

Two integer GEMMs give the same int32, bit for bit. CPUs with VNNI or AMX instructions use ``torch._int_mm``. Without
them oneDNN has no fast kernel (a scalar loop of 3 GOP/s), so the codes are multiplied as float32: every partial sum is
an integer below 2**24, hence exact in any order and with or without FMA. That holds by the Cauchy-Schwarz inequality
when |a_row| * |b_column| < 2**24, and otherwise for runs of 1024 columns, whose results are added as int32.
"""

from __future__ import annotations

import threading
from functools import cache

import torch

__all__ = ["has_fast_int8", "int_matmul", "linear", "linear_codes", "quantize_rows"]

MIN_SCALE = torch.finfo(torch.float32).tiny
ROWS_PER_BLOCK = 256
COLUMNS_PER_BLOCK = 1280
QUANTIZE_BLOCK_ELEMENTS = 1 << 18
FLOAT_EXACT_LIMIT = float(1 << 24) * (1 - 1e-4)
FLOAT_EXACT_K = 1024
FLOAT_WEIGHT_BLOCK_ELEMENTS = 1 << 21
KEPT_SCRATCH_BYTES = 16 << 20
MAX_VIEWS = 256
# 1.5 * 2**23: adding it to |v| <= 2**22 rounds v half to even and leaves it in the low bits of the float.
ROUNDING_MAGIC = 12582912.0


@cache
def has_fast_int8() -> bool:
    """True if this CPU multiplies int8 natively (AVX512-VNNI or AMX) and torch was built to use it."""
    probe = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(torch.backends.mkldnn.is_available() and probe is not None and probe())


class _Scratch(threading.local):
    """Buffers that a thread keeps between calls: fresh ones would cost more page faults than some layers' GEMM."""

    def __init__(self) -> None:
        self.kept: dict[torch.dtype, torch.Tensor] = {}
        self.views: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Uninitialised [rows, columns]; the next call for this dtype overwrites it."""
        if device.type != "cpu" or rows * columns * dtype.itemsize > KEPT_SCRATCH_BYTES:
            return torch.empty(rows, columns, dtype=dtype, device=device)
        view = self.views.get((rows, columns, dtype))
        if view is None:
            view = self.views[rows, columns, dtype] = self._view(rows, columns, dtype)
        return view

    def _view(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = self.kept.get(dtype)
        # Tensors made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            if buffer is None or buffer.numel() < rows * columns or len(self.views) >= MAX_VIEWS:
                self.views.clear()
                count = max(rows * columns, 0 if buffer is None else buffer.numel())
                buffer = self.kept[dtype] = torch.empty(count, dtype=dtype)
            return buffer[: rows * columns].view(rows, columns)


_SCRATCH = _Scratch()


@cache
def _magic_row(columns: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.full((columns,), ROUNDING_MAGIC)


def quantize_rows(
    x: torch.Tensor,
    qmin: int,
    qmax: int,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    pre_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of x [M, K] and their fp32 scale: [M, 1] measured per row, or the given one as [1, 1]."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, _quantize_into(codes, x, qmin, qmax, scale, zero_point, pre_scale)


def _quantize_into(
    codes: torch.Tensor,
    x: torch.Tensor,
    qmin: int,
    qmax: int,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Write the codes of x [M, K], a cache's worth of rows at a time; returns the scale, [M, 1] or [1, 1]."""
    rows, columns = x.shape
    block = min(rows, max(1, QUANTIZE_BLOCK_ELEMENTS // max(columns, 1)))
    scratch = _SCRATCH.take(block, columns, torch.float32, x.device)
    if rows and block == rows:
        return _quantize_block(x, codes, scratch, qmin, qmax, scale, zero_point, pre_scale)
    scales = []
    for start in range(0, rows, block or 1):
        part = slice(start, min(start + block, rows))
        buffer = _part(scratch, slice(0, part.stop - part.start))
        scales.append(_quantize_block(x[part], codes[part], buffer, qmin, qmax, scale, zero_point, pre_scale))
    if scale is not None:
        return scale.reshape(1, 1)
    return torch.cat(scales) if scales else torch.empty(0, 1, dtype=torch.float32, device=x.device)


def _quantize_block(
    x: torch.Tensor,
    codes: torch.Tensor,
    scratch: torch.Tensor,
    qmin: int,
    qmax: int,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Write the codes of one block of rows; scratch is fp32 of its shape. Returns the scale, [m, 1] or [1, 1]."""
    if pre_scale is not None:
        values = torch.mul(x, pre_scale, out=scratch) if x.dtype == torch.float32 else scratch.copy_(x).mul_(pre_scale)
    else:
        values = x if x.dtype == torch.float32 else scratch.copy_(x)
    if scale is not None:
        torch.div(values, scale.reshape(1, 1), out=scratch).round_()
        if zero_point is not None:
            scratch.add_(zero_point)
        codes.copy_(scratch.clamp_(qmin, qmax))
        return scale.reshape(1, 1)
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    block_scale = torch.maximum(high, low.neg_()).div_(qmax).clamp_(min=MIN_SCALE)
    # round(values / scale) as integers, in one pass: a measured scale keeps them within the range of the codes.
    torch.addcdiv(_magic_row(x.shape[1]), values, block_scale, out=scratch)
    codes.copy_(scratch.view(torch.int32))
    return block_scale


def int_matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """int32 [M, N] of int8 a [M, K] and b [K, N] (any strides), exact."""
    if out is None:
        out = torch.empty(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    if 0 in (a.shape[0], a.shape[1], b.shape[1]):
        return out.zero_()
    if has_fast_int8() and a.device.type == "cpu" and _is_laid_out_plainly(a, b):
        return torch._int_mm(a, b, out=out)
    return _float_matmul(a.float(), b.float(), out)


def _is_laid_out_plainly(a: torch.Tensor, b: torch.Tensor) -> bool:
    """False for strides that ``torch._int_mm`` misreads, and then reads past the end: (1, 1) beside a side of 1."""
    depth, columns = b.shape
    return (a.shape[0] > 1 or a.stride(0) >= depth) and (depth > 1 or b.stride(0) >= columns)


def _float_matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The same from codes held as float32."""
    depth = a.shape[1]
    if depth > FLOAT_EXACT_K:
        bound = torch.linalg.vector_norm(a, dim=1).amax() * torch.linalg.vector_norm(b, dim=0).amax()
        if float(bound) > FLOAT_EXACT_LIMIT:
            out.zero_()
            for start in range(0, depth, FLOAT_EXACT_K):
                part = slice(start, start + FLOAT_EXACT_K)
                out += torch.mm(a[:, part], b[part]).to(torch.int32)
            return out
    return out.copy_(torch.mm(a, b))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    qmin: int,
    qmax: int,
    input_scale: torch.Tensor | None,
    input_zero_point: torch.Tensor | None,
    pre_scale: torch.Tensor | None,
) -> torch.Tensor:
    """y [M, N] in x's dtype from x [M, K] and int8 weight [N, K]; equation in the module docstring."""
    if not has_fast_int8():
        codes, scale = quantize_rows(x, qmin, qmax, input_scale, input_zero_point, pre_scale)
        return linear_codes(codes, scale, input_zero_point, weight, weight_scale, bias, x.dtype)
    rows, depth = x.shape
    out = torch.empty(rows, weight.shape[0], dtype=x.dtype)
    block = max(1, min(rows, ROWS_PER_BLOCK * torch.get_num_threads()))
    codes = _SCRATCH.take(block, depth, torch.int8, x.device)
    epilogue = _Epilogue(weight, weight_scale, bias, input_zero_point, block)
    for start in range(0, rows, block):
        part = slice(start, min(start + block, rows))
        some = _part(codes, slice(0, part.stop - part.start))
        scale = _quantize_into(some, _part(x, part), qmin, qmax, input_scale, input_zero_point, pre_scale)
        epilogue.multiply(some, scale, _part(out, part))
    return out


def _part(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
    """``tensor[rows]``; the tensor itself when that is all of it, because a view costs as much as a small product."""
    return tensor if rows.start == 0 and rows.stop == tensor.shape[0] else tensor[rows]


def linear_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As :func:`linear` for an input that is quantized already: codes [M, K], scale [M, 1] or [1, 1]."""
    rows = codes.shape[0]
    out = torch.empty(rows, weight.shape[0], dtype=dtype, device=codes.device)
    fast = has_fast_int8() and codes.device.type == "cpu"
    block = max(1, min(rows, ROWS_PER_BLOCK * torch.get_num_threads()))
    epilogue = _Epilogue(weight, weight_scale, bias, zero_point, block)
    if not fast:
        _linear_codes_float(codes, scale, epilogue, out, block)
        return out
    for start in range(0, rows, block):
        part = slice(start, start + block)
        epilogue.multiply(codes[part], scale if scale.shape[0] == 1 else scale[part], out[part])
    return out


def _linear_codes_float(
    codes: torch.Tensor, scale: torch.Tensor, epilogue: _Epilogue, out: torch.Tensor, block: int
) -> None:
    """Weights go to float32 once per block of columns, so columns are the outer loop."""
    outputs, depth = epilogue.weight.shape
    columns = max(1, min(epilogue.acc.shape[1], FLOAT_WEIGHT_BLOCK_ELEMENTS // max(depth, 1)))
    for first in range(0, outputs, columns):
        part = slice(first, min(first + columns, outputs))
        weight = epilogue.weight[part].float().t()
        for start in range(0, codes.shape[0], block):
            rows = slice(start, start + block)
            some = codes[rows].float()
            acc = _float_matmul(some, weight, epilogue.buffer(some.shape[0], part))
            epilogue.write(acc, scale if scale.shape[0] == 1 else scale[rows], part, out[rows, part])


class _Epilogue:
    """Integer GEMM and fp32 epilogue of blocks of rows against one weight, on scratch of its own."""

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        zero_point: torch.Tensor | None,
        rows: int,
    ) -> None:
        outputs = weight.shape[0]
        self.weight = weight
        self.scale = weight_scale.view(-1) if weight_scale.shape[0] == outputs else weight_scale.view(1).expand(outputs)
        self.bias = None if bias is None else bias.float()
        self.offset = None
        if zero_point is not None:
            self.offset = weight.sum(dim=1, dtype=torch.int32).mul_(zero_point.reshape(1).to(torch.int32))
        # Slices of equal width: a narrow rest would cost a GEMM of its own.
        self.columns = max(1, -(-outputs // max(1, -(-outputs // COLUMNS_PER_BLOCK))))
        self.acc = _SCRATCH.take(rows, self.columns, torch.int32, weight.device)

    def buffer(self, rows: int, part: slice) -> torch.Tensor:
        """Contiguous int32 scratch for the columns ``part``."""
        columns = part.stop - part.start
        if (rows, columns) == self.acc.shape:
            return self.acc
        return self.acc.as_strided((rows, columns), (columns, 1))

    def multiply(self, codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
        """out [m, N] = epilogue(codes [m, K] @ weight.T)."""
        outputs = self.weight.shape[0]
        for first in range(0, outputs, self.columns):
            part = slice(first, min(first + self.columns, outputs))
            acc = int_matmul(codes, _part(self.weight, part).t(), self.buffer(codes.shape[0], part))
            whole = part.stop - part.start == outputs
            self.write(acc, scale, part, out if whole else out[:, part])

    def write(self, acc: torch.Tensor, scale: torch.Tensor, part: slice, out: torch.Tensor) -> None:
        """out [m, n] = (acc - offset) * scale * weight_scale + bias for the columns ``part``."""
        if self.offset is not None:
            acc -= self.offset[part]
        # In place: each integer is read before the float of its own bytes is written.
        values = acc.view(torch.float32).copy_(acc).mul_(scale)
        target = out if out.dtype == torch.float32 else values
        if self.bias is None:
            torch.mul(values, _part(self.scale, part), out=target)
        else:
            torch.addcmul(_part(self.bias, part), values, _part(self.scale, part), out=target)
        if target is not out:
            out.copy_(values)
