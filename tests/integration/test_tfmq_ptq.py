"""TFMQ as a whole through compress, save_pretrained and from_pretrained: what reconstruction sees of the timestep path,
split convolutions, attention on int8 codes, first and last layers, and the names for all of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress.assignment import split_layers
from diffuse_compress.calibration import engine
from diffuse_compress.errors import ConfigError
from diffuse_compress.families.base import Dependence
from diffuse_compress.integrations.attention import set_attention
from diffuse_compress.integrations.component import install_placeholders, layers_of_checkpoint, quantized_layers
from diffuse_compress.method_presets import METHOD_PRESETS
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.split import SplitConv2d
from diffuse_compress.recipe import as_recipe
from diffuse_compress.temporal.config import Scope
from diffuse_compress.temporal.features import PATH_KINDS
from diffuse_compress.temporal.layout import layout_of
from diffuse_compress.temporal.maintenance import maintained_of
from diffuse_compress.temporal.step_scales import CONSUMER, detach_step_scales, step_scales_of
from tiny import denoiser, reloaded
from tolerance import KERNEL, assert_close

MODELS = Path(__file__).parents[2] / "examples" / "reference_models"
STEPS = 4
BRECQ = dc.BRECQConfig(iterations=2)
STATIC = dc.Scheme(dc.WeightScheme("int8"), dc.ActivationScheme("int8", dc.PerTensor(), dynamic=False, symmetric=False))
ITEMS = [{"prompt": prompt, "num_inference_steps": STEPS} for prompt in ("a red boat", "an owl")]

pytestmark = pytest.mark.usefixtures("fewer_timesteps")

# A block or two tell as much as all of them, in less time.
LEFT = {
    "stable_diffusion": ["up_blocks", "mid_block", "*.attentions"],
    "flux": ["single_transformer_blocks", "*.attn", "*.ff_context", "*.norm1_context"],
}


def path(way: str) -> dc.TFMQConfig:
    return dc.TFMQConfig(maintenance=way, num_inference_steps=STEPS, iterations=10)


def picture(pipe: Any) -> torch.Tensor:
    return tiny.sample(pipe, num_inference_steps=STEPS)


def calibration_of(pipe: Any) -> dc.Calibration:
    return dc.Calibration.record(pipe, ["a red cat"], num_samples=2, num_inference_steps=STEPS, height=32, width=32)


class Seen:
    """What blocks were like when they were reconstructed: of each layer of the path (its class in the block, its class
    in the unchanged block), and the layers that were learned there."""

    def __init__(self, monkeypatch, layers) -> None:
        self.path: dict[str, tuple[type, type]] = {}
        self.learned: set[str] = set()
        stock = engine.calibrate_block

        def calibrate_block(work, algorithm):
            for name in layers:
                if name.startswith(f"{work.name}."):
                    short = name.removeprefix(f"{work.name}.")
                    self.path[name] = tuple(type(b.get_submodule(short)) for b in (work.block, work.reference_block))
            self.learned |= {work.full_name(name) for name in work.layers}
            stock(work, algorithm)

        monkeypatch.setattr(engine, "calibrate_block", calibrate_block)


@pytest.mark.parametrize(
    ("name", "way"), [("stable_diffusion", "tib"), ("stable_diffusion", "cache"), ("flux", "cache")]
)
def test_blocks_are_reconstructed_without_the_timestep_path(name, way, tmp_path, monkeypatch):
    pipe, other = tiny.build_pipeline(name), tiny.build_pipeline(name)
    kinds = layout_of(denoiser(pipe), path(way).table).layers
    kinds = {layer: kind for layer, kind in kinds.items() if kind is not Dependence.CONDITION}
    seen, calibration = Seen(monkeypatch, kinds), calibration_of(pipe)
    dense = {layer: denoiser(other).get_submodule(layer) for layer in kinds}
    config = dc.QuantizationConfig("w4a8", BRECQ, modules_to_not_convert=LEFT[name])
    pipe.compress(config, path(way), calibration=calibration, measure=False)
    layers = quantized_layers(denoiser(pipe))
    own = {layer for layer in kinds if layer in layers}
    assert own
    assert seen.learned == {layer for layer in layers if layer not in own}
    # The block computes with what it will have: learned codes, or what a table of the dense weights holds.
    for layer, (present, unchanged) in seen.path.items():
        looked_up = way == "cache" and kinds[layer] is Dependence.TIMESTEP
        assert present is (nn.Linear if looked_up or layer not in own else QuantizedLinear), layer
        assert unchanged is nn.Linear, layer  # and is to give what the dense model does
    if way == "tib":  # the same codes as beside any other algorithm
        same = dc.QuantizationConfig("w4a8", dc.RTNConfig(), modules_to_not_convert=LEFT[name])
        other.compress(same, path(way), measure=False)
        expected = {layer: quantized_layers(denoiser(other))[layer] for layer in own}
    else:
        nearest = {layer: layers[layer].scheme for layer in own}
        expected = {layer: quantize_module(dense[layer], s, dc.RTNConfig()) for layer, s in nearest.items()}
    assert all(torch.equal(layers[layer].qweight, expected[layer].qweight) for layer in own)
    found = picture(pipe)
    assert torch.equal(picture(reloaded(pipe, tmp_path)), found)


def test_blocks_meet_the_codes_of_a_layer_that_is_looked_up_at_some_timesteps_only(monkeypatch):
    pipe = tiny.build_pipeline("stable_diffusion")
    seen = Seen(monkeypatch, [name for name, _ in pipe.unet.named_modules() if name.endswith("time_emb_proj")])
    config = dc.QuantizationConfig("w4a8", BRECQ, modules_to_not_convert=LEFT["stable_diffusion"])
    auto = replace(path("auto"), table_budget=1300)  # all rows of a layer take 512 or 1024 bytes
    pipe.compress(config, auto, calibration=calibration_of(pipe), measure=False)
    found = maintained_of(pipe.unet)
    whole = set(found.cached) - found.rows.keys()
    assert whole & seen.path.keys()
    assert found.rows.keys() & seen.path.keys()
    for layer, (present, unchanged) in seen.path.items():
        assert present is (nn.Linear if layer in whole else QuantizedLinear), layer
        assert unchanged is nn.Linear, layer


def test_without_a_method_for_the_path_blocks_learn_it_too(monkeypatch):
    pipe = tiny.build_pipeline("stable_diffusion")
    seen = Seen(monkeypatch, [])
    config = dc.QuantizationConfig("w4a8", BRECQ, modules_to_not_convert=LEFT["stable_diffusion"])
    pipe.compress(config, calibration=calibration_of(pipe), measure=False)
    assert any(name.endswith("time_emb_proj") for name in seen.learned)


def test_a_layer_looked_up_is_dense_for_the_blocks_and_a_failure_leaves_all_as_it_was(monkeypatch):
    pipe = tiny.build_pipeline("stable_diffusion")
    before = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    modules = {name: type(module) for name, module in pipe.unet.named_modules()}
    stock, calls = engine.calibrate_block, []

    def fails(work, algorithm):
        calls.append(work.name)
        stock(work, algorithm)
        if work.name.startswith("up_blocks.0"):
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "calibrate_block", fails)
    kept = ["down_blocks.0", "mid_block"]
    given = {"split_skips": True, "attention": "int8", "modules_to_not_convert": kept}
    config = dc.QuantizationConfig("w8a8", BRECQ, **given)
    with pytest.raises(KeyboardInterrupt):
        pipe.compress(config, path("auto"), calibration=calibration_of(pipe), measure=False)
    assert calls == ["down_blocks.1.resnets.0", "up_blocks.0.resnets.0"]
    assert modules == {name: type(module) for name, module in pipe.unet.named_modules()}
    assert all(torch.equal(tensor, before[key]) for key, tensor in pipe.unet.state_dict().items())
    assert "Quantized" not in type(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor).__name__


@pytest.mark.parametrize("way", ["tib", "cache"])
def test_static_inputs_have_a_scale_for_each_step_beside_all_of_it(way, tmp_path):
    """Blocks without the path, split convolutions, the path's ranges, and scales of every step: saved as they are."""
    pipe = tiny.build_pipeline("stable_diffusion")
    kinds = layout_of(pipe.unet, path(way).table).layers
    kept = ["down_blocks", "mid_block", "up_blocks.1", "*.attentions"]
    given = {"overrides": {"time_embedding.*": STATIC}, "modules_to_not_convert": kept}
    config = dc.QuantizationConfig(STATIC, BRECQ, split_skips=True, **given)
    plan = pipe.compression_plan(config, replace(path(way), scope="all"), calibration=ITEMS)
    wanted = set(plan.components["unet"].layers)
    assert f"input scales of {len(wanted)} at each step" in str(plan)
    pipe.compress(plan, measure=False)
    assert plan.components["unet"].made_dynamic == []
    qparams = step_scales_of(pipe.unet).qparams
    assert set(qparams.layers) == wanted
    assert len(qparams.timesteps) == STEPS
    of_path = [qparams.layers.index(name) for name in wanted if kinds.get(name, Dependence.CONDITION) in PATH_KINDS]
    assert len(of_path) > 2
    assert (qparams.scale[of_path].std(dim=1) > 0).all()
    hidden, skip = (qparams.layers.index(f"up_blocks.0.resnets.0.conv1.{part}") for part in ("hidden", "skip"))
    assert not torch.equal(qparams.scale[hidden], qparams.scale[skip])
    expected = picture(pipe)
    stats = dc.compression_stats(pipe, strict=True).components["unet"].methods
    assert stats[CONSUMER].hits == STEPS * len(wanted)
    again = reloaded(pipe, tmp_path)
    assert torch.equal(picture(again), expected)
    assert torch.equal(step_scales_of(again.unet).qparams.scale, qparams.scale)
    assert dc.compression_recipe(again).components["unet"][1].scope is Scope.ALL
    detach_step_scales(again.unet)
    assert not torch.equal(picture(again), expected)


