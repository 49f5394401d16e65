"""Weights that wait off their device, or as integers, while a table serves in their place.

A parked parameter stays where it is, with no elements: keys of the state dict, dtype and device are still there to be
asked for. Saving and loading a state dict brings its bytes back first.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.quantization.layer_base import INPUT_QPARAMS
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.numerics import dequantize, quantize_weight
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import NumberFormat, PerChannel, PerGroup, WeightScheme
from diffuse_compress.temporal.config import WeightPlace

__all__ = ["Folder", "Parking", "sample_of", "weights_of"]

_SCHEMES = {
    WeightPlace.INT8: WeightScheme(NumberFormat.INT8, PerChannel()),
    WeightPlace.INT4: WeightScheme(NumberFormat.INT4, PerGroup(128, pad=True)),
}


class Folder:
    """A temporary folder for parked weights, shared by the copies of a model and removed with the last of them."""

    def __init__(self, parent: str | None) -> None:
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(dir=parent, prefix="diffuse_compress-")
        self._count = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Folder:
        return self

    def write(self, tensor: torch.Tensor) -> Path:
        """The tensor's bytes in a new file."""
        self._count += 1
        path = Path(self._folder.name, f"{self._count}.bin")
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(path)
        return path


@dataclass
class _OnDisk:
    """Bytes of one tensor; the file is never written again, so copies may share it. Pickled, it is the tensor."""

    path: Path
    folder: Folder
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        if not self.shape.numel():
            return torch.empty(self.shape, dtype=self.dtype)
        data = torch.frombuffer(bytearray(self.path.read_bytes()), dtype=torch.uint8)
        return data.view(self.dtype).reshape(self.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _as_tensor, (self.read(),)


def _as_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Parking:
    """The place of one layer's weights.

    Attributes:
        away: the layer's parameters have no elements now.
    """

    def __init__(self, layer: nn.Module, place: WeightPlace, folder: Folder | None) -> None:
        self.layer = layer
        self.place = WeightPlace.DEVICE if place in _SCHEMES and isinstance(layer, QuantizedLinear) else place
        self.folder = folder
        self.away = False
        self._kept: dict[str, _Kept] = {}
        if self.place in _SCHEMES:
            # From here on the layer computes with what can come back.
            parameter = self._weights()["weight"]
            self._kept["weight"] = self._put(parameter)
            self._restore("weight", parameter)
        layer.register_state_dict_pre_hook(self.before_state_dict)
        layer.register_load_state_dict_pre_hook(self.before_load)

    @staticmethod
    def fits(layer: nn.Module, place: WeightPlace) -> bool:
        """Can the layer's weights be put there? Rounding is for dense ones; quantized ones are integers already."""
        return type(layer) is nn.Linear or isinstance(layer, QuantizedLinear) or place not in _SCHEMES

    def leave(self) -> None:
        """Free the weights' memory on the device; what is kept already, and still true, is not written again."""
        if self.away or self.place is WeightPlace.DEVICE:
            return
        for name, parameter in self._weights().items():
            if name not in self._kept or not self._kept[name].is_of(parameter):
                self._kept[name] = self._put(parameter)
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        self.away = True

    def come_back(self) -> None:
        """Give the layer its weights again, on the device and in the dtype that it was moved to meanwhile."""
        if not self.away:
            return
        for name, parameter in self._weights().items():
            self._restore(name, parameter)
        self.away = False

    @property
    def nbytes(self) -> int:
        """Of what stands in memory, on whatever device, while the weights are away."""
        return sum(_nbytes(kept.data) for kept in self._kept.values()) if self.away else 0

    def samples(self) -> list[torch.Tensor]:
        """Of the weights that are away, float64 on the CPU."""
        return [kept.sample for kept in self._kept.values()]

    def before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """State dicts hold the weights."""
        self.come_back()

    def before_load(self, module: nn.Module, *args: Any) -> None:
        """Weights are loaded into parameters of their own shape."""
        self.come_back()

    def remove(self) -> None:
        """Bring the weights back and take the hooks off."""
        self.come_back()
        for hooks in (self.layer._state_dict_pre_hooks, self.layer._load_state_dict_pre_hooks):
            for key in [key for key, hook in hooks.items() if _owner(hook) is self]:
                del hooks[key]

    def _weights(self) -> dict[str, nn.Parameter]:
        return weights_of(self.layer)

    def _put(self, parameter: nn.Parameter) -> _Kept:
        weight, data = parameter.detach(), None
        if self.place in _SCHEMES:
            data = quantize_weight(weight, _SCHEMES[self.place])
        elif self.place is WeightPlace.DISK:
            assert self.folder is not None
            data = _OnDisk(self.folder.write(weight), self.folder, weight.shape, weight.dtype)
        else:
            data = weight.cpu()
        return _Kept(data, sample_of(weight))

    def _restore(self, name: str, parameter: nn.Parameter) -> None:
        kept = self._kept[name]
        if isinstance(kept.data, QuantizedWeight):
            kept.data = _moved(kept.data, parameter.device)
            value = dequantize(kept.data, parameter.dtype)
        else:
            value = kept.data.read() if isinstance(kept.data, _OnDisk) else kept.data
        parameter.data = value.to(parameter.device, parameter.dtype)
        self._kept[name] = _Kept(kept.data, sample_of(parameter))


@dataclass
class _Kept:
    """A parameter's contents, and a sample of them."""

    data: torch.Tensor | _OnDisk | QuantizedWeight
    sample: torch.Tensor

    def is_of(self, parameter: nn.Parameter) -> bool:
        """Is the parameter still what was kept? A merged adapter changes every element, and says so nowhere."""
        return torch.equal(self.sample, sample_of(parameter))


def sample_of(weight: torch.Tensor, count: int = 64) -> torch.Tensor:
    """``count`` elements of a weight from all over it, float64 on the CPU."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // count)][:count].cpu().double()


def weights_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that tables are made from, and that go: not the bias, nor the range of a static input."""
    parameters = layer._parameters.items()
    return {name: p for name, p in parameters if p is not None and name not in ("bias", *INPUT_QPARAMS)}


def _owner(hook: Any) -> Any:
    return getattr(getattr(hook, "hook", hook), "__self__", None)


def _moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    if weight.qweight.device == device:
        return weight
    zero_point = None if weight.zero_point is None else weight.zero_point.to(device)
    return QuantizedWeight(
        weight.qweight.to(device), weight.scale.to(device), zero_point, None, weight.in_features, weight.scheme
    )


def _nbytes(kept: torch.Tensor | QuantizedWeight | _OnDisk) -> int:
    if isinstance(kept, _OnDisk):
        return 0
    if isinstance(kept, QuantizedWeight):
        return kept.qweight.nbytes + kept.scale.nbytes + (0 if kept.zero_point is None else kept.zero_point.nbytes)
    return kept.nbytes
