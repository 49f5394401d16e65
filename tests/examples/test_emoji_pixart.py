"""The reference model of `examples/reference_models/emoji_pixart`: it loads, draws and is named by its classifier."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline
from PIL import Image

FOLDER = Path(__file__).parents[2] / "examples" / "reference_models" / "emoji_pixart"
MIB = 2**20
# The glyphs of example_glyphs.png, from left to right.
EXAMPLE_GLYPHS = ["heavy black heart", "teddy bear", "christmas tree", "rabbit", "police car", "green book"]
PROMPTS = ["red heart", "teddy bear", "christmas tree", "police car"]


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"emoji_pixart_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipe() -> PixArtAlphaPipeline:
    pipe = DiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def classifier():
    return _module("classifier").load_classifier(FOLDER)


def test_folder_weights_fit_in_twelve_mib():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if "__pycache__" not in file.parts) <= 12 * MIB


def test_from_pretrained_without_dtype_loads_every_component_in_fp32(pipe):
    assert type(pipe) is PixArtAlphaPipeline
    assert {pipe.text_encoder.dtype, pipe.transformer.dtype, pipe.vae.dtype} == {torch.float32}


def test_block_linears_hold_whole_groups_of_128(pipe):
    linears = [m for m in pipe.transformer.transformer_blocks.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 4 * 10
    assert all(linear.in_features % 128 == 0 for linear in linears)


def test_tokenizer_reads_every_caption_word_by_word(pipe):
    captions = (FOLDER / "prompts.txt").read_text().splitlines()
    ids = pipe.tokenizer(captions).input_ids
    assert len(captions) == len(set(captions)) == 1386
    assert [len(row) for row in ids] == [len(caption.split()) + 1 for caption in captions]
    assert all(pipe.tokenizer.unk_token_id not in row for row in ids)


def test_classifier_names_real_glyphs(classifier):
    row = Image.open(FOLDER / "example_glyphs.png").convert("RGB")
    glyphs = [row.crop((64 * i, 0, 64 * i + 64, 64)) for i in range(len(EXAMPLE_GLYPHS))]
    assert [names[0] for names in classifier.names(glyphs)] == EXAMPLE_GLYPHS
    assert classifier.classify(glyphs).shape == (len(EXAMPLE_GLYPHS), 1386)


def test_glyph_boxes_finds_the_ink():
    picture = torch.ones(2, 3, 64, 64)
    picture[0, 1, 10:20, 30:50] = 0.5
    assert _module("classifier").glyph_boxes(picture).tolist() == [[30, 10, 50, 20], [0, 0, 0, 0]]


def test_pipeline_draws_what_the_prompt_names(pipe, classifier):
    pictures = pipe(
        PROMPTS,
        num_inference_steps=8,
        guidance_scale=2.0,
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert [picture.size for picture in pictures] == [(64, 64)] * len(PROMPTS)
    # "red heart" is the alias of the Unicode name.
    assert classifier.accuracy(pictures, ["heavy black heart", *PROMPTS[1:]], k=5) == 1.0
