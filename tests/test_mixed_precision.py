"""Sensitivity of layers, and formats for each of them under a size; presets that mean their calibrated algorithm."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress.assignment import assign_layers
from diffuse_compress.calibration.samples import Sample
from diffuse_compress.calibration.sensitivity import Split, layer_sensitivities, output_error, split_samples
from diffuse_compress.calls import Call
from diffuse_compress.cli import main
from diffuse_compress.families.published import meta_components, published_config
from diffuse_compress.integrations.component import get_state, quantized_layers
from diffuse_compress.mixed_precision import parse_size
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import quantize_module, replace_module
from diffuse_compress.quantization.presets import PRESETS

LLAMA = Path(__file__).parents[1] / "examples" / "reference_models" / "python_llama"
TWO_BITS = dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT2, dc.PerGroup(64), symmetric=False))
W3, W4, W8 = (
    dc.Scheme(dc.WeightScheme(dc.NumberFormat(f"int{bits}"), dc.PerGroup(32), symmetric=False)) for bits in (3, 4, 8)
)


def items(pipe: Any) -> list[dict[str, Any]]:
    given = tiny.call_kwargs(pipe, steps=3)
    given.pop("generator")
    return [{**given, "prompt": prompt} for prompt in ("a cat", "a dog")]


@pytest.fixture(scope="module")
def recorded() -> dc.Calibration:
    pipe = tiny.build_pipeline("pixart")
    return dc.Calibration.record(pipe, items(pipe), num_samples=3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.down(torch.relu(self.up(x))),)


class Chain(nn.Module):
    """A block whose errors a rotation hands on as they are, so that each layer's is known exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.rotation = nn.utils.parametrizations.orthogonal(nn.Linear(64, 64, bias=False))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sample": self.rotation(self.blocks[0](x)[0])}


def test_layer_sensitivities_equal_those_of_the_whole_model() -> None:
    torch.manual_seed(0)
    model = Chain().train()
    xs = [torch.randn(5, 64) for _ in range(3)]
    layers = ["blocks.0.up", "blocks.0.down"]
    modules = list(model.modules())
    found = layer_sensitivities(
        model,
        {name: [W4, W3, W8] for name in layers},
        RTNConfig(),
        Split((), [Sample(Call((x,))) for x in xs]),
        generator=lambda name: torch.Generator(),
    )
    assert list(model.modules()) == modules
    assert all(module.training for module in modules)
    for name in layers:
        for scheme in (W3, W4, W8):
            changed = copy.deepcopy(model)
            replace_module(changed, name, quantize_module(model.get_submodule(name), scheme, RTNConfig()))
            with torch.no_grad():
                pairs = [(model(x)["sample"].double(), changed(x)["sample"].double()) for x in xs]
            exact = sum(float((y - z).square().sum() / y.square().sum()) for y, z in pairs) / len(pairs)
            assert found[name][scheme] == pytest.approx(exact, rel=1e-3)


def test_a_search_that_is_interrupted_leaves_the_model(recorded: dc.Calibration) -> None:
    pipe = tiny.build_pipeline("pixart")
    modules = list(pipe.transformer.modules())

    def callback(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        if stage.startswith("Measuring the sensitivity") and done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.compress(target_bits=5, calibration=recorded, callback=callback)
    assert list(pipe.transformer.modules()) == modules
    assert not any("forward" in vars(module) for module in modules)


def test_target_size_is_met_planned_edited_saved_and_reloaded(recorded: dc.Calibration, tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart")
    report = dc.sensitivity(pipe, ["w4a16", W3, "w8a16"], calibration=recorded)
    sizes = [pipe.compression_plan("w4a16").bytes_after, pipe.compression_plan("w8a16").bytes_after]
    target = sum(sizes) // 2
    plan = pipe.compression_plan("w4a16", target_size=target, sensitivity=report, algorithm="rtn")
    part = plan.components["transformer"]
    assert 0.97 * target < plan.bytes_after <= target
    assert len(set(part.layers.values())) > 1
    text = str(plan)
    assert "mixed precision for target_size=" in text.splitlines()[1]
    assert f"{part.bits_per_weight:.2f} bits per weight on average: " in text
    name = next(iter(part.layers))
    plan.set(f"transformer.{name}", "w8a16")
    plan.keep("transformer.transformer_blocks.1.attn2")
    pipe.compress(plan, measure=False)
    assert quantized_layers(pipe.transformer)[name].scheme == PRESETS["w8a16"].scheme
    assert not any(".attn2" in name for name in quantized_layers(pipe.transformer) if "_blocks.1." in name)
    assert plan.bytes_after == pipe.compression_report().bytes_after
    picture = tiny.sample(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.sample(again), picture)


def test_mixed_precision_beats_uniform_at_equal_bytes() -> None:
    transformers = pytest.importorskip("transformers")
    tokens = transformers.AutoTokenizer.from_pretrained(LLAMA)((LLAMA / "heldout.txt").read_text(), verbose=False)
    rows = torch.tensor(tokens.input_ids)[: 128 * 24].reshape(24, 128)
    scheme = dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT3, dc.PerGroup(128), symmetric=False))

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(model(input_ids=rows[8:], labels=rows[8:]).loss)

    dense = loss(load())
    uniform, mixed = load().compress(scheme, measure=False), load()
    size = uniform.compression_report().bytes_after
    formats, samples = [scheme, "w4a16", "w8a16", TWO_BITS], [row[None] for row in rows[:4]]
    report = dc.sensitivity(mixed, formats, calibration=samples, algorithm="rtn")
    mixed.compress(target_size=size, sensitivity=report, measure=False)
    assert mixed.compression_report().bytes_after <= size
    assert loss(mixed) - dense < 0.85 * (loss(uniform) - dense)


