"""From floats to codes and back: choice of scale and zero point, quantize, dequantize, fake_quantize.

All arithmetic is IEEE float32 whatever the input's dtype, rounding is half to even, and every function is
deterministic. Weights are [N, K]; each scale belongs to one *element* of the granularity: the tensor, a row, or a
run of ``group_size`` columns of a row, so qparams have shape [1, 1], [N, 1] or [N, G]; where runs of rows of a column
share one (``PerInputGroup``), it is [K, G], that of the transposed weight; a block of 128 rows by 128 columns shares
one, [ceil(N / 128), G]. The equations are

    q = clamp(round(w / scale) + zero_point),    w = scale * (q - zero_point)

with codes and integer zero points in the signed domain (int4: -8..7). A float zero point is added before rounding; an
additive one is part of the weight's domain: ``w = scale * q + zero_point``.
Two-level weights are ``w = scale[n] * (group_scale[n, g] * q)``: the bracket is exact in int8, so dequantizing here
and rescaling the int32 sums of a GEMM with one scale per row use the very same integers.
Bilevel weights are those of small groups whose scales are rounded to a grid of their own before anything else is done
with them: :func:`expanded` gives these scales, and all equations hold with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from diffuse_compress.errors import ConfigError, IncompatibleShapeError, ModelStateError
from diffuse_compress.quantization.bilevel import MIN_SCALE, bilevel
from diffuse_compress.quantization.blocks import over_blocks, over_columns
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.packing import pack, packed_columns, unpack
from diffuse_compress.quantization.qparams import QParams, effective_scale, expanded, rows_of
from diffuse_compress.quantization.scheme import (
    TWO_LEVEL_MAX_GROUP_SCALE,
    ActivationScheme,
    Bilevel,
    PerBlock,
    PerGroup,
    PerTensor,
    PerToken,
    ScaleRule,
    TwoLevel,
    WeightScheme,
)

__all__ = [
    "MIN_SCALE",
    "choose_activation_qparams",
    "choose_qparams",
    "dequantize",
    "dequantize_activation",
    "fake_quantize",
    "fake_quantize_activation",
    "integer_weight",
    "qparams_from_range",
    "quantize_activation",
    "quantize_weight",
]

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
# Larger magnitudes would round to 480, which the format does not have: beyond it, clamping changes the code.
_FLOAT8_ROUNDS_TO_MAX = 464.0
# Elements of a weight worked on at a time: what stays in a core's cache, or fills a GPU. Nothing here holds more than
# three fp32 copies of a chunk, 48 MiB.
_CHUNK_CPU = 1 << 18
_CHUNK_GPU = 1 << 22


# --- weights: qparams -------------------------------------------------------------------------------------------


def choose_qparams(
    weight: torch.Tensor, scheme: WeightScheme, clip_ratio: float | torch.Tensor | None = None
) -> QParams:
    """Scale and zero point of a weight from the minimum and maximum of each element of the granularity.

    Args:
        weight: [N, K] floating point, any device, not modified.
        scheme: its format; ranges always include 0, so that 0 stays exact.
        clip_ratio: shrinks every range by this factor in (0, 1], one number or a tensor of ``scale``'s shape;
            None keeps the full range. For two-level scales it shrinks the range of the row.

    Returns:
        scale [1, 1], [N, 1], [N, G], [K, G] or (blocks) [ceil(N / 128), G] fp32; zero_point and group_scale as the
        scheme has them.

    Raises:
        IncompatibleShapeError: not a matrix, or K does not fit the group size.
        ModelStateError: values that are infinite, NaN or overflow float32.
    """
    low, high = weight_range(weight, scheme)
    _check_finite(weight, low, high)
    return qparams_from_weight_range(low, high, scheme, clip_ratio)


def weight_range(weight: torch.Tensor, scheme: WeightScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each element of the granularity, fp32, widened to include 0."""
    _check_weight(weight, scheme)
    grouped = split_groups(weight, scheme)
    if grouped.numel() == 0:
        low = high = grouped.new_zeros(grouped.shape[:2], dtype=torch.float32)
    else:
        low = grouped.amin(dim=-1).float().clamp_(max=0)
        high = grouped.amax(dim=-1).float().clamp_(min=0)
    if isinstance(scheme.granularity, PerBlock):
        return over_blocks(low, scheme.granularity, torch.amin), over_blocks(high, scheme.granularity, torch.amax)
    return low, high


