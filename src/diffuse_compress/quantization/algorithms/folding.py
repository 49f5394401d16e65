"""Smoothing scales of the layers that share an input: one tensor for all, folded into what precedes them where it can.

A scale costs nothing at run time inside the weights of a norm (its gain and bias) or in the rows of a linear, if what
that returns reaches the layers and nothing else, through views and products alone: Llama's norms before q, k, v and
before gate, up; ``up_proj`` before ``down_proj``, of which the input is ``act(gate) * up``; ``v_proj`` before
``o_proj`` where every head has its own values. No model class is named here. One call of the block, with every
operation looked at, tells what reaches what; a second one, with factors moved by hand, must come to the same outputs.
A shift goes the same way where what precedes the layers has a bias, and a third call says so: a LayerNorm's, or that of
``v_proj``, as the weights of attention sum to one.

Nothing is folded before all codes are chosen. Until then the scale stays with the layers (``act_pre_scale``), and
algorithms see the block as it was. Rows are then scaled in the scales of the codes, and of what is dense only norms
change: of their dtype, the layers get the scale that the norm's rounded parameters amount to.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffuse_compress.calls import autocast_as
from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.layer_base import QuantizedLayer
from diffuse_compress.quantization.scheme import PerBlock, PerInputGroup, PerTensor

__all__ = ["Fold", "check_fold", "fold_scales", "folds", "preceding", "set_scale", "takes_shift"]

# A norm's dtype may be too coarse for a gain: the scale that it holds must be this near to the one that was chosen.
_NEAR = 1 / 16


@dataclass(frozen=True)
class Fold:
    """What takes the scale of some layers.

    Attributes:
        producer: name of a norm, or of a linear that is quantized too; relative to the block.
        layers: names of all the layers that read it.
        unit_offset: the norm multiplies by 1 + weight (Gemma).
        takes_shift: a shift of their input is subtracted from its bias.
    """

    producer: str
    layers: tuple[str, ...]
    unit_offset: bool = False
    takes_shift: bool = False


def check_fold(where: str, fold: Any) -> None:
    """Raise ConfigError if a config's ``fold`` is not True, False or None."""
    if fold is not None and not isinstance(fold, bool):
        raise ConfigError(f"{where}: fold is True, False or None (in language models), got {fold!r}.")


def set_scale(
    work: BlockWork,
    layers: Sequence[LayerWork],
    scale: torch.Tensor | None,
    fold: bool | None,
    shift: torch.Tensor | None = None,
) -> None:
    """Let ``scale`` multiply the input that ``layers`` share, less ``shift``, and both be folded at the end where that
    is exact. What an earlier call said of these layers is forgotten.

    Args:
        work: the block; its layers are dense.
        layers: that were all given one tensor.
        scale: fp32 [K] (convolutions [C]), positive, or None. All of the layers get the same tensor: by that it is
            known later that they see the same rows.
        fold: whether to fold; None, what holds for the model.
        shift: fp32 [K], of linears only; likewise.
    """
    names = tuple(layer.name for layer in layers)
    work.folded.pop(names, None)
    if folds(work, fold) and (scale is not None or shift is not None):
        found = preceding(work, names)
        if found is not None:
            takes_shift = shift is not None and _takes_shift(work, found)
            found = dataclasses.replace(found, takes_shift=takes_shift)
            ones = torch.ones_like(shift if scale is None else scale)  # type: ignore[arg-type]
            held = _as_held(work, found, ones if scale is None else scale, shift)
            if held is not None and (scale is not None or takes_shift):
                work.folded[names], (scale, shift) = found, held
    for layer in layers:
        layer.act_pre_scale, layer.act_pre_shift = scale, shift


def folds(work: BlockWork, fold: bool | None) -> bool:
    """Whether something is to be folded in this block."""
    return work.change is not None and (work.folds if fold is None else fold)


