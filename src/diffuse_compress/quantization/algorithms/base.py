"""What an algorithm is: a frozen config that selects it, and a function that quantizes one weight.

A config class names itself in JSON by ``kind``. Registering is one line above the function::

    @register
    def quantize(weight, scheme, config: RTNConfig, generator=None) -> QuantizedWeight: ...
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from diffuse_compress.errors import ConfigError, nearest
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import WeightScheme

__all__ = [
    "AlgorithmConfig",
    "algorithm_from_dict",
    "algorithm_to_dict",
    "quantize_with",
    "register",
]


@dataclass(frozen=True)
class AlgorithmConfig:
    """Base of the configs. A subclass is a frozen dataclass of JSON values that sets ``kind``.

    The class selects the algorithm; ``kind`` is its name in files and never changes. ``is_random`` says whether the
    result depends on the seed.
    """

    kind: ClassVar[str]
    is_random: ClassVar[bool] = False

    @property
    def summary(self) -> str:
        """The algorithm in a few words, for the first line of plans and reports."""
        return self.kind

    def check(self, scheme: WeightScheme) -> None:
        """Raise ConfigError if this algorithm cannot reach ``scheme``; asked before any weight is touched."""


WeightQuantizer = Callable[[torch.Tensor, WeightScheme, Any, torch.Generator | None], QuantizedWeight]
_Quantizer = TypeVar("_Quantizer", bound=WeightQuantizer)

# Modules that register an algorithm when they are imported: listing the kinds imports nothing.
_MODULES: dict[str, str] = {
    "hqq": "diffuse_compress.quantization.algorithms.hqq",
    "rtn": "diffuse_compress.quantization.algorithms.rtn",
}
_REGISTRY: dict[type[AlgorithmConfig], WeightQuantizer] = {}


def register(quantizer: _Quantizer) -> _Quantizer:
    """Register ``quantizer(weight, scheme, config, generator)`` for the class its ``config`` is annotated with.

    Raises ConfigError if that class, or another class of the same ``kind``, has a quantizer already.
    """
    config_type = typing.get_type_hints(quantizer).get("config")
    if not (isinstance(config_type, type) and issubclass(config_type, AlgorithmConfig)):
        raise ConfigError(f"register: annotate config of {quantizer.__qualname__} with an AlgorithmConfig class.")
    for other in _REGISTRY:
        if other is config_type or other.kind == config_type.kind:
            raise ConfigError(
                f"register: {config_type.__name__} (kind {config_type.kind!r}) collides with "
                f"{other.__module__}.{other.__name__}, registered before. Give each algorithm its own class and kind."
            )
    _REGISTRY[config_type] = quantizer
    return quantizer


def quantize_with(
    config: AlgorithmConfig, weight: torch.Tensor, scheme: WeightScheme, generator: torch.Generator | None = None
) -> QuantizedWeight:
    """Quantize a weight [N, K] with the algorithm that ``config`` selects.

    Args:
        config: of a registered class.
        weight: [N, K] floating point, any device, not modified.
        scheme: the format to reach.
        generator: source of random numbers of algorithms that draw some; the global one is never used.

    Raises:
        ConfigError: no algorithm is registered for the class, or it cannot reach ``scheme``.
    """
    if type(config) not in _REGISTRY:
        raise ConfigError(f"algorithm: no quantizer for {type(config).__name__}. Available: {', '.join(_kinds())}")
    return _REGISTRY[type(config)](weight, scheme, config, generator)


def algorithm_to_dict(config: AlgorithmConfig) -> dict[str, Any]:
    """JSON-able description, ``{"kind": ..., field: value, ...}``; inverse of :func:`algorithm_from_dict`."""
    return {"kind": config.kind, **dataclasses.asdict(config)}


def algorithm_from_dict(data: Mapping[str, Any]) -> AlgorithmConfig:
    """Config of :func:`algorithm_to_dict`'s output; fields left out take their defaults.

    Raises ConfigError on an unknown kind or field, listing those that exist.
    """
    values = dict(data)
    kind = values.pop("kind", None)
    if kind in _MODULES:
        importlib.import_module(_MODULES[kind])
    config_type = next((cls for cls in _REGISTRY if cls.kind == kind), None)
    if config_type is None:
        raise ConfigError(f"algorithm: unknown kind {kind!r}; {nearest(str(kind), _kinds())}")
    names = {field.name for field in dataclasses.fields(config_type)}
    for name in values:
        if name not in names:
            raise ConfigError(f"{config_type.__name__}: unknown field {name!r}; {nearest(name, names)}")
    return config_type(**values)


def _kinds() -> list[str]:
    return sorted(set(_MODULES) | {cls.kind for cls in _REGISTRY})