# --- split ------------------------------------------------------------------------------------------------------


def concatenations(model: Any, sample: Any) -> dict[str, int]:
    """{convolution fed with torch.cat([hidden states, skip]): channels of the first}, seen in a run of the model."""
    widths: list[tuple[torch.Tensor, int]] = []
    stock, found = torch.cat, {}

    def cat(tensors, dim=0, **kwargs):
        result = stock(tensors, dim=dim, **kwargs)
        if len(tensors) == 2 and dim == 1 and tensors[0].ndim == 4:
            widths.append((result, tensors[0].shape[1]))
        return result

    def note(name):
        def enter(module, args):
            if widths and widths[-1][0] is args[0]:
                found[name] = widths[-1][1]

        return enter

    blocks = {n: m for n, m in model.named_modules() if type(m).__name__ == "ResnetBlock2D"}
    handles = [block.register_forward_pre_hook(note(name)) for name, block in blocks.items()]
    torch.cat = cat
    try:
        with torch.no_grad():
            model(**sample)
    finally:
        torch.cat = stock
        for handle in handles:
            handle.remove()
    parts = [(name, leaf) for name in found for leaf in ("conv1", "conv_shortcut")]
    return {f"{n}.{leaf}": found[n] for n, leaf in parts if getattr(blocks[n], leaf) is not None}