def split_groups(weight: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """View of a weight [N, K] as [rows, elements per row, columns per element]; the last group is padded by zeros.

    Of runs of rows, as [columns, elements per column, rows per element].
    """
    weight = weight.detach()
    if scheme.transposed is not None:
        return split_groups(weight.t(), scheme.transposed)
    rows, cols = weight.shape
    size = scheme.group_size
    if size is not None:
        if cols % size:
            weight = torch.nn.functional.pad(weight, (0, -cols % size))
        return weight.reshape(rows, scheme.num_groups(cols), size)
    return weight.reshape(1, 1, rows * cols) if isinstance(scheme.granularity, PerTensor) else weight.unsqueeze(1)


def valid_columns(weight: torch.Tensor, scheme: WeightScheme) -> torch.Tensor | None:
    """fp32 [G, group_size]: 0 where :func:`split_groups` pads the last group, else 1; None when nothing is padded.

    Padding costs no error where 0 is exact; a float zero point does not keep it so.
    """
    if scheme.transposed is not None:
        return valid_columns(weight.t(), scheme.transposed)
    size, cols = scheme.group_size, weight.shape[1]
    if size is None or cols % size == 0:
        return None
    columns = torch.arange(scheme.num_groups(cols) * size, device=weight.device)
    return (columns < cols).float().reshape(-1, size)


def qparams_from_range(low: torch.Tensor, high: torch.Tensor, scheme: WeightScheme | ActivationScheme) -> QParams:
    """Scale and zero point whose codes cover ``low`` <= 0 <= ``high`` (fp32, any one shape, kept).

    Symmetric integers follow ``scheme.scale_rule`` (activations: AMAX_OVER_QMAX); float8 maps the largest magnitude
    to 448. Asymmetric: scale = (high - low) / (2**bits - 1) and zero_point = qmin - low / scale, rounded and clamped
    to the code range unless ``float_zero_point``; additive: zero_point = low - qmin * scale.
    """
    fmt = scheme.format
    rule = scheme.scale_rule if isinstance(scheme, WeightScheme) else ScaleRule.AMAX_OVER_QMAX
    if not scheme.symmetric:
        steps = fmt.qmax - fmt.qmin
        # Divided one by one: the difference of two large values could overflow.
        scale = (high / steps - low / steps).clamp_(min=MIN_SCALE)
        if isinstance(scheme, WeightScheme) and scheme.additive_zero_point:
            return QParams(scale, low - fmt.qmin * scale)
        zero_point = fmt.qmin - low / scale
        if isinstance(scheme, WeightScheme) and scheme.float_zero_point:
            return QParams(scale, zero_point)
        return QParams(scale, zero_point.round_().clamp_(fmt.qmin, fmt.qmax).to(torch.int8))
    amax = torch.maximum(high, -low)
    if not fmt.is_integer:
        scale = amax / FLOAT8_MAX
    elif rule is ScaleRule.AMAX_OVER_QMAX:
        scale = amax / fmt.qmax
    elif rule is ScaleRule.AMAX_OVER_HALF_RANGE:
        scale = amax / ((fmt.qmax - fmt.qmin) / 2)
    else:
        scale = torch.maximum(low / fmt.qmin, high / fmt.qmax)
    return QParams(scale.clamp_(min=MIN_SCALE))


def qparams_from_weight_range(
    low: torch.Tensor, high: torch.Tensor, scheme: WeightScheme, clip_ratio: float | torch.Tensor | None = None
) -> QParams:
    """Qparams of a weight whose elements have these ranges (:func:`weight_range`); as :func:`choose_qparams`."""
    if isinstance(scheme.granularity, TwoLevel):
        return _two_level_qparams(low, high, scheme, clip_ratio)
    if clip_ratio is not None:
        low, high = low * clip_ratio, high * clip_ratio
    if isinstance(scheme.granularity, Bilevel):
        scale, byte = bilevel(qparams_from_range(low, high, scheme).scale, low, high, scheme.format)
        return QParams(scale, None, byte)
    return qparams_from_range(low, high, scheme)


def _two_level_qparams(
    low: torch.Tensor, high: torch.Tensor, scheme: WeightScheme, clip_ratio: float | torch.Tensor | None
) -> QParams:
    """scale = rowmax / (7 * 16); group_scale = the smallest 1..16 that clips nothing of the group."""
    amax = torch.maximum(high, -low)
    row_amax = amax.amax(dim=1, keepdim=True) if amax.shape[1] else amax.new_zeros(amax.shape[0], 1)
    if clip_ratio is not None:
        row_amax = row_amax * clip_ratio
    scale = (row_amax / (scheme.format.qmax * TWO_LEVEL_MAX_GROUP_SCALE)).clamp_(min=MIN_SCALE)
    group_scale = (amax / (scale * scheme.format.qmax)).ceil_().clamp_(1, TWO_LEVEL_MAX_GROUP_SCALE)
    return QParams(scale, None, group_scale.to(torch.int8))


def _check_weight(weight: torch.Tensor, scheme: WeightScheme) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise IncompatibleShapeError(
            f"weight: need a floating-point matrix [N, K], got {weight.dtype} {list(weight.shape)}. "
            "Flatten the weight of a convolution with flatten(1)."
        )
    scheme.check_shape("weight", weight.shape[1])


def _check_finite(weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
    if weight.is_meta or bool((low.isfinite() & high.isfinite()).all()):
        return
    bad = weight.numel() - int(weight.detach().float().isfinite().sum())
    raise ModelStateError(
        f"weight: quantization needs values that are finite in float32, got {bad} of {weight.numel()} that are "
        "inf or nan. Check the checkpoint, or leave this layer out with modules_to_not_convert."
    )


# --- weights: codes ---------------------------------------------------------------------------------------------


def quantize_weight(weight: torch.Tensor, scheme: WeightScheme, qparams: QParams | None = None) -> QuantizedWeight:
    """Round a weight [N, K] to codes; ``qparams`` defaults to :func:`choose_qparams` (full range).

    Args:
        weight: [N, K] floating point, any device, not modified.
        scheme: its format.
        qparams: for this weight and scheme; values outside their range are clamped.

    Returns:
        The packed weight on the device of ``weight``.

    Raises:
        As :func:`choose_qparams`.

    Cost:
        Four passes in chunks of rows: 48 MiB of extra memory at most, except one copy of the weight for the range of
        a last group that is not full.
    """
    low, high = weight_range(weight, scheme)
    _check_finite(weight, low, high)
    if qparams is None:
        qparams = qparams_from_weight_range(low, high, scheme)
    bits = scheme.format.bits
    rows, cols = weight.shape
    qweight = torch.empty(
        (rows, cols if bits == 8 else packed_columns(cols, bits)),
        dtype=torch.int8 if scheme.format.is_integer else FLOAT8,
        device=weight.device,
    )
    for part in row_chunks(weight):
        codes = _round_to_codes(weight[part], scheme, rows_of(qparams, scheme, part, rows))
        qweight[part] = codes if bits == 8 else pack(codes, bits)
    return QuantizedWeight(
        qweight=qweight,
        scale=qparams.scale,
        zero_point=qparams.zero_point,
        group_scale=qparams.group_scale,
        in_features=cols,
        scheme=scheme,
    )


def row_chunks(weight: torch.Tensor) -> Iterator[slice]:
    """Slices of rows of bounded size, at least one row each."""
    elements = _CHUNK_CPU if weight.device.type == "cpu" else _CHUNK_GPU
    step = max(1, elements // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def _round_to_codes(weight: torch.Tensor, scheme: WeightScheme, qparams: QParams) -> torch.Tensor:
    """Codes [N, K] of a weight, not packed: int8, or float8 for fp8 weights."""
    steps = weight_steps(weight, scheme, qparams)
    if not scheme.format.is_integer:
        return steps.clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    return steps.clamp_(*scheme.range).to(torch.int8)


def weight_steps(weight: torch.Tensor, scheme: WeightScheme, qparams: QParams) -> torch.Tensor:
    """fp32 codes before clamping: round(w / scale) + zero_point (float8: w / scale, not rounded).

    ``qparams`` are those of these rows (:func:`rows_of`).
    """
    size, qparams = scheme.group_size, expanded(qparams, scheme)
    steps = weight.detach().to(torch.float32, copy=True)
    if scheme.additive_zero_point and qparams.zero_point is not None:
        per_group_(steps, qparams.zero_point, size, torch.Tensor.sub_)
        return per_group_(steps, qparams.scale, size, torch.Tensor.div_).round_()
    per_group_(steps, effective_scale(qparams), size, torch.Tensor.div_)
    if not scheme.format.is_integer:
        return steps
    if qparams.zero_point is None:
        return steps.round_()
    if not scheme.float_zero_point:
        steps.round_()
    per_group_(steps, qparams.zero_point.float(), size, torch.Tensor.add_)
    return steps.round_() if scheme.float_zero_point else steps


def per_group_(values: torch.Tensor, factor: torch.Tensor, group_size: int | None, operation: Any) -> torch.Tensor:
    """Apply ``operation`` in place to values [N, K] with one operand per element of the granularity."""
    if group_size is None:
        return operation(values, factor)  # type: ignore[no-any-return]
    whole = values.shape[1] // group_size
    if whole:
        operation(values[:, : whole * group_size].view(-1, whole, group_size), factor[:, :whole, None])
    if whole < factor.shape[1]:
        operation(values[:, whole * group_size :], factor[:, whole:])
    return values


def unpacked_codes(weight: QuantizedWeight, rows: slice | None = None) -> torch.Tensor:
    """Codes [n, K]: int8, or float8 for fp8 weights (the stored tensor itself for 8-bit formats)."""
    qweight = weight.qweight if rows is None else weight.qweight[rows]
    bits = weight.scheme.format.bits
    return qweight if bits == 8 else unpack(qweight, bits, weight.in_features)


def integer_weight(weight: QuantizedWeight, rows: slice | None = None) -> torch.Tensor:
    """int8 matrix [n, K] with ``dequantize(weight) == weight.scale * integer_weight(weight)`` exactly.

    What an integer GEMM multiplies: the codes, times ``group_scale`` for two-level weights (at most 112).

    Args:
        weight: symmetric integer weight, per tensor, per channel or two-level.
        rows: output rows to unpack, e.g. ``slice(n0, n1)``; None for all.

    Returns:
        int8 [n, K]; for int8 weights a view of the stored codes, so not to be modified.

    Raises:
        ConfigError: the scale varies along K or there is a zero point, so no such matrix exists.
    """
    scheme = weight.scheme
    per_row = weight.group_scale is not None or (scheme.group_size is None and scheme.transposed is None)
    if not (scheme.format.is_integer and scheme.symmetric and per_row):
        raise ConfigError(
            f"integer_weight: need a symmetric integer weight with one scale per row, got {scheme}. Use dequantize."
        )
    codes = unpacked_codes(weight, rows)
    if weight.group_scale is None:
        return codes
    group_scale = weight.group_scale if rows is None else weight.group_scale[rows]
    return per_group_(codes, group_scale, scheme.group_size, torch.Tensor.mul_)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32, rows: slice | None = None) -> torch.Tensor:
    """The weight [N, K] that the codes stand for: float32 arithmetic, then one cast to ``dtype``.

    Args:
        weight: any scheme, any device.
        dtype: of the result.
        rows: output rows to dequantize, e.g. ``slice(n0, n1)``; None for all.

    Returns:
        [n, K] in ``dtype``, freshly allocated.

    Cost:
        One fp32 tensor of the result's shape.
    """
    qparams = QParams(weight.scale, weight.zero_point, weight.group_scale)
    qparams = rows_of(qparams, weight.scheme, rows, weight.qweight.shape[0])
    values = codes_to_values(unpacked_codes(weight, rows), weight.scheme, qparams)
    if weight.outliers is not None:
        weight.outliers.add_to(values, 0 if rows is None else rows.start)
    return values.to(dtype)


def codes_to_values(codes: torch.Tensor, scheme: WeightScheme, qparams: QParams) -> torch.Tensor:
    """fp32 values of codes [N, K]; two-level codes are overwritten. ``qparams`` are those of these rows."""
    size, qparams = scheme.group_size, expanded(qparams, scheme)
    if qparams.group_scale is not None:
        return per_group_(codes, qparams.group_scale, size, torch.Tensor.mul_).float().mul_(qparams.scale)
    values = codes.to(torch.float32)
    if scheme.additive_zero_point and qparams.zero_point is not None:
        per_group_(values, qparams.scale, size, torch.Tensor.mul_)
        return per_group_(values, qparams.zero_point, size, torch.Tensor.add_)
    if qparams.zero_point is not None:
        per_group_(values, qparams.zero_point.float(), size, torch.Tensor.sub_)
    return per_group_(values, qparams.scale, size, torch.Tensor.mul_)


def _not_clamped(steps: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Where clamping to [low, high] does not change the code: integers are rounded already, float8 codes are not."""
    if high == FLOAT8_MAX:
        return steps.abs() <= _FLOAT8_ROUNDS_TO_MAX
    return (steps >= low) & (steps <= high)


class _StraightThrough(torch.autograd.Function):
    """Value of ``quantized``, gradient of ``x`` where ``inside``."""

    @staticmethod
    def forward(x: torch.Tensor, quantized: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad_outputs[0] * inside, None, None


_straight_through: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = _StraightThrough.apply


def fake_quantize(weight: torch.Tensor, scheme: WeightScheme, qparams: QParams | None = None) -> torch.Tensor:
    """``dequantize(quantize_weight(weight))`` in the dtype of ``weight``, with a straight-through gradient.

    Source: the straight-through estimator of Bengio et al. 2013 (arXiv 1308.3432): the gradient passes unchanged
    where the code was not clamped and is 0 elsewhere; qparams get none.

    Args:
        weight: [N, K] floating point.
        scheme: its format.
        qparams: default :func:`choose_qparams` of this weight. Values are not checked here, so that a training step
            needs no synchronisation: NaN weights give NaN.

    Returns:
        [N, K] in the dtype of ``weight``; bit for bit what the stored weight dequantizes to.
    """
    if qparams is None:
        qparams = qparams_from_weight_range(*weight_range(weight, scheme), scheme)
    qparams = rows_of(qparams, scheme, None, weight.shape[0])
    steps = weight_steps(weight, scheme, qparams)
    low, high = scheme.range if scheme.format.is_integer else (-FLOAT8_MAX, FLOAT8_MAX)
    inside = _not_clamped(steps, low, high)
    codes = steps.clamp_(low, high).to(torch.int8 if scheme.format.is_integer else FLOAT8)
    values = codes_to_values(codes, scheme, qparams).to(weight.dtype)
    return _straight_through(weight, values, inside)


# --- activations ------------------------------------------------------------------------------------------------


def choose_activation_qparams(
    x: torch.Tensor, scheme: ActivationScheme, feature_dims: int = 1, clip: torch.Tensor | None = None
) -> QParams:
    """Scale and zero point of an input from its own range.

    Args:
        x: [..., K] floating point.
        scheme: symmetric schemes divide the largest magnitude by 127 (int8), 7 (int4) or 448 (float8); PerGroup is for
            inputs of linear layers.
        feature_dims: trailing dimensions that share a scale under PerToken: 1 for linear inputs [..., K],
            3 for the input [B, C, H, W] of a convolution.
        clip: fp32, broadcastable to the scale, in (0, 1]: the share of each range that codes cover (``clips.py``);
            symmetric schemes only.

    Returns:
        scale fp32: [..., 1] under PerToken (``feature_dims`` ones at the end), [..., ceil(K / 128)] under PerGroup, [1]
        under PerTensor. A row of zeros
        gets ``MIN_SCALE``; a row with a NaN gets a NaN scale, so that it stays visible in the output.
    """
    x = x.detach()
    if isinstance(scheme.granularity, PerGroup):
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % scheme.granularity.group_size))
        x = x.unflatten(-1, (-1, scheme.granularity.group_size)) if x.numel() else x.unsqueeze(-1)
        dims, shape = (-1,), x.shape[:-1]
    elif isinstance(scheme.granularity, PerToken):
        dims = tuple(range(-feature_dims, 0))
        shape = x.shape[:-feature_dims] + (1,) * feature_dims
    else:
        dims, shape = tuple(range(-x.dim(), 0)), torch.Size([1])
    if x.numel() == 0:
        low = high = torch.zeros(shape, dtype=torch.float32, device=x.device)
    elif scheme.symmetric:
        high = x.abs().amax(dim=dims).float().reshape(shape)
        # By a tensor: CUDA divides by a Python number through its reciprocal, which is not the CPU's quotient.
        high = high / torch.full_like(high, _activation_max(scheme))
        return QParams((high if clip is None else high * clip).clamp_(min=MIN_SCALE))
    else:
        low = x.amin(dim=dims).float().clamp_(max=0).reshape(shape)
        high = x.amax(dim=dims).float().clamp_(min=0).reshape(shape)
    return qparams_from_range(low, high, scheme)


def quantize_activation(
    x: torch.Tensor,
    scheme: ActivationScheme,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    feature_dims: int = 1,
    clip: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes of an input: round half to even of ``x / scale``, plus ``zero_point``, clamped; float8 saturates.

    Args:
        x: [..., K] floating point, not modified.
        scheme: format and granularity.
        scale: fp32, broadcastable to ``x`` (static scales); None measures it.
        zero_point: int8 of ``scale``'s shape; asymmetric schemes only.
        feature_dims: as in :func:`choose_activation_qparams`.
        clip: likewise; measured scales only.

    Returns:
        codes [..., K] int8 (int4 codes too) or float8_e4m3fn; scale fp32; zero_point or None.
    """
    measured = scale is None and clip is None
    if scale is None:
        qparams = choose_activation_qparams(x, scheme, feature_dims, clip)
        scale, zero_point = qparams.scale, qparams.zero_point
    steps = _activation_steps(x, scheme, scale, zero_point)
    # A scale measured from x clips no integer, and the pass over x is saved.
    if not (measured and scheme.symmetric and scheme.format.is_integer):
        steps.clamp_(*_activation_range(scheme))
    return steps.to(torch.int8 if scheme.format.is_integer else FLOAT8), scale, zero_point


def dequantize_activation(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``scale * (codes - zero_point)`` in float32, then one cast to ``dtype``."""
    values = codes.to(torch.float32, copy=True)
    if zero_point is not None:
        values.sub_(zero_point)
    return values.mul_(over_columns(scale, values.shape[-1])).to(dtype)


def fake_quantize_activation(
    x: torch.Tensor,
    scheme: ActivationScheme,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    feature_dims: int = 1,
) -> torch.Tensor:
    """Quantize and dequantize an input, in its dtype, with a straight-through gradient inside the range.

    Arguments as :func:`quantize_activation`; scale and zero_point get no gradient.
    """
    if scale is None:
        qparams = choose_activation_qparams(x, scheme, feature_dims)
        scale, zero_point = qparams.scale, qparams.zero_point
    steps = _activation_steps(x, scheme, scale, zero_point)
    low, high = _activation_range(scheme)
    inside = _not_clamped(steps, low, high)
    steps.clamp_(low, high)
    codes = steps if scheme.format.is_integer else steps.to(FLOAT8)
    values = dequantize_activation(codes, scale, zero_point, x.dtype)
    return _straight_through(x, values, inside)


def _activation_steps(
    x: torch.Tensor, scheme: ActivationScheme, scale: torch.Tensor, zero_point: torch.Tensor | None
) -> torch.Tensor:
    """fp32 codes before clamping: round(x / scale) + zero_point (float8: x / scale, not rounded)."""
    # A tensor without dimensions would not promote bf16 inputs to float32.
    scale = scale.float() if scale.dim() else scale.float().reshape(1)
    scale = over_columns(scale, x.shape[-1])
    steps = torch.div(x.detach(), scale)
    if not scheme.format.is_integer:
        return steps.float()
    steps = steps.float().round_()
    return steps if zero_point is None else steps.add_(zero_point)


def _activation_max(scheme: ActivationScheme) -> float:
    return scheme.format.qmax if scheme.format.is_integer else FLOAT8_MAX


def _activation_range(scheme: ActivationScheme) -> tuple[float, float]:
    fmt = scheme.format
    if not fmt.is_integer:
        return -FLOAT8_MAX, FLOAT8_MAX
    return (-fmt.qmax if scheme.symmetric else fmt.qmin, fmt.qmax)
