"""Starting compiled kernels without Triton's launcher: what is handed over, what is told apart, when not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

from diffuse_compress_kernels.triton_kernels import start
from diffuse_compress_kernels.triton_kernels.start import Matrix, Variant


class CompiledKernel:
    """As Triton's, in name and parts."""

    function = 7
    packed_metadata = (4, 1, 0)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.calls.append(arguments)


class Kernel:
    """A jit function that notes how it is called."""

    arg_names = ("x", "y", "n", "stride", "BLOCK", "EVEN")

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*arguments: Any, **constants: Any) -> Any:
            self.calls.append((grid, arguments, constants))
            return self.compiled

        return call


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(start, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 99, raising=False)
    return torch.device("cuda", 0)


def make() -> tuple[Variant, Kernel, CompiledKernel]:
    compiled = CompiledKernel()
    kernel = Kernel(compiled)
    return Variant(kernel, {"EVEN": True, "BLOCK": 64, "num_warps": 4}), kernel, compiled


def test_the_second_start_hands_over_addresses_and_constants_in_order(device: torch.device) -> None:
    variant, kernel, compiled = make()
    x = torch.zeros(64)
    for _ in range(2):
        variant.start(device, (3, 2, 1), (x, None), (17, 32))
    assert kernel.calls == [((3, 2, 1), (x, None, 17, 32), {"EVEN": True, "BLOCK": 64, "num_warps": 4})]
    assert compiled.calls == [(3, 2, 1, 99, 7, (4, 1, 0), None, None, None, x.data_ptr(), None, 17, 32, 64, True)]


BASE = torch.zeros(256)


@pytest.mark.parametrize(
    ("pointers", "numbers", "same"),
    [
        ((BASE[4:], None), (17, 48), True),
        ((BASE[1:], None), (17, 32), False),
        ((BASE.half(), None), (17, 32), False),
        ((BASE, BASE), (17, 32), False),
        ((BASE, None), (16, 32), False),
        ((BASE, None), (1, 32), False),
        ((BASE, None), (17, 33), False),
        ((BASE, None), (17 + (1 << 32), 32), False),
    ],
    ids=["same kind", "unaligned", "dtype", "not None", "multiple of 16", "one", "no multiple", "64 bits"],
)
def test_what_triton_compiles_anew_is_told_apart(
    pointers: tuple[Any, ...], numbers: tuple[Any, ...], same: bool, device: torch.device
) -> None:
    variant, kernel, _ = make()
    variant.start(device, (1, 1, 1), (BASE, None), (17, 32))
    variant.start(device, (1, 1, 1), pointers, numbers)
    assert len(kernel.calls) == (1 if same else 2)


def test_descriptors_differ_by_block_and_dtype(device: torch.device) -> None:
    variant, kernel, compiled = make()

    def matrix(rows: int, columns: int, dtype: torch.dtype = torch.int8) -> Matrix:
        tensor = torch.zeros(rows, 64, dtype=dtype)
        return Matrix(tensor, tensor.shape, tensor.stride(), (16, columns))

    variant.start(device, (1, 1, 1), (matrix(16, 32), None), (17, 32))
    assert kernel.calls[0][1][0].block_shape == [16, 32], "Triton gets its own class"
    again = matrix(48, 32)
    variant.start(device, (1, 1, 1), (again, None), (17, 32))
    assert compiled.calls[0][9] is again
    variant.start(device, (1, 1, 1), (matrix(16, 64), None), (17, 32))
    variant.start(device, (1, 1, 1), (matrix(16, 32, torch.float16), None), (17, 32))
    assert len(kernel.calls) == 3


def test_triton_starts_its_kernels_itself_where_that_is_needed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, kernel, compiled = make()
    variant.start(device, (1, 1, 1), (BASE, None), (17, 32))
    monkeypatch.setattr(start.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    variant.start(device, (1, 1, 1), (BASE, None), (17, 32))
    assert (len(kernel.calls), len(compiled.calls)) == (2, 0), "a profiler listens"
    monkeypatch.undo()
    monkeypatch.setattr(start, "_VERSION", (4, 0))
    variant, kernel, compiled = make()
    for _ in range(2):
        start.Variant.start(variant, torch.device("cpu"), (1, 1, 1), (BASE, None), (17, 32))
    assert (len(kernel.calls), len(compiled.calls)) == (2, 0), "no CUDA device"


def test_another_version_of_triton_starts_its_kernels_itself(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "_VERSION", (4, 0))
    variant, kernel, compiled = make()
    for _ in range(2):
        variant.start(device, (1, 1, 1), (BASE, None), (17, 32))
    assert (len(kernel.calls), len(compiled.calls)) == (2, 0)
