"""Which product a quantized layer runs on this device, and what was measured of it; then runs it.

There are four kinds of path:

* integer: codes of weight and input are multiplied and summed exactly in int32, equal bit for bit on every device;
  one fp32 epilogue. All schemes with ``Scheme.has_integer_path``.
* float8: ``torch._scaled_mm``, with scales per tensor and row, or per block where the device passes a trial of these.
* weight-only on CUDA: codes are unpacked in registers, in front of a 16-bit tensor-core product.
* dequantizing: the weight is expanded to the input's dtype, a bounded block of rows at a time, and multiplied by
  ``torch.nn.functional.linear``. Inputs with an activation scheme are quantized and dequantized first. The result is
  within ``DEQUANTIZE_TOLERANCE`` (relative RMS) of the same codes and scales multiplied in float32: the weight and, if
  quantized, the input are rounded once to that dtype, which float32 does exactly.

Nothing here knows a gradient; layers wrap it (see ``layers.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from diffuse_compress.errors import UnsupportedHardwareError
from diffuse_compress.quantization.blocks import scale_rows
from diffuse_compress.quantization.measured import measured_conv, measured_on_cpu, measured_on_gpu
from diffuse_compress.quantization.numerics import (
    choose_activation_qparams,
    dequantize,
    dequantize_activation,
    integer_weight,
    quantize_activation,
)
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.product_dtype import product_dtype
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    Bilevel,
    NumberFormat,
    PerBlock,
    PerGroup,
    PerInputGroup,
    PerTensor,
    Scheme,
    TwoLevel,
)
from diffuse_compress_kernels import (
    can_expand,
    expand_weight,
    fp8_block_linear_codes,
    fp8_linear_codes,
    has_fast_int4,
    has_fast_int8,
    has_fp8_block_matmul,
    has_fp8_matmul,
    int8_conv2d,
    int8_linear,
    int8_linear_codes,
    quantize_groups_fp8,
    quantize_rows,
    quantize_rows_fp8,
    quantized_once,
    w4a8_linear_codes,
    w4a16_linear,
    w8a16_linear,
)

__all__ = [
    "DEQUANTIZE_TOLERANCE",
    "ComputePath",
    "Geometry",
    "InputQuantization",
    "compute_path",
    "conv2d",
    "dense_weight",
    "linear",
    "per_column",
    "require_device",
]

DEQUANTIZE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class ComputePath:
    """How a layer is computed.

    Attributes:
        name: "int8-vnni", "int8-cpu", "int8-cuda", "fp8-cuda", "fp8-block-cuda", "int4-cuda", "w8a16-cuda",
            "dequantize" or "dequantize-weight-only".
        is_integer: exact int32 sums; equal on every device that takes an integer path.
        description: one line for reports.
        faster_than_dense: measured against a dense layer in the input's dtype at 64 rows or more; None means
            "unmeasured here".
    """

    name: str
    is_integer: bool
    description: str
    faster_than_dense: bool | None = None

    def with_branch(self, what: str = "a low-rank branch") -> ComputePath:
        """Of a layer with a part beside its codes, whose time comes on top of what was measured."""
        faster = False if self.faster_than_dense is False else None
        return replace(self, description=f"{self.description}, and {what}", faster_than_dense=faster)


@dataclass
class InputQuantization:
    """What a layer knows of its input.

    Attributes:
        scale: fp32 [1], static activations only.
        zero_point: int8 [1], asymmetric static activations only.
        pre_scale: fp32 [K] (convolutions: [C]) that multiplies the input before it is quantized.
        clip: fp32 [M, 1] or [1, 1] that multiplies the measured scales, dynamic activations of linear layers only.
    """

    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    pre_scale: torch.Tensor | None = None
    clip: torch.Tensor | None = None


@dataclass(frozen=True)
class Geometry:
    """A convolution's shape; padding is zeros, equal on opposite sides."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def columns(self, channels: int) -> int:
        """Columns of the flattened weight for an input of ``channels``."""
        return channels // self.groups * self.kernel[0] * self.kernel[1]


# --- choice -----------------------------------------------------------------------------------------------------

_DESCRIPTIONS = {
    "int8-vnni": "int8 GEMM of the CPU (VNNI or AMX), exact int32 sums",
    "int8-cpu": "int8 codes multiplied as float32, exact int32 sums; this CPU has no VNNI",
    "int8-cuda": "int8 tensor-core GEMM, exact int32 sums",
    "fp8-cuda": "float8 tensor-core GEMM, row-wise scales",
    "fp8-block-cuda": "float8 tensor-core GEMM, scales per block",
    "int4-cuda": "int4 weights unpacked in registers, 16-bit tensor-core GEMM",
    "w8a16-cuda": "8-bit weights converted in registers, 16-bit tensor-core GEMM; from 65 tokens on written out first",
    "dequantize": "weight dequantized in blocks, then a dense product",
    "dequantize-weight-only": "weight dequantized in blocks, input left alone: no float8 matmul for it here",
}


