"""What is asked of a component: formats, exceptions and algorithm, as one frozen, JSON-able value."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, algorithm_from_dict, algorithm_to_dict
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.attention import AttentionFormat, attention_format
from diffuse_compress.quantization.observers import ObserverConfig
from diffuse_compress.quantization.presets import resolve_preset
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["SCHEMA_VERSION", "QuantizationSpec", "resolve_scheme"]

SCHEMA_VERSION = 1
Rules = tuple[tuple[str, Scheme | None], ...]


def resolve_scheme(value: str | Scheme | Mapping[str, Any] | None) -> Scheme | None:
    """A preset's body scheme, a Scheme, or its dict form; None stays None (keep dense)."""
    if value is None or isinstance(value, Scheme):
        return value
    if isinstance(value, str):
        return resolve_preset(value).scheme
    if isinstance(value, Mapping):
        return Scheme.from_dict(dict(value))
    raise ConfigError(f"A scheme is a preset name, a Scheme or its dict, got {type(value).__name__}.")


@dataclass(frozen=True)
class QuantizationSpec:
    """Weights (and activations) of one component.

    Attributes:
        scheme: format of the layers inside blocks; None keeps every layer dense (:meth:`dense`).
        modulation_scheme: format of modulation and timestep projections.
        algorithm: how codes are chosen.
        preset: the preset's name if one was asked for; for people.
        modules_to_not_convert: patterns of layers that stay dense.
        overrides: (pattern, Scheme or None) pairs; the last match wins; a layer named here is converted whatever
            its role.
        rules: the resolved form: (pattern, Scheme) for every converted layer. When present, it alone decides, so
            that a checkpoint means the same under every later release.
        seed: seed of algorithms that draw random numbers.
        observer: chooses the ranges of static inputs.
        end_scheme: format of the first and last layers (embedders, ``conv_in``, ``conv_out``, ``proj_out``); None
            keeps them dense.
        split_skips: convolutions over hidden states and a skip connection become one for each (``split.py``).
        attention: what attention's two products are computed in; None leaves them.
    """

    scheme: Scheme | None
    modulation_scheme: Scheme | None
    algorithm: AlgorithmConfig = field(default_factory=RTNConfig)
    preset: str | None = None
    modules_to_not_convert: tuple[str, ...] = ()
    overrides: Rules = ()
    rules: Rules | None = None
    seed: int = 0
    observer: ObserverConfig = field(default_factory=ObserverConfig)
    end_scheme: Scheme | None = None
    split_skips: bool = False
    attention: AttentionFormat | None = None

    @classmethod
    def build(
        cls,
        scheme: str | Scheme | Mapping[str, Any],
        *,
        algorithm: AlgorithmConfig | None = None,
        modulation_scheme: str | Scheme | Mapping[str, Any] | None = None,
        modules_to_not_convert: str | Iterable[str] | None = None,
        overrides: Mapping[str, str | Scheme | None] | None = None,
        seed: int = 0,
        observer: ObserverConfig | str | Mapping[str, Any] | None = None,
        end_scheme: str | Scheme | Mapping[str, Any] | None = None,
        split_skips: bool = False,
        attention: str | None = None,
    ) -> QuantizationSpec:
        """Resolve a user's request.

        Raises:
            ConfigError: unknown names, presets that need calibration, or an observer that nothing would use.
        """
        keep = _patterns(modules_to_not_convert)
        _check_types(algorithm, overrides, seed)
        name = None
        if isinstance(scheme, str):
            preset = resolve_preset(scheme)
            name, body, modulation, default = preset.name, preset.scheme, preset.modulation_scheme, preset.algorithm
            if preset.needs_calibration and algorithm is None:
                raise ConfigError(
                    f"{preset.name}: {preset.needs_calibration}. Pass calibration= to compress, or name an algorithm. "
                    f'To accept plain rounding anyway, write it out: QuantizationConfig("{preset.name}", '
                    'algorithm=RTNConfig()), on the command line --algorithm rtn; or take "w4a8".'
                )
        else:
            resolved = resolve_scheme(scheme)
            if resolved is None:
                raise ConfigError("QuantizationConfig: scheme must be a preset name, a Scheme or its dict, got None.")
            body, modulation, default = resolved, resolved, RTNConfig()
        spec = cls(
            scheme=body,
            modulation_scheme=resolve_scheme(modulation_scheme) or modulation,
            algorithm=algorithm if algorithm is not None else default,
            preset=name,
            modules_to_not_convert=keep,
            overrides=tuple((pattern, resolve_scheme(value)) for pattern, value in (overrides or {}).items()),
            seed=seed,
            observer=ObserverConfig() if observer is None else ObserverConfig.of(observer),
            end_scheme=resolve_scheme(end_scheme),
            split_skips=_flag("split_skips", split_skips),
            attention=attention_format(attention),
        )
        if observer is not None and not spec.has_static_inputs:
            raise ConfigError(
                f"observer: chooses ranges of static inputs, and {body.name} has none. Leave it out, or take a "
                "Scheme with ActivationScheme(..., PerTensor(), dynamic=False)."
            )
        return spec

    @classmethod
    def dense(cls) -> QuantizationSpec:
        """Of a component whose weights are as they were, and which carries something else of ours."""
        return cls(scheme=None, modulation_scheme=None, rules=())

    @property
    def is_dense(self) -> bool:
        """No layer is quantized."""
        return self.scheme is None

    @property
    def scheme_name(self) -> str:
        """Of the format inside blocks."""
        return "dense" if self.scheme is None else self.scheme.name

    @property
    def label(self) -> str:
        """Name of the preset, else of the format."""
        return self.preset or self.scheme_name

    @property
    def has_static_inputs(self) -> bool:
        """Some layer may get a static input scale."""
        named = (self.scheme, self.modulation_scheme, self.end_scheme, *(scheme for _, scheme in self.overrides))
        decisive = named if self.rules is None else (scheme for _, scheme in self.rules)
        return any(scheme is not None and scheme.has_static_inputs for scheme in decisive)

    @property
    def needs_calibration(self) -> bool:
        """The algorithm, or a static scale, follows from inputs."""
        return self.algorithm.needs_calibration or self.has_static_inputs

    def generator(self, layer: str) -> torch.Generator:
        """A generator of its own for each layer, so that results depend on neither order nor global state."""
        digest = hashlib.blake2b(f"{self.seed}:{layer}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))

    def resolved(self, rules: Rules) -> QuantizationSpec:
        """This spec with the layers it came to on a model."""
        return replace(self, rules=rules)

    def differences(self, other: QuantizationSpec) -> list[str]:
        """What two requests differ in, as ``field: own value -> other's value``.

        Whether either was resolved on a model, the seed of an algorithm that draws no random numbers, and the observer
        where nothing is static make no difference.
        """
        names = ["algorithm", "scheme", "modulation_scheme", "modules_to_not_convert", "overrides"]
        names += ["end_scheme", "split_skips", "attention"]
        names += ["seed"] if self.algorithm.is_random or other.algorithm.is_random else []
        names += ["observer"] if self.has_static_inputs or other.has_static_inputs else []

        found = []
        for name in names:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine == theirs:
                continue
            if isinstance(mine, Scheme) and isinstance(theirs, Scheme) and mine.name != theirs.name:
                mine, theirs = mine.name, theirs.name
            found.append(f"{name}: {mine} -> {theirs}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; formats are written once under ``schemes`` and named elsewhere."""
        labels: dict[Scheme, str] = {}

        def label(scheme: Scheme | None) -> str | None:
            if scheme is None:
                return None
            if scheme not in labels:
                taken = sum(1 for other in labels if other.name == scheme.name)
                labels[scheme] = scheme.name if not taken else f"{scheme.name}-{taken + 1}"
            return labels[scheme]

        data: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "preset": self.preset,
            "scheme": label(self.scheme),
            "modulation_scheme": label(self.modulation_scheme),
            "algorithm": algorithm_to_dict(self.algorithm),
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "overrides": [[pattern, label(scheme)] for pattern, scheme in self.overrides],
            "rules": None if self.rules is None else [[pattern, label(scheme)] for pattern, scheme in self.rules],
            "seed": self.seed,
        }
        if self.has_static_inputs:
            data["observer"] = self.observer.to_dict()
        if self.end_scheme is not None:
            data["end_scheme"] = label(self.end_scheme)
        if self.split_skips:
            data["split_skips"] = True
        if self.attention is not None:
            data["attention"] = self.attention.value
        data["schemes"] = {name: scheme.to_dict() for scheme, name in labels.items()}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizationSpec:
        """Inverse of :meth:`to_dict`. Raises CheckpointError for a newer schema or missing parts."""
        version = data.get("schema_version")
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise CheckpointError(
                f"quantization_config: schema_version must be an integer up to {SCHEMA_VERSION}, got {version!r}. "
                "The checkpoint was written by a newer release: pip install -U diffuse-compress."
            )
        try:
            schemes = {name: Scheme.from_dict(value) for name, value in data["schemes"].items()}

            def read(pairs: Iterable[Iterable[Any]]) -> Rules:
                return tuple((pattern, None if name is None else schemes[name]) for pattern, name in pairs)

            return cls(
                scheme=None if data["scheme"] is None else schemes[data["scheme"]],
                modulation_scheme=None if data["modulation_scheme"] is None else schemes[data["modulation_scheme"]],
                algorithm=algorithm_from_dict(data["algorithm"]),
                preset=data.get("preset"),
                modules_to_not_convert=tuple(data.get("modules_to_not_convert", ())),
                overrides=read(data.get("overrides", ())),
                rules=None if data.get("rules") is None else read(data["rules"]),
                seed=int(data.get("seed", 0)),
                observer=ObserverConfig.of(data.get("observer") or {}),
                end_scheme=None if data.get("end_scheme") is None else schemes[data["end_scheme"]],
                split_skips=bool(data.get("split_skips", False)),
                attention=attention_format(data.get("attention")),
            )
        except ConfigError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"quantization_config: incomplete or corrupted ({type(error).__name__}: {error}). "
                "Download the checkpoint again or save it anew."
            ) from error


def _patterns(value: Any) -> tuple[str, ...]:
    given = (value,) if isinstance(value, str) else () if value is None else value
    patterns = tuple(given) if isinstance(given, Iterable) and not isinstance(given, Mapping) else (given,)
    wrong = next((item for item in patterns if not isinstance(item, str)), None)
    if wrong is not None:
        raise ConfigError(f"modules_to_not_convert: a list of patterns, got {type(wrong).__name__} {wrong!r}.")
    return patterns


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: True or False, got {type(value).__name__} {value!r}.")
    return value


def _check_types(algorithm: Any, overrides: Any, seed: Any) -> None:
    if algorithm is not None and not isinstance(algorithm, AlgorithmConfig):
        raise ConfigError(f"algorithm: a config such as RTNConfig(), got {type(algorithm).__name__} {algorithm!r}.")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ConfigError(
            f"overrides: a dict {{pattern: preset, Scheme or None}}, got {type(overrides).__name__}. To keep layers "
            "dense, use modules_to_not_convert=."
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed: an integer, got {type(seed).__name__} {seed!r}.")