def takes_shift(work: BlockWork, names: Sequence[str]) -> bool:
    """Whether a shift of the input of these layers, which share it, can go into the bias of what precedes them."""
    found = preceding(work, names)
    return found is not None and _takes_shift(work, found)


def fold_scales(work: BlockWork) -> None:
    """Move the scales and shifts that :func:`set_scale` decided to fold, once every layer has been replaced."""
    for names, fold in work.folded.items():
        scale = work.layers[names[0]].act_pre_scale
        shift = work.layers[names[0]].act_pre_shift if fold.takes_shift else None
        assert scale is not None
        producer = work.block.get_submodule(fold.producer)
        if isinstance(producer, QuantizedLayer):
            producer.scale_outputs(scale)
            if shift is not None:
                producer.shift_outputs(-shift * scale)
        else:
            for name, parameter in _moved(producer, scale, fold.unit_offset, shift).items():
                assert work.change is not None
                work.change(f"{fold.producer}.{name}", parameter)
        for name in names:
            layer = work.block.get_submodule(name)
            assert isinstance(layer, QuantizedLayer)
            if shift is not None:
                layer.fold_pre_shift()
            layer.fold_pre_scale()


# --- what precedes ----------------------------------------------------------------------------------------------


def preceding(work: BlockWork, names: Sequence[str]) -> Fold | None:
    """What can take the scale of these layers, the nearest norm or linear; None if nothing can.

    Args:
        work: the block; its layers are dense.
        names: of layers that share an input.
    """
    if any(id(work.layers[name].dense.weight) in work.shared for name in names):
        return None
    if work.reached is None:
        work.reached = _trace(work)
    # Linears run later than the norm before them.
    for producer in reversed([name for name, readers in work.reached.items() if readers == set(names)]):
        for unit_offset in (False,) if producer in work.layers else (False, True):
            fold = Fold(producer, tuple(names), unit_offset)
            if _is_exact(work, fold):
                return fold
    return None


def _trace(work: BlockWork) -> dict[str, set[str]]:
    """{norm or linear of the block: layers that read its output}, of those that nothing else reads; as they run."""
    candidates = {name: module for name, module in work.block.named_modules() if name and _is_producer(work, module)}
    linears = {name: layer.dense for name, layer in work.layers.items() if _scales_rows(layer)}
    candidates |= {name: layer for name, layer in linears.items() if id(layer.weight) not in work.shared}
    # What this call passes by might read on another one.
    idle = {module for module in work.block.modules() if not module._modules and any(True for _ in module.parameters())}
    paths, handles, call = _Paths(), [], work.here(work.calls[0])
    try:
        handles += [module.register_forward_pre_hook(lambda module, args: idle.discard(module)) for module in set(idle)]
        for name, layer in work.layers.items():
            handles.append(layer.dense.register_forward_pre_hook(paths.enter(name)))
            handles.append(layer.dense.register_forward_hook(paths.leave))
        handles += [module.register_forward_hook(paths.start(name)) for name, module in candidates.items()]
        with torch.no_grad(), autocast_as(work.autocast), paths:
            paths.lost |= paths.of(call.run(work.block))
    finally:
        for handle in handles:
            handle.remove()
    return {} if idle else {name: readers for name, readers in paths.reached.items() if name not in paths.lost}