@pytest.mark.parametrize("name", ["unet_sd1", "unet_sdxl", "emoji_ddim"])
def test_the_family_knows_where_skip_connections_are_concatenated(name):
    if name == "emoji_ddim":
        model = DiffusionPipeline.from_pretrained(MODELS / name).unet
        sample = {"sample": torch.randn(1, 3, 32, 32), "timestep": 500}
    else:
        model = tiny.build(name)
        sample = tiny.inputs_for(model)
    found = split_layers(model)
    assert found == concatenations(model, sample)
    assert len(found) >= 4


def test_a_class_or_stage_that_concatenates_nothing_has_nothing_to_split():
    assert split_layers(tiny.build("dit")) == {}
    plan = tiny.build_pipeline("pixart").compression_plan(dc.QuantizationConfig("w8a8", split_skips=True))
    assert plan.components["transformer"].splits == {}


def test_split_layers_are_planned_saved_and_put_back(tmp_path):
    pipe, dense = tiny.build_pipeline("stable_diffusion"), tiny.build_pipeline("stable_diffusion")
    config = dc.QuantizationConfig("w4a8", dc.RTNConfig(), split_skips=True)
    plan = pipe.compression_plan(config)
    pipe.compress(plan, measure=False)
    splits = {n: m for n, m in pipe.unet.named_modules() if isinstance(m, SplitConv2d)}
    assert splits.keys() == plan.components["unet"].splits.keys()
    assert len(splits) == 8
    stored = sum(p.numel() * p.element_size() for p in pipe.unet.state_dict().values())
    assert stored == plan.components["unet"].bytes_after
    assert sum(row.bytes_before for row in plan.rows) == plan.bytes_before == plan_bytes(dense)
    expected = picture(pipe)
    again = reloaded(pipe, tmp_path)
    assert torch.equal(picture(again), expected)
    assert again.compression_plan(config).components == {}  # is there already
    state = again.unet.hf_quantizer.state
    bare = copy.deepcopy(dense.unet).to("meta")  # of a checkpoint whose metadata is lost
    install_placeholders(bare, layers_of_checkpoint(bare, state.config.spec, None, torch.float32))
    assert bare.state_dict().keys() == again.unet.state_dict().keys()
    assert {k: v.shape for k, v in bare.state_dict().items()} == {
        k: v.shape for k, v in again.unet.state_dict().items()
    }
    again.decompress()
    assert again.unet.state_dict().keys() == dense.unet.state_dict().keys()
    fresh = tiny.build_pipeline("stable_diffusion")
    fresh.compress(dc.compression_recipe(pipe), measure=False)
    assert torch.equal(picture(fresh), expected)


