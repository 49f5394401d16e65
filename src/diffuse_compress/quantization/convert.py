"""Dense layers to quantized ones and into place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffuse_compress.calls import NO_AUTOCAST, autocast_as
from diffuse_compress.errors import ConfigError, DiffuseCompressError, ModelStateError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, quantize_with
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.layer_base import DenseColumns
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear, supports
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.rotation import rotate
from diffuse_compress.quantization.scheme import PerBlock, PerInputGroup, PerTensor, Scheme

__all__ = ["module_aliases", "placeholder_for", "quantize_module", "replace_module", "requantize"]

ROW_BLOCK_BYTES = 64 << 20


def quantize_module(
    module: nn.Module,
    scheme: Scheme,
    algorithm: AlgorithmConfig,
    *,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    name: str | None = None,
) -> QuantizedLinear | QuantizedConv2d:
    """The quantized layer that can replace a dense one, which is not modified.

    Args:
        module: a stock ``nn.Linear`` or ``nn.Conv2d`` with a loaded weight.
        scheme: the format to reach.
        algorithm: config of a data-free algorithm, e.g. ``RTNConfig()``.
        compute_dtype: of bias and output; default that of the weight.
        device: where to compute; the layer comes back on the device of ``module.weight``.
        generator: source of random numbers for algorithms that draw some.
        name: of the layer, for error messages.

    Raises:
        ConfigError: the module cannot be converted, or the algorithm cannot reach the scheme.
        IncompatibleShapeError: the scheme cannot be applied to this shape.
        ModelStateError: the weight is on the meta device, or holds inf or nan.

    Cost:
        Rows go to ``device`` in blocks of at most 64 MiB of fp32 (where rows share scales: the whole weight).
    """
    label = name or type(module).__name__
    reason = supports(module, scheme)
    if reason is not None:
        raise ConfigError(f"{label}: cannot be quantized, {reason}. Use modules_to_not_convert=[{label!r}].")
    assert isinstance(module, nn.Linear | nn.Conv2d)
    if module.weight.is_meta:
        raise ModelStateError(f"{label}: quantization needs the weight, which is on the meta device. Load it first.")
    weight = module.weight.detach().flatten(1)
    scheme.weight.check_shape(label, weight.shape[1])
    try:
        with torch.no_grad(), autocast_as(NO_AUTOCAST):
            quantized = _quantize(weight, scheme, algorithm, device, generator)
        if isinstance(module, nn.Linear):
            return QuantizedLinear.from_dense(module, quantized, scheme, compute_dtype=compute_dtype)
        return QuantizedConv2d.from_dense(module, quantized, scheme, compute_dtype=compute_dtype)
    except DiffuseCompressError as error:
        if str(error).startswith(label):
            raise
        raise type(error)(f"{label}: {error}") from error


def _quantize(
    weight: torch.Tensor,
    scheme: Scheme,
    algorithm: AlgorithmConfig,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> QuantizedWeight:
    """Quantize by blocks of rows, which data-free algorithms treat independently, and collect at home."""
    rows, columns = weight.shape
    whole = isinstance(scheme.weight.granularity, PerTensor | PerInputGroup)
    step = rows if whole else max(1, ROW_BLOCK_BYTES // (4 * columns))
    if isinstance(scheme.weight.granularity, PerBlock):
        size = scheme.weight.granularity.block_size
        step = max(1, step // size) * size
    parts = []
    for start in range(0, rows, step):
        block = weight[start : start + step]
        block = block if device is None else block.to(device)
        if scheme.input_rotation is not None:
            block = rotate(block.float(), scheme.input_rotation)
        parts.append(_to_device(quantize_with(algorithm, block, scheme.weight, generator), weight.device))
    return parts[0] if len(parts) == 1 else _concatenate(parts)


def _to_device(quantized: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    return QuantizedWeight(
        qweight=quantized.qweight.to(device),
        scale=quantized.scale.to(device),
        zero_point=None if quantized.zero_point is None else quantized.zero_point.to(device),
        group_scale=None if quantized.group_scale is None else quantized.group_scale.to(device),
        in_features=quantized.in_features,
        scheme=quantized.scheme,
        outliers=None if quantized.outliers is None else quantized.outliers.to(device),
    )


def _concatenate(parts: list[QuantizedWeight]) -> QuantizedWeight:
    def joined(name: str) -> torch.Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    qweight, scale = joined("qweight"), joined("scale")
    assert qweight is not None
    assert scale is not None
    return QuantizedWeight(
        qweight, scale, joined("zero_point"), joined("group_scale"), parts[0].in_features, parts[0].scheme
    )


def placeholder_for(
    module: nn.Module,
    scheme: Scheme,
    *,
    compute_dtype: torch.dtype,
    device: torch.device | str = "meta",
    act_pre_scale: bool = False,
    low_rank: int = 0,
    act_pre_shift: bool = False,
    bias: bool = False,
    dense_columns: int = 0,
    sparse_outliers: int = 0,
) -> QuantizedLinear | QuantizedConv2d:
    """An empty quantized layer of the size of ``module``, to be filled from a checkpoint.

    ``act_pre_shift`` and ``bias``, of a layer that had none, are for linears.

    Raises:
        ConfigError: the module cannot be converted.
        IncompatibleShapeError: the scheme cannot be applied to this shape.
    """
    reason = supports(module, scheme)
    if reason is not None:
        raise ConfigError(f"{type(module).__name__}: cannot be quantized, {reason}.")
    given: dict[str, Any] = {"compute_dtype": compute_dtype, "device": device, "act_pre_scale": act_pre_scale}
    given |= {"low_rank": low_rank, "dense_columns": dense_columns, "sparse_outliers": sparse_outliers}
    if isinstance(module, nn.Linear):
        given |= {"act_pre_shift": act_pre_shift, "bias": bias}
        return QuantizedLinear.placeholder_like(module, scheme, **given)
    assert isinstance(module, nn.Conv2d)
    return QuantizedConv2d.placeholder_like(module, scheme, **given)


def requantize(
    layer: QuantizedLinear | QuantizedConv2d, dense: nn.Linear | nn.Conv2d
) -> QuantizedLinear | QuantizedConv2d:
    """``layer`` with another weight, that of ``dense``, rounded to nearest in the same format.

    What it knows of its input stays, and so does a low-rank branch: codes stand for what it leaves of ``dense``. Dense
    columns take the new weight's values; single weights beside the codes stay, and codes stand for the rest.
    """
    weight = dense.weight.detach().flatten(1)
    columns: DenseColumns | None = None
    with torch.no_grad(), autocast_as(NO_AUTOCAST):
        if layer._low_rank is not None:
            down, up = layer._low_rank
            weight = weight.float() - up.float() @ down.float()
        if layer._dense_part is not None:
            where = layer._dense_part[0].long()
            columns = (where, weight[:, where])
            weight = weight.index_fill(1, where, 0)
        if layer._column_scale is not None:
            weight = weight.float() / layer._column_scale
        if layer._outliers is not None:
            weight = weight.float() - layer._outliers.add_to(torch.zeros_like(weight, dtype=torch.float32), 0)
        quantized = _quantize(weight, layer.scheme, RTNConfig(), None, None)
        quantized.outliers = layer._outliers
    given: dict[str, Any] = {
        name: getattr(layer, name) for name in ("act_pre_scale", "input_scale", "input_zero_point")
    }
    given |= {"low_rank": layer._low_rank, "compute_dtype": layer.compute_dtype}
    made: QuantizedLinear | QuantizedConv2d
    if isinstance(layer, QuantizedLinear):
        assert isinstance(dense, nn.Linear)
        beside: dict[str, Any] = {"act_pre_shift": layer.act_pre_shift, "dense_columns": columns}
        made = QuantizedLinear.from_dense(dense, quantized, layer.scheme, **beside, **given)
        made.gained_bias = layer.gained_bias
    else:
        assert isinstance(dense, nn.Conv2d)
        made = QuantizedConv2d.from_dense(dense, quantized, layer.scheme, **given)
    made.folded = layer.folded
    if layer.input_clip is not None:
        made.set_input_clip(layer.input_clip, layer.timestep_groups)
    return made


def module_aliases(model: nn.Module) -> dict[int, list[str]]:
    """Every qualified name of each module by ``id``: one that is shared must be replaced everywhere."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where ``root`` has the submodule ``name`` ("blocks.0.attn.to_q", "blocks.0.ff.net.2", ...).

    Raises:
        ModelStateError: there is no submodule of this name.
    """
    parent_name, _, leaf = name.rpartition(".")
    try:
        parent = root.get_submodule(parent_name)
    except AttributeError as error:
        raise ModelStateError(f"{name}: no such submodule in {type(root).__name__} ({error}).") from error
    if leaf not in parent._modules:
        raise ModelStateError(f"{name}: {type(parent).__name__} has no submodule {leaf!r}.")
    # By the registry, so that a container's numbered entries and attributes are treated alike.
    parent._modules[leaf] = new
