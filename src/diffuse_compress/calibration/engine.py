"""A model's layers quantized block by block, each on the inputs that the blocks before it, done already, give it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.lockstep import Visit, lockstep
from diffuse_compress.calibration.samples import Sample
from diffuse_compress.calibration.work_folder import FinishedBlocks, FinishedLayer
from diffuse_compress.calls import NO_AUTOCAST, autocast_as
from diffuse_compress.errors import ModelStateError
from diffuse_compress.failures import is_out_of_memory
from diffuse_compress.families.registry import family_of
from diffuse_compress.families.roles import block_elements
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, calibrate_with, steps_of
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.algorithms.folding import fold_scales
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.twin import unchanged_twin
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear
from diffuse_compress.quantization.observers import ObserverConfig
from diffuse_compress.quantization.packed import QuantizedWeight, SparseOutliers
from diffuse_compress.quantization.scheme import Scheme

__all__ = [
    "block_work",
    "calibrate_block",
    "calibrate_layers",
    "calibrating",
    "calibration_blocks",
    "layers_of",
    "memory_explained",
    "quantize_layers",
    "quantized_layer",
    "sample_weights",
]

Quantized = QuantizedLinear | QuantizedConv2d
Keep = Callable[[nn.Parameter], None]
Replace = Callable[[str, Callable[[nn.Module], nn.Module]], nn.Module]


def calibration_blocks(model: nn.Module, layers: Sequence[str], *, every: bool = False) -> list[str]:
    """Where calibration stops: the model's blocks that hold a layer of ``layers``, and every layer outside of them.

    ``every`` adds the blocks that hold none: on another device what is kept dense runs there too.
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
    observer: ObserverConfig | None = None,
    keep: Keep | None = None,
    folds: bool = False,
    device: torch.device | str | None = None,
    finished: FinishedBlocks | None = None,
    ready: Mapping[str, Quantized] | None = None,
    on_block: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[str]:
    """Quantize ``layers`` in place.

    Args:
        model: is in eval mode meanwhile.
        layers: {qualified name: format to reach}.
        algorithm: or a sequence; layers that it leaves without codes are rounded to nearest.
        samples: of this model, on any device.
        replace: ``replace(name, convert)`` puts ``convert(dense)`` in a layer's place.
        generator: source of random numbers of a layer.
        observer: chooses the ranges of static inputs; by default ``ObserverConfig()``.
        keep: called with each other parameter before it is changed; None, where nothing but the layers may change.
        folds: whether smoothing scales are folded into what precedes the layers where a config does not say.
        device: where each block is calibrated and run; it and its layers then go back to where the model is.
        finished: blocks that are there are put in place as they are; the others are added as they are done.
        ready: further layers, quantized, which take their places when the samples get there; not so for references.
        on_block: called after each block with its name, how many are done and how many there are.

    Returns:
        Layers that no sample reached; they are rounded to nearest, with dynamic inputs.

    Raises:
        ModelStateError: inputs are not finite, or memory or disk run out.
        CheckpointError: a finished block cannot be read.
    """
    home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    there = home if device is None else torch.device(device)
    blocks = calibration_blocks(model, [*layers, *(ready or {})], every=there != home)
    labels = [_label(index, sample) for index, sample in enumerate(samples)]
    given = (layers, algorithm, sample_weights(samples, model), labels, replace, generator, observer, keep, folds)
    run = _Run(model, *given, finished, home, there)
    run.ready.update(ready or {})
    run.depths = _depths(blocks, layers)

    def visit(found: Visit) -> None:
        run.visit(found)
        on_block(found.name, len(run.done), len(layers))

    with calibrating(model), memory_explained(there, len(samples)):
        lockstep(model, blocks, [s.call for s in samples], visit, references=algorithm.needs_reference, device=there)
    run.put_ready(list(run.ready), home)
    missed = {name: scheme for name, scheme in layers.items() if name not in run.done}
    quantize_layers(missed, RTNConfig(), replace, generator=generator, device=device)
    return list(missed)


