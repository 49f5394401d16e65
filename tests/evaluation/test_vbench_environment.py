"""VBench's jobs in another Python, and the environment that is made for them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.evaluation.vbench.isolated import IsolatedEnvironment, default_environment
from diffuse_compress.evaluation.vbench.jobs import VBenchError, in_process, in_python, load_worker, runner_folder
from diffuse_compress.evaluation.vbench.results import metrics_of
from diffuse_compress.evaluation.vbench.runner import evaluate_videos, flickering_score
from diffuse_compress.evaluation.vbench.suite import PromptEntry, PromptSuite, find_suite, load_suite
from diffuse_compress.evaluation.vbench.videos import VideoSet, write_video
from diffuse_compress.evaluation.vbench.weights import WEIGHTS

# The real package needs torchvision, which the CPU build of torch has none of on PyPI; these modules have its interface
# (the file of entries, the names, what is returned) and count bytes instead of looking at videos.
DIMENSION = """
import json
from tqdm import tqdm
from vbench.utils import CACHE_DIR
print("vbench prints to standard output")
def compute_{name}(json_dir, device, submodules_list, **kwargs):
    assert (device.type, submodules_list) == ("cpu", ["{name}", True])
    results = []
    for entry in json.load(open(json_dir)):
        for path in tqdm(entry["video_list"]):
            data = open(path, "rb").read()
            if data == b"broken":
                raise RuntimeError("cannot decode " + path)
            results.append({{"video_path": path, "video_results": len(data) / 100}})
    return sum(r["video_results"] for r in results) / len(results), results
"""
UTILS = """
import logging, os
CACHE_DIR = os.environ["VBENCH_CACHE_DIR"]
logging.basicConfig(level=logging.INFO)
def init_submodules(names, local=False):
    return {name: [name, local] for name in names}
"""


def write_package(site: Path, version: str = "0.1.5") -> None:
    (site / "vbench").mkdir(parents=True)
    (site / f"vbench-{version}.dist-info").mkdir()
    (site / f"vbench-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vbench\nVersion: {version}\n"
    )
    (site / "vbench" / "__init__.py").write_text("")
    (site / "vbench" / "utils.py").write_text(UTILS)
    for name in ("imaging_quality", "color"):
        (site / "vbench" / f"{name}.py").write_text(DIMENSION.format(name=name))
    (site / "vbench" / "scene.py").write_text("import no_such_module\n")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> IsolatedEnvironment:
    """An environment of its own that sees this one's torch, with stand-ins for two dimensions."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python3.*/site-packages")
    (site / "outer.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    write_package(site)
    (site / "detectron2.py").write_text("")
    return IsolatedEnvironment(folder)


def job_of(folder: Path, dimension: str = "imaging_quality", sizes: tuple[int, ...] = (10, 30)) -> dict[str, Any]:
    paths = [folder / f"a cat-{index}.mp4" for index in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(b"x" * size)
    entry = {"prompt_en": "a cat", "dimension": [dimension], "video_list": [str(path) for path in paths]}
    return {
        "task": "evaluate",
        "dimension": dimension,
        "entries": [entry],
        "device": "cpu",
        "weights": str(folder / "weights"),
    }


# --- the protocol -------------------------------------------------------------------------------------------------


def test_a_job_is_a_file_and_so_is_its_result(environment: IsolatedEnvironment, tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"protocol": 1, "result": str(tmp_path / "result.json"), **job_of(tmp_path)}))
    command = [str(environment.python), "-I", str(runner_folder() / "worker.py"), str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"done": 1, "total": 2}, {"done": 2, "total": 2}]
    assert "vbench prints to standard output" in done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["protocol"], result["ok"], result["score"]) == (1, True, pytest.approx(0.2))
    assert [video["score"] for video in result["videos"]] == [0.1, 0.3]
    assert result["versions"]["vbench"] == "0.1.5"
    assert result["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a cat-0.mp4", "a cat-1.mp4", "job.json", "result.json"]


