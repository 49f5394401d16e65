"""Parameters that FSDP2 has cut up: read whole, and written whole."""

from __future__ import annotations

from typing import Any, cast

import torch

__all__ = ["is_sharded", "whole", "write_"]


def is_sharded(tensor: torch.Tensor) -> bool:
    """A DTensor: every process holds a part of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or gathered from all processes, which must all ask."""
    detached: Any = tensor.detach()
    return cast(torch.Tensor, detached.full_tensor() if is_sharded(tensor) else detached)


def write_(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Let ``parameter`` have these values, in its dtype; of a sharded one, those of the first process."""
    data: Any = parameter.detach()
    values = values.to(parameter.dtype)
    if is_sharded(parameter):
        # Imported where it is needed: torch may be built without it.
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, data.device_mesh, data.placements)
    data.copy_(values)
