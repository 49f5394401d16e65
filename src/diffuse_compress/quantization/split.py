"""A convolution over two concatenated tensors as two convolutions and one sum.

Where a UNet goes up, a block's first convolution and its shortcut read the hidden states and a skip connection side by
side, which have ranges of their own. With one scale for both the wider range takes the codes of the narrower. Source:
Li et al. 2023, arXiv 2302.04304 (Q-Diffusion), section 4.2, for weights and inputs; TFMQ-DM (arXiv 2311.16503) builds
on it. A convolution is linear in its channels, so

    conv([h, s]) = conv_h(h) + conv_s(s)

is exact up to the order of a sum, and each part is an ordinary layer: with scales of its weight, of its input, static
or measured on every call, and the integer product, that its format has. One layer with two scales of the input would
need its int32 sums apart; a smoothing scale for each half (``act_pre_scale``) is exact for static inputs, but ties the
weights' scales to those of the inputs, where int8 weights have one for each row. What the sum costs is a second launch
and one addition of the output; products are as many as before.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.quantization.layers import QuantizedConv2d

__all__ = ["HIDDEN", "SKIP", "SplitConv2d", "part_on_meta", "split_conv"]

HIDDEN, SKIP = "hidden", "skip"
"""Names of the parts; the hidden states come first, and their part has the bias."""


class SplitConv2d(nn.Module):
    """Two convolutions over consecutive input channels, and their sum.

    Args:
        hidden: over the first channels, dense or quantized.
        skip: over the others, without bias.
    """

    def __init__(self, hidden: nn.Conv2d, skip: nn.Conv2d) -> None:
        super().__init__()
        self.hidden, self.skip = hidden, skip

    @property
    def in_channels(self) -> int:
        """Of both."""
        return self.hidden.in_channels + self.skip.in_channels

    @property
    def out_channels(self) -> int:
        """Of the sum."""
        return self.hidden.out_channels

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y [B, N, Ho, Wo] of an input [B, C, H, W]."""
        split = self.hidden.in_channels
        y: torch.Tensor = self.hidden(input[:, :split]) + self.skip(input[:, split:])
        return y

    def merged(self) -> nn.Conv2d:
        """One stock convolution of the same function; quantized parts are rounded to their grids."""
        parts = [part.to_dense() if isinstance(part, QuantizedConv2d) else part for part in (self.hidden, self.skip)]
        first = parts[0]
        conv = _like(first, self.in_channels, first.bias is not None)
        conv.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts], dim=1))
        if first.bias is not None:
            conv.bias = nn.Parameter(first.bias.detach().clone())
        return conv.train(first.training)


def split_conv(conv: nn.Module, channels: int) -> SplitConv2d:
    """``conv`` as two; it is not changed, and its weight not shared. On the meta device, of empty tensors.

    Args:
        conv: a stock convolution without groups.
        channels: of its input that the first part reads.

    Raises:
        ConfigError: it has groups, or not more input channels than that.
        ModelStateError: it is no stock convolution.
    """
    if type(conv) is not nn.Conv2d:
        raise ModelStateError(f"split_conv: needs a torch.nn.Conv2d, got a {type(conv).__name__}.")
    if conv.groups != 1 or not 0 < channels < conv.in_channels:
        raise ConfigError(
            f"split_conv: needs groups=1 and 0 < channels < {conv.in_channels}, got groups={conv.groups}, "
            f"channels={channels}."
        )
    hidden = _like(conv, channels, conv.bias is not None)
    skip = _like(conv, conv.in_channels - channels, bias=False)
    weight = conv.weight.detach()
    hidden.weight = nn.Parameter(weight[:, :channels].clone(memory_format=torch.contiguous_format))
    skip.weight = nn.Parameter(weight[:, channels:].clone(memory_format=torch.contiguous_format))
    if conv.bias is not None:
        hidden.bias = conv.bias
    return SplitConv2d(hidden.train(conv.training), skip.train(conv.training)).train(conv.training)


def part_on_meta(conv: nn.Conv2d, channels: int, *, bias: bool) -> nn.Conv2d:
    """A part's shape, without memory."""
    return _like(conv, channels, bias)


def _like(conv: nn.Conv2d, channels: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(
        channels,
        conv.out_channels,
        cast(tuple[int, int], conv.kernel_size),
        cast(tuple[int, int], conv.stride),
        cast(tuple[int, int] | str, conv.padding),
        cast(tuple[int, int], conv.dilation),
        1,
        bias,
        conv.padding_mode,
        device="meta",
        dtype=conv.weight.dtype,
    )
