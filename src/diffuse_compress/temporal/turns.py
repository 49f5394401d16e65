"""One thread at a time in a model whose state a call changes; with two, both compute as if nothing were there."""

from __future__ import annotations

import threading
from typing import Any

__all__ = ["Turns"]


class Turns:
    """Whose call a model is in. Copies and pickles begin anew."""

    def __init__(self) -> None:
        self._busy: int | None = None
        self._contended = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_busy": None, "_contended": False}

    def enter(self) -> bool:
        """A call begins in this thread; False while another thread's runs, and, for both, until that one has left."""
        me = threading.get_ident()
        if self._busy not in (None, me) and any(thread.ident == self._busy for thread in threading.enumerate()):
            self._contended = True
            return False
        self._busy = me
        return not self._contended

    def leave(self) -> None:
        """This thread's call is over."""
        if self._busy == threading.get_ident():
            self._busy, self._contended = None, False