@pytest.mark.parametrize("preset", ["w4a8", "fp8", "w8a16"])
def test_a_search_stays_with_the_kernels_of_its_preset(preset: str) -> None:
    model = tiny.build("pixart", dtype=torch.bfloat16)
    smallest = {"w4a8": 6.0, "fp8": 11.0, "w8a16": 4.0}[preset]
    part = model.compression_plan(preset, target_bits=smallest).components[""]
    family = {*PRESETS[preset].mixed, *PRESETS[preset].mixed_modulation}
    assert set(part.layers.values()) <= family
    assert {part.layers[name].activation for name in part.layers if ".attn1." in name} == {
        PRESETS[preset].scheme.activation
    }


def test_without_calibration_a_pipeline_is_called_and_a_model_is_not() -> None:
    pipe = tiny.build_pipeline("pixart")
    assert "error of the output, 8 calls" in dc.sensitivity(pipe, ["w4a16"]).basis
    report = dc.sensitivity(tiny.build("llama"), ["w8a16", W4])
    assert report.basis == "error of weights, by their share"
    data = json.loads(json.dumps(report.to_dict()))
    assert list(data["schemes"]) == ["w4a16", "w8a16"]
    errors = [layer["relative_error"] for layer in data["layers"]]
    assert all(error["w4a16"] > 5 * error["w8a16"] > 0 for error in errors)
    assert [e["w4a16"] for e in errors] == sorted((e["w4a16"] for e in errors), reverse=True)
    assert data["layers"][0]["layer"] in str(report).splitlines()[2]


def test_overridden_layers_are_no_candidates() -> None:
    model = tiny.build("llama")
    plan = model.compression_plan("w4a16", target_bits=6, overrides={"q_proj": "w8a16", "o_proj": None})
    layers = plan.components[""].layers
    assert {scheme for name, scheme in layers.items() if "q_proj" in name} == {PRESETS["w8a16"].scheme}
    assert not any("o_proj" in name for name in layers)


def test_errors_say_what_can_be() -> None:
    model = tiny.build("llama")
    with pytest.raises(dc.ConfigError, match="target_size= or target_bits=, not both"):
        model.compress(target_size="1MB", target_bits=4)
    with pytest.raises(dc.ConfigError, match="target_bits: average bits per weight"):
        model.compress(target_bits=0)
    with pytest.raises(dc.ConfigError, match="there is nothing to compress"):
        model.compress(target_size="1GB")
    with pytest.raises(dc.ConfigError, match="and no target"):
        model.compress("w4a16", sensitivity=dc.sensitivity(model, ["w4a16"]))
    other = dc.sensitivity(model, modules_to_not_convert=["q_proj"])
    with pytest.raises(dc.ConfigError, match="knows nothing of"):
        model.compress(target_bits=5, sensitivity=other)
    with pytest.raises(
        dc.ConfigError, match=r"cannot be met, the smallest possible is [\d.]+ [kM]B with w4a16"
    ) as found:
        model.compress(target_size="1kB")
    smallest = str(found.value).split("smallest possible is ")[1].split(" with")[0]
    assert model.compression_plan(target_size=smallest).bytes_after <= parse_size(smallest)
    recipe = tiny.build("llama").compress("w8a16", measure=False).compression_recipe()
    with pytest.raises(dc.ConfigError, match="a resolved recipe fixes the format of every layer"):
        model.compress(recipe.components["denoisers"][0], target_bits=5)
    with pytest.raises(dc.ModelStateError, match="on the meta device"):
        dc.compression_plan(copy.deepcopy(model).to("meta"), target_bits=5)
    assert not quantized_layers(model)


