"""VBench on clips: names, completeness, temporal_flickering from pipeline to record, kept results, sums, weights."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffuse_compress.cli import main
from diffuse_compress.errors import CheckpointError, ConfigError, MissingDependencyError
from diffuse_compress.evaluation.records import load_record
from diffuse_compress.evaluation.samples import read_manifest
from diffuse_compress.evaluation.vbench import runner, weights
from diffuse_compress.evaluation.vbench.dimensions import DIMENSIONS, aggregate, resolve_dimensions
from diffuse_compress.evaluation.vbench.isolated import IsolatedEnvironment
from diffuse_compress.evaluation.vbench.jobs import load_worker
from diffuse_compress.evaluation.vbench.results import COMPATIBLE, DimensionResult, metrics_of
from diffuse_compress.evaluation.vbench.runner import evaluate_videos, flickering_score
from diffuse_compress.evaluation.vbench.suite import (
    PromptEntry,
    PromptSuite,
    find_suite,
    load_suite,
    missing_videos,
    video_name,
)
from diffuse_compress.evaluation.vbench.videos import VideoSet, open_videos, read_video, write_video

WAN = Path(__file__).parents[2] / "examples" / "reference_models" / "emoji_wan"
PROMPTS = ["tiger moving left", "hamburger moving up"]
FLICKERING = "temporal_flickering"
HAS_OPENCV = importlib.util.find_spec("cv2") is not None
needs_opencv = pytest.mark.skipif(not HAS_OPENCV, reason="mp4 files need opencv: pip install opencv-python-headless")


def write_suite(path: Path, prompts: Sequence[str] = PROMPTS, dimensions: Sequence[str] = (FLICKERING,)) -> Path:
    path.write_text(json.dumps([{"prompt_en": prompt, "dimension": list(dimensions)} for prompt in prompts]))
    return path


def clip_of(seed: int, frames: int = 4) -> torch.Tensor:
    """[F, 3, 10, 14] uint8: odd sizes, every value."""
    return torch.randint(0, 256, (frames, 3, 10, 14), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def write_frames(folder: Path, clip: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    for number, frame in enumerate(clip):
        Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(folder / f"{number:04d}.png")
    return folder


@pytest.fixture
def videos_of(tmp_path: Path) -> Callable[..., VideoSet]:
    """Makes videos of random frames for (prompt, index) keys."""

    def make(keys: Sequence[tuple[str, int]]) -> VideoSet:
        paths = {key: write_frames(tmp_path / "clips" / f"{n}", clip_of(n)) for n, key in enumerate(keys)}
        return VideoSet(tmp_path, tmp_path / "results", paths, None)

    return make


def naive_score(clip: torch.Tensor) -> float:
    """The published formula in float64, pixel by pixel."""
    frames = clip.numpy().astype(np.float64)
    differences = [np.abs(one - two).mean() for one, two in itertools.pairwise(frames)]
    return (255.0 - sum(differences) / len(differences)) / 255.0


# --- from a pipeline to a record ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of each of two prompts, of the small Wan pipeline."""
    out = tmp_path_factory.mktemp("runs")
    suite = write_suite(out / "suite.json")
    call = ["--steps", "2", "--set", "height=64", "--set", "width=64", "--set", "num_frames=9"]
    asked = ["--prompts", str(suite), "--dimension", FLICKERING, "--repetitions", "5", "--batch-size", "5"]
    assert main(["eval", "generate", str(WAN), *asked, *call, "--out", str(out)]) in (0, None)
    return out / WAN.name


