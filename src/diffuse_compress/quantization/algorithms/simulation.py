"""A dense layer that computes as its quantized form will, while its scales, shifts or codes are still looked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from diffuse_compress.quantization.algorithms.block import LayerWork, as_rows, as_the_layer_sees_it, shifted

__all__ = ["seen_as_quantized"]


@contextlib.contextmanager
def seen_as_quantized(
    layer: LayerWork,
    value: torch.Tensor | None = None,
    *,
    enter: Callable[[torch.Tensor], torch.Tensor] | None = None,
    shift: Callable[[], torch.Tensor | None] | None = None,
) -> Iterator[None]:
    """Inside, a dense layer shifts, smooths and rounds its input, and adds its low-rank branch and what the shift took.

    Args:
        layer: dense.
        value: [N, K], its weight meanwhile, for the input as it meets the codes; None leaves that to the caller.
        enter: makes that input of the shifted one, instead of what ``layer`` says.
        shift: gives the [K] to subtract, or None, instead of what ``layer`` says.
    """
    given: list[torch.Tensor] = []
    dense, weight = layer.dense, layer.dense.weight.data
    shift_now = shift or (lambda: layer.act_pre_shift)
    prepare = enter or (lambda x: as_the_layer_sees_it(x, layer))

    def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        moved = shift_now()
        x = args[0]
        if moved is not None:
            x = (x.float() - moved).to(x.dtype) if shift is not None else shifted(x, layer)
        if layer.low_rank is not None:
            given.append(x)
        return (prepare(x), *args[1:])

    def after(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        moved = shift_now()
        if layer.low_rank is not None:
            output = output + _branch(layer, given.pop(), output)
        if moved is not None:
            output = output + (weight.float() @ moved).to(output.dtype)
        return output

    handles: list[Any] = [dense.register_forward_pre_hook(before), dense.register_forward_hook(after)]
    try:
        if value is not None:
            dense.weight.data = value.to(weight.dtype).reshape(weight.shape)
        yield
    finally:
        dense.weight.data = weight
        for handle in handles:
            handle.remove()


def _branch(layer: LayerWork, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    assert layer.low_rank is not None
    down, up = (part.to(output.dtype) for part in layer.low_rank)
    branch = as_rows(layer.dense, x) @ down.t() @ up.t()
    if output.dim() == 4 and isinstance(layer.dense, nn.Conv2d):
        batch, channels = output.shape[:2]
        branch = branch.reshape(batch, -1, channels).transpose(1, 2)
    return branch.reshape(output.shape)
