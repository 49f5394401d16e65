"""The product of a layer in training: rounded weight times rounded input, plus the gated branch, with its gradients.

Forward is what the deployed layer computes, with the same functions: codes by ``quantization/numerics.py``, and where
the format has an integer path, its exact int32 sums. Backward is that of straight-through rounding (Bengio et al. 2013,
arXiv 1308.3432) in

    W^ = s * (clamp(round(w / s + z)) - z),     x^ = s_x * clamp(round(x / s_x)),     s_x = c * max|x| / qmax

by w, s, z (Esser et al. 2020, "LSQ", arXiv 1902.08153; Bhalgat et al. 2020, "LSQ+", arXiv 2004.09576), x and c, written
out: nothing is saved but the operands, and codes are found again. Arithmetic of rounding is float32 whatever the dtype
of weights and inputs. Nothing checkpoints inside; blocks may.

torchao's fake quantizers are not used: its learned ranges carry no fractional zero points through conversion, it has no
symmetric per-token inputs, no 4-bit activations to convert to and no clips, and its list of fake-quantize configs is
closed. Its ``FakeQuantizedLinear`` would bring a class name and two empty children.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F

from diffuse_compress.quantization.numerics import (
    MIN_SCALE,
    codes_to_values,
    dequantize_activation,
    per_group_,
    quantize_activation,
    weight_steps,
)
from diffuse_compress.quantization.product_dtype import product_dtype
from diffuse_compress.quantization.qparams import QParams, effective_scale
from diffuse_compress.quantization.scheme import PerGroup, PerTensor, Scheme, WeightScheme
from diffuse_compress_kernels import int8_linear_codes, quantize_rows

__all__ = ["FakeWeight", "gradient_scale", "stored_qparams", "trained_product"]

# Elements of an input whose gradient is worked on at a time: a few fp32 copies of them stand beside it.
_CHUNK = 1 << 24


def stored_qparams(
    scale: torch.Tensor, zero_point: torch.Tensor | None, group_scale: torch.Tensor | None, scheme: WeightScheme
) -> QParams:
    """What conversion stores of learned parameters, and forward computes with.

    Args:
        scale: fp32 of the scheme's shape, any sign: its magnitude counts, so that no step of an optimizer can turn the
            codes around.
        zero_point: fp32 of that shape, or None.
        group_scale: int8 [N, G], two-level weights only.
        scheme: of the weight.
    """
    scale = scale.detach().float().abs().clamp(min=MIN_SCALE)
    if zero_point is None:
        return QParams(scale, None, group_scale)
    zero_point = zero_point.detach().float()
    if not scheme.float_zero_point:
        fmt = scheme.format
        zero_point = zero_point.round().clamp(fmt.qmin, fmt.qmax).to(torch.int8)
    return QParams(scale, zero_point, group_scale)


def gradient_scale(shape: torch.Size, scheme: WeightScheme) -> float:
    """LSQ's factor on the gradients of scale and zero point of a weight [N, K]: 1 / sqrt(elements per learned scale *
    highest code), the codes counted from the lowest where there is a zero point."""
    low, high = scheme.range
    rows, columns = shape
    elements = columns
    if isinstance(scheme.granularity, PerTensor):
        elements = rows * columns
    elif isinstance(scheme.granularity, PerGroup):
        elements = min(scheme.granularity.group_size, columns)
    return float((elements * (high if scheme.symmetric else high - low)) ** -0.5)


@dataclass
class FakeWeight:
    """A weight as it is rounded now.

    Attributes:
        weight: [N, K], what is rounded.
        scheme: its format.
        qparams: its qparams as they would be stored.
    """

    weight: torch.Tensor
    scheme: WeightScheme
    qparams: QParams

    def codes(self) -> torch.Tensor:
        """int8 [N, K]."""
        return weight_steps(self.weight, self.scheme, self.qparams).clamp_(*self.scheme.range).to(torch.int8)

    def integers(self) -> torch.Tensor:
        """int8 [N, K]: what an integer product multiplies."""
        codes, group_scale = self.codes(), self.qparams.group_scale
        return (
            codes if group_scale is None else per_group_(codes, group_scale, self.scheme.group_size, torch.Tensor.mul_)
        )

    def values(self) -> torch.Tensor:
        """fp32 [N, K]: what the codes stand for."""
        return codes_to_values(self.codes(), self.scheme, self.qparams)

    def gradients(self, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Gradients of weight, scale and zero point (fp32, the last two of the scale's shape) from that of the values.

        Args:
            grad: [N, K], of the rounded weight.
        """
        scheme, qparams = self.scheme, self.qparams
        grad = grad.float()
        steps = weight_steps(self.weight, scheme, qparams)
        low, high = scheme.range
        inside = (steps >= low) & (steps <= high)
        codes = steps.clamp_(low, high)
        if qparams.zero_point is not None:
            per_group_(codes, qparams.zero_point.float(), scheme.group_size, torch.Tensor.sub_)
        ratio = self.weight.detach().to(torch.float32, copy=True)
        per_group_(ratio, effective_scale(qparams), scheme.group_size, torch.Tensor.div_)
        # d(values) / d(effective scale): the code, less w / s where rounding follows w.
        slope = codes.sub_(ratio.mul_(inside))
        of_scale = self._per_scale(slope.mul_(grad))
        if qparams.group_scale is not None:
            of_scale = (of_scale * qparams.group_scale.float()).sum(dim=1, keepdim=True)
        of_zero = None
        if qparams.zero_point is not None:
            of_zero = -qparams.scale * self._per_scale(grad * ~inside)
        return grad * inside, of_scale, of_zero

    def _per_scale(self, values: torch.Tensor) -> torch.Tensor:
        """Sums of values [N, K] over the elements of each scale (or group scale)."""
        size = self.scheme.group_size
        if size is None:
            total = values.sum(dim=1, keepdim=True)
            return total if self.qparams.scale.shape[0] == values.shape[0] else total.sum().reshape(1, 1)
        padded = F.pad(values, (0, -values.shape[1] % size))
        return padded.reshape(values.shape[0], -1, size).sum(dim=-1)