def plan_bytes(pipe: Any) -> int:
    return sum(p.numel() * p.element_size() for p in pipe.unet.state_dict().values())


def test_static_inputs_of_the_halves_have_ranges_of_their_own():
    pipe = tiny.build_pipeline("stable_diffusion")
    config = dc.QuantizationConfig(STATIC, modulation_scheme="w8a16", split_skips=True)
    seen: dict[str, list[torch.Tensor]] = {}
    name = "up_blocks.1.resnets.0.conv_shortcut"
    pipe.unet.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.setdefault(name, []).append(args[0]))
    dense, calibration = copy.deepcopy(pipe.unet), calibration_of(pipe)
    with torch.no_grad():
        seen.clear()
        for sample in calibration.of("unet"):
            sample.call.run(dense)
    split = pipe.unet.up_blocks[1].resnets[0].conv_shortcut.in_channels
    pipe.compress(config, calibration=calibration, measure=False)
    conv = pipe.unet.get_submodule(name)
    width = conv.hidden.in_channels
    assert 0 < width < split
    x = torch.cat(seen[name])
    for part, values in ((conv.hidden, x[:, :width]), (conv.skip, x[:, width:])):
        span = float(values.max().clamp(min=0) - values.min().clamp(max=0)) / 255
        # Layers before are quantized by then, so the ranges are near those of the dense model.
        assert abs(float(part.input_scale) / span - 1) < 0.05


# --- attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stable_diffusion", "sd3", "flux", "wan"])
def test_attention_on_codes_is_saved_and_taken_off(name, tmp_path):
    pipe = tiny.build_pipeline(name)
    plain = copy.deepcopy(pipe)
    plain.compress("w8a8", algorithm=dc.RTNConfig(), measure=False)
    pipe.compress(dc.QuantizationConfig("w8a8", dc.RTNConfig(), attention="int8"), measure=False)
    found, without = picture(pipe), picture(plain)
    assert not torch.equal(found, without)
    assert float((found - without).norm() / without.norm()) < 0.1  # random weights: 0.059 at most, of the UNet
    again = reloaded(pipe, tmp_path)
    assert torch.equal(picture(again), found)
    again.decompress()
    plain.decompress()
    assert torch.equal(picture(again), picture(plain))
    assert not [m for m in denoiser(again).modules() if "Quantized" in type(getattr(m, "processor", None)).__name__]


def test_attention_on_codes_is_traced_as_one_graph():
    pipe = tiny.build_pipeline("pixart")
    set_attention(pipe.transformer, dc.NumberFormat.INT8)
    attention = pipe.transformer.transformer_blocks[0].attn1
    x = torch.randn(2, 16, 128)
    with torch.no_grad():
        expected = attention(x)
        found = torch.compile(attention, fullgraph=True, backend="aot_eager")(x)
    assert_close(found, expected.double(), KERNEL[torch.float32])


def test_attention_that_cannot_be_quantized_is_refused():
    from diffusers.models.attention_processor import AttnProcessor

    pipe = tiny.build_pipeline("stable_diffusion")
    pipe.unet.set_attn_processor(AttnProcessor())
    config = dc.QuantizationConfig("w8a8", attention="int8")
    with pytest.raises(ConfigError, match=r"scaled_dot_product_attention, got AttnProcessor\."):
        pipe.compress(config)
    with pytest.raises(ConfigError, match="this model has none"):
        tiny.build("llama").compress(config)
    with pytest.raises(ConfigError, match="attention: "):
        dc.QuantizationConfig("w8a8", attention="int4")


