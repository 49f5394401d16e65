"""What holds in every test: seeds, global state given back, hardware gates. Our warnings are errors: pyproject.toml."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

TESTS = Path(__file__).parent
POISONED_FOLDERS = (TESTS / "kernels", TESTS / "quantization")
OUR_PACKAGES = ("diffuse_compress", "diffuse_compress_kernels")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a case marked `gpu` or `sm90` where that hardware is missing: the case alone, never its neighbours."""
    if item.get_closest_marker("sm90"):
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs a CUDA device of compute capability 9.0 or more")
    elif item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same global random state."""
    value = 0
    random.seed(value)
    torch.manual_seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value)
    return value


def _global_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad enabled": torch.is_grad_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "threads": torch.get_num_threads(),
    }
    if "torch._inductor.config" in sys.modules:
        state["inductor config"] = sys.modules["torch._inductor.config"].save_config_portable()
    return state


def _restore(state: dict[str, Any]) -> None:
    torch.set_default_dtype(state["default dtype"])
    torch.set_grad_enabled(state["grad enabled"])
    torch.set_float32_matmul_precision(state["float32 matmul precision"])
    enabled, warn_only = state["deterministic algorithms"]
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = state["cudnn"]
    torch.set_num_threads(state["threads"])
    if torch.get_default_device() != state["default device"]:
        torch.set_default_device(state["default device"])
    if "inductor config" in state:
        sys.modules["torch._inductor.config"].load_config(state["inductor config"])


@pytest.fixture(autouse=True)
def restore_global_state() -> Iterator[None]:
    """The library must leave torch's global switches as it found them: a test that moves one fails, and it is reset."""
    before = _global_state()
    yield
    after = _global_state()
    changed = [name for name, value in before.items() if after[name] != value]
    if changed:
        _restore(before)
        pytest.fail(f"global state left changed: {', '.join(f'{n}: {before[n]} -> {after[n]}' for n in changed)}")


@pytest.fixture(autouse=True)
def _restore_library_switches() -> Iterator[None]:
    """Each test starts with the progress bars and verbosity of both libraries as they were, whatever a script set."""
    libraries = [sys.modules.get(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    before = [(lib, lib.is_progress_bar_enabled(), lib.get_verbosity()) for lib in libraries if lib is not None]
    yield
    for library, bars, verbosity in before:
        if library.is_progress_bar_enabled() != bars:
            (library.enable_progress_bar if bars else library.disable_progress_bar)()
        if library.get_verbosity() != verbosity:
            library.set_verbosity(verbosity)


@pytest.fixture
def fresh_thread() -> None:
    """Hand-written sampling loops of one test must not be the past of the next."""
    from diffuse_compress.runtime import steps

    steps._thread.scopes[0].runs.clear()
    steps._thread.scopes[0].stats.clear()


@pytest.fixture
def fewer_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of timestep paths are learned on a grid of two hundred timesteps, in a fifth of the time."""
    monkeypatch.setattr("diffuse_compress.temporal.tiar.GRID", 200)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Graphs are counted from 0, and none is left for the next test."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def untouched_rng() -> Iterator[None]:
    """Fails when the test has advanced or reseeded a global random generator."""
    python, cpu = random.getstate(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    yield
    assert random.getstate() == python, "the global state of `random` has changed"
    assert torch.equal(torch.get_rng_state(), cpu), "the global CPU generator of torch has changed"
    now = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    assert all(torch.equal(a, b) for a, b in zip(cuda, now, strict=True)), "a global CUDA generator has changed"


@pytest.fixture
def nan_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty*` called by our packages returns NaN (integers: a sentinel), so unwritten outputs show."""
    # torch's device contexts list the constructors on first use: with ours in the list, they would miss the real ones.
    torch.utils._device._device_constructors()
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = original(*args, **kwargs)
        if torch.compiler.is_compiling():
            return result
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _fill_with_poison(result) if caller.split(".")[0] in OUR_PACKAGES else result

    return empty


def _fill_with_poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() == 0 or tensor.is_meta:
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        try:
            return tensor.fill_(torch.iinfo(tensor.dtype).max // 3 * 2)
        except (TypeError, RuntimeError):
            return tensor


@pytest.fixture(autouse=True)
def _poison_low_level_tests(request: pytest.FixtureRequest) -> None:
    """Tests of the kernels and of the quantization core always run with `nan_poison`."""
    if any(request.path.is_relative_to(folder) for folder in POISONED_FOLDERS):
        request.getfixturevalue("nan_poison")


@pytest.fixture
def recorders(monkeypatch):
    """Graphs of denoisers can be recorded on any device; the recorders that were made."""
    from diffuse_compress.pipelines import graphs
    from pipelines.tape import Tape

    made = []

    def make():
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(graphs, "CudaRecorder", make)
    return made