def compute_path(
    scheme: Scheme,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    kind: str = "linear",
    groups: int = 1,
    geometry: Geometry | None = None,
    outputs: int | None = None,
) -> ComputePath:
    """The path of a layer with this scheme.

    Args:
        scheme: the layer's.
        device: where weight and input are.
        dtype: of the input.
        kind: "linear" or "conv2d".
        groups: of a convolution; grouped ones have no integer path.
        geometry: of a convolution: what was measured depends on it.
        outputs: out_features of a linear layer, likewise; None judges layers of all sizes together.
    """
    device = torch.device(device)
    chosen = _kind_of_path(scheme, device, kind, groups, dtype)
    if chosen == "int8":
        if device.type == "cuda":
            name = "int8-cuda"
        else:
            name = "int8-vnni" if device.type == "cpu" and has_fast_int8() else "int8-cpu"
    else:
        name = f"{chosen}-cuda" if chosen in ("fp8", "fp8-block", "int4", "w8a16") else chosen
    faster = None
    if kind == "linear" and device.type == "cpu":
        faster = measured_on_cpu(name, scheme, dtype)
    elif kind == "linear" and device.type == "cuda":
        faster = measured_on_gpu(name, scheme, device, dtype, outputs)
    elif geometry is not None and device.type == "cuda":
        faster = measured_conv(name, scheme, device, dtype, geometry.kernel, geometry.stride)
    description = _DESCRIPTIONS[name]
    if scheme.input_rotation is not None:
        # It comes on top of what was measured.
        description, faster = f"input rotated, then {description}", None
    path = ComputePath(name, chosen == "int8", description, faster)
    threshold = None if scheme.activation is None else scheme.activation.outlier_threshold
    return path if threshold is None else path.with_branch(f"input columns from {threshold:g} on in the input's dtype")


def require_device(scheme: Scheme, device: torch.device | str) -> None:
    """Raise UnsupportedHardwareError if ``device`` is not there or cannot hold this scheme's tensors."""
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise UnsupportedHardwareError(
            'device="cuda": this torch sees no CUDA device. Leave device= out to compute where the weights are.'
        )
    if kind == "mps" and not scheme.weight.format.is_integer:
        raise UnsupportedHardwareError(
            f"{scheme.name} needs the dtype float8_e4m3fn, which the device 'mps' does not have. Use \"w8a16\" or "
            '"w8a8", or another device.'
        )


# torch.compile asks the hardware once, when it traces.
_has_fp8_matmul = torch.compiler.assume_constant_result(has_fp8_matmul)
_has_fp8_block_matmul = torch.compiler.assume_constant_result(has_fp8_block_matmul)
_has_fast_int4 = torch.compiler.assume_constant_result(has_fast_int4)


def _kind_of_path(
    scheme: Scheme, device: torch.device, kind: str, groups: int = 1, dtype: torch.dtype = torch.bfloat16
) -> str:
    """ "int8", "fp8", "fp8-block", "int4", "w8a16", "dequantize" or "dequantize-weight-only"."""
    if scheme.has_integer_path and groups == 1:
        return "int8"
    if kind == "linear" and scheme.activation is None and device.type == "cuda" and _has_fast_int4(device):
        if _suits_int4(scheme, dtype):
            return "int4"
        if _suits_w8a16(scheme, dtype) and (scheme.weight.format.is_integer or _has_fp8_matmul(device)):
            return "w8a16"
    if scheme.weight.format.is_integer or scheme.activation is None:
        return "dequantize"
    if kind == "linear" and device.type == "cuda" and _has_fp8_matmul(device):
        if not isinstance(scheme.weight.granularity, PerBlock):
            return "fp8"
        if _has_fp8_block_matmul(device):
            return "fp8-block"
    return "dequantize-weight-only"


def _suits_int4(scheme: Scheme, dtype: torch.dtype) -> bool:
    """True for weight-only int4 with integer zero points, scales by row and 16-bit inputs."""
    weight = scheme.weight
    if weight.format is not NumberFormat.INT4 or weight.stores_float_zero_point:
        return False
    has_kernel = not isinstance(weight.granularity, TwoLevel | Bilevel | PerInputGroup)
    return has_kernel and dtype in (torch.bfloat16, torch.float16)


