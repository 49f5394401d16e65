"""What an algorithm is: a frozen config that selects it, and a function that quantizes one weight.

A config class names itself in JSON by ``kind``. Registering is one line above the function::

    @register
    def quantize(weight, scheme, config: RTNConfig, generator=None) -> QuantizedWeight: ...
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError, nearest
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import PerInputGroup, Scheme, WeightScheme

__all__ = [
    "AlgorithmConfig",
    "SequenceConfig",
    "algorithm_from_dict",
    "algorithm_kinds",
    "algorithm_to_dict",
    "bytes_of_shift",
    "calibrate_with",
    "quantize_with",
    "register",
    "register_block",
    "steps_of",
    "takes_scale",
]


@dataclass(frozen=True)
class AlgorithmConfig:
    """Base of the configs. A subclass is a frozen dataclass of JSON values that sets ``kind``.

    The class selects the algorithm; ``kind`` is its name in files and never changes. ``is_random`` says whether the
    result depends on the seed, ``needs_calibration`` whether it looks at inputs and works on whole blocks,
    ``chooses_codes`` whether it ends with codes, so that what only prepares layers must come before it,
    ``chooses_scales`` whether it gives channels of the inputs a scale, ``needs_quantized_inputs`` whether it has
    nothing to do where inputs stay as they are, ``needs_reference`` whether it also wants the block and its inputs as
    they are in the model before any change, ``adds_branch`` whether layers get a dense branch beside their codes: it
    makes 4-bit inputs usable where a layer cannot be rotated, and takes time, ``kept_dense`` what else layers keep
    dense beside their codes, in words, ``reconstructs_blocks`` whether it learns the layers of a block together, so
    that the block's output on the samples stays, ``follows_codes`` whether it works on blocks whose layers are
    quantized: in a sequence it comes after what chooses the codes, ``chooses_formats`` whether the data may change the
    granularity of a layer's weight, ``rounds_input_groups`` whether it works on weights with groups of rows
    (``PerInputGroup``).
    """

    kind: ClassVar[str]
    is_random: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    chooses_codes: ClassVar[bool] = True
    chooses_scales: ClassVar[bool] = False
    needs_quantized_inputs: ClassVar[bool] = False
    adds_branch: ClassVar[bool] = False
    kept_dense: ClassVar[str] = ""
    reconstructs_blocks: ClassVar[bool] = False
    follows_codes: ClassVar[bool] = False
    chooses_formats: ClassVar[bool] = False
    rounds_input_groups: ClassVar[bool] = False

    @property
    def rotates_residual(self) -> bool:
        """Whether it rotates the model's residual stream before any layer is quantized (``residual.py``)."""
        return False

    @property
    def summary(self) -> str:
        """The algorithm in a few words, for the first line of plans and reports."""
        return self.kind

    def check(self, scheme: WeightScheme) -> None:
        """Raise ConfigError if this algorithm cannot reach ``scheme``; asked before any weight is touched."""

    def idle_with(self, schemes: Sequence[Scheme]) -> tuple[str, str] | None:
        """What it is for and a preset that has such, if ``schemes`` of all layers leave it nothing to do; else None."""
        if self.needs_quantized_inputs and all(scheme.activation is None for scheme in schemes):
            return "quantized inputs", "w8a8"
        return None

    def idle_after(self, earlier: AlgorithmConfig) -> str | None:
        """Why ``earlier`` in a sequence leaves it nothing to do; None if it does not."""
        return "both choose the codes, and the first has" if self.chooses_codes and earlier.chooses_codes else None

    def check_granularity(self, scheme: WeightScheme) -> None:
        """Raise ConfigError if ``scheme`` has groups of rows and it cannot work on such."""
        if isinstance(scheme.granularity, PerInputGroup) and not self.rounds_input_groups:
            raise ConfigError(
                f"{type(self).__name__}: looks at weights row by row, got groups of rows (PerInputGroup). Use "
                "RTNConfig() or GPTQConfig() for these, or PerGroup()."
            )

    def unsupported(self, layer: nn.Module, scheme: Scheme) -> str | None:
        """Why a linear or convolution, dense and perhaps on the meta device, cannot be taken; None if it can."""
        return None

    def format_of(self, layer: nn.Module, scheme: Scheme, arrives_rotated: bool = False, name: str = "") -> Scheme:
        """The format of a layer that was to get ``scheme``: what the algorithm decides without data belongs to it.

        ``arrives_rotated`` says that what stands before the layer will rotate its input, ``name`` is its full name.
        """
        return scheme

    def scales_input(self, layer: nn.Module, scheme: Scheme) -> bool:
        """Whether it may give a linear or convolution a smoothing scale of its input (``act_pre_scale``)."""
        return False

    def shift_bytes(self, layer: nn.Module, scheme: Scheme) -> int:
        """Bytes of the shift of its input (``act_pre_shift``) that it may give a layer, and of the bias that needs."""
        return 0

    def idle_in(self, blocks: Sequence[nn.Module]) -> str | None:
        """Why the dense blocks that hold the layers leave it nothing to do; None if they do not."""
        return None

    def branch_bytes(self, layer: nn.Module, scheme: Scheme, name: str = "") -> int:
        """Bytes of what it stores dense beside a layer's codes, at most: a low-rank branch, columns, single weights."""
        return 0

    def format_bytes(self, layer: nn.Module, scheme: Scheme) -> int:
        """Bytes by which another granularity that it may choose is larger than that of ``scheme``, at most."""
        return 0

    def for_search(self) -> AlgorithmConfig:
        """What a search judges formats by, one after the other: itself, or what comes near it in much less time."""
        return self

    def extra_bytes(self, layer: nn.Module, scheme: Scheme, name: str = "") -> int:
        """Bytes that are stored with a layer beside its codes and their scales, at most.

        Only the data tell whether a smoothing scale or a shift is folded into what precedes the layer, or changes
        nothing, and which granularity is chosen.
        """
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        scale = 4 * weight.shape[1] if self.scales_input(layer, scheme) else 0
        beside = self.branch_bytes(layer, scheme, name) + self.shift_bytes(layer, scheme)
        return beside + scale + self.format_bytes(layer, scheme)


