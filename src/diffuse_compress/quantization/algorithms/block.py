"""What a calibrated algorithm works on: one block, its layers, and the inputs it is run on.

An algorithm looks at the inputs of the layers (:meth:`BlockWork.collect`), decides, and writes its decisions into the
layers' :class:`LayerWork`: a smoothing scale, a low-rank branch, clipped weights, codes. What an earlier algorithm of
the same sequence decided is in there already. Nothing here knows a class of diffusers or transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from diffuse_compress.calls import Call
from diffuse_compress.errors import ModelStateError
from diffuse_compress.quantization.layer_base import LowRank
from diffuse_compress.quantization.numerics import fake_quantize_activation
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.rotation import rotate
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["BlockWork", "Collector", "LayerWork", "as_rows", "as_the_layer_sees_it", "per_channel"]

Dense = nn.Linear | nn.Conv2d


class Collector(Protocol):
    """Reduces a layer's inputs as they stream by."""

    def update(self, rows: torch.Tensor) -> None:
        """Take the input rows [M, K] of one call, in the layer's dtype."""


@dataclass
class LayerWork:
    """A layer on its way to being quantized.

    Attributes:
        name: relative to the block; "" where the block is the layer itself.
        dense: the module, as it is in the block until it is replaced.
        scheme: the format to reach.
        act_pre_scale: fp32 [K] (convolutions [C]) that multiplies the input, or None.
        low_rank: (down [r, K], up [N, r]) that is added, on the input before ``act_pre_scale``, or None.
        weight: fp32 [N, K] that the codes are to stand for; None is that of ``dense`` with the two above taken out,
            rotated where the scheme rotates inputs.
        quantized: codes, once decided.
        ranges: fp32 [N, K] whose smallest and largest values the codes are to span, in each element of the granularity;
            None leaves the choice to what chooses the codes.
    """

    name: str
    dense: Dense
    scheme: Scheme
    act_pre_scale: torch.Tensor | None = None
    low_rank: LowRank | None = None
    weight: torch.Tensor | None = None
    quantized: QuantizedWeight | None = None
    ranges: torch.Tensor | None = None

    @property
    def column_scale(self) -> torch.Tensor | None:
        """``act_pre_scale`` for each column of the flattened weight."""
        scale = self.act_pre_scale
        if scale is None or isinstance(self.dense, nn.Linear):
            return scale
        kernel = self.dense.kernel_size[0] * self.dense.kernel_size[1]
        return scale.reshape(self.dense.groups, -1)[0].repeat_interleave(kernel)

    def rest(self) -> torch.Tensor:
        """fp32 [N, K], a copy: the dense weight without the low-rank branch, on the input as it comes."""
        weight = self.dense.weight.detach().flatten(1).float()
        if self.low_rank is None:
            return weight.clone()
        down, up = self.low_rank
        return weight - up.float() @ down.float()

    def target(self) -> torch.Tensor:
        """fp32 [N, K], a copy: the weight that the codes are to stand for."""
        if self.weight is not None:
            return self.weight.clone()
        weight, scale, rotation = self.rest(), self.column_scale, self.scheme.input_rotation
        if scale is not None:
            weight = weight / scale
        return weight if rotation is None else rotate(weight, rotation)


