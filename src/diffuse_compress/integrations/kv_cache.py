"""Models whose ``generate`` keeps keys and values in a cache of ours, by a mark on the model."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.compat import NO_PATCH_VARIABLE, may_patch, require
from diffuse_compress.integrations.wrapping import is_wrapped, wrapping
from diffuse_compress.quantization.kv_cache import KIVIConfig
from diffuse_compress.quantization.kv_config import KVCacheConfig, ShadowKVConfig, SinkKVConfig

__all__ = ["CACHES", "attach_kv_cache", "cache_class", "detach_kv_cache", "kv_cache_extent", "kv_config_of"]

CACHES: dict[str, tuple[type[KVCacheConfig], str]] = {
    "QuantizedKVCache": (KIVIConfig, "kv_layers"),
    "SinkKVCache": (SinkKVConfig, "kv_sink"),
    "ShadowKVCache": (ShadowKVConfig, "kv_shadow"),
}
"""{class of the cache: (class of its configuration, module)}."""

_MARK = "_diffuse_compress_kv_cache"
_PREPARE = "_prepare_cache_for_generation"
_NAMES = ("cache", "past_key_values")  # of the argument, since transformers 5.24 and before


def cache_class(name: str) -> Any:
    """The class of ``CACHES``, a subclass of transformers' cache. MissingDependencyError where that is not there."""
    require("transformers", name)
    return getattr(import_module(f"diffuse_compress.integrations.{CACHES[name][1]}"), name)


def _cache_name(config: KVCacheConfig) -> str:
    return next(name for name, (kind, _) in CACHES.items() if type(config) is kind)


def kv_config_of(model: nn.Module) -> KVCacheConfig | None:
    """How the model's ``generate`` keeps keys and values, or None."""
    return model.__dict__.get(_MARK)


def kv_cache_extent(where: str, model: nn.Module, config: KVCacheConfig) -> str:
    """Which layers of ``model`` would be kept so, in words.

    Raises:
        ConfigError: the model does not generate with a cache of past tokens, the cache does not fit it, or the classes
            are to be left alone.
    """
    settings = getattr(model, "config", None)
    supported = getattr(model, "_supports_default_dynamic_cache", None)
    if supported is None or not hasattr(model, _PREPARE) or not supported() or settings is None:
        raise ConfigError(
            f"{where}: {type(config).__name__} needs a model of transformers that generates tokens with a cache, got a "
            f"{type(model).__name__}."
        )
    if getattr(settings, "is_encoder_decoder", False):
        raise ConfigError(f"{where}: {type(config).__name__} is for decoder-only models, got a {type(model).__name__}.")
    if not may_patch():
        raise ConfigError(
            f"{where}: {NO_PATCH_VARIABLE} is set, so generate() cannot be told which cache to make. Pass one: "
            f"generate(..., past_key_values={_cache_name(config)}(model.config, {type(config).__name__}()))."
        )
    cache = cache_class(_cache_name(config))(settings, config)
    size = getattr(cache, "head_dim", None)
    bits = ""
    if isinstance(config, KIVIConfig) and size is not None:
        bits = f", {config.bits_per_element(size):.2f} bits an element"
    return f"{len(cache.kept_layers)} of {len(cache.layers)} layers{bits}"


def attach_kv_cache(model: nn.Module, config: KVCacheConfig) -> None:
    """From now on ``generate`` makes a cache of ``config`` where it would make a DynamicCache.

    A cache that the user passes, or another ``cache_implementation``, is used as ever. A model without ``generate``
    (the body of one) only carries the configuration.
    """
    owner = next((cls for cls in type(model).__mro__ if _PREPARE in cls.__dict__), None)
    if owner is not None:
        _wrap_preparation(owner)
    object.__setattr__(model, _MARK, config)


def detach_kv_cache(model: nn.Module) -> None:
    """Undo :func:`attach_kv_cache`."""
    model.__dict__.pop(_MARK, None)


def _wrap_preparation(cls: type) -> None:
    """Wrap it once; models without the mark pass through."""
    stock = cls.__dict__[_PREPARE]
    if is_wrapped(stock):
        return

    @wrapping(stock)
    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = {name for name in _NAMES if model_kwargs.get(name) is not None}
        result = stock(self, generation_config, model_kwargs, *args, **kwargs)
        config = kv_config_of(self)
        if config is not None:
            for name in set(_NAMES) - given:
                _replace(self.config, config, generation_config, model_kwargs, name)
        return result

    setattr(cls, _PREPARE, prepare)


def _replace(
    settings: Any, config: KVCacheConfig, generation_config: Any, model_kwargs: dict[str, Any], name: str
) -> None:
    from transformers import DynamicCache

    stock: Any = model_kwargs.get(name)
    if type(stock) is not DynamicCache:
        return
    cache = cache_class(_cache_name(config))(settings, config, offloading=stock.offloading)
    if getattr(generation_config, "is_assistant", False):
        cache.activate_past_recording()
    model_kwargs[name] = cache
