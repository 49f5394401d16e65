"""Casts of compressed components: to their own dtype a no-op, by ``from_pipe`` none at all, to another one as asked."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from diffuse_compress.components import unwrap
from diffuse_compress.integrations.component import get_state
from diffuse_compress.integrations.wrapping import is_wrapped, wrapping

__all__ = ["wrap_casts", "wrap_from_pipe"]

_keep_dtypes: ContextVar[bool] = ContextVar("diffuse_compress_keep_dtypes", default=False)


def wrap_from_pipe(cls: type) -> None:
    """``from_pipe`` without a dtype shares compressed components as they are.

    diffusers casts to float32 then, and as the components are shared, the first pipeline's along with them. Once one
    of them is compressed, the dense ones keep their dtype too: all of a pipeline's parts must fit together.
    """
    if "from_pipe" not in cls.__dict__ or is_wrapped(cls.__dict__["from_pipe"].__func__):
        return
    stock_from_pipe, stock_to = cls.__dict__["from_pipe"].__func__, cls.__dict__["to"]

    @wrapping(stock_from_pipe)
    def from_pipe(cls: type, pipeline: Any, **kwargs: Any) -> Any:
        parts = [*getattr(pipeline, "components", {}).values(), *kwargs.values()]
        given = kwargs.get("dtype") is not None or kwargs.get("torch_dtype") is not None
        if given or not any(get_state(unwrap(part)) is not None for part in parts):
            return stock_from_pipe(cls, pipeline, **kwargs)
        token = _keep_dtypes.set(True)
        try:
            return stock_from_pipe(cls, pipeline, **kwargs)
        finally:
            _keep_dtypes.reset(token)

    @wrapping(stock_to)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _keep_dtypes.get():
            kwargs.pop("dtype", None)
        return stock_to(self, *args, **kwargs)

    cls.from_pipe = classmethod(from_pipe)  # type: ignore[attr-defined]
    cls.to = to  # type: ignore[attr-defined]


def wrap_casts(cls: type) -> None:
    """Casts of a compressed model to the dtype it computes in leave every tensor alone; others are ``nn.Module``'s.

    Stock casts would round what the class keeps in float32 (Wan's modulation tables) and buffers that no checkpoint
    holds (PixArt's position table). ``half`` and ``float`` are casts as well: transformers refuses them for every
    quantized model, and ours keep codes and scales as they are.
    """
    stock = cls.__dict__.get("to")
    if stock is None or is_wrapped(stock):
        return

    @wrapping(stock)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if get_state(self) is None:
            return stock(self, *args, **kwargs)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is None or not _is_in(self, dtype):
            return stock(self, *args, **kwargs)
        rest = {"device": device, "memory_format": memory_format}
        given = {name: value for name, value in rest.items() if value is not None}
        return stock(self, **given, non_blocking=non_blocking) if given else self

    cls.to = to  # type: ignore[attr-defined]
    for name, dtype in (("half", torch.float16), ("float", torch.float32), ("bfloat16", torch.bfloat16)):
        setattr(cls, name, _cast(getattr(cls, name), dtype))


def _cast(stock: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    @wrapping(stock)
    def cast(self: Any, *args: Any) -> Any:
        return stock(self, *args) if get_state(self) is None else self.to(dtype)

    return cast


def _is_in(model: nn.Module, dtype: torch.dtype) -> bool:
    """True if ``model`` is what a load in ``dtype`` gives: all of it in that dtype, but for what stays in float32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, module in model.named_modules():
        computes_in = getattr(module, "compute_dtype", None)
        if computes_in is not None:
            if computes_in != dtype:
                return False
            continue
        buffers = {leaf: b for leaf, b in module._buffers.items() if leaf not in module._non_persistent_buffers_set}
        for leaf, tensor in {**module._parameters, **buffers}.items():
            if tensor is None or not tensor.is_floating_point() or tensor.dtype == dtype:
                continue
            if tensor.dtype != torch.float32 or not any(part in f"{name}.{leaf}" for part in kept):
                return False
    return True
