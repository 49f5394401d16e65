"""What a repeated call needs no more: which tile, which variant, which grid. A plan starts a kernel from addresses.

A model calls the same product with tensors of the same shapes over and over. The first calls go through ``launch.py``,
which decides everything; what it decided is kept under all that it decided by. Addresses are none of it: they only must
be multiples of 16, as they are in practice, or the call goes the long way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffuse_compress_kernels.triton_kernels.start import Matrix, Number, Pointer, Started, Variant, somebody_listens

__all__ = ["PLANS", "Plan", "plan_for", "start_and_keep"]

ALIGNMENT_MASK = 15
MAX_PLANS = 8192
MAX_DESCRIPTORS = 8192

PLANS: dict[tuple[Any, ...], Plan] = {}


class Plan:
    """One kernel with its grid and numbers.

    Args:
        started: the compiled kernel.
        grid: numbers of programs.
        pointers: those of the call that leaves the plan; sizes and blocks of matrices are kept.
        numbers: arguments after the pointers.
        tail: compile-time arguments.
        scratch: makes the tensors of a call that several programs share; their places.
    """

    __slots__ = ("descriptors", "grid", "launch", "matrices", "rest", "scratch", "started")

    def __init__(
        self,
        started: Started,
        grid: tuple[int, int, int],
        pointers: tuple[Pointer, ...],
        numbers: tuple[Number, ...],
        tail: tuple[Any, ...],
        scratch: tuple[int, Callable[[], tuple[torch.Tensor, ...]]] | None = None,
    ) -> None:
        self.started = started
        self.launch = started.launch
        self.grid = grid
        self.rest = (*numbers, *tail)
        self.matrices = tuple(
            (place, each.shape, each.strides, each.block_shape)
            for place, each in enumerate(pointers)
            if isinstance(each, Matrix)
        )
        self.scratch = scratch
        self.descriptors: dict[tuple[int, int], tuple[Any, ...]] = {}

    def run(self, index: int, tensors: tuple[torch.Tensor | None, ...]) -> bool:
        """Start it on the current stream of device ``index``; False if an address is unaligned, and nothing ran."""
        values: list[Any] = [None if each is None else each.data_ptr() for each in tensors]
        for address in values:
            if address is not None and address & ALIGNMENT_MASK:
                return False
        if self.scratch is not None:
            place, make = self.scratch
            # Held until the kernel is in the stream.
            room = make()
            values[place : place + len(room)] = [each.data_ptr() for each in room]
        # From behind: a descriptor becomes several arguments.
        for number in range(len(self.matrices) - 1, -1, -1):
            place = self.matrices[number][0]
            described = self.descriptors.get((place, values[place])) or self._describe(number, tensors[place])
            values[place : place + 1] = described
        stream = torch._C._cuda_getCurrentRawStream(index)
        self.launch(*self.grid, stream, *self.started.fixed, *values, *self.rest)
        return True

    def _describe(self, number: int, tensor: torch.Tensor | None) -> tuple[Any, ...]:
        assert tensor is not None
        place, shape, strides, block = self.matrices[number]
        described = self.started.described(Matrix(tensor, shape, strides, block), number)
        if self.started.descriptors is not None:
            # These hold an address and sizes, no tensor; the sizes are those of the plan.
            if len(self.descriptors) >= MAX_DESCRIPTORS:
                self.descriptors.clear()
            self.descriptors[place, tensor.data_ptr()] = described
        return described


def plan_for(key: tuple[Any, ...], device: torch.device) -> Plan | None:
    """The plan of a call on the current device, if there is one and no profiler has hooked itself into launches."""
    plan = PLANS.get(key)
    if plan is None or device.index != torch.cuda.current_device() or somebody_listens():
        return None
    return plan


def start_and_keep(
    key: tuple[Any, ...] | None,
    chosen: Variant,
    device: torch.device,
    grid: tuple[int, int, int],
    pointers: tuple[Pointer, ...],
    numbers: tuple[Number, ...],
    scratch: tuple[int, Callable[[], tuple[torch.Tensor, ...]]] | None = None,
) -> None:
    """``chosen.start``, and a :class:`Plan` of it for calls with this key; with unaligned addresses it leaves none."""
    started = chosen.start(device, grid, pointers, numbers)
    if started is None or key is None:
        return
    tensors = [each.base if isinstance(each, Matrix) else each for each in pointers if each is not None]
    if any(each.data_ptr() & ALIGNMENT_MASK for each in tensors):
        return
    # Models that bring ever new shapes do not fill the memory.
    if len(PLANS) >= MAX_PLANS:
        PLANS.clear()
    PLANS[key] = Plan(started, grid, pointers, numbers, chosen.tail, scratch)
