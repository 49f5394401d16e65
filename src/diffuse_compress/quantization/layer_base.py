"""What quantized layers share: their parameters, and how these are made, read, moved and cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError, IncompatibleShapeError, ModelStateError
from diffuse_compress.quantization.clips import TimestepGroups, clip_of_rows
from diffuse_compress.quantization.dispatch import ComputePath, InputQuantization, dense_weight
from diffuse_compress.quantization.packed import QuantizedWeight, SparseOutliers
from diffuse_compress.quantization.packing import packed_columns
from diffuse_compress.quantization.rotation import rotate, rotate_back
from diffuse_compress.quantization.scheme import (
    Bilevel,
    PerBlock,
    PerInputGroup,
    PerToken,
    Scheme,
    TwoLevel,
    WeightScheme,
)

__all__ = [
    "INPUT_QPARAMS",
    "DenseColumns",
    "LowRank",
    "QuantizedLayer",
    "cast_for_autocast",
    "check_given",
    "empty_tensors",
    "fill",
]

PARAMETERS = (
    "bias",
    "qweight",
    "scale",
    "zero_point",
    "group_scale",
    "act_pre_shift",
    "act_pre_scale",
    "input_scale",
    "input_zero_point",
    "low_rank_down",
    "low_rank_up",
    "dense_columns",
    "dense_weight",
    "outlier_rows",
    "outlier_columns",
    "outlier_values",
)
INPUT_QPARAMS = ("input_scale", "input_zero_point")
"""Of static inputs. They are no weights: step scales (``temporal/step_scales.py``) write them before every call."""
_IN_COMPUTE_DTYPE = ("bias", "low_rank_down", "low_rank_up", "dense_weight", "outlier_values")
_Layer = TypeVar("_Layer", bound="QuantizedLayer")
LowRank = tuple[torch.Tensor, torch.Tensor]
DenseColumns = tuple[torch.Tensor, torch.Tensor]
"""(columns [C], ascending integers; their weights [N, C] on the input as it comes)."""


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
    act_pre_shift: bool,
    act_pre_scale: bool,
    low_rank: int,
    dense_columns: int = 0,
    sparse_outliers: int = 0,
) -> dict[str, torch.Tensor]:
    """Uninitialised tensors of a layer by name; every one names its dtype."""
    weight, act = scheme.weight, scheme.activation
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if bias:
        shapes["bias"] = ((outputs,), compute_dtype)
    shapes.update(_weight_shapes(weight, outputs, columns))
    if act_pre_shift:
        shapes["act_pre_shift"] = ((channels,), torch.float32)
    if act_pre_scale:
        shapes["act_pre_scale"] = ((channels,), torch.float32)
    if act is not None and not act.dynamic:
        shapes["input_scale"] = ((1,), torch.float32)
        if not act.symmetric:
            shapes["input_zero_point"] = ((1,), torch.int8)
    if low_rank:
        shapes["low_rank_down"] = ((low_rank, columns), compute_dtype)
        shapes["low_rank_up"] = ((outputs, low_rank), compute_dtype)
    if dense_columns:
        shapes["dense_columns"] = ((dense_columns,), torch.int32)
        shapes["dense_weight"] = ((outputs, dense_columns), compute_dtype)
    if sparse_outliers:
        if not isinstance(weight.granularity, Bilevel):
            raise ConfigError(f"placeholder: sparse outliers are of bilevel formats, got {scheme.name}. Use Bilevel().")
        shapes["outlier_rows"] = ((outputs + 1,), torch.int32)
        shapes["outlier_columns"] = ((sparse_outliers,), torch.int16)
        shapes["outlier_values"] = ((sparse_outliers,), compute_dtype)
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}


def _weight_shapes(scheme: WeightScheme, outputs: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    bits = scheme.format.bits
    code_dtype = torch.int8 if scheme.format.is_integer else torch.float8_e4m3fn
    stored = columns if bits == 8 else packed_columns(columns, bits)
    groups = scheme.num_groups(columns)
    scale_shape = scheme.scale_shape((outputs, columns))
    if isinstance(scheme.granularity, Bilevel):
        return {
            "qweight": ((outputs, stored), code_dtype),
            "scale": (scale_shape, torch.float32),
            "group_scale": ((outputs, groups), torch.int8),
        }
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
    act_pre_shift: nn.Parameter | None
    act_pre_scale: nn.Parameter | None
    input_scale: nn.Parameter | None
    input_zero_point: nn.Parameter | None
    low_rank_down: nn.Parameter | None
    low_rank_up: nn.Parameter | None
    dense_columns: nn.Parameter | None
    dense_weight: nn.Parameter | None
    outlier_rows: nn.Parameter | None
    outlier_columns: nn.Parameter | None
    outlier_values: nn.Parameter | None
    scheme: Scheme
    compute_dtype: torch.dtype
    input_clip: torch.Tensor | None
    timestep_groups: TimestepGroups | None = None
    """Of a layer whose ``input_clip`` depends on the timestep: which groups the current call is in."""
    folded = False
    """Whether its input or output is scaled or shifted inside other weights: adapters of the model as it was do not fit
    here."""
    gained_bias = False
    """Whether the dense layer had no bias: what a shift of the input amounts to needs a place."""

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
        dynamic = dynamic and act.outlier_threshold is None  # type: ignore[union-attr]
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
        down = self.low_rank_down
        # Most layers have no such part, and each look-up of a parameter costs a microsecond of every call.
        if down is None:
            return None
        up = self.low_rank_up
        assert up is not None
        return down, up

    @property
    def _dense_part(self) -> DenseColumns | None:
        columns = self.dense_columns
        if columns is None:
            return None
        weight = self.dense_weight
        assert weight is not None
        return columns, weight

    @property
    def _outliers(self) -> SparseOutliers | None:
        rows = self.outlier_rows
        if rows is None:
            return None
        columns, values = self.outlier_columns, self.outlier_values
        assert columns is not None
        assert values is not None
        return SparseOutliers(rows, columns, values)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight as stored; shares its tensors with the layer."""
        return QuantizedWeight(
            qweight=self.qweight,
            scale=self.scale,
            zero_point=self.zero_point,
            group_scale=self.group_scale,
            in_features=self._columns,
            scheme=self.scheme.weight,
            outliers=self._outliers,
        )

    def _shifted(self, x: torch.Tensor) -> torch.Tensor:
        """The input less ``act_pre_shift``, subtracted in fp32, in its dtype."""
        return x if self.act_pre_shift is None else (x.float() - self.act_pre_shift).to(x.dtype)

    def _coded(self, x: torch.Tensor) -> torch.Tensor:
        """The input, shifted already, that codes are multiplied with: 0 in dense columns, so that they set no scale.

        Where inputs are left alone nothing has to be done: the codes of these columns stand for 0.
        """
        if self.dense_columns is None or self.scheme.activation is None:
            return x
        return x.index_fill(-1, self.dense_columns.long(), 0)

    def _rotated(self, x: torch.Tensor) -> tuple[torch.Tensor, nn.Parameter | None]:
        """The input, shifted already, as it is quantized, but for the scale [K] that is still to multiply it: rotations
        come after it."""
        size = self.scheme.input_rotation
        return (x, self.act_pre_scale) if size is None else (rotate(x, size, self.act_pre_scale), None)

    def prepared_input(self, x: torch.Tensor) -> torch.Tensor:
        """The fp32 input as it is quantized: shifted, no dense columns, rotated, multiplied by ``act_pre_scale``."""
        x, scale = self._rotated(self._coded(self._shifted(x)))
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
        """Dense equivalent [N, K] in the compute dtype; all that is beside the codes is folded in."""
        weight, size = self.quantized_weight(), self.scheme.input_rotation
        with torch.no_grad():
            if self._dense_part is not None:
                columns, dense = self._dense_part
                values = dense_weight(weight, torch.float32, self._column_scale, self._low_rank)
                # Codes stand for exactly 0 there.
                return values.index_add_(1, columns.long(), dense.float()).to(self.compute_dtype)
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
        if self.low_rank_down is not None:
            path = path.with_branch()
        if self.dense_columns is not None:
            path = path.with_branch("dense input columns")
        return path if self.outlier_rows is None else path.with_branch("sparse outliers")

    def scale_outputs(self, factors: torch.Tensor) -> None:
        """Multiply what the layer returns by ``factors``, fp32 [N], in its scales, bias and branch; codes stay.

        Raises:
            ModelStateError: one scale stands for several rows.
        """
        rows = factors.to(self.scale.device).reshape(-1, 1)
        by_row = not isinstance(self.scheme.weight.granularity, PerInputGroup | PerBlock)
        if not by_row or self.scale.shape[0] != rows.shape[0]:
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
        if self.dense_weight is not None:
            self.dense_weight.data = (self.dense_weight.detach().float() * rows).to(self.dense_weight.dtype)
        if self.outlier_rows is not None and self.outlier_values is not None:
            counts = self.outlier_rows.detach().diff().long()
            values = self.outlier_values.detach().float() * rows.squeeze(1).repeat_interleave(counts)
            self.outlier_values.data = values.to(self.outlier_values.dtype)
        if self.bias is not None:
            self.bias.data = (self.bias.detach().float() * rows.squeeze(1)).to(self.bias.dtype)
        self.folded = True

    def shift_outputs(self, values: torch.Tensor) -> None:
        """Add ``values``, fp32 [N], to what the layer returns, in its bias.

        Raises:
            ModelStateError: it has none.
        """
        if self.bias is None:
            raise ModelStateError(f"shift_outputs: needs a layer with a bias, found {type(self).__name__} without one.")
        self.bias.data = (self.bias.detach().float() + values.to(self.bias.device)).to(self.bias.dtype)
        self.folded = True

    def fold_pre_shift(self) -> None:
        """Drop ``act_pre_shift``, which whatever precedes the layer subtracts from now on."""
        self.act_pre_shift = None
        self.folded = True

    def fold_pre_scale(self) -> None:
        """Drop ``act_pre_scale``, which whatever precedes the layer multiplies by from now on."""
        scale = self._column_scale
        if self.act_pre_shift is not None and self.act_pre_scale is not None:
            self.act_pre_shift.data = self.act_pre_shift.detach() * self.act_pre_scale.detach()
        if scale is not None and self.low_rank_down is not None:
            self.low_rank_down.data = (self.low_rank_down.detach().float() / scale).to(self.low_rank_down.dtype)
        if scale is not None and self._dense_part is not None:
            columns, dense = self._dense_part
            dense.data = (dense.detach().float() / scale[columns.long()]).to(dense.dtype)
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
        if self.act_pre_shift is not None:
            parts.append("act_pre_shift=True")
        if self.act_pre_scale is not None:
            parts.append("act_pre_scale=True")
        if self.folded:
            parts.append("folded=True")
        if self.scheme.input_rotation is not None:
            parts.append(f"input_rotation={self.scheme.input_rotation}")
        if self.low_rank_down is not None:
            parts.append(f"low_rank={self.low_rank_down.shape[0]}")
        if self.dense_columns is not None:
            parts.append(f"dense_columns={self.dense_columns.shape[0]}")
        if self.outlier_values is not None:
            parts.append(f"sparse_outliers={self.outlier_values.shape[0]}")
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
    values: dict[str, torch.Tensor | None] = {
        "qweight": quantized.qweight,
        "scale": quantized.scale,
        "zero_point": quantized.zero_point,
        "group_scale": quantized.group_scale,
        **given,
    }
    if quantized.outliers is not None:
        of_outliers = quantized.outliers
        values |= {
            "outlier_rows": of_outliers.rows,
            "outlier_columns": of_outliers.columns,
            "outlier_values": of_outliers.values,
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
