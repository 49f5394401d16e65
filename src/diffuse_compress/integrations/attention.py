"""Attention modules of diffusers, and of transformers, whose products run on low-bit codes.

What computes attention is a module's processor, which diffusers lets users replace; each class has its own way to the
product. A quantized processor is a stock one in whose call ``scaled_dot_product_attention`` is ours: projections,
norms, rotary embeddings and masks stay the class's own code. It has a class of its own, so that nothing that composes
blocks of known processors takes it for the stock one.

Without a compressed model the fused formats are backends: of diffusers for ``set_attention_backend``, of transformers
for ``set_attn_implementation``, named after the format. Both run the library's own code around torch's product, so
masks, layouts and shared heads are what they are there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.quantization.attention import AttentionFormat, attention_format, quantized_attention
from diffuse_compress.quantization.fused_attention import fused_attention

__all__ = ["register_diffusers_backends", "register_transformers_backends", "require_attention", "set_attention"]

BACKEND_PREFIX = "diffuse_compress_"

_PRODUCTS = {"scaled_dot_product_attention", "dispatch_attention_fn"}


def set_attention(model: nn.Module, form: str | None) -> None:
    """Let the attention modules of a model of diffusers compute their products in this format; idempotent.

    Args:
        model: compressed or not. Unlike ``set_attention_backend`` this reaches processors without a backend, which
            PixArt and UNets have; ``QuantizationConfig(attention=...)`` is saved with a model, and this is not.
        form: "int8_qk", "fp8_pv" or "int8" (an :class:`AttentionFormat`); None goes back to what the class does.

    Raises:
        ConfigError: another format, or :func:`require_attention`.
    """
    form = attention_format(form)
    if form is not None:
        require_attention(model)
    for module in _attentions(model):
        processor: Any = module.processor
        stock = getattr(type(processor), "_diffuse_compress_stock", None)
        kind: Any = type(processor)
        if getattr(kind, "_diffuse_compress_attention", None) is form:
            continue
        changed: Any = copy.copy(processor)
        changed.__class__ = (stock or kind) if form is None else _quantized_class(stock or kind, form)
        module.processor = changed


def require_attention(model: nn.Module) -> None:
    """Raise ConfigError unless every attention module of ``model`` has a processor that can be quantized."""
    found = False
    for module in _attentions(model):
        found = True
        kind: Any = type(module.processor)
        stock = getattr(kind, "_diffuse_compress_stock", kind)
        code = getattr(stock.__call__, "__code__", None)
        if isinstance(module.processor, nn.Module) or code is None or not _PRODUCTS & set(code.co_names):
            raise ConfigError(
                f"{type(model).__name__}: attention= needs processors that call scaled_dot_product_attention, "
                f"got {stock.__name__}. Call set_default_attn_processor(), or leave attention= out."
            )
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: attention= is for denoisers of diffusers with attention processors, and this "
            "model has none. Leave it out; a language model takes "
            f'set_attn_implementation("{BACKEND_PREFIX}{AttentionFormat.INT8_QK.value}").'
        )


def _attentions(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if getattr(module, "processor", None) is not None and hasattr(module, "set_processor"):
            yield module


class _LowBitProducts(TorchFunctionMode):
    """Inside, scaled_dot_product_attention computes in a format; counts its calls."""

    def __init__(self, form: AttentionFormat) -> None:
        super().__init__()
        self.form = form
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        if self.form is AttentionFormat.INT8:
            return quantized_attention(*args, **(kwargs or {}))
        return fused_attention(*args, **(kwargs or {}), form=self.form)


@functools.cache
def _quantized_class(stock: Any, form: AttentionFormat) -> Any:
    """``stock`` with low-bit products; of the same signature, by which attention modules tell what to pass on."""

    @functools.wraps(stock.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = _LowBitProducts(form)
        with mode:
            output = stock.__call__(self, *args, **kwargs)
        if not mode.calls:
            raise ModelStateError(
                f"{stock.__name__}: its attention is to run on low-bit codes, and another backend than torch's "
                'scaled_dot_product_attention computed it. Call set_attention_backend("native").'
            )
        return output

    members = {"__call__": call, "_diffuse_compress_stock": stock, "_diffuse_compress_attention": form}
    return type(f"Quantized{stock.__name__}", (stock,), members)


def _fused_formats() -> Iterator[tuple[str, AttentionFormat]]:
    for form in (AttentionFormat.INT8_QK, AttentionFormat.FP8_PV):
        yield BACKEND_PREFIX + form.value, form


def _inside(function: Any, form: AttentionFormat) -> Any:
    """``function``, of the same signature, with products in ``form``."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _LowBitProducts(form):
            return function(*args, **kwargs)

    return call


def register_diffusers_backends() -> None:
    """Let ``set_attention_backend`` and ``attention_backend`` of diffusers know the fused formats. Idempotent.

    Its names are a closed enumeration, which gets a member for each.
    """
    from diffusers.models import attention_dispatch as dispatch

    names: Any = dispatch.AttentionBackendName
    for name, form in _fused_formats():
        if name in names._value2member_map_:
            continue
        member: Any = str.__new__(names, name)
        member._name_, member._value_ = name.upper(), name
        names._member_names_.append(member._name_)
        names._member_map_[member._name_] = names._value2member_map_[name] = member
        registry = dispatch._AttentionBackendRegistry
        constraints = [dispatch._check_device, dispatch._check_shape]
        registry.register(member, constraints=constraints)(_inside(dispatch._native_attention, form))


def register_transformers_backends() -> None:
    """Let ``attn_implementation=`` of transformers know the fused formats, with the masks of "sdpa". Idempotent."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name, form in _fused_formats():
        if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
            ALL_ATTENTION_FUNCTIONS.register(name, _inside(sdpa_attention_forward, form))
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
