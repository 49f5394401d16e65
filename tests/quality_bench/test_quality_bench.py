"""``bench quality``: the cross product end to end, interrupted and resumed, and what it says of bad arguments."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import tiny
from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.calls import Call
from diffuse_compress.cli import main
from diffuse_compress.evaluation.records import load_record, validate
from diffuse_compress.quality_bench import judges, run
from diffuse_compress.quality_bench.cells import cross_product, read_algorithms, read_schemes, read_subjects
from diffuse_compress.quality_bench.plot import plot
from diffuse_compress.quality_bench.results import bench_schema, markdown
from diffuse_compress.quantization.algorithms.base import algorithm_kinds

PROMPTS = ("red heart", "blue star", "green tree", "yellow sun", "grey cloud", "white bird")
LLAMA = [
    "bench",
    "quality",
    "--models",
    "python_llama",
    "--windows",
    "2",
    "--window",
    "64",
    "--samples",
    "2",
    "--in-process",
]


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny PixArt pipeline with prompts."""
    folder = tmp_path_factory.mktemp("models") / "tiny_pixart"
    tiny.build_pipeline("pixart").save_pretrained(folder)
    (folder / "eval_prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def rows(out: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    data = json.loads((out / "quality.json").read_text())
    validate(data, "quality.json", bench_schema())
    keys = ("model", "scheme", "algorithm", "calibration")
    return {tuple(str(row[key]) for key in keys): row for row in data["rows"]}


def scores(out: Path) -> dict[tuple[str, ...], Any]:
    return {key: (row["metrics"], row["not_measured"], row["layers"]) for key, row in rows(out).items()}


def test_an_interrupted_run_goes_on_and_gives_the_table_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*LLAMA, "--algorithms", "rtn", "smoothquant", "--schemes", "w4g64", "w8a8", "--out"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*command, str(whole)]) == 0
    printed = capsys.readouterr().out
    compress, calls = run.compress, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compress(*args, **kwargs)

    monkeypatch.setattr(run, "compress", interrupted)
    assert main([*command, str(broken)]) == 130
    assert not (broken / "quality.json").exists()
    kept = {path: path.read_bytes() for path in (broken / "cells").glob("*.json")}
    assert len(kept) == 2
    assert main([*command, str(broken), "--table"]) == 0
    assert [key[1:3] for key in rows(broken)] == [("dense", "None"), ("w4g64", "rtn")]
    assert "3 of 5 cells are not measured yet" in capsys.readouterr().err
    assert main([*command, str(broken)]) == 0
    assert len(calls) == 5, "two before the interruption, three after it: one was done"
    assert {path: path.read_bytes() for path in kept} == kept
    assert scores(broken) == scores(whole)
    found = rows(whole)
    assert [key[1:] for key in found] == [
        ("dense", "None", "None"),
        ("w4g64", "rtn", "None"),
        ("w4g64", "smoothquant", "matching"),
        ("w8a8", "rtn", "None"),
        ("w8a8", "smoothquant", "matching"),
    ]
    refused = found["python_llama", "w4g64", "smoothquant", "matching"]
    assert "SmoothQuantConfig is for quantized inputs, got none" in refused["not_measured"]
    assert refused["metrics"] == {}
    dense, rtn = found["python_llama", "dense", "None", "None"], found["python_llama", "w4g64", "rtn", "None"]
    name = "perplexity, heldout.txt"
    assert dense["metrics"][name][0] < rtn["metrics"][name][0]
    assert 50 < rtn["metrics"]["same token"][0] < 100
    assert rtn["cost"]["denoiser_disk_bytes"] < dense["cost"]["denoiser_disk_bytes"]
    assert rtn["cost"]["compress_seconds"][0] > 0
    assert rtn["layers"] == [28, 29]
    assert "| w4g64 | smoothquant | matching | refused |" in printed
    assert "- w4g64 smoothquant matching: LlamaForCausalLM: SmoothQuantConfig is" in printed
    assert ElementTree.parse(whole / "quality.svg").getroot().tag.endswith("svg")


