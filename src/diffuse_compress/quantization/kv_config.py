"""What ``generate`` keeps of past keys and values: base of the configurations, and those of SinkKV and ShadowKV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from diffuse_compress.errors import ConfigError, nearest

__all__ = ["KV_KIND", "KVCacheConfig", "ShadowKVConfig", "SinkKVConfig", "kv_config_from_dict"]

KV_KIND = "kv_cache"
_CACHE = "cache"
_CLASSES: dict[str, type[KVCacheConfig]] = {}
_DEFAULT = "quantized"
"""Of configurations that were written when there was one class of them."""


@dataclass(frozen=True)
class KVCacheConfig:
    """Base. A subclass is a frozen dataclass of JSON values that names itself in files by ``cache``."""

    kind: ClassVar[str] = KV_KIND
    cache: ClassVar[str]

    def __init_subclass__(cls) -> None:
        _CLASSES[cls.cache] = cls

    @property
    def summary(self) -> str:
        """One line."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; inverse of :func:`kv_config_from_dict`."""
        values = {name: getattr(value, "value", value) for name, value in asdict(self).items()}
        return values if self.cache == _DEFAULT else {_CACHE: self.cache, **values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Any:
        """One of this class, without ``cache``. Raises ConfigError for unknown keys or values."""
        known = [field.name for field in fields(cls)]
        unknown = next((name for name in data if name not in known), None)
        if unknown is not None:
            raise ConfigError(f"{cls.__name__}: unknown key {unknown!r}; {nearest(unknown, known)}.")
        return cls(**data)

    def _require_whole(self, **least: int) -> None:
        """Raise ConfigError unless these fields are whole numbers, and as large as that."""
        for name, smallest in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < smallest:
                raise ConfigError(
                    f"{type(self).__name__}: {name} must be a whole number, {smallest} or more, got {value!r}."
                )


def kv_config_from_dict(data: Mapping[str, Any]) -> KVCacheConfig:
    """Read ``to_dict``'s output. Raises ConfigError for an unknown class, key or value."""
    name = data.get(_CACHE, _DEFAULT)
    if name not in _CLASSES:
        raise ConfigError(f"KV cache: no {name!r}; {nearest(str(name), list(_CLASSES))}.")
    found: KVCacheConfig = _CLASSES[name].from_dict({key: value for key, value in data.items() if key != _CACHE})
    return found


@dataclass(frozen=True)
class SinkKVConfig(KVCacheConfig):
    """Keep the first tokens of a sequence and the newest; forget what is in between. For models with rotary embeddings.

    Memory and time of a step are bounded however long the text gets, and so is the distance that attention sees: keys
    take the positions that they have in the cache. What is forgotten is lost to the model.

    Args:
        num_sink_tokens: first tokens that stay, on which much attention rests whatever they say.
        window_length: newest tokens that a token sees, itself among them, beside those.

    Raises:
        ConfigError: another value.

    Source: Xiao et al. 2023, arXiv 2309.17453 (StreamingLLM).
    """

    num_sink_tokens: int = 4
    window_length: int = 1020

    cache: ClassVar[str] = "sink"

    def __post_init__(self) -> None:
        self._require_whole(num_sink_tokens=0, window_length=1)

    @property
    def summary(self) -> str:
        """One line."""
        return f"SinkKV ({self.num_sink_tokens} first and {self.window_length} newest tokens kept, others forgotten)"


@dataclass(frozen=True)
class ShadowKVConfig(KVCacheConfig):
    """Keep keys before rotation as a product of low rank and values on the CPU; fetch the chunks that a token asks for.

    Args:
        rank: of the keys of all heads together, before rotary embedding.
        chunk_size: tokens that are chosen together.
        sparse_budget: tokens fetched for each new one, a multiple of ``chunk_size``.
        num_outlier_chunks: chunks whose keys differ most from their mean, which stay as they are, on the device.
        num_local_chunks: newest chunks that stay as they are, at least.
        segment_length: tokens that are written before they are taken to the others; a prompt is at once.

    Raises:
        ConfigError: another value.

    Source: Sun et al. 2024, arXiv 2410.21465.
    """

    rank: int = 160
    chunk_size: int = 8
    sparse_budget: int = 2048
    num_outlier_chunks: int = 48
    num_local_chunks: int = 4
    segment_length: int = 1024

    cache: ClassVar[str] = "shadow"

    def __post_init__(self) -> None:
        self._require_whole(rank=1, chunk_size=1, sparse_budget=0, num_outlier_chunks=0, num_local_chunks=1)
        self._require_whole(segment_length=self.chunk_size)
        for name in ("sparse_budget", "segment_length"):
            if getattr(self, name) % self.chunk_size:
                raise ConfigError(
                    f"ShadowKVConfig: {name} must be whole chunks of {self.chunk_size}, got {getattr(self, name)}."
                )

    @property
    def residual_length(self) -> int:
        """Newest tokens that stay as they are, at least."""
        return self.num_local_chunks * self.chunk_size

    @property
    def summary(self) -> str:
        """One line."""
        return (
            f"ShadowKV (keys of rank {self.rank}, values on the CPU, {self.sparse_budget} tokens fetched in chunks of "
            f"{self.chunk_size}, {self.num_outlier_chunks} outlier and {self.num_local_chunks} newest chunks kept)"
        )