def _is_producer(work: BlockWork, module: nn.Module) -> bool:
    """Whether a module looks like a norm with a gain of its own: of its parameters, the function is probed later."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    plain = all(type(p) is nn.Parameter and p.ndim == 1 and p.is_floating_point() for p in own.values())
    alone = not module._modules and not any(id(parameter) in work.shared for parameter in own.values())
    return plain and alone and "weight" in own and own.keys() <= {"weight", "bias"}


def _scales_rows(layer: LayerWork) -> bool:
    by_row = not isinstance(layer.scheme.weight.granularity, PerTensor | PerBlock | PerInputGroup)
    return isinstance(layer.dense, nn.Linear) and by_row


class _Paths(TorchDispatchMode):
    """Follows what some modules return, through views and products, to the layers that read it.

    Attributes:
        reached: {module: layers}, in the order in which the modules run.
        lost: modules whose output something else reads, or that run more than once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reached: dict[str, set[str]] = {}
        self.lost: set[str] = set()
        self._carried: dict[int, set[str]] = {}  # by storage, whose tensors are held meanwhile
        self._held: list[torch.Tensor] = []
        self._inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._inside:
            self._follow(func, args, kwargs or {}, output)
        return output

    def start(self, name: str) -> Callable[..., None]:
        """Forward hook of a module that is followed."""

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if name in self.reached or not isinstance(output, torch.Tensor):
                self.lost.add(name)
            self.reached.setdefault(name, set())
            if isinstance(output, torch.Tensor):
                self._carry(output, {name})

        return leave

    def enter(self, name: str) -> Callable[..., None]:
        """Forward pre-hook of a layer: what it does with its input is its own business."""

        def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            for producer in self.of(args[0]):
                self.reached[producer].add(name)
            self._inside += 1

        return enter

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a layer."""
        self._inside -= 1

    def of(self, *trees: Any) -> set[str]:
        """Modules whose output is in these tensors."""
        tensors = [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]
        return set().union(*(self._carried.get(_storage(tensor), ()) for tensor in tensors))

    def _carry(self, tensor: torch.Tensor, names: set[str]) -> None:
        self._held.append(tensor)
        self._carried.setdefault(_storage(tensor), set()).update(names)

    def _follow(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        read = self.of(args, kwargs)
        if not read:
            return
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        changes = func._schema.is_mutable
        if not changes and results and all(_storage(result) in given for result in results):
            return  # a view
        kept = set() if changes else self._kept(func, args)
        self.lost |= read - kept
        if kept:
            self._carry(results[0], kept)

    def _kept(self, func: Any, args: Any) -> set[str]:
        """Modules whose channels are still apart in the (first) result: multiplied there as they were before."""
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name in ("clone", "_to_copy"):
            return self.of(args[0])
        if name == "mul":  # the square of one grows otherwise
            return self.of(args[0]) ^ self.of(args[1])
        if name == "div":
            return self.of(args[0]) - self.of(args[1])
        if name == "bmm":
            return self.of(args[1]) - self.of(args[0])
        if "scaled_dot_product" in name:
            return self.of(args[2]) - self.of(args[:2])
        return set()


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


# --- the same function ------------------------------------------------------------------------------------------


def _is_exact(work: BlockWork, fold: Fold) -> bool:
    """Whether layers and block return the same when factors are moved: powers of two, by which nothing is rounded.

    But for 1 + weight, and where an address decides in which order a product sums: half of the digits must be equal.
    """
    layers = [work.layers[name] for name in fold.layers]
    producer = work.block.get_submodule(fold.producer)
    width = layers[0].dense.weight.shape[1]
    if producer.weight.shape[0] != width:  # type: ignore[index]
        return False
    generator = torch.Generator().manual_seed(0)
    factors = 2.0 ** (2.0 * torch.randint(0, 2, (width,), generator=generator) - 1)
    factors = factors.to(layers[0].dense.weight.device)
    expected = _outputs(work, layers)
    with _replaced(producer, _moved(producer, factors, fold.unit_offset)), contextlib.ExitStack() as stack:
        for layer in layers:
            column = layer.per_column(factors)
            weight = layer.dense.weight.detach().flatten(1).float() / column
            stack.enter_context(
                _replaced(layer.dense, {"weight": weight.reshape(layer.dense.weight.shape).to(layer.dense.weight)})
            )
        found = _outputs(work, layers)
    return len(found) == len(expected) and all(map(_agree, expected, found))


def _takes_shift(work: BlockWork, fold: Fold) -> bool:
    """Whether layers and block return the same when numbers are subtracted from the bias of what precedes the layers,
    and what that takes from their outputs is added there. Half of the digits must be equal."""
    layers = [work.layers[name] for name in fold.layers]
    producer = work.block.get_submodule(fold.producer)
    bias = producer._parameters.get("bias")
    if bias is None or not all(isinstance(layer.dense, nn.Linear) for layer in layers):
        return False
    expected = _outputs(work, layers)
    wanted = torch.randn(bias.shape, generator=torch.Generator().manual_seed(0)).to(bias)
    moved = {"bias": bias.detach() - wanted}
    shift = bias.detach() - moved["bias"]  # as the bias holds it
    with _replaced(producer, moved), contextlib.ExitStack() as stack:
        for layer in layers:
            taken = nn.functional.linear(shift, layer.dense.weight.detach())
            handle = layer.dense.register_forward_hook(lambda module, args, output, taken=taken: output + taken)
            stack.callback(handle.remove)
        found = _outputs(work, layers)
    return len(found) == len(expected) and all(map(_agree, expected, found))


def _outputs(work: BlockWork, layers: Sequence[LayerWork]) -> list[torch.Tensor]:
    """What the layers and the block return for the first call: floating tensors."""
    found: list[torch.Tensor] = []
    call = work.here(work.calls[0])

    def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        found.append(output)

    handles = [layer.dense.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad(), autocast_as(work.autocast):
            output = call.run(work.block)
    finally:
        for handle in handles:
            handle.remove()
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return [*found, *(tensor for tensor in tensors if tensor.is_floating_point())]


def _agree(expected: torch.Tensor, found: torch.Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    error = (expected.double() - found.double()).norm()
    return bool(error <= torch.finfo(expected.dtype).eps ** 0.5 * expected.double().norm())


def _moved(
    producer: nn.Module, scale: torch.Tensor, unit_offset: bool, shift: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Parameters with which ``producer`` returns ``scale`` times what it does, less ``shift``, in their dtype."""
    found = {}
    for name, parameter in producer._parameters.items():
        if parameter is not None:
            value = parameter.detach()
            factors = scale.to(value.device, torch.float64 if value.device.type != "mps" else torch.float32)
            offset = float(unit_offset and name == "weight")
            factors = factors.reshape(-1, *(1,) * (value.ndim - 1))
            if shift is not None and name == "bias":
                offset = -shift.to(factors)
                found[name] = ((value.to(factors) + offset) * factors).to(value.dtype)
                continue
            found[name] = ((value.to(factors) + offset) * factors - offset).to(value.dtype)
    return found


