"""The linear layer that stands for a deployed one while it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from diffuse_compress.calls import NO_AUTOCAST, autocast_as
from diffuse_compress.quantization.algorithms.svdquant import truncated_svd
from diffuse_compress.quantization.clips import TimestepGroups, clip_of_rows
from diffuse_compress.quantization.layer_base import cast_for_autocast
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.numerics import fake_quantize, quantize_weight
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.quantization.qparams import QParams
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.training.config import PhiInit, QVGenConfig, RangeInit, TrainingMethod
from diffuse_compress.training.fake_quantize import stored_qparams, trained_product
from diffuse_compress.training.rank_decay import core_svd, singular_values
from diffuse_compress.training.sharding import whole, write_

__all__ = ["TrainedLinear"]

# Exponent of the error that the released code minimises; above 2, what is clipped weighs more.
_NORM = 2.4
_IN_FP32 = ("scale", "zero_point", "clip_logits", "gate", "group_scale")
_Layer = TypeVar("_Layer", bound="TrainedLinear")


class TrainedLinear(nn.Linear):
    """A linear layer that rounds weight and input as its deployed form will, and learns how.

    =================  =========================  ==================================================================
    tensor             shape, dtype               meaning
    =================  =========================  ==================================================================
    ``weight``         [N, K]                     the dense layer's own parameter; rounded in every call
    ``bias``           [N] or None                likewise, not rounded
    ``scale``          as the scheme's, fp32      its magnitude is the step between codes
    ``zero_point``     as ``scale``, fp32         asymmetric weights; rounded to a code unless the scheme keeps it fp32
    ``group_scale``    [N, G] int8, a buffer      two-level weights; found at the start and kept
    ``clip_logits``    [G] fp32                   inputs of timestep group g keep ``sigmoid(clip_logits[g])`` of their
                                                  range
    ``phi_up``         [N, r] as ``weight``       with ``phi_down`` [r, K]: the branch, on the rounded input; on the
                                                  input as it comes where the branch stays
    ``gate``           [r] fp32, a buffer         factor of each component of the branch
    ``lora_up``        [N, R] as ``weight``       with ``lora_down`` [R, K]: EfficientDM's change of the weight
    =================  =========================  ==================================================================

    Made by :meth:`from_dense`. :meth:`to_quantized` stores the codes, scales and zero points that forward computes
    with.

    Attributes:
        scheme: of the deployed layer.
        rank: components of the branch that are in force.
        keeps_phi: the branch is deployed.
        rounds: False lets the layer compute as the dense student.
        uses_phi: False leaves the branch out.
        timestep_groups: in which group the samples of the current call are.
    """

    scale: nn.Parameter
    zero_point: nn.Parameter | None
    group_scale: torch.Tensor | None
    clip_logits: nn.Parameter | None
    phi_up: nn.Parameter | None
    phi_down: nn.Parameter | None
    gate: torch.Tensor | None
    lora_up: nn.Parameter | None
    lora_down: nn.Parameter | None

    def __init__(self, linear: nn.Linear, scheme: Scheme, qparams: QParams) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scheme = scheme
        self.scale = nn.Parameter(qparams.scale.float())
        zero_point = qparams.zero_point
        self.zero_point = None if zero_point is None else nn.Parameter(zero_point.float())
        self.register_buffer("group_scale", qparams.group_scale)
        for name in ("clip_logits", "phi_up", "phi_down", "lora_up", "lora_down"):
            self.register_parameter(name, None)
        self.register_buffer("gate", None)
        self.rank = 0
        self.keeps_phi = self.weight_is_rest = False
        self.rounds = self.uses_phi = True
        self.timestep_groups: TimestepGroups | None = None
        self.train(linear.training)

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, linear: nn.Linear, scheme: Scheme, config: QVGenConfig, generator: torch.Generator | None = None
    ) -> TrainedLinear:
        """The layer that stands for ``linear``, whose parameters it takes over; their values are changed by none of the
        initialisations but "loftq", which takes effect with :meth:`take_rest`.

        Args:
            linear: a stock layer with a loaded weight.
            scheme: of the deployed layer.
            config: of the training.
            generator: draws what starts at random.

        Raises:
            IncompatibleShapeError: the scheme cannot be applied to this shape.
            ModelStateError: the weight holds inf or nan.
        """
        weight = linear.weight.detach().float()
        with autocast_as(NO_AUTOCAST):
            qparams = _ranges(weight, scheme, config)
            factors = None
            if config.has_phi:
                rank = min(config.phi_rank, *weight.shape)
                qparams, factors = _branch_at_start(weight, scheme, config, qparams, rank, generator)
        layer = cls(linear, scheme, qparams)
        dtype, device = linear.weight.dtype, linear.weight.device
        if factors is not None:
            down, up = factors
            layer.phi_up, layer.phi_down = _parameter(up, dtype), _parameter(down, dtype)
            layer.rank = down.shape[0]
            layer.gate = torch.ones(layer.rank, device=device)
            layer.keeps_phi = not config.decay
            layer.weight_is_rest = config.phi_init is PhiInit.LOFTQ
        if config.clip_groups and scheme.activation is not None:
            start = math.log(config.clip_init / (1 - config.clip_init))
            layer.clip_logits = nn.Parameter(torch.full((config.clip_groups,), start, device=device))
        if config.method is TrainingMethod.EFFICIENTDM:
            rank = min(config.lora_rank, *weight.shape)
            down = _random((rank, linear.in_features), generator).to(device)
            layer.lora_down = _parameter(down * linear.in_features**-0.5, dtype)
            layer.lora_up = _parameter(torch.zeros(linear.out_features, rank, device=device), dtype)
        return layer

    @torch.no_grad()
    def take_rest(self) -> None:
        """After "loftq": let the weight be what the branch leaves of it."""
        if self.weight_is_rest and self.phi_up is not None and self.phi_down is not None:
            self.weight.data = (self.weight.float() - self.phi_up.float() @ self.phi_down.float()).to(self.weight.dtype)

    # --- computing ------------------------------------------------------------------------------------------------

    def latent_weight(self) -> torch.Tensor:
        """What is rounded, [N, K]: the weight, with EfficientDM's change of it; differentiable."""
        if self.lora_up is None or self.lora_down is None:
            return self.weight
        return self.weight + self.lora_up @ self.lora_down

    def qparams(self) -> QParams:
        """What conversion stores now."""
        return stored_qparams(self.scale, self.zero_point, self.group_scale, self.scheme.weight)

    def clips(self) -> torch.Tensor | None:
        """Share of the range that inputs keep, fp32 [G]; None without clips."""
        return None if self.clip_logits is None else torch.sigmoid(self.clip_logits.float())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y [..., N] in the dtype of the input, [..., K]."""
        x = cast_for_autocast(input)
        if not self.rounds:
            return self._dense(x)
        clips, groups = self.clips(), self.timestep_groups
        clip = None
        if clips is not None:
            clip = clip_of_rows(clips, None if groups is None else groups.index, x.shape[:-1])
        # Under autocast, products inside would be in another dtype than their operands.
        with autocast_as(NO_AUTOCAST):
            y = trained_product(
                x.reshape(-1, self.in_features),
                self.latent_weight(),
                self.bias,
                self.scale,
                self.zero_point,
                self.group_scale,
                self.scheme,
                clip=clip,
                up=None if self.keeps_phi else self.phi_up,
                down=None if self.keeps_phi else self.phi_down,
                gate=self.gate,
                rank=self.rank if self.uses_phi else 0,
            ).reshape(*x.shape[:-1], self.out_features)
            if self.keeps_phi and self.uses_phi and self.phi_up is not None and self.phi_down is not None:
                # As the deployed branch reads it: the input as it comes.
                y = y + F.linear(F.linear(x, self.phi_down.to(x.dtype)), self.phi_up.to(x.dtype))
        return y

    def _dense(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.latent_weight()
        if self.weight_is_rest and self.rank and self.phi_up is not None and self.phi_down is not None:
            assert self.gate is not None
            weight = weight + (self.phi_up * self.gate.to(self.phi_up.dtype)) @ self.phi_down
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    # --- the branch -----------------------------------------------------------------------------------------------

    def branch(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(up [N, r], down [r, K]) of the components in force, without their gates; None without any."""
        if self.phi_up is None or self.phi_down is None or self.rank == 0:
            return None
        return whole(self.phi_up)[:, : self.rank], whole(self.phi_down)[: self.rank]

    def spectrum(self) -> torch.Tensor:
        """Singular values of the branch with its gates, fp32 [rank], descending."""
        branch = self.branch()
        if branch is None:
            return torch.zeros(0)
        assert self.gate is not None
        return singular_values(branch[0].float() * self.gate[: self.rank], branch[1])

    @torch.no_grad()
    def set_gate(self, gate: torch.Tensor) -> None:
        """Let the first components have these factors, of more perhaps than there are."""
        if self.gate is not None:
            self.gate.copy_(gate[: self.gate.numel()])

    @torch.no_grad()
    def shrink(self, rank: int) -> torch.Tensor | None:
        """Keep the first ``rank`` components, decomposed anew; what the gates have left of the others goes into the
        weight.

        Returns:
            A, fp64 [rank, rank], with which ``up`` became ``up @ A`` and ``down`` ``inv(A) @ down``; None if nothing is
            left.
        """
        if self.rank == 0 or rank >= self.rank:
            return None
        assert self.phi_up is not None
        assert self.phi_down is not None
        assert self.gate is not None
        all_up, all_down = whole(self.phi_up).float(), whole(self.phi_down).float()
        up, down = all_up[:, :rank], all_down[:rank]
        leaving = (all_up[:, rank : self.rank] * self.gate[rank : self.rank]) @ all_down[rank : self.rank]
        # In place: sharded and replicated optimizers hold on to the parameter.
        write_(self.weight, whole(self.weight).float() + leaving)
        turn = None
        new_up, new_down = torch.zeros_like(all_up), torch.zeros_like(all_down)
        if rank:
            new_up[:, :rank], new_down[:rank], _ = core_svd(up, down)
            turn = down.double() @ torch.linalg.pinv(new_down[:rank].double())
        write_(self.phi_up, new_up)
        write_(self.phi_down, new_down)
        self.rank = rank
        return turn

    # --- conversion -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def to_quantized(self) -> QuantizedLinear:
        """The deployed layer, without clips (``QuantizedLinear.set_input_clip``)."""
        with autocast_as(NO_AUTOCAST):
            quantized = quantize_weight(self.latent_weight(), self.scheme.weight, self.qparams())
        low_rank = None
        if self.keeps_phi and self.phi_up is not None and self.phi_down is not None:
            low_rank = self.phi_down.detach().clone(), self.phi_up.detach().clone()
        bias = self.bias
        layer = QuantizedLinear.from_dense(self, quantized, self.scheme, low_rank=low_rank)
        if bias is not None:
            layer.bias.data = bias.detach().clone()
        return layer

    def _apply(self: _Layer, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Layer:
        """Let ``fn`` move every tensor, but cast no quantizer's."""
        kept = [tensor for name in _IN_FP32 if (tensor := getattr(self, name)) is not None]

        def guarded(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if result.dtype == tensor.dtype or not any(tensor is other for other in kept):
                return result
            return tensor.to(result.device)

        super()._apply(guarded, recurse)
        return self

    def extra_repr(self) -> str:
        """Sizes, scheme and branch."""
        parts = [super().extra_repr(), f"scheme={self.scheme.name}"]
        if self.phi_up is not None:
            parts.append(f"phi_rank={self.rank}")
        if self.lora_up is not None:
            parts.append(f"lora_rank={self.lora_up.shape[1]}")
        return ", ".join(parts)


def _parameter(values: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(values.to(dtype, copy=True, memory_format=torch.contiguous_format))


def _random(shape: tuple[int, int], generator: torch.Generator | None) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _ranges(weight: torch.Tensor, scheme: Scheme, config: QVGenConfig) -> QParams:
    if config.range_init is RangeInit.MINMAX:
        return weight_qparams(weight, scheme.weight, "minmax")
    return weight_qparams(weight, scheme.weight, norm=_NORM)


def _branch_at_start(
    weight: torch.Tensor,
    scheme: Scheme,
    config: QVGenConfig,
    qparams: QParams,
    rank: int,
    generator: torch.Generator | None,
) -> tuple[QParams, tuple[torch.Tensor, torch.Tensor]]:
    """Qparams of what is rounded, and the branch, (down [rank, K], up [N, rank]) fp32."""
    if config.phi_init is PhiInit.ZERO:
        down = _random((rank, weight.shape[1]), generator).to(weight.device) * weight.shape[1] ** -0.5
        return qparams, (down, weight.new_zeros(weight.shape[0], rank))
    down, up = truncated_svd(weight - fake_quantize(weight, scheme.weight, qparams), rank)
    if config.phi_init is PhiInit.SVD:
        return qparams, (down, up)
    for _ in range(config.loftq_iterations):
        rest = weight - up @ down
        qparams = _ranges(rest, scheme, config)
        down, up = truncated_svd(weight - fake_quantize(rest, scheme.weight, qparams), rank)
    return _ranges(weight - up @ down, scheme, config), (down, up)