def test_failures_come_back_with_their_reason(environment: IsolatedEnvironment, tmp_path: Path) -> None:
    job = job_of(tmp_path)
    (tmp_path / "a cat-1.mp4").write_bytes(b"broken")
    with pytest.raises(VBenchError, match=r"imaging_quality: RuntimeError: cannot decode .*a cat-1\.mp4") as caught:
        in_python(environment.python, job, "imaging_quality")
    assert caught.value.kind == "RuntimeError"
    assert "Traceback" in str(caught.value)
    with pytest.raises(VBenchError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        in_python(environment.python, {**job, "dimension": "scene"}, "scene")
    with pytest.raises(VBenchError, match="task must be one of evaluate, static_filter, probe, got 'train'"):
        in_python(environment.python, {**job, "task": "train"}, "train")
    with pytest.raises(CheckpointError, match="does not run"):
        in_python(tmp_path / "no" / "python", job, "imaging_quality")
    dying = tmp_path / "dying"
    dying.write_text("#!/bin/sh\necho out of memory >&2\nexit 137\n")
    dying.chmod(0o755)
    with pytest.raises(CheckpointError, match=r"ended with status 137 and left no result. It said:\nout of memory"):
        in_python(dying, job, "imaging_quality")


def test_a_job_in_this_process_leaves_no_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write_package(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.partition(".")[0] == "vbench"]:
        monkeypatch.delitem(sys.modules, name)  # the real one, where it is installed and another test used it
    before = set(sys.modules)
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    try:
        found = in_process(job_of(tmp_path), "imaging_quality")
        assert found["score"] == pytest.approx(0.2)
        assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)
        assert "VBENCH_CACHE_DIR" not in os.environ
        assert capsys.readouterr().out == ""
        assert "pkg_resources" not in set(sys.modules) - before
        with pytest.raises(VBenchError, match="No module named 'no_such_module'"):
            in_process({**job_of(tmp_path), "dimension": "scene"}, "scene")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vbench"]:
            del sys.modules[name]


def test_the_worker_stands_alone() -> None:
    text = (runner_folder() / "worker.py").read_text()
    assert "import diffuse_compress" not in text
    assert "from diffuse_compress" not in text
    assert load_worker().PROTOCOL == 1


# --- evaluation in an environment of its own ----------------------------------------------------------------------


