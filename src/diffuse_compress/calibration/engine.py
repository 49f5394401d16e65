"""A model's layers quantized block by block, each on the inputs that the blocks before it, done already, give it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.lockstep import Visit, lockstep
from diffuse_compress.calibration.samples import Sample
from diffuse_compress.calibration.work_folder import FinishedBlocks
from diffuse_compress.errors import ModelStateError
from diffuse_compress.failures import is_out_of_memory
from diffuse_compress.families.registry import family_of
from diffuse_compress.families.roles import block_elements
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, calibrate_with, steps_of
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork, unchanged_twin
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["calibrate_layers", "calibration_blocks"]

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
        ConfigError: the model cannot be run on a sample.
        CheckpointError: a finished block cannot be read.
    """
    home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    there, done = home if device is None else torch.device(device), set[str]()
    weights = [_weight(sample, model) for sample in samples]
    # On another device every block is worth a stop: what is kept dense runs there too.
    blocks = calibration_blocks(model, list(layers), every=there != home)

    def visit(found: Visit) -> None:
        names = dict(_layers_of(found.name, layers))
        stored = None if finished is None or not names else finished.load(found.name, names)
        if stored is not None:
            _put_back(model, stored, names, layers, replace, home=home, device=there)
        elif names:
            work = _work(found, names, layers, weights, generator, replace, home=home, device=there)
            work.unchanged = unchanged_twin(found.block) if algorithm.needs_reference else None
            for config in (*steps_of(algorithm), RTNConfig()):
                calibrate_with(config, work)
            if finished is not None:
                finished.save(found.name, {short: model.get_submodule(name) for short, name in names.items()})
        done.update(names.values())
        on_block(found.name, len(done), len(layers))

    with _memory_explained(there, len(samples)):
        calls = [sample.call.to(home) for sample in samples]
        lockstep(model, blocks, calls, visit, references=algorithm.needs_reference, device=there)
    missed = {name: scheme for name, scheme in layers.items() if name not in done}
    _round_to_nearest(missed, generator, replace, device)
    return list(missed)


def _put_back(
    model: nn.Module,
    stored: Mapping[str, Mapping[str, torch.Tensor]],
    names: Mapping[str, str],
    layers: Mapping[str, Scheme],
    replace: Replace,
    *,
    home: torch.device,
    device: torch.device,
) -> None:
    """Layers of a block that was finished before."""
    for short, name in names.items():
        model.get_submodule(name).to(home)
        replace(name, functools.partial(_restored, scheme=layers[name], tensors=stored[short])).to(device)


def _round_to_nearest(
    layers: Mapping[str, Scheme],
    generator: Callable[[str], torch.Generator],
    replace: Replace,
    device: torch.device | str | None,
) -> None:
    for name, scheme in layers.items():
        source = generator(name)
        convert = functools.partial(
            quantize_module, scheme=scheme, algorithm=RTNConfig(), device=device, name=name, generator=source
        )
        replace(name, convert)


@contextlib.contextmanager
def _memory_explained(device: torch.device, samples: int) -> Iterator[None]:
    """What to lower, where memory runs out inside."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        where = "" if device.type == "cpu" else ', or device="cpu"'
        raise ModelStateError(
            f"calibration: out of memory on {device} with {samples} samples. What it needs is one block, its largest "
            "intermediate result and the hidden states of all samples: give fewer (calibration.take(n), num_samples=), "
            f"smaller pictures or shorter texts{where}. ({str(error).splitlines()[0]})"
        ) from error


def _work(
    found: Visit,
    names: Mapping[str, str],
    layers: Mapping[str, Scheme],
    weights: Sequence[float | torch.Tensor],
    generator: Callable[[str], Any],
    replace: Replace,
    *,
    home: torch.device,
    device: torch.device,
) -> BlockWork:
    def install(layer: LayerWork) -> nn.Module:
        # What is put away, measured and restored is at home; the block goes on with its new layer.
        layer.dense.to(home)
        return replace(names[layer.name], lambda dense: quantized_layer(layer).to(home)).to(device)

    modules = {relative: found.block.get_submodule(relative) if relative else found.block for relative in names}
    own = [weights[index] for index in found.calls]
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
        weights=own if any(not isinstance(w, float) or w != 1.0 for w in own) else None,
        references=[found.references.get(index, call) for index, call in found.calls.items()],
        samples=list(found.calls),
    )


def _weight(sample: Sample, model: nn.Module) -> float | torch.Tensor:
    """The sample's weight, which is 0 for the padding of its texts.

    Padding is computed like any token and looked at by none; as most of a batch it would decide about the layers.
    """
    named = dict(zip(inspect.signature(model.forward).parameters, sample.call.args, strict=False))
    mask, weight = {**named, **sample.call.kwargs}.get("attention_mask"), sample.weight
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return weight
    if bool((mask < 0).any() or mask.all() or not mask.any()):
        return weight  # one that is added to scores, or no padding
    there = (mask != 0).reshape(-1).float().cpu()
    if isinstance(weight, torch.Tensor):
        return weight.reshape(-1) * there if weight.numel() == there.numel() else weight
    return weight * there


def _layers_of(block: str, layers: Mapping[str, Scheme]) -> Iterator[tuple[str, str]]:
    """(name relative to the block, qualified name)."""
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
