"""Custom pipelines: loaded from their files, equal to stock, with tables before the loop and places that it tells."""

from __future__ import annotations

import inspect
import json
import threading
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, HeunDiscreteScheduler
from diffusers.utils import dynamic_modules_utils

import diffuse_compress as dc
from diffuse_compress.pipelines.loops import LOOPS
from diffuse_compress.pipelines.mixin import CompressedPipelineMixin
from diffuse_compress.pipelines.shim import shim_of_class, stock_class_of
from diffuse_compress.runtime import run as run_module
from diffuse_compress.runtime import steps
from diffuse_compress.runtime.run import START_UNKNOWN
from diffuse_compress.temporal import table as table_module
from diffuse_compress.temporal.config import TableConfig
from diffuse_compress.temporal.lookup import CONSUMER
from diffuse_compress.temporal.table import attach_table, table_of
from pipelines.cases import FILES, FOLDER, STEPS, as_class, denoiser, sample, stock, with_mixin

EXACT = TableConfig(exact=True)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers copies the files that it runs into a folder of this test."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def load(folder: Path, name: str) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(FOLDER / f"{name}.py"), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_files_and_pushed_checkpoints_are_one_text() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(FILES)
    assert set(FILES.values()) == set(LOOPS)
    for name, cls in FILES.items():
        assert (FOLDER / f"{name}.py").read_text() == shim_of_class(cls)


@pytest.mark.parametrize("name", FILES)
def test_loads_and_equals_stock(name: str, tmp_path: Path, modules: None) -> None:
    plain = stock(name)
    plain.save_pretrained(tmp_path)
    if name == "wan":  # its convolution's last bits depend on where in memory its weights stand
        plain = DiffusionPipeline.from_pretrained(tmp_path)
        plain.set_progress_bar_config(disable=True)
    ours = load(tmp_path, name)
    assert isinstance(ours, CompressedPipelineMixin)
    assert stock_class_of(ours) is type(plain)
    assert torch.equal(sample(ours, steps=2), sample(plain, steps=2))


@pytest.mark.parametrize("name", ["pixart_alpha", "flux"])
def test_compressed_equals_stock_and_comes_back_as_stock(name: str, tmp_path: Path, modules: None) -> None:
    pipe = stock(name).compress("w8a8", dc.TFMQConfig(num_inference_steps=STEPS), measure=False)
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    # By the file of the repository, and by a folder with a pipeline.py.
    saved = str(tmp_path / "saved")
    by_folder = DiffusionPipeline.from_pretrained(saved, custom_pipeline=saved, trust_remote_code=True)
    by_folder.set_progress_bar_config(disable=True)
    for ours in (load(tmp_path / "saved", name), by_folder):
        assert isinstance(ours, CompressedPipelineMixin)
        assert torch.equal(sample(ours), expected)
        assert dc.compression_stats(ours, strict=True)
    ours.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/model_index.json").read_text())["_class_name"] == type(pipe).__name__
    plain = DiffusionPipeline.from_pretrained(tmp_path / "again")
    plain.set_progress_bar_config(disable=True)
    assert type(plain) is type(pipe)
    assert torch.equal(sample(plain), expected)


def test_the_call_keeps_its_arguments_and_gains_one() -> None:
    cls = type(with_mixin(stock("flux")))
    ours, theirs = (list(inspect.signature(one.__call__).parameters) for one in (cls, diffusers.FluxPipeline))
    assert ours == [*theirs, "cuda_graph"]
    assert cls.__call__.__doc__ == diffusers.FluxPipeline.__call__.__doc__

    class Mine(cls):  # type: ignore[misc,valid-type]
        def __call__(self, prompt: str, **kwargs: Any) -> Any:
            return super().__call__(prompt, cuda_graph=False, **kwargs)

    assert list(inspect.signature(Mine.__call__).parameters) == ["self", "prompt", "kwargs"]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in turn: "build" of rows, and "call" of the denoiser, which is listened to first."""
    found: list[str] = []
    build = table_module.build

    def listening(*args: Any, **kwargs: Any) -> Any:
        found.append("build")
        return build(*args, **kwargs)

    monkeypatch.setattr(table_module, "build", listening)
    return found


@pytest.mark.parametrize(
    ("name", "guided"),
    [*((name, True) for name in FILES), ("flux", False)],
)
def test_tables_are_built_once_and_before_the_loop(name: str, guided: bool, log: list[str]) -> None:
    pipe = stock(name)
    expected = sample(pipe, guided=guided, steps=2)
    model = denoiser(pipe)
    model.register_forward_pre_hook(lambda *_: log.append("call"))
    ours = with_mixin(pipe)
    attach_table(model, EXACT)
    assert torch.equal(sample(pipe, guided=guided, steps=2), expected)
    builds, calls = log.count("build"), log.count("call")
    assert log.index("call") < log.index("build"), "stock: in the first step"
    table_of(model).clear()
    log.clear()
    assert torch.equal(sample(ours, guided=guided, steps=2), expected)
    assert log == ["build"] * builds + ["call"] * calls
    log.clear()
    assert torch.equal(sample(ours, guided=guided, steps=2), expected)
    # Rows of the timestep alone are there already, those of the request are its own.
    assert log == ["build"] * (builds - 1) + ["call"] * calls
    assert dc.compression_stats(ours, strict=True)


def test_variables_of_another_version_leave_the_tables_to_the_first_step(
    log: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def renamed(pipe: Any, known: Any) -> Any:
        yield known["a_variable_that_is_not_there"]

    ours = with_mixin(stock("flux"))
    expected = sample(ours)
    attach_table(ours.transformer, EXACT)
    monkeypatch.setitem(LOOPS, "FluxPipeline", renamed)
    assert torch.equal(sample(ours), expected)
    assert "tables are built in the loop's first step: KeyError('a_variable_that_is_not_there')" in caplog.text
    assert dc.compression_stats(ours, strict=True)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, Any]]:
    """(row, problem) of every call, where neither timesteps nor the scheduler's counters can be read."""
    found: list[tuple[int | None, Any]] = []
    monkeypatch.setattr(run_module, "_readable", lambda timestep: None)
    monkeypatch.setattr(run_module, "_integer", lambda scheduler, name: None)
    after = steps.StepTracker.after

    def listening(self: Any, *args: Any) -> None:
        context = steps.current()
        found.append((context.row, context.problem))
        after(self, *args)

    monkeypatch.setattr(steps.StepTracker, "after", listening)
    return found


