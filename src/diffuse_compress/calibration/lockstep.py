"""A model run on many samples at once, block by block.

Calibrating a block needs its inputs on every sample, computed by the blocks before it as they are after their own
calibration. The usual way stores what the first block is given, and feeds each block's output to the next; it holds for
plain chains only. Here each sample's forward is a coroutine suspended where it enters a block. Skip connections,
streams that are joined half-way, embeddings added between blocks: whatever stands between two blocks is the model's own
code, run once for each sample, and no model class needs to be known.

What is held at any moment is what the suspended forwards hold: the hidden states of every sample, in a UNet the skip
connections too, and the arguments that each block is given.

Some algorithms compare with what the model computed before it was changed. For them every sample is run twice, once
through the blocks as they become and once, a block ahead, through the blocks as they were.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn
from torch.utils._pytree import tree_map_only

from diffuse_compress.calls import Autocast, Call, autocast_now, set_autocast
from diffuse_compress.errors import ConfigError
from diffuse_compress.failures import failures_explained

__all__ = ["Visit", "current_sample", "lockstep"]

# Every coroutine has a context of its own.
_SAMPLE: ContextVar[int] = ContextVar("sample")


def current_sample() -> int:
    """Number of the sample whose forward this is called from. Raises LookupError outside of :func:`lockstep`."""
    return _SAMPLE.get()


@dataclass(frozen=True)
class Visit:
    """A block with the inputs it is about to be run on.

    Attributes:
        name: qualified name of the block.
        block: the module.
        calls: {index of the sample: its arguments}; a sample whose forward passes the block by is not among them.
        references: the same of the unchanged model, if it is run as well.
    """

    name: str
    block: nn.Module
    calls: dict[int, Call]
    references: dict[int, Call] = field(default_factory=dict)


def lockstep(
    model: nn.Module,
    blocks: Sequence[str],
    samples: Sequence[Call],
    visit: Callable[[Visit], None],
    *,
    references: bool = False,
    device: torch.device | None = None,
) -> list[str]:
    """Run ``model`` on every sample, stopping at each block until all samples that reach it are there.

    ``visit`` is called once for each block, in the order in which the samples reach them; what it changes in the block
    is in force when the samples go on through it, and so is a module that it puts in the block's place. A block that
    is run more than once in one forward is visited at its first. Gradients are off. If anything raises, the suspended
    forwards are unwound first.

    Args:
        model: to run; its training flags are the caller's business.
        blocks: qualified names of the submodules to stop at.
        samples: arguments of the model's forward, on any device; they are not changed.
        visit: what to do with a block and its inputs; may run the block.
        references: run the unchanged model as well. A block that one forward runs twice is unchanged in the first only.
        device: each block is there while it is visited and run by the samples, and then goes back to where the model
            is; what the samples hold, the arguments in a :class:`Visit` among it, stays with the model.

    Returns:
        The blocks that no sample reached.

    Raises:
        ConfigError: there are no samples, or no submodule of a name.
    """
    if not samples:
        raise ConfigError("calibration: at least one sample is needed, got none.")
    modules = {name: _submodule(model, name) for name in blocks}
    waiting = _Waiting(model, modules, len(samples), device)
    streams = 2 if references else 1
    start = functools.partial(_forward, model, waiting.home)
    runs = [greenlet(functools.partial(start, *pair)) for _ in range(streams) for pair in enumerate(samples)]
    with torch.inference_mode(False), torch.no_grad(), _eager(), waiting.intercepting():
        try:
            for index, run in enumerate(runs):
                waiting.resume(index, run)
            while waiting.calls:
                name = waiting.next_block(blocks)
                with waiting.placed(name):
                    unchanged = waiting.enter(name, runs, references=True)
                    if not waiting.at(name):
                        continue
                    waiting.visited.add(name)
                    calls = waiting.at(name)
                    with waiting.ignored():
                        visit(Visit(name, modules[name], calls, unchanged))
                    waiting.enter(name, runs, references=False)
        finally:
            for run in runs:
                if not run.dead:
                    run.throw(GreenletExit)
    return [name for name in blocks if name not in waiting.visited]


def _forward(model: nn.Module, home: torch.device, index: int, sample: Call) -> None:
    _SAMPLE.set(index)
    given = ", ".join([*[type(value).__name__ for value in sample.args], *sample.kwargs])
    with failures_explained(f"sample {index} ({given}) cannot be run through {type(model).__name__}"):
        # A copy: a model may change what it is given, and the sample is run again.
        sample.copied(home).run(model)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(f"calibration: {type(model).__name__} has no block {name!r} ({error}).") from error


class _Waiting:
    """Which sample is suspended in front of which block, with what arguments."""

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], samples: int, device: torch.device | None
    ) -> None:
        self.model, self.modules = model, modules
        self.calls: dict[int, tuple[str, Call]] = {}  # from ``samples`` on, those of the unchanged model
        self.visited: set[str] = set()
        self._samples = samples
        self._passed: set[str] = set()  # by the unchanged model
        self._running: dict[int, int] = {}  # id of a coroutine -> index of its sample
        self._driver = getcurrent()
        self._ignoring = False
        self.home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._device = self.home if device is None else device
        self._placed: str | None = None

    @contextlib.contextmanager
    def intercepting(self) -> Iterator[None]:
        """Inside, every block's forward stops first. Not a hook: a hook could not pass the call on to a new module."""
        own = {name: vars(module).get("forward") for name, module in self.modules.items()}
        try:
            for name, module in self.modules.items():
                vars(module)["forward"] = functools.partial(self._forward, name, module.forward)
            yield
        finally:
            for name, forward in own.items():
                if forward is None:
                    vars(self.modules[name]).pop("forward", None)
                else:
                    vars(self.modules[name])["forward"] = forward

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """Inside, blocks that are run are not stopped at: the visitor runs them itself."""
        self._ignoring = True
        try:
            yield
        finally:
            self._ignoring = False

    @contextlib.contextmanager
    def placed(self, name: str) -> Iterator[None]:
        """Inside, the block is on the device. What took the place of its layers goes home too, and so do they."""
        if self._device == self.home:
            yield
            return
        before = list(self.modules[name].modules())
        try:
            self._placed = name
            self.modules[name].to(self._device)
            yield
        finally:
            self._placed = None
            for module in (self.model.get_submodule(name), *before):
                module.to(self.home)

    def at(self, name: str, *, references: bool = False) -> dict[int, Call]:
        """The calls of the samples that wait at a block."""
        first = self._samples if references else 0
        waiting = {index - first: call for index, (at, call) in sorted(self.calls.items()) if at == name}
        return {index: call for index, call in waiting.items() if 0 <= index < self._samples}

    def enter(self, name: str, runs: Sequence[greenlet], *, references: bool) -> dict[int, Call]:
        """Let the samples that wait at a block go on through it; returns their calls as they were before."""
        calls = self.at(name, references=references)
        if not references:
            for index in calls:
                self.resume(index, runs[index])
            return calls
        self._passed.add(name)
        changing = True  # in place: the first shows whether copies are needed
        for index, call in calls.items():
            versions = call.versions()
            calls[index] = call.copied(None) if changing else call
            self.resume(index + self._samples, runs[index + self._samples])
            changing = changing and versions != call.versions()
        return calls

    def resume(self, index: int, run: greenlet) -> None:
        """Let a sample go on until it stops at a block, or ends."""
        self.calls.pop(index, None)
        self._running[id(run)] = index
        # Autocast and gradient mode belong to the thread, not to the coroutine: each side finds its own again.
        modes = _modes()
        run.switch()
        _restore(modes)

    def next_block(self, order: Sequence[str]) -> str:
        """The first block, in the order they are listed in, that a sample waits at."""
        reached = {name for name, _ in self.calls.values()}
        return next(name for name in order if name in reached)

    def _forward(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        index = self._running.get(id(getcurrent()))
        if not self._ignoring and index is not None:
            seen = self.visited if index < self._samples else self._passed
            if name not in seen:
                self.calls[index] = (name, Call(args, kwargs))
                modes = _modes()
                self._driver.switch()
                _restore(modes)
        present = self.model.get_submodule(name)
        run = forward if present is self.modules[name] else present
        if self._ignoring or name != self._placed:
            return run(*args, **kwargs)
        call = Call(args, kwargs).to(self._device)
        output = run(*call.args, **call.kwargs)
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.home), output)


def _eager() -> contextlib.AbstractContextManager[Any]:
    """A compiled forward cannot be suspended: its tracer would go on with whatever runs next in the thread."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def _modes() -> tuple[bool, Autocast]:
    return torch.is_grad_enabled(), autocast_now()


def _restore(modes: tuple[bool, Autocast]) -> None:
    grad, autocast = modes
    torch.set_grad_enabled(grad)
    set_autocast(autocast)