def test_temporal_flickering_from_pipeline_to_record(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "vbench", str(run), "--suite", str(run.parent / "suite.json"), "--dimensions", FLICKERING]
    command += ["--static-filter", "skip", "--environment", "compatible"]
    assert main(command) in (0, None)
    name = "vbench-compatible temporal_flickering, no static filter, prompts of suite.json"
    assert f"{WAN.name}\n  {name}: 0.9" in capsys.readouterr().out
    (metric,) = [metric for metric in load_record(run).metrics if "flickering" in metric.name]
    assert (metric.name, metric.implementation, metric.count, metric.higher_is_better) == (name, COMPATIBLE, 10, True)
    clips = open_videos(run)
    assert list(clips.paths) == [(prompt, index) for prompt in PROMPTS for index in range(5)]
    assert [sample.prompt for sample in read_manifest(run)] == [key[0] for key in clips.paths]
    expected = [naive_score(clips.read(key)) for key in clips.paths]
    assert metric.value == pytest.approx(sum(expected) / 10, abs=1e-12)
    assert 0.8 < metric.value < 1
    assert metric.low is not None
    assert metric.high is not None
    assert metric.low <= metric.value <= metric.high
    kept = json.loads((run / "vbench" / f"{FLICKERING}.json").read_text())
    assert list(kept["videos"].values()) == pytest.approx(expected, abs=1e-12)


def test_command_without_vbench_and_suite_says_how_to_get_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    assert main(["eval", "vbench", str(run), "--environment-folder", str(tmp_path)]) != 0
    assert "pip install --no-deps vbench==0.1.5" in capsys.readouterr().err
    place = tmp_path / "lib" / "python3.11" / "site-packages" / "vbench"
    place.mkdir(parents=True)
    write_suite(place / "VBench_full_info.json")
    assert find_suite([tmp_path]) == place / "VBench_full_info.json"


# --- the flickering formula ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [2, 3, 9])
def test_flickering_score_is_the_published_formula(frames: int) -> None:
    clip = clip_of(frames, frames)
    assert flickering_score(clip) == pytest.approx(naive_score(clip), abs=1e-13)
    assert flickering_score(clip[:1].expand(4, -1, -1, -1)) == 1
    black_and_white = torch.stack([torch.zeros_like(clip[0]), torch.full_like(clip[0], 255)])
    assert flickering_score(black_and_white) == 0


def test_flickering_score_needs_two_frames() -> None:
    with pytest.raises(ConfigError, match="need at least 2 frames, got 1"):
        flickering_score(clip_of(0, 1))


@needs_opencv
def test_mp4_files_lose_nothing(tmp_path: Path) -> None:
    clip = clip_of(1)
    write_video(clip, tmp_path / "it's a prompt-0.mp4", 7.5)
    assert torch.equal(read_video(tmp_path / "it's a prompt-0.mp4"), clip)
    assert [path.name for path in tmp_path.iterdir()] == ["it's a prompt-0.mp4"]
    (tmp_path / "no.mp4").write_bytes(b"no video")
    with pytest.raises(ConfigError, match=r"no\.mp4: not a readable video"):
        read_video(tmp_path / "no.mp4")


@pytest.mark.skipif(HAS_OPENCV, reason="opencv is installed")
def test_mp4_files_without_opencv_name_the_extra(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install \"diffuse-compress\[eval\]\""):
        read_video(tmp_path / "a-0.mp4")


@needs_opencv
def test_the_package_gives_the_same_score(tmp_path: Path, videos_of: Callable[..., VideoSet]) -> None:
    pytest.importorskip("vbench.temporal_flickering", reason="needs vbench, decord, opencv and torchvision")
    suite = load_suite(write_suite(tmp_path / "suite.json"))
    videos = videos_of([(prompt, index) for prompt in PROMPTS for index in range(5)])
    found = {
        environment: evaluate_videos(videos, suite, [FLICKERING], static_filter="skip", environment=environment)[0]
        for environment in ("here", "compatible")
    }
    assert found["here"].implementation.startswith("vbench ")
    assert [metric.name.partition(" ")[0] for one in found.values() for metric in metrics_of([one])] == [
        "VBench",
        "vbench-compatible",
    ]
    assert found["here"].score == pytest.approx(found["compatible"].score, abs=1e-6)
    assert found["here"].videos == pytest.approx(found["compatible"].videos, abs=1e-6)


