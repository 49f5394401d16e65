"""A block with biased norms, whose inputs have channels far off zero, as of language models before RMS norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from calibrated_block import Block


class NormedBlock(Block):
    """The block, with a LayerNorm before each of its two parts."""

    def __init__(self, width: int = 64, offset: float = 20.0) -> None:
        super().__init__(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        with torch.no_grad():
            for norm in (self.norm1, self.norm2):
                norm.bias[::9] = offset * torch.randn(norm.bias[::9].shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        scores = torch.softmax(self.to_q(h) @ self.to_k(h).transpose(-1, -2) / 11, dim=-1)
        x = x + self.to_out(scores @ self.to_v(h))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def setter(block: nn.Module) -> Callable[[str, torch.Tensor], None]:
    """What a BlockWork changes parameters by."""

    def change(name: str, value: torch.Tensor) -> None:
        block.get_parameter(name).data = value

    return change
