"""What the three training stages share: wall-clock schedules, moving averages, states on disk."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

# Largest file of a training state, in bytes.
SHARD_BYTES = 15 * 2**20


class WallClock:
    """A stage lasts a number of seconds, not of steps: schedules follow the elapsed share of it."""

    def __init__(self, budget_s: float):
        self.budget_s, self.start = budget_s, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def share(self) -> float:
        """Elapsed share of the budget, in [0, 1]."""
        return min(1.0, self.seconds / self.budget_s)


def mixed_precision(device: torch.device) -> torch.autocast:
    """bf16 autocast on a GPU; off on the CPU, where bf16 convolutions are emulated and slow."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Fill tensors in place, because a compiled or fused optimizer must not see a new float."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class MovingAverage:
    """Exponential moving average of a module's parameters, kept in fp32."""

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.averages = [parameter.detach().clone().float() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take a step's weights in. The decay is constant, so that the update can be recorded."""
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - self.decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Forget what came before: the first steps' weights are noise."""
        torch._foreach_copy_(self.averages, [p.detach() for p in self.parameters])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and parameters; a second call undoes the first."""
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)


def save_state(tensors: dict[str, torch.Tensor], progress: dict, folder: Path, name: str) -> None:
    """Write tensors as ``name-0.safetensors``, ``name-1...``; progress goes into their metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = SHARD_BYTES
    for key, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][key] = tensor.detach().cpu().contiguous()
        room -= tensor.nbytes
    for index, shard in enumerate(shards):
        path = folder / f"{name}-{index}.safetensors"
        # Renamed when complete: an interrupted run leaves the previous state intact.
        save_file(shard, path.with_suffix(".part"), metadata={"progress": json.dumps(progress)})
        path.with_suffix(".part").replace(path)


def load_state(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict] | None:
    """The tensors and progress that `save_state` wrote, or None."""
    paths = sorted(Path(folder).glob(f"{name}-*.safetensors"))
    tensors, progress = {}, {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors.update({key: file.get_tensor(key) for key in file.keys()})
    return (tensors, progress) if paths else None


def save_grid(pictures: torch.Tensor, path: Path, columns: int = 16) -> None:
    """Write [n, 3, h, w] pictures in [-1, 1] as one PNG; n is cut to full rows."""
    from PIL import Image

    rows = max(1, len(pictures) // columns)
    columns = min(columns, len(pictures))
    _, _, height, width = pictures.shape
    cells = pictures[: rows * columns].float().cpu().clamp(-1, 1)
    cells = cells.reshape(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    array = ((cells.reshape(rows * height, columns * width, 3) + 1) * 127.5).round().byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(array)).save(path, optimize=True)
