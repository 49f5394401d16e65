"""CUDA graphs of a denoiser's calls, recorded in a loop and replayed in it.

The hooks of the model run in every call as they always do, on the host: they find the place in the loop and choose rows
of tables by an index on the device. What lies between them, the forward, is recorded once for each kind of call. A
graph reads its inputs from tensors that stay where they are, to which a replay copies what has changed since the last
one: arguments, what layers with tables give out, and what a feature cache adds. With such a cache there is a graph for
each pattern of what a step computes, reuses and keeps. What it keeps is copied out of the graph, so any other may add
it. Everything that this cannot follow is computed, and counted.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from diffuse_compress.caching.adapters import adapters_of
from diffuse_compress.caching.call import Call as CachedCall
from diffuse_compress.caching.runtime import cache_of
from diffuse_compress.caching.store import Signature
from diffuse_compress.components import GROUPS, unwrap
from diffuse_compress.families.base import Streams
from diffuse_compress.logging import get_logger
from diffuse_compress.pipelines.recorder import CudaRecorder, Input, Recorded, Recorder, fill
from diffuse_compress.runtime import steps
from diffuse_compress.runtime.blocks import BlockOption, disown, own, owned_options
from diffuse_compress.runtime.stats import MethodStats, Reason, warn
from diffuse_compress.temporal.lookup import LayerLookup, Mode
from diffuse_compress.temporal.table import table_of

__all__ = [
    "ARGUMENT",
    "COMPILED",
    "CONSUMER",
    "COUNTING",
    "FAILED",
    "HOOKED",
    "NO_CUDA",
    "PARKED",
    "REPLACED",
    "TWO_THREADS",
    "WARMING_UP",
    "GraphedCalls",
    "graphed_calls_of",
    "graphs_of",
]

_LOGGER = get_logger(__name__)

CONSUMER = "CUDA graph"
"""In statistics: calls that were replayed are its hits."""

WARMING_UP = Reason("a call of this kind came for the first or second time, or its graph was recorded", "nothing")
NO_CUDA = Reason("the model is not on a CUDA device", 'pipe.to("cuda")')
COMPILED = Reason(
    "the model is compiled as a whole",
    'compile its blocks instead (compile_repeated_blocks), or compile it with mode="reduce-overhead" alone',
)
HOOKED = Reason(
    "a hook must run inside of the model in every call (offloading, layerwise casting, hooks of your own)",
    "remove it: pipe.remove_all_hooks(), or keep the model on the device",
)
REPLACED = Reason("the model's forward was replaced by another library", "undo that, or leave cuda_graph=True out")
PARKED = Reason(
    "layers of a temporal table were computed whose weights had to be brought back first",
    'use TableConfig(weights="device")',
)
COUNTING = Reason("a layer with a table was computed since its input had another shape", "see the temporal table's own")
ARGUMENT = Reason("an argument is neither a tensor nor a plain value", "leave that argument out")
TWO_THREADS = Reason("two threads run the model at the same time", "give each thread a model of its own")
FAILED = Reason("the call could not be recorded; the log says why", "report it, with the log's message")

# Calls of a kind that are computed first, so that nothing is compiled or tuned while one is recorded; and of a pattern
# of a cache's steps.
_WARM_UPS, _PATTERN_WARM_UPS = 2, 1
# Each kind of call holds the memory of a forward pass's inputs, and each of its patterns that of its outputs.
_MOST_KINDS, _MOST_PATTERNS = 8, 64


class _Refused(Exception):
    """This call is computed, for this reason."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason


