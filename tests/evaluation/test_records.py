"""Records, their schema, model-card results, and reports."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from diffuse_compress.cli import main
from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.evaluation.record_report import (
    comparison_table,
    pareto_front,
    pareto_plot,
    table_notes,
    write_report,
)
from diffuse_compress.evaluation.records import Metric, Record, eval_results, load_record, record_schema, validate


def metric(value: float, name: str = "FID-to-dense", **more: Any) -> Metric:
    fields = {
        "low": value - 1,
        "high": value + 1,
        "count": 5000,
        "implementation": "Inception",
        "higher_is_better": False,
    }
    return Metric(name, value, **{**fields, **more})


def record(name: str = "w4a8", *metrics: Metric, **more: Any) -> Record:
    fields: dict[str, Any] = {
        "model": {"id": "PixArt-alpha/PixArt-XL-2-1024-MS", "class": "PixArtAlphaPipeline", "revision": "abc"},
        "recipe": None if name == "dense" else {"schema_version": 1, "components": {}},
        "device": {"type": "cpu", "name": "a processor", "processes": 1, "threads": 2},
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
        "date": "2026-11-26",
        "command": "diffuse-compress eval generate x | y",
        "data": {"kind": "prompts", "name": "coco.json", "sha256": "0123456789abcdef"},
        "seeds": {"base": 0, "rule": "sample i: seed + i"},
        "samples": 5000,
        "settings": {"num_inference_steps": 20, "frames": 0},
        "cost": {"disk_bytes": 3 << 20, "seconds_per_sample": 0.25, "peak_memory_bytes": 9 << 20},
    }
    return Record(name, **{**fields, **more}, metrics=metrics)


def test_record_round_trips_and_keeps_to_its_schema(tmp_path: Path) -> None:
    reference = {"name": "dense", "count": 5000, "statistics_sha256": "00"}
    made = record(
        "w4a8", metric(3.5, reference=reference, details={"x": 1}), metric(math.inf, "PSNR", low=None, high=None)
    )
    made.save(tmp_path / "deep" / "record.json")
    data = json.loads((tmp_path / "deep" / "record.json").read_text())
    assert data["metrics"][1]["value"] is None
    again = load_record(tmp_path / "deep")
    assert again.metrics[0] == made.metrics[0]
    assert math.isnan(again.metrics[1].value)
    assert again.to_dict() == made.to_dict()
    assert list(tmp_path.rglob(".*")) == []  # nothing temporary stays


def test_schema_uses_only_words_that_are_checked() -> None:
    known = {"type", "enum", "required", "properties", "additionalProperties", "items", "minimum"}
    notes = {"$schema", "$id", "title", "description"}

    def words(schema: dict[str, Any]) -> set[str]:
        found = set(schema)
        for part in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
            found |= words(part)
        return found

    assert words(record_schema()) <= known | notes
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(record_schema())
    jsonschema.validate(record("w4a8", metric(1)).to_dict(), record_schema())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("samples",), "many", r"r\.samples: must be integer, got str 'many'"),
        (("samples",), True, r"r\.samples: must be integer, got bool"),
        (("samples",), -1, r"r\.samples: must be at least 0"),
        (("schema_version",), 9, r"r\.schema_version: must be one of \[1\], got 9"),
        (("data", "kind"), "pictures", r"r\.data\.kind: must be one of"),
        (("extra",), 1, r"does not know extra"),
        (("metrics", 0, "value"), "3", r"r\.metrics\[0\]\.value: must be number or null"),
        (("model",), {"class": None}, r"r\.model: a record needs id"),
    ],
)
def test_validate_names_the_place(path: tuple[Any, ...], value: Any, message: str) -> None:
    data = record("w4a8", metric(1)).to_dict()
    target: Any = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        validate(data, "r")


def test_unreadable_records_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a readable record"):
        load_record(tmp_path / "nothing.json")
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a readable record"):
        load_record(tmp_path)


def test_new_scores_replace_those_of_the_same_kind() -> None:
    made = record("w4a8", metric(3), metric(4, implementation="clean-fid"))
    found = made.with_metrics([metric(5), metric(6, reference={"name": "coco"})])
    assert [m.value for m in found.metrics] == [5, 4, 6]
    assert [m.value for m in made.metrics] == [3, 4]


def test_what_was_not_measured_is_said_in_its_place() -> None:
    reasons = {"PSNR": "no access: a/b is gated", "disk_bytes": "no access: a/b is gated"}
    gone = record("gone", samples=0, cost={}).with_metrics([], reasons)
    half = record("half", metric(3, "PSNR")).with_metrics([], {"LPIPS": "needs pip install lpips", "PSNR": "x"})
    assert Record.from_dict(gone.to_dict()) == gone
    assert half.not_measured == {"LPIPS": "needs pip install lpips"}
    assert gone.with_metrics([metric(3, "PSNR")]).not_measured == {"disk_bytes": "no access: a/b is gated"}
    lines = comparison_table([gone, half]).splitlines()
    assert lines[0] == "|  | N | PSNR | LPIPS | on disk | s a sample | peak memory |"
    assert lines[2] == "| gone | 0 | not measured: no access | – | not measured: no access | – | – |"
    assert lines[3].startswith("| half | 5000 | 3.0 [2.0, 4.0] | not measured | 3.00 MiB |")
    notes = table_notes([gone, half])
    assert "gone: not measured: no access: a/b is gated" in notes
    assert "half: LPIPS not measured: needs pip install lpips" in notes
    assert comparison_table([gone]).splitlines()[2].count("not measured: no access") == 2
    assert pareto_plot([gone, half], metric(3, "PSNR").key, "bytes") is None


def test_eval_results_are_what_model_cards_take(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    made = record("w4a8", metric(3.25), metric(math.nan, "PSNR"))
    made.save(tmp_path / "record.json")
    (found,) = eval_results([tmp_path])
    assert (found.task_type, found.dataset_type, found.metric_type) == ("text-to-image", "coco-json", "fid-to-dense")
    assert found.metric_value == 3.25
    assert found.metric_config == "Inception"
    assert found.metric_args["count"] == 5000
    clips = record("w4a8", metric(1), settings={"frames": 9})
    faces = record("w4a8", metric(1), data={"kind": "unconditional", "name": "unconditional", "sha256": None})
    assert [r.task_type for r in eval_results([clips, faces])] == ["text-to-video", "unconditional-image-generation"]
    card = ModelCard.from_template(
        ModelCardData(model_name="w4a8", eval_results=[found]), template_str="---\n{{ card_data }}\n---\n"
    )
    assert ModelCard(str(card)).data.eval_results[0].metric_value == 3.25


def test_comparison_table_lines_up_metrics_that_compare() -> None:
    records = [
        record("dense"),
        record("w8a8", metric(3.123)),
        record("w4|a8", metric(7.5), metric(8.5, implementation="clean-fid"), cost={}),
    ]
    table = comparison_table(records)
    lines = table.splitlines()
    assert lines[0] == ("|  | N | FID-to-dense (1) | FID-to-dense (2) | on disk | s a sample | peak memory |")
    assert lines[2] == "| dense | 5000 | – | – | 3.00 MiB | 0.25 | 9.00 MiB |"
    fewer = table_notes([record("w8a8", metric(1.0)), record("w4a8", metric(2.0, count=100))])
    assert fewer[0] == "FID-to-dense: Inception; lower is better. N differs: w8a8 5000, w4a8 100."
    notes = table_notes(records)
    assert notes[0] == "FID-to-dense (1): Inception; lower is better."
    assert notes[-1].startswith(
        "Made with PixArt-alpha/PixArt-XL-2-1024-MS at abc, coco.json, a processor, 2026-11-26, torch"
    )
    assert lines[3] == "| w8a8 | 5000 | 3.1 [2.1, 4.1] | – | 3.00 MiB | 0.25 | 9.00 MiB |"
    assert lines[4] == "| w4\\|a8 | 5000 | 7.5 [6.5, 8.5] | 8.5 [7.5, 9.5] | – | – | – |"


@pytest.mark.parametrize("higher", [False, True])
def test_pareto_front_holds_what_nothing_beats(higher: bool) -> None:
    sign = -1 if higher else 1
    points = [(3.0, 1.0), (1.0, 5.0), (2.0, 5.0), (2.0, 3.0), (4.0, 2.0), (1.0, 6.0)]
    front = pareto_front([(x, sign * y) for x, y in points], higher_is_better=higher)
    assert [points[i] for i in front] == [(1.0, 5.0), (2.0, 3.0), (3.0, 1.0)]


def test_reports_are_a_table_a_page_and_plots(tmp_path: Path) -> None:
    def cost(size: int, seconds: float) -> dict[str, Any]:
        return {"disk_bytes": size << 20, "seconds_per_sample": seconds}

    records = [
        record("dense", cost=cost(9, 0.5)),
        record("w8a8", metric(1, "PSNR", higher_is_better=True), metric(2.0), cost=cost(5, 0.4)),
        record("w4a8", metric(0.5, "PSNR", higher_is_better=True), metric(7.5), cost=cost(3, 0.3)),
        record("bad<>", metric(9.0), cost=cost(6, 0.6)),
    ]
    written = write_report(records, tmp_path / "report", quality="fid", title="Tiny & small")
    assert [path.name for path in written] == ["report.md", "report.html", "records.json"]
    page = written[1].read_text()
    assert page.count("<svg") == 2
    assert "Tiny &amp; small" in page
    assert "bad&lt;&gt;" in page
    assert "bad<>" not in page
    assert "FID-to-dense over weights on disk, MiB" in page
    assert [Record.from_dict(entry).name for entry in json.loads(written[2].read_text())] == [r.name for r in records]
    plot = pareto_plot(records, records[1].metrics[1].key, "bytes")
    assert plot is not None
    assert [(p["name"], p["on_front"]) for p in plot["points"]] == [("w8a8", True), ("w4a8", True), ("bad<>", False)]
    places = {p["name"]: (p["x"], p["y"]) for p in plot["points"]}
    assert places["w4a8"][0] < places["w8a8"][0] < places["bad<>"][0]
    assert places["bad<>"][1] < places["w4a8"][1] < places["w8a8"][1]  # up is larger
    assert all(plot["left"] <= p["x"] <= plot["right"] and plot["top"] <= p["high"] for p in plot["points"])
    with pytest.raises(ConfigError, match="--quality: no record has 'sharpness'"):
        write_report(records, tmp_path / "x", quality="sharpness")
    with pytest.raises(ConfigError, match="records of different names, got dense"):
        write_report([records[0], records[0]], tmp_path / "x")


def test_command_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("dense", None), ("w8a8", 2.0)):
        made = record(name) if value is None else record(name, metric(value))
        made.save(tmp_path / name / "record.json")
    out = tmp_path / "report"
    assert main(["eval", "report", str(tmp_path / "dense"), str(tmp_path / "w8a8"), "--out", str(out)]) == 0
    assert re.search(r"\| w8a8 \| 5000 \| 2\.0 \[1\.0, 3\.0\]", capsys.readouterr().out)
    assert (out / "report.html").is_file()
