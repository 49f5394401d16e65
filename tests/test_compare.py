"""`compare` on tiny pipelines: values against plain calls, pages, paths, clips, and that nothing is changed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import diffuse_compress as dc
import tiny
from diffuse_compress.evaluation.metrics import psnr

PROMPTS = ["a red cat", "the blue moon", "a small house"]
OPTIONS = {"num_inference_steps": 3, "guidance_scale": 2.0, "use_resolution_binning": False, "clean_caption": False}


@pytest.fixture(scope="module")
def dense() -> Any:
    return tiny.build_pipeline("pixart")


@pytest.fixture(scope="module")
def small() -> Any:
    return tiny.build_pipeline("pixart").compress("w4a8", measure=False)


def test_compare_measures_what_plain_calls_show(dense: Any, small: Any, tmp_path: Path, untouched_rng: None) -> None:
    out = tmp_path / "page.html"
    scheduler = dense.scheduler
    found = dc.compare(dense, small, PROMPTS, seeds=[5, 9], out=out, names=("dense", "w4a8"), **OPTIONS)
    assert dense.scheduler is scheduler
    assert "step" not in vars(scheduler)

    pictures = []
    steps: list[list[torch.Tensor]] = [[], []]
    for side, pipe in enumerate((dense, small)):
        generator = torch.Generator().manual_seed(9)
        call = {
            "generator": generator,
            "output_type": "pt",
            "callback": lambda i, t, x, s=side: steps[s].append(x.clone()),
        }
        pictures.append(pipe(PROMPTS[1], **call, **OPTIONS).images)
    expected = float(psnr(*pictures))
    assert found.per_sample["PSNR"].shape == (3, 2)
    assert found.per_sample["PSNR"][1, 1].item() == pytest.approx(expected, abs=0.05)
    errors = [float((x - y).norm() / x.norm()) for x, y in zip(*steps, strict=True)]
    assert found.per_sample["Latent error"][1, 1].item() == pytest.approx(errors[-1], rel=0.02)
    assert len(found.latent_error) == 3
    assert all(0 < error.low < error.value < error.high < 0.2 for error in found.latent_error)
    assert found.latent_error[-1].value == found["Latent error"].value

    metric = found["PSNR"]
    assert metric.value == pytest.approx(float(found.per_sample["PSNR"].mean()))
    assert metric.low is not None
    assert metric.low < metric.value < (metric.high or math.inf)
    assert metric.count == 6
    text = str(found)
    assert "w4a8 against dense" in text
    assert "LPIPS: not measured: needs pip install lpips" in text or "LPIPS: " in text
    assert "CLIP-I: not measured" in text
    with pytest.raises(KeyError, match=r"CLIP-I: .*no CLIP model"):
        found["CLIP-I"]
    page = out.read_text()
    assert page.count("<img") == 12
    assert page.count("data:image/png;base64") == 12
    assert "the blue moon, seed 9" in page
    assert "not measured" in page


def test_compare_of_a_pipeline_with_its_copy_is_exact(dense: Any, small: Any) -> None:
    found = dc.compare(dense, tiny.build_pipeline("pixart"), PROMPTS[0], seeds=[0], out=None, **OPTIONS)
    assert found["PSNR"].value == 100
    assert found["SSIM"].value == pytest.approx(1)
    assert [error.value for error in found.latent_error] == [0.0, 0.0, 0.0]
    assert found["PSNR"].low is None  # one sample has no interval
    assert found.out is None
    worse = dc.compare(dense, small, PROMPTS, seeds=[0], out=None, batch_size=1, **OPTIONS)
    assert worse["PSNR"].value < 60


def test_compare_loads_paths_in_turn(dense: Any, tmp_path: Path) -> None:
    dense.save_pretrained(tmp_path / "dense")
    other = tiny.build_pipeline("pixart", seed=1)
    other.save_pretrained(tmp_path / "other")
    options = {"out": tmp_path / "c.html", "device": "cpu", **OPTIONS}
    found = dc.compare(tmp_path / "dense", str(tmp_path / "other"), PROMPTS[:2], range(2), **options)
    assert found.names == ("dense", "other")
    assert found["PSNR"].value < 40
    same = dc.compare(dense, tmp_path / "dense", PROMPTS[:2], range(2), **{**options, "out": None})
    assert same["PSNR"].value == 100


def test_compare_of_clips_has_flicker_and_animations(tmp_path: Path) -> None:
    a, b = (tiny.build_pipeline("wan", seed=seed) for seed in (0, 1))
    own = {"num_inference_steps": 1, "height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0}
    found = dc.compare(a, b, PROMPTS[:1], seeds=[0, 1], out=tmp_path / "clips.html", **own)
    clips = [
        pipe(PROMPTS[0], generator=torch.Generator().manual_seed(1), output_type="pt", **own).frames[0]
        for pipe in (a, b)
    ]
    moved = [255 * float((clip[1:] - clip[:-1]).abs().mean()) for clip in clips]
    assert found.per_sample["Flicker change"][0, 1].item() == pytest.approx(moved[1] - moved[0], abs=0.05)
    assert (tmp_path / "clips.html").read_text().count("<img") == 4


def test_compare_refuses_what_makes_no_comparison(dense: Any, small: Any, tmp_path: Path) -> None:
    for arguments, message in (
        ({"a": dense, "b": dense, "prompts": "x"}, "got one pipeline twice"),
        ({"a": dense, "b": small, "prompts": []}, "got 0 prompts"),
        ({"a": dense, "b": small, "prompts": "x", "seeds": []}, "0 seeds"),
        ({"a": dense, "b": small, "prompts": "x", "generator": None}, "needs no generator"),
        ({"a": dense, "b": small, "prompts": "x", "out": "page.pdf"}, r"out must end with \.html"),
        ({"a": dense, "b": small.transformer, "prompts": "x", "out": None, **OPTIONS}, "got PixArtTransformer2DModel"),
    ):
        with pytest.raises(dc.ConfigError, match=message):
            dc.compare(**arguments)
    wide = tiny.build_pipeline("wan")
    with pytest.raises(dc.ConfigError, match="cannot be asked for classes"):
        dc.compare(wide, small, [3], out=None, num_inference_steps=1)


def test_compare_of_unconditional_and_class_pipelines(tmp_path: Path) -> None:
    models = Path(__file__).resolve().parents[1] / "examples" / "reference_models"
    for name, asked, text in (("emoji_ddim", None, ">seed 7<"), ("emoji_dit", [3], "class 3, seed 7")):
        dense, small = (DiffusionPipeline.from_pretrained(models / name) for _ in range(2))
        small.compress("w8a8", measure=False)
        out = tmp_path / f"{name}.html"
        found = dc.compare(dense, small, asked, seeds=[7, 8], out=out, num_inference_steps=2)
        assert 15 < found["PSNR"].value < 100
        assert len(found.latent_error) == 2
        assert text in out.read_text()
