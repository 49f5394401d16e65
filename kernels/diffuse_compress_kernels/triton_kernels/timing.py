"""Times of CUDA calls by graph replay: no launch cost of the host in them, buffers rotated past the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

__all__ = ["Arm", "time_arms"]

Arm = Callable[[int], object]
TARGET_MICROSECONDS = 2000.0


def time_arms(
    arms: dict[str, Arm], sets: int, *, rounds: int = 9, failures: dict[str, str] | None = None
) -> dict[str, float]:
    """Median microseconds per call of each arm.

    Every arm is captured once as a graph of calls over all buffer sets; the graphs are then replayed in turns, so that
    clocks and temperature are the same for all.

    Args:
        arms: name to a function of the index of a buffer set. It must not synchronise.
        sets: how many buffer sets there are; together they should be several times the L2 cache.
        rounds: replays per arm.
        failures: receives the errors of arms that could not run; None lets them raise.
    """
    graphs = {}
    for name, arm in arms.items():
        try:
            graphs[name] = _capture(arm, sets)
        except Exception as error:
            if failures is None:
                raise
            failures[name] = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, calls) in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def _capture(arm: Arm, sets: int) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of about ``TARGET_MICROSECONDS``, and the calls in it: each buffer set equally often."""
    for index in range(sets):
        arm(index)
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for index in range(sets):
        arm(index)
    end.record()
    end.synchronize()
    per_pass = start.elapsed_time(end) * 1e3
    # Eager calls of small products measure the host, so the graph gets at least some tens of calls then.
    wanted = round(TARGET_MICROSECONDS / max(per_pass, 1.0))
    passes = max(1, min(64 // sets, max(wanted, 24 // sets if per_pass < TARGET_MICROSECONDS else 1)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            for index in range(sets):
                arm(index)
    graph.replay()
    torch.cuda.synchronize()
    return graph, passes * sets