def _suits_w8a16(scheme: Scheme, dtype: torch.dtype) -> bool:
    """True for weight-only 8-bit codes, scales by row and 16-bit inputs."""
    weight = scheme.weight
    if isinstance(weight.granularity, PerInputGroup):
        return False
    return weight.format.bits == 8 and not weight.additive_zero_point and dtype in (torch.bfloat16, torch.float16)


# --- linear -----------------------------------------------------------------------------------------------------


def _require_same_device(x: torch.Tensor, weight: QuantizedWeight) -> None:
    """Kernels would take the address for one of their own memory."""
    if x.device != weight.qweight.device:
        raise RuntimeError(
            f"a quantized layer needs inputs on the device of its weights, {weight.qweight.device}, got {x.device}. "
            "Move one of them."
        )


def linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    scheme: Scheme,
    bias: torch.Tensor | None = None,
    inputs: InputQuantization | None = None,
) -> torch.Tensor:
    """y [..., N] in the dtype of x, on the path of :func:`compute_path`; no gradient.

    Args:
        x: [..., K] fp32, bf16 or fp16, any strides, any number of rows.
        weight: [N, K].
        scheme: the layer's; ``scheme.weight`` is ``weight.scheme``.
        bias: [N], any float dtype.
        inputs: static qparams and smoothing scale, if the layer has them.
    """
    inputs = inputs or InputQuantization()
    _require_same_device(x, weight)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    path = _kind_of_path(scheme, x.device, "linear", dtype=x.dtype)
    if path == "int8":
        y = _integer_linear(x, rows, weight, scheme, bias, inputs)
    elif path == "fp8":
        y = _fp8_linear(x, rows, weight, scheme, bias, inputs)
    elif path == "fp8-block":
        y = _fp8_block_linear(x, rows, weight, scheme, bias, inputs)
    elif path in ("int4", "w8a16"):
        values = rows if inputs.pre_scale is None else (rows.float() * inputs.pre_scale).to(x.dtype)
        multiply = w4a16_linear if path == "int4" else w8a16_linear
        group_size = scheme.weight.group_size or 0
        scale = scale_rows(weight.scale, scheme.weight, weight.qweight.shape[0])
        y = multiply(values, weight.qweight, scale, weight.zero_point, group_size, bias)
    else:
        y = _dequantized_linear(rows, weight, scheme, bias, inputs, path)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def _integer_linear(
    source: torch.Tensor,
    x: torch.Tensor,
    weight: QuantizedWeight,
    scheme: Scheme,
    bias: torch.Tensor | None,
    inputs: InputQuantization,
) -> torch.Tensor:
    """``x`` is ``source`` as rows."""
    qmin, qmax = _code_range(scheme.activation)
    scale = _given_scale(x, scheme.activation, inputs)
    zero_point, packed = inputs.zero_point, scheme.weight.format is NumberFormat.INT4
    if source.is_cuda and (not packed or _has_fast_int4(x.device)) and scheme.weight.format.bits in (4, 8):

        def quantize() -> tuple[torch.Tensor, torch.Tensor]:
            return _row_codes(x, scheme.activation, scale, inputs)

        own = scale is not None or inputs.pre_scale is not None or inputs.clip is not None
        codes, code_scale = quantize() if own else quantized_once(source, weight.qweight, (qmin, qmax), quantize)
        if packed:
            group_scale = weight.group_scale
            return w4a8_linear_codes(
                codes, code_scale, zero_point, weight.qweight, weight.scale, group_scale, bias, x.dtype
            )
        return int8_linear_codes(codes, code_scale, zero_point, weight.qweight, weight.scale, bias, x.dtype)
    outputs = weight.qweight.shape[0]
    blocks = list(_row_blocks(outputs, weight.in_features)) if scheme.weight.format.bits != 8 else [slice(0, outputs)]
    if len(blocks) == 1 and inputs.clip is None:
        return int8_linear(
            x,
            integer_weight(weight),
            weight.scale,
            bias,
            qmin=qmin,
            qmax=qmax,
            input_scale=scale,
            input_zero_point=inputs.zero_point,
            pre_scale=inputs.pre_scale,
        )
    codes, code_scale = _row_codes(x, scheme.activation, scale, inputs)
    parts = [
        int8_linear_codes(
            codes,
            code_scale,
            inputs.zero_point,
            integer_weight(weight, block),
            _rows_of(weight.scale, block),
            None if bias is None else bias[block],
            x.dtype,
        )
        for block in blocks
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _row_codes(
    x: torch.Tensor, act: ActivationScheme | None, scale: torch.Tensor | None, inputs: InputQuantization
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [M, K] and the fp32 scale, [M, 1] or given as [1, 1]."""
    if inputs.clip is None:
        return quantize_rows(x, *_code_range(act), scale, inputs.zero_point, inputs.pre_scale)
    assert act is not None
    codes, scale, _ = quantize_activation(_scaled(x, inputs.pre_scale), act, clip=inputs.clip)
    return codes, scale


def _fp8_linear(
    source: torch.Tensor,
    x: torch.Tensor,
    weight: QuantizedWeight,
    scheme: Scheme,
    bias: torch.Tensor | None,
    inputs: InputQuantization,
) -> torch.Tensor:
    """``x`` is ``source`` as rows."""
    scale = _given_scale(x, scheme.activation, inputs)
    own = scale is not None or inputs.pre_scale is not None

    def quantize() -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_rows_fp8(x, scale, inputs.pre_scale)

    codes, code_scale = quantize() if own else quantized_once(source, weight.qweight, ("fp8",), quantize)
    return fp8_linear_codes(codes, code_scale, weight.qweight, weight.scale, bias, x.dtype)


def _fp8_block_linear(
    source: torch.Tensor,
    x: torch.Tensor,
    weight: QuantizedWeight,
    scheme: Scheme,
    bias: torch.Tensor | None,
    inputs: InputQuantization,
) -> torch.Tensor:
    """``x`` is ``source`` as rows. Scales of rows and tensors stand for each of their groups."""
    act = scheme.activation
    if act is not None and isinstance(act.granularity, PerGroup):

        def quantize() -> tuple[torch.Tensor, torch.Tensor]:
            return quantize_groups_fp8(x, inputs.pre_scale)

        own = inputs.pre_scale is not None
        codes, scale = quantize() if own else quantized_once(source, weight.qweight, ("fp8-block",), quantize)
    else:
        codes, scale = quantize_rows_fp8(x, _given_scale(x, act, inputs), inputs.pre_scale)
    return fp8_block_linear_codes(codes, scale, weight.qweight, weight.scale, bias, x.dtype)


def _dequantized_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    scheme: Scheme,
    bias: torch.Tensor | None,
    inputs: InputQuantization,
    path: str,
) -> torch.Tensor:
    dtype = product_dtype(x)
    values, pre_scale = _dequantized_input(x, scheme, inputs, path, dtype)
    if bias is not None:
        bias = bias.to(dtype)
    parts = [
        F.linear(values, _dense_rows(weight, dtype, pre_scale, block), None if bias is None else bias[block])
        for block in _row_blocks(weight.qweight.shape[0], weight.in_features)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(x.dtype)


def _dense_rows(
    weight: QuantizedWeight, dtype: torch.dtype, pre_scale: torch.Tensor | None, rows: slice | None
) -> torch.Tensor:
    """Rows of the dequantized weight, with ``pre_scale`` [K] folded in; fp32 arithmetic, one rounding."""
    if pre_scale is not None:
        return (_dense_rows(weight, torch.float32, None, rows) * pre_scale).to(dtype)
    scheme = weight.scheme
    simple = scheme.format.bits in (4, 8) and weight.group_scale is None and not scheme.additive_zero_point
    simple = simple and not isinstance(scheme.granularity, PerInputGroup)
    if not simple or not can_expand(weight.qweight):
        return dequantize(weight, dtype, rows)
    qweight, zero_point = weight.qweight, weight.zero_point
    scale = scale_rows(weight.scale, scheme, qweight.shape[0])
    if rows is not None:
        qweight, scale = qweight[rows], _rows_of(scale, rows)
        zero_point = None if zero_point is None else _rows_of(zero_point, rows)
    out = torch.empty(qweight.shape[0], weight.in_features, dtype=dtype, device=qweight.device)
    return expand_weight(qweight, scale, zero_point, scheme.group_size or 0, out, packed=scheme.format.bits == 4)


def dense_weight(
    weight: QuantizedWeight,
    dtype: torch.dtype,
    pre_scale: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The dense equivalent [N, K]: ``dequantize(weight) * pre_scale + up @ down``, fp32, rounded once.

    Args:
        weight: any scheme.
        dtype: of the result.
        pre_scale: fp32 [K].
        low_rank: (down [r, K], up [N, r]).
    """
    if low_rank is None:
        return _dense_rows(weight, dtype, pre_scale, None)
    down, up = low_rank
    values = _dense_rows(weight, torch.float32, pre_scale, None)
    return values.add_(up.detach().float() @ down.detach().float()).to(dtype)


# --- convolution ------------------------------------------------------------------------------------------------


def conv2d(
    x: torch.Tensor,
    weight: QuantizedWeight,
    scheme: Scheme,
    geometry: Geometry,
    bias: torch.Tensor | None = None,
    inputs: InputQuantization | None = None,
) -> torch.Tensor:
    """y [B, N, Ho, Wo] in the dtype of x; a sample is a convolution's token. Arguments as :func:`linear`.

    Args:
        x: [B, C, H, W].
        weight: [N, C / groups * kh * kw].
        scheme: the layer's.
        geometry: kernel, stride, padding, dilation, groups.
        bias: [N], any float dtype.
        inputs: static qparams and smoothing scale [C], if the layer has them.
    """
    inputs = inputs or InputQuantization()
    _require_same_device(x, weight)
    path = _kind_of_path(scheme, x.device, "conv2d", geometry.groups)
    if path == "int8":
        qmin, qmax = _code_range(scheme.activation)
        vertical, horizontal = geometry.padding
        return int8_conv2d(
            x,
            integer_weight(weight),
            weight.scale,
            bias,
            kernel=geometry.kernel,
            stride=geometry.stride,
            padding=(horizontal, horizontal, vertical, vertical),
            dilation=geometry.dilation,
            qmin=qmin,
            qmax=qmax,
            input_scale=_given_scale(x, scheme.activation, inputs),
            input_zero_point=inputs.zero_point,
            pre_scale=inputs.pre_scale,
        )
    dtype = product_dtype(x)
    values, pre_scale = _dequantized_input(x, scheme, inputs, path, dtype)
    folded = None if pre_scale is None else per_column(pre_scale, geometry, weight.qweight.shape[0])
    kernel = _dense_rows(weight, dtype, folded, None).view(-1, x.shape[1] // geometry.groups, *geometry.kernel)
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(values, kernel, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    return y.to(x.dtype)


def per_column(pre_scale: torch.Tensor, geometry: Geometry, outputs: int) -> torch.Tensor:
    """A scale per input channel [C] as one per column of the flattened weight: [K], or [N, K] if grouped."""
    taps = geometry.kernel[0] * geometry.kernel[1]
    if geometry.groups == 1:
        return pre_scale.repeat_interleave(taps)
    per_group = pre_scale.view(geometry.groups, -1).repeat_interleave(taps, dim=1)
    return per_group.repeat_interleave(outputs // geometry.groups, dim=0)


# --- inputs -----------------------------------------------------------------------------------------------------


def _code_range(act: ActivationScheme | None) -> tuple[int, int]:
    assert act is not None
    return (-act.format.qmax if act.symmetric else act.format.qmin), act.format.qmax


def _scaled(x: torch.Tensor, pre_scale: torch.Tensor | None) -> torch.Tensor:
    """x * pre_scale in fp32, not rounded to x's dtype; x itself without one."""
    if pre_scale is None:
        return x
    return x.float() * (pre_scale.view(-1, 1, 1) if x.dim() == 4 else pre_scale)


def _given_scale(x: torch.Tensor, act: ActivationScheme | None, inputs: InputQuantization) -> torch.Tensor | None:
    """The one scale of a static or per-tensor input; None lets the kernel measure one per row or sample."""
    assert act is not None
    if not act.dynamic:
        return inputs.scale
    if isinstance(act.granularity, PerTensor):
        return choose_activation_qparams(_scaled(x, inputs.pre_scale), act).scale
    return None


def _dequantized_input(
    x: torch.Tensor, scheme: Scheme, inputs: InputQuantization, path: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Input of a dense product, and the smoothing scale that is left for the weight."""
    if scheme.activation is None or path == "dequantize-weight-only":
        return x.to(dtype), inputs.pre_scale
    feature_dims = 3 if x.dim() == 4 else 1
    values = _scaled(x, inputs.pre_scale)
    codes, scale, zero_point = quantize_activation(
        values, scheme.activation, inputs.scale, inputs.zero_point, feature_dims, inputs.clip
    )
    return dequantize_activation(codes, scale, zero_point, dtype), None


# --- blocks -----------------------------------------------------------------------------------------------------


def _row_blocks(outputs: int, depth: int) -> Iterator[slice]:
    """Blocks of output rows whose fp32 weight takes ``BLOCK_BYTES`` at most."""
    step = max(1, BLOCK_BYTES // (4 * max(depth, 1)))
    for start in range(0, max(outputs, 1), step):
        yield slice(start, min(start + step, outputs))


def _rows_of(scale: torch.Tensor, rows: slice) -> torch.Tensor:
    return scale if scale.shape[0] == 1 else scale[rows]
