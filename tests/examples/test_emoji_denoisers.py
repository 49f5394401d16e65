"""The UNet, Stable Diffusion and DiT shaped reference models load as stock pipelines, fit their size and draw emoji."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

MODELS = Path(__file__).parents[2] / "examples" / "reference_models"


@pytest.mark.parametrize(
    ("name", "kind", "limit"),
    [("emoji_ddim", "DDIMPipeline", 3), ("emoji_sd", "StableDiffusionPipeline", 5), ("emoji_dit", "DiTPipeline", 5)],
)
def test_loads_as_a_stock_pipeline_within_its_size(name, kind, limit):
    pipe = DiffusionPipeline.from_pretrained(MODELS / name)
    assert type(pipe).__name__ == kind
    files = [path for path in (MODELS / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    own = sum(path.stat().st_size for path in files if "vae" not in path.relative_to(MODELS / name).parts)
    assert own < limit * 2**20


def classifier():
    sys.path.insert(0, str(MODELS / "emoji_pixart"))
    try:
        from classifier import load_classifier
    finally:
        sys.path.pop(0)
    return load_classifier(MODELS / "emoji_pixart")


def test_dit_draws_the_class_that_was_asked_for():
    pipe = DiffusionPipeline.from_pretrained(MODELS / "emoji_dit")
    pipe.set_progress_bar_config(disable=True)
    names = ["rabbit", "police car", "teddy bear", "green book"]
    generators = [torch.Generator().manual_seed(index) for index in range(len(names))]
    labels = pipe.get_label_ids(names)
    pictures = pipe(
        class_labels=labels, num_inference_steps=20, guidance_scale=2.0, generator=generators, output_type="np"
    ).images
    assert classifier().accuracy(pictures, names) >= 0.75


def test_stable_diffusion_draws_what_was_asked_for():
    pipe = DiffusionPipeline.from_pretrained(MODELS / "emoji_sd")
    pipe.set_progress_bar_config(disable=True)
    names = ["rabbit", "police car", "christmas tree", "teddy bear"]
    generators = [torch.Generator().manual_seed(index) for index in range(len(names))]
    pictures = pipe(
        names, num_inference_steps=20, guidance_scale=3.0, height=64, width=64, generator=generators, output_type="np"
    ).images
    assert classifier().accuracy(pictures, names) >= 0.75


def test_ddim_draws_faces_that_the_classifier_names():
    pipe = DiffusionPipeline.from_pretrained(MODELS / "emoji_ddim")
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(index) for index in range(16)]
    pictures = pipe(batch_size=16, num_inference_steps=10, generator=generators, output_type="pt").images
    judge = classifier()
    enlarged = torch.nn.functional.interpolate(pictures, scale_factor=2, mode="bicubic").clamp(0, 1)
    confidence, best = judge.classify(enlarged).softmax(1).max(1)
    faces = set((MODELS / "emoji_ddim" / "faces.txt").read_text().splitlines())
    named = [sure >= 0.5 and judge.captions[row] in faces for sure, row in zip(confidence, best, strict=True)]
    # Noise scores 0 of 512.
    assert sum(named) >= 8


@pytest.mark.parametrize(
    ("name", "denoiser", "marker", "in_features"),
    [
        ("emoji_ddim", "unet", ".attentions.", {64}),
        ("emoji_sd", "unet", ".attentions.", {64, 96, 128, 256, 384}),
        ("emoji_dit", "transformer", "transformer_blocks.", {128, 256, 512}),
    ],
)
def test_block_linears_are_as_wide_as_the_card_says(name, denoiser, marker, in_features):
    model = getattr(DiffusionPipeline.from_pretrained(MODELS / name), denoiser)
    blocks = [m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and marker in path]
    assert {linear.in_features for linear in blocks} == in_features


@pytest.mark.skipif(os.name == "nt", reason="symbolic links")
def test_the_autoencoder_is_shared():
    for name in ("emoji_sd", "emoji_dit"):
        assert (MODELS / name / "vae").is_symlink()
        assert (MODELS / name / "vae").resolve() == (MODELS / "emoji_pixart" / "vae").resolve()