def takes_scale(layer: nn.Module) -> bool:
    """Whether a layer can have a smoothing scale of its input: linears and ungrouped convolutions can."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def bytes_of_shift(layer: nn.Module) -> int:
    """Bytes of a shift of a layer's input, and of a bias if it has none; 0 where it can have no shift."""
    if not isinstance(layer, nn.Linear):
        return 0
    gained = layer.out_features * layer.weight.element_size() if layer.bias is None else 0
    return 4 * layer.in_features + gained


BlockCalibrator = Callable[[Any, Any], None]
_Calibrator = TypeVar("_Calibrator", bound=BlockCalibrator)
_SEQUENCE = "sequence"


@dataclass(frozen=True)
class SequenceConfig(AlgorithmConfig):
    """Several algorithms, each building on what the ones before it decided: smoothing, then GPTQ.

    Args:
        algorithms: configs, at most one of each class: what prepares layers, then what chooses the codes, then what
            follows the codes.
    """

    algorithms: tuple[AlgorithmConfig, ...]
    kind: ClassVar[str] = _SEQUENCE

    def __post_init__(self) -> None:
        object.__setattr__(self, "algorithms", tuple(self.algorithms))
        kinds = [type(config) for config in self.algorithms]
        if len(kinds) < 2 or len(set(kinds)) < len(kinds) or SequenceConfig in kinds:
            raise ConfigError(
                "algorithm: a sequence holds two or more different algorithms, got "
                f"[{', '.join(kind.__name__ for kind in kinds)}]."
            )
        stages = [_stage(config) for config in self.algorithms]
        for (index, earlier), (other, later) in itertools.combinations(enumerate(stages), 2):
            if earlier <= later:
                continue
            early, late = kinds[index].__name__, kinds[other].__name__
            reason = f"{late} prepares layers for the choice of codes, and must come before it"
            if earlier == _FOLLOWS:
                reason = f"{early} works on layers that have their codes, and must come after {late}"
            raise ConfigError(f"algorithm: {reason}, got [{', '.join(kind.__name__ for kind in kinds)}].")
        for earlier, later in itertools.combinations(self.algorithms, 2):
            if earlier.chooses_formats and (
                later.chooses_scales or (later.chooses_codes and not later.rounds_input_groups)
            ):
                raise ConfigError(
                    f"algorithm: {type(later).__name__} cannot follow {type(earlier).__name__}, which may give layers "
                    "groups of rows: what chooses scales comes before it, and RTNConfig() or GPTQConfig() after it, "
                    f"got [{', '.join(kind.__name__ for kind in kinds)}]."
                )
            reason = later.idle_after(earlier)
            if reason is not None:
                raise ConfigError(
                    f"algorithm: {type(later).__name__} has nothing to do after {type(earlier).__name__}: {reason}. "
                    f"Leave one of them out, got [{', '.join(kind.__name__ for kind in kinds)}]."
                )

    @property
    def summary(self) -> str:
        return ", then ".join(config.summary for config in self.algorithms)

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        return any(config.needs_calibration for config in self.algorithms)

    @property
    def is_random(self) -> bool:  # type: ignore[override]
        return any(config.is_random for config in self.algorithms)

    @property
    def rotates_residual(self) -> bool:
        return any(config.rotates_residual for config in self.algorithms)

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return any(config.needs_reference for config in self.algorithms)

    @property
    def adds_branch(self) -> bool:  # type: ignore[override]
        return any(config.adds_branch for config in self.algorithms)

    @property
    def reconstructs_blocks(self) -> bool:  # type: ignore[override]
        return any(config.reconstructs_blocks for config in self.algorithms)

    def check(self, scheme: WeightScheme) -> None:
        for config in self.algorithms:
            config.check(scheme)

    def check_granularity(self, scheme: WeightScheme) -> None:
        for config in self.algorithms:
            config.check_granularity(scheme)

    def unsupported(self, layer: nn.Module, scheme: Scheme) -> str | None:
        """The first reason; what prepares layers has none to keep one dense that gets a branch."""
        reasons = [(config, config.unsupported(layer, scheme)) for config in self.algorithms]
        with_branch = any(config.adds_branch and reason is None for config, reason in reasons)
        counted = (reason for config, reason in reasons if config.chooses_codes or not with_branch)
        return next((reason for reason in counted if reason is not None), None)

    def format_of(self, layer: nn.Module, scheme: Scheme, arrives_rotated: bool = False, name: str = "") -> Scheme:
        for config in self.algorithms:
            scheme = config.format_of(layer, scheme, arrives_rotated, name)
        return scheme

    def scales_input(self, layer: nn.Module, scheme: Scheme) -> bool:
        return any(config.scales_input(layer, scheme) for config in self.algorithms)

    def shift_bytes(self, layer: nn.Module, scheme: Scheme) -> int:
        return max(config.shift_bytes(layer, scheme) for config in self.algorithms)

    def branch_bytes(self, layer: nn.Module, scheme: Scheme, name: str = "") -> int:
        return sum(config.branch_bytes(layer, scheme, name) for config in self.algorithms)

    def format_bytes(self, layer: nn.Module, scheme: Scheme) -> int:
        return sum(config.format_bytes(layer, scheme) for config in self.algorithms)

    def for_search(self) -> AlgorithmConfig:
        # What follows the codes is for the last of them only.
        steps = tuple(config.for_search() for config in self.algorithms if not config.follows_codes)
        return steps[0] if len(steps) == 1 else SequenceConfig(steps)