def test_a_pipeline_is_calibrated_on_each_set_and_retried_only_where_it_failed(
    pixart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "bench",
        "quality",
        "--models",
        str(pixart),
        "--algorithms",
        "smoothquant",
        "--schemes",
        "w8a8",
        "--outliers",
    ]
    command += ["--calibration", "matching:2", "other", "random", "--prompts", "2", "--samples", "1", "--steps", "2"]
    command += ["--option", "smoothquant.alpha=0.6", "--in-process", "--out", str(tmp_path)]
    assert main(command) == 0
    data = json.loads((tmp_path / "quality.json").read_text())
    assert [(row["outliers"], row["calibration"]) for row in data["rows"]] == [
        (outliers, name) for outliers in (False, True) for name in (None, "matching:2", "other", "random")
    ]
    errors = [row["metrics"]["Output error"][0] for row in data["rows"] if row["calibration"]]
    assert len(set(errors)) == len(errors), "each set and each variant gives other codes"
    assert all(0 < error < 100 for error in errors)
    assert all({"PSNR", "SSIM", "Latent error"} <= set(row["metrics"]) for row in data["rows"] if row["calibration"])
    (record,) = (path for path in (tmp_path / "cells").glob("*.json") if "pixart-w8a8-smoothquant-other" in path.name)
    assert load_record(record).recipe["components"]["denoisers"][0]["algorithm"]["alpha"] == 0.6
    before = scores(tmp_path)
    bad = json.loads(record.read_text()) | {"metrics": [], "not_measured": {"quality": "ValueError: once"}}
    record.write_text(json.dumps(bad))
    calls = []
    measure = run._measure
    monkeypatch.setattr(run, "_measure", lambda job: calls.append(job.cell.calibration) or measure(job))
    assert main(command) == 0
    assert "ValueError: once" in capsys.readouterr().out
    assert calls == []
    assert main([*command, "--retry"]) == 0
    assert calls == ["other"]
    assert scores(tmp_path) == before


