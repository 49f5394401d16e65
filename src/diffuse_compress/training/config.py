"""What quantization-aware training is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, ClassVar

from diffuse_compress.errors import ConfigError, known_fields, nearest
from diffuse_compress.quantization.algorithms.trained import TrainedConfig
from diffuse_compress.quantization.presets import PRESETS, resolve_preset
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    Bilevel,
    NumberFormat,
    PerChannel,
    PerGroup,
    PerInputGroup,
    PerToken,
    ScaleRule,
    Scheme,
    TwoLevel,
    WeightScheme,
)
from diffuse_compress.quantization.spec import QuantizationSpec

__all__ = [
    "Gate",
    "LossSpace",
    "PhiInit",
    "QVGenConfig",
    "RangeInit",
    "TrainingMethod",
    "WeightZero",
    "parse_scheme",
]

_NAME = re.compile(r"w([2348])a([348]|16)\Z")
_INVERSE_RATIO = "1/ratio"


class WeightZero(str, Enum):
    """Zero point of the weights: FLOAT, in fp32; INT, rounded to a code; SYMMETRIC, none."""

    FLOAT = "float"
    INT = "int"
    SYMMETRIC = "symmetric"


class RangeInit(str, Enum):
    """Ranges of the weights at the start: of least error (exponent 2.4), or all that occurs."""

    MSE = "mse"
    MINMAX = "minmax"


class PhiInit(str, Enum):
    """The branch at the start. SVD: the largest part of the rounding error of the weight. ZERO: nothing. LOFTQ:
    the largest part of the weight less its codes, found in turn with codes of what it leaves, which then is the
    weight."""

    SVD = "svd"
    ZERO = "zero"
    LOFTQ = "loftq"


class Gate(str, Enum):
    """How the leaving half of the branch goes from 1 to 0 within a phase."""

    COSINE = "cosine"
    LINEAR = "linear"


class TrainingMethod(str, Enum):
    """QVGEN: weights, scales, clips and the branch. KD: the same without a branch (Q-DM's training). LSQ: as KD without
    a teacher, from data that say what is right (noised latents, texts). EFFICIENTDM: weights are frozen, a low-rank
    change of them is trained with the scales and clips, and is part of the weight that is rounded."""

    QVGEN = "qvgen"
    KD = "kd"
    LSQ = "lsq"
    EFFICIENTDM = "efficientdm"


class LossSpace(str, Enum):
    """Where student and teacher are compared: their outputs, or the clean samples that these stand for."""

    OUTPUT = "output"
    X0 = "x0"


_ENUMS: dict[str, type[Enum]] = {
    "weight_zero": WeightZero,
    "range_init": RangeInit,
    "phi_init": PhiInit,
    "gate": Gate,
    "method": TrainingMethod,
    "loss_space": LossSpace,
}


def parse_scheme(value: str | Scheme | Mapping[str, Any]) -> Scheme:
    """The format of a layer: a preset's, or ``w<bits>a<bits>`` that no preset is called ("w3a3", "w3a16"), a Scheme or
    its dict. Weights of the latter are symmetric with a scale per output channel where inputs are quantized, and in
    groups of 128 with integer zero points where they are not.

    Raises:
        ConfigError: none of these.
    """
    if isinstance(value, Scheme):
        return value
    if isinstance(value, Mapping):
        return Scheme.from_dict(dict(value))
    if not isinstance(value, str):
        raise ConfigError(f"QVGenConfig: scheme is a name such as 'w4a4', a Scheme or its dict, got {value!r}.")
    found = _NAME.match(value.strip().lower())
    if found is None or value.strip().lower() in PRESETS:
        return resolve_preset(value).scheme
    weight, act = NumberFormat(f"int{found[1]}"), found[2]
    if act == "16":
        return Scheme(WeightScheme(weight, PerGroup(128, pad=True), symmetric=False))
    return Scheme(WeightScheme(weight, PerChannel()), ActivationScheme(NumberFormat(f"int{act}"), PerToken()))


@dataclass(frozen=True, kw_only=True)
class _Rounding:
    """What is rounded, and how; the first part of :class:`QVGenConfig`."""

    weight_zero: WeightZero | None = None
    range_init: RangeInit = RangeInit.MSE
    quantize_all: bool = False
    modulation_scheme: str | Scheme | None = None
    modules_to_not_convert: tuple[str, ...] = ()
    clip_groups: int = 50
    clip_init: float = 0.95
    timestep_range: tuple[float, float] = (0.0, 1000.0)
    method: TrainingMethod = TrainingMethod.QVGEN
    lora_rank: int = 64


@dataclass(frozen=True, kw_only=True)
class _Branch:
    """The removable branch and its schedule; the second part."""

    phi_rank: int = 32
    phi_init: PhiInit = PhiInit.SVD
    loftq_iterations: int = 5
    decay: bool = True
    decay_ratio: float = 0.5
    decay_fraction: float = 0.8
    gate: Gate = Gate.COSINE
    last_rank: int | str = 1
    rotate_moments: bool = False


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """The training loop; the third part."""

    loss_space: LossSpace = LossSpace.OUTPUT
    learning_rate: float = 3e-5
    clip_learning_rate: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    warmup_fraction: float = 0.1
    max_grad_norm: float = 1.0
    max_train_steps: int = 2000
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    seed: int = 0
    ema_decay: float | None = None
    mixed_precision: str | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class QVGenConfig(_Loop, _Branch, _Rounding):
    """Quantization-aware training with a branch that leaves (QVGen, Huang et al. 2025, arXiv 2505.11497), or without.

    Args:
        scheme: format of the layers inside blocks: a preset's name, or "w3a3", "w3a16", ..., a Scheme or its dict.
            Integer weights; inputs alone, or quantized dynamically with a symmetric scale per token.
        weight_zero: "float" or "int" gives weights a zero point, "symmetric" takes it away; None leaves the scheme's.
            Integer products have none, so the first two are for formats that leave inputs alone.
        range_init: "mse" or "minmax".
        quantize_all: also embedders, modulation and the last layer, in ``scheme``, as the paper does.
        modulation_scheme: format of modulation and timestep projections, which see one row per sample, such as
            "w4a16"; None keeps them dense.
        modules_to_not_convert: patterns of layers that stay dense.
        clip_groups: groups of timesteps with a learned clip of the inputs each; 1 for models without a timestep, 0
            clips nothing.
        clip_init: share of the range that inputs keep at first.
        timestep_range: of what the model is given; (0, 1) where a pipeline divides it (Flux).
        method: "qvgen", "kd", "lsq" or "efficientdm" (:class:`TrainingMethod`).
        lora_rank: of EfficientDM's change of the weights.
        phi_rank: of the branch; layers with a smaller side take that.
        phi_init: "svd", "zero" or "loftq" (:class:`PhiInit`).
        loftq_iterations: of the last.
        decay: let the branch leave; False keeps it, as SVDQuant does.
        decay_ratio: share of the rank that leaves in each phase.
        decay_fraction: share of the training after which it has left; what remains trains without it.
        gate: "cosine" or "linear".
        last_rank: the rank from which all leaves at once: 1 as the released code has it (32, 16, 8, 4, 2, 1, 0), or
            "1/ratio", the paper's (32, 16, 8, 4, 2, 0).
        rotate_moments: where a phase ends, turn the optimizer's moments of the branch as its factors turn; they are
            forgotten otherwise.
        loss_space: "output" or "x0".
        learning_rate: of everything but the clips.
        clip_learning_rate: of these.
        betas: of Adam.
        eps: of Adam.
        weight_decay: of weights; biases, norms, scales, zero points, clips and the branch have none.
        warmup_fraction: share of the training in which the learning rates rise.
        max_grad_norm: gradients are scaled down to it.
        max_train_steps: optimizer steps.
        train_batch_size: samples of each process and forward pass.
        gradient_accumulation_steps: forward passes of a step.
        seed: of whatever is drawn.
        ema_decay: of an average of the weights; None for none.
        mixed_precision: "bf16", "fp16" or None.
        gradient_checkpointing: of blocks.

    Raises:
        ConfigError: a value that is none of these, or values that exclude each other.
    """

    scheme: str | Scheme = "w4a4"

    kind: ClassVar[str] = "training"

    def __post_init__(self) -> None:
        for name, kind in _ENUMS.items():
            value = getattr(self, name)
            if value is None and name == "weight_zero":
                continue
            known = [member.value for member in kind]
            if value not in known:
                raise ConfigError(f"QVGenConfig: unknown {name}={value!r}; {nearest(str(value), known)}")
            object.__setattr__(self, name, kind(value))
        for name in ("betas", "timestep_range"):
            object.__setattr__(self, name, _pair(name, getattr(self, name)))
        skip: Any = self.modules_to_not_convert
        if not isinstance(skip, str | Iterable):
            raise ConfigError(f"QVGenConfig: modules_to_not_convert must be patterns, got {skip!r}.")
        object.__setattr__(self, "modules_to_not_convert", (skip,) if isinstance(skip, str) else tuple(skip))
        for name in ("scheme", "modulation_scheme"):
            if isinstance(getattr(self, name), Mapping):
                object.__setattr__(self, name, parse_scheme(getattr(self, name)))
        self._check_numbers()
        if self.last_rank != _INVERSE_RATIO and (not isinstance(self.last_rank, int) or self.last_rank < 1):
            raise ConfigError(f'QVGenConfig: last_rank must be at least 1, or "1/ratio", got {self.last_rank!r}.')
        self._check_formats()

    def _check_numbers(self) -> None:
        positive = ("phi_rank", "lora_rank", "loftq_iterations", "max_train_steps", "train_batch_size")
        positive += ("gradient_accumulation_steps",)
        for name in positive:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"QVGenConfig: {name} must be an integer of at least 1, got {value!r}.")
        if isinstance(self.clip_groups, bool) or not isinstance(self.clip_groups, int) or self.clip_groups < 0:
            raise ConfigError(f"QVGenConfig: clip_groups must be an integer of at least 0, got {self.clip_groups!r}.")
        above_zero = "above 0"
        limits = {
            "clip_init": (0 < self.clip_init < 1, "between 0 and 1"),
            "decay_ratio": (0 < self.decay_ratio <= 1, "above 0 and at most 1"),
            "decay_fraction": (0 < self.decay_fraction <= 1, "above 0 and at most 1"),
            "timestep_range": (self.timestep_range[0] < self.timestep_range[1], "two rising numbers"),
            "learning_rate": (self.learning_rate > 0, above_zero),
            "clip_learning_rate": (self.clip_learning_rate > 0, above_zero),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "in [0, 1)"),
            "eps": (self.eps > 0, above_zero),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "warmup_fraction": (0 <= self.warmup_fraction < 1, "in [0, 1)"),
            "max_grad_norm": (self.max_grad_norm > 0, above_zero),
            "ema_decay": (self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1, or None"),
            "mixed_precision": (self.mixed_precision in (None, "bf16", "fp16"), '"bf16", "fp16" or None'),
        }
        for name, (holds, wanted) in limits.items():
            if not holds:
                raise ConfigError(f"QVGenConfig: {name} must be {wanted}, got {getattr(self, name)!r}.")

    def _check_formats(self) -> None:
        body = self.layer_scheme
        for name, scheme in (("scheme", body), ("modulation_scheme", self.layer_modulation_scheme)):
            if scheme is not None:
                _check_trainable(name, scheme)
        if self.weight_zero in (WeightZero.FLOAT, WeightZero.INT) and body.activation is not None:
            raise ConfigError(
                f"QVGenConfig: weight_zero={self.weight_zero.value!r} needs a format that leaves inputs alone, got "
                f"{body.name}. Integer products take symmetric weights only, and with a zero point the layer would be "
                'multiplied in floats. Use weight_zero="symmetric", or "w4a16".'
            )

    @property
    def layer_scheme(self) -> Scheme:
        """Format of the layers inside blocks."""
        return _with_zero(parse_scheme(self.scheme), self.weight_zero)

    @property
    def layer_modulation_scheme(self) -> Scheme | None:
        """Format of modulation and timestep projections; None keeps them dense."""
        if self.modulation_scheme is None:
            return self.layer_scheme if self.quantize_all else None
        return parse_scheme(self.modulation_scheme)

    @property
    def has_phi(self) -> bool:
        """Layers have a branch."""
        return self.method is TrainingMethod.QVGEN

    @property
    def smallest_rank(self) -> int:
        """``last_rank`` as a number."""
        return max(1, int(1 / self.decay_ratio)) if isinstance(self.last_rank, str) else self.last_rank

    @property
    def spec(self) -> QuantizationSpec:
        """The same request as the rest of the package puts it, its codes being learned."""
        body = self.layer_scheme
        return QuantizationSpec(
            scheme=body,
            modulation_scheme=self.layer_modulation_scheme or body,
            algorithm=TrainedConfig(self.method.value),
            modules_to_not_convert=self.modules_to_not_convert,
            seed=self.seed,
            end_scheme=body if self.quantize_all else None,
        )

    @property
    def summary(self) -> str:
        """In a few words, for plans."""
        return f"{self.layer_scheme.name} by {self.spec.algorithm.summary}, {self.max_train_steps} steps"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; :meth:`from_dict` reads it."""
        plain = {name: value.value if isinstance(value, Enum) else value for name, value in asdict(self).items()}
        for name in ("scheme", "modulation_scheme"):
            value = getattr(self, name)
            plain[name] = value.to_dict() if isinstance(value, Scheme) else value
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QVGenConfig:
        """Read :meth:`to_dict`. Raises ConfigError for an unknown field."""
        return cls(**known_fields(cls, data))


def _pair(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(v, int | float) for v in value):
        raise ConfigError(f"QVGenConfig: {name} are two numbers, got {value!r}.")
    return float(value[0]), float(value[1])


def _with_zero(scheme: Scheme, zero: WeightZero | None) -> Scheme:
    if zero is None or not scheme.weight.format.is_integer:
        return scheme
    if zero is WeightZero.SYMMETRIC:
        return scheme.replace(weight_symmetric=True, weight_float_zero_point=False, weight_additive_zero_point=False)
    if isinstance(scheme.weight.granularity, TwoLevel):
        return scheme
    return scheme.replace(
        weight_symmetric=False,
        weight_float_zero_point=zero is WeightZero.FLOAT,
        weight_scale_rule=ScaleRule.AMAX_OVER_QMAX,
    )


def _check_trainable(name: str, scheme: Scheme) -> None:
    weight, act = scheme.weight, scheme.activation
    problem = None
    if not weight.format.is_integer:
        problem = "integer weights, whose step is learned"
    elif weight.additive_zero_point:
        problem = "zero points among the codes (additive_zero_point=False)"
    elif isinstance(weight.granularity, PerInputGroup):
        problem = "scales that rows do not share: PerChannel() or PerGroup()"
    elif isinstance(weight.granularity, Bilevel):
        problem = "one scale for each group (PerGroup)"
    elif act is not None and act.outlier_threshold is not None:
        problem = "inputs without an outlier_threshold"
    elif scheme.input_rotation is not None:
        problem = "inputs that are not rotated (input_rotation=None)"
    elif act is not None and not (act.dynamic and isinstance(act.granularity, PerToken)):
        problem = "inputs with a dynamic scale per token: ActivationScheme(..., PerToken())"
    if problem is not None:
        raise ConfigError(f'QVGenConfig: {name} needs {problem}, got {scheme.name}. Use "w4a4" or "w4a16".')
