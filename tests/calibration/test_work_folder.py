"""work_dir=: a calibration that was interrupted or killed goes on, to the same bytes; another one is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import diffuse_compress as dc
import tiny
from diffuse_compress.calibration.work_folder import FinishedBlocks, digest_of_items, digest_of_weights
from diffuse_compress.integrations.component import quantized_layers

SEQUENCE = [dc.SmoothQuantConfig(), dc.GPTQConfig()]
CONFIG = dc.QuantizationConfig("w8a8", algorithm=SEQUENCE)


def prompts(pipe: Any) -> list[dict[str, Any]]:
    given = tiny.call_kwargs(pipe, steps=2)
    given.pop("generator")
    return [{**given, "prompt": prompt} for prompt in ("a cat", "a dog")]


def test_an_interrupted_call_goes_on_where_it_was(tmp_path: Path) -> None:
    expected = tiny.build_pipeline("pixart")
    expected.compress(CONFIG, calibration=prompts(expected), measure=False)
    pipe = tiny.build_pipeline("pixart")
    stages: list[str] = []

    def callback(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        stages.append(stage)
        if interrupted and stage.startswith("Calibrating"):
            raise KeyboardInterrupt

    interrupted, given = True, {"calibration": prompts(pipe), "work_dir": tmp_path, "measure": False}
    with pytest.raises(KeyboardInterrupt):
        pipe.compress(CONFIG, callback=callback, **given)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(path.name.partition("-")[0] for path in files) == [
        "adaln_single.linear.safetensors", "manifest.json", "recording"]  # fmt: skip
    assert {"Recording", "Calibrating transformer"} == set(stages)
    interrupted = False
    stages.clear()
    pipe.compress(CONFIG, callback=callback, **given)
    assert set(stages) == {"Calibrating transformer"}, "recorded samples were not used again"
    assert digest_of_weights(pipe.transformer) == digest_of_weights(expected.transformer)
    assert all(path.stat().st_mtime_ns == written for path, written in files.items()), "a finished block was done again"


INT4_GROUPS = dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT4, dc.PerGroup(32, pad=True), symmetric=False))
AWQ_GPTQ = (dc.AWQConfig(num_ratios=4, clip=False), dc.GPTQConfig())
ROTATED = (dc.QuaRotConfig(residual=True), dc.SVDQuantConfig(rank=4, num_alphas=2, iterations=2))


@pytest.mark.parametrize(
    ("name", "scheme", "algorithms"),
    [("unet_sd1", INT4_GROUPS, AWQ_GPTQ), ("llama", INT4_GROUPS, AWQ_GPTQ), ("llama", "w4a4", ROTATED)],
)
def test_finished_blocks_alone_give_the_model(
    name: str, scheme: dc.Scheme | str, algorithms: tuple[object, ...], tmp_path: Path
) -> None:
    """Convolutions, asymmetric groups, layers outside of blocks, rotations and low-rank branches."""
    config = dc.QuantizationConfig(scheme, algorithm=list(algorithms))
    items = [tiny.inputs_for(tiny.build(name), seed=seed) for seed in range(2)]
    first, second = tiny.build(name), tiny.build(name)
    first.compress(config, calibration=items, work_dir=tmp_path, measure=False)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    second.compress(config, calibration=items, work_dir=tmp_path, measure=False)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert digest_of_weights(first) == digest_of_weights(second)


def test_what_differs_is_said_before_anything_is_touched(tmp_path: Path) -> None:
    texts = [torch.randint(0, 64, (1, 16)) for _ in range(2)]
    calibration = dc.Calibration.record(tiny.build("llama"), texts)
    config = dc.QuantizationConfig("w8a8", algorithm=dc.GPTQConfig())
    tiny.build("llama").compress(config, calibration=calibration, work_dir=tmp_path, measure=False)
    other = tiny.build("llama")
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    before = digest_of_weights(other)
    cases = [
        (other, config, calibration, r"holds 2 finished blocks .* differs in weights \(\w+ -> \w+\)\. To go on"),
        (tiny.build("llama"), dc.QuantizationConfig("w8a8", algorithm=dc.GPTQConfig(damping=0.1)), calibration,
         r'differs in recipe \(algorithm \{"kind": "gptq".* -> .*"damping": 0\.1'),
        (tiny.build("llama"), dc.QuantizationConfig("w4a8", algorithm=dc.GPTQConfig()), calibration,
         r"recipe \(model\.layers\.0\..* and \d+ more\)\. "),
        (tiny.build("llama"), config, calibration.take(1), r"differs in calibration \(\w+ -> \w+\)"),
    ]  # fmt: skip
    for model, asked, data, message in cases:
        with pytest.raises(dc.ConfigError, match=message):
            model.compress(asked, calibration=data, work_dir=tmp_path, measure=False)
    assert digest_of_weights(other) == before
    manifest = tmp_path / "model" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["fingerprint"]["versions"]["torch"] = "1.0"
    manifest.write_text(json.dumps(content))
    with pytest.raises(dc.ConfigError, match=rf"differs in versions \(torch 1\.0 -> {torch.__version__.split('+')[0]}"):
        tiny.build("llama").compress(config, calibration=calibration, work_dir=tmp_path, measure=False)
    manifest.write_text("{")
    with pytest.raises(dc.CheckpointError, match=r"manifest\.json cannot be read .* Delete the folder"):
        tiny.build("llama").compress(config, calibration=calibration, work_dir=tmp_path, measure=False)


def test_damaged_and_unwritable_files(tmp_path: Path) -> None:
    model, texts = tiny.build("llama"), [torch.randint(0, 64, (1, 16))]
    before = digest_of_weights(model)
    given = {"calibration": texts, "work_dir": tmp_path, "measure": False}
    in_the_way = tmp_path / "model" / "model.layers.1.safetensors"
    in_the_way.mkdir(parents=True)
    (in_the_way / "file").touch()
    with pytest.raises(dc.CheckpointError, match=r"layers\.1\.safetensors is damaged .* Delete it"):
        model.compress(dc.QuantizationConfig("w8a8", algorithm=dc.GPTQConfig()), **given)
    assert digest_of_weights(model) == before
    blocks = FinishedBlocks(tmp_path / "model")
    layer = next(iter(quantized_layers(tiny.build("llama").compress("w8a8", measure=False)).values()))
    with pytest.raises(dc.ModelStateError, match=r"cannot be written .* pass work_dir="):
        blocks.save("model.layers.1", {"": layer})
    with pytest.raises(dc.CheckpointError, match=r"must hold model\.layers\.0 with the layers \['q'\], got"):
        blocks.load("model.layers.0", ["q"])
    assert not list(tmp_path.rglob("*.tmp"))


def test_items_have_a_hash_where_they_can() -> None:
    items = ["a", {"prompt": "b", "latents": torch.zeros(2)}]
    assert digest_of_items(items) == digest_of_items(list(items))
    assert digest_of_items(items) != digest_of_items(["a", {"prompt": "b", "latents": torch.ones(2)}])
    assert digest_of_items([object()]) is None
    # As pipelines expand a timestep to their batch, here of one: the stride is 0.
    assert digest_of_items([torch.tensor(3.0).expand(1)]) == digest_of_items([torch.tensor([3.0])])


def killed(folder: Path, number: int, seed: int) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(script), str(folder), str(number), str(seed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["runs"]


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    runs = killed(tmp_path, 3, seed=3)
    assert all(run["equal"] for run in runs), runs
    assert any(run["blocks"] for run in runs), runs


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    """`pytest -m slow tests/calibration/test_work_folder.py`"""
    runs = killed(tmp_path, 20, seed=0)
    assert all(run["equal"] for run in runs), runs
    assert len({run["blocks"] for run in runs}) > 1, runs
