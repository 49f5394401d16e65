"""Casts of compressed components: to their own dtype a no-op, by ``from_pipe`` none at all, to another one as asked."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import nn

from diffuse_compress.components import unwrap
from diffuse_compress.integrations.component import get_state
from diffuse_compress.integrations.wrapping import is_wrapped, wrapping

__all__ = ["wrap_from_pipe", "wrap_half_and_float"]

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


def wrap_half_and_float(cls: type) -> None:
    """``half`` and ``float`` of compressed models do what ``to`` does.

    transformers refuses the two for every quantized model. Ours casts right: codes and scales stay as they are.
    """
    for name in ("half", "float"):
        stock = cls.__dict__.get(name)
        if stock is not None and not is_wrapped(stock):
            setattr(cls, name, _unguarded(stock, getattr(nn.Module, name)))


def _unguarded(stock: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    @wrapping(stock)
    def cast(self: Any, *args: Any) -> Any:
        return stock(self, *args) if get_state(self) is None else plain(self, *args)

    return cast