@pytest.mark.parametrize(
    ("name", "part", "attention", "split"), [("emoji_sd", "unet", 1.05, 0.85), ("emoji_dit", "transformer", 1.08, 1.0)]
)
def test_trained_models_lose_little_by_attention_on_codes_and_gain_by_splits(name, part, attention, split):
    """Relative error of the denoiser's output, over that of w8a8 alone; measured 1.010 and 0.768, 1.038 and 1."""
    pipe = DiffusionPipeline.from_pretrained(MODELS / name)
    pipe.set_progress_bar_config(disable=True)
    asked = {"class_labels": [90]} if name == "emoji_dit" else {"prompt": "red heart"}
    calls = dc.Calibration.record(pipe, [asked], num_samples=3, num_inference_steps=10)
    dense, errors = getattr(pipe, part), {}
    expected = outputs(dense, calls.of(part))
    for arm, given in {"plain": {}, "attention": {"attention": "int8"}, "split": {"split_skips": True}}.items():
        model = copy.deepcopy(dense).compress(dc.QuantizationConfig("w8a8", dc.RTNConfig(), **given))
        errors[arm] = float((outputs(model, calls.of(part)) - expected).norm() / expected.norm())
    assert errors["plain"] < errors["attention"] < attention * errors["plain"]
    assert errors["split"] <= split * errors["plain"]


def outputs(model: Any, samples: Any) -> torch.Tensor:
    with torch.no_grad():
        found = [sample.call.run(model) for sample in samples]
    return torch.cat([(one if isinstance(one, tuple) else one.to_tuple())[0].double() for one in found])


# --- first and last layers, names -------------------------------------------------------------------------------


def test_first_and_last_layers_are_dense_unless_they_get_a_format():
    ends = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    for given, scheme in ((None, None), ("w8a8", "w8a8")):
        pipe = tiny.build_pipeline("stable_diffusion")
        plan = pipe.compression_plan(dc.QuantizationConfig("w4a8", end_scheme=given))
        assigned = plan.components["unet"].assigned
        assert {name: assigned[name].scheme and assigned[name].scheme.name for name in ends} == dict.fromkeys(
            ends, scheme
        )
        others = {item.scheme.name for name, item in assigned.items() if name not in ends}
        assert others == {"w4a8", "w4a16"}
        kept = dc.QuantizationConfig.from_dict(plan.components["unet"].resolved_config.to_dict())
        assert kept.spec == plan.components["unet"].resolved_config.spec


@pytest.mark.parametrize("name", METHOD_PRESETS)
def test_names_stand_for_weights_and_timestep_path_together(name):
    weights, temporal = as_recipe(name, overrides={"conv_out": None}).components["denoisers"]
    assert weights.spec.label == {"w4a32": "w4a16"}.get(name.split("-")[1], name.split("-")[1])
    assert weights.spec.split_skips
    assert weights.spec.overrides == (("conv_out", None),)
    assert temporal.maintenance is dc.TFMQConfig(maintenance="tib").maintenance
    steps = 20_000 if name.endswith("paper") else 300
    assert (weights.spec.algorithm.iterations, temporal.iterations) == (steps, steps)


def test_a_name_compresses_a_pipeline_and_needs_calibration(tmp_path, monkeypatch):
    pipe = tiny.build_pipeline("stable_diffusion")
    with pytest.raises(ConfigError, match=r"BRECQ .* needs calibration data, got none"):
        pipe.compress("tfmq-w4a8")
    preset = METHOD_PRESETS["tfmq-w4a8"]
    quick = type(preset)(preset.scheme, BRECQ, path("tib"), preset.summary)
    monkeypatch.setitem(METHOD_PRESETS, "tfmq-w4a8", quick)
    kept = ["down_blocks", "mid_block", "*.attentions"]
    given = {"calibration": calibration_of(pipe), "modules_to_not_convert": kept}
    pipe.compress("tfmq-w4a8", **given, measure=False)
    assert isinstance(pipe.unet.up_blocks[0].resnets[0].conv1, SplitConv2d)
    expected = picture(pipe)
    assert torch.equal(picture(reloaded(pipe, tmp_path)), expected)
    assert [type(config) for config in dc.compression_recipe(pipe).components["unet"]] == [
        dc.QuantizationConfig,
        dc.TFMQConfig,
    ]


def test_what_changes_modules_does_not_go_with_loading_or_a_search(tmp_path):
    pipe = tiny.build_pipeline("stable_diffusion")
    pipe.unet.save_pretrained(tmp_path)
    for given, message in (({"split_skips": True}, "split_skips=True"), ({"attention": "int8"}, "attention=")):
        config = dc.QuantizationConfig("w8a8", **given)
        with pytest.raises(ConfigError, match=f"{message}.* changes modules"):
            type(pipe.unet).from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ConfigError, match="a search for formats"):
        pipe.compression_plan(dc.QuantizationConfig("w4a8", split_skips=True), target_size="1MB")
