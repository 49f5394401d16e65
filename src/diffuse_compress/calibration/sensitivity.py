"""How much of a model's output error each layer causes in each format, and all of them together.

What counts is what the algorithm that is going to be used makes of a layer, on inputs that it was not calibrated on.
Rounding to nearest ranks layers otherwise: GPTQ takes the error of one to a fourteenth and leaves that of another as it
was. On the calibration samples themselves GPTQ's errors look 2.6 times smaller than on others, those of some layers ten
times (emoji_pixart, 16 calls). So each layer is quantized on some samples and judged on others, those of other items.

Trying every layer in every format takes a forward of the whole model each. Here the error is measured at the output of
the layer's block, for the price of the block's forward, and brought to the model's output by one factor for each layer:
what the layer, in its coarsest format, does to the model's output over what it does to the block's. Errors of layers
then add up to nearly that of all of them together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.engine import (
    Replace,
    block_work,
    calibrate_block,
    calibrate_layers,
    calibrating,
    calibration_blocks,
    layers_of,
    memory_explained,
    quantize_layers,
    quantized_layer,
    sample_weights,
)
from diffuse_compress.calibration.lockstep import Visit, current_sample, lockstep
from diffuse_compress.calibration.samples import Sample
from diffuse_compress.calls import Call, map_tensors
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig
from diffuse_compress.quantization.algorithms.block import LayerWork, mean_weight, row_weights
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import module_aliases, quantize_module, replace_module
from diffuse_compress.quantization.observers import ObserverConfig
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["Split", "layer_sensitivities", "output_error", "split_samples"]

NUM_SAMPLES = 16
"""Samples that formats are judged on: enough to rank layers, each costs dozens of forwards."""
FACTOR_FORWARDS = 2048
"""Whole forwards, about, for the layers' factors: models of many layers get them from fewer samples, two at least."""

Errors = dict[str, dict[Scheme, float]]
Outputs = dict[int, list[torch.Tensor]]
"""{number of a call: floating point tensors}"""
Weights = Sequence[float | torch.Tensor]
Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Split:
    """Samples of a model for two uses.

    Attributes:
        fit: what a calibrated algorithm is given.
        judge: what errors are measured on.
    """

    fit: Sequence[Sample]
    judge: Sequence[Sample]


def split_samples(samples: Sequence[Sample], algorithm: AlgorithmConfig) -> Split:
    """Every second item is for judging, of which the first 16 samples are used; a data-free algorithm needs no other.

    Calls of one item are much alike, so they stay on one side. Where there is one item only its calls are dealt out,
    and a single sample serves both uses. Samples of weight 0 serve none.
    """
    samples = [sample for sample in samples if mean_weight(sample.weight)]
    if not algorithm.needs_calibration:
        return Split((), samples[:NUM_SAMPLES])
    items = list(dict.fromkeys(sample.item for sample in samples))
    held = set(items[1::2][:NUM_SAMPLES])
    fit = [sample for sample in samples if sample.item not in held]
    judge = [sample for sample in samples if sample.item in held]
    if not held:
        fit, judge = list(samples[::2]), list(samples[1::2] or samples)
    return Split(fit, judge[:NUM_SAMPLES])


def layer_sensitivities(
    model: nn.Module,
    candidates: Mapping[str, Sequence[Scheme]],
    algorithm: AlgorithmConfig,
    split: Split,
    *,
    generator: Callable[[str], torch.Generator],
    device: torch.device | str | None = None,
    advance: Advance = lambda name, done, total: None,
) -> Errors:
    """Squared relative error of the model's output that each layer causes alone, for each of its candidate formats.

    ``||f(x) - f_quantized(x)||^2 / ||f(x)||^2``, averaged over the samples by their weights; in outputs with a row for
    each token by these, so that padding does not count. The model is as before afterwards, whatever happens.

    Args:
        model: dense.
        candidates: {qualified name of a layer: formats to try}.
        algorithm: that the layers are quantized by, in its form for searches, each on dense inputs.
        split: samples of this model, on any device.
        generator: source of random numbers of a layer.
        device: where each block is run; what is held of the samples stays with the model.
        advance: called after each step with the name of a layer or block, steps done, and steps there are: two for
            each layer.

    Returns:
        {layer: {format: error}}; a layer that no sample reached is missing.

    Cost:
        Forwards of the whole model: for each sample to judge one for each layer of a block times formats, and two; for
        each sample to fit one for each format (what GPTQ takes) and one; for the factors one for each layer and block,
        on as many samples as make about 2,048. Each block is calibrated once in each format. Memory is that of
        calibrating, and one block's layers in one format.
    """
    subject = _Subject(model, candidates, generator, device)
    with calibrating(model), torch.no_grad():
        factors = subject.factors(split.judge, advance)
        errors = subject.block_errors(algorithm.for_search(), split, advance)
    return {
        name: {scheme: error * factors[name] for scheme, error in by_format.items()}
        for name, by_format in errors.items()
    }


