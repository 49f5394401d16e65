"""Generation: seeds, batches, interruption, several processes, clips, classes, and runs that do not match."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from diffuse_compress.arms import make_arm, make_arms
from diffuse_compress.cli import main
from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation import generation
from diffuse_compress.evaluation.conditions import Condition, class_conditions, unconditional
from diffuse_compress.evaluation.generation import Arm, generate
from diffuse_compress.evaluation.records import load_record
from diffuse_compress.evaluation.samples import open_pictures, read_clip, read_manifest

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "examples" / "reference_models"
PROMPTS = ["a red cat", "the blue moon", "a small house", "two dogs", "a green tree"]
OPTIONS = {"num_inference_steps": 2, "guidance_scale": 2.0, "use_resolution_binning": False, "clean_caption": False}


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny_pixart"
    tiny.build_pipeline("pixart").save_pretrained(folder)
    return folder


def arm_of(pipe: Any, name: str = "dense") -> Arm:
    return Arm(name, lambda: pipe, {"id": "tiny"})


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.build_pipeline("pixart")


def contents(folder: Path, *, times: bool = False) -> dict[str, bytes]:
    """Every file of a run but those that hold times."""
    skipped = () if times else ("record.json", "progress.jsonl")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skipped
    }


def prompts(count: int = 5) -> list[Condition]:
    return [Condition(text) for text in PROMPTS[:count]]


def test_sample_i_is_what_the_pipeline_draws_with_seed_plus_i(pipe: Any, tmp_path: Path, untouched_rng: None) -> None:
    folder = generate([arm_of(pipe)], prompts(3), tmp_path, seed=11, batch_size=1, repetitions=2, options=OPTIONS)[
        "dense"
    ]
    samples = read_manifest(folder)
    assert [sample.seed for sample in samples] == [11, 12, 13, 14, 15, 16]
    assert [sample.prompt for sample in samples] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 + [PROMPTS[2]] * 2
    for index in (0, 3):
        generator = torch.Generator().manual_seed(11 + index)
        expected = pipe(samples[index].prompt, generator=generator, **OPTIONS).images[0]
        found = Image.open(folder / samples[index].file)
        assert np.array_equal(np.asarray(found), np.asarray(expected))
    together = generate([arm_of(pipe, "4")], prompts(3), tmp_path, seed=11, repetitions=2, options=OPTIONS)["4"]
    for one, other in zip(open_pictures(folder).files, open_pictures(together).files, strict=True):
        difference = np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(other))
        assert np.abs(difference).max() <= 1  # batched products may round otherwise
    record = load_record(folder)
    assert record.samples == 6
    assert record.seeds["base"] == 11
    assert record.model["class"] == "PixArtAlphaPipeline"
    assert record.cost["seconds_per_sample"] > 0
    assert record.cost["peak_memory_bytes"] > 2**20
    assert record.cost["denoiser_disk_bytes"] < record.cost["disk_bytes"]


def test_an_interrupted_run_resumes_to_the_same_files(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"batch_size": 2, "options": OPTIONS}
    whole = contents(generate([arm_of(pipe)], prompts(), tmp_path / "whole", **options)["dense"])
    calls: list[int] = []
    original = generation.draw_batch

    def interrupted(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(generation, "draw_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate([arm_of(pipe)], prompts(), tmp_path / "broken", **options)
    folder = tmp_path / "broken" / "dense"
    with pytest.raises(Exception, match=r"has no manifest.jsonl: not a finished run"):
        open_pictures(folder)
    # The process also died while it wrote: half a progress line, a picture no line speaks of.
    with (folder / "progress.0.jsonl").open("a") as file:
        file.write('{"batch": 1, "samples": [{"ind')
    (folder / "samples" / ".00000002.0.tmp").write_bytes(b"half")
    (folder / "samples" / "00000003.png").write_bytes(b"half")
    generate([arm_of(pipe)], prompts(), tmp_path / "broken", **options)
    assert len(calls) == 4  # the first batch was kept
    assert contents(folder) == whole

    # A finished run loads nothing; a picture that was lost or changed comes back.
    generate([Arm("dense", lambda: pytest.fail("loaded"), {"id": "tiny"})], prompts(), tmp_path / "broken", **options)
    (folder / "samples" / "00000004.png").unlink()
    (folder / "samples" / "00000001.png").write_bytes(b"changed")
    generate([arm_of(pipe)], prompts(), tmp_path / "broken", **options)
    assert contents(folder) == whole
    assert len(calls) == 6


def test_a_folder_of_another_run_is_refused(pipe: Any, tmp_path: Path) -> None:
    generate([arm_of(pipe)], prompts(2), tmp_path, options=OPTIONS)
    for change, name in (
        ({"seed": 1}, "seeds"),
        ({"batch_size": 2}, "settings"),
        ({"options": {**OPTIONS, "num_inference_steps": 3}}, "settings"),
    ):
        with pytest.raises(ConfigError, match=rf"holds a run of other {name} \("):
            generate([arm_of(pipe)], prompts(2), tmp_path, **{"options": OPTIONS, **change})
    with pytest.raises(ConfigError, match="holds a run of other data, samples"):
        generate([arm_of(pipe)], prompts(3), tmp_path, options=OPTIONS)
    with pytest.raises(ConfigError, match="holds a run of other recipe"):
        generate(
            [Arm("dense", lambda: pipe, {"id": "tiny"}, {"components": {}})], prompts(2), tmp_path, options=OPTIONS
        )
    with pytest.raises(ConfigError, match="cannot be asked for classes"):
        generate([arm_of(pipe, "failed")], [Condition(class_label=1)], tmp_path, options=OPTIONS)
    generate([arm_of(pipe, "failed")], prompts(2), tmp_path, options=OPTIONS)  # nothing was made, so nothing is lost
    assert load_record(tmp_path / "failed").data["kind"] == "prompts"
    load_record(tmp_path / "dense").save(tmp_path / "scored" / "record.json")
    with pytest.raises(ConfigError, match="holds a run of other data, samples"):
        generate([arm_of(pipe, "scored")], prompts(3), tmp_path, options=OPTIONS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        generate([arm_of(pipe, "mine")], prompts(2), tmp_path, options=OPTIONS)


def test_arguments_are_checked_before_anything_is_loaded(pipe: Any, tmp_path: Path) -> None:
    arm = Arm("dense", lambda: pytest.fail("loaded"))
    for arms, conditions, options, message in (
        ([arm, arm], prompts(), {}, "arms need different names"),
        ([Arm("a/b", arm.load)], prompts(), {}, "arms need different names"),
        ([arm], [*prompts(), *unconditional(1)], {}, "conditions of one kind, got prompts and unconditional"),
        ([arm], prompts(), {"options": {"generator": 1}}, "generator are set here"),
        ([arm], prompts(), {"options": {"latents": torch.zeros(1)}}, "options must be JSON values"),
        ([arm], prompts(), {"batch_size": 0}, "need batch_size >= 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            generate(arms, conditions, tmp_path, **options)
    with pytest.raises(ConfigError, match="PixArtAlphaPipeline: cannot be asked for classes: it takes no class_labels"):
        generate([arm_of(pipe)], class_conditions("1"), tmp_path, options=OPTIONS)


def test_clips_are_folders_of_frames(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("wan")
    own = {"num_inference_steps": 1, "height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0}
    folder = generate([arm_of(pipe)], prompts(2), tmp_path, batch_size=2, options=own)["dense"]
    samples = read_manifest(folder)
    assert [(sample.file, sample.frames) for sample in samples] == [("samples/00000000", 5), ("samples/00000001", 5)]
    clip = read_clip(folder / samples[1].file)
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    expected = pipe(PROMPTS[:2], generator=generator, output_type="pt", **own).frames[1]
    assert torch.equal(clip, (expected * 255).round().to(torch.uint8))
    assert open_pictures(folder).files[0].name == "0002.png"
    assert load_record(folder).settings["frames"] == 5


def test_classes_and_unconditional_pipelines(tmp_path: Path) -> None:
    dit = make_arm("dit", str(MODELS / "emoji_dit"))
    own = {"num_inference_steps": 1}
    folder = generate([dit], class_conditions("7,9"), tmp_path, batch_size=2, options=own, data_name="two")["dit"]
    assert [sample.class_label for sample in read_manifest(folder)] == [7, 9]
    assert load_record(folder).data["kind"] == "classes"
    ddim = make_arms([f"faces={MODELS / 'emoji_ddim'}"])[0]
    assert ddim.name == "faces"
    folder = generate([ddim], unconditional(3), tmp_path, batch_size=2, options=own)["faces"]
    pictures = [np.asarray(Image.open(path)) for path in open_pictures(folder).files]
    assert [picture.shape for picture in pictures] == [(32, 32, 3)] * 3
    assert not np.array_equal(pictures[0], pictures[1])


def test_arms_are_every_pipeline_with_every_recipe(pipeline_folder: Path, tmp_path: Path) -> None:
    path = str(pipeline_folder)
    assert [arm.name for arm in make_arms([path])] == ["tiny_pixart"]
    assert [arm.name for arm in make_arms([path], ["dense", "w8a8", "w4a4:rtn"])] == ["dense", "w8a8", "w4a4-rtn"]
    shutil.copytree(pipeline_folder, tmp_path / "other")
    names = [arm.name for arm in make_arms([f"a={path}", str(tmp_path / "other")], ["dense", "small=w4a8"])]
    assert names == ["a-dense", "a-small", "other-dense", "other-small"]
    dense, small = make_arms([path], ["dense", "w4a8"])
    assert dense.recipe is None
    assert small.recipe is not None
    assert dense.model == small.model
    assert small.load().compression_report().bytes_after < small.load().compression_report().bytes_before
    with pytest.raises(ConfigError, match="pipelines of different names, got tiny_pixart"):
        make_arms([path, path])
    with pytest.raises(ConfigError, match="not a folder"):
        make_arms([str(tmp_path / "nothing")])


def generate_and_score(model: str, prompts: str, out: str, classifier: str) -> int:
    own = ["--batch-size", "2", "--device", "cpu"]
    generating = ["eval", "generate", model, "--recipe", "dense", "w8a8", "--prompts", prompts, "--out", out, *own]
    generating += ["--steps", "2", "--set", "use_resolution_binning=false", "--set", "clean_caption=false"]
    scoring = ["eval", "fid", f"{out}/dense", f"{out}/w8a8", "--features", classifier, *own]
    return main(generating) or main([*scoring, "--metrics", "fid", "kid", "is"])


def run_two_processes(arguments: list[str]) -> None:
    """The same in two processes that find each other as accelerate's and torch's launchers arrange it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join(str(ROOT / name) for name in ("src", "kernels", "tests"))
    command = [sys.executable, __file__, *arguments]
    running = []
    for rank in ("0", "1"):
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process in running:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]