@pytest.mark.parametrize(
    ("text", "size"), [("11GB", 11 * 10**9), ("10 GiB", 10 * 2**30), ("1.5mb", 1_500_000), ("7B", 7), (123, 123)]
)
def test_parse_size(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["11", "GB", "11 gigs", "-1GB", 0, True, float("nan")])
def test_parse_size_refuses(text: Any) -> None:
    with pytest.raises(dc.ConfigError, match="target_size: bytes, or a text"):
        parse_size(text)


def test_formats_of_many_layers_make_a_small_config() -> None:
    (model,) = meta_components("flux1_dev", published_config("flux1_dev").denoisers, dtype=torch.bfloat16).values()
    plan = dc.compression_plan(model, "w4a16")
    part, draw = plan.components[""], random.Random(0)
    wanted = {name: draw.choice([*PRESETS["w4a16"].mixed, None]) for name in part.layers}
    part.assign(wanted)
    assert {name: part.layers.get(name) for name in wanted} == wanted
    text = json.dumps(part.resolved_config.to_dict())
    assert len(wanted) > 400
    assert len(text) < 60_000
    rules = dc.QuantizationConfig.from_dict(json.loads(text)).spec
    assert {name: item.scheme for name, item in assign_layers(model, rules).items() if name in wanted} == wanted


# --- presets with calibration -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_take_their_calibrated_algorithm(preset: str, recorded: dc.Calibration) -> None:
    pipe = tiny.build_pipeline("pixart")
    plan = pipe.compression_plan(preset, calibration=recorded)
    assert plan.components["transformer"].spec.algorithm == PRESETS[preset].calibrated
    assert PRESETS[preset].calibrated.summary in str(plan).splitlines()[0]


def test_the_documented_table_is_what_presets_mean() -> None:
    text = (LLAMA.parents[2] / "docs" / "calibration.md").read_text(encoding="utf-8")
    for name, preset in PRESETS.items():
        alone = "refused" if preset.needs_calibration else preset.algorithm.summary
        assert f"| `{name}` | {alone} | {preset.calibrated.summary} |" in text


def test_a_preset_with_calibration_is_compressed_by_it(recorded: dc.Calibration) -> None:
    pipe = tiny.build_pipeline("pixart").compress("w4a16", calibration=recorded, measure=False)
    assert "GPTQ" in str(pipe.compression_report())
    assert get_state(pipe.transformer).config.spec.preset == "w4a16"
    pipe.compress("w4a16", calibration=recorded)  # the same again is nothing to do


def test_a_named_algorithm_and_components_without_samples_are_left_alone(recorded: dc.Calibration) -> None:
    pipe = tiny.build_pipeline("pixart")
    config = dc.QuantizationConfig("w8a8", modules_to_not_convert=["attn2"])
    plan = pipe.compression_plan({"transformer": config, "text_encoder": "w8a16"}, calibration=recorded)
    assert plan.components["transformer"].spec.algorithm == PRESETS["w8a8"].calibrated
    assert plan.components["text_encoder"].spec.algorithm == RTNConfig()
    plan = pipe.compression_plan(dc.QuantizationConfig("w8a8", dc.AWQConfig()), calibration=recorded)
    assert plan.components["transformer"].spec.algorithm == dc.AWQConfig()


# --- command line -----------------------------------------------------------------------------------------------


def test_command_line_takes_targets_and_calibration(
    recorded: dc.Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, out, samples = tmp_path / "dense", tmp_path / "out", tmp_path / "calibration.safetensors"
    tiny.build_pipeline("pixart").save_pretrained(dense)
    recorded.save(samples)
    command = ["compress", str(dense), "--recipe", "w4a8", "--target-bits", "6"]
    command += ["--calibration", str(samples)]
    assert main([*command, "--dry-run"]) == 0
    assert (
        "mixed precision for target_bits=6 by error of the output, 1 calls, GPTQ (activation order) on 2 others; tried, "
        in capsys.readouterr().out
    )
    assert main([*command, "--out", str(out), "--no-measure"]) == 0
    pipe = type(tiny.build_pipeline("pixart")).from_pretrained(out)
    assert len({layer.scheme for layer in quantized_layers(pipe.transformer).values()}) > 1
    assert get_state(pipe.transformer).config.spec.algorithm == PRESETS["w4a8"].calibrated
    assert main(["compress", str(dense), "--target-size", "1kB", "--out", str(out)]) == 1
    assert "the smallest possible is" in capsys.readouterr().err
