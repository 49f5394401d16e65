"""CUDA graphs of a denoiser's calls, recorded in a loop and replayed in it.

The hooks of the model run in every call as they always do, on the host: they find the place in the loop and choose rows
of tables by an index on the device. What lies between them, the forward, is recorded once for each kind of call. A
graph reads its inputs from tensors of its own, to which a replay copies what has changed since the last one: arguments,
and what layers with tables give out. Everything that this cannot follow is computed, and counted.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from diffuse_compress.caching.adapters import adapters_of
from diffuse_compress.caching.runtime import cache_of
from diffuse_compress.components import GROUPS, unwrap
from diffuse_compress.logging import get_logger
from diffuse_compress.runtime import steps
from diffuse_compress.runtime.stats import MethodStats, Reason, warn
from diffuse_compress.temporal.lookup import LayerLookup, Mode
from diffuse_compress.temporal.table import table_of

__all__ = [
    "ARGUMENT",
    "COMPILED",
    "CONSUMER",
    "COUNTING",
    "FAILED",
    "FEATURE_CACHE",
    "HOOKED",
    "NO_CUDA",
    "PARKED",
    "REPLACED",
    "TWO_THREADS",
    "WARMING_UP",
    "CudaRecorder",
    "GraphedCalls",
    "Recorder",
    "graphed_calls_of",
    "graphs_of",
]

_LOGGER = get_logger(__name__)

CONSUMER = "CUDA graph"
"""In statistics: calls that were replayed are its hits."""

WARMING_UP = Reason("a call of this kind came for the first or second time, or its graph was recorded", "nothing")
NO_CUDA = Reason("the model is not on a CUDA device", 'pipe.to("cuda")')
FEATURE_CACHE = Reason("a feature cache decides what runs", "pipe.disable_cache(), or leave cuda_graph=True out")
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

_WARM_UPS = 2
# Each holds the memory of a whole forward pass's inputs and outputs.
_MOST_GRAPHS = 8


class Recorder(Protocol):
    """Records what runs on a device."""

    def serves(self, device: torch.device) -> bool:
        """Can it record there?"""

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """Record ``run``: a function that does the same again, and what it writes to (nothing is written yet)."""


class CudaRecorder:
    """Graphs of one memory pool: they are replayed one after the other, and outputs are copied."""

    def __init__(self) -> None:
        self._pool: Any = None

    def serves(self, device: torch.device) -> bool:
        """True for a CUDA device."""
        return device.type == "cuda"

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """See :class:`Recorder`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        return graph.replay, output


