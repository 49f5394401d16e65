from __future__ import annotations

import pytest

from diffuse_compress.pipelines import graphs
from pipelines.tape import Tape


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Graphs can be recorded on any device; the recorders that were made."""
    made: list[Tape] = []

    def make() -> Tape:
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(graphs, "CudaRecorder", make)
    return made