@needs_opencv
def test_the_static_filter_takes_the_first_five_still_videos(
    tmp_path: Path, videos_of: Callable[..., VideoSet]
) -> None:
    """With RAFT's network of random weights but for the last layer, which sees no motion anywhere."""
    for module in ("vbench.cli.static_filter", "vbench.dynamic_degree"):
        pytest.importorskip(module, reason="needs vbench, decord, easydict, opencv and torchvision")
    from vbench.third_party.RAFT.core.raft import RAFT

    network = RAFT(load_worker()._Settings(small=False, mixed_precision=False, alternate_corr=False))
    torch.nn.init.zeros_(network.update_block.flow_head.conv2.weight)
    torch.nn.init.zeros_(network.update_block.flow_head.conv2.bias)
    place = tmp_path / "weights" / "raft_model" / "models" / "raft-things.pth"
    place.parent.mkdir(parents=True)
    torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, place)
    suite = load_suite(write_suite(tmp_path / "suite.json", PROMPTS[:1]))
    videos = videos_of([(PROMPTS[0], index) for index in range(25)])
    for key, path in videos.paths.items():  # RAFT halves sizes three times, and correlates over four levels
        clip = clip_of(key[1], 2).repeat_interleave(13, 2).repeat_interleave(10, 3)
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        write_frames(path, clip)
    (result,) = evaluate_videos(videos, suite, [FLICKERING], weights=tmp_path / "weights", environment="here")
    # In the order in which vbench's own filter meets the files.
    assert sorted(result.videos) == [f"{PROMPTS[0]}-{index}" for index in (0, 1, 10, 11, 12)]
    assert (result.details["still_videos"], result.details["prompts_with_fewer_than_5"]) == (5, 0)
    assert result.qualifiers == ("prompts of suite.json",)


# --- names and completeness ---------------------------------------------------------------------------------------


def test_names_are_prompt_and_index() -> None:
    assert video_name("a person's dog, in 4-k", 3) == "a person's dog, in 4-k-3.mp4"
    for prompt in ("either/or", "long " * 60):
        with pytest.raises(ConfigError, match="cannot be the name of a video"):
            video_name(prompt, 0)


def test_videos_are_found_by_name(tmp_path: Path) -> None:
    for name in ("a cat-0.mp4", "a cat-12.mp4", "4-k video-1.mp4", "unnumbered.mp4", "notes.txt"):
        (tmp_path / name).write_bytes(name.encode())
    found = open_videos(tmp_path)
    assert set(found.paths) == {("a cat", 0), ("a cat", 12), ("4-k video", 1), ("unnumbered", 0)}
    assert found.results == tmp_path.with_name(f"{tmp_path.name}.vbench")
    more = tmp_path / "more"
    more.mkdir()
    with pytest.raises(ConfigError, match=r"need videos named \{prompt\}-\{index\}\.mp4, got none"):
        open_videos(more)
    (more / "a cat-0.mp4").write_bytes(b"other")
    (more / "a cat-1.mp4").write_bytes(b"one")
    both = open_videos(tmp_path, [more])
    assert both.paths["a cat", 0].parent == tmp_path
    assert both.paths["a cat", 1].parent == more
    with pytest.raises(ConfigError, match="need a folder of videos or a run, got nothing"):
        open_videos(tmp_path / "gone")


def test_runs_of_pictures_and_of_other_pipelines_are_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    manifest = (run / "manifest.jsonl").read_text()
    (other / "manifest.jsonl").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"samples/00000000: the manifest lists it, but it is gone"):
        open_videos(other)
    (other / "manifest.jsonl").write_text(manifest.replace('"frames": 9', '"frames": 0'))
    with pytest.raises(ConfigError, match="VBench needs clips of prompts, got pictures"):
        open_videos(other)
    (other / "manifest.jsonl").write_text(manifest)
    (other / "samples").symlink_to(run / "samples")
    record = json.loads((run / "record.json").read_text())
    (other / "record.json").write_text(json.dumps({**record, "recipe": {"components": {}}}))
    with pytest.raises(ConfigError, match="is a run of another pipeline than"):
        open_videos(run, [other])


