"""What a number format is: bits, granularity, symmetry, static or dynamic.

A :class:`Scheme` says how a layer's weight is stored and, if its inputs are quantized too, how. It knows no
tensor, no device and no model; ``to_dict`` is the vocabulary of compressed-tensors' ``QuantizationScheme``
("weights", "input_activations", "num_bits", "strategy", ...) with additions of ours, each under its own key:
``scale_rule``, ``pad``, ``float_zero_point``, ``additive_zero_point``, ``input_rotation``, ``outlier_threshold`` and
the strategies ``two_level``, ``bilevel`` and ``input_group`` (with ``rows``).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from diffuse_compress.errors import ConfigError, IncompatibleShapeError, nearest
from diffuse_compress.quantization.rotation import is_rotation_size

__all__ = [
    "ActivationScheme",
    "Bilevel",
    "Granularity",
    "NumberFormat",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerInputGroup",
    "PerTensor",
    "PerToken",
    "ScaleRule",
    "Scheme",
    "TwoLevel",
    "WeightScheme",
]

GROUP_SIZES = (32, 64, 128)
BLOCK_SIZE = 128
TWO_LEVEL_GROUP_SIZE = 128
TWO_LEVEL_MAX_GROUP_SCALE = 16
BILEVEL_GROUP_SIZES = (8, 16, 32)
BILEVEL_GROUPS = 16
"""Groups of a row whose scales are codes of one grid, in bilevel formats."""
BILEVEL_MAX_CODE = 15


class NumberFormat(str, Enum):
    """Storage type of one element. Integers are signed two's complement.

    Attributes:
        bits: of one element.
        is_integer: False for float8.
        qmin: smallest integer code, e.g. -8 for int4 (integers only).
        qmax: largest integer code, e.g. 7 for int4 (integers only).
    """

    INT8 = "int8"
    INT4 = "int4"
    INT3 = "int3"
    INT2 = "int2"
    FLOAT8_E4M3 = "float8_e4m3fn"

    bits: int
    is_integer: bool
    qmin: int
    qmax: int

    def __init__(self, name: str | None) -> None:
        # Plain attributes: layers read them at every call.
        self.bits = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "float8_e4m3fn": 8}[str(name)]
        self.is_integer = name != "float8_e4m3fn"
        self.qmin = -(1 << (self.bits - 1))
        self.qmax = (1 << (self.bits - 1)) - 1


class ScaleRule(str, Enum):
    """How a symmetric integer scale follows from the range of the values (three rules coexist in the field)."""

    AMAX_OVER_QMAX = "amax_over_qmax"
    """amax / (2**(b-1) - 1); codes stay in [-qmax, qmax]. LLMC's rule."""
    AMAX_OVER_HALF_RANGE = "amax_over_half_range"
    """amax / ((2**b - 1) / 2), e.g. amax/7.5 for int4; torchao SYMMETRIC and compressed-tensors."""
    MIN_MAX_NO_CLIP = "min_max_no_clip"
    """max(min / qmin, max / qmax): the smallest scale that clips nothing; torchao SYMMETRIC_NO_CLIPPING_ERR."""


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: scale [1, 1]."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per output row of the weight: scale [N, 1]."""


@dataclass(frozen=True)
class PerToken:
    """One scale per row of the input (every leading index); for a convolution, per sample."""


@dataclass(frozen=True)
class PerGroup:
    """One scale per ``group_size`` consecutive columns: scale [N, ceil(K / group_size)].

    Args:
        group_size: 32, 64 or 128.
        pad: let the last group of a row be shorter when ``group_size`` does not divide in_features (it is
            filled with zeros in the packed layout, which is exact). False raises instead.
    """

    group_size: int = 128
    pad: bool = False

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(f"PerGroup: group_size must be one of {GROUP_SIZES}, got {self.group_size}.")


@dataclass(frozen=True)
class PerInputGroup:
    """One scale per input channel and ``rows`` consecutive output rows: scale [K, ceil(N / rows)].

    A column whose weights are larger or smaller than the others' has scales of its own, where PerGroup makes it share
    them with its neighbours. The last group may be shorter. Source: Heo et al. 2023, "Rethinking Channel Dimensions to
    Isolate Outliers for Low-bit Weight Quantization of Large Language Models", arXiv 2309.15531, section 3.
    """

    rows: int = 128

    def __post_init__(self) -> None:
        if self.rows not in GROUP_SIZES:
            raise ConfigError(f"PerInputGroup: rows must be one of {GROUP_SIZES}, got {self.rows}.")


