"""The Inception network that FID is defined on, as a table of its branches; weights are read from pytorch-fid's file.

Source: Szegedy et al. 2015, arXiv 1512.00567, in the form of TensorFlow's graph of 2015-12-05, which differs from the
published network in three places: average pools do not count padding, the last block pools by maximum, and there are
1008 classes. Parameter names are those of the weight files that pytorch-fid and torch-fidelity publish. For inference
only: batch norms are folded into the convolutions when weights are loaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from diffuse_compress.errors import CheckpointError, ConfigError

__all__ = ["DIMS", "WEIGHTS_FILE", "WEIGHTS_SHA256", "InceptionNetwork", "find_weights", "load_inception"]

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d"
"""First digits of the hash of the published file: only with it is a distance called FID."""
_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_FILE}"
_OTHER_NAMES = ("weights-inception-2015-12-05-6726825d.pth",)
_EPSILON = 1e-3
DIMS = {64: "pool1", 192: "pool2", 768: "Mixed_6e", 2048: "Mixed_7c"}
"""{number of features: the block they are the mean over positions of}; FID is 2048."""
SPATIAL_CHANNELS = 7
"""sFID takes that many channels of ``Mixed_6d.branch1x1``, at all 17 x 17 positions."""


@dataclass(frozen=True)
class _Step:
    """A convolution with batch norm and ReLU, or a pool (no name)."""

    name: str
    width: int = 0
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    pool: str = ""


_Path = tuple[_Step | tuple[_Step, ...], ...]
"""Steps in a row; a tuple of steps are convolutions side by side whose outputs are joined."""


def _conv(name: str, width: int, height_kernel: int = 1, width_kernel: int = 0, stride: int = 1) -> _Step:
    kernel = (height_kernel, width_kernel or height_kernel)
    # Blocks keep the size except where they halve it, and there nothing is padded.
    padding = (0, 0) if stride > 1 else (kernel[0] // 2, kernel[1] // 2)
    return _Step(name, width, kernel, stride, padding)


def _pool(kind: str, stride: int = 1) -> _Step:
    return _Step("", kernel=(3, 3), stride=stride, padding=(0, 0) if stride > 1 else (1, 1), pool=kind)


def _block_5(pool_width: int) -> tuple[_Path, ...]:
    return (
        (_conv("branch1x1", 64),),
        (_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)),
        (_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3)),
        (_pool("average"), _conv("branch_pool", pool_width)),
    )


def _block_6(width: int) -> tuple[_Path, ...]:
    return (
        (_conv("branch1x1", 192),),
        (_conv("branch7x7_1", width), _conv("branch7x7_2", width, 1, 7), _conv("branch7x7_3", 192, 7, 1)),
        (
            _conv("branch7x7dbl_1", width),
            _conv("branch7x7dbl_2", width, 7, 1),
            _conv("branch7x7dbl_3", width, 1, 7),
            _conv("branch7x7dbl_4", width, 7, 1),
            _conv("branch7x7dbl_5", 192, 1, 7),
        ),
        (_pool("average"), _conv("branch_pool", 192)),
    )


def _block_7(pool: str) -> tuple[_Path, ...]:
    def fork(name: str) -> tuple[_Step, ...]:
        return _conv(f"{name}a", 384, 1, 3), _conv(f"{name}b", 384, 3, 1)

    return (
        (_conv("branch1x1", 320),),
        (_conv("branch3x3_1", 384), fork("branch3x3_2")),
        (_conv("branch3x3dbl_1", 448), _conv("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")),
        (_pool(pool), _conv("branch_pool", 192)),
    )


_STEM: dict[str, tuple[_Step, ...]] = {
    "Conv2d_1a_3x3": (_Step("", 32, (3, 3), 2),),
    "Conv2d_2a_3x3": (_Step("", 32, (3, 3)),),
    "Conv2d_2b_3x3": (_Step("", 64, (3, 3), padding=(1, 1)),),
    "pool1": (_pool("maximum", 2),),
    "Conv2d_3b_1x1": (_Step("", 80),),
    "Conv2d_4a_3x3": (_Step("", 192, (3, 3)),),
    "pool2": (_pool("maximum", 2),),
}
_BLOCKS: dict[str, tuple[_Path, ...]] = {
    "Mixed_5b": _block_5(32),
    "Mixed_5c": _block_5(64),
    "Mixed_5d": _block_5(64),
    "Mixed_6a": (
        (_conv("branch3x3", 384, 3, stride=2),),
        (_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3, stride=2)),
        (_pool("maximum", 2),),
    ),
    "Mixed_6b": _block_6(128),
    "Mixed_6c": _block_6(160),
    "Mixed_6d": _block_6(160),
    "Mixed_6e": _block_6(192),
    "Mixed_7a": (
        (_conv("branch3x3_1", 192), _conv("branch3x3_2", 320, 3, stride=2)),
        (
            _conv("branch7x7x3_1", 192),
            _conv("branch7x7x3_2", 192, 1, 7),
            _conv("branch7x7x3_3", 192, 7, 1),
            _conv("branch7x7x3_4", 192, 3, stride=2),
        ),
        (_pool("maximum", 2),),
    ),
    "Mixed_7b": _block_7("average"),
    "Mixed_7c": _block_7("maximum"),
}


class _Convolution(nn.Module):
    """Convolution and ReLU; ``fold`` brings in the batch norm of the weight file."""

    def __init__(self, channels: int, step: _Step) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, step.width, step.kernel, step.stride, step.padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x), inplace=True)


def _apply_pool(step: _Step, x: torch.Tensor) -> torch.Tensor:
    if step.pool == "maximum":
        return F.max_pool2d(x, step.kernel, step.stride, step.padding)
    return F.avg_pool2d(x, step.kernel, step.stride, step.padding, count_include_pad=False)


class _Block(nn.Module):
    """Paths side by side, joined along the channels."""

    def __init__(self, channels: int, paths: tuple[_Path, ...]) -> None:
        super().__init__()
        self.paths = paths
        self.out_channels = 0
        for path in paths:
            width = channels
            for step in path:
                parts = step if isinstance(step, tuple) else (step,)
                for part in parts:
                    if not part.pool:
                        self.add_module(part.name, _Convolution(width, part))
                width = sum(part.width for part in parts) or width
            self.out_channels += width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._follow(path, x) for path in self.paths], dim=1)

    def _follow(self, path: _Path, x: torch.Tensor) -> torch.Tensor:
        for step in path:
            if isinstance(step, tuple):
                x = torch.cat([self.get_submodule(part.name)(x) for part in step], dim=1)
            else:
                x = _apply_pool(step, x) if step.pool else self.get_submodule(step.name)(x)
        return x


class InceptionNetwork(nn.Module):
    """Features and logits of pictures of 299 x 299 pixels."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for name, (step,) in _STEM.items():
            if not step.pool:
                self.add_module(name, _Convolution(channels, step))
                channels = step.width
        for name, paths in _BLOCKS.items():
            block = _Block(channels, paths)
            self.add_module(name, block)
            channels = block.out_channels
        self.fc = nn.Linear(channels, 1008)

    def forward(self, x: torch.Tensor, dims: int = 2048, *, spatial: bool = False) -> dict[str, torch.Tensor]:
        """Features of pictures.

        Args:
            x: [B, 3, 299, 299] in [-1, 1].
            dims: 64, 192, 768 or 2048; the network is left there.
            spatial: add the features of sFID.

        Returns:
            ``features`` [B, dims]; with 2048 ``logits`` [B, 1008] without the bias, as the Inception Score takes them;
            with ``spatial`` ``spatial`` [B, 2023].
        """
        found: dict[str, torch.Tensor] = {}
        last = DIMS[dims]
        for name, (step,) in _STEM.items():
            x = _apply_pool(step, x) if step.pool else self.get_submodule(name)(x)
            if name == last:
                return found | {"features": x.mean(dim=(2, 3))}
        for name in _BLOCKS:
            block = self.get_submodule(name)
            if spatial and name == "Mixed_6d":
                found["spatial"] = block.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS].flatten(1)
            x = block(x)
            if name == last:
                break
        features = x.mean(dim=(2, 3))
        found["features"] = features
        if dims == 2048:
            found["logits"] = features @ self.fc.weight.T
        return found