def test_missing_videos_are_named_before_anything_runs(tmp_path: Path, videos_of: Callable[..., VideoSet]) -> None:
    suite = load_suite(write_suite(tmp_path / "suite.json", dimensions=[FLICKERING, "imaging_quality"]))
    videos = videos_of([(prompt, index) for prompt in PROMPTS for index in range(5)][:-2])
    with pytest.raises(
        ConfigError, match=r"imaging_quality: 2 of 10 videos are missing: 'hamburger moving up-3.mp4',"
    ) as e:
        evaluate_videos(videos, suite, [FLICKERING, "imaging_quality"], environment="isolated")
    assert "temporal_flickering: 42 of 50 videos are missing: 'tiger moving left-5.mp4'" in str(e.value)
    listed = (videos.results / "missing.txt").read_text().splitlines()
    assert len(listed) == 44
    assert "hamburger moving up-24.mp4" in listed
    with pytest.raises(ConfigError, match=r"object_class: 0 of 0 videos"):
        evaluate_videos(videos, suite, ["object_class"])
    (result,) = evaluate_videos(
        videos, suite, [FLICKERING], static_filter="skip", environment="compatible", partial=True
    )
    assert metrics_of([result])[0].name.endswith(", partial, 8 videos")


def test_what_each_static_filter_choice_asks_for() -> None:
    suite = PromptSuite("s", (PromptEntry("p", (FLICKERING,)),), "0")
    wanted = resolve_dimensions([FLICKERING])
    five = [("p", index) for index in range(5)]
    assert len(missing_videos(suite, wanted, five, "run")[FLICKERING]) == 20
    assert missing_videos(suite, wanted, five, "skip") == {}
    assert missing_videos(suite, wanted, five[3:], "done") == {}
    assert len(missing_videos(suite, wanted, [], "done")[FLICKERING]) == 5


def test_any_prompts_are_for_some_dimensions_and_make_no_sums(videos_of: Callable[..., VideoSet]) -> None:
    videos = videos_of([("anything", 0), ("anything", 7), ("else", 0)])
    suite = PromptSuite.of_any_prompts(["anything", "else"])
    with pytest.raises(ConfigError, match="object_class, scene need the prompt suite"):
        evaluate_videos(videos, suite, ["scene", "object_class"])
    (result,) = evaluate_videos(videos, suite, [FLICKERING], static_filter="skip", environment="compatible")
    assert len(result.videos) == 3
    results = [DimensionResult(name, 0.5, {}, "vbench 0.1.5", ("any prompts",)) for name in DIMENSIONS]
    assert len(metrics_of(results)) == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [("[", "not a readable prompt suite"), ("{}", "is a list of entries"), ('[{"prompt_en": "a"}]', "entry 0")],
)
def test_suites_of_another_form_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_suite(tmp_path / "s.json")
    (tmp_path / "s.json").write_text('[{"prompt_en": "a", "dimension": ["colour"]}]')
    with pytest.raises(ConfigError, match="entry 0 is not one of a prompt suite"):
        load_suite(tmp_path / "s.json")


def test_the_published_suite_is_known(tmp_path: Path) -> None:
    if importlib.util.find_spec("vbench") is None:
        pytest.skip("needs pip install --no-deps vbench==0.1.5")
    suite = load_suite(find_suite())
    assert suite.is_published
    counts = {name: len({entry.prompt for entry in suite.of(name)}) for name in DIMENSIONS}
    assert (counts[FLICKERING], counts["human_action"], counts["scene"], counts["subject_consistency"]) == (
        75,
        100,
        86,
        72,
    )
    assert all(video_name(entry.prompt, 24) for entry in suite.entries)


# --- kept results -------------------------------------------------------------------------------------------------


