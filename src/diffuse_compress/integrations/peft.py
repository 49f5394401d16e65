"""Adapters on compressed models: peft wraps our layers as it wraps dense ones; merging and one loader need help.

peft merges by adding to ``base_layer.weight`` in place. Ours is dequantized on access, so the sum would be lost and
``fuse_lora`` would silently drop the adapter. Here a dense copy of one layer at a time takes the sum, is quantized anew
in the layer's own format, and the packed tensors from before are kept for ``unfuse_lora``, which puts them back as they
were.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import DiffuseCompressWarning, ModelStateError
from diffuse_compress.integrations.compat import may_patch
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.integrations.wrapping import is_wrapped, wrapping
from diffuse_compress.quantization.convert import requantize
from diffuse_compress.quantization.layer_base import QuantizedLayer

__all__ = ["has_adapters", "merge_errors", "restore_merge_errors", "support_adapters", "warn_of_folding"]

_UNMERGED = "_diffuse_compress_unmerged"
_MERGE_ERROR = "_diffuse_compress_merge_error"
_PACKED = "_diffuse_compress_packed"
_WARNED = "_diffuse_compress_warned"
# LoRA initializations that take out of the base weight what they put into the adapter.
_REWRITES_BASE = ("pissa_init", "olora_init", "corda_init", "loftq_init", "lora_ga_init")


def support_adapters() -> None:
    """Teach peft to merge into packed layers, and diffusers' Flux loader to find their shapes. Idempotent.

    Does nothing where peft is not imported: diffusers imports it when it is installed.
    """
    if not may_patch() or "peft" not in sys.modules:
        return
    from peft.tuners.lora.layer import LoraLayer, _ConvNd
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    for cls in _with_subclasses(BaseTunerLayer):
        _wrap_merging(cls)
    for cls in _with_subclasses(BaseTuner):
        _wrap_replacing(cls)
    for name in _REWRITES_BASE:
        _wrap_initializing(LoraLayer, name)
    _wrap_conv(_ConvNd)
    pipelines = sys.modules.get("diffusers.loaders.lora_pipeline")
    _wrap_expanding(getattr(pipelines, "FluxLoraLoaderMixin", object))


def warn_of_folding(what: str) -> None:
    """Warn that ``what`` is put on layers of which a smoothing scale was folded into other weights."""
    warnings.warn(
        f"{what}: smoothing scales were folded into this model's weights, so some of its layers read and return other "
        "values than those of the original. One that is trained on this compressed model fits it; one that was trained "
        "on the original does not: for that, compress the original with fold=False in AWQConfig or SmoothQuantConfig.",
        DiffuseCompressWarning,
        stacklevel=4,
    )


def has_adapters(model: nn.Module) -> bool:
    """True while peft layers are in ``model``: its tensors then have other names than in a checkpoint."""
    return any("base_layer" in module._modules for module in model.modules())


def merge_errors(model: nn.Module) -> dict[str, float]:
    """{layer: error} of layers that an adapter is fused into: RMS of what quantizing anew lost over what it changed."""
    layers = ((name.removesuffix(".base_layer"), layer) for name, layer in quantized_layers(model).items())
    return {name: layer.__dict__[_MERGE_ERROR] for name, layer in layers if _MERGE_ERROR in layer.__dict__}


def restore_merge_errors(model: nn.Module, errors: Mapping[str, float]) -> None:
    """What :func:`merge_errors` gave of the model that was saved, whose names may have had another prefix."""
    layers = quantized_layers(model)
    for saved, error in errors.items():
        same = (name for name in layers if saved == name or saved.endswith(f".{name}") or name.endswith(f".{saved}"))
        name = saved if saved in layers else next(same, None)
        if name is not None:
            layers[name].__dict__[_MERGE_ERROR] = error


# --- merging ----------------------------------------------------------------------------------------------------


def _with_subclasses(cls: Any) -> Iterator[Any]:
    """``cls`` and all that derive from it, which peft has imported by now: one set for each of its methods."""
    yield cls
    for derived in cls.__subclasses__():
        yield from _with_subclasses(derived)


def _wrap_merging(cls: Any) -> None:
    """Merging adds to ``weight``, which a packed layer makes anew at every access: what is added would be lost."""
    stock_merge, stock_unmerge = cls.__dict__.get("merge"), cls.__dict__.get("unmerge")
    if stock_merge is None or stock_unmerge is None or is_wrapped(stock_merge):
        return
    signature = inspect.signature(stock_merge)

    @wrapping(stock_merge)
    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        if not _is_packed(self):
            stock_merge(self, *args, **kwargs)
            return
        given = signature.bind(self, *args, **kwargs).arguments
        stock = functools.partial(stock_merge, self, safe_merge=given.get("safe_merge", False))
        _merge(self, stock, given.get("adapter_names"))

    @wrapping(stock_unmerge)
    def unmerge(self: Any, *args: Any, **kwargs: Any) -> None:
        if _is_packed(self) and self.merged:
            _unmerge(self)
        else:
            stock_unmerge(self, *args, **kwargs)

    cls.merge, cls.unmerge = merge, unmerge


def _is_packed(tuner: Any) -> bool:
    return isinstance(getattr(tuner, "base_layer", None), QuantizedLayer)


def _wrap_replacing(cls: Any) -> None:
    """A packed layer goes back to its place as it is: peft would set ``weight`` on it, which cannot be set."""
    stock = cls.__dict__.get("_replace_module")
    if stock is None or is_wrapped(stock):
        return

    @wrapping(stock)
    def replace(self: Any, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if _is_packed(new_module) and new_module.base_layer.folded and not vars(self).get(_WARNED):  # type: ignore[union-attr]
            vars(self)[_WARNED] = True  # once for an adapter, not for each of its layers
            warn_of_folding("adapter")
        if isinstance(new_module, QuantizedLayer):
            setattr(parent, child_name, new_module)
        else:
            stock(self, parent, child_name, new_module, child)

    cls._replace_module = replace


def _wrap_initializing(cls: Any, name: str) -> None:
    stock = cls.__dict__.get(name)
    if stock is None or is_wrapped(stock):
        return
    method = name.removesuffix("_init")

    @wrapping(stock)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        packed = self.__dict__.get(_PACKED, self.base_layer)
        if isinstance(packed, QuantizedLayer):
            raise ModelStateError(
                f"init_lora_weights={method!r}: needs dense base weights, which it rewrites, found a layer in "
                f"{packed.scheme.name}. Add the adapter first and compress then, or initialize it otherwise "
                '(True, "gaussian", "eva", ...).'
            )
        stock(self, *args, **kwargs)

    setattr(cls, name, initialize)


def _wrap_conv(cls: Any) -> None:
    """peft makes the adapter of a convolution of the base layer's own class, which must be a dense one for that."""
    stock = cls.__dict__.get("update_layer")
    if stock is None or is_wrapped(stock):
        return

    @wrapping(stock)
    def update_layer(self: Any, *args: Any, **kwargs: Any) -> None:
        if not _is_packed(self):
            stock(self, *args, **kwargs)
            return
        packed = self.base_layer
        self.__dict__[_PACKED] = packed
        self.base_layer = packed.to_dense().to(packed.qweight.device)
        try:
            stock(self, *args, **kwargs)
        finally:
            self.base_layer = self.__dict__.pop(_PACKED)

    cls.update_layer = update_layer


