"""Starting a compiled kernel: what Triton's launcher does, without what it finds out anew at every call.

``kernel[grid](...)`` binds arguments by name, inspects each, makes a key of strings and calls hooks: on the host that
takes longer than many products take on the device. A :class:`Variant` holds a kernel with its compile-time arguments.
It inspects only what a compiled kernel depends on (dtypes, alignment, integers that are 1 or multiples of 16) and calls
what Triton compiled. The first call of every combination takes Triton's own way, and so do all where its internals are
not those known here, where somebody listens to its hooks, and in the interpreter.
"""

from __future__ import annotations

import os
from functools import cache, lru_cache
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["INTERPRETED", "Matrix", "Number", "Pointer", "Started", "Variant", "somebody_listens", "variant"]

# Read when triton is imported, as triton does.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
ALIGNMENT = 16
MAX_INT32 = (1 << 31) - 1
KNOWN_VERSIONS = ((3, 6), (3, 9))
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Matrix:
    """A tensor that a kernel reads through a descriptor, in blocks; looks to Triton's launcher like its own class."""

    __slots__ = ("base", "block_shape", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(
        self, base: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block_shape: tuple[int, ...]
    ) -> None:
        self.base = base
        self.shape = shape
        self.strides = strides
        self.block_shape = block_shape

    def checked(self) -> TensorDescriptor:
        """The same as Triton's class, which checks it."""
        return TensorDescriptor(self.base, list(self.shape), list(self.strides), list(self.block_shape))


Pointer = torch.Tensor | Matrix | None
Number = int | float


class Started:
    """A compiled kernel, and how it is called: as Triton calls it, or, in versions known from inside, what that calls.

    Triton 3.6 walks over all arguments in Python to put descriptors in their place; its own C function takes them.
    """

    __slots__ = ("descriptors", "fixed", "launch")

    def __init__(self, compiled: Any) -> None:
        launcher = compiled.run
        self.launch = launcher
        self.fixed: tuple[Any, ...] = (compiled.function, compiled.packed_metadata, None, None, None)
        self.descriptors: list[Any] | None = None
        if _VERSION != (3, 6) or launcher.global_scratch_size or launcher.profile_scratch_size:
            return
        inner, kept = launcher.launch, {}
        if getattr(inner, "__closure__", None):
            kept = {
                name: cell.cell_contents
                for name, cell in zip(inner.__code__.co_freevars, inner.__closure__, strict=True)
            }
        self.descriptors = kept.get("tensordesc_meta", [])
        self.launch = kept.get("launcher", inner)
        before = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None)
        self.fixed = (*before, compiled.packed_metadata, None, None, None)

    def described(self, matrix: Matrix, place: int) -> tuple[Any, ...]:
        """The arguments that stand for a descriptor, the ``place``-th of the kernel."""
        if self.descriptors is None:
            return (matrix,)
        return tuple(make_tensordesc_arg(matrix, self.descriptors[place]))


class Variant:
    """A kernel with its compile-time arguments.

    Args:
        kernel: a ``triton.jit`` function whose parameters are tensors and descriptors first, then numbers, then what is
            known at compile time.
        constants: values of the last by name, and options of the compiler.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel = kernel
        self.constants = constants
        count = sum(name not in OPTIONS for name in constants)
        self.tail = tuple(constants[name] for name in kernel.arg_names[len(kernel.arg_names) - count :])
        self.compiled: dict[tuple[Any, ...], Started] = {}

    def start(
        self,
        device: torch.device,
        grid: tuple[int, int, int],
        pointers: tuple[Pointer, ...],
        numbers: tuple[Number, ...],
    ) -> Started | None:
        """Run on the current stream of ``device``; what ran, if it was not started by Triton.

        Args:
            device: of the tensors; it need not be the current one.
            grid: numbers of programs.
            pointers: tensors on ``device``, or descriptors of such, in the order of the kernel.
            numbers: the arguments after them; a place takes integers always, or floats always.
        """
        index = device.index
        if INTERPRETED or index is None:
            self._start_by_triton(grid, pointers, numbers)
            return None
        if index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.start(device, grid, pointers, numbers)
        # What Triton compiles anew for: dtypes, addresses that are no multiples of 16, blocks of descriptors, and what
        # _kinds sees in numbers.
        kinds: list[Any] = [index, _kinds(numbers)]
        for each in pointers:
            if each is None:
                kinds.append(None)
            elif isinstance(each, Matrix):
                kinds.append((each.base.dtype, each.block_shape))
            else:
                kinds.append((each.dtype,) if each.data_ptr() % ALIGNMENT else each.dtype)
        key = tuple(kinds)
        found = self.compiled.get(key)
        if found is None or somebody_listens():
            compiled = self._start_by_triton(grid, pointers, numbers)
            if _is_known(compiled):
                self.compiled[key] = Started(compiled)
            return None
        values: list[Any] = []
        place = 0
        for each in pointers:
            if each is None:
                values.append(None)
            elif isinstance(each, Matrix):
                values += found.described(each, place)
                place += 1
            else:
                values.append(each.data_ptr())
        stream = torch._C._cuda_getCurrentRawStream(index)
        found.launch(*grid, stream, *found.fixed, *values, *numbers, *self.tail)
        return found

    def _start_by_triton(
        self, grid: tuple[int, int, int], pointers: tuple[Pointer, ...], numbers: tuple[Number, ...]
    ) -> Any:
        plain = [each.checked() if type(each) is Matrix else each for each in pointers]
        return self.kernel[grid](*plain, *numbers, **self.constants)


@cache
def variant(kernel: Any, **constants: Any) -> Variant:
    """The one :class:`Variant` of a kernel with these compile-time arguments and options of the compiler."""
    return Variant(kernel, constants)


@lru_cache(maxsize=1 << 14)
def _kinds(numbers: tuple[Number, ...]) -> tuple[Any, ...]:
    """What Triton sees in numbers, or more: 1, multiples of 16, more than 32 bits, floats."""
    return tuple(
        float if isinstance(each, float) else 1 if each == 1 else (each % ALIGNMENT == 0, abs(each) <= MAX_INT32)
        for each in numbers
    )


def somebody_listens() -> bool:
    """True if a profiler has hooked itself into Triton's launches: those hooks are called by Triton's own way only."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


def _is_known(compiled: Any) -> bool:
    """True for what a launch returns in versions of Triton whose compiled kernels start as :class:`Variant` does it."""
    return type(compiled).__name__ == "CompiledKernel" and KNOWN_VERSIONS[0] <= _VERSION <= KNOWN_VERSIONS[1]
