"""QuantizationConfig: one class for ``compress``, ``quant_mapping=`` and ``from_pretrained(quantization_config=)``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import torch

from diffuse_compress.errors import ConfigError, nearest
from diffuse_compress.integrations.compat import mixin_bases
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, SequenceConfig, algorithm_from_dict
from diffuse_compress.quantization.observers import ObserverConfig
from diffuse_compress.quantization.presets import resolve_preset
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.quantization.spec import QuantizationSpec

__all__ = ["QUANT_METHOD", "QuantizationConfig"]

QUANT_METHOD = "diffuse_compress"


class _Method(str, Enum):
    """diffusers reads ``quant_method.value``, so a plain string would not do."""

    DIFFUSE_COMPRESS = QUANT_METHOD

    def __str__(self) -> str:
        return str(self.value)


class QuantizationConfig(*mixin_bases()):  # type: ignore[misc]
    """Quantize a component's weights, and activations where the scheme says so.

    The only configuration of this package that is not a frozen dataclass: both libraries require a subclass of
    their own mixin. Everything it holds is in ``spec``, which is frozen.

    Args:
        scheme: preset name ("w4a8", see ``diffuse-compress info``), a Scheme, or its dict.
        algorithm: RTNConfig(), HQQConfig(), ..., its dict, or its kind ("hqq"); a list runs one after the other
            (``[SmoothQuantConfig(), GPTQConfig()]``); None takes the preset's.
        modulation_scheme: format of modulation and timestep projections; None takes the preset's.
        modules_to_not_convert: patterns of modules to leave alone: whole dotted components ("attn1.to_q"), globs
            ("*.ff.*") or "re:" regular expressions.
        overrides: {pattern: preset, Scheme or None}; the last match wins. A layer named here is converted whatever
            its role.
        seed: of algorithms that draw random numbers.
        compute_dtype: dtype of the unquantized layers; recorded when a model is compressed.
        observer: how ranges of static inputs (``ActivationScheme(dynamic=False)``) follow from the calibration:
            "minmax" (the default), "mse", "percentile" or an ObserverConfig.
        end_scheme: format of the first and last layers (embedders, ``conv_in``, ``conv_out``, ``proj_out``): preset,
            Scheme or its dict; None keeps them dense.
        split_skips: quantize convolutions that read hidden states and a UNet's skip connection in two parts, each with
            scales of its own; models that concatenate nothing have none.
        attention: "int8_qk" computes attention's logits on int8 codes in a fused kernel, "fp8_pv" also its output in
            float8; "int8" has queries, keys, values and probabilities on int8 codes, as TFMQ-DM evaluates them, which
            takes time and memory; None leaves them.

    Attributes:
        calibration: what a compressed component was calibrated on (``Calibration.settings_of``), or None.
        methods: {kind: configuration as a dict} of what a compressed component carries beside quantized weights.

    Raises:
        ConfigError: unknown names; a preset that needs calibration and got none; an observer, and no static inputs.
    """

    def __init__(
        self,
        scheme: str | Scheme | Mapping[str, Any],
        algorithm: AlgorithmConfig | Sequence[Any] | Mapping[str, Any] | str | None = None,
        modulation_scheme: str | Scheme | Mapping[str, Any] | None = None,
        modules_to_not_convert: str | Iterable[str] | None = None,
        overrides: Mapping[str, str | Scheme | None] | None = None,
        seed: int = 0,
        compute_dtype: torch.dtype | str | None = None,
        observer: ObserverConfig | Mapping[str, Any] | str | None = None,
        end_scheme: str | Scheme | Mapping[str, Any] | None = None,
        split_skips: bool = False,
        attention: str | None = None,
    ) -> None:
        algorithm = _as_algorithm(algorithm)
        self._algorithm_is_default = algorithm is None
        self._set(
            QuantizationSpec.build(
                scheme,
                algorithm=algorithm,
                modulation_scheme=modulation_scheme,
                modules_to_not_convert=modules_to_not_convert,
                overrides=overrides,
                seed=seed,
                observer=observer,
                end_scheme=end_scheme,
                split_skips=split_skips,
                attention=attention,
            ),
            compute_dtype,
        )

    @classmethod
    def from_spec(
        cls,
        spec: QuantizationSpec,
        compute_dtype: torch.dtype | None = None,
        calibration: Mapping[str, Any] | None = None,
        methods: Mapping[str, Any] | None = None,
    ) -> QuantizationConfig:
        """The config around an existing spec, e.g. one resolved on a model."""
        config = cls.__new__(cls)
        config._algorithm_is_default = False
        config._set(spec, compute_dtype, calibration, methods)
        return config

    def _set(
        self,
        spec: QuantizationSpec,
        compute_dtype: torch.dtype | str | None,
        calibration: Mapping[str, Any] | None = None,
        methods: Mapping[str, Any] | None = None,
    ) -> None:
        self.quant_method = _Method.DIFFUSE_COMPRESS
        self.spec = spec
        self.compute_dtype = _as_dtype(compute_dtype)
        self.calibration = None if calibration is None else dict(calibration)
        self.methods = dict(methods or {})
        self.modules_to_not_convert = list(spec.modules_to_not_convert) or None

    def with_calibration(self) -> QuantizationConfig:
        """What is meant where there is calibration data: without an algorithm of its own, the preset's calibrated one.

        A config that names its algorithm, or a Scheme instead of a preset, is as it was.
        """
        if not self._algorithm_is_default or self.spec.preset is None:
            return self
        calibrated = resolve_preset(self.spec.preset).calibrated
        return type(self).from_spec(replace(self.spec, algorithm=calibrated), self.compute_dtype)

    @property
    def kind(self) -> str:
        """Methods of different kinds add up on a component; two of one kind conflict."""
        return "weights"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content of ``config.json``'s ``quantization_config``: patterns only, no prompts, no paths."""
        dtype = None if self.compute_dtype is None else str(self.compute_dtype).removeprefix("torch.")
        data = {"quant_method": QUANT_METHOD, "compute_dtype": dtype, **self.spec.to_dict()}
        extra = {"calibration": self.calibration, "methods": self.methods}
        return {**data, **{name: copy.deepcopy(value) for name, value in extra.items() if value}}

    def to_diff_dict(self) -> dict[str, Any]:
        """Same as :meth:`to_dict`; diffusers' mixin calls it without defining it."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read :meth:`to_dict`'s output, or a dict of constructor arguments.

        Raises:
            CheckpointError: written by a newer schema, or incomplete.
            ConfigError: constructor arguments that do not exist or fit.
        """
        data = {key: val for key, val in config_dict.items() if key != "quant_method"}
        if "schema_version" in data:
            spec, dtype = QuantizationSpec.from_dict(data), _as_dtype(data.get("compute_dtype"))
            config = cls.from_spec(spec, dtype, data.get("calibration"), data.get("methods"))
        else:
            known = {name for name in inspect.signature(cls.__init__).parameters if name != "self"}
            unknown = [name for name in data if name not in known]
            if unknown:
                raise ConfigError(f"quantization_config: unknown key {unknown[0]!r}; {nearest(unknown[0], known)}")
            if "scheme" not in data:
                raise ConfigError('quantization_config: the key "scheme" is missing: a preset such as "w4a8".')
            config = cls(**data)
        return (config, kwargs) if return_unused_kwargs else config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantizationConfig) and self.spec == other.spec

    def __hash__(self) -> int:
        return hash(self.spec)

    def __repr__(self) -> str:
        spec = self.spec
        parts = [repr(spec.label), f"algorithm={spec.algorithm!r}"]
        if spec.modules_to_not_convert:
            parts.append(f"modules_to_not_convert={list(spec.modules_to_not_convert)!r}")
        if spec.overrides:
            parts.append(f"overrides={len(spec.overrides)} patterns")
        parts += [f"{name}=True" for name in ("split_skips",) if spec.split_skips]
        parts += [f"attention={spec.attention.value!r}"] if spec.attention is not None else []
        parts += [f"end_scheme={spec.end_scheme.name!r}"] if spec.end_scheme is not None else []
        if spec.rules is not None:
            parts.append(f"resolved to {len(spec.rules)} patterns")
        return f"QuantizationConfig({', '.join(parts)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizationConfig:
        config = type(self).from_spec(
            copy.deepcopy(self.spec, memo), self.compute_dtype, self.calibration, self.methods
        )
        config._algorithm_is_default = self._algorithm_is_default
        return config


def _as_algorithm(value: Any) -> Any:
    """A config of its dict or kind, and a sequence of a list; anything else as it is."""
    if isinstance(value, str):
        return algorithm_from_dict({"kind": value})
    if isinstance(value, Mapping):
        return algorithm_from_dict(value)
    if isinstance(value, list | tuple):
        steps = tuple(_as_algorithm(step) for step in value)
        wrong = next((step for step in steps if not isinstance(step, AlgorithmConfig)), None)
        if wrong is not None:
            raise ConfigError(f"algorithm: a list holds configs such as RTNConfig(), got {type(wrong).__name__}.")
        return steps[0] if len(steps) == 1 else SequenceConfig(steps)
    return value


def _as_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        return value
    dtype = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"compute_dtype: {nearest(value, ['float32', 'bfloat16', 'float16'])}, got {value!r}.")
    return dtype
