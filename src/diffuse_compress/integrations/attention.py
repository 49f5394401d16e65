"""Attention modules of diffusers whose products run on int8 codes.

What computes attention is a module's processor, which diffusers lets users replace; each class has its own way to the
product. A quantized processor is a stock one in whose call ``scaled_dot_product_attention`` is ours: projections,
norms, rotary embeddings and masks stay the class's own code. It has a class of its own, so that nothing that composes
blocks of known processors takes it for the stock one.
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
from diffuse_compress.quantization.attention import quantized_attention
from diffuse_compress.quantization.scheme import NumberFormat

__all__ = ["require_attention", "set_attention"]

_PRODUCTS = {"scaled_dot_product_attention", "dispatch_attention_fn"}


def set_attention(model: nn.Module, form: NumberFormat | None) -> None:
    """Let the attention modules of a model compute their products in this format, or as their class does; idempotent.

    Raises:
        ConfigError: :func:`require_attention`.
    """
    if form is not None:
        require_attention(model)
    for module in _attentions(model):
        processor: Any = module.processor
        stock = getattr(type(processor), "_diffuse_compress_stock", None)
        if (form is None) == (stock is None):
            continue
        kind: Any = type(processor)
        changed: Any = copy.copy(processor)
        changed.__class__ = _quantized_class(kind) if stock is None else stock
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
                f'{type(model).__name__}: attention="int8" needs processors that call scaled_dot_product_attention, '
                f"got {stock.__name__}. Call set_default_attn_processor(), or leave attention= out."
            )
    if not found:
        raise ConfigError(
            f'{type(model).__name__}: attention="int8" is for denoisers of diffusers with attention processors, and '
            "this model has none. Leave attention= out."
        )


def _attentions(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if getattr(module, "processor", None) is not None and hasattr(module, "set_processor"):
            yield module


class _Int8Products(TorchFunctionMode):
    """Inside, scaled_dot_product_attention is :func:`quantized_attention`; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return quantized_attention(*args, **(kwargs or {}))


@functools.cache
def _quantized_class(stock: Any) -> Any:
    """``stock`` with int8 products; of the same signature, by which attention modules tell what to pass on."""

    @functools.wraps(stock.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = _Int8Products()
        with mode:
            output = stock.__call__(self, *args, **kwargs)
        if not mode.calls:
            raise ModelStateError(
                f"{stock.__name__}: its attention is to run on int8 codes, and another backend than torch's "
                'scaled_dot_product_attention computed it. Call set_attention_backend("native").'
            )
        return output

    return type(f"Quantized{stock.__name__}", (stock,), {"__call__": call, "_diffuse_compress_stock": stock})