@pytest.mark.slow
def test_two_processes_make_and_score_what_one_does(pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "classifier.py").write_text(
        "import torch\n"
        "class Means:\n"
        "    def embeddings(self, x):\n"
        "        return torch.nn.functional.adaptive_avg_pool2d(x, 3).flatten(1)\n"
        "    classify = embeddings\n"
        "def load_classifier(folder):\n"
        "    return Means()\n"
    )
    model, prompt_file, classifier = (str(p) for p in (pipeline_folder, tmp_path / "prompts.txt", tmp_path))
    run_two_processes([model, prompt_file, str(tmp_path / "2"), classifier])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert generate_and_score(model, prompt_file, str(tmp_path / "1"), classifier) == 0
    finally:
        torch.set_num_threads(threads)
    for arm in ("dense", "w8a8"):
        one, two = (tmp_path / str(count) / arm for count in (1, 2))
        assert contents(one) == contents(two)
        ranks = {json.loads(line)["rank"] for line in (two / "progress.jsonl").read_text().splitlines()}
        assert ranks == {0, 1}
    first, second = (load_record(tmp_path / str(count) / "w8a8") for count in (1, 2))
    assert first.device["processes"] == 1
    assert second.device["processes"] == 2
    assert [metric.name.partition(" ")[0] for metric in first.metrics] == ["Fréchet", "Kernel", "Exponentiated"]
    assert first.metrics == second.metrics  # values, intervals and hashes of the statistics, bit for bit


def test_command_generates_and_says_what_it_cost(
    pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set.csv").write_text("Prompts,Category\na red cat,animals\nthe blue moon,things\n")
    command = ["eval", "generate", str(pipeline_folder), "--prompts", str(tmp_path / "set.csv"), "--steps", "2"]
    command += ["--set", "use_resolution_binning=false", "--set", "clean_caption=false", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["tiny_pixart"]
    assert printed["record"]["data"] == {
        "kind": "prompts",
        "name": "set.csv",
        "sha256": load_record(tmp_path / "out" / "tiny_pixart").data["sha256"],
    }
    assert read_manifest(printed["folder"])[1].metadata == {"Category": "things"}
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "tiny_pixart: 2 samples in" in capsys.readouterr().out
    assert main([*command, "--set", "nonsense", "--out", str(tmp_path / "out")]) == 1
    assert "--set: need NAME=VALUE" in capsys.readouterr().err


if __name__ == "__main__":
    sys.exit(generate_and_score(*sys.argv[1:]))
