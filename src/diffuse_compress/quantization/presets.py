"""The named quantization presets and what each of them resolves to."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffuse_compress.errors import ConfigError, nearest
from diffuse_compress.quantization.algorithms.awq import AWQConfig
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, SequenceConfig
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.algorithms.quarot import QuaRotConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.svdquant import SVDQuantConfig
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    NumberFormat,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
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
_W8A8 = Scheme(_INT8_WEIGHT, _INT8_PER_TOKEN)
_W4A8 = Scheme(_INT4_TWO_LEVEL, _INT8_PER_TOKEN)
_FP8_WEIGHT_ONLY = Scheme(WeightScheme(NumberFormat.FLOAT8_E4M3, PerChannel()))
_FP8 = Scheme(_FP8_WEIGHT_ONLY.weight, ActivationScheme(NumberFormat.FLOAT8_E4M3, PerToken()))
_FP8_TENSOR = Scheme(
    WeightScheme(NumberFormat.FLOAT8_E4M3, PerTensor()), ActivationScheme(NumberFormat.FLOAT8_E4M3, PerTensor())
)
_FP8_BLOCK = Scheme(
    WeightScheme(NumberFormat.FLOAT8_E4M3, PerBlock()), ActivationScheme(NumberFormat.FLOAT8_E4M3, PerGroup(128))
)
_W4A4 = Scheme(_INT4_TWO_LEVEL, ActivationScheme(NumberFormat.INT4, PerToken()))

_AWQ_GPTQ = SequenceConfig((AWQConfig(), GPTQConfig()))
# Convolutions are not rotated, and have the branch alone.
_QUAROT_SVDQUANT = SequenceConfig((QuaRotConfig(), SVDQuantConfig()))
# Group sizes are worth bits as well: int4 in groups of 32 takes 5.25 with its scales. 2 bits in groups of 32 and 3 bits
# in groups of 32 are left out: about as large as a bit more in groups of 128, and worse.
_WEIGHT_ONLY = (
    *(
        Scheme(WeightScheme(number_format, PerGroup(size, pad=True), symmetric=False))
        for number_format, sizes in (
            (NumberFormat.INT2, (64,)),
            (NumberFormat.INT3, (128, 64)),
            (NumberFormat.INT4, (128, 64, 32)),
        )
        for size in sizes
    ),
    _W8A16,
)


@dataclass(frozen=True)
class QuantizationPreset:
    """A name for schemes that fit together.

    Attributes:
        name: what users write.
        scheme: format of every layer inside the model's blocks.
        modulation_scheme: format of modulation and timestep projections. They see one row per sample, so their
            cost is reading the weight: weight-only formats lose nothing there and keep their inputs exact.
        algorithm: how codes are chosen without calibration data: the best measured in this family.
        calibrated: how they are chosen with it: likewise (docs/calibration.md).
        mixed: formats of the same kernels that a search under a size mixes, for the layers that get ``scheme``.
        mixed_modulation: likewise for those that get ``modulation_scheme``.
        summary: one line for ``diffuse-compress info`` and the README.
        needs_calibration: why plain rounding is not offered under this name, or None.
        aliases: other spellings.
    """

    name: str
    scheme: Scheme
    modulation_scheme: Scheme
    summary: str
    calibrated: AlgorithmConfig
    mixed: tuple[Scheme, ...]
    mixed_modulation: tuple[Scheme, ...] = _WEIGHT_ONLY
    algorithm: AlgorithmConfig = field(default_factory=RTNConfig)
    needs_calibration: str | None = None
    aliases: tuple[str, ...] = ()


PRESETS: dict[str, QuantizationPreset] = {
    preset.name: preset
    for preset in (
        QuantizationPreset(
            "w8a8",
            _W8A8,
            _W8A16,
            "int8 weights (per channel) and activations (per token, dynamic); the fastest on CPUs",
            calibrated=_AWQ_GPTQ,
            mixed=(_W4A8, _W8A8),
            aliases=("int8", "int8_dynamic", "int8dq", "w8a8_int8"),
        ),
        QuantizationPreset(
            "fp8",
            _FP8,
            _FP8_WEIGHT_ONLY,
            "float8 e4m3 weights (per channel) and activations (per token, dynamic); weight-only without an fp8 matmul",
            calibrated=GPTQConfig(),
            mixed=(_FP8,),
            mixed_modulation=(_FP8_WEIGHT_ONLY,),
            aliases=("float8", "fp8_dynamic", "fp8dq", "fp8_row", "fp8_channel", "float8_e4m3fn", "w8a8_fp8"),
        ),
        QuantizationPreset(
            "fp8_tensor",
            _FP8_TENSOR,
            _FP8_WEIGHT_ONLY,
            "float8 e4m3 weights and activations (per tensor, dynamic); weight-only without an fp8 matmul",
            calibrated=GPTQConfig(),
            mixed=(_FP8_TENSOR,),
            mixed_modulation=(_FP8_WEIGHT_ONLY,),
            aliases=("fp8_per_tensor", "float8_tensor", "fp8_tensorwise"),
        ),
        QuantizationPreset(
            "fp8_block",
            _FP8_BLOCK,
            _FP8_WEIGHT_ONLY,
            "float8 e4m3 weights (128x128 blocks) and activations (1x128, dynamic) of linear layers, as DeepSeek-V3",
            calibrated=GPTQConfig(),
            mixed=(_FP8_BLOCK,),
            mixed_modulation=(_FP8_WEIGHT_ONLY,),
            aliases=("fp8_blockwise", "fp8_per_block", "float8_block", "finegrained_fp8", "fine_grained_fp8"),
        ),
        QuantizationPreset(
            "w8a16",
            _W8A16,
            _W8A16,
            "int8 weights (per channel), activations untouched; half the memory at almost no loss",
            calibrated=GPTQConfig(),
            mixed=_WEIGHT_ONLY,
            aliases=("int8wo", "int8_weight_only", "w8"),
        ),
        QuantizationPreset(
            "w4a16",
            _W4A16,
            _W4A16,
            "int4 weights (asymmetric, groups of 128), activations untouched; a quarter of the memory",
            calibrated=GPTQConfig(),
            mixed=_WEIGHT_ONLY,
            aliases=("int4", "int4wo", "int4_weight_only", "w4"),
        ),
        QuantizationPreset(
            "w4a8",
            _W4A8,
            _W4A16,
            "int4 weights (two-level scales per 128 columns) with int8 activations (per token, dynamic)",
            calibrated=GPTQConfig(),
            mixed=(_W4A8, _W8A8),
            aliases=("int4a8", "w4a8_int8"),
        ),
        QuantizationPreset(
            "w4a4",
            _W4A4,
            _W4A16,
            "int4 weights (two-level scales per 128 columns) with int4 activations (per token, dynamic)",
            calibrated=_QUAROT_SVDQUANT,
            mixed=(_W4A4, _W4A8, _W8A8),
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
