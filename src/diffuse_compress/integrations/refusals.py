"""What would undo a compression behind the user's back, stopped on compressed models before it touches a weight.

And what may not fit a compressed model, which cannot be told: a warning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.integrations.compat import may_patch
from diffuse_compress.integrations.component import get_state, quantized_layers
from diffuse_compress.integrations.methods import live_methods
from diffuse_compress.integrations.peft import warn_of_folding
from diffuse_compress.integrations.wrapping import is_wrapped, wrapping
from diffuse_compress.quantization.layers import QuantizedLinear

__all__ = ["guard", "require_none_carried", "wrap_fusing", "wrap_ip_adapters", "wrap_layerwise_casting"]


def guard(cls: type, name: str, check: Callable[[Any], None]) -> None:
    """Call ``check(model)`` before the method ``name`` that ``cls`` itself defines. Idempotent."""
    stock = cls.__dict__.get(name)
    if stock is None or is_wrapped(stock):
        return

    @wrapping(stock)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        check(self)
        return stock(self, *args, **kwargs)

    setattr(cls, name, guarded)


def wrap_layerwise_casting(cls: type) -> None:
    """Let no compressed model be cast to a storage dtype layer by layer."""
    guard(cls, "enable_layerwise_casting", _refuse_layerwise_casting)


def wrap_fusing(model: nn.Module) -> None:
    """Let the class of ``model`` fuse no packed projections: the fused layer would be a dense copy of them."""
    for cls in type(model).__mro__ if may_patch() else ():
        guard(cls, "fuse_qkv_projections", _refuse_fusing)


def wrap_ip_adapters(model: nn.Module) -> None:
    """Let the class of ``model`` warn of an IP-Adapter that reads values which a folded scale has changed."""
    for cls in type(model).__mro__ if may_patch() else ():
        guard(cls, "_load_ip_adapter_weights", _warn_of_folding)


def _warn_of_folding(model: Any) -> None:
    if any(layer.folded for layer in quantized_layers(model).values()):
        warn_of_folding("IP-Adapter")


def _refuse_layerwise_casting(model: Any) -> None:
    state = get_state(model)
    if state is not None:
        raise ModelStateError(
            f"{type(model).__name__}.enable_layerwise_casting: needs a dense model, found {state.config!r}. Packed "
            "weights are small already, and what stayed dense would be rounded to the storage dtype. Leave it out."
        )


def _refuse_fusing(model: Any) -> None:
    for name, module in model.named_modules():
        if not hasattr(module, "fuse_projections"):
            continue
        packed = [key for key, child in module.named_children() if isinstance(child, QuantizedLinear)]
        if packed:
            raise ModelStateError(
                f"{type(model).__name__}.fuse_qkv_projections: needs dense projections, found {name}.{packed[0]} in "
                f"{module.get_submodule(packed[0]).scheme.name}. The fused layer would be a dense copy beside the "
                "packed ones. Leave it out, or keep the attention dense with modules_to_not_convert=."
            )


def require_none_carried(asked: str, model: nn.Module) -> None:
    """Raise ConfigError if ``model`` carries what a format of others, ``asked`` for, has no place for."""
    state = get_state(model)
    carried = [method.title for method in live_methods(model).values()]
    if state is not None and state.config.spec.attention is not None:
        carried.append("quantized attention")
    if carried:
        raise ConfigError(
            f"{asked} has no place for what the model carries beside its weights, found {', '.join(carried)}. Nothing "
            "was written. Take it off first, or leave format= out."
        )