def test_dimensions_run_there_and_an_interrupted_evaluation_goes_on(
    environment: IsolatedEnvironment, tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    for name in ("musiq", "grit"):
        path = weights / WEIGHTS[name].path
        path.parent.mkdir(parents=True)
        path.write_bytes(name.encode())
    bert = tmp_path / "hub" / "models--bert-base-uncased"
    (bert / "snapshots" / "0").mkdir(parents=True)
    (bert / "snapshots" / "0" / "vocab.txt").write_text("a")
    (bert / "refs").mkdir()
    (bert / "refs" / "main").write_text("0")
    entries = tuple(
        PromptEntry(prompt, ("imaging_quality", "color"), {"color": "red"}) for prompt in ("a red cat", "a cup - red")
    )
    suite = PromptSuite("own.json", entries, "0" * 64)
    paths = {(entry.prompt, i): tmp_path / f"{entry.prompt}-{i}.mp4" for entry in entries for i in range(5)}
    for number, path in enumerate(paths.values()):
        path.write_bytes(b"x" * (10 + number))

    def evaluate(dimensions: list[str]) -> Any:
        videos = VideoSet(tmp_path, tmp_path / "results", paths, None)
        options = {"environment": "isolated", "isolated": environment, "weights": weights, "download": False}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
            return evaluate_videos(videos, suite, dimensions, **options)

    last = paths["a cup - red", 4]
    whole = last.read_bytes()
    kept = tmp_path / "results" / "imaging_quality.json"
    (first,) = evaluate(["imaging_quality"])
    stamp = kept.stat().st_mtime_ns
    assert first.score == pytest.approx(0.145)
    assert first.implementation == "vbench 0.1.5"
    assert first.videos["a cup - red-4"] == pytest.approx(0.19)
    last.write_bytes(b"broken")
    with pytest.raises(VBenchError, match="cannot decode"):
        evaluate(["color"])
    last.write_bytes(whole)
    results = evaluate(["color", "imaging_quality"])
    assert [result.dimension for result in results] == ["imaging_quality", "color"]
    assert kept.stat().st_mtime_ns == stamp
    assert results[0] == first
    assert results[1].details["environment"] == "isolated"
    (weights / WEIGHTS["musiq"].path).write_bytes(b"other weights")
    evaluate(["imaging_quality"])
    assert kept.stat().st_mtime_ns > stamp
    assert metrics_of(results)[0].name == "VBench imaging_quality, prompts of own.json"


# --- making it ----------------------------------------------------------------------------------------------------


def write_wheel(folder: Path) -> Path:
    path = folder / "vbench-0.1.5-py3-none-any.whl"
    info = "vbench-0.1.5.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("vbench/__init__.py", "")
        wheel.writestr("vbench/VBench_full_info.json", '[{"prompt_en": "a", "dimension": ["color"]}]')
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: vbench\nVersion: 0.1.5\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.slow
@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or sys.platform != "linux", reason="the lock file is for Python 3.11"
)
def test_the_environment_is_made_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a lock file of one local wheel: failures say why, the next use begins anew, the one after does nothing."""
    wheel = write_wheel(tmp_path)
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"{wheel} \\\n    --hash=sha256:{'0' * 64}\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    made = IsolatedEnvironment(tmp_path / "env", lock)
    with pytest.raises(
        ConfigError, match=r"(?s)could not install vbench's environment.*Without a network.*HASHES"
    ) as caught:
        made.ensure()
    assert "pip download --no-deps --require-hashes" in str(caught.value)
    assert not made.is_ready
    (made.folder / "half").write_text("done")
    lock.write_text(f"{wheel} \\\n    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    python = made.ensure()
    assert not (made.folder / "half").exists()
    assert in_python(python, {"task": "probe", "modules": ["color"]}, "probe")["modules"]["color"].startswith(
        "ModuleNotFound"
    )
    suite = load_suite(find_suite([made.folder]))
    assert "VBench_full_info.json" in suite.name
    log = (made.folder / "install.log").stat().st_mtime_ns
    assert made.ensure() == python
    assert (made.folder / "install.log").stat().st_mtime_ns == log
    lock.write_text(lock.read_text() + "# changed\n")
    assert not made.is_ready


def test_the_default_environment_is_named_after_the_lock_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFUSE_COMPRESS_VBENCH_ENV", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    digest = hashlib.sha256((runner_folder() / "requirements.lock").read_bytes()).hexdigest()
    assert default_environment() == Path(f"/cache/diffuse_compress/vbench-{digest[:12]}")
    monkeypatch.setenv("DIFFUSE_COMPRESS_VBENCH_ENV", "/opt/vbench")
    assert default_environment() == Path("/opt/vbench")


def test_every_line_of_the_lock_file_is_exact_and_hashed() -> None:
    text = (runner_folder() / "requirements.lock").read_text()
    entries = [line for line in text.splitlines() if line and line[0] not in " #"]
    assert all("==" in line and line.endswith(" \\") for line in entries)
    names = {line.partition("==")[0] for line in entries}
    assert {"vbench", "torch", "transformers", "decord", "opencv-python-headless"} <= names
    assert "opencv-python" not in names


@pytest.mark.network
def test_the_real_environment_is_made_and_scores_like_ours(tmp_path: Path) -> None:
    """Downloads 3 GB. Run: pytest -m network tests/evaluation/test_vbench_environment.py --timeout 3600"""
    pytest.importorskip("cv2")
    clip = torch.randint(0, 256, (6, 3, 32, 48), dtype=torch.uint8)
    paths = {("a cat", index): tmp_path / f"a cat-{index}.mp4" for index in range(5)}
    for path in paths.values():
        write_video(clip, path, 8)
    suite = PromptSuite("own.json", (PromptEntry("a cat", ("temporal_flickering",)),), "0" * 64)
    videos = VideoSet(tmp_path, tmp_path / "results", paths, None)
    made = IsolatedEnvironment(tmp_path / "env")
    (result,) = evaluate_videos(
        videos, suite, ["temporal_flickering"], environment="isolated", isolated=made, static_filter="skip"
    )
    assert result.implementation == "vbench 0.1.5"
    assert result.score == pytest.approx(flickering_score(clip), abs=1e-6)
