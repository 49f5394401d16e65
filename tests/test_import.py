"""`import diffuse_compress` without each heavy dependency in turn, and what the import costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What an absent package looks like: no spec, and no distribution.
ABSENT = """
import importlib.metadata, importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == {absent!r} else super().find_spec(name, path, target)
sys.meta_path[:] = [f for f in sys.meta_path if f is not importlib.machinery.PathFinder] + [Finder]
found = importlib.metadata.Distribution.from_name
def from_name(name):
    if name == {absent!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.Distribution.from_name = staticmethod(from_name)
try:
    import {absent}
except ImportError:
    pass
else:
    raise SystemExit("{absent} is not blocked")
"""

EVERY_NAME = """
import diffuse_compress as dc
missing = {}
for name in dc.__all__:
    try:
        getattr(dc, name)
    except ImportError as error:
        assert type(error).__name__ == "MissingDependencyError" and "pip install" in str(error), (name, error)
        missing[name] = str(error)
print(missing)
"""


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "kernels")])
    everything = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=everything, capture_output=True, text=True)


@pytest.mark.parametrize("absent", ["torchao", "peft", "transformers", "triton", "matplotlib"])
def test_import_works_without(absent: str) -> None:
    done = _python(ABSENT.format(absent=absent) + EVERY_NAME)
    assert done.returncode == 0, done.stderr


def test_import_works_without_diffusers() -> None:
    """transformers alone is a supported door: language models are compressed without diffusers."""
    done = _python(ABSENT.format(absent="diffusers") + EVERY_NAME)
    assert done.returncode == 0, done.stderr


def test_import_initialises_no_cuda_prints_nothing_and_loads_no_extra() -> None:
    code = """
import sys, diffuse_compress, torch
assert not torch.cuda.is_initialized()
assert "matplotlib" not in sys.modules and "diffuse_compress.cli" not in sys.modules
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    ours = [line for line in done.stderr.splitlines() if "diffuse_compress" in line]
    assert not ours


@pytest.mark.slow
def test_import_costs_under_a_second_more_than_the_libraries() -> None:
    """Best of five each, and the modules' bytecode is there already: the cost is our code's, not the disk's."""
    base = "from diffusers import DiffusionPipeline, ModelMixin; from transformers import PreTrainedModel"
    timed = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"

    def seconds(statements: str) -> float:
        return min(float(_python(timed.format(statements)).stdout) for _ in range(5))

    cost = seconds(f"{base}; import diffuse_compress") - seconds(base)
    assert cost < 1.0, f"import diffuse_compress takes {cost:.2f} s"
