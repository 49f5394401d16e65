"""What algorithms that train a block share: the outputs it is to have, the error of those it has, and steps down."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from diffuse_compress.calls import Call, autocast_as
from diffuse_compress.errors import ConfigError
from diffuse_compress.failures import is_out_of_memory
from diffuse_compress.quantization.algorithms.block import BlockWork

__all__ = ["Targets", "block_error", "block_loss", "descend", "gradients_explained", "parameter_name", "targets_of"]

Targets = Sequence[Sequence[torch.Tensor]]
"""For each call of a block the floating-point tensors that it is to return."""
Parameters = Mapping[str, torch.Tensor]


def targets_of(work: BlockWork, calls: Sequence[Call] | None = None) -> list[list[torch.Tensor]]:
    """What the unchanged block gives for ``calls``, those of the unchanged model by default; kept where the call is."""
    found = []
    with torch.no_grad():
        for call in work.reference_calls if calls is None else calls:
            home = next((leaf.device for leaf in tree_leaves((call.args, dict(call.kwargs))) if _is_float(leaf)), None)
            output = work.forward(work.reference_block, call)
            found.append([leaf if home is None else leaf.to(home) for leaf in tree_leaves(output) if _is_float(leaf)])
    return found


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def block_loss(work: BlockWork, parameters: Parameters, index: int, *targets: Targets) -> torch.Tensor:
    """Squared error of the rows of the block's output on a call that count, times the call's weight; fp32 scalar.

    Args:
        work: the block.
        parameters: {name: value} that take the places of its own.
        index: of the call.
        targets: what to come near; of several, the sum of the errors.
    """
    call = work.here(work.calls[index])
    with autocast_as(work.autocast):
        output = functional_call(work.block, dict(parameters), call.args, dict(call.kwargs))
    found = [leaf for leaf in tree_leaves(output) if _is_float(leaf)]
    pairs = [pair for target in targets for pair in zip(found, target[index], strict=True)]
    differences = [value.float() - target.to(value.device).float() for value, target in pairs]
    errors = [work.counted(difference, index).square().sum() for difference in differences]
    return torch.stack(errors).sum() * work.weight(index)


def block_error(work: BlockWork, parameters: Parameters, *targets: Targets) -> float:
    """:func:`block_loss` of all calls."""
    with torch.no_grad():
        return sum(float(block_loss(work, parameters, index, *targets)) for index in range(len(work.calls)))


def descend(
    work: BlockWork,
    optimizer: torch.optim.Optimizer,
    parameters: Callable[[], Parameters],
    targets: Sequence[Targets],
    *,
    epochs: int,
    batch_size: int,
    scale: float,
    explain: tuple[str, str],
) -> None:
    """Let ``optimizer`` go over all calls, in their order, ``epochs`` times.

    Args:
        work: the block.
        optimizer: of what is learned.
        parameters: makes the block's parameters from it.
        targets: for :func:`block_loss`.
        epochs: how often.
        batch_size: calls whose gradients are summed for a step.
        scale: that the loss of a call is multiplied by.
        explain: who needs gradients, and what to do without (:func:`gradients_explained`).
    """
    leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    for _ in range(epochs):
        for start in range(0, len(work.calls), batch_size):
            batch = range(start, min(start + batch_size, len(work.calls)))
            for leaf in leaves:
                leaf.grad = None
            for index in batch:
                with gradients_explained(work, *explain), torch.enable_grad():
                    loss = block_loss(work, parameters(), index, *targets) * (scale / len(batch))
                    slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
                for leaf, slope in zip(leaves, slopes, strict=True):
                    if slope is not None:
                        leaf.grad = slope if leaf.grad is None else leaf.grad + slope
            optimizer.step()


@contextlib.contextmanager
def gradients_explained(work: BlockWork, who: str, instead: str) -> Iterator[None]:
    """A block may compute, and yet have no gradients: one that changes in place what they are computed from."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{work.name}: {who} needs gradients of the block, and they cannot be computed ({error}). {instead}."
        ) from error


def parameter_name(module: str, leaf: str) -> str:
    """Name of a parameter of a module of the block, which may be the block itself."""
    return f"{module}.{leaf}".lstrip(".")