def output_error(
    model: nn.Module,
    layers: Mapping[str, Scheme],
    algorithm: AlgorithmConfig,
    split: Split,
    *,
    generator: Callable[[str], torch.Generator],
    observer: ObserverConfig | None = None,
    device: torch.device | str | None = None,
    advance: Advance = lambda name, done, total: None,
) -> float:
    """Squared relative error of the model's output with ``layers`` quantized, as :func:`layer_sensitivities` has it.

    Args:
        model: dense; as before afterwards, whatever happens.
        layers: {qualified name: format}.
        algorithm: that quantizes them, on the samples to fit if it is calibrated.
        split: samples of this model.
        generator: source of random numbers of a layer.
        observer: chooses the ranges of static inputs, which layers may have that are not searched for.
        device: as in :func:`layer_sensitivities`.
        advance: called after each block that is calibrated with its name, layers done, and layers there are.

    Cost:
        One calibration, two forwards for each sample to judge, and the memory of the packed layers beside the dense.
    """
    subject = _Subject(model, dict.fromkeys(layers, ()), generator, device)
    with calibrating(model), torch.no_grad(), _restored(model) as replace:
        calls, weights = [sample.call for sample in split.judge], sample_weights(split.judge, model)
        _, references = subject.run(calls)
        if algorithm.needs_calibration or any(scheme.has_static_inputs for scheme in layers.values()):
            calibrate_layers(
                model,
                layers,
                algorithm,
                split.fit or split.judge,
                replace,
                generator=generator,
                observer=observer,
                device=device,
                on_block=advance,
            )
        else:
            quantize_layers(layers, algorithm, replace, generator=generator, device=device)
            advance("", len(layers), len(layers))
        return _error(references, subject.run(calls)[1], weights)