def _depths(blocks: Sequence[str], layers: Mapping[str, Scheme]) -> dict[str, float]:
    """For each block that holds some of ``layers``, the share of these blocks before it."""
    working = [name for name in blocks if any(True for _ in layers_of(name, layers))]
    return {name: index / len(working) for index, name in enumerate(working)}


@dataclass
class _Run:
    """What :func:`calibrate_layers` was given. The model is at ``home``, and blocks are calibrated ``there``."""

    model: nn.Module
    layers: Mapping[str, Scheme]
    algorithm: AlgorithmConfig
    weights: Sequence[float | torch.Tensor]
    labels: Sequence[str]
    replace: Replace
    generator: Callable[[str], torch.Generator]
    observer: ObserverConfig | None
    keep: Keep | None
    folds: bool
    finished: FinishedBlocks | None
    home: torch.device
    there: torch.device
    ready: dict[str, Quantized] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    depths: dict[str, float] = field(default_factory=dict)

    @functools.cached_property
    def shared(self) -> frozenset[int]:
        """Ids of the parameters that have several names: of tied weights, and of modules in several places."""
        counts = Counter(id(parameter) for _, parameter in self.model.named_parameters(remove_duplicate=False))
        return frozenset(parameter for parameter, count in counts.items() if count > 1)

    def visit(self, found: Visit) -> None:
        """Quantize the layers of a block, or put those in place that an earlier run has finished."""
        names = dict(layers_of(found.name, self.layers))
        changes = _Changes(found.block, self.keep, self.home, self.there)
        # As it is in the dense model: the layers that are ready are no part of what the others are to give.
        unchanged = unchanged_twin(found.block) if names and self.algorithm.needs_reference else None
        self.put_ready([name for _, name in layers_of(found.name, self.ready)], self.there)
        stored = None if self.finished is None or not names else self.finished.load(found.name, names)
        if stored is not None:
            for short, name in names.items():
                self.model.get_submodule(name).to(self.home)
                convert = functools.partial(_restored, stored=stored.layers[short])
                self.replace(name, convert).to(self.there)
            for name, value in stored.parameters.items():
                changes.set(name, value)
        elif names:
            work = self._work(found, names, changes)
            work.unchanged = unchanged
            calibrate_block(work, self.algorithm)
            if self.finished is not None:
                modules: dict[str, Any] = {short: self.model.get_submodule(name) for short, name in names.items()}
                self.finished.save(found.name, modules, changes.made)
        self.done.update(names.values())

    def put_ready(self, names: Iterable[str], device: torch.device) -> None:
        """Put layers that are quantized already in their places, which are on this device."""
        for name in names:
            self.model.get_submodule(name).to(self.home)
            layer = self.ready.pop(name).to(self.home)
            self.replace(name, lambda dense, layer=layer: layer).to(device)  # type: ignore[misc]

    def _work(self, found: Visit, names: Mapping[str, str], changes: _Changes) -> BlockWork:
        def install(layer: LayerWork) -> nn.Module:
            # What is put away, measured and restored is at home; the block goes on with its new layer.
            layer.dense.to(self.home)
            return self.replace(names[layer.name], lambda dense: quantized_layer(layer).to(self.home)).to(self.there)

        work = block_work(found, names, self.layers, self.weights, self.generator, install, self.there)
        work.samples = [self.labels[index] for index in found.calls]
        work.observer = self.observer or work.observer
        work.change = None if self.keep is None else changes.set
        work.folds, work.shared, work.depth = self.folds, self.shared, self.depths[found.name]
        return work


def _label(index: int, sample: Sample) -> str:
    """A sample in messages; of a trajectory, from which many are taken, with the item and the timestep."""
    if sample.timestep is None:
        return str(index)
    return f"{index} (item {sample.item}, timestep {sample.timestep:g})"