@dataclass(frozen=True)
class TwoLevel:
    """fp32 scale per row times an integer 1..16 per 128 columns; int8 arithmetic stays exact.

    ``w = scale[n] * group_scale[n, g] * q`` with q in [-7, 7], so ``|group_scale * q| <= 112`` fits int8 and a
    GEMM over the products returns exact int32 sums. Source: the progressive quantization of QServe (Lin et al.
    2024, arXiv 2405.04532, section 4.1), with the symmetric code range and power-free integer scales described
    in this project's kernel notes.
    """

    group_size: int = TWO_LEVEL_GROUP_SIZE

    def __post_init__(self) -> None:
        if self.group_size != TWO_LEVEL_GROUP_SIZE:
            raise ConfigError(f"TwoLevel: group_size must be {TWO_LEVEL_GROUP_SIZE}, got {self.group_size}.")


@dataclass(frozen=True)
class Bilevel:
    """Small groups, whose scale and zero point take one byte: ``scale[n, g] = base[n, b] + step[n, b] * c[n, g]``.

    ``c`` is a 4-bit code, ``b = g // 16`` counts runs of 16 groups of a row with an fp32 ``base`` and ``step`` of their
    own, and the other half of the byte is the zero point, an integer in the range of the weight's codes. In groups of
    16 that is 0.75 bits per weight, where :class:`PerGroup` would take 2.5. The last group and run may be shorter.

    Source: Dettmers et al. 2023, "SpQR", arXiv 2306.03078, section 4.1; differs: zero points, which are codes of 2 to 4
    bits as they are, are kept exactly, and scales have 4 bits instead of 3, so that a byte holds both.

    Args:
        group_size: 8, 16 or 32 consecutive columns.
    """

    group_size: int = 16

    def __post_init__(self) -> None:
        if self.group_size not in BILEVEL_GROUP_SIZES:
            raise ConfigError(f"Bilevel: group_size must be one of {BILEVEL_GROUP_SIZES}, got {self.group_size}.")