class _TrainedProduct(torch.autograd.Function):
    """y [M, N]; see :func:`trained_product`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        group_scale: torch.Tensor | None,
        clip: torch.Tensor | None,
        up: torch.Tensor | None,
        down: torch.Tensor | None,
        gate: torch.Tensor | None,
        rank: int,
        scheme: Scheme,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias, scale, zero_point, group_scale, clip, up, down, gate)
        ctx.rank, ctx.scheme = rank, scheme
        fake = FakeWeight(weight, scheme.weight, stored_qparams(scale, zero_point, group_scale, scheme.weight))
        branch, coded = _branch(up, down, gate, rank), _input_codes(x, scheme, clip)
        if branch is None:
            return _deployed(x, coded, fake, scheme, bias)
        gated, down = (factor.to(x.dtype) for factor in branch)
        rounded, (outputs, columns) = _rounded(x, coded), weight.shape
        if x.shape[0] * (outputs + columns) < outputs * columns:
            return _deployed(x, coded, fake, scheme, bias) + F.linear(F.linear(rounded, down), gated)
        dense = fake.values().addmm_(branch[0].float(), branch[1].float()).to(x.dtype)
        return F.linear(rounded, dense, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, scale, zero_point, group_scale, clip, up, down, gate = ctx.saved_tensors
        scheme, needs = ctx.scheme, ctx.needs_input_grad
        (grad,) = grad_outputs
        fake = FakeWeight(weight, scheme.weight, stored_qparams(scale, zero_point, group_scale, scheme.weight))
        branch = _branch(up, down, gate, ctx.rank)
        grads: list[torch.Tensor | None] = [None] * 12
        if needs[0] or needs[6]:
            dense = fake.values()
            if branch is not None:
                dense.addmm_(branch[0].float(), branch[1].float())
            of_rounded = grad @ dense.to(grad.dtype)
            del dense
            grads[0], grads[6] = _input_gradients(x, of_rounded, scheme, clip)
        if any(needs[index] for index in (1, 3, 4, 7, 8)):
            of_dense = grad.t() @ _rounded(x, _input_codes(x, scheme, clip))
            grads[7], grads[8] = _branch_gradients(of_dense, branch, up, down, gate)
            of_weight, of_scale, of_zero = fake.gradients(of_dense)
            factor = gradient_scale(weight.shape, scheme.weight)
            grads[1] = of_weight.to(weight.dtype)
            # The stored scale is the magnitude of the learned one.
            grads[3] = (of_scale * factor * torch.where(scale < 0, -1.0, 1.0)).to(scale.dtype)
            grads[4] = None if of_zero is None else _zero_gradient(of_zero * factor, zero_point, scheme.weight)
        if bias is not None and needs[2]:
            grads[2] = grad.float().sum(dim=0).to(bias.dtype)
        return tuple(grads)


def _zero_gradient(grad: torch.Tensor, zero_point: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """Through the rounding of an integer zero point, where it was not clamped."""
    if not scheme.float_zero_point:
        grad = grad * ((zero_point.round() >= scheme.format.qmin) & (zero_point.round() <= scheme.format.qmax))
    return grad.to(zero_point.dtype)


def _branch(
    up: torch.Tensor | None, down: torch.Tensor | None, gate: torch.Tensor | None, rank: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(up * gate [N, r], down [r, K]) of the components in force, or None without any."""
    if up is None or down is None or gate is None or rank == 0:
        return None
    return up[:, :rank] * gate[:rank].to(up.dtype), down[:rank]


