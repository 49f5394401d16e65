"""Quantized keys and values of attention: how they are grouped, coded and packed.

Source: Liu et al. 2024, arXiv 2402.02750 (KIVI). A few channels of the keys are large at every token, so a scale that
spans channels is theirs: keys are grouped along the tokens, channel by channel. Values have no such channels, and a
token's error should stay in that token: they are grouped along the channels of a head, token by token. Both are
asymmetric: ``x = scale * code + minimum``.

States [B, H, T, D] are quantized in blocks of ``group_size`` tokens; every tensor of :class:`QuantizedStates` has the
blocks as its third axis, and grows along it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch

from diffuse_compress.errors import ConfigError, IncompatibleShapeError, nearest
from diffuse_compress.quantization.kv_config import KVCacheConfig

__all__ = [
    "KIVIConfig",
    "KVMethod",
    "KVScale",
    "QuantizedStates",
    "dequantize_states",
    "pack_codes",
    "quantize_states",
    "unpack_codes",
]

_BITS = (2, 4, 8)
_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
_FP16_MAX = torch.finfo(torch.float16).max


class KVMethod(str, Enum):
    """How keys are grouped. KIVI: along the tokens, channel by channel. NAIVE: like values, along the channels."""

    KIVI = "kivi"
    NAIVE = "naive"


class KVScale(str, Enum):
    """How the scale and minimum of a group are stored.

    FLOAT16 adds 32 bits to a group. FLOAT8 (e4m3, with two fp32 factors for each sequence and block) adds 16, and
    rounds a group's minimum to 3 bits of mantissa: groups of half the size cost the same.
    """

    FLOAT16 = "float16"
    FLOAT8 = "float8"


@dataclass(frozen=True)
class KIVIConfig(KVCacheConfig):
    """Quantize what attention keeps of past tokens: keys per channel, values per token, the newest in full precision.

    At 2 bits, groups of 64 with fp16 scales (the default) and groups of 32 with fp8 scales take 2.5 bits an element,
    0.156 of bf16. The paper's groups of 32 with fp16 scales take 3 bits.

    Args:
        bits: 2, 4 or 8 of a code.
        group_size: tokens that share a key's scale, and channels of a head that share a value's; a multiple of 8. Where
            heads are narrower, a group of values is a head.
        residual_length: newest tokens that stay as they are, at least; a block of ``group_size`` tokens is quantized as
            soon as there are that many more.
        method: "kivi", or "naive": keys grouped like values.
        num_sink_tokens: first tokens of a sequence that stay as they are, too. Much attention goes to them whatever
            they say (Xiao et al. 2023, arXiv 2309.17453). With padding on the left these are padding.
        scale_dtype: "float16" or "float8", see :class:`KVScale`.

    Raises:
        ConfigError: another value.

    Source: Liu et al. 2024, arXiv 2402.02750.
    """

    bits: int = 2
    group_size: int = 64
    residual_length: int = 128
    method: KVMethod = KVMethod.KIVI
    num_sink_tokens: int = 0
    scale_dtype: KVScale = KVScale.FLOAT16

    cache: ClassVar[str] = "quantized"

    def __post_init__(self) -> None:
        for name, values in (("method", KVMethod), ("scale_dtype", KVScale)):
            value = getattr(self, name)
            names = [member.value for member in values]
            if value not in names:
                raise ConfigError(f"KIVIConfig: {name}={value!r}: {nearest(str(value), names)}.")
            object.__setattr__(self, name, values(value))
        if type(self.bits) is not int or self.bits not in _BITS:
            raise ConfigError(f"KIVIConfig: bits must be 2, 4 or 8, got {self.bits!r}.")
        if type(self.group_size) is not int or self.group_size < 8 or self.group_size % 8:
            raise ConfigError(f"KIVIConfig: group_size must be a multiple of 8, got {self.group_size!r}.")
        self._require_whole(residual_length=0, num_sink_tokens=0)

    @property
    def summary(self) -> str:
        """One line."""
        parts = [f"{self.bits} bits, groups of {self.group_size}, {self.scale_dtype.value} scales"]
        parts += [f"{self.residual_length} newest tokens kept"]
        parts += [f"{self.num_sink_tokens} first tokens kept"] if self.num_sink_tokens else []
        return f"{'KIVI' if self.method is KVMethod.KIVI else 'naive'} ({', '.join(parts)})"

    def value_group(self, head_dim: int) -> int:
        """Channels of a group of values. Raises IncompatibleShapeError if heads are not whole groups of whole bytes."""
        size = min(self.group_size, head_dim)
        if head_dim % size or head_dim * self.bits % 8:
            fits = [n for n in range(8, self.group_size, 8) if head_dim % n == 0]
            remedy = f"group_size={fits[-1]} divides it" if fits else "no multiple of 8 divides it"
            raise IncompatibleShapeError(
                f"KIVIConfig: group_size={self.group_size} does not divide heads of {head_dim} channels; {remedy}."
            )
        return size

    def bits_per_element(self, head_dim: int) -> float:
        """Mean over keys and values of a quantized token, scales included; without the factors of fp8 scales."""
        extra = 32 if self.scale_dtype is KVScale.FLOAT16 else 16
        values = extra / self.value_group(head_dim)
        keys = values if self.method is KVMethod.NAIVE else extra / self.group_size
        return self.bits + (keys + values) / 2


@dataclass
class QuantizedStates:
    """Keys or values as they are kept, N blocks of g tokens.

    Attributes:
        codes: uint8 [B, H, N, g, D * bits / 8], see :func:`pack_codes`.
        scale: of the groups: [B, H, N, 1, D] along tokens, [B, H, N, g, D / channels] along channels; fp16, or the
            bytes of float8_e4m3fn as uint8 (few operations know that type).
        minimum: likewise.
        factors: fp32 [2, B, N], what fp8 scales and minima are multiplied with; None for fp16.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor
    factors: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Of each sequence."""
        return self.codes.shape[2] * self.codes.shape[3]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(part.nbytes for part in (self.codes, self.scale, self.minimum, self.factors) if part is not None)

    def append(self, other: QuantizedStates) -> QuantizedStates:
        """These blocks and then ``other``'s."""
        factors = None
        if self.factors is not None and other.factors is not None:
            factors = torch.cat([self.factors, other.factors], dim=2)
        return QuantizedStates(
            torch.cat([self.codes, other.codes], dim=2),
            torch.cat([self.scale, other.scale], dim=2),
            torch.cat([self.minimum, other.minimum], dim=2),
            factors,
        )

    def map(self, on_sequences: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedStates:
        """``on_sequences`` of every tensor, the sequences of the batch as its first axis."""
        factors = None if self.factors is None else on_sequences(self.factors.transpose(0, 1)).transpose(0, 1)
        return QuantizedStates(on_sequences(self.codes), on_sequences(self.scale), on_sequences(self.minimum), factors)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes [..., D], each below 2**bits, into bytes [..., D * bits / 8].

    A byte holds codes that are ``D * bits / 8`` apart, the first in its lowest bits: with 2 bits and D = 64, byte j
    holds j, j + 16, j + 32 and j + 48. Any device and strides; the result is contiguous.
    """
    per_byte = 8 // bits
    if per_byte == 1:
        return codes.contiguous()
    runs = codes.unflatten(-1, (per_byte, codes.shape[-1] // per_byte))
    packed: torch.Tensor = runs[..., 0, :].clone(memory_format=torch.contiguous_format)
    for i in range(1, per_byte):
        packed |= runs[..., i, :] << bits * i
    return packed


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack_codes`."""
    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    return torch.cat([(packed >> bits * i) & ((1 << bits) - 1) for i in range(per_byte)], dim=-1)


def quantize_states(states: torch.Tensor, config: KIVIConfig, *, per_channel: bool) -> QuantizedStates:
    """Quantize keys or values; computed in fp32.

    Args:
        states: [B, H, T, D] of any float dtype, device and strides, T a multiple of ``group_size``; not modified.
        config: how.
        per_channel: group along tokens, as keys; otherwise along channels, as values.

    Raises:
        IncompatibleShapeError: T or D is no multiple of its group.
    """
    batch, heads, tokens, dim = states.shape
    size = config.group_size
    channels = config.value_group(dim)
    if tokens % size:
        raise IncompatibleShapeError(f"quantize_states: need a multiple of {size} tokens, got {tokens}.")
    blocks = states.float().reshape(batch, heads, tokens // size, size, dim)
    axis = 3
    if not per_channel:
        blocks, axis = blocks.unflatten(-1, (dim // channels, channels)), -1
    low, high = blocks.aminmax(dim=axis, keepdim=True)
    most = 2**config.bits - 1
    if config.scale_dtype is KVScale.FLOAT16:
        factors = None
        stored_low = low.clamp(-_FP16_MAX, _FP16_MAX).half()
        minimum = stored_low.float()
        stored_scale = ((high - minimum).clamp_min(0) / most).clamp_max(_FP16_MAX).half()
        scale = stored_scale.float()
    else:
        stored_low, low_factor = _to_fp8(low)
        minimum = _from_fp8(stored_low, low_factor)
        stored_scale, scale_factor = _to_fp8((high - minimum).clamp_min(0) / most)
        scale = _from_fp8(stored_scale, scale_factor)
        factors = torch.stack([scale_factor, low_factor])
    # Groups of one value have no scale: their codes are 0.
    steps = (blocks - minimum) / torch.where(scale > 0, scale, 1)
    codes = steps.round_().clamp_(0, most).mul_(scale > 0).to(torch.uint8)
    if not per_channel:
        codes, stored_scale, stored_low = codes.flatten(-2), stored_scale.squeeze(-1), stored_low.squeeze(-1)
    return QuantizedStates(pack_codes(codes, config.bits), stored_scale, stored_low, factors)


def dequantize_states(found: QuantizedStates, config: KIVIConfig, dtype: torch.dtype) -> torch.Tensor:
    """States [B, H, N * g, D] of ``dtype``, computed in fp32."""
    codes = unpack_codes(found.codes, config.bits).float()
    if found.factors is None:
        scale, minimum = found.scale.float(), found.minimum.float()
    else:
        scale, minimum = _from_fp8(found.scale, found.factors[0]), _from_fp8(found.minimum, found.factors[1])
    if scale.shape[-2] != 1:  # along channels; a block has more than one token
        codes = codes.unflatten(-1, (scale.shape[-1], codes.shape[-1] // scale.shape[-1]))
        return torch.addcmul(minimum.unsqueeze(-1), codes, scale.unsqueeze(-1)).to(dtype).flatten(-2).flatten(2, 3)
    return torch.addcmul(minimum, codes, scale).to(dtype).flatten(2, 3)


def _to_fp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes, factor [B, N]) of values [B, H, N, ...]: the largest of a block becomes fp8's largest."""
    others = [1, *range(3, values.dim())]
    factor = values.abs().amax(dim=others) / _FP8_MAX
    factor = torch.where(factor > 0, factor, 1)
    return (values / _spread(factor, values)).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8).view(torch.uint8), factor


def _from_fp8(stored: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return stored.view(_FP8).float() * _spread(factor, stored)


def _spread(factor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B, N] as [B, 1, N, 1, ...]."""
    return factor[:, None, :].reshape(factor.shape[0], 1, factor.shape[1], *[1] * (like.dim() - 3))
