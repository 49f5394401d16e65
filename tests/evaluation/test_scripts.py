"""The scripts of ``eval/`` on tiny models: they run, resume, and write what their tables read."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from diffuse_compress.logging import get_logger

EVAL = Path(__file__).resolve().parents[2] / "eval"
PROMPTS = ["a red cat", "the blue moon", "a small house"]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"eval_script_{name}", EVAL / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny PixArt pipeline with prompts and a classifier that names pictures by their brightness."""
    folder = tmp_path_factory.mktemp("tiny_pixart")
    tiny.build_pipeline("pixart").save_pretrained(folder)
    (folder / "eval_prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "classifier.py").write_text(
        "import torch\n"
        "class Classifier:\n"
        f"    captions = {PROMPTS!r}\n"
        "    def classify(self, images):\n"
        "        level = images.mean(dim=(1, 2, 3))\n"
        "        return -(level[:, None] - torch.tensor([0.0, 0.5, 1.0])).abs()\n"
        "def load_classifier(folder):\n"
        "    return Classifier()\n"
    )
    return folder


def arguments_for(folder: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--prompts", "3", "--steps", "3", "--batch-size", "2", "--presets", "w8a8", "fp8", "w4a4"]
    return ["--model", str(folder), "--out", str(out), *fixed, *more]


def test_quantization_presets_runs_resumes_and_prints(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, out = load_script("quantization_presets"), tmp_path / "results.json"
    script.main(arguments_for(model_folder, out, "--outliers", "--fake", "2", "--markdown"))
    printed = capsys.readouterr().out
    assert "| `w8a8` |" in printed
    assert "With outlier channels" in printed
    results: dict[str, Any] = json.loads(out.read_text())
    arms = results["arms"]
    assert list(arms)[:5] == ["dense", "bf16", "bf16-weights", "fewer-steps", "other-seed"]
    assert {"w8a8", "w8a8:fake", "fp8:fake-as-written", "w4a4:fake", "outliers/dense", "outliers/w4a4"} <= set(arms)
    assert arms["outliers/dense"]["psnr"]["value"] > 60
    assert arms["w8a8"]["psnr"]["value"] > arms["w4a4"]["psnr"]["value"] > arms["other-seed"]["psnr"]["value"]
    counts = {name: arm["psnr"]["count"] for name, arm in arms.items() if name != "dense"}
    assert {name: counts[name] for name in ("w8a8", "w8a8:fake", "outliers/w8a8")} == {
        "w8a8": 3,
        "w8a8:fake": 2,
        "outliers/w8a8": 3,
    }
    assert 0 < arms["w8a8"]["file_ratio"] < 1
    assert 0.5 < arms["w8a8"]["macs_at_claimed_precision"] < 1
    assert arms["w8a8"]["accuracy_change"]["low"] <= 0 <= arms["w8a8"]["accuracy_change"]["high"]
    for preset in ("w8a8", "fp8", "w4a4"):
        assert abs(arms[f"{preset}:fake"]["real_minus_fake_db"]["value"]) < 0.5

    # Nothing is made twice; a missing arm is.
    first = arms.pop("w4a4")
    out.write_text(json.dumps(results))
    made = []
    original = script.generate_pictures
    monkeypatch.setattr(script, "generate_pictures", lambda *args, **kw: made.append(1) or original(*args, **kw))
    script.main(arguments_for(model_folder, out, "--outliers", "--fake", "2", "--resume"))
    assert len(made) == 2  # the arm, and the one call that counts MACs
    again = json.loads(out.read_text())["arms"]
    assert again["w4a4"]["psnr"] == first["psnr"]
    assert list(again).index("w4a4") < list(again).index("w4a4:fake")

    with pytest.raises(SystemExit, match="made with other steps"):
        script.main([*arguments_for(model_folder, out, "--resume"), "--steps", "4"])
    script.main(["--table", str(out)])
    assert "| `w8a8` |" in capsys.readouterr().out


def test_quantization_presets_pictures_do_not_depend_on_the_batch(model_folder: Path) -> None:
    from diffuse_compress.evaluation.images import generate_pictures, sample_seed

    script = load_script("quantization_presets")
    pipe = script.load_pipeline(model_folder, script.torch.float32)
    options = {**script.accepted_options(pipe, script.DEFAULTS), "num_inference_steps": 2}
    counts: list[int] = []
    one = generate_pictures(pipe, PROMPTS, batch_size=1, options=options, on_batch=counts.append)
    three = generate_pictures(pipe, PROMPTS, batch_size=3, options=options)
    assert counts == [1, 2, 3]
    assert one.shape == (3, 3, 32, 32)
    assert (one - three).abs().max() < 1e-4
    assert len({sample_seed(seed, index) for seed in range(3) for index in range(100)}) == 300
    with pytest.raises(ValueError, match="options without generator"):
        generate_pictures(pipe, PROMPTS, options={"generator": None})


@pytest.mark.slow  # a process of its own
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_compress_memory_reports_and_holds_its_bound(capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("compress_memory")
    assert script.main(["--presets", "w8a8", "--layers", "1", "--heads", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["compressed_bytes"] < result["dense_bytes"]
    assert result["bound_bytes"] == result["dense_bytes"] + result["largest_layer_bytes"] + 200 * 2**20


@pytest.mark.parametrize(
    ("model", "layers", "device"),
    [
        pytest.param("pixart", 4, "cpu", marks=pytest.mark.slow),
        pytest.param("t5", 5, "cpu", marks=pytest.mark.slow),
        pytest.param("pixart", 8, "cuda", marks=pytest.mark.gpu),
        pytest.param("t5", 8, "cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_quantizing_while_loading_never_holds_the_dense_model(
    model: str, layers: int, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Peak of a process of its own: compressed bytes, one shard (on a GPU the largest layer) and a little."""
    script, allowance = load_script("compress_memory"), 48 if device == "cpu" else 320
    shape = ["--layers", str(layers), "--heads", "8" if device == "cpu" else "16", "--shard-size", "32MB"]
    options = ["--load", "--model", model, "--device", device, "--presets", "w8a8", "--json", *shape]
    status = script.main([*options, "--allowance", str(allowance)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    spare = found["dense_bytes"] - found["largest_shard_bytes"] - found["largest_layer_bytes"]
    assert spare > (allowance + 16) << 20, "or the bounds show nothing"
    assert found["peak_bytes"] <= found["bound_bytes"], found
    assert found.get("device_peak_bytes", 0) <= found.get("device_bound_bytes", 0), found
    assert status == 0


@pytest.mark.slow  # imports both libraries, twice
def test_import_cost_prints_medians(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_script("import_cost").main(["--runs", "1", "--limit", "60"]) == 0
    assert "import diffuse_compress:" in capsys.readouterr().out


def test_ecosystem_cost_rehearses_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, out = load_script("ecosystem_cost"), tmp_path / "bench" / "lines.jsonl"
    modes = ["resident", "model", "sequential", "leaf", "lora", "lora-fused"]
    options = ["--tiny", "--device", "cpu", "--calls", "1", "--providers", "dense", "w4a8", "--modes", *modes]
    assert script.main([*options, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("error") for line in lines] == [None] * len(lines)
    assert {(line["shape"], line["provider"], line["mode"]) for line in lines} == {
        (shape, provider, mode) for shape in script.SHAPES for provider in ("dense", "w4a8") for mode in modes
    }
    assert all(line["seconds"] > 0 for line in lines)
    assert [line["provider"] for line in lines[: len(modes)]] == ["dense"] * len(modes), "the baseline comes first"
    # What is there is not measured again; what failed, or is over time, does not stop the rest.
    assert script.main([*options, "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == len(lines)
    assert script.main([*options, "--providers", "w8a8", "--minutes", "0", "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == len(lines)
    capsys.readouterr()
    assert script.main([*options, "--models", "flux1_dev", "--providers", "nf4", "--out", str(out)]) == 0
    (found,) = (json.loads(line) for line in out.read_text().splitlines()[len(lines) :])
    assert found["provider"] == "nf4"
    assert "bitsandbytes" in found["error"]


def test_feature_cache_cost_rehearses_without_a_gpu(tmp_path: Path) -> None:
    script, out = load_script("feature_cache_cost"), tmp_path / "bench" / "lines.jsonl"
    options = ["--tiny", "--device", "cpu", "--steps", "5", "--repeats", "1", "--out", str(out)]
    assert script.main([*options, "--parts", "flux", "pixart-w8a8", "--modes", "eager"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [line for line in lines if "error" in line]
    for scheme in ("bf16", "w8a8"):
        steps = [line for line in lines if line["scheme"] == scheme and line["what"] == "step"]
        loops = [line for line in lines if line["scheme"] == scheme and line["what"] == "loop"]
        assert [line["schedule"] for line in steps] == ["all by model", "all"]
        assert all(0 < line["reused_ms"] < line["full_ms"] for line in steps)
        assert [line["schedule"] for line in loops] == ["by model", "whole steps", "middle blocks", "scattered"]
        assert all(0.2 < line["reused_share"] <= 0.56 for line in loops)
        assert all(line["real"] > 0 and line["kept_bytes"] > 0 for line in loops)
    assert script.main([*options, "--minutes", "0"]) == 0
    assert len(out.read_text().splitlines()) == len(lines)


def test_temporal_cost_tells_what_was_logged() -> None:
    script = load_script("temporal_cost")
    with script._logged() as messages:
        get_logger("diffuse_compress.pipelines.graphs").warning("a call could not be recorded: %r", ValueError("why"))
    get_logger().warning("afterwards")
    assert messages == ["a call could not be recorded: ValueError('why')"]


def test_temporal_cost_rehearses_without_a_gpu(tmp_path: Path) -> None:
    script, out = load_script("temporal_cost"), tmp_path / "bench" / "lines.jsonl"
    options = ["--tiny", "--device", "cpu", "--steps", "3", "--rows", "4", "--calls", "2", "--out", str(out)]
    shapes = ["dit_xl_2_256", "wan21_t2v_14b", "wan22_t2v_a14b"]
    measured = ["--parts", "flux", "sdxl", "tables", "--schemes", "w8a8", "float32", "--shapes", *shapes]
    assert script.main([*options, *measured, "--modes", "eager"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [line for line in lines if "error" in line]
    steps = [line for line in lines if line["what"] == "step"]
    assert [(line["table"], "again" in line) for line in steps] == [
        *[("none", False), ("device", False), ("cpu", False), ("none", True)] * 3
    ]
    assert [line["scheme"] for line in steps[::4]] == ["bfloat16", "w8a8", "float32"]
    for none, device, cpu, again in zip(*(steps[first::4] for first in range(4)), strict=True):
        assert all(line["step_ms"] > 0 and line["log"] == [] for line in (none, device, cpu))
        assert all(0 < line["hooks_ms"] < line["host_ms"] for line in (none, device, cpu, again))
        assert again["resident_bytes"] == none["resident_bytes"]
        assert cpu["resident_bytes"] < none["resident_bytes"] < device["resident_bytes"]
        assert device["table_bytes"]["weights"] - cpu["table_bytes"]["weights"] == cpu["table_bytes"]["parked"] > 0
        for line in (device, cpu):
            assert line["served"]["temporal table"]["hits"] > 0 == len(line["served"]["temporal table"]["misses"])
    tables = [line for line in lines if line["what"] == "table"]
    assert [line["shape"] for line in tables] == shapes[:2], "one configuration is measured once"
    assert all(line["schedule_bytes"] > 0 < line["request_bytes"] for line in tables)
    errors = [line for line in lines if line["what"] == "error"]
    assert [line["exact"] for line in errors] == [None, True, False] * 2
    assert all(line["rms"] <= 4e-3 and line["maximum"] <= 2e-2 and line["layers"] > 5 for line in errors)
    assert [line["other_bits"] for line in errors[1::3]] == [0, 0]
    assert script.main([*options, "--minutes", "0"]) == 0
    assert len(out.read_text().splitlines()) == len(lines)


@pytest.mark.slow  # draws a model's pictures with every method
def test_feature_cache_peers_leave_out_as_much_as_ours(capsys: pytest.CaptureFixture[str]) -> None:
    model = EVAL.parent / "examples" / "reference_models" / "emoji_dit"
    options = ["--prompts", "3", "--seeds", "0", "--steps", "10", "--speedups", "1.4", "--methods", "ours", "diffusers"]
    assert load_script("feature_cache_peers").main(["--model", str(model), *options]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    left_out = {row[0].strip(): int(row[2].strip(" %")) for row in rows}
    assert rows[0][3].strip() == "equal"
    assert left_out["all 10 steps"] == 0
    assert 29 <= left_out["calibrated, for 1.4x"] <= left_out["whole steps (FORA)"]
    for name in ("First-block cache", "TaylorSeer", "MagCache", "PAB"):
        assert any(arm.startswith(name) and share > 0 for arm, share in left_out.items()), name


@pytest.mark.slow  # records, estimates lambda twice and trains, with and without the gradients of weights
def test_feature_cache_cost_rehearses_calibration_and_training(tmp_path: Path) -> None:
    script, out = load_script("feature_cache_cost"), tmp_path / "lines.jsonl"
    options = ["--tiny", "--device", "cpu", "--parts", "calibrate", "training", "--dtypes", "float32"]
    assert script.main([*options, "--out", str(out)]) == 0
    calibrated, frozen, unfrozen = (json.loads(line) for line in out.read_text().splitlines())
    assert calibrated["checking_forwards"] <= 100
    assert [frozen["frozen"], unfrozen["frozen"]] == [True, False]
    assert frozen["seconds_per_1000_steps"] > 0


@pytest.mark.parametrize(("model", "sequence"), [("llama_8b", "awq,gptq"), ("flux1_dev", "quarot,smoothquant")])
def test_calibration_cost_rehearses_without_a_gpu(
    model: str, sequence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("calibration_cost")
    options = ["--model", model, "--tiny", "--device", "cpu", "--samples", "2", "--layers", "2"]
    assert script.main([*options, "--algorithms", sequence, "gptq"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["algorithm"] for line in lines] == [sequence, "gptq"]
    assert {(line["samples"], line["peak_bytes"]) for line in lines} == {(2, None)}
    assert all(line["seconds"] > 0 < line["bytes"] for line in lines)
    assert "2 layers of width" in lines[0]["model"]


def test_reference_results_fill_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, document = load_script("reference_results"), tmp_path / "results.md"
    document.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    options = ["--models", "emoji_ddim", "--presets", "w8a16", "--count", "3", "--steps", "2", "--batch-size", "3"]
    script.main([*options, "--calibration-items", "1", "--out", str(tmp_path / "runs"), "--markdown", str(document)])
    text = document.read_text()
    assert text.startswith(f"before\n{script.BEGIN}\n### emoji_ddim\n")
    assert text.endswith(f"{script.END}\nafter\n")
    assert "old" not in text
    assert "| w8a16 | 3 |" in text
    assert "| w8a16-calibrated | 3 |" in text
    assert "Fréchet distance to dense, emoji classifier features" in text
    assert "FID" not in text
    assert (tmp_path / "runs" / "emoji_ddim" / "report" / "report.html").is_file()
    with pytest.raises(SystemExit, match="the tables go between them"):
        script.put(tmp_path / "runs" / "emoji_ddim" / "report" / "report.md", "x")


@pytest.mark.parametrize("name", [pytest.param("emoji_pixart", marks=pytest.mark.slow), "python_llama"])
def test_four_bits_runs_resumes_and_prints(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, out = load_script("four_bits"), tmp_path / "found.json"
    for constant, value in (("JUDGED_PROMPTS", 2), ("PICTURES", 1), ("STEPS", 2), ("JUDGED_TOKENS", 256)):
        monkeypatch.setattr(script, constant, value)
    kept = {key: script.ALGORITHMS[key] for key in ("dense", "RTN", "QuaRot", "QuaRot residual")}
    monkeypatch.setattr(script, "ALGORITHMS", kept)
    model = EVAL.parent / "examples" / "reference_models" / name
    monkeypatch.setattr(sys, "argv", ["four_bits.py", "--model", str(model), "--out", str(out), "--seeds", "1"])
    script.main()
    printed, arms = capsys.readouterr().out, json.loads(out.read_text())["arms"]
    metric = "perplexity" if name == "python_llama" else "error"
    assert arms["QuaRot/plain/0"][metric] < arms["RTN/plain/0"][metric]
    assert f"| w4a4 | {metric}, plain |" in printed
    assert ("QuaRot residual/plain/0" in arms) == (name == "python_llama")
    monkeypatch.setattr(script, "run_arm", None)
    script.main()
    assert capsys.readouterr().out == printed


def test_calibrated_algorithms_measures_and_prints(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, out = load_script("calibrated_algorithms"), tmp_path / "results.json"
    fixed = ["--prompts", "1", "--samples", "2", "--steps", "2", "--guidance", "1.0", "--iterations", "2"]
    arms = ["--formats", "w8a8", "--algorithms", "rtn", "gptaq", "brecq"]
    script.main(["--model", str(model_folder), "--seeds", "0", "1", "--out", str(out), *fixed, *arms])
    results = json.loads(out.read_text())
    assert set(results["arms"]) == {f"trained/w8a8/{name}/{s}" for name in ("rtn", "gptaq", "brecq") for s in (0, 1)}
    assert all(0 < arm["error"] < 0.1 for arm in results["arms"].values())
    assert "calibrated_algorithms.py" in results["environments"][0]["command"]
    printed = capsys.readouterr().out
    monkeypatch.setattr(script, "measure", None)  # every arm is there already
    script.main(["--model", str(model_folder), "--seeds", "0", "--out", str(out), *fixed, *arms])
    script.main(["--table", str(out)])
    assert "| gptaq | " in printed
    assert capsys.readouterr().out == 2 * printed
    assert printed.splitlines()[0] == "| | w8a8, trained, % | s |"
    with pytest.raises(SystemExit, match="its arms were run with"):
        script.main(["--model", str(model_folder), "--out", str(out), *fixed, *arms, "--samples", "4"])


def test_temporal_quantization_measures_counts_and_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, out = load_script("temporal_quantization"), tmp_path / "results.json"
    fixed = ["--models", "emoji_ddim", "--steps", "2", "--items", "2", "--samples", "4", "--count", "4"]
    arms = ["--formats", "w8a8", "--arms", "rtn", "--seeds", "0", "1"]
    with torch.no_grad():
        script.main([*fixed, *arms, "--out", str(out)])
        results = json.loads(out.read_text())
        assert set(results["arms"]) == {f"emoji_ddim/w8a8/rtn/{seed}" for seed in (0, 1)}
        assert all(0 < arm["error"] < 1 for arm in results["arms"].values()), results["arms"]
        assert all(arm["distance"] > 0 for arm in results["arms"].values()), results["arms"]
        printed = capsys.readouterr().out
        monkeypatch.setattr(script, "Case", None)  # every arm is there already
        script.main([*fixed, *arms, "--out", str(out)])
        script.main(["--table", str(out)])
        assert capsys.readouterr().out == 2 * printed
        with pytest.raises(SystemExit, match="its arms were run with"):
            script.main([*fixed, *arms, "--out", str(out), "--steps", "3"])
        script.main([*fixed, "--evaluations"])
    # Both steps of two items: once through the loop each, or one call and then two.
    cells = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert [cells[i] for i in (1, 2, 4)] == ["4", "4", "6"]
    options = script.parse_arguments(["--rehearse"])
    for arm in script.ARMS:
        weights, *temporal = script.methods(arm, "w4a8", ["time_embedding.linear_1"], 0, options)
        assert bool(temporal) == (arm not in ("rtn", "blocks"))
        assert weights.spec.split_skips == ("split" in arm)


def test_against_llmcompressor_gives_back_dense_weights_of_the_scheme(tmp_path: Path) -> None:
    """This package's half; the other needs an environment of its own."""
    script = load_script("against_llmcompressor")
    tokens = script.calibration_tokens(0, 2)
    assert tokens.shape == (2, script.LENGTH)
    assert not tokens.equal(script.calibration_tokens(1, 2))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    script.main(["--worker", "here", "--arm", "GPTQ", "--folder", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["seconds"] > 0
    dense, found = load_file(script.MODEL / "model.safetensors"), load_file(tmp_path / "weights.safetensors")
    assert set(found) == set(dense)
    for name, weight in found.items():
        levels = [len(group.unique()) for group in weight.reshape(-1, script.GROUP)[:50]]
        if "_proj" in name:
            assert max(levels) <= 16
        else:
            assert weight.equal(dense[name].float()), name
    cell = {"perplexity": [6.5, 6.7], "seconds": [2.0, 4.0]}
    made = {"dense": 6.4, "versions": {}, "arms": {"GPTQ": {"here": cell, "peer": cell}, "AWQ-default": {"here": cell}}}
    lines = script.table(made).splitlines()
    assert lines[-2].endswith("| 6.600 (6.500-6.700) | 6.600 (6.500-6.700) | 3.0 (2.0-4.0) | 3.0 (2.0-4.0) | 1.00 |")
    assert lines[-1].endswith("| 6.600 (6.500-6.700) |  | 3.0 (2.0-4.0) |  |  |")


def test_qat_quality_splits_prompts_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("qat_quality")
    assert not set(script.prompts(128, training=True)) & set(script.prompts(128, training=False))
    options = script.parse_arguments(["--decay-fraction", "0.5", "1"])
    assert script.arms_of(options) == ["start", "lsq", "kd", "efficientdm", "qvgen-0.5", "qvgen-1"]
    assert script.config_of("qvgen-0.5", "w3a3", 1, options).decay_fraction == 0.5
    assert not script.config_of("start", "w4a4", 0, options).has_phi
    arm = {"loss": 0.5, "psnr": 20.0, "motion_error": 0.25, "top1": 1.0, "moved": 1.0, "both": 1.0}
    arms = {"w3a3/start/0": arm, "w4a4/kd/0": arm, "w4a4/kd/1": {**arm, "loss": 0.7, "grad_norm": 3.0}}
    for place, key in enumerate(arms):
        (tmp_path / f"{place}.json").write_text(json.dumps({"teacher": {"top1": 0.9}, "arms": {key: arms[key]}}))
    script.main(["--table", *(str(path) for path in sorted(tmp_path.iterdir()))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| | teacher | |  |  |  | 0.9 |  |  |  |"
    assert (
        lines[3]
        == "| w4a4 | kd | 2 | 0.6 (0.5-0.7) | 20 (20-20) | 0.25 (0.25-0.25) | 1 (1-1) | 1 (1-1) | 1 (1-1) | 3 |"
    )
    assert lines[4].startswith("| w3a3 | start | 1 | 0.5 | 20 |")


@pytest.mark.slow  # draws clips of emoji_wan, and trains it
def test_qat_quality_rehearses_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, out = load_script("qat_quality"), tmp_path / "results" / "qat.json"
    script.main(["--rehearse", "--out", str(out)])
    printed, results = capsys.readouterr().out, json.loads(out.read_text())
    assert list(results["arms"]) == [f"w4a4/{arm}/0" for arm in ("start", "lsq", "kd", "efficientdm", "qvgen-0.8")]
    assert all(0 < arm["loss"] < 1 and arm["psnr"] > 10 and arm["motion_error"] > 0 for arm in results["arms"].values())
    curves = json.loads(out.with_suffix(".curves.json").read_text())
    assert [len(curve.get("grad_norm", ())) for curve in curves.values()] == [0, 8, 8, 8, 8]
    ranks = [len(next(iter(layers.values()))) for layers in curves["w4a4/qvgen-0.8/0"]["spectrum"].values()]
    assert ranks[0] == 4
    assert ranks[-1] == 0
    assert ranks == sorted(ranks, reverse=True)
    monkeypatch.setattr(script, "Bench", None)  # every arm is there already
    script.main(["--rehearse", "--out", str(out)])
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="its arms were run with"):
        script.main(["--rehearse", "--out", str(out), "--learning-rate", "1e-3"])


def test_qat_cost_layers_are_the_released_ones(tmp_path: Path) -> None:
    script, out = load_script("qat_cost"), tmp_path / "bench" / "lines.jsonl"
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 32), torch.randn(1, 9, 64, requires_grad=True)
    nested = script.NestedLinear(linear, (8, 8))
    with torch.no_grad():
        for logits in (nested.upper, nested.lower):
            logits.fill_(20.0)
        nested.up.mul_(10)
        nested.down.mul_(10)
        wanted = torch.nn.functional.linear(x * 0.95, linear.weight + nested.up @ nested.down, linear.bias)
    found = nested(x)
    assert 0 < (found - wanted).abs().max() < 0.2
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter in (*nested.parameters(), x))
    options = ["--tiny", "--device", "cpu", "--repeats", "1", "--parts", "layer", "--out", str(out)]
    assert script.main(options) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["arm"] for line in lines] == [arm for arm in script.ARMS for _ in range(3)]
    assert all(line["forward_ms"] > 0 < line["backward_ms"] for line in lines)
    assert script.main([*options, "--minutes", "0"]) == 0
    assert len(out.read_text().splitlines()) == len(lines)


@pytest.mark.slow  # trains the first layers of Wan at their width of text and feed-forward
def test_qat_cost_rehearses_without_a_gpu(tmp_path: Path) -> None:
    script, out = load_script("qat_cost"), tmp_path / "lines.jsonl"
    options = ["--tiny", "--device", "cpu", "--repeats", "1", "--parts", "model", "boundary"]
    assert script.main([*options, "--weights", "float32", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["what"] for line in lines] == ["step"] * 4 + ["ratio", "boundary"]
    assert [line["arm"] for line in lines[:4]] == list(script.ARMS)
    for line in lines[:4]:
        parts = ("teacher_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds")
        assert sum(line[part] for part in parts) == pytest.approx(line["seconds"])
    assert lines[4]["seconds"] == pytest.approx(lines[1]["seconds"] / lines[2]["seconds"])
    assert lines[5]["ours"] > 0 < lines[5]["released"]
    assert sum(lines[5]["layers"].values()) == lines[2]["layers"]
