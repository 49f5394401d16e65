"""Quantized layers: ``nn.Linear`` and ``nn.Conv2d`` to everyone who looks, plain parameters inside.

A layer holds, in this order and only where its scheme asks for them (K = in_features, or C * kh * kw):

=====================  =====================================  =================================================
parameter              shape, dtype                           meaning
=====================  =====================================  =================================================
``bias``               [N], compute dtype                     as in the dense layer
``qweight``            see :class:`QuantizedWeight`           codes, packed below 8 bits
``scale``              see :class:`QuantizedWeight`, fp32     of the weight
``zero_point``         as ``scale``, int8 or fp32             asymmetric weights
``group_scale``        [N, G] int8                            two-level and bilevel scales
``act_pre_shift``      [K] fp32, linear layers only           is subtracted from the input, in fp32
``act_pre_scale``      [K] or [C] fp32                        multiplies the input, in fp32, before it is quantized
``input_scale``        [1] fp32                               static activations
``input_zero_point``   [1] int8                               static asymmetric activations
``low_rank_down``      [r, K], compute dtype                  with ``low_rank_up`` [N, r]: a dense branch
``dense_columns``      [C] int32                              with ``dense_weight`` [N, C], compute dtype: input
                                                              columns beside the codes, linear layers only
``outlier_rows``       [N + 1] int32                          with ``outlier_columns`` [E] int16 and
                                                              ``outlier_values`` [E], compute dtype: single weights
                                                              added to the codes' (``packed.SparseOutliers``)
``input_clip``         [G] fp32, a buffer outside the state   dynamic inputs with learned clips (``clips.py``)
                       dict
=====================  =====================================  =================================================

and computes, with Q the quantizer of the input (the identity in weight-only layers)::

    u = x - act_pre_shift
    y = Q(u * act_pre_scale) @ dequantize(qweight, ...).T + bias + (u @ low_rank_down.T) @ low_rank_up.T
        + u[dense_columns] @ dense_weight.T

Where there is a shift, the bias holds what it takes from the dense layer's output, ``weight @ act_pre_shift``; a layer
that had no bias then gets one. Convolutions have no shift: it would not be one at their padding.

The u that is quantized is 0 in the dense columns, whose codes stand for 0. With an ``outlier_threshold`` (LLM.int8) the
columns are those in which a value of the call reaches it; they are 0 for Q likewise, and their weights are dequantized.
Where the scheme has an ``input_rotation``, a linear layer rotates ``u * act_pre_scale`` before Q; the rotation follows
from its size alone (``rotation.py``), so it has no tensor. The low-rank branch reads the input as it comes, *before*
``act_pre_scale``: an algorithm that factors the smoothed weight multiplies the columns of ``low_rank_down`` by
``act_pre_scale`` once, and no second copy of x is made.
Casting a layer moves what is in the compute dtype; scales stay fp32 and codes stay codes.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.dispatch import (
    ComputePath,
    Geometry,
    compute_path,
    conv2d,
    linear,
    per_column,
)
from diffuse_compress.quantization.gradients import ConvFunction, LinearFunction
from diffuse_compress.quantization.layer_base import (
    DenseColumns,
    LowRank,
    QuantizedLayer,
    cast_for_autocast,
    check_given,
    empty_tensors,
    fill,
)
from diffuse_compress.quantization.outlier_columns import divide
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import PerBlock, Scheme

__all__ = ["QuantizedConv2d", "QuantizedLinear", "supports"]

MAX_INTEGER_COLUMNS = 1 << 17
# Subclasses whose forward is nn.Linear's in other words: a product and a bias, nothing else reads the weight. Any other
# may do more, and torch's NonDynamicallyQuantizableLinear, which adds nothing, is read by its attention without a call.
_PLAIN_LINEARS = {"transformers.models.falcon.modeling_falcon.FalconLinear"}


def supports(module: nn.Module, scheme: Scheme) -> str | None:
    """Why a stock module cannot be converted to this scheme, or None if it can.

    Divisibility by a group size is not judged here: ``WeightScheme.check_shape`` raises with what to do about it.
    """
    if isinstance(module, QuantizedLayer):
        return f"already {module.scheme.name}"
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return f"no quantized layer for {type(module).__name__}"
    if type(module) not in (nn.Linear, nn.Conv2d) and _class_path(module) not in _PLAIN_LINEARS:
        return f"{type(module).__name__} is a subclass whose forward is its own"
    if "parametrizations" in module._modules or "weight" not in module._parameters:
        return "its weight is parametrized"
    weight = module.weight
    if type(weight) is not nn.Parameter and not weight.is_meta:
        return f"its weight is a {type(weight).__name__}"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if weight.numel() == 0:
        return "its weight is empty"
    if scheme.has_integer_path and weight.flatten(1).shape[1] > MAX_INTEGER_COLUMNS:
        return f"in_features over {MAX_INTEGER_COLUMNS} could overflow int32 sums"
    if scheme.activation is not None and scheme.activation.outlier_threshold is not None:
        if not isinstance(module, nn.Linear):
            return "outlier columns are taken out of inputs of linear layers only"
    if isinstance(scheme.weight.granularity, PerBlock) and not isinstance(module, nn.Linear):
        return "scales of 128 by 128 blocks are for linear layers"
    return _unfit_rotation(module, scheme.input_rotation)


def _class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _unfit_rotation(module: nn.Linear | nn.Conv2d, size: int | None) -> str | None:
    if size is None:
        return None
    if not isinstance(module, nn.Linear):
        return "only inputs of linear layers are rotated"
    if module.in_features % size:
        return f"in_features must be divisible by the rotation's size, {size}, got {module.in_features}"
    return None


def _tensors_from_dense(
    cls: type[QuantizedLinear] | type[QuantizedConv2d],
    dense: Any,
    quantized: QuantizedWeight,
    scheme: Scheme,
    dtype: torch.dtype,
    act_pre_scale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_zero_point: torch.Tensor | None,
    low_rank: LowRank | None,
    dense_columns: DenseColumns | None = None,
    act_pre_shift: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Parameters of the ``cls`` that replaces ``dense``, checked against its placeholder."""
    check_given(scheme, input_scale, input_zero_point)
    sparse = quantized.outliers
    beside: dict[str, Any] = {"sparse_outliers": 0 if sparse is None else sparse.values.shape[0]}
    if dense_columns is not None:
        beside["dense_columns"] = dense_columns[0].shape[0]
    if act_pre_shift is not None:
        beside["act_pre_shift"] = True
    bias = dense.bias if bias is None else bias
    if bias is not None and dense.bias is None:
        beside["bias"] = True
    expected = cls.placeholder_like(
        dense,
        scheme,
        compute_dtype=dtype,
        act_pre_scale=act_pre_scale is not None,
        low_rank=0 if low_rank is None else low_rank[0].shape[0],
        **beside,
    )
    down, up = low_rank or (None, None)
    columns, column_weight = dense_columns or (None, None)
    given = {
        "bias": bias,
        "act_pre_shift": act_pre_shift,
        "act_pre_scale": act_pre_scale,
        "input_scale": input_scale,
        "input_zero_point": input_zero_point,
        "low_rank_down": down,
        "low_rank_up": up,
        "dense_columns": columns,
        "dense_weight": column_weight,
    }
    return fill(dict(expected.named_parameters()), quantized, given)


