"""Sensitivity of layers, and formats for each of them under a size; presets that mean their calibrated algorithm."""

from __future__ import annotations

import copy
import dataclasses
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
from diffuse_compress.plan_text import format_bytes
from diffuse_compress.quantization.algorithms.base import SequenceConfig
from diffuse_compress.quantization.algorithms.gptq import round_columns
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.allocation import allocate
from diffuse_compress.quantization.convert import quantize_module, replace_module
from diffuse_compress.quantization.presets import PRESETS

LLAMA = Path(__file__).parents[1] / "examples" / "reference_models" / "python_llama"
TWO_BITS = dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT2, dc.PerGroup(64), symmetric=False))
W3, W4, W8 = (
    dc.Scheme(dc.WeightScheme(dc.NumberFormat(f"int{bits}"), dc.PerGroup(32), symmetric=False)) for bits in (3, 4, 8)
)

FEW = {"modules_to_not_convert": ["attn1", "attn2"]}
"""Fewer layers to measure, in tests of what comes after."""


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


def samples(*xs: torch.Tensor) -> list[Sample]:
    return [Sample(Call((x,)), item=index) for index, x in enumerate(xs)]


def no_seed(name: str) -> torch.Generator:
    return torch.Generator()


@pytest.mark.parametrize("device", [None, "cpu:0"])  # compared by name: blocks are run "elsewhere"
@pytest.mark.parametrize("algorithm", [RTNConfig(), dc.GPTQConfig()])
def test_layer_sensitivities_equal_those_of_the_whole_model(algorithm: Any, device: str | None) -> None:
    torch.manual_seed(0)
    model = Chain().train()
    fit, judge = samples(*torch.randn(3, 40, 64)), samples(*torch.randn(2, 5, 64))
    layers = ["blocks.0.up", "blocks.0.down"]
    modules = list(model.modules())
    found = layer_sensitivities(
        model,
        {name: [W4, W3, W8] for name in layers},
        algorithm,
        Split(fit, judge),
        generator=no_seed,
        device=device,
    )
    assert list(model.modules()) == modules
    assert all(module.training for module in modules)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in modules)
    for name in layers:
        for scheme in (W3, W4, W8):
            changed = copy.deepcopy(model)
            if algorithm.needs_calibration:
                x = torch.cat([sample.call.args[0] for sample in fit]).detach()
                x = x if name.endswith("up") else torch.relu(model.blocks[0].up(x)).detach()
                weight, hessian = model.get_submodule(name).weight.detach().clone(), x.T @ x
                weight, _ = round_columns(weight, hessian, scheme.weight, algorithm)
                changed.get_submodule(name).weight.data = weight
            else:
                replace_module(changed, name, quantize_module(model.get_submodule(name), scheme, algorithm))
            xs = [sample.call.args[0] for sample in judge]
            with torch.no_grad():
                pairs = [(model(x)["sample"].double(), changed(x)["sample"].double()) for x in xs]
            exact = sum(float((y - z).square().sum() / y.square().sum()) for y, z in pairs) / len(pairs)
            assert found[name][scheme] == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("device", [None, "cpu:0"])
def test_errors_count_as_their_samples_and_tokens_do(device: str | None) -> None:
    torch.manual_seed(0)
    model, given = Chain(), samples(*(scale * torch.randn(2, 5, 64) for scale in (1.0, 0.1)))
    measured = {"generator": no_seed, "device": device}

    def error(*weights: float | torch.Tensor) -> float:
        weighted = [dataclasses.replace(sample, weight=w) for sample, w in zip(given, weights, strict=True)]
        split = split_samples(weighted, RTNConfig())
        whole = output_error(model, {"blocks.0.up": W3}, RTNConfig(), split, **measured)
        alone = layer_sensitivities(model, {"blocks.0.up": [W3]}, RTNConfig(), split, **measured)
        assert alone["blocks.0.up"][W3] == pytest.approx(whole, rel=1e-4)
        return whole

    first, second = error(1.0, 0.0), error(0.0, 1.0)
    assert abs(first - second) > 0.02 * first
    assert error(3.0, 1.0) == pytest.approx((3 * first + second) / 4, rel=1e-5)
    assert error(3.0 * torch.ones(10), 1.0) == pytest.approx((3 * first + second) / 4, rel=1e-5)
    rows = torch.zeros(10)
    rows[:5] = 2.0
    given[0] = dataclasses.replace(given[0], call=Call((given[0].call.args[0][:1],)))
    expected = error(1.0, 0.0)
    given[0] = dataclasses.replace(given[0], call=Call((torch.cat([given[0].call.args[0], torch.ones(1, 5, 64)]),)))
    assert error(rows, 0.0) == pytest.approx(expected, rel=1e-5)