def _as_held(
    work: BlockWork, fold: Fold, scale: torch.Tensor, shift: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """``scale`` and ``shift`` as they are once they are folded: a norm rounds its gain and bias. None if that is
    another scale, or none at all."""
    if fold.producer in work.layers:
        return scale, shift
    norm = work.block.get_submodule(fold.producer)
    moved = _moved(norm, scale, fold.unit_offset, shift if fold.takes_shift else None)
    if not all(bool(torch.isfinite(value).all()) for value in moved.values()):
        return None
    assert isinstance(norm.weight, nn.Parameter)
    offset = float(fold.unit_offset)
    before, after = norm.weight.detach().float() + offset, moved["weight"].float() + offset
    held = torch.where(before == 0, scale, after / before)  # a channel that is always zero takes any
    if not bool(((held / scale - 1).abs() <= _NEAR).all()):
        return None
    if fold.takes_shift:
        assert isinstance(norm.bias, nn.Parameter)
        shift = norm.bias.detach().float() - moved["bias"].float() / held
    return held, shift


@contextlib.contextmanager
def _replaced(module: nn.Module, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside, parameters of ``module`` hold other values; afterwards the memory that they had."""
    kept = {name: module._parameters[name].data for name in values}  # type: ignore[union-attr]
    try:
        for name, value in values.items():
            module._parameters[name].data = value  # type: ignore[union-attr]
        yield
    finally:
        for name, data in kept.items():
            module._parameters[name].data = data  # type: ignore[union-attr]
