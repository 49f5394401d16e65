"""Progress bars that follow the host library's own switches, and the user's callback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["Callback", "bar", "track"]

Callback = Callable[[str, int, int, dict[str, Any]], object]
"""``callback(stage, done, total, metrics)``; an exception raised in it cancels and restores."""
_Item = TypeVar("_Item")


def track(
    items: Sequence[_Item], stage: str, target: Any, callback: Callback | None, metrics: dict[str, Any]
) -> Iterator[_Item]:
    """Yield ``items`` behind a progress bar, calling ``callback`` after each with what ``metrics`` holds by then.

    The bar obeys ``diffusers.utils.logging.disable_progress_bar()`` (transformers' for its models) and
    ``pipe.set_progress_bar_config(disable=True)``.
    """
    config = {key: val for key, val in getattr(target, "_progress_bar_config", {}).items() if key != "desc"}
    with _tqdm(target, total=len(items), desc=stage, **config) as bar:
        for done, item in enumerate(items, start=1):
            yield item
            bar.update(1)
            if callback is not None:
                callback(stage, done, len(items), dict(metrics))


@contextmanager
def bar(
    stage: str, total: int, target: Any, callback: Callback | None
) -> Iterator[Callable[[int, dict[str, Any]], None]]:
    """A progress bar for work that does not come as a list: ``advance(done, metrics)``; otherwise as :func:`track`."""
    config = {key: val for key, val in getattr(target, "_progress_bar_config", {}).items() if key != "desc"}
    with _tqdm(target, total=total, desc=stage, **config) as shown:
        before = 0  # a bar that is switched off does not count

        def advance(done: int, metrics: dict[str, Any]) -> None:
            nonlocal before
            shown.update(done - before)
            before = done
            if callback is not None:
                callback(stage, done, total, metrics)

        yield advance


def _tqdm(target: Any, **kwargs: Any) -> Any:
    # The library that the target comes from owns the switch; neither is imported for a progress bar.
    own = [base.__module__.partition(".")[0] for base in type(target).__mro__]
    for library in sorted(("diffusers", "transformers"), key=lambda name: name not in own):
        logging = sys.modules.get(f"{library}.utils.logging")
        if logging is not None:
            return logging.tqdm(**kwargs)
    from tqdm.auto import tqdm

    return tqdm(**kwargs)
