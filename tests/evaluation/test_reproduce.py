"""``eval reproduce`` in processes of its own: tiny repositories on a loopback Hub stand for published weights."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny
import tiny_vlm
from diffuse_compress.cli import main
from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.experiments import load_experiments
from diffuse_compress.evaluation.records import load_record
from diffuse_compress.reproduce import reproduce
from loopback_hub import LoopbackHub

ROOT = Path(__file__).resolve().parents[2]
USER = Path(__file__).with_name("reproduce_user.py")
OPTIONS = {"num_inference_steps": 2, "guidance_scale": 2.0, "use_resolution_binning": False, "clean_caption": False}
PICTURES = {
    "kind": "pictures",
    "dtype": "bfloat16",
    "prompts": "prompts.txt",
    "seed": 3,
    "batch_size": 2,
    "settings": OPTIONS,
}
CLIPS = {
    "kind": "clips",
    "dtype": {"default": "bfloat16", "vae": "float32"},
    "prompts": "motion.txt",
    "count": 2,
    "settings": {"num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 5},
}


@dataclass
class Session:
    hub: LoopbackHub
    folder: Path
    shas: dict[str, str]

    def run(self, *commands: list[str], register: bool = True, **environment: str) -> list[dict[str, Any]]:
        paths = [str(ROOT / name) for name in ("src", "kernels", "tests")]
        env = {**os.environ, **self.hub.environment(str(self.folder / "cache")), "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, str(USER), json.dumps(commands), *(["--register"] if register else [])]
        done = subprocess.run(
            command, env=env | environment, cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return found


def reproduce_command(*words: str, recipe: str = "w4a8") -> list[str]:
    return ["eval", "reproduce", *words, "--recipe", recipe, "--experiments", "experiments.json", "--device", "cpu"]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("reproduce")
    for name in ("pixart", "wan"):
        tiny.build_pipeline(name).save_pretrained(folder / name)
    tiny.build("llama").save_pretrained(folder / "llama")
    (folder / "prompts.txt").write_text("a red cat\nthe blue moon\na small house\n")
    with LoopbackHub() as hub:
        for name in ("pixart", "wan", "llama"):
            files = {p.relative_to(folder / name).as_posix(): p for p in (folder / name).rglob("*") if p.is_file()}
            hub.add(f"base/{name}", {path: file.read_bytes() for path, file in files.items()})
        extra = {"unet/model.bin": b"1", "vae/diffusion_pytorch_model.fp16.safetensors": b"12", "assets/a.png": b"3"}
        hub.add("base/pixart", extra)
        hub.add("base/gated", hub.files("base/pixart"))
        hub.repositories["base/gated"].gated = True
        hub.add("data/lines", {"texts/test.txt": b"a red cat\nthe blue moon\n", "texts/train.txt": b"no"})
        shas = {name: repo.refs["main"].sha for name, repo in hub.repositories.items()}
        # The branch moves on: what is pinned stays what it was.
        hub.add("base/pixart", {"model_index.json": b"broken"}, "a later commit")
        data = {"repo": "data/lines", "files": ["texts/test.txt"]}
        llama = {
            "repo": "base/llama",
            "kind": "language",
            "dtype": "float32",
            "data": data,
            "settings": {"name": "lines", "count": 2},
        }
        experiments = {
            "Tiny-Pixart": {"repo": "base/pixart", "revision": shas["base/pixart"], **PICTURES},
            "Tiny-Wan": {"repo": "base/wan", "revision": shas["base/wan"], **CLIPS},
            "gated": {"repo": "base/gated", "revision": shas["base/gated"], **PICTURES},
            "absent": {"repo": "base/absent", **PICTURES},
            "late": {"repo": "base/late", "revision": shas["base/pixart"], **PICTURES},
            "llama": llama,
        }
        text = json.dumps({"schema_version": 1, "experiments": experiments})
        (folder / "experiments.json").write_text(text)
        yield Session(hub, folder, shas)


@pytest.fixture(scope="module")
def outcomes(session: Session) -> list[dict[str, Any]]:
    return session.run(
        reproduce_command("Tiny-Pixart", "--dry-run"),
        reproduce_command("tiny-pixart", "tiny-wan", "gated", "absent", "late", "llama"),
        reproduce_command("gated", "--dry-run"),
        ["eval", "report", *(f"reproduced/{name}" for name in ("Tiny-Pixart/w4a8", "gated/w4a8")), "--out", "report"],
    )


def test_dry_run_says_what_would_be_done(session: Session, outcomes: list[dict[str, Any]]) -> None:
    done = outcomes[0]
    assert done["code"] == 0, done["err"]
    assert f"base/pixart at {session.shas['base/pixart']} (pinned)" in done["out"]
    needed = [p for p in (session.folder / "pixart").rglob("*") if p.is_file()]
    match = re.search(r"weights: (\d+) files, (\S+ \S+), to download (\S+ \S+)\n", done["out"])
    assert match is not None
    assert int(match[1]) == len(needed)
    assert match[2] == f"{sum(p.stat().st_size for p in needed) / 2**20:.2f} MiB"
    assert "arms: dense, w4a8, in bfloat16\n" in done["out"]
    assert "samples: 3 for each arm, of prompts.txt, seeds 3 to 5" in done["out"]


def test_records_hold_all_that_fixes_the_numbers(session: Session, outcomes: list[dict[str, Any]]) -> None:
    dense, small = (load_record(session.folder / "reproduced/Tiny-Pixart" / name) for name in ("dense", "w4a8"))
    assert (dense.name, small.name) == ("Tiny-Pixart dense", "Tiny-Pixart w4a8")
    for record in (dense, small):
        assert record.model["id"] == "base/pixart"
        assert record.model["revision"] == session.shas["base/pixart"]
        assert record.model["dtype"] == "bfloat16"
        assert record.seeds["base"] == 3
        assert record.samples == 3
        assert record.command == (
            "diffuse-compress eval reproduce tiny-pixart tiny-wan gated absent late llama --recipe w4a8 "
            "--experiments experiments.json --device cpu"
        )
    assert dense.metrics == ()
    assert small.recipe is not None
    assert small.cost["disk_bytes"] < dense.cost["disk_bytes"]
    found = {metric.name: metric for metric in small.metrics}
    assert 5 < found["PSNR"].value < 100
    assert set(found) | set(small.not_measured) == {"PSNR", "SSIM", "LPIPS", "CLIP-I"}
    assert not any("/" in reason.replace("openai/", "") for reason in small.not_measured.values())


def test_clips_and_a_dtype_for_each_component(session: Session, outcomes: list[dict[str, Any]]) -> None:
    record = load_record(session.folder / "reproduced/Tiny-Wan/w4a8")
    assert record.model["dtype"] == "bfloat16, vae float32"
    assert (record.samples, record.settings["frames"], record.data["name"]) == (2, 5, "motion.txt")
    assert {"PSNR", "SSIM", "Flicker change"} <= {metric.name for metric in record.metrics}


def test_weights_without_access_are_cells_of_the_table(session: Session, outcomes: list[dict[str, Any]]) -> None:
    done = outcomes[1]
    assert done["code"] == 1
    assert "gated: not measured: no access: base/gated is gated; ask for access on its page" in done["err"]
    assert "absent: not measured: no access: base/absent is private or does not exist" in done["err"]
    for name in ("gated", "absent", "late"):
        for arm in ("dense", "w4a8"):
            record = load_record(session.folder / "reproduced" / name / arm)
            assert record.samples == 0
            assert record.not_measured["disk_bytes"].startswith("no access: ")
    assert set(record.not_measured) >= {"PSNR", "SSIM", "LPIPS", "CLIP-I"}
    row = next(line for line in done["out"].splitlines() if line.startswith("| gated w4a8 | 0 |"))
    assert row.count("not measured: no access") == 7
    assert "- gated w4a8: not measured: no access: base/gated is gated" in done["out"]
    assert outcomes[2]["code"] == 1
    assert "base/gated is gated" in outcomes[2]["err"]
    assert outcomes[3]["code"] == 0, outcomes[3]["err"]
    assert "| gated w4a8 | 0 | not measured: no access |" in (session.folder / "report/report.md").read_text()
    assert "not measured: no access" in (session.folder / "report/report.html").read_text()


def test_language_models_are_scored_by_what_is_registered(session: Session, outcomes: list[dict[str, Any]]) -> None:
    dense, small = (load_record(session.folder / "reproduced/llama" / name) for name in ("dense", "w4a8"))
    assert dense.model["revision"] == session.shas["base/llama"]
    assert dense.data["name"] == f"data/lines@{session.shas['data/lines']}"
    assert dense.data["kind"] == "texts"
    (before,), (after,) = dense.metrics, small.metrics
    assert before.count == after.count == dense.samples == 2
    assert before.value != after.value
    assert after.value == pytest.approx(before.value, rel=0.2)
    assert small.not_measured == {"Accuracy": "the data has no answers"}
    assert small.cost["disk_bytes"] < dense.cost["disk_bytes"]
    fetched = {path for method, path in session.hub.requests if method == "GET" and "/datasets/" in path}
    assert not any("train.txt" in path for path in fetched)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    from pyarrow import Table
    from pyarrow import parquet as files

    content = io.BytesIO()
    files.write_table(Table.from_pylist(rows), content)
    return content.getvalue()


def test_the_packages_own_scorers_score_as_their_commands(session: Session) -> None:
    """Language and vision-language experiments on parquet data of the Hub: the numbers of ``eval perplexity`` and
    ``eval vqa`` on the same files, under the same names."""
    pytest.importorskip("pyarrow")
    folder = session.folder
    model, processor = tiny_vlm.build_llava()
    model.save_pretrained(folder / "llava")
    processor.save_pretrained(folder / "llava")
    python = ROOT / "examples/reference_models/python_llama"
    for name, place in (("python", python), ("llava", folder / "llava")):
        session.hub.add(f"base/{name}", {p.name: p.read_bytes() for p in place.iterdir() if p.is_file()})
    lines = (python / "heldout.txt").read_text()[:3000].splitlines(keepends=True)
    picture = io.BytesIO()
    Image.linear_gradient("L").resize((40, 28)).save(picture, "PNG")
    rows = [
        {
            "question_id": i,
            "question": f"What is {i}?",
            "image": {"bytes": picture.getvalue()},
            "answers": [str(i)] * 10,
        }
        for i in range(3)
    ]
    texts, questions = parquet([{"text": line} for line in lines]), parquet(rows)
    (folder / "texts.parquet").write_bytes(texts)
    (folder / "questions.parquet").write_bytes(questions)
    session.hub.add("data/own", {"texts.parquet": texts, "questions.parquet": questions})
    models = {
        "python": ("language", {"name": "texts.parquet", "window": 128, "stride": 64}, "texts.parquet"),
        "llava": (
            "vision-language",
            {"name": "questions.parquet", "count": 2, "max_new_tokens": 4},
            "questions.parquet",
        ),
    }
    experiments = {
        name: {
            "repo": f"base/{name}",
            "kind": kind,
            "dtype": "float32",
            "data": {"repo": "data/own", "files": [file]},
            "settings": settings,
        }
        for name, (kind, settings, file) in models.items()
    }
    (folder / "models.json").write_text(json.dumps({"schema_version": 1, "experiments": experiments}))
    reproduced = ["eval", "reproduce", "python", "llava", "--recipe", "w8a8", "--experiments", "models.json"]
    arms = ["--recipe", "dense", "w8a8", "--device", "cpu", "--out"]
    text = ["--text", "texts.parquet", "--window", "128", "--stride", "64"]
    asked = ["--data", "questions.parquet", "--limit", "2", "--max-new-tokens", "4"]
    found = session.run(
        [*reproduced, "--device", "cpu"],
        ["eval", "perplexity", str(python), *text, *arms, "own/python"],
        ["eval", "vqa", "llava", *asked, *arms, "own/llava"],
        ["eval", "report", *(f"reproduced/{n}/{arm}" for n in models for arm in ("dense", "w8a8")), "--out", "models"],
        register=False,
    )
    assert [done["code"] for done in found] == [0] * 4, [done["err"] for done in found]
    for name, (kind, _, _) in models.items():
        values = []
        for arm in ("dense", "w8a8"):
            here, there = (load_record(folder / place / name / arm) for place in ("reproduced", "own"))
            (metric,) = here.metrics
            same = next(one for one in there.metrics if one.key == metric.key)
            assert (metric.value, metric.low, metric.high) == (same.value, same.low, same.high)
            assert metric.count == same.count == here.samples == there.samples
            assert here.data["kind"] == there.data["kind"] == ("texts" if kind == "language" else "questions")
            assert here.cost["disk_bytes"] == there.cost["disk_bytes"]
            assert (here.cost["seconds_per_sample"] is None) == ("seconds_per_sample" not in there.cost)
            values.append(metric.value)
        assert kind != "language" or 1 < values[0] != values[1] < 20, values


def test_goes_on_offline_and_keeps_what_it_had(session: Session, outcomes: list[dict[str, Any]]) -> None:
    """What is complete is not made again, what was lost is, and unpinned experiments stay at their first commit."""
    folder = session.folder / "reproduced"
    picture = folder / "Tiny-Pixart/w4a8/samples/00000001.png"
    kept, lost = picture.with_name("00000002.png"), picture.read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (kept, folder / "llama/dense/record.json")}
    picture.unlink()
    shutil.copytree(folder / "Tiny-Pixart", folder / "gated", dirs_exist_ok=True)  # as if it had been measured once
    before = (folder / "gated/w4a8/record.json").read_bytes()
    session.hub.add("base/llama", {"config.json": b"{}"}, "a later commit")
    (session.folder / "cache/hub/models--base--gated").rename(session.folder / "elsewhere")
    # Access that came later: the record of its lack makes room.
    cached = session.folder / "cache/hub/models--base--pixart"
    shutil.copytree(cached, cached.with_name("models--base--late"), symlinks=True)
    done, refused = session.run(
        reproduce_command("Tiny-Pixart", "late", "llama"),
        [*reproduce_command("gated"), "--json"],
        HF_HUB_OFFLINE="1",
    )
    assert done["code"] == 0, done["err"]
    assert picture.read_bytes() == lost
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert {metric.name for metric in load_record(folder / "Tiny-Pixart/w4a8").metrics} >= {"PSNR", "SSIM"}
    late, early = load_record(folder / "late/w4a8"), load_record(folder / "Tiny-Pixart/w4a8")
    assert late.metrics == early.metrics
    assert "disk_bytes" not in late.not_measured
    assert refused["code"] == 1
    assert json.loads(refused["out"])["gated"]["w4a8"]["samples"] == 3
    assert "the Hub cannot be reached, and what is needed of base/gated is not in the cache" in refused["err"]
    assert (folder / "gated/w4a8/record.json").read_bytes() == before


# --- the list ---------------------------------------------------------------------------------------------------

NAMES = (
    "FLUX.1-dev FLUX.1-schnell SDXL SD3.5-medium PixArt-Sigma Wan2.1-1.3B CogVideoX-2B Llama-3.1-8B Qwen2.5-VL".split()
)


def test_published_experiments_are_whole() -> None:
    known = load_experiments()
    assert list(known) == NAMES
    documented = (ROOT / "docs/evaluation.md").read_text()
    for experiment in known.values():
        assert f"| `{experiment.name}` | {experiment.repo} | `{(experiment.revision or '')[:7]}` |" in documented
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", experiment.repo)
        assert re.fullmatch(r"[0-9a-f]{40}", experiment.revision or "")
        if experiment.kind in ("pictures", "clips"):
            conditions = experiment.conditions()
            assert len(conditions) == (64 if experiment.kind == "pictures" else 16)
            assert "num_inference_steps" in experiment.settings
        else:
            assert experiment.data is not None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"repo": "a/b", "kind": "pictures"}, "x lacks dtype"),
        ({"repo": "a/b", "kind": "pictures", "dtype": "bfloat16", "revison": "0"}, "did you mean 'revision'"),
        (
            {"repo": "a/b", "kind": "language", "dtype": "bfloat16", "data": {"repo": "c/d"}},
            "data needs repo and files",
        ),
    ],
)
def test_a_wrong_entry_is_named(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"schema_version": 1, "experiments": {"x": entry}}))
    with pytest.raises(ConfigError, match=message):
        load_experiments(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"mine.json: not a readable list of experiments"):
        load_experiments(path)


def test_what_cannot_work_is_refused_before_anything_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = load_experiments()["PixArt-Sigma"]
    with pytest.raises(ConfigError, match="w4a16-gptq needs calibration data, which an experiment does not have"):
        reproduce(experiment, ["w4a16:gptq"], tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'w4a8'"):
        reproduce(experiment, ["w4a9"], tmp_path)
    path = tmp_path / "mine.json"
    entry = {"repo": "a/b", "kind": "sounds", "dtype": "bfloat16"}
    path.write_text(json.dumps({"schema_version": 1, "experiments": {"x": entry}}))
    with pytest.raises(
        ConfigError, match="x: kind must be one of clips, language, pictures, vision-language, got 'sounds'"
    ):
        reproduce(load_experiments(path)["x"], ["w4a8"], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.json"]
    experiments = {"y": {"repo": "a/b", "dtype": "bfloat16", **PICTURES, "prompts": "general.txt"}, "x": entry}
    path.write_text(json.dumps({"schema_version": 1, "experiments": experiments}))
    command = [
        "eval",
        "reproduce",
        "y",
        "x",
        "--recipe",
        "w8a8",
        "--experiments",
        str(path),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 1
    assert "x: kind must be one of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    language = {"repo": "a/b", "kind": "language", "dtype": "bfloat16", "data": {"repo": "c/d", "files": ["a.txt"]}}
    for settings, message in (
        ({"name": "x", "windw": 4}, "need settings among name, window, stride, batch_size, got the setting 'windw'"),
        ({"window": 4}, "need data, and settings with a name, got 1 files"),
    ):
        path.write_text(json.dumps({"schema_version": 1, "experiments": {"x": {**language, "settings": settings}}}))
        with pytest.raises(ConfigError, match=message):
            reproduce(load_experiments(path)["x"], ["w8a8"], tmp_path)
    assert main(["eval", "reproduce", "flux.1-dew", "--recipe", "w8a8"]) == 1
    assert "no experiment 'flux.1-dew'; did you mean 'FLUX.1-dev'" in capsys.readouterr().err
