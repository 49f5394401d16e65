"""What quantized layers share: their parameters, and how these are made, read, moved and cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError, IncompatibleShapeError, ModelStateError
from diffuse_compress.quantization.clips import TimestepGroups, clip_of_rows
from diffuse_compress.quantization.dispatch import ComputePath, InputQuantization, dense_weight
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.packing import packed_columns
from diffuse_compress.quantization.rotation import rotate, rotate_back
from diffuse_compress.quantization.scheme import PerGroup, PerTensor, PerToken, Scheme, TwoLevel, WeightScheme

__all__ = ["INPUT_QPARAMS", "LowRank", "QuantizedLayer", "cast_for_autocast", "check_given", "empty_tensors", "fill"]

PARAMETERS = (
    "bias",
    "qweight",
    "scale",
    "zero_point",
    "group_scale",
    "act_pre_scale",
    "input_scale",
    "input_zero_point",
    "low_rank_down",
    "low_rank_up",
)
INPUT_QPARAMS = ("input_scale", "input_zero_point")
"""Of static inputs. They are no weights: step scales (``temporal/step_scales.py``) write them before every call."""
_IN_COMPUTE_DTYPE = ("bias", "low_rank_down", "low_rank_up")
_Layer = TypeVar("_Layer", bound="QuantizedLayer")
LowRank = tuple[torch.Tensor, torch.Tensor]


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(tensor, requires_grad=False)
    # transformers initialises what does not carry this mark.
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    return parameter


def empty_tensors(
    scheme: Scheme,
    outputs: int,
    columns: int,
    channels: int,
    *,
    bias: bool,
    compute_dtype: torch.dtype,
    device: torch.device | str,
    act_pre_scale: bool,
    low_rank: int,
) -> dict[str, torch.Tensor]:
    """Uninitialised tensors of a layer by name; every one names its dtype."""
    weight, act = scheme.weight, scheme.activation
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if bias:
        shapes["bias"] = ((outputs,), compute_dtype)
    shapes.update(_weight_shapes(weight, outputs, columns))
    if act_pre_scale:
        shapes["act_pre_scale"] = ((channels,), torch.float32)
    if act is not None and not act.dynamic:
        shapes["input_scale"] = ((1,), torch.float32)
        if not act.symmetric:
            shapes["input_zero_point"] = ((1,), torch.int8)
    if low_rank:
        shapes["low_rank_down"] = ((low_rank, columns), compute_dtype)
        shapes["low_rank_up"] = ((outputs, low_rank), compute_dtype)
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}


def _weight_shapes(scheme: WeightScheme, outputs: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    bits = scheme.format.bits
    code_dtype = torch.int8 if scheme.format.is_integer else torch.float8_e4m3fn
    stored = columns if bits == 8 else packed_columns(columns, bits)
    groups = scheme.num_groups(columns)
    per_row = isinstance(scheme.granularity, PerGroup)
    scale_shape = (1, 1) if isinstance(scheme.granularity, PerTensor) else (outputs, groups if per_row else 1)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qweight": ((outputs, stored), code_dtype),
        "scale": (scale_shape, torch.float32),
    }
    if not scheme.symmetric:
        shapes["zero_point"] = (scale_shape, torch.float32 if scheme.stores_float_zero_point else torch.int8)
    if isinstance(scheme.granularity, TwoLevel):
        shapes["group_scale"] = ((outputs, groups), torch.int8)
    return shapes


class QuantizedLayer(nn.Module):
    """What both layers share; mixed in before the stock class, whose ``__init__`` is never run."""

    bias: Any
    qweight: nn.Parameter
    scale: nn.Parameter
    zero_point: nn.Parameter | None
    group_scale: nn.Parameter | None
    act_pre_scale: nn.Parameter | None
    input_scale: nn.Parameter | None
    input_zero_point: nn.Parameter | None
    low_rank_down: nn.Parameter | None
    low_rank_up: nn.Parameter | None
    scheme: Scheme
    compute_dtype: torch.dtype
    input_clip: torch.Tensor | None
    timestep_groups: TimestepGroups | None = None
    """Of a layer whose ``input_clip`` depends on the timestep: which groups the current call is in."""
    folded = False
    """Whether its input or output is scaled inside other weights: adapters of the model as it was do not fit here."""

    def _setup(self, tensors: dict[str, torch.Tensor], scheme: Scheme, compute_dtype: torch.dtype) -> None:
        self.scheme = scheme
        self.compute_dtype = compute_dtype
        self._is_hf_initialized = True
        for name in PARAMETERS:
            tensor = tensors.get(name)
            self.register_parameter(name, None if tensor is None else _parameter(tensor))
        self.input_clip = None

    def set_input_clip(self, values: torch.Tensor | None, groups: TimestepGroups | None = None) -> None:
        """Clip dynamic inputs by ``values``, fp32 [G] for the groups of timesteps, from now on; None does not.

        They are no part of the state dict: ``training/clips.py`` keeps them for the whole model.

        Raises:
            ModelStateError: inputs are not quantized, by integers, per token and dynamically, or no linear's.
        """
        act = self.scheme.activation
        dynamic = act is not None and act.dynamic and act.format.is_integer and isinstance(act.granularity, PerToken)
        if values is not None and not (dynamic and isinstance(self, nn.Linear)):
            raise ModelStateError(
                f"set_input_clip: needs a linear layer with dynamic integer inputs, one scale per token, found "
                f"{type(self).__name__} of {self.scheme.name}."
            )
        # A buffer only while there are clips: accelerate's hooks fail on a buffer of None that is outside the state.
        del self.input_clip
        if values is None:
            self.input_clip = None
        else:
            placed = values.detach().to(self.qweight.device, torch.float32)
            self.register_buffer("input_clip", placed, persistent=False)
        self.timestep_groups = None if values is None else groups

    # --- reading ------------------------------------------------------------------------------------------------

    @property
    def _columns(self) -> int:
        """K: columns of the flattened weight."""
        raise NotImplementedError

    @property
    def _column_scale(self) -> torch.Tensor | None:
        """``act_pre_scale`` per column of the flattened weight."""
        raise NotImplementedError

    @property
    def _low_rank(self) -> LowRank | None:
        down, up = self.low_rank_down, self.low_rank_up
        return None if down is None or up is None else (down, up)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight as stored; shares its tensors with the layer."""
        return QuantizedWeight(
            qweight=self.qweight,
            scale=self.scale,
            zero_point=self.zero_point,
            group_scale=self.group_scale,
            in_features=self._columns,
            scheme=self.scheme.weight,
        )

    def _rotated(self, x: torch.Tensor) -> tuple[torch.Tensor, nn.Parameter | None]:
        """The input as it is quantized, but for the scale [K] that is still to multiply it: rotations come after it."""
        size = self.scheme.input_rotation
        return (x, self.act_pre_scale) if size is None else (rotate(x, size, self.act_pre_scale), None)

    def prepared_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input as it is quantized: rotated, and multiplied by ``act_pre_scale`` in fp32."""
        x, scale = self._rotated(x)
        if scale is None:
            return x
        return x.float() * (scale.view(-1, 1, 1) if isinstance(self, nn.Conv2d) else scale)

    def _inputs(self, pre_scale: torch.Tensor | None, x: torch.Tensor | None = None) -> InputQuantization:
        return InputQuantization(self.input_scale, self.input_zero_point, pre_scale, self._clip(x))

    def _clip(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """``input_clip`` for every row of an input [..., K]."""
        if self.input_clip is None or x is None:
            return None
        groups = self.timestep_groups
        return clip_of_rows(self.input_clip, None if groups is None else groups.index, x.shape[:-1])

    def _flat_weight(self) -> torch.Tensor:
        """Dense equivalent [N, K] in the compute dtype; rotation, smoothing and low-rank branch are folded in."""
        weight, size = self.quantized_weight(), self.scheme.input_rotation
        with torch.no_grad():
            if size is None:
                return dense_weight(weight, self.compute_dtype, self._column_scale, self._low_rank)
            values = rotate_back(dense_weight(weight, torch.float32), size)
            if self._column_scale is not None:
                values *= self._column_scale
            if self._low_rank is not None:
                down, up = self._low_rank
                values += up.float() @ down.float()
            return values.to(self.compute_dtype)

    def _with_branch(self, path: ComputePath) -> ComputePath:
        return path if self.low_rank_down is None else path.with_branch()

    def scale_outputs(self, factors: torch.Tensor) -> None:
        """Multiply what the layer returns by ``factors``, fp32 [N], in its scales, bias and branch; codes stay.

        Raises:
            ModelStateError: one scale stands for all rows.
        """
        rows = factors.to(self.scale.device).reshape(-1, 1)
        if self.scale.shape[0] != rows.shape[0]:
            raise ModelStateError(
                f"scale_outputs: needs a scale for each of {rows.shape[0]} rows, found {self.scheme.name} with "
                f"{self.scale.shape[0]}. Use PerChannel() or PerGroup()."
            )
        # New tensors: a bias may be the dense layer's own.
        self.scale.data = self.scale.detach() * rows
        if self.zero_point is not None and self.scheme.weight.additive_zero_point:
            self.zero_point.data = self.zero_point.detach() * rows
        if self.low_rank_up is not None:
            self.low_rank_up.data = (self.low_rank_up.detach().float() * rows).to(self.low_rank_up.dtype)
        if self.bias is not None:
            self.bias.data = (self.bias.detach().float() * rows.squeeze(1)).to(self.bias.dtype)
        self.folded = True

    def fold_pre_scale(self) -> None:
        """Drop ``act_pre_scale``, which whatever precedes the layer multiplies by from now on."""
        scale = self._column_scale
        if scale is not None and self.low_rank_down is not None:
            self.low_rank_down.data = (self.low_rank_down.detach().float() / scale).to(self.low_rank_down.dtype)
        self.act_pre_scale = None
        self.folded = True

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters(recurse=False))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module``'s; also what ``layer.weight = nn.Parameter(...)`` comes to, which cannot be meant."""
        if name == "weight":
            raise ModelStateError(
                f"{type(self).__name__}.weight is read-only: it is dequantized from qweight on each access. To change "
                "weights, call dequantize() on the model, change them, and compress again."
            )
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Do nothing: codes are not drawn at random."""

    def _describe(self) -> str:
        clipped = [] if self.input_clip is None else [f"input_clip={self.input_clip.numel()}"]
        parts = [f"scheme={self.scheme.name}", f"compute_dtype={str(self.compute_dtype).removeprefix('torch.')}"]
        if self.act_pre_scale is not None:
            parts.append("act_pre_scale=True")
        if self.folded:
            parts.append("folded=True")
        if self.scheme.input_rotation is not None:
            parts.append(f"input_rotation={self.scheme.input_rotation}")
        if self.low_rank_down is not None:
            parts.append(f"low_rank={self.low_rank_down.shape[0]}")
        return ", ".join(parts + clipped)

    def _needs_grad(self, x: torch.Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or (self.bias is not None and self.bias.requires_grad)

    # --- moving and casting -------------------------------------------------------------------------------------

    def _apply(self: _Layer, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Layer:
        """Let ``fn`` move every tensor but cast only those in the compute dtype."""
        kept = [
            parameter
            for name, parameter in [*self._parameters.items(), *self._buffers.items()]
            if parameter is not None and name not in _IN_COMPUTE_DTYPE
        ]

        def guarded(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if result.dtype == tensor.dtype or not any(tensor is parameter for parameter in kept):
                return result
            return tensor.to(result.device)

        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.qweight.device))
        if probe.is_floating_point() and probe.element_size() < 2:
            raise ModelStateError(
                f"{type(self).__name__}: compute in float32, bfloat16 or float16, got a cast to {probe.dtype}. Codes "
                "are small already, and the rest of the model cannot be computed in it. Cast back, or load it anew."
            )
        super()._apply(guarded, recurse)
        if probe.is_floating_point():
            self.compute_dtype = probe.dtype
        return self


def cast_for_autocast(x: torch.Tensor) -> torch.Tensor:
    """x as a dense layer would see it under autocast."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def check_given(scheme: Scheme, input_scale: Any, input_zero_point: Any) -> None:
    act = scheme.activation
    static = act is not None and not act.dynamic
    if static != (input_scale is not None):
        need = "static activations need input_scale" if static else "only static activations take input_scale"
        raise ConfigError(f"from_dense: {need}, got input_scale={input_scale!r} for {scheme.name}.")
    asymmetric = act is not None and not act.symmetric
    if asymmetric != (input_zero_point is not None):
        need = "asymmetric activations need" if asymmetric else "only asymmetric activations take"
        raise ConfigError(f"from_dense: {need} input_zero_point, got {input_zero_point!r} for {scheme.name}.")


def fill(
    expected: dict[str, torch.Tensor],
    quantized: QuantizedWeight,
    given: dict[str, torch.Tensor | None],
) -> dict[str, torch.Tensor]:
    """Tensors of a layer from what an algorithm returned, checked against (meta) ``expected`` ones."""
    values = {
        "qweight": quantized.qweight,
        "scale": quantized.scale,
        "zero_point": quantized.zero_point,
        "group_scale": quantized.group_scale,
        **given,
    }
    tensors = {}
    for name, like in expected.items():
        value = values.get(name)
        if value is None:
            raise IncompatibleShapeError(f"from_dense: the scheme needs {name} {list(like.shape)}, got None.")
        # Scalars are welcome where one number is meant.
        value = value.detach().reshape(like.shape) if value.numel() == like.numel() == 1 else value.detach()
        if value.shape != like.shape:
            raise IncompatibleShapeError(
                f"from_dense: {name} must have shape {list(like.shape)}, got {list(value.shape)}."
            )
        device = value.device if name == "bias" else quantized.qweight.device
        tensors[name] = value.to(device=device, dtype=like.dtype)
    return tensors