@dataclass
class BlockWork:
    """A block with its layers and inputs.

    Attributes:
        name: qualified name of the block, for messages.
        block: the module, on the device it is calibrated on; layers that are done have been replaced in it.
        calls: arguments it is run with, on its device.
        layers: layers to quantize by name relative to the block, in the order they run in.
        generators: {layer: source of its random numbers}.
        install: puts the layer's quantized form in its place in the block.
    """

    name: str
    block: nn.Module
    calls: Sequence[Call]
    layers: dict[str, LayerWork]
    generators: Callable[[str], torch.Generator]
    install: Callable[[LayerWork], nn.Module]
    _subsets: list[tuple[str, ...]] | None = field(default=None, repr=False)

    @property
    def subsets(self) -> list[tuple[str, ...]]:
        """Layers that are given the same tensor, together; in the order they run in."""
        if self._subsets is None:
            self._subsets = self._trace()
        return self._subsets

    def collect(self, collectors: Mapping[str, Collector], *, quantized_inputs: bool = False) -> None:
        """Run the block on every call, and give each layer's input rows to its collector.

        Args:
            collectors: by layer name.
            quantized_inputs: multiply by ``act_pre_scale`` and round as the layer's scheme will; the collectors then
                see what the codes of the weight will be multiplied with.

        Raises:
            ModelStateError: an input is not finite; the message names layer and sample.
        """
        handles = []
        where = {"call": 0}
        for name, collector in collectors.items():
            layer = self.layers[name]
            hook = self._hook(layer, collector, quantized_inputs, where)
            handles.append(self._module(name).register_forward_pre_hook(hook))
        try:
            with torch.no_grad():
                for where["call"], call in enumerate(self.calls):
                    call.run(self.block)
        finally:
            for handle in handles:
                handle.remove()

    def run(self) -> Iterable[Any]:
        """What the block returns for each call, as it is now."""
        with torch.no_grad():
            for call in self.calls:
                yield call.run(self.block)

    def _module(self, name: str) -> nn.Module:
        return self.block.get_submodule(name) if name else self.block

    def _hook(self, layer: LayerWork, collector: Collector, quantized: bool, where: dict[str, int]) -> Any:
        def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach()
            if not torch.isfinite(x).all():
                raise ModelStateError(
                    f"{self.name}.{layer.name}: calibration needs finite inputs, got inf or nan in sample "
                    f"{where['call']}. The model overflows on it in {x.dtype}: load it in bfloat16 or float32, or "
                    "leave the sample out."
                )
            if quantized:
                x = as_the_layer_sees_it(x, layer)
            collector.update(as_rows(layer.dense, x))

        return enter

    def _trace(self) -> list[tuple[str, ...]]:
        """One run that tells who reads what; inputs are held meanwhile, so that no address is used twice."""
        seen: dict[str, tuple[Any, ...]] = {}
        held: list[torch.Tensor] = []

        def note(name: str) -> Callable[..., None]:
            def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                held.append(args[0])
                seen.setdefault(name, (args[0].data_ptr(), args[0].shape, args[0].stride()))

            return enter

        handles = [self._module(name).register_forward_pre_hook(note(name)) for name in self.layers]
        try:
            with torch.no_grad():
                self.calls[0].run(self.block)
        finally:
            for handle in handles:
                handle.remove()
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, key in seen.items():
            groups.setdefault(key, []).append(name)
        return [tuple(names) for names in groups.values()]


def as_rows(layer: Dense, x: torch.Tensor) -> torch.Tensor:
    """Input of a linear or convolution as the matrix [M, K] that its flattened weight [N, K] is multiplied with.

    Grouped convolutions have one such matrix for each group; the rows of all groups are stacked.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        pads = layer._reversed_padding_repeated_twice
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = nn.functional.pad(x, pads, mode=mode), (0, 0)
    else:
        padding = layer.padding
    columns = nn.functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    batch, _, places = columns.shape
    depth = columns.shape[1] // layer.groups
    return columns.reshape(batch, layer.groups, depth, places).transpose(2, 3).reshape(-1, depth)


def per_channel(layer: Dense, columns: torch.Tensor, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    """[K] values of a flattened weight's columns as [C] values of the input's channels."""
    if isinstance(layer, nn.Linear):
        return columns
    kernel = layer.kernel_size[0] * layer.kernel_size[1]
    return reduce(columns.reshape(-1, kernel), dim=1)


def as_the_layer_sees_it(x: torch.Tensor, layer: LayerWork) -> torch.Tensor:
    """Input ``x`` multiplied by ``act_pre_scale``, rotated and rounded to the grid of its scheme, in its dtype."""
    dims = 1 if isinstance(layer.dense, nn.Linear) else 3
    if layer.act_pre_scale is not None:
        shape = (-1,) if dims == 1 else (-1, 1, 1)
        x = (x.float() * layer.act_pre_scale.reshape(shape)).to(x.dtype)
    if layer.scheme.input_rotation is not None:
        x = rotate(x, layer.scheme.input_rotation)
    scheme = layer.scheme.activation
    if scheme is None or not scheme.dynamic:
        return x
    return fake_quantize_activation(x, scheme, feature_dims=dims)