class _Input:
    """A tensor that a graph reads, and what it was filled from last."""

    def __init__(self, value: torch.Tensor, device: torch.device) -> None:
        with torch.inference_mode(False):
            # Strides of 0 could not be written to.
            self.tensor = torch.empty_like(value, device=device, requires_grad=False)
        self._filled: tuple[weakref.ref[torch.Tensor], int] | None = None

    def fill(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(to, from) of a copy that is needed; None if ``value`` is what was copied last, not written to since."""
        version = None if value.is_inference() else value._version
        if version is not None and self._filled is not None and self._filled[0]() is value:
            if self._filled[1] == version:
                return None
        self._filled = None if version is None else (weakref.ref(value), version)
        return self.tensor, value


@dataclass
class _Graph:
    """One kind of call, recorded."""

    inputs: list[_Input]
    replay: Callable[[], object]
    output: Any

    def run(self, values: list[torch.Tensor]) -> Any:
        """The output for these values, in tensors of its own."""
        _fill(self.inputs, values)
        self.replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, self.output)


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


class GraphedCalls:
    """The graphs of one model; :func:`graphed_calls_of` gives the one that all pipelines share."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self._model = weakref.ref(model)
        self._recorder = recorder
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._seen: Counter[Any] = Counter()
        self._refused: dict[Any, Reason] = {}
        self._warned: set[Reason] = set()
        self._made_for: Any = None
        self._problem: Reason | None = None
        self._local = threading.local()
        self._running = threading.Lock()
        self._users = 0
        self._guard = threading.Lock()

    @property
    def num_graphs(self) -> int:
        """Kinds of calls that are recorded."""
        return len(self._graphs)

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
                    model.forward = self._forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            with self._guard:
                self._users -= 1
                if self._users == 0:
                    self._hook.remove()
                    if model.__dict__.get("forward") == self._forward:
                        del model.__dict__["forward"]

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
            self._graphs.clear()
            self._seen.clear()
            self._refused.clear()

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
        graph = self._graphs.get(call.key)
        if graph is not None:
            self._graphs.move_to_end(call.key)
            self._hit()
            return graph.run(call.values)
        if call.key in self._refused:
            raise _Refused(self._refused[call.key])
        if len(self._seen) > 8 * _MOST_GRAPHS:
            self._seen.clear()  # calls that never come again
        self._seen[call.key] += 1
        if self._seen[call.key] <= _WARM_UPS:
            raise _Refused(WARMING_UP)
        try:
            graph = self._record(model, call)
        except _Refused as refused:
            self._refused[call.key] = refused.reason
            raise
        self._graphs[call.key] = graph
        while len(self._graphs) > _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        self._miss(WARMING_UP)
        return graph.run(call.values)

    # --- what a call is -------------------------------------------------------------------------------------------

    def _describe(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        if torch.is_grad_enabled():
            raise _Refused(steps.GRADIENT)
        cache = cache_of(model)
        if cache is not None and cache.enabled:
            raise _Refused(FEATURE_CACHE)
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
        key = (spec, typed, forms, shared, modes, adapters_of(model), _precision(device.type), model.training)
        return _Call(key, values, lookups, rebuild)

    # --- recording ------------------------------------------------------------------------------------------------

    def _record(self, model: nn.Module, call: _Call) -> _Graph:
        """The call's graph. What layers look up is shared where several give out one tensor."""
        device = next(value.device for value in call.values if value.ndim > 1)
        own = [
            _Input(value, device) if number == first else None
            for number, (first, value) in enumerate(zip(_firsts(call.values), call.values, strict=True))
        ]
        inputs = [given for first in _firsts(call.values) if (given := own[first]) is not None]
        _fill(inputs, call.values)
        tensors = [given.tensor for given in inputs]
        split = len(tensors) - len(call.lookups)
        arguments = call.rebuild(tensors[:split])

        def run() -> Any:
            for lookup, value in zip(call.lookups, tensors[split:], strict=True):
                lookup.value = value
            # New containers: a forward may pop what it has used from those that it is given.
            args, kwargs = pytree.tree_map(lambda leaf: leaf, arguments)
            return type(model).forward(model, *args, **kwargs)

        before = _counts()
        try:
            replay, output = self._recorder.record(run)
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
        return _Graph(inputs, replay, output)

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
    return REPLACED if "forward" in model.__dict__ else None


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


def _precision(kind: str) -> Any:
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _firsts(values: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Of each tensor, the place at which it stands first."""
    known: dict[int, int] = {}
    return tuple(known.setdefault(id(value), number) for number, value in enumerate(values))


def _fill(inputs: list[_Input], values: list[torch.Tensor]) -> None:
    """Copy what has changed."""
    unique = {id(given): (given, value) for given, value in zip(inputs, values, strict=True)}
    pairs = [pair for given, value in unique.values() if (pair := given.fill(value)) is not None]
    by_kind: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for to, source in pairs:
        by_kind.setdefault((to.dtype, source.device), []).append((to, source))
    for alike in by_kind.values():
        # From the host too, without waiting: a driver has read pageable memory when the call returns.
        torch._foreach_copy_([to for to, _ in alike], [source for _, source in alike], non_blocking=True)


def _counts() -> dict[str, MethodStats]:
    """What the current call has counted."""
    context = steps.current()
    methods = {} if context is None else context.stats.methods
    return {name: replace(method, misses=Counter(method.misses)) for name, method in methods.items()}


def _restore(counts: dict[str, MethodStats]) -> None:
    context = steps.current()
    if context is not None:
        context.stats.methods = counts
