"""The reference model of `examples/reference_models/emoji_wan`: it loads, and draws what the prompt asks for."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

FOLDER = Path(__file__).parents[2] / "examples" / "reference_models" / "emoji_wan"
MIB = 2**20
# One of each motion.
PROMPTS = [
    "tiger moving left",
    "automobile moving right",
    "hamburger moving up",
    "pig nose moving down",
    "neutral face growing",
    "tropical drink shrinking",
]


@pytest.fixture(scope="module")
def score() -> Iterator[ModuleType]:
    """The score script, with what it imports from its own folder and from its neighbours."""
    before = list(sys.path), set(sys.modules)
    spec = importlib.util.spec_from_file_location("emoji_wan_score", FOLDER / "score.py")
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before[0]
    # Other models' folders have modules of the same names.
    for name in set(sys.modules) - before[1]:
        if str(FOLDER.parent) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = DiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_folder_fits_in_six_mib():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if "__pycache__" not in file.parts) <= 6 * MIB


def test_from_pretrained_without_dtype_loads_every_component_in_fp32(pipe):
    assert type(pipe) is WanPipeline
    assert {pipe.text_encoder.dtype, pipe.transformer.dtype, pipe.vae.dtype} == {torch.float32}


def test_block_linears_hold_whole_groups_of_128(pipe):
    linears = [m for m in pipe.transformer.blocks.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 6 * 10
    assert all(linear.in_features % 128 == 0 for linear in linears)


def test_tokenizer_reads_every_caption_word_by_word(pipe, score):
    names = (FOLDER / "emoji.txt").read_text().splitlines()
    prompts = (FOLDER / "eval_prompts.txt").read_text().splitlines()
    assert len(names) == len(prompts) == 256
    assert sorted(score.split_caption(prompt)[0] for prompt in prompts) == sorted(names)
    ids = pipe.tokenizer(prompts).input_ids
    assert [len(row) for row in ids] == [len(prompt.split()) + 1 for prompt in prompts]
    assert max(map(len, ids)) <= score.DEFAULTS["max_sequence_length"]
    assert all(pipe.tokenizer.unk_token_id not in row for row in ids)


def test_find_motions_tells_a_moving_square(score):
    clips = torch.ones(4, 9, 3, 64, 64)
    for frame in range(9):
        clips[0, frame, :, 20:40, 4 + 2 * frame : 24 + 2 * frame] = 0
        clips[1, frame, :, 30 - 2 * frame : 50 - 2 * frame, 20:40] = 0
        clips[2, frame, :, 28 - frame : 36 + frame, 28 - frame : 36 + frame] = 0
        clips[3, frame, :, 20 + frame : 44 - frame, 20 + frame : 44 - frame] = 0
    assert score.find_motions(clips) == ["moving right", "moving up", "growing", "shrinking"]


def test_pipeline_draws_the_emoji_and_the_motion_of_the_prompt(pipe, score):
    clips = score.generate(pipe, PROMPTS, num_inference_steps=10)
    assert clips.shape == (len(PROMPTS), 9, 3, 64, 64)
    classifier = sys.modules["emoji_pixart.classifier"].load_classifier(FOLDER.parent / "emoji_pixart")
    verdict = score.judge(classifier, clips, PROMPTS)
    assert verdict.motion == 1.0
    # By chance 0.0007 and 0.004.
    assert verdict.top1 >= 0.7
    assert verdict.top5 >= 0.9


def test_saved_again_the_pipeline_draws_the_same(pipe, score, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    clips = [score.generate(p, PROMPTS[:1], num_inference_steps=2) for p in (pipe, again)]
    assert torch.equal(*clips)
