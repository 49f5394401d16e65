"""What several processes of a training do together.

Gradients are averaged by one reduction after the backward pass, not by DDP: its buckets would have to follow a branch
whose rank shrinks. Sharding is FSDP2's (``fully_shard``), block by block, of the weights alone: the branch, scales and
clips are small, stay whole in every process, and so are handled as without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.runtime.processes import Processes
from diffuse_compress.training.sharding import is_sharded, whole

__all__ = ["Team", "gathered", "like", "placed", "refuse_launcher", "unshard"]

_BUCKET = 64 << 20
_REFUSED = {"DEEPSPEED": "ACCELERATE_USE_DEEPSPEED", "MEGATRON_LM": "ACCELERATE_USE_MEGATRON_LM"}


def refuse_launcher() -> None:
    """Raise before any weight is read if the launcher was told what cannot be.

    Raises:
        ConfigError: DeepSpeed or Megatron.
    """
    for kind, variable in _REFUSED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise _refusal(kind)


def _refusal(kind: str) -> ConfigError:
    return ConfigError(
        f"training: {kind} optimizes copies of parameters in buffers of fixed layout, and where a phase of the branch "
        "ends, weights take in what leaves it and moments are forgotten. Launch with FSDP2 "
        "(examples/training/fsdp2.yaml), which shards the same weights, gradients and moments."
    )


class Team(Processes):
    """The processes of a training.

    Args:
        state: accelerate's ``Accelerator`` or ``PartialState``; None for a process by itself.

    Raises:
        ConfigError: DeepSpeed, whose flat buffers cannot hold a branch that leaves.
    """

    def __init__(self, state: Any = None) -> None:
        super().__init__(state)
        kind = "" if state is None else str(getattr(state, "distributed_type", "")).rpartition(".")[2]
        if kind in _REFUSED:
            raise _refusal(kind)
        self.shards = kind == "FSDP"

    @property
    def is_first(self) -> bool:
        """The process that writes."""
        return self.index == 0

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients of whole parameters become those of all processes' batches; sharded ones are that already."""
        if self.count == 1:
            return
        own = [p for p in parameters if not is_sharded(p) and p.requires_grad]
        for parameter in own:
            if parameter.grad is None:  # of no use in this process's batch
                parameter.grad = torch.zeros_like(parameter)
        for part in _buckets([p.grad for p in own if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in part])
            torch.distributed.all_reduce(flat)
            flat /= self.count
            for gradient, found in zip(part, flat.split([g.numel() for g in part]), strict=True):
                gradient.copy_(found.view_as(gradient))

    def same(self, tensors: Iterable[torch.Tensor]) -> None:
        """The first process's values in all: factors of a decomposition may come with other signs elsewhere."""
        if self.count == 1:
            return
        for tensor in tensors:
            if not is_sharded(tensor):
                torch.distributed.broadcast(tensor.detach(), src=0)

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module], kept: Iterable[nn.Parameter]) -> None:
        """Shard the weights of a model, but for those that are ``kept`` whole, by block."""
        from torch.distributed.fsdp import fully_shard

        plugin = getattr(self.state.state, "fsdp_plugin", None)
        options: dict[str, Any] = {"ignored_params": set(kept)}
        if plugin is not None and isinstance(plugin.reshard_after_forward, bool):
            options["reshard_after_forward"] = plugin.reshard_after_forward
        for block in blocks:
            fully_shard(block, **options)
        options.pop("reshard_after_forward", None)
        fully_shard(model, **options)


def _buckets(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Tensors of one dtype and device, up to a size together."""
    found: list[list[torch.Tensor]] = []
    size, kind = 0, None
    for tensor in tensors:
        own = (tensor.dtype, tensor.device)
        if not found or kind != own or size + tensor.nbytes > _BUCKET:
            found.append([])
            size, kind = 0, own
        found[-1].append(tensor)
        size += tensor.nbytes
    return found


def gathered(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A dict with all of its tensors; every process has to call it."""
    return {name: whole(v) if isinstance(v, torch.Tensor) else v for name, v in tree.items()}


def placed(values: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """Stored values where those of ``beside`` are."""
    return {name: like(value, beside.get(name), "") for name, value in values.items()}


def like(value: Any, other: Any, name: str) -> Any:
    """A stored tensor on the device of another, and sharded as it is; a count of steps stays as it is."""
    if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor) or name == "step":
        return value
    if is_sharded(other) and value.shape == other.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)  # type: ignore[attr-defined]
    return value.to(other.device)


def unshard(model: nn.Module) -> None:
    """Every process holds all of the model again."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and is_sharded(parameter):
                module._parameters[name] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
