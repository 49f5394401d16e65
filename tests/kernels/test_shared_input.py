"""One quantization for layers that share an input, and none too few."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from diffuse_compress_kernels import quantized_once
from diffuse_compress_kernels.int8_linear import shared


class Counted:
    """A quantization that counts."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.times += 1
        return torch.zeros(2), torch.ones(1)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Everything is taken for a CUDA tensor on stream 0."""
    monkeypatch.setattr(shared, "_may_share", lambda x: True)
    monkeypatch.setattr(shared, "_stream_of", lambda x: 0)
    monkeypatch.setattr(shared, "_last", shared._Last())
    return Counted()


def weights(number: int) -> list[torch.Tensor]:
    return [torch.zeros(4) for _ in range(number)]


def test_three_layers_quantize_their_input_once(count: Counted) -> None:
    x = torch.randn(2, 4)
    results = [quantized_once(x, weight, ("how",), count) for weight in weights(3)]
    assert count.times == 1
    assert results[0][0] is results[2][0]


def _written(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1)


@pytest.mark.parametrize(
    "change",
    [_written, torch.clone, lambda x: x.view(-1), lambda x: x.detach()],
    ids=["written to", "another tensor", "a view", "another object"],
)
def test_another_input_is_quantized_anew(change: Callable[[torch.Tensor], torch.Tensor], count: Counted) -> None:
    x, (first, second) = torch.randn(2, 4), weights(2)
    quantized_once(x, first, (), count)
    quantized_once(change(x), second, (), count)
    assert count.times == 2


def test_the_same_layer_quantizes_anew(count: Counted) -> None:
    """Its caller may have written into x behind autograd's back, as ``x.data.copy_`` does."""
    x, (first, second) = torch.randn(2, 4), weights(2)
    for weight, times in ((first, 1), (second, 1), (first, 2), (second, 2), (second, 3)):
        quantized_once(x, weight, (), count)
        assert count.times == times


def test_another_way_or_stream_is_quantized_anew(count: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    x, (first, second, third) = torch.randn(2, 4), weights(3)
    quantized_once(x, first, ("a",), count)
    quantized_once(x, second, ("b",), count)
    assert count.times == 2
    monkeypatch.setattr(shared, "_stream_of", lambda x: 1)
    quantized_once(x, third, ("b",), count)
    assert count.times == 3


def test_codes_go_with_their_input(count: Counted) -> None:
    x = torch.randn(2, 4)
    quantized_once(x, weights(1)[0], (), count)
    assert shared._last.codes is not None
    del x
    gc.collect()
    assert shared._last.codes is None


def test_nothing_is_remembered_on_a_cpu() -> None:
    quantize, x = Counted(), torch.randn(2, 4)
    for weight in weights(2):
        quantized_once(x, weight, (), quantize)
    assert quantize.times == 2


@pytest.mark.gpu
def test_captured_calls_share_nothing() -> None:
    x, results = torch.randn(2, 4, device="cuda"), []
    quantized_once(x, weights(1)[0], (), lambda: (x.clone(), x.clone()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results.append(quantized_once(x, weights(1)[0], (), lambda: (x * 2, x * 2))[0])
    x.fill_(3)
    graph.replay()
    assert torch.equal(results[0], torch.full_like(x, 6))
