"""Which memory pool and stream CUDA graphs are recorded with, by torch's rules for both, without a device."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from diffuse_compress.pipelines.recorder import CudaRecorder


@dataclass(frozen=True)
class Stream:
    name: str
    device: torch.device


ONE, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)
DEFAULT = Stream("default", ONE)


class Device:
    """What torch.cuda does with pools and streams; on a device ``test_cuda.py`` has it do so itself."""

    def __init__(self) -> None:
        self.stream = DEFAULT
        self.current = ONE
        self.made = 0
        self.users: dict[int, list[weakref.ref[Any]]] = {}
        self.captured_on: list[str] = []

    def new_pool(self) -> int:
        self.users[len(self.users)] = []
        return len(self.users) - 1

    def new_stream(self, device: torch.device) -> Stream:
        self.made += 1
        return Stream(f"side {self.made}", device)

    @contextlib.contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def capture(self, graph: Any, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert stream.device == self.current, "what runs on another device is not captured, and runs"
        self.stream, before = stream, self.stream
        # A pool whose graphs are gone, and of which a workspace is still in use: its handle is dead.
        if self.users[pool] and not any(user() for user in self.users[pool]):
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        yield  # an exception leaves the stream as it is
        graph.pool = pool
        self.users[pool].append(weakref.ref(graph))
        self.captured_on.append(stream.name)
        self.stream = before


class Graph:
    pool: int

    def replay(self) -> None:
        """Nothing to do."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", made.capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", made.new_pool)
    monkeypatch.setattr(torch.cuda, "Stream", made.new_stream)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(torch.cuda, "device", made.on_device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.stream)
    return made


def test_graphs_share_a_pool_while_one_of_them_lives(device: Device) -> None:
    recorder = CudaRecorder()
    replays = [recorder.record(lambda: 1, ONE)[0] for _ in range(3)]
    assert [replay.__self__.pool for replay in replays] == [0, 0, 0]
    del replays[:2]
    replays.append(recorder.record(lambda: 1, ONE)[0])
    assert replays[-1].__self__.pool == 0
    replays.clear()
    replays.append(recorder.record(lambda: 1, ONE)[0])
    assert replays[0].__self__.pool == 1


def test_every_recorder_has_a_stream_of_its_own(device: Device) -> None:
    one, other = CudaRecorder(), CudaRecorder()
    for recorder in (one, other, one):
        recorder.record(lambda: 1, ONE)
    assert device.captured_on == ["side 1", "side 2", "side 1"]


def test_the_device_of_the_model_may_not_be_the_current_one(device: Device) -> None:
    recorder = CudaRecorder()
    for where in (ONE, OTHER, OTHER):
        recorder.record(lambda: 1, where)
    assert device.captured_on == ["side 1", "side 2", "side 2"]
    assert (device.current, device.stream) == (ONE, DEFAULT)


def test_a_recording_that_fails_leaves_the_current_stream(device: Device) -> None:
    recorder = CudaRecorder()

    def fail() -> None:
        assert device.stream.name == "side 1"
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(fail, ONE)
    assert device.stream == DEFAULT
    replay, output = recorder.record(lambda: 2, ONE)
    assert (output, device.stream) == (2, DEFAULT)
    assert replay.__self__.pool == 1, "nobody knows what the pool of the one that failed is good for"