@dataclass
class _Call:
    """What tells a call from others: its inputs, and everything else that decides what is recorded."""

    key: Any
    values: list[torch.Tensor]
    lookups: list[LayerLookup]
    rebuild: Callable[[list[torch.Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]
    cached: CachedCall | None


@dataclass
class _Kind:
    """Calls that differ in the values of their inputs only, and in what a feature cache has them do.

    Attributes:
        streams: at each of the cache's sites.
        seen: calls that were computed, by pattern.
        refused: why those of a pattern cannot be recorded.
        inputs: which all its graphs read: arguments and looked up values in their order.
        added: likewise what the cache adds, by segment and stream.
        graphs: by pattern, the latest used last.
    """

    streams: dict[int, Signature] = field(default_factory=dict)
    seen: Counter[Hashable] = field(default_factory=Counter)
    refused: dict[Hashable, Reason] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    added: dict[Hashable, Input] = field(default_factory=dict)
    graphs: OrderedDict[Hashable, Recorded] = field(default_factory=OrderedDict)

    def forget(self) -> None:
        """Free the memory of the graphs."""
        self.inputs.clear()
        self.added.clear()
        self.graphs.clear()


class _Graphed(BlockOption):
    """Of a model whose forward is owned."""

    name, rank, wraps, composes = CONSUMER, 20, True, False

    def __init__(self, graphs: GraphedCalls) -> None:
        self._graphs = graphs

    def around(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """Replays the call."""
        return self._graphs._forward(*args, **kwargs)


class GraphedCalls:
    """The graphs of one model; :func:`graphed_calls_of` gives the one that all pipelines share."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self._model = weakref.ref(model)
        self._recorder = recorder
        self._kinds: OrderedDict[Any, _Kind] = OrderedDict()
        self._warned: set[Reason] = set()
        self._made_for: Any = None
        self._problem: Reason | None = None
        self._local = threading.local()
        self._running = threading.Lock()
        self._users = 0
        self._guard = threading.Lock()

    @property
    def num_graphs(self) -> int:
        """Kinds of calls, and patterns of each, that are recorded."""
        return sum(len(kind.graphs) for kind in self._kinds.values())

    @contextlib.contextmanager
    def used(self, whole: Any) -> Iterator[None]:
        """Inside, calls of the model are replayed where they can be.

        Args:
            whole: the model as the pipeline holds it, compiled or not.
        """
        model = unwrap(whole)
        with self._guard:
            self._users += 1
            if self._users == 1:
                self._problem = _why_never(whole)
                self._check(model)
                steps.track(model, steps.Consumer(CONSUMER, saves=False))
                # The last one: whatever other hooks do is done when it runs.
                self._hook = model.register_forward_pre_hook(self._arm, with_kwargs=True)
                if self._problem is None:
                    self._take_over(model)
        try:
            yield
        finally:
            with self._guard:
                self._users -= 1
                if self._users == 0:
                    self._hook.remove()
                    if model.__dict__.get("forward") == self._forward:
                        del model.__dict__["forward"]
                    disown(model, CONSUMER)

    def _take_over(self, model: nn.Module) -> None:
        """Below a cache of whole steps, which asks for a call or does without."""
        if owned_options(model):
            own(model, _Graphed(self))
        else:
            model.forward = self._forward  # type: ignore[method-assign]

    def _check(self, model: nn.Module) -> None:
        """Graphs read weights where they were, and do what the modules' attributes said."""
        table = table_of(model)
        # Those go and come, and no graph computes with them.
        parked = [] if table is None else [look.layer for look in table.lookups.values() if look.parking is not None]
        away = {id(parameter) for layer in parked for parameter in layer.parameters(recurse=False)}
        tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in away]
        weights = [(tensor.data_ptr(), tensor.dtype) for tensor in tensors if not tensor.is_meta]
        made_for = weights, [_settings(module) for module in model.modules() if module is not model]
        if made_for != self._made_for:
            self._made_for = made_for
            self._kinds.clear()

    def _arm(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook: what follows is a call, and not a part of the model that a table is built from."""
        self._local.armed = self._problem is None
        if self._problem is not None:
            self._miss(self._problem)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward while :meth:`used`."""
        model = self._model()
        assert model is not None
        armed, self._local.armed = getattr(self._local, "armed", False), False
        if not armed or torch.compiler.is_compiling():
            return type(model).forward(model, *args, **kwargs)
        if not self._running.acquire(blocking=False):
            self._miss(TWO_THREADS)
            return type(model).forward(model, *args, **kwargs)
        try:
            return self._replayed(model, args, kwargs)
        except _Refused as refused:
            self._miss(refused.reason)
            return type(model).forward(model, *args, **kwargs)
        finally:
            self._running.release()

    def _replayed(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._describe(model, args, kwargs)
        kind = self._kind(call.key)
        if call.cached is not None and len(kind.streams) < len(call.cached.cache.sites):
            return self._noted(call.cached, kind, model, args, kwargs)
        pattern = None if call.cached is None else call.cached.foresee(kind.streams)
        graph = kind.graphs.get(pattern)
        if graph is not None:
            kind.graphs.move_to_end(pattern)
            self._hit()
        else:
            graph = self._made(model, call, kind, pattern)
            self._miss(WARMING_UP)
        if call.cached is not None:
            added = call.cached.given
            call.values += [added[segment][name] for segment in sorted(added) for name in sorted(added[segment])]
        output, made = graph.run(call.values)
        if call.cached is not None:
            call.cached.deliver(made, kind.streams)
        return output

    def _noted(
        self, cached: CachedCall, kind: _Kind, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Computed, to learn of which shape the streams are where the cache may add to them."""
        self._miss(WARMING_UP)
        kind.streams.clear()
        cached.noted = kind.streams
        output = type(model).forward(model, *args, **kwargs)
        if len(kind.streams) == len(cached.cache.sites):
            kind.seen[cached.pattern] += 1
        return output

    def _kind(self, key: Any) -> _Kind:
        kind = self._kinds.setdefault(key, _Kind())
        self._kinds.move_to_end(key)
        if len(self._kinds) > 8 * _MOST_KINDS:
            self._kinds.popitem(last=False)  # calls that never come again
        return kind

    def _made(self, model: nn.Module, call: _Call, kind: _Kind, pattern: Hashable) -> Recorded:
        """A new graph, when it is time for one."""
        if pattern in kind.refused:
            raise _Refused(kind.refused[pattern])
        if len(kind.seen) > 8 * _MOST_PATTERNS:
            kind.seen.clear()
        warm = kind.seen.total() >= _WARM_UPS and kind.seen[pattern] >= _PATTERN_WARM_UPS
        kind.seen[pattern] += 1
        if not warm:
            raise _Refused(WARMING_UP)
        try:
            graph = kind.graphs[pattern] = self._record(model, call, kind)
        except _Refused as refused:
            kind.refused[pattern] = refused.reason
            raise
        if len(kind.graphs) > _MOST_PATTERNS:
            kind.graphs.popitem(last=False)
        recorded = [other for other in self._kinds.values() if other.graphs]
        for other in recorded[: len(recorded) - _MOST_KINDS]:
            other.forget()
        return graph

    # --- what a call is -------------------------------------------------------------------------------------------

    def _describe(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        if torch.is_grad_enabled():
            raise _Refused(steps.GRADIENT)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [number for number, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        values = [leaves[number] for number in places]
        device = next((value.device for value in values if value.ndim > 1), torch.device("cpu"))
        if not self._recorder.serves(device):
            raise _Refused(NO_CUDA)
        plain = tuple(leaf for leaf in leaves if not isinstance(leaf, torch.Tensor))
        if not all(isinstance(leaf, bool | int | float | str | torch.dtype | None) for leaf in plain):
            raise _Refused(ARGUMENT)
        lookups, modes = _lookups_of(model)

        def rebuild(tensors: list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            filled = list(leaves)
            for number, tensor in zip(places, tensors, strict=True):
                filled[number] = tensor
            given: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(filled, spec)
            return given

        values += [lookup.value for lookup in lookups if lookup.value is not None]
        forms = tuple((value.shape, value.stride(), value.dtype, value.device) for value in values)
        # Tensors that are one now share what a graph reads.
        shared = _firsts(values)
        # True == 1, so types count.
        typed = tuple((type(leaf), leaf) for leaf in plain)
        cache = cache_of(model)
        cached = None if cache is None or cache.whole_steps else cache.call
        state = adapters_of(model), _precision(device.type), model.training, cache if cached is not None else None
        return _Call((spec, typed, forms, shared, modes, state), values, lookups, rebuild, cached)

    # --- recording ------------------------------------------------------------------------------------------------

    def _record(self, model: nn.Module, call: _Call, kind: _Kind) -> Recorded:
        """The call's graph. What layers look up is shared where several give out one tensor."""
        device = next(value.device for value in call.values if value.ndim > 1)
        if not kind.inputs:
            own = {first: Input(call.values[first], device) for first in dict.fromkeys(_firsts(call.values))}
            kind.inputs = [own[first] for first in _firsts(call.values)]
        fill(kind.inputs, call.values)
        tensors = [given.tensor for given in kind.inputs]
        split = len(tensors) - len(call.lookups)
        arguments = call.rebuild(tensors[:split])
        added = {} if call.cached is None else _inputs_of(call.cached.given, kind)

        def run() -> Any:
            for lookup, value in zip(call.lookups, tensors[split:], strict=True):
                lookup.value = value
            # New containers: a forward may pop what it has used from those that it is given.
            args, kwargs = pytree.tree_map(lambda leaf: leaf, arguments)
            if call.cached is None:
                return type(model).forward(model, *args, **kwargs), None
            given = {segment: {name: one.tensor for name, one in found.items()} for segment, found in added.items()}
            with call.cached.recording(given) as made:
                output = type(model).forward(model, *args, **kwargs)
            return output, made

        before = _counts()
        try:
            replay, output = self._recorder.record(run, device)
        except Exception as error:  # whatever a forward does that no graph can hold: the call is computed
            _LOGGER.warning("%s: a call could not be recorded as a CUDA graph: %r", type(model).__name__, error)
            raise _Refused(FAILED) from error
        finally:
            for lookup, value in zip(call.lookups, call.values[split:], strict=True):
                lookup.value = value
            counted = _counts() != before
            _restore(before)
        if counted:
            raise _Refused(COUNTING)
        inputs = [added[segment][name] for segment in sorted(added) for name in sorted(added[segment])]
        return Recorded([*kind.inputs, *inputs], replay, output)

    # --- counting -------------------------------------------------------------------------------------------------

    def _hit(self) -> None:
        context = steps.current()
        if context is not None:
            context.hit(CONSUMER)

    def _miss(self, reason: Reason) -> None:
        context = steps.current()
        if context is not None:
            context.miss(CONSUMER, reason)
        if reason is not WARMING_UP and reason not in self._warned:
            self._warned.add(reason)
            model = self._model()
            warn(
                f"{type(model).__name__}: calls are computed and not replayed as a CUDA graph: {reason}. {reason.fix}."
            )


def graphed_calls_of(model: nn.Module) -> GraphedCalls:
    """The graphs of a model, which live as long as it does."""
    with _lock:
        if model not in _calls:
            _calls[model] = GraphedCalls(model, CudaRecorder())
        return _calls[model]


_lock = threading.Lock()
_calls: weakref.WeakKeyDictionary[nn.Module, GraphedCalls] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def graphs_of(pipe: Any) -> Iterator[None]:
    """Inside, calls of a pipeline's denoisers are replayed where they can be."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    with contextlib.ExitStack() as stack:
        for name, part in parts.items():
            if GROUPS["denoisers"].match(name):
                stack.enter_context(graphed_calls_of(unwrap(part)).used(part))
        yield


def _why_never(whole: Any) -> Reason | None:
    """Why no call of a model can be replayed."""
    model = unwrap(whole)
    if model is not whole or model._compiled_call_impl is not None:
        return COMPILED
    if any(_is_hooked(module, module is model) for module in model.modules()):
        return HOOKED
    return REPLACED if "forward" in model.__dict__ and not owned_options(model) else None


def _settings(module: nn.Module) -> Any:
    """What a module is and was set to (FreeU, chunks, an attention's processor and backend), as a value."""
    own = vars(module)
    processor = own.get("processor")
    plain = [(name, value) for name, value in own.items() if isinstance(value, bool | int | float | str)]
    return id(module), id(own.get("forward")), id(processor), getattr(processor, "_attention_backend", None), plain


def _is_hooked(module: nn.Module, root: bool) -> bool:
    """By accelerate, diffusers or a user; hooks of the model itself run outside of its graph."""
    registry = getattr(module, "_diffusers_hook", None)
    if hasattr(module, "_hf_hook") or getattr(registry, "hooks", None):
        return True
    return not root and bool(module._forward_hooks or module._forward_pre_hooks)


def _lookups_of(model: nn.Module) -> tuple[list[LayerLookup], tuple[tuple[str, Mode], ...]]:
    """Layers that give out values of a table in this call, and their names and modes."""
    table = table_of(model)
    lookups = [] if table is None else list(table.lookups.values())
    if any(lookup.mode is not Mode.LOOKUP and lookup.parking is not None for lookup in lookups):
        raise _Refused(PARKED)
    found = [lookup for lookup in lookups if lookup.mode in (Mode.LOOKUP, Mode.PARTLY) and lookup.value is not None]
    return found, tuple((lookup.name, lookup.mode) for lookup in found)


def _inputs_of(given: Mapping[int, Streams], kind: _Kind) -> dict[int, dict[str, Input]]:
    """What graphs read of what a cache adds: the same tensors for the first segment of each, and so on."""
    found: dict[int, dict[str, Input]] = {}
    for number, segment in enumerate(sorted(given)):
        for name, value in given[segment].items():
            place = (number, name, value.shape, value.stride(), value.dtype, value.device)
            if place not in kind.added:
                kind.added[place] = Input(value, value.device)
            found.setdefault(segment, {})[name] = kind.added[place]
    return found


def _precision(kind: str) -> Any:
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _firsts(values: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Of each tensor, the place at which it stands first."""
    known: dict[int, int] = {}
    return tuple(known.setdefault(id(value), number) for number, value in enumerate(values))


def _counts() -> dict[str, MethodStats]:
    """What the current call has counted."""
    context = steps.current()
    methods = {} if context is None else context.stats.methods
    return {name: replace(method, misses=Counter(method.misses)) for name, method in methods.items()}


def _restore(counts: dict[str, MethodStats]) -> None:
    context = steps.current()
    if context is not None:
        context.stats.methods = counts