_PREPARES, _CHOOSES, _FOLLOWS = range(3)


def _stage(config: AlgorithmConfig) -> int:
    if config.follows_codes:
        return _FOLLOWS
    return _CHOOSES if config.chooses_codes else _PREPARES


def steps_of(config: AlgorithmConfig) -> tuple[AlgorithmConfig, ...]:
    """The algorithms of a sequence; of any other config, itself."""
    return config.algorithms if isinstance(config, SequenceConfig) else (config,)


WeightQuantizer = Callable[[torch.Tensor, WeightScheme, Any, torch.Generator | None], QuantizedWeight]
_Quantizer = TypeVar("_Quantizer", bound=WeightQuantizer)

# Modules that register an algorithm when they are imported: listing the kinds imports nothing.
_MODULES: dict[str, str] = {
    "adadim": "diffuse_compress.quantization.algorithms.adadim",
    "adaround": "diffuse_compress.quantization.algorithms.adaround",
    "awq": "diffuse_compress.quantization.algorithms.awq",
    "brecq": "diffuse_compress.quantization.algorithms.brecq",
    "dgq": "diffuse_compress.quantization.algorithms.dgq",
    "gptq": "diffuse_compress.quantization.algorithms.gptq",
    "hqq": "diffuse_compress.quantization.algorithms.hqq",
    "llm_int8": "diffuse_compress.quantization.algorithms.llm_int8",
    "owq": "diffuse_compress.quantization.algorithms.owq",
    "norm_tweaking": "diffuse_compress.quantization.algorithms.norm_tweaking",
    "omniquant": "diffuse_compress.quantization.algorithms.omniquant",
    "osplus": "diffuse_compress.quantization.algorithms.osplus",
    "quarot": "diffuse_compress.quantization.algorithms.quarot",
    "quik": "diffuse_compress.quantization.algorithms.quik",
    "rtn": "diffuse_compress.quantization.algorithms.rtn",
    "smoothquant": "diffuse_compress.quantization.algorithms.smoothquant",
    "spinquant": "diffuse_compress.quantization.algorithms.spinquant",
    "spqr": "diffuse_compress.quantization.algorithms.spqr",
    "svdquant": "diffuse_compress.quantization.algorithms.svdquant",
    "tesseraq": "diffuse_compress.quantization.algorithms.tesseraq",
    "trained": "diffuse_compress.quantization.algorithms.trained",
}
_REGISTRY: dict[type[AlgorithmConfig], WeightQuantizer] = {}
_BLOCK_REGISTRY: dict[type[AlgorithmConfig], BlockCalibrator] = {}