class _Changes:
    """Parameters of a block, beside those of its layers, that were changed: they are put away at home before."""

    def __init__(self, block: nn.Module, keep: Keep | None, home: torch.device, there: torch.device) -> None:
        self._block, self._keep, self._home, self._there = block, keep, home, there
        self.made: dict[str, nn.Parameter] = {}

    def set(self, name: str, value: torch.Tensor) -> None:
        """Let a parameter, named relative to the block, hold ``value``; others may share the memory it had."""
        assert self._keep is not None
        parameter = self._block.get_parameter(name)
        parameter.data = parameter.data.to(self._home)
        self._keep(parameter)
        parameter.data = value.to(self._there)
        self.made[name] = parameter


def calibrate_block(work: BlockWork, algorithm: AlgorithmConfig) -> None:
    """Let ``algorithm`` decide on a block, and round what it leaves to nearest.

    Ranges of static inputs are chosen when everything is decided that changes inputs, and nothing yet that must know
    their grid. Scales are folded on codes that are final; what follows the codes comes last, on layers that are so too.

    Raises:
        ModelStateError: weights or inputs are not finite; the message names the layer, and of inputs the sample.
    """
    for layer in work.layers.values():
        if not bool(torch.isfinite(layer.dense.weight).all()):
            raise ModelStateError(
                f"{work.full_name(layer.name)}: quantization needs finite weights, got inf or nan. Check the "
                "checkpoint, or leave this layer out with modules_to_not_convert."
            )
    if algorithm.needs_reference and work.unchanged is None:
        work.unchanged = unchanged_twin(work.block)
    with autocast_as(NO_AUTOCAST):
        steps = steps_of(algorithm)
        for config in (*(step for step in steps if not step.follows_codes), RTNConfig()):
            if config.chooses_codes:
                work.observe_inputs()
            calibrate_with(config, work)
        fold_scales(work)
        for config in steps:
            if config.follows_codes:
                calibrate_with(config, work)


