"""A model's layers quantized block by block, each on the inputs that the blocks before it, done already, give it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.lockstep import Visit, lockstep
from diffuse_compress.calibration.samples import Sample
from diffuse_compress.families.registry import family_of
from diffuse_compress.families.roles import block_elements
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, calibrate_with, steps_of
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["calibrate_layers", "calibration_blocks"]

Quantized = QuantizedLinear | QuantizedConv2d
Replace = Callable[[str, Callable[[nn.Module], nn.Module]], nn.Module]


def calibration_blocks(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Where calibration stops: the model's blocks that hold a layer of ``layers``, and every layer outside of them."""
    family = family_of(model)
    known = family.blocks(model) if family is not None else block_elements(model)
    blocks = [name for name in known if any(layer.startswith(f"{name}.") for layer in layers)]
    outside = [layer for layer in layers if not any(layer.startswith(f"{name}.") for name in blocks)]
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted([*blocks, *outside], key=order.__getitem__)


def calibrate_layers(
    model: nn.Module,
    layers: Mapping[str, Scheme],
    algorithm: AlgorithmConfig,
    samples: Sequence[Sample],
    replace: Replace,
    *,
    generator: Callable[[str], torch.Generator],
    on_block: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[str]:
    """Quantize ``layers`` in place.

    Args:
        model: in eval mode.
        layers: {qualified name: format to reach}.
        algorithm: config of a calibrated algorithm, or of several in sequence; layers that it leaves without codes are
            rounded to nearest.
        samples: of this model, on any device.
        replace: ``replace(name, convert)`` puts ``convert(dense layer)`` in the layer's place.
        generator: source of random numbers of a layer.
        on_block: called after each block with its name, how many are done and how many there are.

    Returns:
        Layers that no sample reached; they are rounded to nearest.

    Raises:
        ModelStateError: inputs are not finite.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    blocks = calibration_blocks(model, list(layers))
    done: set[str] = set()

    def visit(found: Visit) -> None:
        work = _work(found, layers, generator, replace)
        for config in steps_of(algorithm):
            calibrate_with(config, work)
        calibrate_with(RTNConfig(), work)
        done.update(_qualified(found.name, name) for name in work.layers)
        on_block(found.name, len(done), len(layers))

    lockstep(model, blocks, [sample.call.to(device) for sample in samples], visit)
    missed = [name for name in layers if name not in done]
    for name in missed:
        scheme, source = layers[name], generator(name)
        replace(
            name, functools.partial(quantize_module, scheme=scheme, algorithm=RTNConfig(), name=name, generator=source)
        )
    return missed


def _work(found: Visit, layers: Mapping[str, Scheme], generator: Callable[[str], Any], replace: Replace) -> BlockWork:
    names = dict(_layers_of(found.name, layers))
    modules = {relative: found.block.get_submodule(relative) if relative else found.block for relative in names}

    def install(layer: LayerWork) -> nn.Module:
        return replace(_qualified(found.name, layer.name), lambda dense: quantized_layer(layer))

    work = {
        relative: LayerWork(relative, modules[relative], layers[name])  # type: ignore[arg-type]
        for relative, name in names.items()
    }
    return BlockWork(
        name=found.name,
        block=found.block,
        calls=list(found.calls.values()),
        layers=work,
        generators=lambda relative: generator(_qualified(found.name, relative)),
        install=install,
    )


def _layers_of(block: str, layers: Mapping[str, Scheme]) -> Iterator[tuple[str, str]]:
    """(name relative to the block, qualified name)."""
    for name in layers:
        if name == block:
            yield "", name
        elif name.startswith(f"{block}."):
            yield name.removeprefix(f"{block}."), name


def _qualified(block: str, relative: str) -> str:
    return f"{block}.{relative}" if relative else block


def quantized_layer(layer: LayerWork) -> Quantized:
    """The module that a finished :class:`LayerWork` describes."""
    assert layer.quantized is not None
    given: dict[str, Any] = {"act_pre_scale": layer.act_pre_scale, "low_rank": layer.low_rank}
    if isinstance(layer.dense, nn.Linear):
        return QuantizedLinear.from_dense(layer.dense, layer.quantized, layer.scheme, **given)
    return QuantizedConv2d.from_dense(layer.dense, layer.quantized, layer.scheme, **given)
