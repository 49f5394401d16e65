"""The named quantization presets and what each of them resolves to."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffuse_compress.errors import ConfigError, nearest
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    NumberFormat,
    PerChannel,
    PerGroup,
    PerToken,
    Scheme,
    TwoLevel,
    WeightScheme,
)

__all__ = ["PRESETS", "QuantizationPreset", "resolve_preset"]

_INT8_WEIGHT = WeightScheme(NumberFormat.INT8, PerChannel())
_INT4_TWO_LEVEL = WeightScheme(NumberFormat.INT4, TwoLevel())
_INT4_GROUP_ASYMMETRIC = WeightScheme(NumberFormat.INT4, PerGroup(128, pad=True), symmetric=False)
_INT8_PER_TOKEN = ActivationScheme(NumberFormat.INT8, PerToken())

_W8A16 = Scheme(_INT8_WEIGHT)
_W4A16 = Scheme(_INT4_GROUP_ASYMMETRIC)


@dataclass(frozen=True)
class QuantizationPreset:
    """A name for schemes that fit together.

    Attributes:
        name: what users write.
        scheme: format of every layer inside the model's blocks.
        modulation_scheme: format of modulation and timestep projections. They see one row per sample, so their
            cost is reading the weight: weight-only formats lose nothing there and keep their inputs exact.
        algorithm: how codes are chosen without calibration data.
        summary: one line for ``diffuse-compress info`` and the README.
        needs_calibration: why plain rounding is not offered under this name, or None.
        aliases: other spellings.
    """

    name: str
    scheme: Scheme
    modulation_scheme: Scheme
    summary: str
    algorithm: AlgorithmConfig = field(default_factory=RTNConfig)
    needs_calibration: str | None = None
    aliases: tuple[str, ...] = ()


PRESETS: dict[str, QuantizationPreset] = {
    preset.name: preset
    for preset in (
        QuantizationPreset(
            "w8a8",
            Scheme(_INT8_WEIGHT, _INT8_PER_TOKEN),
            _W8A16,
            "int8 weights (per channel) and activations (per token, dynamic); the fastest on CPUs",
            aliases=("int8", "int8_dynamic", "int8dq", "w8a8_int8"),
        ),
        QuantizationPreset(
            "fp8",
            Scheme(
                WeightScheme(NumberFormat.FLOAT8_E4M3, PerChannel()),
                ActivationScheme(NumberFormat.FLOAT8_E4M3, PerToken()),
            ),
            Scheme(WeightScheme(NumberFormat.FLOAT8_E4M3, PerChannel())),
            "float8 e4m3 weights (per channel) and activations (per token, dynamic); weight-only without an fp8 matmul",
            aliases=("float8", "fp8_dynamic", "fp8dq", "fp8_row", "float8_e4m3fn", "w8a8_fp8"),
        ),
        QuantizationPreset(
            "w8a16",
            _W8A16,
            _W8A16,
            "int8 weights (per channel), activations untouched; half the memory at almost no loss",
            aliases=("int8wo", "int8_weight_only", "w8"),
        ),
        QuantizationPreset(
            "w4a16",
            _W4A16,
            _W4A16,
            "int4 weights (asymmetric, groups of 128), activations untouched; a quarter of the memory",
            aliases=("int4", "int4wo", "int4_weight_only", "w4"),
        ),
        QuantizationPreset(
            "w4a8",
            Scheme(_INT4_TWO_LEVEL, _INT8_PER_TOKEN),
            _W4A16,
            "int4 weights (two-level scales per 128 columns) with int8 activations (per token, dynamic)",
            aliases=("int4a8", "w4a8_int8"),
        ),
        QuantizationPreset(
            "w4a4",
            Scheme(_INT4_TWO_LEVEL, ActivationScheme(NumberFormat.INT4, PerToken())),
            _W4A16,
            "int4 weights (two-level scales per 128 columns) with int4 activations (per token, dynamic)",
            needs_calibration=(
                "4-bit activations lose too much with plain rounding to be a default: a calibrated algorithm "
                "(smoothing or a low-rank branch) is needed"
            ),
            aliases=("int4a4", "w4a4_int4"),
        ),
    )
}


def resolve_preset(name: str) -> QuantizationPreset:
    """Preset of this name or alias, ignoring case and ``-``/``_``. Raises ConfigError listing the nearest names."""
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    for preset in PRESETS.values():
        if key == preset.name or key in preset.aliases or key.replace("_", "") == preset.name:
            return preset
    if key in _ELSEWHERE:
        raise ConfigError(f"Unknown preset {name!r}: {_ELSEWHERE[key]} Available: {', '.join(PRESETS)}")
    raise ConfigError(f"Unknown preset {name!r}; {nearest(key, PRESETS)}")


_CAST = "that is a cast, not a compression: from_pretrained(..., dtype=torch.{})."
_ELSEWHERE = {
    **{word: _CAST.format("bfloat16") for word in ("bf16", "bfloat16")},
    **{word: _CAST.format("float16") for word in ("fp16", "float16", "half")},
    **{word: 'a format of bitsandbytes. The int4 preset is "w4a16".' for word in ("nf4", "fp4", "bnb_4bit")},
    **{
        word: 'a format that this release does not have. For speed on this GPU take "fp8".'
        for word in ("nvfp4", "mxfp4")
    },
}
"""Words users bring from elsewhere, and what to do instead."""