def test_the_loop_tells_what_nothing_else_does(places: list[tuple[int | None, Any]]) -> None:
    pipe = stock("flux")
    attach_table(pipe.transformer, EXACT)
    sample(pipe)
    assert places[0] == (None, START_UNKNOWN)
    places.clear()
    sample(with_mixin(pipe))
    assert places == [(row, None) for row in range(STEPS) for _ in range(2)]


@pytest.mark.parametrize(
    ("name", "order"), [("stable_diffusion_img2img", 1), ("stable_diffusion_xl_img2img", 2)], ids=["ddim", "heun"]
)
def test_places_in_img2img(name: str, order: int, places: list[tuple[int | None, Any]]) -> None:
    pipe = stock(name)
    if order == 2:
        pipe.scheduler = HeunDiscreteScheduler()
    ours = with_mixin(pipe)
    steps.track(ours.unet, steps.Consumer("test", saves=False))
    sample(ours)
    rows = len(ours.scheduler.timesteps)
    assert places == [(row, None) for row in range(order, rows)]


def test_places_after_an_interrupt(places: list[tuple[int | None, Any]]) -> None:
    ours = with_mixin(stock("flux"))
    attach_table(ours.transformer, EXACT)
    expected = sample(ours, guided=False)
    whole = [(row, None) for row in range(STEPS)]
    assert places == whole

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        pipe._interrupt = step == 1
        return tensors

    def fail(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        raise KeyboardInterrupt

    places.clear()
    sample(ours, guided=False, callback_on_step_end=interrupt)
    assert places == whole[:2]
    with pytest.raises(KeyboardInterrupt):
        sample(ours, guided=False, callback_on_step_end=fail)
    places.clear()
    assert torch.equal(sample(ours, guided=False), expected)
    assert places == whole


def test_a_pipeline_called_in_another_ones_loop() -> None:
    """They share a denoiser; each loop tells of itself."""
    outer, inner = (with_mixin(stock("flux")) for _ in range(2))
    inner.transformer = outer.transformer
    expected = sample(outer), sample(inner, seed=1, steps=3)
    attach_table(outer.transformer, EXACT)
    found = []

    def between(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 1:
            found.append(sample(inner, seed=1, steps=3))
        return tensors

    assert torch.equal(sample(outer, callback_on_step_end=between), expected[0])
    assert torch.equal(found[0], expected[1])
    for pipe in (outer, inner):
        stats = pipe.compression_stats().components["transformer"]
        assert not stats.unknown
        assert not stats.method(CONSUMER).misses


def test_two_pipelines_in_two_threads() -> None:
    pipes = [with_mixin(stock(name)) for name in ("flux", "pixart_alpha")]
    expected = [sample(pipe) for pipe in pipes]
    for pipe in pipes:
        attach_table(pipe.transformer, EXACT)
    found: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        found[number] = sample(pipes[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, pipe in enumerate(pipes):
        assert torch.equal(found[number], expected[number])
        assert dc.compression_stats(pipe, strict=True)


def test_the_second_expert_of_wan_builds_its_own() -> None:
    pipe = stock("wan")
    pipe.register_modules(transformer_2=stock("wan").transformer)
    pipe.register_to_config(boundary_ratio=0.9)
    expected = sample(pipe)
    ours = as_class(pipe, type(with_mixin(stock("wan"))))
    ours.register_to_config(boundary_ratio=0.9)
    for model in (ours.transformer, ours.transformer_2):
        attach_table(model, EXACT)
    assert torch.equal(sample(ours), expected)
    assert set(dc.compression_stats(ours, strict=True).components) == {"transformer", "transformer_2"}