def find_weights(path: str | Path | None = None) -> Path:
    """The weight file: ``path``, else where torch.hub keeps what pytorch-fid or torch-fidelity downloaded.

    Raises:
        ConfigError: there is none; the message says how to get it.
    """
    if path is not None:
        if Path(path).is_file():
            return Path(path)
        raise ConfigError(f"{path}: no such file. {_how_to_get()}")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in (WEIGHTS_FILE, *_OTHER_NAMES):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(
        f"FID: needs the Inception weights {WEIGHTS_FILE}, found none in {folder}. They are no part of this package. "
        f"{_how_to_get()}"
    )


def _how_to_get() -> str:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return (
        f"Download {_URL} (91 MB) into {folder}, or give its path with --weights. Without it, use --features with a "
        "classifier of your own or CLIP weights."
    )


def load_inception(path: Path) -> tuple[InceptionNetwork, str]:
    """The network with the weights of a file, batch norms folded in, and the first digits of the file's SHA-256.

    Raises:
        CheckpointError: unreadable, or weights of another network.
    """
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[: len(WEIGHTS_SHA256)]
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle have a class for each
        raise CheckpointError(f"{path}: not a readable weight file ({error}). Download it again.") from error
    network = InceptionNetwork()
    _load_folded(network, dict(state), path)
    return network.eval().requires_grad_(False), digest


def _load_folded(network: InceptionNetwork, state: dict[str, Any], path: Path) -> None:
    folded: dict[str, torch.Tensor] = {}
    try:
        for name, module in network.named_modules():
            if isinstance(module, _Convolution):
                norm = {key: state.pop(f"{name}.bn.{key}").double() for key in _NORM}
                scale = norm["weight"] / (norm["running_var"] + _EPSILON).sqrt()
                weight = state.pop(f"{name}.conv.weight").double()
                folded[f"{name}.conv.weight"] = (weight * scale[:, None, None, None]).float()
                folded[f"{name}.conv.bias"] = (norm["bias"] - norm["running_mean"] * scale).float()
        folded |= {f"fc.{key}": state.pop(f"fc.{key}").float() for key in ("weight", "bias")}
        network.load_state_dict(folded)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not the weights of the Inception network of FID ({error}).") from error
    rest = [key for key in state if not key.endswith("num_batches_tracked")]
    if rest:
        raise CheckpointError(
            f"{path}: has {len(rest)} tensors that the Inception network of FID does not have ({rest[0]}, ...)."
        )


_NORM = ("weight", "bias", "running_mean", "running_var")
