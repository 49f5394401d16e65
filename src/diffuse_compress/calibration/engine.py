"""A model's layers quantized block by block, each on the inputs that the blocks before it, done already, give it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.lockstep import Visit, lockstep
from diffuse_compress.calibration.samples import Sample
from diffuse_compress.calibration.work_folder import FinishedBlocks
from diffuse_compress.errors import ModelStateError
from diffuse_compress.families.registry import family_of
from diffuse_compress.families.roles import block_elements
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, calibrate_with, steps_of
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork, unchanged_twin
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import Scheme

__all__ = [
    "block_work",
    "calibrate_block",
    "calibrate_layers",
    "calibration_blocks",
    "layers_of",
    "memory_explained",
    "quantize_layers",
    "quantized_layer",
]

Quantized = QuantizedLinear | QuantizedConv2d
Replace = Callable[[str, Callable[[nn.Module], nn.Module]], nn.Module]


def calibration_blocks(model: nn.Module, layers: Sequence[str], *, every: bool = False) -> list[str]:
    """Where calibration stops: the model's blocks that hold a layer of ``layers``, and every layer outside of them.

    ``every`` adds the blocks that hold none.
    """
    family = family_of(model)
    known = family.blocks(model) if family is not None else block_elements(model)
    blocks = [name for name in known if every or any(layer.startswith(f"{name}.") for layer in layers)]
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
    device: torch.device | str | None = None,
    finished: FinishedBlocks | None = None,
    on_block: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[str]:
    """Quantize ``layers`` in place.

    Args:
        model: in eval mode.
        layers: {qualified name: format to reach}.
        algorithm: of a calibrated algorithm or a sequence; layers that it leaves without codes are rounded to nearest.
        samples: of this model, on any device.
        replace: ``replace(name, convert)`` puts ``convert(dense)`` in a layer's place.
        generator: source of random numbers of a layer.
        device: where each block is calibrated and run; it and its layers then go back to where the model is.
        finished: blocks that are there are put in place as they are; the others are added as they are done.
        on_block: called after each block with its name, how many are done and how many there are.

    Returns:
        Layers that no sample reached; they are rounded to nearest.

    Raises:
        ModelStateError: inputs are not finite, or memory or disk run out.
        CheckpointError: a finished block cannot be read.
    """
    home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    there, done = home if device is None else torch.device(device), set[str]()
    # On another device every block is worth a stop: what is kept dense runs there too.
    blocks = calibration_blocks(model, list(layers), every=there != home)

    def visit(found: Visit) -> None:
        names = dict(layers_of(found.name, layers))
        stored = None if finished is None or not names else finished.load(found.name, names)
        if stored is not None:
            for short, name in names.items():
                model.get_submodule(name).to(home)
                replace(name, functools.partial(_restored, scheme=layers[name], tensors=stored[short])).to(there)
        elif names:
            install = functools.partial(_install, names, replace, home, there)
            calibrate_block(block_work(found, names, layers, samples, generator, install, there), algorithm)
            if finished is not None:
                finished.save(found.name, {short: model.get_submodule(name) for short, name in names.items()})
        done.update(names.values())
        on_block(found.name, len(done), len(layers))

    with memory_explained(there, len(samples)):
        calls = [sample.call.to(home) for sample in samples]
        lockstep(model, blocks, calls, visit, references=algorithm.needs_reference, device=there)
    missed = {name: scheme for name, scheme in layers.items() if name not in done}
    quantize_layers(missed, RTNConfig(), replace, generator=generator, device=device)
    return list(missed)


def _install(
    names: Mapping[str, str], replace: Replace, home: torch.device, device: torch.device, layer: LayerWork
) -> nn.Module:
    # What is put away, measured and restored is at home; the block goes on with its new layer.
    layer.dense.to(home)
    return replace(names[layer.name], lambda dense: quantized_layer(layer).to(home)).to(device)


def calibrate_block(work: BlockWork, algorithm: AlgorithmConfig) -> None:
    """Let ``algorithm`` decide on a block; layers that it leaves without codes are rounded to nearest."""
    work.unchanged = unchanged_twin(work.block) if algorithm.needs_reference else None
    for config in (*steps_of(algorithm), RTNConfig()):
        calibrate_with(config, work)


def quantize_layers(
    layers: Mapping[str, Scheme],
    algorithm: AlgorithmConfig,
    replace: Replace,
    *,
    generator: Callable[[str], torch.Generator],
    device: torch.device | str | None = None,
) -> None:
    """As :func:`calibrate_layers` for a data-free ``algorithm``, which looks at one weight after the other."""
    for name, scheme in layers.items():
        source = generator(name)
        convert = functools.partial(
            quantize_module, scheme=scheme, algorithm=algorithm, device=device, name=name, generator=source
        )
        replace(name, convert)


@contextlib.contextmanager
def memory_explained(device: torch.device, samples: int) -> Iterator[None]:
    """What to lower, where memory runs out inside."""
    try:
        yield
    except RuntimeError as error:
        # The CPU's allocator has no class of error of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        where = "" if device.type == "cpu" else ', or device="cpu"'
        raise ModelStateError(
            f"calibration: out of memory on {device} with {samples} samples. What it needs is one block, its largest "
            "intermediate result and the hidden states of all samples: give fewer (calibration.take(n), num_samples=), "
            f"smaller pictures or shorter texts{where}. ({str(error).splitlines()[0]})"
        ) from error


def block_work(
    found: Visit,
    names: Mapping[str, str],
    layers: Mapping[str, Scheme],
    samples: Sequence[Sample],
    generator: Callable[[str], Any],
    install: Callable[[LayerWork], nn.Module],
    device: torch.device,
) -> BlockWork:
    """What an algorithm gets of a block.

    Args:
        found: the block, on ``device``, and its calls by the index of their sample.
        names: {name relative to the block: qualified name} of the layers to quantize.
        layers: {qualified name: format to reach}.
        samples: for their weights.
        generator: source of random numbers of a layer, by its qualified name.
        install: puts a finished layer in its place.
        device: where the block is run.
    """
    modules = {relative: found.block.get_submodule(relative) if relative else found.block for relative in names}
    weights = [samples[index].weight for index in found.calls]
    return BlockWork(
        name=found.name,
        block=found.block,
        calls=list(found.calls.values()),
        layers={
            relative: LayerWork(relative, modules[relative], layers[name])  # type: ignore[arg-type]
            for relative, name in names.items()
        },
        generators=lambda relative: generator(names[relative]),
        install=install,
        device=device,
        weights=weights if any(not isinstance(w, float) or w != 1.0 for w in weights) else None,
        references=[found.references.get(index, call) for index, call in found.calls.items()],
    )


def layers_of(block: str, layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name relative to the block, qualified name) of those of ``layers`` that are in ``block``."""
    for name in layers:
        if name == block:
            yield "", name
        elif name.startswith(f"{block}."):
            yield name.removeprefix(f"{block}."), name


