"""Repeated calls: what a plan hands over, and that the calls that take one return what the first did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

from diffuse_compress_kernels import int8_conv2d, int8_linear, w4a8_linear, w4a16_linear, w8a16_linear
from diffuse_compress_kernels.triton_kernels import plans, start
from diffuse_compress_kernels.triton_kernels.plans import PLANS, Plan, start_and_keep
from diffuse_compress_kernels.triton_kernels.start import Matrix


class Started:
    """A compiled kernel that notes its arguments; descriptors are a pair of arguments each, as in Triton 3.6."""

    fixed = ("fixed",)

    def __init__(self) -> None:
        self.descriptors: list[Any] | None = [None]
        self.calls: list[tuple[Any, ...]] = []
        self.launch = lambda *arguments: self.calls.append(arguments)
        self.made = 0

    def described(self, matrix: Matrix, place: int) -> tuple[Any, ...]:
        self.made += 1
        return (f"map {place} {matrix.base.data_ptr()}", *matrix.shape)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 99, raising=False)
    return 99


@pytest.fixture(autouse=True)
def no_plans() -> Iterator[None]:
    before = dict(PLANS)
    PLANS.clear()
    yield
    PLANS.clear()
    PLANS.update(before)


def matrix(tensor: torch.Tensor) -> Matrix:
    return Matrix(tensor, tensor.shape, tensor.stride(), (16, 16))


def test_a_plan_puts_addresses_descriptors_and_scratch_in_their_places(stream: int) -> None:
    x, w, y, scratch, started = torch.zeros(16, 32), torch.zeros(32, 16), torch.zeros(64), torch.zeros(4), Started()
    pointers, room = (matrix(x), matrix(w), None, None, y), (3, lambda: (scratch,))
    plan = Plan(started, (3, 1, 1), pointers, (7,), ("tail",), room)  # type: ignore[arg-type]
    assert plan.run(0, (x, w, None, None, y))
    described = (f"map 0 {x.data_ptr()}", 16, 32, f"map 1 {w.data_ptr()}", 32, 16)
    expected = (3, 1, 1, stream, "fixed", *described, None, scratch.data_ptr(), y.data_ptr(), 7, "tail")
    assert started.calls == [expected]
    assert plan.run(0, (x, w, None, None, y))
    assert started.made == 2, "a descriptor of an address is made once"
    assert plan.run(0, (torch.zeros(16, 32), w, None, None, y))
    assert started.made == 3


def test_a_plan_refuses_unaligned_addresses(stream: int) -> None:
    x, started = torch.zeros(64), Started()
    plan = Plan(started, (1, 1, 1), (x, None), (7,), ())  # type: ignore[arg-type]
    assert not plan.run(0, (x[1:], None))
    assert not started.calls


class Chosen:
    """A variant that has run before."""

    tail = ()

    def start(self, *arguments: Any) -> Any:
        return Started()


def test_plans_are_kept_by_aligned_calls_and_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_PLANS", 2)
    x, device, chosen = torch.zeros(64), torch.device("cpu"), Chosen()
    start_and_keep(("unaligned",), chosen, device, (1, 1, 1), (x[1:],), ())  # type: ignore[arg-type]
    start_and_keep(None, chosen, device, (1, 1, 1), (x,), ())  # type: ignore[arg-type]
    assert not PLANS
    for number in range(3):
        start_and_keep((number,), chosen, device, (1, 1, 1), (x,), ())  # type: ignore[arg-type]
    assert list(PLANS) == [(2,)]


# --- on a GPU ---------------------------------------------------------------------------------------------------


def _codes(*shape: int, low: int = -127, high: int = 127) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def _w8a8(rows: int) -> list[torch.Tensor | None]:
    return [torch.randn(rows, 512).bfloat16(), _codes(384, 512), torch.rand(384, 1), torch.randn(384).bfloat16()]


def _w4a8(rows: int, two_level: bool) -> list[torch.Tensor | None]:
    group_scale = _codes(384, 4, low=1, high=16) if two_level else None
    return [torch.randn(rows, 512).bfloat16(), _codes(384, 256), torch.rand(384, 1), group_scale, torch.randn(384)]


def _w4a16(rows: int) -> list[torch.Tensor | None]:
    return [torch.randn(rows, 512).bfloat16(), _codes(384, 256), torch.rand(384, 4), _codes(384, 4, low=-8, high=7)]


def _w8a16(rows: int) -> list[torch.Tensor | None]:
    return [torch.randn(rows, 512).bfloat16(), _codes(384, 512), torch.rand(384, 1)]


def _conv(last: bool) -> list[torch.Tensor | None]:
    x = torch.randn(2, 64, 16, 16).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return [x, _codes(96, 64 * 9), torch.rand(96, 1), torch.randn(96)]


def _window(stride: int) -> Callable[..., torch.Tensor]:
    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return int8_conv2d(*tensors, kernel=(3, 3), stride=(stride, stride), padding=(1, 1, 1, 1))

    return run


CALLS: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], list[torch.Tensor | None]]]] = {
    **{f"w8a8 {rows}": (int8_linear, lambda rows=rows: _w8a8(rows)) for rows in (1, 16, 60, 300)},
    **{
        f"w4a8 {rows} {two_level}": (w4a8_linear, lambda rows=rows, two_level=two_level: _w4a8(rows, two_level))
        for rows in (1, 60, 300)
        for two_level in (False, True)
    },
    **{f"w4a16 {rows}": (w4a16_linear, lambda rows=rows: _w4a16(rows)) for rows in (1, 16, 60)},
    **{f"w8a16 {rows}": (w8a16_linear, lambda rows=rows: _w8a16(rows)) for rows in (1, 16, 200)},
    "conv": (_window(1), lambda: _conv(False)),
    "conv channels-last": (_window(1), lambda: _conv(True)),
    "conv stride 2": (_window(2), lambda: _conv(False)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_later_calls_return_what_triton_starts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, make = CALLS[name]
    inputs = [[None if each is None else each.cuda() for each in make()] for _ in range(5)]
    if name == "conv channels-last":
        for each in inputs:
            assert each[0] is not None
            each[0] = each[0].contiguous(memory_format=torch.channels_last)
    results = [run(*each) for each in inputs]
    torch.cuda.synchronize()
    # One token of w4a16 is no product of tiles.
    assert PLANS or name == "w4a16 1", "the calls left no plan"
    monkeypatch.setattr(start, "_is_known", lambda compiled: False)
    monkeypatch.setattr(start, "somebody_listens", lambda: True)
    monkeypatch.setattr(plans, "somebody_listens", lambda: True)
    for each, result in zip(inputs, results, strict=True):
        assert torch.equal(run(*each), result)


@pytest.mark.gpu
def test_plans_serve_other_streams_and_graphs() -> None:
    x, weight, scale, bias = (each.cuda() for each in _w8a8(60) if each is not None)
    expected = [int8_linear(x, weight, scale, bias) for _ in range(4)][-1]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = int8_linear(x, weight, scale, bias)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(beside, expected)
    graph = torch.cuda.CUDAGraph()
    static = x.clone()
    with torch.cuda.graph(graph):
        y = int8_linear(static, weight, scale, bias)
    for factor in (1, 2):
        static.copy_(x * factor)
        graph.replay()
        assert torch.equal(y, int8_linear(static, weight, scale, bias))
