"""What a model of an unknown class is made of, found by running it on perturbed inputs.

Change the sample, the timestep or a condition, and see which layers' outputs change, bit for bit: a layer that the
sample does not reach can be computed once for a run, or once for ever. The same probe tests the hand-written families,
and finds which of the first block's arguments such a layer reads, by comparing bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.families.base import SAMPLE_NAMES, TIMESTEP_NAMES, Dependence, Family, TemporalMap
from diffuse_compress.families.embedding import ACTIVATIONS, Entry, Reader
from diffuse_compress.families.roles import block_elements, has_matrix
from diffuse_compress.patterns import generalize

__all__ = ["Probe", "generic_family", "probe"]


@dataclass(frozen=True)
class Probe:
    """What a few forward passes showed.

    Attributes:
        dependence: of every linear and convolution that ran, by qualified name.
        blocks: elements of the model's block lists in the order they first ran.
        conditions: arguments that were perturbed as conditions.
        entry: the block by whose arguments most layers that run from it on and do not see the sample are explained.
        reads: (argument of that block or of the model, activation) that these layers are called with.
    """

    dependence: dict[str, Dependence]
    blocks: list[str]
    conditions: tuple[str, ...] = ()
    entry: str | None = None
    reads: dict[str, tuple[str, str]] = field(default_factory=dict)


@torch.no_grad()
def probe(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    sample: str | None = None,
    timestep: str | None = None,
    seed: int = 0,
) -> Probe:
    """Run ``model(**inputs)`` as it is, then with one input changed at a time.

    Args:
        model: any model with weights, in eval mode; weights that are still zero hide what depends on what.
        inputs: keyword arguments of its forward. Floating tensors and integer labels that are neither sample nor
            timestep are conditions, in nested dictionaries and lists too. Masks and position ids stay.
        sample: which of the inputs is; by default found by its usual names (``hidden_states``, ``sample``).
        timestep: likewise. "" says that the model has none, which goes without saying where the sample is token ids.
        seed: of the perturbations.

    Raises:
        ModelStateError: the model is in training mode or on the meta device.
        ConfigError: the sample or the timestep is not among the inputs.
    """
    if model.training or any(parameter.is_meta for parameter in model.parameters()):
        raise ModelStateError("probe runs the model: it needs loaded weights and eval mode (model.eval()).")
    generator = torch.Generator("cpu").manual_seed(seed)
    sample = _input("sample", sample, SAMPLE_NAMES, inputs)
    if timestep is None and _is_token_ids(inputs[sample]):
        timestep = next((name for name in TIMESTEP_NAMES if name in inputs), "")
    if timestep != "":
        timestep = _input("timestep", timestep, TIMESTEP_NAMES, inputs)
    base, order = _digests(model, inputs)
    again, _ = _digests(model, inputs)
    changed: dict[str, set[str]] = {name: {"sample"} if base[name] != again[name] else set() for name in base}
    variants = [("sample", {**inputs, sample: _perturbed(inputs[sample], generator)})]
    if timestep:
        variants.append(("timestep", {**inputs, timestep: _later(inputs[timestep])}))
    rest = {name: value for name, value in inputs.items() if name not in (sample, timestep)}
    for path, tensor in _tensors(rest):
        if _is_condition(path, tensor):
            changed_inputs = {**inputs, **_with(rest, path, _perturbed(tensor, generator))}
            variants.append(("condition", changed_inputs))
    for what, variant in variants:
        found, _ = _digests(model, variant)
        for name, digest in found.items():
            if digest != base.get(name):
                changed.setdefault(name, set()).add(what)
    dependence = {name: _dependence(reached) for name, reached in changed.items()}
    conditions = tuple(name for name in rest if any(_is_condition(path, t) for path, t in _tensors({name: rest[name]})))
    # One list of blocks may refine the text before another is given the embedding of the timestep.
    firsts = {name.rpartition(".")[0]: name for name in reversed(order)}
    reads = {block: _reads(model, inputs, dependence, block) for block in order if block in firsts.values()}
    entry = max(reads, key=lambda block: len(reads[block]), default=None)
    return Probe(dependence, order, conditions, entry, reads[entry] if entry else {})


def _input(what: str, named: str | None, usual: tuple[str, ...], inputs: Mapping[str, Any]) -> str:
    """Name of the sample or the timestep among the inputs."""
    if named is not None and named not in inputs:
        raise ConfigError(f"probe: {what}={named!r} is not among the inputs ({', '.join(inputs)}).")
    found = named or next((name for name in usual if name in inputs), None)
    if found is None:
        raise ConfigError(
            f"probe: no {what} among the inputs ({', '.join(inputs)}); looked for {', '.join(usual)}. "
            f'Name it with {what}="...".'
        )
    return found


def _is_token_ids(sample: Any) -> bool:
    return isinstance(sample, torch.Tensor) and not sample.is_floating_point()


def _dependence(reached: set[str]) -> Dependence:
    if "sample" in reached:
        return Dependence.SAMPLE
    if reached == {"timestep"}:
        return Dependence.TIMESTEP
    if reached == {"condition"}:
        return Dependence.CONDITION
    return Dependence.TIMESTEP_AND_CONDITION if reached else Dependence.NOTHING


def generic_family(model: nn.Module, found: Probe) -> Family:
    """A family of this one class: blocks and temporal map as probed, no composition of blocks."""
    listed = {
        dependence: tuple(pattern for pattern, value in generalize(found.dependence) if value is dependence)
        for dependence in Dependence
    }
    temporal = TemporalMap(
        timestep=listed[Dependence.TIMESTEP],
        timestep_and_condition=listed[Dependence.TIMESTEP_AND_CONDITION],
        condition=listed[Dependence.CONDITION],
        nothing=listed[Dependence.NOTHING],
        readers=tuple(
            Reader((pattern,), (read[0],), partial(_as_found, source=read[0], activation=read[1]))
            for pattern, read in generalize({name: found.reads.get(name) for name in found.dependence})
            if read is not None
        ),
        conditions=found.conditions,
        entry=found.entry,
    )
    return Family(
        name=f"generic ({type(model).__name__})",
        classes=(type(model).__name__,),
        blocks=lambda model: list(found.blocks),
        temporal=lambda model: temporal,
    )


def _as_found(entry: Entry, layer: str, source: str, activation: str) -> torch.Tensor:
    return ACTIVATIONS[activation](entry[source])


def _reads(
    model: nn.Module, inputs: Mapping[str, Any], dependence: Mapping[str, Dependence], block: str
) -> dict[str, tuple[str, str]]:
    """What the layers that run from a block on are called with: {layer: (argument, activation)}.

    A layer that is called with different things in one call, or with something else, is left out.
    """
    arguments: dict[str, Any] = {}
    called: dict[str, list[torch.Tensor]] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not arguments:
            bound = signature(type(module).forward).bind(module, *args, **kwargs).arguments
            arguments.update({**inputs, **dict(list(bound.items())[1:])})

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: called.setdefault(name, []).append(args[0]) if arguments and args else None

    with _hooks() as handles:
        for name, module in model.named_modules():
            if dependence.get(name) not in (None, Dependence.SAMPLE, Dependence.NOTHING):
                handles.append(module.register_forward_pre_hook(note(name)))
            if name == block:
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        model(**inputs)
    candidates = [
        ((source, activation), function(value))
        for source, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        for activation, function in ACTIVATIONS.items()
    ]
    found = {}
    for name, given in called.items():
        equal = [read for read, value in candidates if all(torch.equal(value, tensor) for tensor in given)]
        if equal:
            found[name] = equal[0]
    return found


def _digests(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[str, list[int]], list[str]]:
    """{layer: a number for each of its outputs}, and the blocks in the order they ran."""
    digests: dict[str, list[int]] = {}
    order: list[str] = []
    blocks = set(block_elements(model))

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: digests.setdefault(name, []).append(_digest(output))

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args: None if name in order else order.append(name)

    with _hooks() as handles:
        for name, module in model.named_modules():
            if has_matrix(module):
                handles.append(module.register_forward_hook(note(name)))
            if name in blocks:
                handles.append(module.register_forward_pre_hook(enter(name)))
        model(**inputs)
    return digests, order


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _digest(output: Any) -> int:
    """A weighted sum of the bits modulo 2**64: equal for equal bits, and different in all but contrived cases.

    Differences that cancel in the sum would be missed. A perturbation changes many elements by unrelated amounts.
    """
    tensor = output if isinstance(output, torch.Tensor) else output[0]
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(view).reshape(-1).to(torch.int64)
    weights = torch.arange(1, bits.numel() + 1, device=bits.device, dtype=torch.int64)
    return int((bits * (weights * 0x9E3779B97F4A7C1 | 1)).sum())


def _tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, (*path, index))


def _is_condition(path: tuple[Any, ...], tensor: torch.Tensor) -> bool:
    name = str(path[-1] if isinstance(path[-1], str) else path[0])
    if "mask" in name or (name.endswith(("_ids", "rotary_emb")) and name != "time_ids"):
        return False
    return tensor.is_floating_point() or (tensor.ndim == 1 and tensor.dtype in (torch.int64, torch.int32))


def _perturbed(value: Any, generator: torch.Generator) -> Any:
    """Another value of the same kind; of a list of tensors, each."""
    if isinstance(value, list | tuple):
        return type(value)(_perturbed(item, generator) for item in value)
    tensor: torch.Tensor = value
    if tensor.is_floating_point():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        return tensor + (noise + 0.5).to(tensor.device, tensor.dtype)
    # Labels and token ids: valid ones, in another order. Equal ones become 0, or 1 if that is what they were.
    flipped = tensor.flip(-1)
    return torch.where(flipped == tensor, (tensor == 0).to(tensor.dtype), flipped)


def _later(timestep: Any) -> Any:
    """Another timestep of the same scale; no value is its own image."""
    largest = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
    step, middle = (0.1, 0.5) if largest <= 1.0 and not isinstance(timestep, int) else (17, 500)
    if isinstance(timestep, torch.Tensor):
        if not timestep.is_floating_point():
            step, middle = 17, 500
        return torch.where(timestep < middle, timestep + step, timestep - step).to(timestep.dtype)
    return timestep + step if timestep < middle else timestep - step


def _with(value: Any, path: tuple[Any, ...], replacement: torch.Tensor) -> Any:
    """A copy of nested ``value`` with one tensor replaced."""
    if not path:
        return replacement
    if isinstance(value, Mapping):
        return {**value, path[0]: _with(value[path[0]], path[1:], replacement)}
    items = list(value)
    items[path[0]] = _with(items[path[0]], path[1:], replacement)
    return type(value)(items)
