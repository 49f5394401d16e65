"""The command line through ``main`` and once as a process: what it writes, what it prints, how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import diffuse_compress as dc
import tiny
from diffuse_compress import cli, cli_bench, demo
from diffuse_compress.cli import main
from diffuse_compress.integrations.component import get_state
from diffuse_compress.skeleton import read_skeleton, stored_dtype

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny.build_pipeline("pixart", dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compressed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compressed by the command line: denoiser w4a8, text encoder w8a16."""
    folder = tmp_path_factory.mktemp("out")
    parts = "transformer,text_encoder=w8a16,vae=none"
    arguments = ["compress", str(dense), "--recipe", "w4a8", "--components", parts, "--out", str(folder)]
    assert main([*arguments, "--report", str(folder / "report.html")]) == 0
    return folder


def test_compress_writes_what_python_would(dense: Path, compressed: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(compressed)
    assert get_state(pipe.transformer).config.spec.preset == "w4a8"
    assert get_state(pipe.text_encoder).config.spec.preset == "w8a16"
    assert get_state(pipe.vae) is None
    assert pipe.transformer.dtype == torch.bfloat16  # as stored
    expected = DiffusionPipeline.from_pretrained(dense, dtype=torch.bfloat16).compress("w4a8", measure=False)
    for key, tensor in expected.transformer.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), pipe.transformer.state_dict()[key].view(torch.uint8)), key
    assert (compressed / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_compress_writes_torchao_where_it_is_exact(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compress", str(dense), "--no-measure", "--format", "torchao", "--out"]
    assert main([*command, str(tmp_path / "int8"), "--recipe", "w8a16"]) == 0
    content = json.loads((tmp_path / "int8" / "transformer" / "config.json").read_text())
    assert content["quantization_config"]["quant_method"] == "torchao"
    capsys.readouterr()
    # A plan tells what cannot be written, and whose layers it is: no weight is read.
    monkeypatch.setattr(cli, "load", lambda *_: pytest.fail("refused before any work"))
    for recipe, more in (("w4a16", []), ("w4a16", ["--dry-run"]), ("fp8", ["--dtype", "float32"])):
        assert main([*command, str(tmp_path / "no"), "--recipe", recipe, *more]) == 1
        reason = "row-wise product is bfloat16" if recipe == "fp8" else "torchao packs int4 codes in other layouts"
        printed = capsys.readouterr()
        assert reason in printed.err
        assert "transformer: format=" in printed.err
        assert not printed.out
    assert main([*command, str(tmp_path / "no"), "--recipe", "fp8", "--dtype", "bfloat16", "--dry-run"]) == 0
    assert not (tmp_path / "no").exists()


def test_format_torchao_looks_at_what_is_compressed_already(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "load", lambda *_: pytest.fail("refused before any work"))
    command = ["compress", str(compressed), "--components", "vae=w8a16", "--format", "torchao", "--out", str(tmp_path)]
    assert main(command) == 1
    assert "transformer: format=" in capsys.readouterr().err


def test_compress_again_says_that_nothing_is_changed(compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(compressed), "--recipe", "w4a8", "--report", str(compressed / "again.json")]) == 0
    assert "already compressed this way; nothing is changed" in capsys.readouterr().err


def test_compress_json_is_all_that_is_printed(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = DiffusionPipeline.from_pretrained(dense).compression_plan("w8a16").recipe()
    recipe.save(tmp_path / "recipe.json")
    out, report = str(tmp_path / "out"), str(tmp_path / "r.json")
    command = ["compress", str(dense), "--recipe", str(tmp_path / "recipe.json"), "--out", out, "--report", report]
    assert main([*command, "--no-measure", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["out"] == out
    assert printed["report"] == json.loads(Path(report).read_text())
    assert printed["report"]["components"]["transformer"]["scheme"] == "w8a16"
    assert "measure=False" in printed["report"]["components"]["transformer"]["output_error"]["note"]


def test_compress_options_reach_the_config(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--modules-to-not-convert", "attn2", "*.ff.*", "--seed", "5", "--algorithm", "hqq", "--dtype", "float32"]
    command = ["compress", str(dense), "--recipe", "w4a16", "--out", str(out), "--no-measure"]
    assert main([*command, *options]) == 0
    pipe = DiffusionPipeline.from_pretrained(out)
    spec = get_state(pipe.transformer).config.spec
    assert spec.modules_to_not_convert == ("attn2", "*.ff.*")
    assert spec.seed == 5
    assert isinstance(spec.algorithm, dc.HQQConfig)
    assert pipe.transformer.dtype == torch.float32


def test_compress_preview_prompts_are_in_the_report(dense: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    command = ["compress", str(dense), "--recipe", "w8a8", "--report", str(report), "--dtype", "float32"]
    assert main([*command, "--no-measure", "--preview", "a red cat", "--preview", "the moon"]) == 0
    assert [item["prompt"] for item in json.loads(report.read_text())["preview"]] == ["a red cat", "the moon"]


def test_dry_run_prints_the_plan_of_the_loaded_pipeline(
    dense: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "load", lambda *_: pytest.fail("a dry run must not load weights"))
    command = [
        "compress",
        str(dense),
        "--recipe",
        "w4a8",
        "--components",
        "transformer,text_encoder=w8a16",
        "--dry-run",
    ]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    pipe = DiffusionPipeline.from_pretrained(dense, dtype=torch.bfloat16)
    expected = pipe.compression_plan({"transformer": "w4a8", "text_encoder": "w8a16"}).to_dict()
    assert plan == json.loads(json.dumps(expected))
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("CompressionPlan for PixArtAlphaPipeline: w4a8 by")


def test_info_shows_every_preset_as_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["diffuse-compress"] == dc.__version__
    from diffuse_compress.quantization.presets import PRESETS

    assert facts["presets"].keys() == PRESETS.keys()
    for name, preset in PRESETS.items():
        assert dc.Scheme.from_dict(facts["presets"][name]["scheme"]) == preset.scheme
        assert dc.Scheme.from_dict(facts["presets"][name]["modulation_scheme"]) == preset.modulation_scheme
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for value in ("strategy=two_level", "group_size=128", "scale_rule=", "observer=mse", "computed here by"):
        assert value in text


def test_info_of_a_folder(dense: Path, compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(dense)]) == 0
    text = capsys.readouterr().out
    assert text.count("not compressed") == 3
    assert "modulation  1" in text
    assert main(["info", str(compressed), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    pipe = DiffusionPipeline.from_pretrained(compressed, dtype=torch.bfloat16)
    expected = pipe.compression_report().to_dict()
    assert facts["report"]["bytes"] == expected["bytes"]
    assert facts["report"]["components"].keys() == expected["components"].keys()
    assert facts["components"]["transformer"]["compressed"]["layers"] == {"w4a16": 1, "w4a8": 21}
    assert facts["components"]["vae"]["compressed"] is None
    assert main(["info", str(compressed / "transformer")]) == 0
    text = capsys.readouterr().out
    assert "21 x w4a8" in text
    assert "output error" in text.splitlines()[-1]


def test_skeleton_is_on_meta_and_in_the_stored_dtype(dense: Path, compressed: Path) -> None:
    for folder in (dense, compressed):
        assert stored_dtype(folder) == torch.bfloat16
        skeleton, pipe = read_skeleton(folder), DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
        for name in ("transformer", "text_encoder", "vae"):
            expected = pipe.components[name].state_dict()
            found = skeleton.components[name].state_dict()
            assert {k: (t.shape, t.dtype) for k, t in found.items()} == {
                k: (t.shape, t.dtype) for k, t in expected.items()
            }
            assert [key for key, tensor in found.items() if tensor.device.type != "meta"] == []


FAILURES = [
    (["--recipe", "w4a9", "--dry-run"], r"Unknown preset 'w4a9'; did you mean 'w4a8'"),
    (["--dry-run"], r"compress\(\) needs a preset"),
    (["--recipe", "w8a8"], r"say what to write: --out DIR"),
    (["--recipe", "w8a8", "--out", "/proc/diffuse_compress"], r"--out: cannot write in /proc"),
    (["--recipe", "w8a8", "--report", "r.pdf"], r"ending in \.html, \.json or \.md"),
    (["--components", "transformer", "--dry-run"], r"'transformer' needs a preset: transformer=w8a8"),
    (
        ["--recipe", "w8a8", "--components", "transfomer", "--dry-run"],
        r"no component or group 'transfomer'; did you mean",
    ),
    (["--recipe", "missing.json", "--dry-run"], r"missing\.json: not a readable recipe"),
    (["--recipe", "w4a4", "--dry-run"], r"calibrat.*--algorithm rtn"),
    (["--recipe", "w8a8", "--algorithm", "hqq", "--dry-run"], r"transformer_blocks\.0.*HQQ: needs asymmetric"),
    (["--recipe", "w8a8", "--algorithm", "rnt", "--dry-run"], r"unknown kind 'rnt'; did you mean 'rtn'"),
]


@pytest.mark.parametrize(("arguments", "message"), FAILURES, ids=[message[:24] for _, message in FAILURES])
def test_failure_prints_the_message_and_returns_one(
    arguments: list[str], message: str, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(["compress", str(dense), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("error: ") or "error: " in captured.err
    assert re.search(message, captured.err)
    assert "Traceback" not in captured.err


def test_failure_as_json_and_with_traceback(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(dense), "--recipe", "w4a9", "--dry-run", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "ConfigError"
    assert "w4a9" in error["message"]
    assert main(["compress", str(dense), "--recipe", "w4a9", "--dry-run", "--debug"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_paths_that_are_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path)]) == 1
    assert "neither model_index.json nor config.json" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "nothing")]) == 1
    assert "not a folder. Give the folder of a pipeline or model, or a Hub id" in capsys.readouterr().err


def test_bench_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli_bench, "has_fast_int4", lambda device: False)
    assert main(["bench", "--quick"]) == 1
    assert "bench: needs an NVIDIA GPU of compute capability 8.0 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "module", "passed"),
    [
        (["--quick"], "tune", ["--seconds", "20"]),
        (["tiles"], "tune", ["--seconds", "240"]),
        (["layers", "--out", "x.json"], "gpu_layers", ["--minutes", "5", "--out", "x.json"]),
    ],
)
def test_bench_calls_the_benchmarks(
    arguments: list[str], module: str, passed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def import_module(name: str) -> SimpleNamespace:
        return SimpleNamespace(main=lambda given: calls.append((name, given)))

    monkeypatch.setattr(cli_bench, "has_fast_int4", lambda device: True)
    monkeypatch.setattr(cli_bench.importlib, "import_module", import_module)
    assert main(["bench", *arguments]) == 0
    assert calls == [(f"diffuse_compress_kernels.benchmarks.{module}", passed)]


def test_second_compression_is_refused(compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(compressed), "--recipe", "w8a8", "--dry-run"]) == 1
    assert "transformer: already compressed" in capsys.readouterr().err


def test_interrupt_returns_130(
    dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "compress", interrupted)
    assert main(["compress", str(dense), "--recipe", "w8a8", "--out", str(tmp_path / "o")]) == 130
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("verb", [[], ["compress"], ["info"], ["demo"], ["bench"]])
def test_help_teaches(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*verb, "--help"])
    text = capsys.readouterr().out
    if verb in ([], ["compress"]):
        assert "examples:\n" in text
        assert "--recipe w4a8" in text
    with pytest.raises(SystemExit, match="2"):
        main([*verb, "--no-such-option"])


def test_demo_tells_where_the_model_is_from_and_compares_after_reload(dense: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    pipe = tiny.build_pipeline("pixart")
    call = {k: v for k, v in tiny.call_kwargs(pipe).items() if k not in ("prompt", "generator", "output_type")}
    folder = tmp_path / "demo"
    page = demo.run_demo("w8a8", folder, ["a red cat", "the moon"], model=dense, call=call, say=lines.append)
    text = "\n".join(lines)
    assert str(dense) in text
    assert "CompressionPlan for PixArtAlphaPipeline: w8a8" in text
    assert "bit-identical" in text
    assert page == folder / "report.html"
    assert page.read_text().count("<figure") == 2
    again = DiffusionPipeline.from_pretrained(folder / "pipeline")
    assert get_state(again.transformer).config.spec.preset == "w8a8"


def test_demo_notices_another_picture(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {k: v for k, v in tiny.call_kwargs(tiny.build_pipeline("pixart")).items() if k in ("height", "width")}
    monkeypatch.setattr(demo, "_pixels", lambda *_: torch.rand(3))
    options = {"num_inference_steps": 2, "use_resolution_binning": False, **call}
    with pytest.raises(RuntimeError, match="reloaded pipeline gives another picture"):
        demo.run_demo("w8a8", tmp_path, ["a cat"], model=dense, call=options, say=lambda _: None)


@pytest.mark.skipif(
    not (ROOT / "examples/reference_models/emoji_pixart/model_index.json").exists(), reason="no demo model"
)
def test_demo_model_is_found_and_knows_the_demo_prompts() -> None:
    folder = demo.demo_model_path()
    known = (folder / "prompts.txt").read_text().splitlines()
    assert set(demo.PROMPTS) <= set(known)


def test_as_a_process(dense: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "diffuse_compress.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

    done = run("compress", str(dense), "--recipe", "w4a8", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target"] == "PixArtAlphaPipeline"
    failed = run("compress", "no-such/repository", "--recipe", "w4a8", "--dry-run")
    assert failed.returncode == 1
    assert "error: no-such/repository: no such folder here, and the Hub gave:" in failed.stderr
    assert "Traceback" not in failed.stderr