@dataclass(frozen=True)
class PerBlock:
    """One scale per block of 128 rows by 128 columns: scale [ceil(N / 128), ceil(K / 128)]; float8 weights only.

    Blocks at the right and lower edge may be smaller. Inputs beside it have one scale per row and 128 columns,
    ``PerGroup(128)``. Source: DeepSeek-V3 (arXiv 2412.19437, section 3.3); ``FP8_BLOCK`` of llm-compressor,
    ``weight_block_size=[128, 128]`` of transformers.
    """

    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        if self.block_size != BLOCK_SIZE:
            raise ConfigError(f"PerBlock: block_size must be {BLOCK_SIZE}, got {self.block_size}.")

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.block_size

    def num_blocks(self, rows: int) -> int:
        """Rows of the scale of a weight with ``rows`` rows."""
        return -(-rows // self.block_size)


Granularity: TypeAlias = PerTensor | PerChannel | PerGroup | PerBlock | PerInputGroup | PerToken | TwoLevel | Bilevel

_STRATEGY: dict[type, str] = {
    PerTensor: "tensor",
    PerChannel: "channel",
    PerGroup: "group",
    PerInputGroup: "input_group",
    PerBlock: "block",
    PerToken: "token",
    TwoLevel: "two_level",
    Bilevel: "bilevel",
}


@dataclass(frozen=True)
class WeightScheme:
    """How a weight [N, K] is stored.

    Args:
        format: element type.
        granularity: PerTensor, PerChannel, PerGroup, PerBlock, PerInputGroup, TwoLevel or Bilevel.
        symmetric: False stores a ``zero_point`` of ``scale``'s shape; ``w = scale * (q - zero_point)``.
        scale_rule: the symmetric rule; asymmetric, float8 and two-level formats have one rule and refuse another.
        float_zero_point: keep ``zero_point`` in fp32 instead of rounding it to int8 (HQQ).
        additive_zero_point: ``w = scale * q + zero_point``, with ``zero_point`` in fp32: the minimum of GGUF's Q4_1,
            the scaled zeros of AWQ kernels. Neither is a multiple of ``scale``, so no other form holds it exactly.
    """

    format: NumberFormat
    granularity: Granularity = PerChannel()
    symmetric: bool = True
    scale_rule: ScaleRule = ScaleRule.AMAX_OVER_QMAX
    float_zero_point: bool = False
    additive_zero_point: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", NumberFormat(self.format))
        object.__setattr__(self, "scale_rule", ScaleRule(self.scale_rule))
        if isinstance(self.granularity, PerToken):
            raise ConfigError(
                "WeightScheme: a weight has no tokens; use PerTensor, PerChannel, PerGroup, PerBlock or TwoLevel."
            )
        grouped = isinstance(self.granularity, PerGroup | PerInputGroup)
        if isinstance(self.granularity, Bilevel) and (
            self.format.bits > 4 or self.symmetric or self.float_zero_point or self.additive_zero_point
        ):
            raise ConfigError(
                "WeightScheme: Bilevel needs int4, int3 or int2 with integer zero points (symmetric=False), got "
                f"{self.format.value}, symmetric={self.symmetric}. For 8 bits use PerChannel() or PerGroup()."
            )
        if isinstance(self.granularity, TwoLevel) and (self.format is not NumberFormat.INT4 or not self.symmetric):
            raise ConfigError(f"WeightScheme: TwoLevel needs symmetric int4, got {self.format.value}.")
        if not self.format.is_integer and (not self.symmetric or grouped):
            raise ConfigError("WeightScheme: float8 weights are symmetric, per tensor, per channel or per block.")
        if isinstance(self.granularity, PerBlock) and self.format.is_integer:
            raise ConfigError(f"WeightScheme: PerBlock is for float8 weights, got {self.format.value}. Use PerGroup.")
        if self.scale_rule is not ScaleRule.AMAX_OVER_QMAX and (
            not self.format.is_integer or not self.symmetric or isinstance(self.granularity, TwoLevel)
        ):
            raise ConfigError(
                f"WeightScheme: scale_rule={self.scale_rule.value!r} needs symmetric integers, per tensor, channel or "
                "group. Leave it out."
            )
        if self.float_zero_point and self.symmetric:
            raise ConfigError("WeightScheme: float_zero_point=True needs symmetric=False.")
        if self.additive_zero_point and (self.symmetric or self.float_zero_point):
            raise ConfigError(
                "WeightScheme: additive_zero_point=True needs symmetric=False and float_zero_point=False: it is a form "
                "of its own, in fp32 already."
            )

    @property
    def stores_float_zero_point(self) -> bool:
        """True if ``zero_point`` is fp32, False if it is int8 or absent."""
        return self.float_zero_point or self.additive_zero_point

    @property
    def transposed(self) -> WeightScheme | None:
        """Of PerInputGroup, the scheme in which the transposed weight [K, N] has the same scales; else None."""
        if not isinstance(self.granularity, PerInputGroup):
            return None
        return dataclasses.replace(self, granularity=PerGroup(self.granularity.rows, pad=True))

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Of the scales of a weight [N, K]."""
        rows, columns = shape
        if isinstance(self.granularity, PerInputGroup):
            return columns, -(-rows // self.granularity.rows)
        if isinstance(self.granularity, PerTensor):
            return 1, 1
        if isinstance(self.granularity, PerBlock):
            return self.granularity.num_blocks(rows), self.num_groups(columns)
        if isinstance(self.granularity, Bilevel):  # a base and a step for each run of groups
            return rows, 2 * -(-self.num_groups(columns) // BILEVEL_GROUPS)
        return rows, self.num_groups(columns) if isinstance(self.granularity, PerGroup) else 1

    @property
    def group_size(self) -> int | None:
        """Columns per scale, or None when it is not a run of columns that shares one."""
        return getattr(self.granularity, "group_size", None)

    def num_groups(self, in_features: int) -> int:
        """Scales per row for a weight with ``in_features`` columns."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)

    @property
    def range(self) -> tuple[int, int]:
        """(lowest, highest) integer code this scheme uses."""
        fmt = self.format
        full = not self.symmetric or self.scale_rule is not ScaleRule.AMAX_OVER_QMAX
        return (fmt.qmin if full else -fmt.qmax, fmt.qmax)

    def check_shape(self, name: str, in_features: int) -> None:
        """Raise :class:`IncompatibleShapeError` if rows of ``in_features`` columns cannot be stored so."""
        gran = self.granularity
        if isinstance(gran, PerGroup) and not gran.pad and in_features % gran.group_size:
            fits = [size for size in GROUP_SIZES if in_features % size == 0]
            use = f"Use group_size={fits[-1]}, pad=True" if fits else "Use pad=True"
            raise IncompatibleShapeError(
                f"{name}: {self.format.value} weights with group_size={gran.group_size} need in_features divisible "
                f"by {gran.group_size}, got in_features={in_features}. {use}, "
                f'or modules_to_not_convert=["{name}"].'
            )


@dataclass(frozen=True)
class ActivationScheme:
    """How a layer's input is quantized.

    Args:
        format: int8, int4 or int3 (held in an int8 container at run time) or float8_e4m3fn.
        granularity: PerTensor, PerToken, or PerGroup(128): per row and 128 columns, dynamic float8 only, for weights
            PerBlock(); its last group may be shorter.
        dynamic: True measures the scale on every call; False stores ``input_scale`` [1] (PerTensor only).
        symmetric: False adds ``input_zero_point``; static int8 only.
        outlier_threshold: input columns with a magnitude of this or more in any row of a call are left out of the
            int8 product and multiplied in the layer's dtype (LLM.int8); None leaves none out. Dynamic int8 per token
            of linear layers with int8 weights per channel or tensor, whose columns can be dequantized one by one.
    """

    format: NumberFormat
    granularity: Granularity = PerToken()
    dynamic: bool = True
    symmetric: bool = True
    outlier_threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", NumberFormat(self.format))
        if self.format is NumberFormat.INT2:
            raise ConfigError(
                f"ActivationScheme: format must be int8, int4, int3 or float8_e4m3fn, got {self.format.value}."
            )
        if isinstance(self.granularity, PerGroup):
            if self.format.is_integer or self.granularity.group_size != BLOCK_SIZE:
                raise ConfigError(
                    f"ActivationScheme: groups of inputs are float8, of {BLOCK_SIZE} columns, got "
                    f"{self.format.value} in groups of {self.granularity.group_size}. Use PerToken()."
                )
            # Rows of inputs are never packed: whether the last group is full makes no difference.
            object.__setattr__(self, "granularity", PerGroup(BLOCK_SIZE))
        elif not isinstance(self.granularity, PerTensor | PerToken):
            raise ConfigError("ActivationScheme: granularity must be PerTensor, PerToken or PerGroup(128).")
        if not self.dynamic and not isinstance(self.granularity, PerTensor):
            raise ConfigError("ActivationScheme: static scales are per tensor; use granularity=PerTensor().")
        if not self.symmetric and (self.dynamic or self.format is not NumberFormat.INT8):
            raise ConfigError("ActivationScheme: symmetric=False needs dynamic=False and format int8.")
        threshold = self.outlier_threshold
        if threshold is None:
            return
        if not (isinstance(threshold, int | float) and math.isfinite(threshold) and threshold >= 0):
            raise ConfigError(
                f"ActivationScheme: outlier_threshold must be a finite number >= 0, got {threshold!r}. None has no "
                "outliers."
            )
        if self.format is not NumberFormat.INT8 or not self.dynamic or not isinstance(self.granularity, PerToken):
            raise ConfigError("ActivationScheme: outlier_threshold needs dynamic int8 inputs, one scale per token.")
        object.__setattr__(self, "outlier_threshold", float(threshold))


@dataclass(frozen=True)
class Scheme:
    """The number formats of one layer: its weight's and, if quantized, its input's.

    Args:
        weight: how the weight is stored.
        activation: how the input is quantized; None leaves it alone.
        input_rotation: size of the Hadamard rotation (``rotation.py``) that the input runs through before it is
            quantized and multiplied; codes are those of the weight rotated alike. Linear layers only.
    """

    weight: WeightScheme
    activation: ActivationScheme | None = None
    input_rotation: int | None = None
    has_integer_path: bool = dataclasses.field(init=False, repr=False, compare=False)
    """True when the product can be summed exactly in int32: scales sit outside the sum over K."""

    def __post_init__(self) -> None:
        weight, act = self.weight, self.activation
        per_row = isinstance(weight.granularity, PerTensor | PerChannel | TwoLevel)
        exact = act is not None and weight.format.is_integer and weight.symmetric and per_row
        object.__setattr__(self, "has_integer_path", exact)
        if act is not None and weight.format.is_integer != act.format.is_integer:
            raise ConfigError(
                f"Scheme: {weight.format.value} weights with {act.format.value} activations have no matmul. "
                "Use two integer formats, two float8 formats, or activation=None."
            )
        if act is not None and act.outlier_threshold is not None:
            if not (exact and weight.format is NumberFormat.INT8) or self.input_rotation is not None:
                raise ConfigError(
                    "Scheme: outlier_threshold needs symmetric int8 weights, per channel or tensor, and inputs that "
                    'are not rotated: take the weights of "w8a8".'
                )
        if act is not None and isinstance(act.granularity, PerGroup) and not isinstance(weight.granularity, PerBlock):
            raise ConfigError(
                "Scheme: inputs with a scale per 128 columns go with weights in blocks. Use WeightScheme(..., "
                "PerBlock()), or PerToken() inputs."
            )
        if self.input_rotation is not None and not is_rotation_size(self.input_rotation):
            raise ConfigError(
                f"Scheme: input_rotation must be the order of a Hadamard matrix, got {self.input_rotation!r}. Use a "
                "power of two that divides in_features."
            )

    @property
    def name(self) -> str:
        """Short label: ``w4a8``, ``fp8-block``, ``w8a8-static``; for people, not for identity (compare objects)."""
        static = "-static" if self.has_static_inputs else ""
        if not self.weight.format.is_integer:
            form = {PerTensor: "fp8-tensor", PerBlock: "fp8-block"}.get(type(self.weight.granularity), "fp8")
            return f"{form}{static}" if self.activation is not None else f"{form}-weight-only"
        act = 16 if self.activation is None else self.activation.format.bits
        return f"w{self.weight.format.bits}a{act}{static}"

    @property
    def has_static_inputs(self) -> bool:
        """Inputs are quantized with a scale that was found on calibration data."""
        return self.activation is not None and not self.activation.dynamic

    @property
    def input_bytes(self) -> int:
        """Bytes of the static scale and zero point of the input."""
        if self.activation is None or self.activation.dynamic:
            return 0
        return 4 if self.activation.symmetric else 5

    def with_dynamic_inputs(self) -> Scheme:
        """The same with a scale per token, measured on every call, instead of a static one."""
        if self.activation is None or self.activation.dynamic:
            return self
        return dataclasses.replace(self, activation=ActivationScheme(self.activation.format, PerToken()))

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits per element of a weight [N, K], scales, zero points and padding included."""
        return 8 * self.weight_bytes(shape) / (shape[0] * shape[1])

    def weight_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of ``qweight`` and its qparams for a weight [N, K]; exact, as written to disk."""
        rows, cols = shape
        weight = self.weight
        bits = weight.format.bits
        stored_row = cols if bits == 8 else -(-cols // 128) * 16 * bits
        gran = weight.granularity
        num_scales = math.prod(weight.scale_shape(shape))
        total = rows * stored_row + 4 * num_scales
        if isinstance(gran, TwoLevel | Bilevel):
            total += rows * weight.num_groups(cols)
        if not weight.symmetric and not isinstance(gran, Bilevel):  # its zero points share a byte with the scales
            total += num_scales * (4 if weight.stores_float_zero_point else 1)
        return total

    def to_dict(self) -> dict[str, Any]:
        """JSON-able description in compressed-tensors' vocabulary; inverse of :meth:`from_dict`."""
        weights = _args_to_dict(self.weight.format, self.weight.granularity, self.weight.symmetric, dynamic=False)
        if self.weight.format.is_integer and self.weight.symmetric:
            weights["scale_rule"] = self.weight.scale_rule.value
        for name in ("float_zero_point", "additive_zero_point"):
            if getattr(self.weight, name):
                weights[name] = True
        act = self.activation
        inputs = None if act is None else _args_to_dict(act.format, act.granularity, act.symmetric, dynamic=act.dynamic)
        if inputs is not None and act is not None and act.outlier_threshold is not None:
            inputs["outlier_threshold"] = act.outlier_threshold
        data: dict[str, Any] = {"weights": weights, "input_activations": inputs}
        if self.input_rotation is not None:
            data["input_rotation"] = f"{_ROTATION}{self.input_rotation}"
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scheme:
        """Read :meth:`to_dict`'s output. Raises ConfigError on an unknown key or strategy."""
        known = {"weights", "input_activations", "output_activations", "targets", "format", "input_rotation"}
        unknown = set(data) - known
        if unknown or not isinstance(data.get("weights"), dict):
            raise ConfigError(f"Scheme.from_dict: need 'weights' and 'input_activations', got keys {sorted(data)}.")
        weights = dict(data["weights"])
        weight = WeightScheme(
            scale_rule=_scale_rule_from(weights.pop("scale_rule", ScaleRule.AMAX_OVER_QMAX.value)),
            float_zero_point=bool(weights.pop("float_zero_point", False)),
            additive_zero_point=bool(weights.pop("additive_zero_point", False)),
            **_args_from_dict(weights),
        )
        inputs = data.get("input_activations")
        act = None
        if inputs is not None:
            inputs = dict(inputs)
            dynamic, threshold = bool(inputs.get("dynamic", False)), inputs.pop("outlier_threshold", None)
            act = ActivationScheme(dynamic=dynamic, outlier_threshold=threshold, **_args_from_dict(inputs))
        return cls(weight, act, _rotation_from(data.get("input_rotation")))

    def replace(self, **changes: Any) -> Scheme:
        """Copy with fields of this object, or of ``weight`` (prefix ``weight_``), replaced."""
        weight = {key.removeprefix("weight_"): val for key, val in changes.items() if key.startswith("weight_")}
        own = {key: val for key, val in changes.items() if not key.startswith("weight_")}
        if weight:
            own["weight"] = dataclasses.replace(own.get("weight", self.weight), **weight)
        return dataclasses.replace(self, **own)


def _args_to_dict(fmt: NumberFormat, granularity: Granularity, symmetric: bool, dynamic: bool) -> dict[str, Any]:
    args: dict[str, Any] = {
        "num_bits": fmt.bits,
        "type": "int" if fmt.is_integer else "float",
        "symmetric": symmetric,
        "strategy": _STRATEGY[type(granularity)],
        "dynamic": dynamic,
    }
    if isinstance(granularity, PerGroup | TwoLevel | Bilevel):
        args["group_size"] = granularity.group_size
    if isinstance(granularity, PerInputGroup):
        args["rows"] = granularity.rows
    if isinstance(granularity, PerBlock):
        args["block_structure"] = [granularity.block_size] * 2
    if isinstance(granularity, PerGroup) and granularity.pad:
        args["pad"] = True
    return args


_ROTATION = "hadamard:"


def _rotation_from(text: Any) -> int | None:
    if text is None:
        return None
    size = str(text).removeprefix(_ROTATION)
    if not str(text).startswith(_ROTATION) or not size.isdecimal():
        raise ConfigError(f"Scheme.from_dict: input_rotation must read '{_ROTATION}<size>', got {text!r}.")
    return int(size)


def _scale_rule_from(name: str) -> ScaleRule:
    try:
        return ScaleRule(name)
    except ValueError:
        rules = [rule.value for rule in ScaleRule]
        raise ConfigError(f"Scheme.from_dict: unknown scale_rule {name!r}; {nearest(str(name), rules)}") from None


def _args_from_dict(args: dict[str, Any]) -> dict[str, Any]:
    by_name = {name: kind for kind, name in _STRATEGY.items()}
    strategy = args.pop("strategy", None)
    if strategy not in by_name:
        raise ConfigError(f"Scheme.from_dict: unknown strategy {strategy!r}; {nearest(str(strategy), by_name)}")
    kind = by_name[strategy]
    # compressed-tensors writes group_size=None where a strategy has none.
    options = {key: args.pop(key) for key in ("group_size", "pad", "rows") if key in args}
    options = {key: value for key, value in options.items() if value is not None}
    block = args.pop("block_structure", None)
    if strategy == "block" and block is not None:
        if list(block) != [BLOCK_SIZE] * 2:
            raise ConfigError(f"Scheme.from_dict: block_structure must be [{BLOCK_SIZE}, {BLOCK_SIZE}], got {block}.")
    unfit = set(options) - {field.name for field in dataclasses.fields(kind)}
    if unfit:
        raise ConfigError(f"Scheme.from_dict: strategy {strategy!r} has no {' or '.join(sorted(unfit))}.")
    bits, type_ = args.pop("num_bits", None), args.pop("type", "int")
    symmetric = bool(args.pop("symmetric", True))
    args.pop("dynamic", None)
    if args:
        raise ConfigError(f"Scheme.from_dict: unknown keys {sorted(args)}.")
    name = {"int": f"int{bits}", "float": "float8_e4m3fn" if bits == 8 else ""}.get(type_)
    if name not in {fmt.value for fmt in NumberFormat}:
        raise ConfigError(f"Scheme.from_dict: no format of num_bits={bits}, type={type_!r}.")
    return {"format": NumberFormat(name), "granularity": kind(**options), "symmetric": symmetric}
