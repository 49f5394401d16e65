"""How much of a model's output error each layer causes in each format.

Trying every layer in every format takes a forward of the whole model each. Here the error is measured at the output of
the layer's block, for the price of the block's forward, and brought to the model's output by one factor for each block:
what the block does to the model's output with all its layers quantized, over what it does to its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.engine import calibration_blocks, evaluating
from diffuse_compress.calibration.lockstep import Visit, lockstep
from diffuse_compress.calibration.samples import Sample
from diffuse_compress.calls import Call, map_tensors
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig
from diffuse_compress.quantization.convert import quantize_module, replace_module
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["layer_sensitivities"]

Errors = dict[str, dict[Scheme, float]]


def layer_sensitivities(
    model: nn.Module,
    candidates: Mapping[str, Sequence[Scheme]],
    algorithm: AlgorithmConfig,
    samples: Sequence[Sample],
    *,
    generator: Callable[[str], torch.Generator],
    on_block: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Errors:
    """Squared relative error of the model's output that each layer causes alone, for each of its candidate formats.

    ``||f(x) - f_quantized(x)||^2 / ||f(x)||^2``, averaged over the samples. Errors of layers add up to about that of
    all of them together, as long as they are small. The model is as before afterwards, whatever happens.

    Args:
        model: dense.
        candidates: {qualified name of a layer: formats to try}.
        algorithm: data-free, that the layers are quantized by.
        samples: of this model, on any device.
        generator: source of random numbers of a layer.
        on_block: called after each block with its name, how many layers are done and how many there are.

    Returns:
        {layer: {format: error}}; a layer that no sample reached is missing.

    Cost:
        Forwards of the whole model for each sample: two, one for each block, and one for each layer of a block times
        formats.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    calls = [sample.call.to(device) for sample in samples]
    found: Errors = {}

    def quantized(name: str, scheme: Scheme) -> nn.Module:
        return quantize_module(model.get_submodule(name), scheme, algorithm, name=name, generator=generator(name))

    def visit(reached: Visit) -> None:
        block = _Block(model, reached)
        inside = [name for name in candidates if name == reached.name or name.startswith(f"{reached.name}.")]
        with _replaced(model, {name: quantized(name, candidates[name][0]) for name in inside}):
            own, overall = block.error(), _error(references, _outputs(model, calls))
        factor = overall / own if own else 1.0
        for name in inside:
            found[name] = {}
            for scheme in candidates[name]:
                with _replaced(model, {name: quantized(name, scheme)}):
                    found[name][scheme] = block.error() * factor
        on_block(reached.name, len(found), len(candidates))

    with evaluating(model), torch.no_grad():
        references = _outputs(model, calls)
        lockstep(model, calibration_blocks(model, list(candidates)), calls, visit)
    return found


class _Block:
    """A block with its inputs, and what it makes of them while it is dense."""

    def __init__(self, model: nn.Module, reached: Visit) -> None:
        self._model, self._name = model, reached.name
        self._calls = list(reached.calls.values())
        self._references = self._outputs()

    def error(self) -> float:
        """Of the block as it is now."""
        return _error(self._references, self._outputs())

    def _outputs(self) -> list[list[torch.Tensor]]:
        # By its name: a block that is a layer itself is not the same module any more.
        return _outputs(self._model.get_submodule(self._name), self._calls)


def _outputs(module: nn.Module, calls: Sequence[Call]) -> list[list[torch.Tensor]]:
    """Floating point tensors that ``module`` returns for each call."""
    return [_tensors(call.run(module)) for call in calls]


def _tensors(output: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(found.append, dict(output) if isinstance(output, Mapping) else output)
    return [tensor for tensor in found if tensor.is_floating_point()]


def _error(references: list[list[torch.Tensor]], outputs: list[list[torch.Tensor]]) -> float:
    """Squared relative error, averaged over calls and the tensors of each."""
    errors = []
    for reference, output in zip(references, outputs, strict=True):
        for exact, value in zip(reference, output, strict=True):
            norm = float(exact.float().square().sum(dtype=torch.float64))
            difference = float((exact.float() - value.float()).square_().sum(dtype=torch.float64))
            errors.append(difference / norm if norm else 0.0)
    return sum(errors) / max(1, len(errors))


@contextlib.contextmanager
def _replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    dense = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        yield
    finally:
        for name, layer in dense.items():
            replace_module(model, name, layer)
