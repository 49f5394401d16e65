"""Evaluation records in model cards: what the Hub reads of them, whose they are, and when they go."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import diffuse_compress as dc
import tiny
from diffuse_compress.card_results import SOURCE
from diffuse_compress.cli import main
from diffuse_compress.companions import complete_upload
from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.evaluation.records import Metric, Record
from diffuse_compress.model_card import model_card
from diffuse_compress.recipe import as_recipe

PSNR = Metric("PSNR", 31.25, 30.5, 32.0, 64, "whole picture", True, unit="dB", reference={"name": "dense", "count": 64})


def record(*methods: Any, metrics: tuple[Metric, ...] = (PSNR,), **more: Any) -> Record:
    fields: dict[str, Any] = {
        "model": {"id": "pixart", "class": "PixArtAlphaPipeline", "revision": "abc"},
        "recipe": as_recipe(*methods).to_dict() if methods else None,
        "device": {"type": "cuda", "name": "NVIDIA H100"},
        "versions": {"torch": "2.13.0"},
        "date": "2026-11-26",
        "command": "diffuse-compress eval generate /home/me/secret",
        "data": {"kind": "prompts", "name": "general.txt", "sha256": "00"},
        "seeds": {"base": 0, "rule": "sample i: seed + i"},
        "samples": 64,
        "settings": {},
    }
    return Record("w4a8", **{**fields, **more}, metrics=metrics)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.build_pipeline("pixart").compress("w4a8", measure=False)


@pytest.fixture(autouse=True)
def _nothing_attached(pipe: Any) -> None:
    pipe.transformer.hf_quantizer.state.results = ()


def results_of(text: str) -> list[EvalResult]:
    return ModelCard(text).data.eval_results or []


def test_results_are_in_the_metadata_and_in_the_text(pipe: Any, tmp_path: Path) -> None:
    lpips = Metric("LPIPS", 0.125, None, None, 64, "lpips, AlexNet", False)
    record("w4a8", metrics=(PSNR, lpips)).save(tmp_path / "run" / "record.json")
    assert dc.attach_results(pipe, tmp_path / "run") is pipe
    pipe.save_pretrained(tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    first, second = results_of(text)
    assert (first.task_type, first.metric_type, first.metric_value) == ("text-to-image", "psnr", 31.25)
    assert first.metric_args["device"] == "NVIDIA H100"
    assert first.metric_args["date"] == "2026-11-26"
    assert first.metric_args["interval_95"] == [30.5, 32.0]
    assert (first.source_url, first.verified) == (SOURCE, None)
    assert second.metric_value == 0.125
    row = "| PSNR (w4a8) | 31.25 dB | 30.5 to 32 | 64 | whole picture, against dense | general.txt, 64 samples |"
    assert f"{row} NVIDIA H100 | 2026-11-26 |" in text
    assert "| LPIPS (w4a8) | 0.125 | – | 64 |" in text
    assert "secret" not in text
    assert model_card(pipe, existing=text) == text
    # What a reader of the Hub makes of it, and the form that huggingface_hub itself would write.
    data = ModelCard(text).data
    again = ModelCardData(model_name=data.model_name, eval_results=data.eval_results)
    assert again.to_dict()["model-index"] == data.to_dict()["model-index"]


def test_results_stay_with_the_compression_and_go_with_it(pipe: Any, tmp_path: Path) -> None:
    dc.attach_results(pipe, record("w4a8"))
    text = model_card(pipe)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    kept = model_card(again, existing=text)
    assert [result.metric_value for result in results_of(kept)] == [31.25]
    assert "## Evaluation" in kept
    newer = record("w4a8", metrics=(dataclasses.replace(PSNR, value=33.0),))
    dc.attach_results(again, [newer])
    assert [result.metric_value for result in results_of(model_card(again, existing=text))] == [33.0]

    other = tiny.build_pipeline("pixart").compress("w8a8", measure=False)
    changed = model_card(other, existing=text)
    assert results_of(changed) == []
    assert "## Evaluation" not in changed
    assert "model_name" not in changed
    (tmp_path / "README.md").write_text(text)
    complete_upload(tiny.build("pixart"), tmp_path, "me/model", subfolder="", token=None)
    assert "model-index" not in (tmp_path / "README.md").read_text()


def test_results_of_the_owner_stay(pipe: Any) -> None:
    own = EvalResult("text-to-image", "coco", "COCO", "fid", 12.5)
    card = ModelCard.from_template(
        ModelCardData(model_name="mine", eval_results=[own]), template_str="---\n{{ card_data }}\n---\nWords.\n"
    )
    dc.attach_results(pipe, record("w4a8"))
    text = model_card(pipe, existing=str(card))
    assert [result.metric_value for result in results_of(text)] == [12.5, 31.25]
    assert ModelCard(text).data.model_name == "mine"
    pipe.transformer.hf_quantizer.state.results = ()
    other = tiny.build_pipeline("pixart").compress("w8a8", measure=False)
    assert [result.metric_value for result in results_of(model_card(other, existing=text))] == [12.5]


def test_recipes_are_compared_as_asked(pipe: Any) -> None:
    for recipe in (as_recipe({"transformer": "w4a8"}), pipe.compression_recipe()):
        dc.attach_results(pipe, record(recipe))
    model = tiny.build("pixart").compress("w4a8", measure=False)
    dc.attach_results(model, record("w4a8"))
    assert results_of(model_card(model))
    for wrong, named in (
        (record("w8a8"), "is of transformer: w8a8, and this PixArtAlphaPipeline of transformer: w4a8"),
        (record(), "is of the dense model"),
        (record({"transformer": "w4a8", "text_encoder": "w8a16"}), "transformer: w4a8, text_encoder: w8a16"),
        (record(as_recipe("w4a8", modules_to_not_convert="*attn2*")), "Scores of another recipe say nothing"),
        (record("w4a8", metrics=()), "has no scores. Run eval paired"),
    ):
        with pytest.raises(ConfigError, match=named):
            dc.attach_results(pipe, wrong)
    assert pipe.transformer.hf_quantizer.state.results != ()
    with pytest.raises(ConfigError, match="is not compressed"):
        dc.attach_results(tiny.build_pipeline("pixart"), record("w4a8"))
    with pytest.raises(CheckpointError, match="not a readable record"):
        dc.attach_results(pipe, "no-such-run")


def test_records_of_another_model_are_refused(pipe: Any) -> None:
    state = pipe.transformer.hf_quantizer.state
    state.base_model = "acme/pixart"
    try:
        dc.attach_results(pipe, record("w4a8", model={"id": "acme/pixart", "class": None}))
        with pytest.raises(ConfigError, match="is of other/model, and this PixArtAlphaPipeline of acme/pixart"):
            dc.attach_results(pipe, record("w4a8", model={"id": "other/model", "class": None}))
    finally:
        state.base_model = None


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.build_pipeline("pixart").save_pretrained(tmp_path / "dense")
    record("w4a8").save(tmp_path / "record.json")
    command = ["compress", str(tmp_path / "dense"), "--no-measure", "--results", str(tmp_path / "record.json")]
    out = ["--out", str(tmp_path / "out")]
    assert main([*command, "--recipe", "w8a8", *out]) == 1
    assert "Scores of another recipe" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--recipe", "w4a8", "--report", str(tmp_path / "report.md")]) == 1
    assert "--results go into the card" in capsys.readouterr().err
    assert main([*command, "--recipe", "w4a8", *out]) == 0, capsys.readouterr().err
    assert [result.metric_value for result in results_of((tmp_path / "out/README.md").read_text())] == [31.25]
    assert json.loads((tmp_path / "out/model_index.json").read_text())