def test_a_model_that_cannot_have_outliers_is_one_row(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "m")
    command = ["bench", "quality", "--models", str(tmp_path / "m"), "--algorithms", "all", "--in-process"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    (row,) = json.loads((tmp_path / "out" / "quality.json").read_text())["rows"]
    assert row["not_measured"] == "m: need a text to judge a language model on. Give --text FILE."


@pytest.mark.slow
def test_cells_in_processes_of_their_own_give_the_same(pixart: Path, tmp_path: Path) -> None:
    command = ["bench", "quality", "--models", str(pixart), "--algorithms", "gptq", "--schemes", "w4a8", "--quick"]
    command += ["--prompts", "2", "--out"]
    assert main([*command, str(tmp_path / "apart")]) == 0
    assert main([*command, str(tmp_path / "here"), "--in-process"]) == 0
    assert scores(tmp_path / "apart") == scores(tmp_path / "here")


def test_every_registered_algorithm_can_be_chosen_but_trained_codes() -> None:
    assert [*read_algorithms(["all"], {})] == [kind for kind in algorithm_kinds() if kind != "trained"]


def test_what_looks_at_no_samples_is_measured_once() -> None:
    subjects = read_subjects(["python_llama"])
    algorithms = read_algorithms(["rtn", "gptq", "quarot", "awq+smoothquant"], {})
    cells = cross_product(subjects, read_schemes(["w4a8"]), algorithms, ["matching", "random"], [0, 1, 2])
    counts = {name: sum(cell.algorithm == name for cell in cells) for name in ["", *algorithms]}
    assert counts == {"": 1, "rtn": 1, "gptq": 6, "quarot": counts["quarot"], "awq+smoothquant": 1}
    assert counts["quarot"] in (1, 3)
    assert "has nothing to do after" in str(cells[-1].refusal)
    assert len({cell.file(Path(), run.Settings()) for cell in cells}) == len(cells)


def test_another_setting_is_another_cell() -> None:
    (cell,) = cross_product(read_subjects(["python_llama"]), {}, {}, ["matching"], [0])
    given: list[dict[str, Any]] = [{}, {"windows": 4}, {"window": 64}, {"prompts": 3, "call": {"height": 8}}]
    files = [cell.file(Path(), run.Settings(**one)) for one in given]
    assert len(set(files)) == 3
    assert files[0] == files[3], "no setting of pipelines"


def test_noise_replaces_the_latents_and_nothing_else() -> None:
    call = Call((torch.ones(1, 4, 8, 8),), {"encoder_hidden_states": torch.ones(1, 24, 64), "timestep": torch.ones(1)})
    before = Calibration.record(tiny.build("llama"), [[1, 2, 3]])
    sample = type(before.of("")[0])(call)
    (after,) = judges._noised(Calibration({"transformer": [sample]}), 0).of("transformer")
    assert 0.8 < after.call.args[0].std() < 1.2
    assert all(torch.equal(after.call.kwargs[name], value) for name, value in call.kwargs.items())


def test_tables_and_plots_of_rows_without_results_and_of_infinite_ones() -> None:
    def row(scheme: str, values: list[float | None], reason: str | None = None, **more: Any) -> dict[str, Any]:
        found = {"model": "m", "outliers": False, "algorithm": None, "calibration": None, "seeds": [0, 1], "cost": {}}
        metrics = {"perplexity": values} if values else {}
        return {**found, "scheme": scheme, "metrics": metrics, "layers": None, "not_measured": reason, **more}

    data = {
        "command": "c",
        "dates": ["2026-01-01", "2026-01-02"],
        "device": {"type": "cpu", "name": "<CPU>"},
        "versions": {},
        "settings": {},
        "metrics": {"perplexity": {"unit": "", "higher_is_better": False, "how": "h"}},
        "rows": [
            row("dense", [5.0]),
            row("w8a8", [6.0, 8.0], algorithm="a|b"),
            row("w4a8", [7.0, None], algorithm="c"),
            row("w2g64", [], "no <way>", algorithm="d"),
        ],
    }
    text = markdown(data)
    assert "2026-01-01 to 2026-01-02" in text
    assert "| w8a8 | a\\|b | 7 ± 1.4 |" in text
    assert "| w4a8 | c | not finite |" in text
    assert "| w2g64 | d | refused |" in text
    assert "- w2g64 d: no <way>" in text
    root = ElementTree.fromstring(plot(data))
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["w8a8, a|b: 7", "w4a8, c: 7"]
    labels = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a|b", "d", "dense", "m: perplexity (better is left)"} <= set(labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "emoji_pixar"], "no model 'emoji_pixar'.*did you mean 'emoji_pixart'.*python_llama"),
        (["--schemes", "w4a9"], "--schemes: Unknown preset 'w4a9'.*w4a8.*w2g64, w3g64"),
        (["--schemes", "w4g100"], "--schemes: Unknown preset 'w4g100'.*groups of 32, 64, 128"),
        (["--algorithms", "gtpq"], "--algorithms: no algorithm 'gtpq'; did you mean 'gptq'.*smoothquant"),
        (["--algorithms", "awq+trained"], "--algorithms: no algorithm 'trained'"),
        (["--option", "gptq"], "--option: need KIND.FIELD=VALUE, got 'gptq'"),
        (["--option", "gptq.damp=1"], "GPTQConfig: unknown field 'damp'; did you mean 'damping'"),
        (["--option", "gptq.damping=0.1"], "--option: gptq is not among --algorithms, rtn"),
        (["--option", "gpt.damping=0.1"], "--option: no algorithm 'gpt'; did you mean 'gptq'"),
        (["--calibration", "matchin"], "--calibration: 'matchin' is no set.*did you mean 'matching'"),
        (["--calibration", "matching:many"], "--calibration: NAME:N has the number"),
        (["--prompts", "1"], "--prompts must be at least 2, got 1"),
        (["--table"], "--table: .* has no results of this command yet"),
        (["--set", "height"], "--set: need NAME=VALUE"),
    ],
)
def test_bad_arguments_say_what_exists(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["bench", "quality", "--models", "python_llama", "--algorithms", "rtn", "--out", str(tmp_path / "out")]
    assert main([*command, *arguments]) == 1
    error = capsys.readouterr().err.replace("\n", " ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
