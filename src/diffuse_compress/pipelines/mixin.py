"""What a pipeline class of diffusers gains by one base class more, with its own ``__call__`` running as it is.

Two places of a stock call are the pipeline's own methods and enough: the call itself, and the opening of its progress
bar, which stands between what is prepared for a request and the loop. There the loop's first calls are known
(``loops.py``), so temporal tables are built, and from there on the variable that runs through the schedule tells the
step protocol where the loop is.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from diffuse_compress.logging import get_logger
from diffuse_compress.pipelines.graphs import graphs_of
from diffuse_compress.pipelines.loops import TIMESTEP, loop_of
from diffuse_compress.runtime import steps
from diffuse_compress.temporal.table import table_of

__all__ = ["CompressedPipelineMixin"]

_LOGGER = get_logger(__name__)


class CompressedPipelineMixin:
    """Base class before a stock one: ``class FluxPipeline(CompressedPipelineMixin, diffusers.FluxPipeline)``.

    Outputs are those of the stock class, bit for bit, compressed or not. A class of which the loop is not known
    (``loops.LOOPS``) has its tables built in the first step, as without the mixin.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "__call__" not in cls.__dict__:
            stock = next((base.__dict__["__call__"] for base in cls.__mro__ if _has_own_call(base)), None)
            if stock is not None:
                cls.__call__ = _with_signature_of(stock)  # type: ignore[method-assign]
        super().__init_subclass__(**kwargs)

    def __call__(self, *args: Any, cuda_graph: bool = False, **kwargs: Any) -> Any:
        """A call of the stock pipeline.

        Args:
            args: the stock pipeline's.
            cuda_graph: record each kind of call of the denoisers as a CUDA graph, once it was computed twice, and
                replay it from then on, in later calls of the pipeline too. Steps of a feature cache have a graph for
                each pattern of what they compute and reuse. What cannot be recorded is computed, with one warning, and
                counted in ``compression_stats()``.
            kwargs: the stock pipeline's.
        """
        call = super().__call__  # type: ignore[misc]
        with graphs_of(self) if cuda_graph else contextlib.nullcontext():
            return call(*args, **kwargs)

    def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
        """The stock progress bar; what the loop needs is prepared before it."""
        caller = sys._getframe(1)
        if caller.f_code.co_name == "__call__" and caller.f_locals.get("self") is self:
            _before_loop(self, caller)
        return super().progress_bar(*args, **kwargs)  # type: ignore[misc]


def _has_own_call(cls: type) -> bool:
    return "__call__" in cls.__dict__ and cls is not CompressedPipelineMixin


def _with_signature_of(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The mixin's call with the arguments and the help of a stock one, which others look at."""

    @functools.wraps(stock)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return CompressedPipelineMixin.__call__(self, *args, **kwargs)

    signature = inspect.signature(stock)
    own = inspect.signature(CompressedPipelineMixin.__call__).parameters["cuda_graph"]
    given = [parameter for parameter in signature.parameters.values() if parameter.name != own.name]
    last = len(given) - sum(parameter.kind is parameter.VAR_KEYWORD for parameter in given)
    call.__signature__ = signature.replace(parameters=[*given[:last], own, *given[last:]])  # type: ignore[attr-defined]
    return call


def _before_loop(pipe: Any, caller: FrameType) -> None:
    """The loop in ``caller`` is about to begin."""
    loop = loop_of(type(pipe))
    if loop is None:
        return
    steps.follow(pipe, lambda: caller.f_locals.get(TIMESTEP))
    known: Mapping[str, Any] = caller.f_locals
    try:
        for call in loop(pipe, known):
            table, context = table_of(call.model), steps.ahead(call.model, call.element, call.branch)
            if table is not None and context is not None:
                table.prepare_call(context, call.arguments)
    except (AttributeError, KeyError) as error:  # another version of diffusers, or a class that was changed
        _LOGGER.warning("%s: temporal tables are built in the loop's first step: %r", type(pipe).__name__, error)