def test_padding_does_not_count_in_a_search() -> None:
    model, ids = tiny.build("llama"), torch.randint(2, 100, (1, 12), generator=torch.Generator().manual_seed(3))
    padded = torch.cat([ids, torch.zeros(1, 20, dtype=torch.long)], dim=1)
    item = {"input_ids": padded, "attention_mask": (torch.arange(32) < 12).long()[None]}
    alone, among = (
        dc.sensitivity(model, [W3], calibration=[given], algorithm="rtn").of("") for given in ({"input_ids": ids}, item)
    )
    for name, errors in alone.items():
        assert among[name][W3] == pytest.approx(errors[W3], rel=1e-3)


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_a_choice_is_tried_with_the_static_inputs_of_the_plan(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    static = dc.Scheme(dc.WeightScheme("int8"), dc.ActivationScheme("int8", dc.PerTensor(), dynamic=False))
    model, observer = tiny.build("llama", num_hidden_layers=1), dc.ObserverConfig("percentile", percentile=60.0)
    rows = torch.randint(2, 100, (4, 1, 24), generator=torch.Generator().manual_seed(3))
    config = dc.QuantizationConfig("w8a8", algorithm=algorithm, overrides={"up_proj": static}, observer=observer)
    ratios: list[float] = []

    def tried(*args: Any, **kwargs: Any) -> float:
        found, wide = (output_error(*args, **{**kwargs, "observer": which}) for which in (kwargs["observer"], None))
        ratios.append(found / wide)
        return found

    monkeypatch.setattr("diffuse_compress.layer_sensitivity.output_error", tried)
    model.compression_plan(config, target_bits=6, calibration=[{"input_ids": row} for row in rows])
    assert len(ratios) == 2
    assert min(ratios) > 1.5  # 40 % of the inputs of a layer are clipped


class Pair(nn.Module):
    """Two layers alike, beside each other, whose inputs differ: ``fixable`` is given few directions, ``hard`` all."""

    def __init__(self) -> None:
        super().__init__()
        self.fixable, self.hard = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([1.5 * self.fixable(x[..., :64]), self.hard(x[..., 64:])], dim=-1)


def test_formats_are_chosen_by_what_the_algorithm_makes_of_a_layer() -> None:
    """Rounding hurts one layer more; GPTQ mends that one, and the bits belong to the other."""
    torch.manual_seed(0)
    model, directions = Pair(), torch.randn(4, 64) / 2

    def drawn() -> torch.Tensor:
        return torch.cat([torch.randn(64, 4) @ directions, torch.randn(64, 64)], dim=1)

    split = Split(samples(*(drawn() for _ in range(4))), samples(*(drawn() for _ in range(4))))
    names, schemes = ["fixable", "hard"], [W3, W8]
    measured = {
        algorithm: layer_sensitivities(model, dict.fromkeys(names, schemes), algorithm, split, generator=no_seed)
        for algorithm in (RTNConfig(), dc.GPTQConfig())
    }
    chosen = {
        algorithm: allocate([[3, 8]] * 2, [[errors[name][scheme] for scheme in schemes] for name in names], 11)
        for algorithm, errors in measured.items()
    }
    assert chosen == {RTNConfig(): [1, 0], dc.GPTQConfig(): [0, 1]}
    by_rounding, by_gptq = (
        output_error(
            model,
            {name: schemes[option] for name, option in zip(names, choice, strict=True)},
            dc.GPTQConfig(),
            Split(split.fit, samples(*(drawn() for _ in range(4)))),
            generator=no_seed,
        )
        for choice in chosen.values()
    )
    assert by_gptq < 0.1 * by_rounding


def test_samples_are_split_by_item() -> None:
    def numbered(*items: int) -> list[Sample]:
        return [Sample(Call(), item=item, step=step) for step, item in enumerate(items)]

    given = numbered(0, 1, 2, 3, 0, 1, 2, 3)
    split = split_samples(given, dc.GPTQConfig())
    assert {s.item for s in split.fit} == {0, 2}
    assert {s.item for s in split.judge} == {1, 3}
    assert len(split.fit) + len(split.judge) == len(given)
    assert split_samples(given, RTNConfig()) == Split((), given)
    one = split_samples(numbered(5, 5, 5), dc.GPTQConfig())
    assert ([s.step for s in one.fit], [s.step for s in one.judge]) == ([0, 2], [1])
    single = numbered(0)
    assert split_samples(single, dc.GPTQConfig()) == Split(single, single)
    many = split_samples(numbered(*range(128)), dc.GPTQConfig())
    assert (len(many.fit), len(many.judge)) == (112, 16)


def test_a_search_takes_algorithms_in_their_quick_form() -> None:
    gptq = dc.GPTQConfig(true_sequential=False)
    assert dc.GPTQConfig(asymmetric=True).for_search() == gptq
    assert dc.BRECQConfig().for_search() == gptq
    both = SequenceConfig((dc.AWQConfig(), dc.AdaRoundConfig()))
    assert both.for_search() == SequenceConfig((dc.AWQConfig(), gptq))


@pytest.mark.parametrize(("stage", "share"), [("Measuring", 0.3), ("Measuring", 0.8), ("Trying", 0.5)])
def test_a_search_that_is_interrupted_leaves_the_model(recorded: dc.Calibration, stage: str, share: float) -> None:
    pipe = tiny.build_pipeline("pixart")
    modules = list(pipe.transformer.modules())
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}

    def callback(at: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        if at.startswith(stage) and done >= share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.compress("w4a8", target_bits=6, calibration=recorded, callback=callback)
    assert list(pipe.transformer.modules()) == modules
    assert not any("forward" in vars(module) or module._forward_hooks for module in modules)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_mixture_that_loses_against_one_format_is_not_taken(recorded: dc.Calibration) -> None:
    """A report that is wrong about some layers: their worst format is said to be as good as any."""
    pipe = tiny.build_pipeline("pixart")
    report = dc.sensitivity(pipe, [TWO_BITS, W3, W4], calibration=recorded, **FEW)
    size = pipe.compression_plan(W4, **FEW).bytes_after
    split = split_samples(recorded.of("transformer"), dc.GPTQConfig())

    def error(plan: dc.CompressionPlan) -> float:
        part = plan.components["transformer"]
        return output_error(pipe.transformer, part.layers, part.spec.algorithm, split, generator=part.spec.generator)

    uniform = pipe.compression_plan(W4, algorithm="gptq", calibration=recorded, **FEW)
    plan = pipe.compression_plan(target_size=size, sensitivity=report, calibration=recorded, **FEW)
    assert plan.bytes_after <= size
    assert error(plan) <= error(uniform)
    wrong = copy.copy(report)
    wrong.layers = [
        dataclasses.replace(item, errors=dict.fromkeys(item.errors, 0.0)) if ".ff.net.0" in item.layer else item
        for item in report.layers
    ]
    plan = pipe.compression_plan(target_size=size, sensitivity=wrong, calibration=recorded, **FEW)
    assert plan.search.endswith(", which is taken")
    assert set(plan.components["transformer"].layers.values()) == {W4}
    assert plan.bytes_after == size


def test_components_devices_and_convolutions() -> None:
    """Two components under one size, on "another" device (``cpu:0`` is compared by name) as at home."""
    pipe = tiny.build_pipeline("stable_diffusion")
    components = ["unet", "text_encoder"]
    recorded = dc.Calibration.record(pipe, items(pipe), num_samples=2, components=components)
    left_out = {"modules_to_not_convert": ["down_blocks", "mid_block", "up_blocks.1", "resnets.1", "layers.0"]}
    shared = {"calibration": recorded, **left_out}
    reports = [
        dc.sensitivity(pipe, [W4, "w8a16"], components=components, device=device, **shared)
        for device in (None, "cpu:0")
    ]
    assert reports[0].to_dict() == reports[1].to_dict()
    assert {item.component for item in reports[0].layers} == set(components)
    assert any(item.layer == "up_blocks.0.resnets.0.conv1" for item in reports[0].layers)
    assert reports[0].basis == "error of the output, 1 call, GPTQ (activation order) on 1 other"
    both = dict.fromkeys(components, W4)
    size = pipe.compression_plan(both, algorithm="rtn", **left_out).bytes_after
    pinned = {"*.conv2": "w8a16", "*.fc2": None}
    plans = [
        pipe.compression_plan(
            both,
            algorithm="gptq",
            target_size=1.1 * size,
            sensitivity=report,
            overrides=pinned,
            device=device,
            **shared,
        )
        for report, device in zip(reports, (None, "cpu:0"), strict=True)
    ]
    assert plans[0].search == plans[1].search
    assert "; tried, its error is " in plans[0].search
    assert plans[0].bytes_after <= 1.1 * size
    layers = {name: part.layers for name, part in plans[0].components.items()}
    assert {scheme for name, scheme in layers["unet"].items() if ".conv2" in name} == {PRESETS["w8a16"].scheme}
    assert not any(".fc2" in name for name in layers["text_encoder"])


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
    assert "edited" not in text
    plan.set(f"transformer.{name}", "w8a16")
    plan.keep("transformer.transformer_blocks.1.attn2")
    over = format_bytes(plan.bytes_after - target)
    assert str(plan).splitlines()[1].endswith(f"; edited since, now {over} over that")
    pipe.compress(plan, measure=False)
    assert str(pipe.compression_report()).startswith(
        "PixArtAlphaPipeline compressed: formats mixed around w4a16 by round-to-nearest"
    )
    assert quantized_layers(pipe.transformer)[name].scheme == PRESETS["w8a16"].scheme
    assert not any(".attn2" in name for name in quantized_layers(pipe.transformer) if "_blocks.1." in name)
    assert plan.bytes_after == pipe.compression_report().bytes_after
    picture = tiny.sample(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.sample(again), picture)
    for report in (pipe.compression_report(), again.compression_report()):
        assert plan.outcome in str(report)
        assert plan.outcome in report.to_markdown()


def test_an_edit_within_the_size_is_told_and_another_search_starts_anew() -> None:
    model = tiny.build("llama")
    plan = model.compression_plan(target_bits=6)
    plan.set("model.layers.0.mlp.up_proj", TWO_BITS)
    assert str(plan).splitlines()[1].endswith("; edited since")
    anew = model.compression_plan(plan)
    assert anew.outcome == plan.outcome
    again = model.compression_plan(anew, target_bits=5)
    assert again.outcome.startswith("mixed precision for target_bits=5 ")
    assert "edited" not in again.outcome
    assert again.components[""].layers["model.layers.0.mlp.up_proj"] == TWO_BITS
    assert again.components[""].bits_per_weight <= 5


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


def test_a_search_rotates_what_the_plan_rotates() -> None:
    config = dc.QuantizationConfig("w4a4", algorithm=dc.QuaRotConfig())
    model = tiny.build("pixart")
    planned = model.compression_plan(config).components[""].layers
    plan = model.compression_plan(config, target_bits=6)
    for item in plan.sensitivity.layers:
        assert {s.input_rotation for s in item.errors if s.activation} == {planned[item.layer].input_rotation} - {None}
    schemes = plan.sensitivity.schemes
    assert len(plan.sensitivity.to_dict()["schemes"]) == len(schemes) > len({scheme.name for scheme in schemes})
    layers = plan.components[""].layers.values()
    assert {bool(scheme.activation) == bool(scheme.input_rotation) for scheme in layers} == {True}
    assert len({scheme.activation for scheme in layers}) > 2


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
    with pytest.raises(dc.ConfigError, match="target_bits: average bits per weight"):
        model.compress(target_bits=float("inf"))
    with pytest.raises(dc.ConfigError, match="there is nothing to compress"):
        model.compress(target_size="1GB")
    with pytest.raises(dc.ConfigError, match="and no target"):
        model.compress("w4a16", sensitivity=dc.sensitivity(model, ["w4a16"]))
    with pytest.raises(dc.ConfigError, match="needs calibration data, got none"):
        dc.sensitivity(model, algorithm="gptq")
    other = dc.sensitivity(model, modules_to_not_convert=["q_proj"])
    with pytest.raises(dc.ConfigError, match="knows nothing of"):
        model.compress(target_bits=5, sensitivity=other)
    with pytest.raises(dc.ConfigError, match="every layer that is converted is named in overrides="):
        model.compress(target_bits=5, overrides={"*": "w8a16"})
    wider = dc.sensitivity(tiny.build("llama", intermediate_size=512))
    with pytest.raises(dc.ConfigError, match=r"of shape \(256, 128\), the report has one of shape \(512, 128\)"):
        model.compress(target_bits=5, sensitivity=wider)
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


@pytest.mark.parametrize("text", ["11", "GB", "11 gigs", "-1GB", 0, True, float("nan"), float("inf")])
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
    basis = "error of the output, 1 call, GPTQ (activation order) on 2 others; tried, "
    assert f"mixed precision for target_bits=6 by {basis}" in capsys.readouterr().out
    assert main([*command, "--out", str(out), "--no-measure"]) == 0
    pipe = type(tiny.build_pipeline("pixart")).from_pretrained(out)
    assert len({layer.scheme for layer in quantized_layers(pipe.transformer).values()}) > 1
    assert get_state(pipe.transformer).config.spec.algorithm == PRESETS["w4a8"].calibrated
    assert main(["compress", str(dense), "--target-size", "1kB", "--out", str(out)]) == 1
    assert "the smallest possible is" in capsys.readouterr().err
