"""Recording what runs on a device, and replaying it from tensors that stay where they are."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

__all__ = ["CudaRecorder", "Input", "Recorded", "Recorder", "fill"]


class Recorder(Protocol):
    """Records what runs on a device."""

    def serves(self, device: torch.device) -> bool:
        """Can it record there?"""

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], object], Any]:
        """Record ``run`` on a device that it serves: a function that does the same again, and what it writes to
        (nothing is written yet)."""


class CudaRecorder:
    """Graphs of one memory pool and one stream: they are replayed one after the other, and outputs are copied.

    A pool ends with its last graph, and torch refuses its handle from then on while anything of it is in use. Graphs
    that were recorded on one stream share cuBLAS's workspace, which goes with any of them: no one else may have it.
    """

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def serves(self, device: torch.device) -> bool:
        """True for a CUDA device."""
        return device.type == "cuda"

    def record(self, run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], object], Any]:
        """See :class:`Recorder`."""
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        graph = torch.cuda.CUDAGraph()
        # A recording that fails leaves its stream behind as the current one. Others may use the device meanwhile.
        with (
            _no_collection(),
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            output = run()
        self._graphs.add(graph)
        return graph.replay, output


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Inside, cycles are not collected: what they end (other graphs, modules of compiled kernels) frees memory of the
    device, and that ends a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Input:
    """A tensor that graphs read, and what it was filled from last."""

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
class Recorded:
    """A graph, what it reads and what it writes."""

    inputs: list[Input]
    replay: Callable[[], object]
    output: Any

    def run(self, values: list[torch.Tensor]) -> Any:
        """The output for these values, in tensors of its own."""
        fill(self.inputs, values)
        self.replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, self.output)


def fill(inputs: Sequence[Input], values: Sequence[torch.Tensor]) -> None:
    """Copy what has changed."""
    unique = {id(given): (given, value) for given, value in zip(inputs, values, strict=True)}
    pairs = [pair for given, value in unique.values() if (pair := given.fill(value)) is not None]
    by_kind: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for to, source in pairs:
        by_kind.setdefault((to.dtype, source.device), []).append((to, source))
    for alike in by_kind.values():
        # From the host too, without waiting: a driver has read pageable memory when the call returns.
        torch._foreach_copy_([to for to, _ in alike], [source for _, source in alike], non_blocking=True)