# --- linear -----------------------------------------------------------------------------------------------------


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A linear layer with a quantized weight; see the module docstring for parameters and equation.

    Made by :meth:`from_dense`, or empty by :meth:`placeholder`. Gradients reach the input, the bias and the low-rank
    branch if they require one, straight through the quantizer of the input; codes and scales get none.
    """

    def __init__(
        self, in_features: int, out_features: int, tensors: dict[str, torch.Tensor], scheme: Scheme, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self._setup(tensors, scheme, dtype)

    @classmethod
    def placeholder(
        cls,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        *,
        compute_dtype: torch.dtype,
        device: torch.device | str = "meta",
        act_pre_shift: bool = False,
        act_pre_scale: bool = False,
        low_rank: int = 0,
        dense_columns: int = 0,
        sparse_outliers: int = 0,
    ) -> QuantizedLinear:
        """A layer of uninitialised tensors, to be filled from a checkpoint.

        Raises:
            IncompatibleShapeError: ``in_features`` does not fit the scheme's group size.
        """
        scheme.weight.check_shape("placeholder", in_features)
        tensors = empty_tensors(
            scheme,
            out_features,
            in_features,
            in_features,
            bias=bias,
            compute_dtype=compute_dtype,
            device=device,
            act_pre_shift=act_pre_shift,
            act_pre_scale=act_pre_scale,
            low_rank=low_rank,
            dense_columns=dense_columns,
            sparse_outliers=sparse_outliers,
        )
        return cls(in_features, out_features, tensors, scheme, compute_dtype)

    @classmethod
    def placeholder_like(
        cls,
        module: nn.Linear,
        scheme: Scheme,
        *,
        compute_dtype: torch.dtype,
        device: torch.device | str = "meta",
        act_pre_shift: bool = False,
        act_pre_scale: bool = False,
        low_rank: int = 0,
        bias: bool = False,
        dense_columns: int = 0,
        sparse_outliers: int = 0,
    ) -> QuantizedLinear:
        """:meth:`placeholder` of the size of a dense layer, in its training mode; with ``bias`` also where that has
        none."""
        layer = cls.placeholder(
            module.in_features,
            module.out_features,
            bias or module.bias is not None,
            scheme,
            compute_dtype=compute_dtype,
            device=device,
            act_pre_shift=act_pre_shift,
            act_pre_scale=act_pre_scale,
            low_rank=low_rank,
            dense_columns=dense_columns,
            sparse_outliers=sparse_outliers,
        )
        layer.gained_bias = bias and module.bias is None
        return layer.train(module.training)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        quantized: QuantizedWeight,
        scheme: Scheme,
        *,
        compute_dtype: torch.dtype | None = None,
        act_pre_scale: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
        input_zero_point: torch.Tensor | None = None,
        low_rank: LowRank | None = None,
        dense_columns: DenseColumns | None = None,
        act_pre_shift: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> QuantizedLinear:
        """The layer that replaces ``linear``, on the device of ``quantized``.

        Args:
            linear: its sizes, bias and training mode are taken.
            quantized: codes of the weight; of ``weight / act_pre_scale`` if the input is smoothed, and of what the
                low-rank branch leaves if there is one.
            scheme: the layer's; ``scheme.weight`` is ``quantized.scheme``.
            compute_dtype: default that of ``linear.weight``.
            act_pre_scale: [K].
            input_scale: one number, static activations only.
            input_zero_point: one number, static asymmetric activations only.
            low_rank: (down [r, K], up [N, r]) on the input before ``act_pre_scale``.
            dense_columns: (columns [C], weight [N, C]) likewise; ``quantized`` has to stand for 0 there.
            act_pre_shift: [K]; the bias then is that of ``linear`` and ``linear.weight @ act_pre_shift``.
            bias: [N], instead of these.

        Raises:
            ConfigError: static qparams are missing or not wanted.
            IncompatibleShapeError: a tensor's shape is not what the scheme asks for.
        """
        dtype = compute_dtype or linear.weight.dtype
        if act_pre_shift is not None and bias is None:
            bias = _bias_of_shift(linear, act_pre_shift)
        given = (act_pre_scale, input_scale, input_zero_point, low_rank, dense_columns, act_pre_shift, bias)
        tensors = _tensors_from_dense(cls, linear, quantized, scheme, dtype, *given)
        layer = cls(linear.in_features, linear.out_features, tensors, scheme, dtype).train(linear.training)
        layer.gained_bias = layer.bias is not None and linear.bias is None
        return layer

    @property
    def _columns(self) -> int:
        return self.in_features

    @property
    def _column_scale(self) -> torch.Tensor | None:
        return self.act_pre_scale

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Dense equivalent [N, K] in the compute dtype: ``F.linear(u, layer.weight, layer.bias)`` without Q.

        Computed on every access; smoothing and low-rank branch are folded in.
        """
        return self._flat_weight()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y [..., N] in the dtype of the input, [..., K]; the equation is in the module docstring."""
        x = self._shifted(cast_for_autocast(input))
        coded, aside = self._coded(x), None
        act = self.scheme.activation
        if act is not None and act.outlier_threshold is not None:
            coded, aside = divide(x, self.quantized_weight(), act.outlier_threshold, self.act_pre_scale)
        rotated, pre_scale = self._rotated(coded)
        if self._needs_grad(x):
            y = cast(
                torch.Tensor,
                LinearFunction.apply(
                    rotated,
                    self.bias,
                    self.qweight,
                    self.scale,
                    self.zero_point,
                    self.group_scale,
                    self.outlier_rows,
                    self.outlier_columns,
                    self.outlier_values,
                    pre_scale,
                    self.input_scale,
                    self.input_zero_point,
                    self._clip(x),
                    self.scheme,
                ),
            )
        else:
            y = linear(rotated, self.quantized_weight(), self.scheme, self.bias, self._inputs(pre_scale, x))
        if aside is not None:
            y = y + aside
        low_rank = self._low_rank
        if low_rank is not None:
            y = y + F.linear(F.linear(x, low_rank[0].to(x.dtype)), low_rank[1].to(x.dtype))
        dense_part = self._dense_part
        if dense_part is not None:
            columns, weight = dense_part
            y = y + F.linear(x.index_select(-1, columns), weight.to(x.dtype))
        return y

    def compute_path(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ComputePath:
        """How this layer is computed there (default: where it is, in its compute dtype)."""
        device, dtype = device or self.qweight.device, dtype or self.compute_dtype
        return self._with_branch(compute_path(self.scheme, device, dtype, outputs=self.out_features))

    def to_dense(self) -> nn.Linear:
        """A stock layer with the weight rounded to the grid, same device, compute dtype and training mode.

        Of a shift, its bias tells what is not the same without: one that had none keeps the bias that it has gained.
        """
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", self.compute_dtype)
        weight, bias = self.weight, self.bias
        if self.act_pre_shift is not None:
            bias = bias.detach().float() - weight.float() @ self.act_pre_shift.detach()
            bias = nn.Parameter(bias.to(self.compute_dtype), requires_grad=False)
        return _finish_dense(dense, weight, bias, self.training)

    def extra_repr(self) -> str:
        """Sizes, scheme and dtype."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            + self._describe()
        )


