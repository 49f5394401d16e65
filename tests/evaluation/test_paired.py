"""Paired metrics of two runs, from their files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffuse_compress.cli import main
from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.metrics import psnr, ssim
from diffuse_compress.evaluation.paired import paired_interval, paired_metric, paired_values, score_pairs
from diffuse_compress.evaluation.samples import MANIFEST, Sample, open_pictures, read_picture, sample_hash


def make_run(folder: Path, prompts: list[str | None], noise: float, *, frames: int = 0, base: int = 0) -> Path:
    """A run whose samples are ramps with noise: the same ramps in every run."""
    generator = np.random.default_rng(int(noise * 100) + 1)
    (folder / "samples").mkdir(parents=True)
    lines = []
    for i, prompt in enumerate(prompts):
        ramp = np.random.default_rng(i).random((20, 16, 3)) * 200 + 20
        file = folder / "samples" / (f"{i:03d}" if frames else f"{i:03d}.png")
        targets = [file / f"{k:04d}.png" for k in range(frames)] if frames else [file]
        for k, target in enumerate(targets):
            target.parent.mkdir(exist_ok=True)
            values = ramp + k * 3 + generator.normal(0, noise + 1e-9, ramp.shape)
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(target)
        name = file.relative_to(folder).as_posix()
        lines.append(Sample(i, name, base + i, prompt, None, sample_hash(file), frames).to_json())
    (folder / MANIFEST).write_text("\n".join(lines) + "\n")
    return folder


class Dull:
    def __init__(self) -> None:
        self.captions = ["cat", "dog"]

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.ones(len(images)), torch.zeros(len(images))], dim=1)


def test_intervals_are_over_prompts_in_whatever_order_they_come(tmp_path: Path) -> None:
    """``--classes 0-9 --count 50`` goes through the classes five times."""
    one, two = (
        open_pictures(make_run(tmp_path / n, ["a", "b", "a", "b", "a", "b"], e)) for n, e in (("x", 0), ("y", 9))
    )
    (found, *_), _ = score_pairs(one, two)
    x, y = (torch.stack([read_picture(path) for path in side.files]) / 255 for side in (one, two))
    values = psnr(x, y)
    by_prompt = paired_interval(torch.stack([values[::2], values[1::2]]))
    assert (found.low, found.high) == pytest.approx((by_prompt.low, by_prompt.high), abs=1e-4)
    # Prompts of unequal numbers of samples: the samples are the units.
    one, two = (open_pictures(make_run(tmp_path / n, ["a", "b", "a", "c"], e)) for n, e in (("u", 0), ("v", 9)))
    assert score_pairs(one, two)[0][0].count == 4


def test_score_pairs_are_the_metrics_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffuse_compress.evaluation.paired._PAIRS_AT_A_TIME", 3)
    prompts = ["cat", "cat", "dog", "dog"]
    one, two = (open_pictures(make_run(tmp_path / n, prompts, noise)) for n, noise in (("dense", 0), ("w4a8", 4)))
    metrics, absent = score_pairs(one, two, classifier=Dull())
    found = {metric.name: metric for metric in metrics}
    x, y = (torch.stack([read_picture(path) for path in side.files]) / 255 for side in (one, two))
    assert found["PSNR"].value == pytest.approx(float(psnr(x, y).mean()), abs=1e-4)
    assert found["SSIM"].value == pytest.approx(float(ssim(x, y).mean()), abs=1e-6)
    assert found["PSNR"].reference == {"name": "dense", "count": 4}
    assert (found["Same name"].value, found["Right name"].value, found["Right name, change"].value) == (100, 50, 0)
    assert set(absent) == {"LPIPS", "CLIP-I"} or "CLIP-I" in absent
    same, _ = score_pairs(one, one)
    assert same[0].value == 100

    with pytest.raises(ConfigError, match="need two runs of the same prompts and seeds, but their seeds"):
        score_pairs(one, open_pictures(make_run(tmp_path / "other", prompts, 1, base=9)))
    with pytest.raises(ConfigError, match="but sample 0 is 'cat' in dense and 'fox' in foxes"):
        score_pairs(one, open_pictures(make_run(tmp_path / "foxes", ["fox", *prompts[1:]], 1)))


def test_score_pairs_of_clips_have_flicker(tmp_path: Path) -> None:
    one, two = (
        open_pictures(make_run(tmp_path / n, [None] * 3, noise, frames=4)) for n, noise in (("dense", 0), ("w4a8", 6))
    )
    metrics, _ = score_pairs(one, two)
    found = {metric.name: metric for metric in metrics}
    assert found["Flicker change"].value > 2  # noise of 6 in each frame; the ramps themselves move by 3
    assert found["Flicker change"].count == 3


def test_intervals_are_over_prompts_and_seeds_are_averaged_first() -> None:
    values = torch.tensor([[0.0, 10.0], [0.0, 10.0], [0.0, 10.0]], dtype=torch.float64)
    metric = paired_metric("PSNR", values, "dense")
    assert (metric.value, metric.low, metric.high, metric.count) == (5.0, 5.0, 5.0, 6)
    seeds = paired_metric("PSNR", values[:1], "dense")
    assert seeds.low is not None
    assert seeds.low < 5
    assert paired_metric("PSNR", values[:1, :1], "dense").low is None


def test_pictures_too_small_for_ssim_say_so() -> None:
    values, absent = paired_values(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8))
    assert "SSIM" in absent
    assert values["PSNR"].tolist() == [0, 0]


def test_command_puts_pairs_into_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (make_run(tmp_path / n, ["cat", "dog"], noise) for n, noise in (("dense", 0), ("w4a8", 4)))
    assert main(["eval", "paired", str(one), str(two), "--out", str(tmp_path / "records"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["w4a8"] == json.loads((tmp_path / "records" / "w4a8.json").read_text())
    assert main(["eval", "paired", str(one), str(two)]) == 0
    assert "CLIP-I: not measured" in capsys.readouterr().out
