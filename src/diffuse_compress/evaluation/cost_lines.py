"""What a script that measures costs writes: one JSON line for each result, as soon as it is known."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.evaluation.environment import device_name

__all__ = ["CostLines"]


class CostLines:
    """Lines that are shown and appended to a file, each with the device, torch's version and the date.

    Args:
        show: prints a line: ``partial(print, flush=True)``.
        device: that is measured.
        out: file to append to; None for none.
        minutes: from now, after which :attr:`over` is true; None for never.
        facts: of every line.
    """

    def __init__(
        self,
        show: Callable[[str], None],
        device: torch.device,
        out: Path | None,
        minutes: float | None,
        **facts: Any,
    ) -> None:
        self.show, self.device, self.out = show, device, out
        self.until = None if minutes is None else time.monotonic() + 60 * minutes
        self.facts = {
            "device": device_name(device) if device.type == "cuda" else device.type,
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            **facts,
        }

    @property
    def over(self) -> bool:
        """No time is left."""
        return self.until is not None and time.monotonic() >= self.until

    def written(self) -> list[dict[str, Any]]:
        """Lines that the file has."""
        there = self.out is not None and self.out.exists()
        return [json.loads(text) for text in self.out.read_text().splitlines()] if there and self.out else []

    def write(self, **line: Any) -> None:
        """Show a line and append it to the file, there and then."""
        text = json.dumps({**line, **self.facts})
        self.show(text)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a") as file:
                file.write(text + "\n")

    @contextlib.contextmanager
    def reported(self, **line: Any) -> Iterator[None]:
        """Whatever fails inside is a line with its error, and costs nothing else; memory is free afterwards."""
        try:
            yield
        except Exception as error:
            self.write(**line, error=f"{type(error).__name__}: {str(error)[:300]}")
        finally:
            self.free()

    def free(self) -> None:
        """Give unused memory of a GPU back."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