def quantized_layer(layer: LayerWork) -> Quantized:
    """The module that a finished :class:`LayerWork` describes."""
    assert layer.quantized is not None
    return _layer_like(
        layer.dense, layer.quantized, layer.scheme, act_pre_scale=layer.act_pre_scale, low_rank=layer.low_rank
    )


def _restored(dense: nn.Module, *, scheme: Scheme, tensors: Mapping[str, torch.Tensor]) -> Quantized:
    """The module whose parameters a :class:`FinishedBlocks` kept."""
    assert isinstance(dense, nn.Linear | nn.Conv2d)
    found = {name: tensor.to(dense.weight.device) for name, tensor in tensors.items()}
    quantized = QuantizedWeight(
        qweight=found["qweight"],
        scale=found["scale"],
        zero_point=found.get("zero_point"),
        group_scale=found.get("group_scale"),
        in_features=dense.weight.flatten(1).shape[1],
        scheme=scheme.weight,
    )
    low_rank = (found["low_rank_down"], found["low_rank_up"]) if "low_rank_down" in found else None
    given = {name: found.get(name) for name in ("act_pre_scale", "input_scale", "input_zero_point")}
    return _layer_like(dense, quantized, scheme, low_rank=low_rank, **given)


def _layer_like(dense: nn.Linear | nn.Conv2d, quantized: QuantizedWeight, scheme: Scheme, **given: Any) -> Quantized:
    if isinstance(dense, nn.Linear):
        return QuantizedLinear.from_dense(dense, quantized, scheme, **given)
    return QuantizedConv2d.from_dense(dense, quantized, scheme, **given)