class _Subject:
    """A dense model whose layers are tried, each alone."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Mapping[str, Sequence[Scheme]],
        generator: Callable[[str], torch.Generator],
        device: torch.device | str | None,
    ) -> None:
        self._model, self._candidates, self._generator = model, candidates, generator
        self._home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._there = self._home if device is None else torch.device(device)
        # On another device every block is worth a stop: what is kept dense runs there too.
        self._blocks = calibration_blocks(model, list(candidates), every=self._there != self._home)

    def run(self, calls: Sequence[Call], block: str | None = None) -> tuple[Outputs, Outputs]:
        """What ``block`` and the model, as they are now, make of each call."""
        seen: Outputs = {}
        ends: Outputs = {}
        watched = [(self._model, ends)] + ([] if block is None else [(self._model.get_submodule(block), seen)])

        def keep(kept: Outputs, module: nn.Module, args: Any, output: Any) -> None:
            kept.setdefault(current_sample(), []).extend(_tensors(output))

        handles = [module.register_forward_hook(functools.partial(keep, kept)) for module, kept in watched]
        # At home there is nothing to stop at: the calls run through one after the other.
        stops = [] if self._there == self._home else self._blocks
        try:
            with memory_explained(self._there, len(calls)):
                lockstep(self._model, stops, calls, lambda visit: None, device=self._there)
        finally:
            for handle in handles:
                handle.remove()
        return seen, ends

    def factors(self, samples: Sequence[Sample], advance: Advance) -> dict[str, float]:
        """{layer: what becomes at the model's output of its squared relative error at the block's}.

        By rounding to nearest: how an error goes on depends on where it is far more than on what made it.
        """
        steps = len(self._candidates) + len(self._blocks)
        samples = samples[: max(2, FACTOR_FORWARDS // max(1, steps))]
        calls, weights = [sample.call for sample in samples], sample_weights(samples, self._model)
        found: dict[str, float] = {}
        for block in self._blocks:
            inside = [name for _, name in layers_of(block, self._candidates)]
            if not inside:
                continue
            exact = self.run(calls, block)
            errors = {}
            for done, name in enumerate(inside, start=len(found) + 1):
                with self._in_place(name, self._rounded(name)):
                    pairs = zip(exact, self.run(calls, block), strict=True)
                    errors[name] = [_error(*pair, weights) for pair in pairs]
                advance(name, done, 2 * len(self._candidates))
            # A layer without an error of its own (no call reached it, all weights on the grid) is taken as the others.
            own, whole = (sum(values) for values in zip(*errors.values(), strict=True))
            pooled = whole / own if own else 1.0
            found |= {name: whole / own if own else pooled for name, (own, whole) in errors.items()}
        return found

    def block_errors(self, algorithm: AlgorithmConfig, split: Split, advance: Advance) -> Errors:
        """{layer: {format: squared relative error of its block's output}}."""
        found: Errors = {}
        samples = [*split.judge, *split.fit]
        weights = sample_weights(samples, self._model)

        def visit(reached: Visit) -> None:
            inside = [name for _, name in layers_of(reached.name, self._candidates)]
            # Where all samples of one kind pass a block by (two experts, say) those of the other serve for both.
            to_judge = {i: call for i, call in reached.calls.items() if i < len(split.judge)} or reached.calls
            to_fit = {i: call for i, call in reached.calls.items() if i >= len(split.judge)} or reached.calls
            exact = self._block_outputs(reached.name, to_judge) if inside else {}
            for scheme in dict.fromkeys(scheme for name in inside for scheme in self._candidates[name]):
                layers = {name: scheme for name in inside if scheme in self._candidates[name]}
                for name, layer in self._quantized(reached, to_fit, layers, algorithm, weights).items():
                    with self._in_place(name, layer):
                        error = _error(exact, self._block_outputs(reached.name, to_judge), weights)
                    found.setdefault(name, {})[scheme] = error
            advance(reached.name, len(self._candidates) + len(found), 2 * len(self._candidates))

        with memory_explained(self._there, len(samples)):
            calls = [sample.call for sample in samples]
            lockstep(self._model, self._blocks, calls, visit, device=self._there)
        return found

    def _quantized(
        self,
        reached: Visit,
        calls: dict[int, Call],
        layers: Mapping[str, Scheme],
        algorithm: AlgorithmConfig,
        weights: Weights,
    ) -> dict[str, nn.Module]:
        """``layers`` of a block as ``algorithm`` makes them; the block is dense again."""
        made: dict[str, nn.Module] = {}
        names = dict(layers_of(reached.name, layers))
        with _restored(self._model) as replace:

            def install(layer: LayerWork) -> nn.Module:
                new = replace(names[layer.name], lambda dense: quantized_layer(layer).to(self._there))
                made[names[layer.name]] = new
                return new

            given = dataclasses.replace(reached, calls=calls, references={})
            calibrate_block(block_work(given, names, layers, weights, self._generator, install, self._there), algorithm)
        return {name: made[name] for name in layers}

    def _rounded(self, name: str) -> nn.Module:
        """A layer in its coarsest format, whose error stands out from those of the arithmetic."""
        scheme = min(self._candidates[name], key=lambda scheme: scheme.weight.format.bits)
        dense = self._model.get_submodule(name)
        device = None if self._there == self._home else self._there
        return quantize_module(dense, scheme, RTNConfig(), device=device, name=name, generator=self._generator(name))

    @contextlib.contextmanager
    def _in_place(self, name: str, layer: nn.Module) -> Iterator[None]:
        with _restored(self._model) as replace:
            replace(name, lambda dense: layer)
            yield

    def _block_outputs(self, name: str, calls: Mapping[int, Call]) -> Outputs:
        # By its name: a block that is a layer itself is not the same module any more.
        block = self._model.get_submodule(name)
        return {index: _tensors(call.copied(self._there).run(block)) for index, call in calls.items()}


def _tensors(output: Any) -> list[torch.Tensor]:
    """Floating point tensors of an output."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, dict(output) if isinstance(output, Mapping) else output)
    return [tensor for tensor in found if tensor.is_floating_point()]


def _error(references: Outputs, outputs: Outputs, weights: Weights) -> float:
    """Squared relative error, averaged over calls, as they count, and the tensors of each."""
    total = count = 0.0
    for index, reference in references.items():
        for exact, value in zip(reference, outputs[index], strict=True):
            difference, norm = _squares(exact.float() - value.float(), weights[index]), _squares(exact, weights[index])
            factor = mean_weight(weights[index])
            total += factor * difference / norm if norm else 0.0
            count += factor
    return total / count if count else 0.0


def _squares(x: torch.Tensor, weight: float | torch.Tensor) -> float:
    """Sum of squares; in a tensor with a row for each weight, by these."""
    squares, rows = x.float().square(), row_weights(weight, x)
    if rows is not None:
        squares = squares.flatten(0, -2) * rows.unsqueeze(1)
    return float(squares.sum(dtype=torch.float64))


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[Replace]:
    """Gives ``replace(name, convert)`` as :func:`calibrate_layers` takes it; afterwards all layers are the old ones."""
    aliases, dense = module_aliases(model), dict[str, nn.Module]()

    def replace(name: str, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
        module = model.get_submodule(name)
        new = convert(module)
        for alias in aliases[id(module)]:
            dense[alias] = module
            replace_module(model, alias, new)
        return new

    try:
        yield replace
    finally:
        for name, layer in dense.items():
            replace_module(model, name, layer)
