"""Correctness before speed: runs checks of kernel configurations on a GPU in parallel, because compiling takes seconds.

A check is a function of this package by its place ("module:function"), with picklable arguments; it raises when a
configuration is wrong. Each runs in a worker process, so that one that breaks the device's context costs one worker.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import queue
import time
from typing import Any

__all__ = ["guarded", "intact", "run_checks"]

WORKERS = 12
SECONDS = 240
GUARD = 256

Check = tuple[str, str, tuple[Any, ...]]


def verdict(check: Check) -> str:
    """ "ok", or what is wrong."""
    _, place, arguments = check
    module, _, function = place.partition(":")
    try:
        getattr(importlib.import_module(module), function)(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "ok"


def _worker(todo: multiprocessing.Queue[Check | None], done: multiprocessing.Queue[tuple[str, str]]) -> None:
    while (check := todo.get()) is not None:
        text = verdict(check)
        done.put((check[0], text))
        if "CUDA error" in text or "illegal" in text:
            # The context is lost, and with it this process.
            return


def run_checks(checks: list[Check], device: str) -> dict[str, str]:
    """{name: verdict}."""
    if device == "cpu":
        return {check[0]: verdict(check) for check in checks}
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    count = min(WORKERS, os.cpu_count() or 1)
    for check in [*checks, *[None] * (count + 1)]:
        todo.put(check)

    def new_worker() -> Any:
        process = context.Process(target=_worker, args=(todo, done), daemon=True)
        process.start()
        return process

    workers = [new_worker() for _ in range(count)]
    verdicts: dict[str, str] = {}
    while len(verdicts) < len(checks) and time.perf_counter() - start < SECONDS:
        try:
            name, text = done.get(timeout=2)
            verdicts[name] = text
        except queue.Empty:
            workers = [worker if worker.is_alive() else new_worker() for worker in workers]
    for worker in workers:
        worker.terminate()
    result = {check[0]: verdicts.get(check[0], "not checked in time") for check in checks}
    wrong = {name: text for name, text in result.items() if text != "ok"}
    print(f"{len(result) - len(wrong)} of {len(result)} configurations are correct, "
          f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    for name, text in wrong.items():
        print(f"    {name}: {text}", flush=True)
    return result


def guarded(shape: tuple[int, ...], dtype: Any, device: str) -> tuple[Any, Any]:
    """(a tensor full of a sentinel, the buffer whose middle it is)."""
    import torch

    value = float("nan") if dtype.is_floating_point and dtype.itemsize > 1 else 77
    count = 1
    for size in shape:
        count *= size
    buffer = torch.full((count + 2 * GUARD,), value, dtype=torch.float32, device=device).to(dtype)
    return buffer[GUARD:-GUARD].view(shape), buffer


def intact(buffer: Any) -> bool:
    """True if nothing was written around the middle."""
    import torch

    around = torch.cat([buffer[:GUARD], buffer[-GUARD:]]).double()
    return bool((around.isnan() | (around == 77)).all())