@contextlib.contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in eval mode, and layers get an input that is given by its name (``layer(input=x)``) by its
    place, where hooks look for it. Afterwards every module is as before, and what has taken its place like it."""
    before = {name: (module, module.training) for name, module in model.named_modules(remove_duplicate=False)}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(_by_place, with_kwargs=True) for layer in layers]
    try:
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        now = dict(model.named_modules(remove_duplicate=False))
        for name, (module, training) in before.items():
            module.training = now.get(name, module).training = training


def _by_place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args or "input" not in kwargs:
        return None
    rest = dict(kwargs)
    return (rest.pop("input"),), rest


def quantize_layers(
    layers: Mapping[str, Scheme],
    algorithm: AlgorithmConfig,
    replace: Replace,
    *,
    generator: Callable[[str], torch.Generator],
    device: torch.device | str | None = None,
) -> None:
    """As :func:`calibrate_layers` for a data-free ``algorithm``, which looks at one weight after the other. Inputs that
    were to be static are dynamic: nothing tells their ranges."""
    for name, scheme in layers.items():
        source = generator(name)
        convert = functools.partial(
            quantize_module,
            scheme=scheme.with_dynamic_inputs(),
            algorithm=algorithm,
            device=device,
            name=name,
            generator=source,
        )
        replace(name, convert)


@contextlib.contextmanager
def memory_explained(device: torch.device, samples: int) -> Iterator[None]:
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


def block_work(
    found: Visit,
    names: Mapping[str, str],
    layers: Mapping[str, Scheme],
    weights: Sequence[float | torch.Tensor],
    generator: Callable[[str], Any],
    install: Callable[[LayerWork], nn.Module],
    device: torch.device,
) -> BlockWork:
    """What an algorithm gets of a block.

    Args:
        found: the block, on ``device``, and its calls by the index of their sample.
        names: {name relative to the block: qualified name} of the layers to quantize.
        layers: {qualified name: format to reach}.
        weights: of all samples (:func:`sample_weights`).
        generator: source of random numbers of a layer, by its qualified name.
        install: puts a finished layer in its place.
        device: where the block is run.
    """
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


def sample_weights(samples: Sequence[Sample], model: nn.Module) -> list[float | torch.Tensor]:
    """Weight of each sample, which is 0 for the padding of its texts.

    Padding is computed like any token and looked at by none; as most of a batch it would decide about the layers.
    """
    names = list(inspect.signature(model.forward).parameters)
    return [_weight(sample, names) for sample in samples]


def _weight(sample: Sample, names: Sequence[str]) -> float | torch.Tensor:
    named = dict(zip(names, sample.call.args, strict=False))
    mask, weight = {**named, **sample.call.kwargs}.get("attention_mask"), sample.weight
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return weight
    if bool((mask < 0).any() or mask.all() or not mask.any()):
        return weight  # one that is added to scores, or no padding
    there = (mask != 0).reshape(-1).float().cpu()
    if isinstance(weight, torch.Tensor):
        return weight.reshape(-1) * there if weight.numel() == there.numel() else weight
    return weight * there


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
    # A copy: layers that share an input share its scale until here, and must not share memory.
    scale = None if layer.act_pre_scale is None else layer.act_pre_scale.clone()
    given: dict[str, Any] = {"act_pre_scale": scale, "low_rank": layer.low_rank}
    if layer.act_pre_shift is not None:
        given["act_pre_shift"] = layer.act_pre_shift.clone()
    if layer.dense_columns is not None and layer.dense_weight is not None:
        given["dense_columns"] = (layer.dense_columns, layer.dense_weight)
    if layer.input_qparams is not None:
        given |= {"input_scale": layer.input_qparams.scale, "input_zero_point": layer.input_qparams.zero_point}
    return _layer_like(layer.dense, layer.quantized, layer.scheme, **given)


def _restored(dense: nn.Module, *, stored: FinishedLayer) -> Quantized:
    """The module that a :class:`FinishedBlocks` kept."""
    assert isinstance(dense, nn.Linear | nn.Conv2d)
    found, scheme = {name: tensor.to(dense.weight.device) for name, tensor in stored.tensors.items()}, stored.scheme
    quantized = QuantizedWeight(
        qweight=found["qweight"],
        scale=found["scale"],
        zero_point=found.get("zero_point"),
        group_scale=found.get("group_scale"),
        in_features=dense.weight.flatten(1).shape[1],
        scheme=scheme.weight,
    )
    if "outlier_rows" in found:
        quantized.outliers = SparseOutliers(*(found[f"outlier_{name}"] for name in ("rows", "columns", "values")))
    low_rank = (found["low_rank_down"], found["low_rank_up"]) if "low_rank_down" in found else None
    if "input_scale" not in found:  # of a layer in the block that no sample reached
        scheme = scheme.with_dynamic_inputs()
    given: dict[str, Any] = {name: found.get(name) for name in ("act_pre_scale", "input_scale", "input_zero_point")}
    if isinstance(dense, nn.Linear):  # as it was: a shift may be in it, with or without one that is left
        given |= {"act_pre_shift": found.get("act_pre_shift"), "bias": found.get("bias")}
    if "dense_columns" in found:
        given["dense_columns"] = (found["dense_columns"], found["dense_weight"])
    layer = _layer_like(dense, quantized, scheme, low_rank=low_rank, **given)
    if "bias" in found:
        layer.bias.data = found["bias"]
    layer.folded = stored.folded
    return layer


def _layer_like(dense: nn.Linear | nn.Conv2d, quantized: QuantizedWeight, scheme: Scheme, **given: Any) -> Quantized:
    if isinstance(dense, nn.Linear):
        return QuantizedLinear.from_dense(dense, quantized, scheme, **given)
    return QuantizedConv2d.from_dense(dense, quantized, scheme, **given)
