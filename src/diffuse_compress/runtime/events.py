"""Where schedulers and pipelines tell of their runs.

Class-level wrappers around ``set_timesteps`` and ``step`` of every diffusers scheduler, ``__call__`` of every pipeline
and ``CacheMixin.cache_context``. Nothing is stored on an instance: a deep copy of a scheduler must not step the
original, and ``pipe.scheduler = Other.from_config(...)`` must not lose the connection. Most schedulers define their
own ``step``, so every class is wrapped, those defined later through ``__init_subclass__``. Signatures stay
inspectable (``functools.wraps``), since pipelines look at ``inspect.signature(scheduler.step)``.

Wrappers are installed when the first model is tracked; a user who only quantizes weights never has them.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Protocol

__all__ = ["Listener", "install", "installed", "uninstall"]

_MARK = "_diffuse_compress_event"
# ScoreSdeVeScheduler, the one class without ``step``, ends an iteration with ``step_pred``; ParaDiGMS takes several
# rows of the schedule at once.
_STEPS = ("step", "step_pred", "batch_step_no_noise")


class Listener(Protocol):
    """What is told; all in the thread in which it happens."""

    def on_set_timesteps(self, scheduler: Any) -> None:
        """A scheduler got a schedule."""

    def on_step(self, scheduler: Any, timestep: Any, sample: Any) -> None:
        """A scheduler has stepped ``sample`` from ``timestep``, None for what it was not told; nested calls
        (``super().step``) count once."""

    def on_enter(self, pipeline: Any) -> None:
        """A pipeline is called."""

    def on_exit(self, pipeline: Any, error: BaseException | None) -> None:
        """The call is over, by ``error`` if not None."""

    def on_branch(self, model: Any, name: str | None) -> str | None:
        """A pipeline opens (or, with None, closes) a cache context; returns the name that was open before."""


_depth = threading.local()
_undo: list[Callable[[], None]] = []
_lock = threading.RLock()


def installed() -> bool:
    """True between install and uninstall."""
    return bool(_undo)


def install(listener: Listener) -> bool:
    """Wrap all classes, once. False if diffusers is not there."""
    with _lock:
        if _undo:
            return True
        try:
            scheduler = import_module("diffusers.schedulers.scheduling_utils").SchedulerMixin
            pipeline = import_module("diffusers.pipelines.pipeline_utils").DiffusionPipeline
            cache = import_module("diffusers.models.cache_utils").CacheMixin
        except (ImportError, AttributeError, RuntimeError):
            return False
        _wrap_tree(scheduler, lambda cls: _wrap_scheduler(cls, listener))
        roots = [pipeline]
        try:
            roots.append(import_module("diffusers").ModularPipeline)
        except (ImportError, AttributeError, RuntimeError):
            pass
        for root in roots:
            _wrap_tree(root, lambda cls: _wrap_call(cls, listener))
        _wrap_cache_context(cache, listener)
        return True


def uninstall() -> None:
    """Give every class its own methods back."""
    with _lock:
        while _undo:
            _undo.pop()()


def _wrap_tree(root: type, wrap: Callable[[type], None]) -> None:
    """``wrap`` for root, its subclasses, and those that will be defined."""
    pending = [root]
    while pending:
        cls = pending.pop()
        wrap(cls)
        pending.extend(cls.__subclasses__())
    own = root.__dict__.get("__init_subclass__")

    def init_subclass(cls: type, **kwargs: Any) -> None:
        if own is not None:
            own.__func__(cls, **kwargs)
        else:
            super(root, cls).__init_subclass__(**kwargs)  # type: ignore[arg-type,misc]
        wrap(cls)

    root.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment,method-assign]

    def restore() -> None:
        if own is not None:
            root.__init_subclass__ = own  # type: ignore[method-assign]
        else:
            del root.__init_subclass__

    _undo.append(restore)


def _replace(cls: type, name: str, make: Callable[[Any], Any]) -> None:
    """``cls.name = make(cls.name)`` if the class itself defines it and it is not wrapped yet."""
    original = cls.__dict__.get(name)
    if not callable(original) or getattr(original, _MARK, False):
        return
    wrapper = make(original)
    setattr(wrapper, _MARK, True)
    setattr(cls, name, wrapper)

    def restore() -> None:
        # Another library may have wrapped it in between: its wrapper keeps calling ours, which then does nothing new.
        if cls.__dict__.get(name) is wrapper:
            setattr(cls, name, original)

    _undo.append(restore)


def _wrap_scheduler(cls: type, listener: Listener) -> None:
    def set_timesteps(scheduler: Any, args: Any, kwargs: Any) -> None:
        if not _in_its_constructor(scheduler):
            listener.on_set_timesteps(scheduler)

    _replace(cls, "set_timesteps", lambda original: _outermost(original, "set", set_timesteps))
    for name in _STEPS:
        _replace(cls, name, lambda original: _outermost(original, "step", _teller(original, listener)))


def _in_its_constructor(scheduler: Any) -> bool:
    """Some constructors set a schedule that nobody asked for. Frames: this, set_timesteps, the wrapper, its caller."""
    caller = sys._getframe(3)
    code = caller.f_code
    return code.co_name == "__init__" and bool(code.co_varnames) and caller.f_locals[code.co_varnames[0]] is scheduler


def _teller(original: Callable[..., Any], listener: Listener) -> Callable[[Any, Any, Any], None]:
    """Tells of a step, and of the timestep and the sample it was given, wherever the signature has them."""
    names = list(inspect.signature(original).parameters)[1:]

    def place(*wanted: str) -> tuple[str, int]:
        name = next((name for name in wanted if name in names), "")
        return name, names.index(name) if name else -1

    places = place("timestep", "timesteps"), place("sample")

    def step(scheduler: Any, args: Any, kwargs: Any) -> None:
        given = (kwargs.get(name, args[at] if 0 <= at < len(args) else None) for name, at in places)
        listener.on_step(scheduler, *given)

    return step


def _outermost(original: Callable[..., Any], kind: str, tell: Callable[[Any, Any, Any], None]) -> Callable[..., Any]:
    """The method, telling of its outermost call in a thread once it has succeeded."""

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        depth = getattr(_depth, kind, 0)
        setattr(_depth, kind, depth + 1)
        try:
            result = original(self, *args, **kwargs)
        finally:
            setattr(_depth, kind, depth)
        if depth == 0 and installed():
            tell(self, args, kwargs)
        return result

    return wrapper


def _wrap_call(cls: type, listener: Listener) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not installed():
                return original(self, *args, **kwargs)
            listener.on_enter(self)
            try:
                result = original(self, *args, **kwargs)
            except BaseException as error:
                listener.on_exit(self, error)
                raise
            listener.on_exit(self, None)
            return result

        return wrapper

    _replace(cls, "__call__", make)


def _wrap_cache_context(cls: type, listener: Listener) -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        @contextmanager
        def wrapper(self: Any, name: str, **kwargs: Any) -> Iterator[None]:
            before = listener.on_branch(self, name)
            try:
                with original(self, name, **kwargs):
                    yield
            finally:
                listener.on_branch(self, before)

        return wrapper

    _replace(cls, "cache_context", make)