_Dense = TypeVar("_Dense", nn.Linear, nn.Conv2d)


def _bias_of_shift(linear: nn.Linear, shift: torch.Tensor) -> torch.Tensor:
    """fp32 [N]: bias with which ``linear`` returns the same for an input less ``shift``."""
    moved = linear.weight.detach().float() @ shift.to(linear.weight.device, torch.float32)
    return moved if linear.bias is None else linear.bias.detach().float() + moved


def _finish_dense(dense: _Dense, weight: torch.Tensor, bias: nn.Parameter | None, training: bool) -> _Dense:
    dense.weight = nn.Parameter(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().clone())
    return dense.train(training)


# --- convolution ------------------------------------------------------------------------------------------------


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A 2-d convolution with a quantized weight, flattened to [N, C / groups * kh * kw] in storage.

    A sample is a convolution's token: dynamic activation scales are one per sample. Everything else is as in
    :class:`QuantizedLinear`; grouped convolutions have no integer path and no low-rank branch.
    """

    def __init__(
        self, like: nn.Conv2d, tensors: dict[str, torch.Tensor], scheme: Scheme, compute_dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        for name in _CONV_ATTRIBUTES:
            setattr(self, name, getattr(like, name))
        self._setup(tensors, scheme, compute_dtype)

    @classmethod
    def placeholder_like(
        cls,
        module: nn.Conv2d,
        scheme: Scheme,
        *,
        compute_dtype: torch.dtype,
        device: torch.device | str = "meta",
        act_pre_scale: bool = False,
        low_rank: int = 0,
        dense_columns: int = 0,
        sparse_outliers: int = 0,
    ) -> QuantizedConv2d:
        """A layer of uninitialised tensors with the geometry of ``module``.

        Raises:
            IncompatibleShapeError: its columns do not fit the scheme's group size.
            ConfigError: a low-rank branch for a grouped convolution, or dense columns for any.
        """
        columns = _conv_columns(module)
        if dense_columns:
            raise ConfigError(f"placeholder: convolutions take no dense columns, got {dense_columns}.")
        scheme.weight.check_shape("placeholder", columns)
        if low_rank and module.groups != 1:
            raise ConfigError(f"placeholder: grouped convolutions take no low-rank branch, got groups={module.groups}.")
        tensors = empty_tensors(
            scheme,
            module.out_channels,
            columns,
            module.in_channels,
            bias=module.bias is not None,
            compute_dtype=compute_dtype,
            device=device,
            act_pre_shift=False,
            act_pre_scale=act_pre_scale,
            low_rank=low_rank,
            sparse_outliers=sparse_outliers,
        )
        return cls(module, tensors, scheme, compute_dtype).train(module.training)

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        quantized: QuantizedWeight,
        scheme: Scheme,
        *,
        compute_dtype: torch.dtype | None = None,
        act_pre_scale: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
        input_zero_point: torch.Tensor | None = None,
        low_rank: LowRank | None = None,
    ) -> QuantizedConv2d:
        """The layer that replaces ``conv``; arguments as :meth:`QuantizedLinear.from_dense`, ``act_pre_scale`` [C]."""
        dtype = compute_dtype or conv.weight.dtype
        given = (act_pre_scale, input_scale, input_zero_point, low_rank)
        tensors = _tensors_from_dense(cls, conv, quantized, scheme, dtype, *given)
        return cls(conv, tensors, scheme, dtype).train(conv.training)

    @property
    def _columns(self) -> int:
        return _conv_columns(self)

    @property
    def _column_scale(self) -> torch.Tensor | None:
        return None if self.act_pre_scale is None else per_column(self.act_pre_scale, self._geometry, self.out_channels)

    @property
    def _geometry(self) -> Geometry:
        return self._geometry_and_padding()[0]

    def _geometry_and_padding(self) -> tuple[Geometry, tuple[int, ...] | None]:
        """Geometry, and what :func:`torch.nn.functional.pad` must do first (None: the geometry pads with zeros)."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        explicit = self.padding_mode != "zeros" or left != right or top != bottom
        geometry = Geometry(
            cast(tuple[int, int], self.kernel_size),
            cast(tuple[int, int], self.stride),
            (0, 0) if explicit else (top, left),
            cast(tuple[int, int], self.dilation),
            self.groups,
        )
        return geometry, (left, right, top, bottom) if explicit else None

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Dense equivalent [N, C / groups, kh, kw] in the compute dtype, computed on every access."""
        return self._flat_weight().view(self.out_channels, -1, *self.kernel_size)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y [B, N, Ho, Wo] (or unbatched) in the dtype of the input."""
        if input.dim() == 3:
            y: torch.Tensor = self.forward(input.unsqueeze(0))
            return y.squeeze(0)
        x = cast_for_autocast(input)
        geometry, padding = self._geometry_and_padding()
        if padding is not None:
            x = F.pad(x, padding, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        if self._needs_grad(x):
            y = cast(
                torch.Tensor,
                ConvFunction.apply(
                    x,
                    self.bias,
                    self.qweight,
                    self.scale,
                    self.zero_point,
                    self.group_scale,
                    self.outlier_rows,
                    self.outlier_columns,
                    self.outlier_values,
                    self.act_pre_scale,
                    self._column_scale,
                    self.input_scale,
                    self.input_zero_point,
                    self.scheme,
                    geometry,
                ),
            )
        else:
            inputs = self._inputs(self.act_pre_scale)
            y = conv2d(x, self.quantized_weight(), self.scheme, geometry, self.bias, inputs)
        if self.low_rank_down is not None and self.low_rank_up is not None:
            down = self.low_rank_down.to(x.dtype).unflatten(1, (-1, *geometry.kernel))
            hidden = F.conv2d(x, down, None, geometry.stride, geometry.padding, geometry.dilation)
            y = y + F.conv2d(hidden, self.low_rank_up.to(x.dtype)[:, :, None, None])
        return y

    def compute_path(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ComputePath:
        """How this layer is computed there (default: where it is, in its compute dtype)."""
        device, dtype = device or self.qweight.device, dtype or self.compute_dtype
        path = compute_path(self.scheme, device, dtype, kind="conv2d", groups=self.groups, geometry=self._geometry)
        return self._with_branch(path)

    def to_dense(self) -> nn.Conv2d:
        """A stock layer with the weight rounded to the grid, same device, compute dtype and training mode."""
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            cast(tuple[int, int], self.kernel_size),
            cast(tuple[int, int], self.stride),
            cast(tuple[int, int] | str, self.padding),
            cast(tuple[int, int], self.dilation),
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device="meta",
            dtype=self.compute_dtype,
        )
        return _finish_dense(dense, self.weight, self.bias, self.training)

    def extra_repr(self) -> str:
        """Sizes, scheme and dtype."""
        return f"{super().extra_repr()}, {self._describe()}"


_CONV_ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)


def _conv_columns(conv: nn.Conv2d) -> int:
    """Columns of the flattened weight."""
    return conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