def _branch_gradients(
    of_dense: torch.Tensor,
    branch: tuple[torch.Tensor, torch.Tensor] | None,
    up: torch.Tensor | None,
    down: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of ``up`` and ``down``, from that of the dense weight: zeros for components that have left, so that each process
    of a distributed run sees a gradient of every parameter."""
    if up is None or down is None or gate is None:
        return None, None
    of_up, of_down = torch.zeros_like(up), torch.zeros_like(down)
    if branch is not None:
        gated, kept = branch
        rank = kept.shape[0]
        of_up[:, :rank] = (of_dense @ kept.t().to(of_dense.dtype)).to(up.dtype) * gate[:rank].to(up.dtype)
        of_down[:rank] = (gated.t().to(of_dense.dtype) @ of_dense).to(down.dtype)
    return of_up, of_down


Coded = tuple[torch.Tensor, torch.Tensor]


def _deployed(
    x: torch.Tensor, coded: Coded | None, fake: FakeWeight, scheme: Scheme, bias: torch.Tensor | None
) -> torch.Tensor:
    """y [M, N] as ``dispatch.linear`` computes it from the stored weight."""
    if scheme.has_integer_path:
        assert coded is not None
        return int8_linear_codes(coded[0], coded[1], None, fake.integers(), fake.qparams.scale, bias, x.dtype)
    dtype = product_dtype(x)
    values = x.to(dtype) if coded is None else dequantize_activation(*coded, dtype=dtype)
    return F.linear(values, fake.values().to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def _input_codes(x: torch.Tensor, scheme: Scheme, clip: torch.Tensor | None) -> Coded | None:
    """int8 [M, K] and their scale, fp32 [M, 1]; None where inputs are left alone."""
    act = scheme.activation
    if act is None:
        return None
    if clip is None:
        return quantize_rows(x, -act.format.qmax, act.format.qmax)
    codes, scale, _ = quantize_activation(x, act, clip=clip)
    return codes, scale


def _rounded(x: torch.Tensor, coded: Coded | None) -> torch.Tensor:
    """The input that the codes stand for, [M, K] in the dtype of x."""
    return x if coded is None else dequantize_activation(*coded, dtype=x.dtype)


def _input_gradients(
    x: torch.Tensor, grad: torch.Tensor, scheme: Scheme, clip: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of input and clip, from that of the rounded input [M, K]."""
    act = scheme.activation
    if act is None:
        return grad, None
    of_x, of_clip = torch.empty_like(x), []
    for part in _row_parts(x):
        own = clip if clip is None or clip.shape[0] == 1 else clip[part]
        of_x[part], row = _row_gradients(x[part].float(), grad[part].float(), act.format.qmax, own)
        of_clip.append(row)
    if clip is None:
        return of_x, None
    rows = torch.cat(of_clip) if of_clip else clip.new_zeros(0, 1)
    return of_x, (rows.sum().reshape(1, 1) if clip.shape[0] == 1 else rows).to(clip.dtype)


def _row_gradients(
    x: torch.Tensor, grad: torch.Tensor, qmax: int, clip: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows fp32 [m, K], and of their clip [m, 1]; the largest magnitude passes to all that reach it."""
    size = x.abs()
    largest = size.amax(dim=1, keepdim=True)
    unit = largest / torch.full_like(largest, qmax)
    scale = (unit if clip is None else unit * clip).clamp(min=MIN_SCALE)
    ratio = x / scale
    steps = ratio.round()
    inside = steps.abs() <= qmax
    slope = steps.clamp_(-qmax, qmax).sub_(ratio.mul_(inside))
    of_scale = (slope.mul_(grad)).sum(dim=1, keepdim=True) * (scale > MIN_SCALE)
    of_largest = of_scale / qmax if clip is None else of_scale * clip / qmax
    reached = size == largest
    share = of_largest / reached.sum(dim=1, keepdim=True)
    return grad * inside + x.sign() * (reached * share), of_scale * unit


def _row_parts(x: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, x.shape[1]))
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))


def trained_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    group_scale: torch.Tensor | None,
    scheme: Scheme,
    *,
    clip: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    rank: int = 0,
) -> torch.Tensor:
    """``Q(x) @ (Q(weight) + (up * gate) @ down).T + bias``; gradients for all that is learned.

    The branch is multiplied with the rounded input where that takes fewer operations, else with the weight first.

    Args:
        x: [M, K] fp32, bf16 or fp16.
        weight: [N, K], likewise.
        bias: [N].
        scale: fp32, of the shape that ``scheme.weight`` gives scales.
        zero_point: fp32 of that shape; asymmetric weights only.
        group_scale: int8 [N, G]; two-level weights only.
        scheme: integer weights; inputs alone, or dynamic integers per token.
        clip: fp32 [M, 1] or [1, 1] in (0, 1): share of each row's range that codes cover.
        up: [N, r].
        down: [r, K].
        gate: fp32 [r].
        rank: components in force, at most r; without any, y is bit for bit what it is without a branch.

    Returns:
        y [M, N] in the dtype of x.
    """
    given = (x, weight, bias, scale, zero_point, group_scale, clip, up, down, gate, rank, scheme)
    return cast(torch.Tensor, _TrainedProduct.apply(*given))