def _merge(tuner: Any, stock: Callable[..., None], adapter_names: list[str] | None) -> None:
    merged, packed = list(tuner.merged_adapters), tuner.base_layer
    # Always from the layer before any merge: quantizing what was quantized anew would add up its errors.
    original = tuner.__dict__.get(_UNMERGED, packed)
    dense = original.to_dense().to(packed.qweight.device)
    before = dense.weight.detach().clone()
    tuner.base_layer = dense
    tuner.merged_adapters = []
    try:
        if merged:
            stock(adapter_names=merged)
        stock(adapter_names=adapter_names)
    except BaseException:
        tuner.base_layer, tuner.merged_adapters = packed, merged
        raise
    if tuner.merged_adapters == merged:
        tuner.base_layer = packed
        return
    layer = requantize(original, dense)
    change, lost = dense.weight.detach() - before, layer.weight - dense.weight.detach()
    # On the layer: it outlives the adapter, which a user may unload once it is fused.
    layer.__dict__[_MERGE_ERROR] = float(lost.float().norm() / change.float().norm().clamp_min(1e-30))
    tuner.base_layer = layer
    # Beside the module tree: it is no part of the state dict, and stays on the CPU whatever the model is moved to.
    tuner.__dict__[_UNMERGED] = original.to("cpu")


def _unmerge(tuner: Any) -> None:
    original = tuner.__dict__.pop(_UNMERGED, None)
    if original is None:
        raise ModelStateError(
            "unfuse_lora: needs the weights from before the adapter was fused, and they were never here: it was fused "
            "before the model was compressed. Load the model anew, compress it, then load and fuse the adapter."
        )
    merged = tuner.base_layer
    tuner.base_layer = original.to(merged.qweight.device, merged.compute_dtype)
    tuner.merged_adapters.clear()


# --- Flux -------------------------------------------------------------------------------------------------------


class _WithShapes:
    """A model whose ``state_dict`` has ``<layer>.weight`` for packed layers: its shape and device, and no memory."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = self._model.state_dict()
        for name, layer in quantized_layers(self._model).items():
            shape = layer.qweight.shape[0], layer.quantized_weight().in_features
            state[f"{name}.weight"] = torch.zeros((), device=layer.qweight.device).expand(shape)
        return state


def _wrap_expanding(cls: Any) -> None:
    name = "_maybe_expand_lora_state_dict"
    method = cls.__dict__.get(name)
    if method is None or is_wrapped(method.__func__):
        return
    stock = method.__func__

    @wrapping(stock)
    def expand(cls: Any, transformer: nn.Module, lora_state_dict: dict[str, Any]) -> Any:
        return stock(cls, _WithShapes(transformer) if quantized_layers(transformer) else transformer, lora_state_dict)

    setattr(cls, name, classmethod(expand))
