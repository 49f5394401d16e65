"""diffusers' own caches (``CacheMixin``): none of ours can run beside one; their methods take our arguments, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.compat import usable
from diffuse_compress.integrations.wrapping import is_wrapped, wrapping

__all__ = ["disable_stock_cache", "enable_stock_cache", "has_stock_cache", "wrap_cache_mixin"]

_NAMES = ("enable_cache", "disable_cache")


def _mixin() -> Any:
    if not usable("diffusers"):
        return None
    try:
        from diffusers import CacheMixin
    except ImportError:
        return None
    return CacheMixin


def wrap_cache_mixin(methods: dict[str, Callable[..., Any]]) -> None:
    """Let ``CacheMixin.enable_cache`` and ``disable_cache`` be ours, which call the stock ones for stock caches."""
    mixin = _mixin()
    for name in _NAMES if mixin is not None else ():
        stock = mixin.__dict__.get(name)
        if stock is not None and not is_wrapped(stock):
            setattr(mixin, name, _around(stock, methods[name]))


def _around(stock: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @wrapping(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    return method


def has_stock_cache(model: Any) -> bool:
    """Whether a cache of diffusers is on."""
    mixin = _mixin()
    return mixin is not None and isinstance(model, mixin) and bool(model.is_cache_enabled)


def enable_stock_cache(model: Any, config: Any) -> None:
    """``CacheMixin.enable_cache``. Raises ConfigError for a class without it."""
    _stock("enable_cache", model, config)(model, config)


def disable_stock_cache(model: Any) -> None:
    """``CacheMixin.disable_cache``."""
    _stock("disable_cache", model, None)(model)


def _stock(name: str, model: Any, config: Any) -> Callable[..., Any]:
    mixin = _mixin()
    if mixin is None or not isinstance(model, mixin):
        raise ConfigError(
            f"{type(model).__name__} takes no cache configuration of diffusers, got {type(config).__name__}. Pass a "
            'schedule, FeatureCacheConfig(...) or "cache".'
        )
    method = mixin.__dict__[name]
    stock: Callable[..., Any] = getattr(method, "__wrapped__", method)
    return stock