def test_results_are_kept_until_something_changes(
    tmp_path: Path, videos_of: Callable[..., VideoSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load_suite(write_suite(tmp_path / "suite.json"))
    videos = videos_of([(prompt, index) for prompt in PROMPTS for index in range(5)])
    calls: list[int] = []
    monkeypatch.setattr(runner, "flickering_score", lambda clip: calls.append(1) or flickering_score(clip))

    def evaluate(**options: Any) -> DimensionResult:
        fresh = VideoSet(videos.folder, videos.results, videos.paths, None)
        options = {"static_filter": "skip", "environment": "compatible", **options}
        return evaluate_videos(fresh, suite, [FLICKERING], **options)[0]

    first = evaluate()
    assert evaluate() == first
    assert len(calls) == 10
    Image.fromarray(np.zeros((10, 14, 3), np.uint8)).save(videos.paths[PROMPTS[0], 0] / "0001.png")
    second = evaluate()
    assert len(calls) == 20
    assert [name for name in first.videos if first.videos[name] != second.videos[name]] == [f"{PROMPTS[0]}-0"]
    evaluate(static_filter="done")
    assert len(calls) == 30
    (videos.results / f"{FLICKERING}.json").write_text('{"result_version": 1')  # a disk that was full
    assert evaluate().videos == second.videos
    assert len(calls) == 40


# --- sums ---------------------------------------------------------------------------------------------------------


def test_sums_are_the_published_ones() -> None:
    scores = dict.fromkeys(DIMENSIONS, 0.5)
    quality = [
        (0.5 - 0.1462) / 0.8538,
        (0.5 - 0.2615) / 0.7385,
        (0.5 - 0.6293) / 0.3707,
        (0.5 - 0.706) / 0.2915,
        0.5 * 0.5,
        0.5,
        0.5,
    ]
    semantic = [0.5] * 5 + [0.5 / 0.8222, (0.5 - 0.0009) / 0.2846, 0.5 / 0.364, 0.5 / 0.364]
    found = aggregate(scores)
    assert found["quality"] == pytest.approx(sum(quality) / 6.5, abs=1e-12)
    assert found["semantic"] == pytest.approx(sum(semantic) / 9, abs=1e-12)
    assert found["total"] == pytest.approx((4 * found["quality"] + found["semantic"]) / 5, abs=1e-12)
    assert aggregate({name: dimension.high for name, dimension in DIMENSIONS.items()}) == pytest.approx(
        {"quality": 1, "semantic": 1, "total": 1}
    )
    # Checked by hand: each dimension moves its sum by weight / range / (sum of weights).
    moved = aggregate({**scores, "dynamic_degree": 0.6})["quality"] - found["quality"]
    assert moved == pytest.approx(0.1 * 0.5 / 6.5)


def test_a_sum_that_lacks_a_dimension_is_left_out() -> None:
    scores = dict.fromkeys(DIMENSIONS, 0.9)
    del scores["scene"]
    assert set(aggregate(scores)) == {"quality"}
    del scores["color"], scores[FLICKERING]
    assert aggregate(scores) == {}


def test_a_compatible_part_names_the_whole_sum_so() -> None:
    results = [DimensionResult(name, 0.9, {"a-0": 0.9}, "vbench 0.1.5") for name in DIMENSIONS]
    assert [metric.name for metric in metrics_of(results)][16:] == [
        "VBench quality score",
        "VBench semantic score",
        "VBench total score",
    ]
    results[2] = DimensionResult(FLICKERING, 0.9, {"a-0": 0.9}, COMPATIBLE, ("no static filter",))
    assert [metric.name for metric in metrics_of(results)][16:] == [
        "vbench-compatible quality score, no static filter",
        "VBench semantic score",
        "vbench-compatible total score, no static filter",
    ]
    assert metrics_of(results)[2].name == "vbench-compatible temporal_flickering, no static filter"


def test_intervals_are_over_prompts_and_only_of_means() -> None:
    values = {f"{prompt}-{index}": level for prompt, level in (("a", 80.0), ("b", 40.0)) for index in range(5)}
    (imaging,) = metrics_of([DimensionResult("imaging_quality", 0.6, values, "vbench 0.1.5")])
    assert (imaging.low, imaging.high) == (pytest.approx(0.4), pytest.approx(0.8))
    (other,) = metrics_of([DimensionResult("color", 60.1, values, "vbench 0.1.5")])
    assert other.low is None


def test_dimensions_are_resolved_by_name_and_group() -> None:
    assert [len(resolve_dimensions([name])) for name in ("quality", "semantic", "all")] == [7, 9, 16]
    assert [d.name for d in resolve_dimensions(["color", "scene", "color"])] == ["color", "scene"]
    with pytest.raises(ConfigError, match="no dimension 'colour': did you mean 'color'"):
        resolve_dimensions(["colour"])


# --- weights ------------------------------------------------------------------------------------------------------


def test_missing_weights_say_where_from_and_where_to(
    tmp_path: Path, videos_of: Callable[..., VideoSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    suite = load_suite(write_suite(tmp_path / "suite.json"))
    videos = videos_of([(prompt, index) for prompt in PROMPTS for index in range(25)])
    with pytest.raises(ConfigError) as caught:
        evaluate_videos(videos, suite, [FLICKERING], weights=tmp_path / "w")
    place = tmp_path / "w" / "raft_model" / "models" / "raft-things.pth"
    message = str(caught.value)
    assert "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip: unpack, and place" in message
    assert f"models/raft-things.pth as {place} (not downloaded: HF_HUB_OFFLINE is set)" in message
    assert "--static-filter skip goes without" in message
    with pytest.raises(ConfigError, match=r"(?s)2 weight files are missing.*ViT-L-14\.pt.*sa_0_4_vit_l_14_linear"):
        weights.ensure_weights(["clip-l14", "aesthetic"], tmp_path / "w", download=False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(ConfigError, match="hf download bert-base-uncased"):
        weights.ensure_weights(["bert"], tmp_path / "w")


def test_every_dimension_s_weights_are_in_the_table() -> None:
    assert {key for dimension in DIMENSIONS.values() for key in dimension.weights} == set(weights.WEIGHTS)


def test_downloads_appear_whole_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.pth").write_bytes(b"weights")
    with zipfile.ZipFile(source / "all.zip", "w") as archive:
        archive.writestr("models/two.pth", b"second")
        archive.writestr("code-main/hubconf.py", b"hub = 1")
        archive.writestr("code-main/inner/net.py", b"net = 1")
        archive.writestr("code-main/../outside.py", b"evil = 1")
    one, archive_url = (source / "one.pth").as_uri(), (source / "all.zip").as_uri()
    digest = "9a129016a1c3"
    files = {
        "one": weights.WeightFile("a/one.pth", one),
        "two": weights.WeightFile("b/two.pth", archive_url, member="models/two.pth"),
        "code": weights.WeightFile("c/code/hubconf.py", archive_url, member="code-main/"),
        "changed": weights.WeightFile("d/one.pth", one, sha256=digest),
        "gone": weights.WeightFile("e/no.pth", (source / "no.pth").as_uri()),
        "hollow": weights.WeightFile("f/no.pth", archive_url, member="no.pth"),
    }
    folder = tmp_path / "w"
    weights.ensure_weights(["one", "two", "code"], folder, files=files)
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == ["a/one.pth", "b/two.pth", "c/code/hubconf.py", "c/code/inner/net.py"]
    assert (folder / "b" / "two.pth").read_bytes() == b"second"
    with pytest.raises(ConfigError, match="3 weight files are missing") as caught:
        weights.ensure_weights(files, folder, files=files)
    assert f"place it as {folder / 'd' / 'one.pth'} (ValueError: what came has another SHA-256" in str(caught.value)
    assert "the archive has no no.pth" in str(caught.value)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == found
    monkeypatch.setattr(weights, "urllib", pytest.fail)
    weights.ensure_weights(["one", "two", "code"], folder, files=files)  # nothing is fetched twice


def test_bad_arguments_are_refused(tmp_path: Path, videos_of: Callable[..., VideoSet]) -> None:
    suite = load_suite(write_suite(tmp_path / "suite.json", dimensions=["dynamic_degree", FLICKERING]))
    videos = videos_of([(prompt, index) for prompt in PROMPTS for index in range(5)])
    with pytest.raises(ConfigError, match="environment is one of auto, here, isolated, compatible"):
        evaluate_videos(videos, suite, [FLICKERING], environment="docker")
    with pytest.raises(ConfigError, match="only temporal_flickering has a compatible form, got dynamic_degree"):
        evaluate_videos(videos, suite, ["dynamic_degree"], environment="compatible")
    with pytest.raises(ConfigError, match="dynamic_degree depends on the frames per second"):
        evaluate_videos(videos, suite, ["dynamic_degree"])


def test_an_environment_of_other_means_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(os.path.realpath("/bin/sh"))
    assert IsolatedEnvironment(tmp_path).ensure() == tmp_path / "bin" / "python"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ConfigError, match="is not empty and holds no Python"):
        IsolatedEnvironment(tmp_path / "other").ensure()
    assert (tmp_path / "other" / "thesis.txt").exists()
