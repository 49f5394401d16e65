"""A recipe: which methods for which components, as a value that saves, loads and applies to another model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from diffuse_compress.caching.config import CACHE_KIND, CACHE_PRESETS, CacheConfig, cache_config_from_dict
from diffuse_compress.errors import CheckpointError, ConfigError, DiffuseCompressError
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.method_presets import METHOD_PRESETS
from diffuse_compress.quantization.kv_config import KV_KIND, KVCacheConfig, kv_config_from_dict
from diffuse_compress.quantization.presets import resolve_preset
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.temporal.config import TEMPORAL_KIND, TFMQConfig

__all__ = ["MethodConfig", "Recipe", "as_recipe", "weights_among"]

MethodConfig: TypeAlias = QuantizationConfig | TFMQConfig | CacheConfig | KVCacheConfig
"""Configuration of one method; each kind (weights, temporal, cache, kv_cache, ...) at most once a component."""
DEFAULT_GROUP = "denoisers"
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Ordered method configurations per component.

    Attributes:
        components: {component name or group: configs}; an empty tuple leaves the component alone on purpose.
    """

    components: Mapping[str, tuple[MethodConfig, ...]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; inverse of :meth:`from_dict`."""
        return {
            "schema_version": _SCHEMA_VERSION,
            "components": {
                name: [{"kind": config.kind, **config.to_dict()} for config in configs]
                for name, configs in self.components.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Read :meth:`to_dict`'s output. Raises CheckpointError for another form, a newer schema or an unknown kind."""
        version = data.get("schema_version")
        if not isinstance(version, int) or version > _SCHEMA_VERSION:
            raise CheckpointError(
                f"Recipe: schema_version must be an integer up to {_SCHEMA_VERSION}, got {version!r}. "
                "pip install -U diffuse-compress."
            )
        components = data.get("components")
        if not isinstance(components, Mapping) or not all(
            isinstance(configs, list) and all(isinstance(config, Mapping) for config in configs)
            for configs in components.values()
        ):
            raise CheckpointError("Recipe: components must be {component: [configuration, ...]}.")
        return cls({name: tuple(map(_config, configs)) for name, configs in components.items()})

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a file written by :meth:`save`. Raises CheckpointError if it is not one."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable recipe ({error}).") from error
        if not isinstance(data, dict) or "components" not in data:
            raise CheckpointError(f"{path}: not a recipe: it needs the keys schema_version and components.")
        try:
            return cls.from_dict(data)
        except DiffuseCompressError as error:
            raise CheckpointError(f"{path}: {error}") from error


def weights_among(configs: Iterable[MethodConfig]) -> list[QuantizationConfig]:
    """Those of the kind "weights"."""
    return [config for config in configs if isinstance(config, QuantizationConfig)]


def as_recipe(
    *methods: Any,
    default_group: str = DEFAULT_GROUP,
    is_calibrated: Callable[[str], bool] = lambda key: False,
    **options: Any,
) -> Recipe:
    """What ``compress`` was given, as a Recipe.

    Args:
        methods: presets, configs, or one Recipe or dict ``{component or group: preset | config | list | None}``.
        default_group: components that bare presets and configs are for.
        is_calibrated: whether there is calibration data for a component or group: presets then mean their calibrated
            algorithm.
        options: QuantizationConfig arguments given beside a preset (``modules_to_not_convert=``, ``overrides=``,
            ``algorithm=``, ``seed=``); None means not given.

    Raises:
        ConfigError: nothing given, mixed forms, unknown names, or options beside a ready config or a method that has
            no use for them.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if len(methods) == 1 and isinstance(methods[0], Recipe):
        if given:
            raise ConfigError(f"A Recipe is complete: put {', '.join(sorted(given))} into its configs.")
        return methods[0]
    if len(methods) == 1 and isinstance(methods[0], Mapping):
        if not methods[0]:
            raise ConfigError("compress needs at least one component, got an empty dict.")
        components = {name: _configs(value, given, is_calibrated(name)) for name, value in methods[0].items()}
        if not any(components.values()):
            raise ConfigError(
                f"compress: every component given ({', '.join(components)}) is None. Name at least one to compress: "
                '{"transformer": "w8a8"}.'
            )
    else:
        calibrated = is_calibrated(default_group)
        configs = tuple(config for method in methods for config in _configs(method, given, calibrated))
        if not configs:
            raise ConfigError("compress needs a preset, a configuration, a dict or a Recipe, got nothing.")
        components = {default_group: configs}
    if given and not any(weights_among(configs) for configs in components.values()):
        raise ConfigError(f"{', '.join(sorted(given))}: for quantized weights, and nothing asks for them here.")
    return Recipe(components)


def _configs(value: Any, options: Mapping[str, Any], calibrated: bool) -> tuple[MethodConfig, ...]:
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(config for item in value for config in _configs(item, options, calibrated))
    if isinstance(value, str) and value in CACHE_PRESETS:
        return (CACHE_PRESETS[value],)
    if isinstance(value, str) and value in METHOD_PRESETS:
        return METHOD_PRESETS[value].configs(options)
    if isinstance(value, TFMQConfig | CacheConfig | KVCacheConfig):
        return (value,)
    if isinstance(value, str) and calibrated:
        return (QuantizationConfig(value, **{"algorithm": resolve_preset(value).calibrated, **options}),)
    if isinstance(value, str | Scheme):
        return (QuantizationConfig(value, **options),)
    if isinstance(value, QuantizationConfig):
        if options:
            raise ConfigError(f"A QuantizationConfig is complete: give {', '.join(sorted(options))} to it instead.")
        return (value.with_calibration() if calibrated else value,)
    if isinstance(value, Recipe):
        if len(value.components) != 1:
            raise ConfigError(
                f"The Recipe is for {', '.join(value.components)}: it cannot stand for one component. Pass it alone, "
                "compress(recipe), or pick one entry: recipe.components[name]."
            )
        return next(iter(value.components.values()))
    raise ConfigError(
        f"A method is a preset name, a Scheme, a configuration or a list of them, got {type(value).__name__}."
    )


def _config(data: Mapping[str, Any]) -> MethodConfig:
    readers: dict[str, Callable[[Mapping[str, Any]], MethodConfig]] = {
        "weights": QuantizationConfig.from_dict,
        TEMPORAL_KIND: TFMQConfig.from_dict,
        CACHE_KIND: cache_config_from_dict,
        KV_KIND: kv_config_from_dict,
    }
    kind = data.get("kind")
    if kind not in readers:
        raise CheckpointError(f"Recipe: unknown method kind {kind!r}; pip install -U diffuse-compress.")
    return readers[kind]({key: value for key, value in data.items() if key != "kind"})