def register(quantizer: _Quantizer) -> _Quantizer:
    """Register ``quantizer(weight, scheme, config, generator)`` for the class its ``config`` is annotated with.

    Raises ConfigError if that class, or another class of the same ``kind``, has a quantizer already.
    """
    _REGISTRY[_config_type(quantizer, _REGISTRY)] = quantizer
    return quantizer


def register_block(calibrator: _Calibrator) -> _Calibrator:
    """Register ``calibrator(work, config)``, which looks at a :class:`BlockWork`, likewise."""
    _BLOCK_REGISTRY[_config_type(calibrator, _BLOCK_REGISTRY)] = calibrator
    return calibrator


def _config_type(function: Callable[..., Any], registry: Mapping[type[AlgorithmConfig], Any]) -> type[AlgorithmConfig]:
    config_type = typing.get_type_hints(function).get("config")
    if not (isinstance(config_type, type) and issubclass(config_type, AlgorithmConfig)):
        raise ConfigError(f"register: annotate config of {function.__qualname__} with an AlgorithmConfig class.")
    for other in registry:
        if other is config_type or other.kind == config_type.kind:
            raise ConfigError(
                f"register: {config_type.__name__} (kind {config_type.kind!r}) collides with "
                f"{other.__module__}.{other.__name__}, registered before. Give each algorithm its own class and kind."
            )
    return config_type


def _registered() -> list[type[AlgorithmConfig]]:
    return [*_REGISTRY, *_BLOCK_REGISTRY]


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
    config = next((step for step in reversed(steps_of(config)) if not step.follows_codes), config)
    if type(config) not in _REGISTRY:
        raise ConfigError(f"algorithm: no quantizer for {type(config).__name__}. Available: {', '.join(_kinds())}")
    return _REGISTRY[type(config)](weight, scheme, config, generator)


def calibrate_with(config: AlgorithmConfig, work: Any) -> None:
    """Let the algorithm that ``config`` selects decide on a block (:class:`BlockWork`).

    Data-free algorithms quantize each layer that has no codes yet, in the order the layers run in.
    """
    calibrator = _BLOCK_REGISTRY.get(type(config))
    if calibrator is not None:
        calibrator(work, config)
        return
    for name, layer in work.layers.items():
        if layer.quantized is None:
            layer.quantized = quantize_with(config, layer.target(), layer.scheme.weight, work.generators(name))
            work.install(layer)


def algorithm_to_dict(config: AlgorithmConfig) -> dict[str, Any]:
    """JSON-able description, ``{"kind": ..., field: value, ...}``; inverse of :func:`algorithm_from_dict`."""
    if isinstance(config, SequenceConfig):
        return {"kind": _SEQUENCE, "algorithms": [algorithm_to_dict(step) for step in config.algorithms]}
    return {"kind": config.kind, **dataclasses.asdict(config)}


def algorithm_from_dict(data: Mapping[str, Any]) -> AlgorithmConfig:
    """Config of :func:`algorithm_to_dict`'s output; fields left out take their defaults.

    Raises ConfigError on an unknown kind or field, listing those that exist.
    """
    values = dict(data)
    kind = values.pop("kind", None)
    if kind == _SEQUENCE:
        return SequenceConfig(tuple(algorithm_from_dict(step) for step in values.get("algorithms", ())))
    if kind in _MODULES:
        importlib.import_module(_MODULES[kind])
    config_type = next((cls for cls in _registered() if cls.kind == kind), None)
    if config_type is None:
        raise ConfigError(f"algorithm: unknown kind {kind!r}; {nearest(str(kind), _kinds())}")
    names = {field.name for field in dataclasses.fields(config_type)}
    for name in values:
        if name not in names:
            raise ConfigError(f"{config_type.__name__}: unknown field {name!r}; {nearest(name, names)}")
    return config_type(**values)


def _kinds() -> list[str]:
    return sorted(set(_MODULES) | {cls.kind for cls in _registered()})


def algorithm_kinds() -> list[str]:
    """Every ``kind`` that :func:`algorithm_from_dict` knows but the sequence of several, sorted."""
    return _kinds()
