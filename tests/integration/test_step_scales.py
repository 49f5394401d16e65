"""Finite-set calibration through compress, save_pretrained and from_pretrained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

import diffuse_compress as dc
import tiny
from diffuse_compress.cli import main
from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.pipeline_call import from_noise
from diffuse_compress.quantization.numerics import qparams_from_range
from diffuse_compress.temporal.features import relative_error
from diffuse_compress.temporal.reasons import OFFLOADED
from diffuse_compress.temporal.step_scales import (
    CONSUMER,
    StepQParams,
    detach_step_scales,
    static_layers,
    step_scales_of,
)
from diffuse_compress.temporal.table import table_of
from integration.test_offload import MODES

MODELS = Path(__file__).resolve().parents[2] / "examples" / "reference_models"
STEPS = 4
STATIC = dc.Scheme(dc.WeightScheme("int8"), dc.ActivationScheme("int8", dc.PerTensor(), dynamic=False, symmetric=False))
ITEMS = [{"prompt": prompt, "num_inference_steps": STEPS} for prompt in ("a red boat", "an owl")]

pytestmark = [
    pytest.mark.usefixtures("fewer_timesteps"),
    pytest.mark.filterwarnings("ignore:.*come from a calibration with:diffuse_compress.DiffuseCompressWarning"),
]


def weights() -> Any:
    return dc.QuantizationConfig(STATIC, dc.RTNConfig(), overrides={"time_embedding.*": STATIC, "conv_in": STATIC})


def path(scope: str | None, way: str = "tib") -> dc.TFMQConfig:
    return dc.TFMQConfig(maintenance=way, num_inference_steps=STEPS, iterations=5, scope=scope)


def compressed(scope: str, way: str = "tib", calibration: Any = ITEMS, source: Any = None) -> Any:
    pipe = source or tiny.build_pipeline("stable_diffusion")
    pipe.compress(weights(), path(scope, way), calibration=calibration, measure=False)
    return pipe


@pytest.fixture(scope="module")
def all_layers() -> Any:
    return compressed("all")


def picture(pipe: Any, steps: int = STEPS, **given: Any) -> torch.Tensor:
    return tiny.sample(pipe, num_inference_steps=steps, **given)


def require(qparams: StepQParams, layer: Any, name: str, timestep: float, seen: torch.Tensor) -> None:
    """The scale and zero point of a layer at a timestep are those of the values that it was given there."""
    low, high = seen.min().clamp(max=0).reshape(1), seen.max().clamp(min=0).reshape(1)
    expected = qparams_from_range(low, high, layer.scheme.activation)
    column = qparams.timesteps.index(timestep)
    found = float(qparams.scale[qparams.layers.index(name), column])
    assert found == pytest.approx(float(expected.scale), rel=1e-5), (name, timestep)
    assert abs(int(qparams.zero_point[qparams.asymmetric.index(name), column]) - int(expected.zero_point)) <= 1


@torch.no_grad()
def test_ranges_of_the_path_follow_from_the_timesteps(tmp_path, capsys):
    pipe = tiny.build_pipeline("stable_diffusion")
    plan = pipe.compression_plan(weights(), path("tib"), calibration=ITEMS)
    assert "input scales of 10 at each step" in str(plan)
    compressed("tib", source=pipe)
    qparams, unet = step_scales_of(pipe.unet).qparams, pipe.unet
    assert qparams.timesteps == (1.0, 251.0, 501.0, 751.0)
    assert len(qparams.layers) == 10
    assert qparams.scale.shape == qparams.zero_point.shape == (10, STEPS)
    for timestep in qparams.timesteps:
        embedded = unet.time_proj(torch.tensor([timestep]))
        require(qparams, unet.time_embedding.linear_1, "time_embedding.linear_1", timestep, embedded)
        name = next(name for name in qparams.layers if name.endswith("time_emb_proj"))
        read = torch.nn.functional.silu(unet.time_embedding(embedded))
        require(qparams, unet.get_submodule(name), name, timestep, read)
    assert qparams.scale.std(dim=1).min() > 0, "every layer has a scale of its own in every step"
    expected = picture(pipe)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(again), expected)
    kept = step_scales_of(again.unet).qparams
    assert torch.equal(kept.scale, qparams.scale)
    assert torch.equal(kept.zero_point, qparams.zero_point)
    main(["info", str(tmp_path)])
    assert "input scales of 10 layers at 4 timesteps" in capsys.readouterr().out
    assert dc.compression_recipe(again).components["unet"][1] == path("tib")
    again.decompress()
    assert step_scales_of(again.unet) is None
    assert not quantized_layers(again.unet)


@torch.no_grad()
def test_ranges_of_all_layers_are_those_of_trajectories(all_layers):
    pipe = copy.deepcopy(all_layers)
    qparams = step_scales_of(pipe.unet).qparams
    assert set(qparams.layers) == set(static_layers(pipe.unet))
    detach_step_scales(pipe.unet)
    names = ["conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.0.resnets.0.conv1"]
    seen: dict[tuple[str, float], list[torch.Tensor]] = {}
    now: list[float] = []
    handles = [pipe.unet.register_forward_pre_hook(lambda module, args: now.append(float(args[1])))]
    for name in names:

        def look(module: Any, args: Any, name: str = name) -> None:
            seen.setdefault((name, now[-1]), []).append(args[0].flatten())

        handles.append(pipe.unet.get_submodule(name).register_forward_pre_hook(look))
    for index, item in enumerate(ITEMS):
        pipe(**from_noise(pipe, item, index))
    assert {timestep for _, timestep in seen} == set(qparams.timesteps)
    for (name, timestep), values in seen.items():
        require(qparams, pipe.unet.get_submodule(name), name, timestep, torch.cat(values))


def test_other_loops_have_the_nearest_steps_and_share_the_denoiser(all_layers, tmp_path):
    pipe = copy.deepcopy(all_layers)
    count = len(static_layers(pipe.unet))
    by_hand = naive(pipe)
    for steps in (STEPS, 3, 7):
        assert torch.equal(picture(pipe, steps), picture(by_hand, steps))
        assert dc.compression_stats(pipe).components["unet"].methods[CONSUMER].hits == steps * count
    sharing = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    sharing.set_progress_bar_config(disable=True)
    assert torch.equal(picture(sharing), picture(by_hand))
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    given = {"prompt": "a boat", "image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    found = []
    for source in (parts, {**by_hand.components, "scheduler": copy.deepcopy(pipe.scheduler)}):
        other = StableDiffusionImg2ImgPipeline(**source, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        call = {**given, "num_inference_steps": 6, "strength": 0.5, "generator": generator, "output_type": "latent"}
        found.append(other(**call).images)
    assert torch.equal(*found)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    picture(pipe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())


def naive(pipe: Any) -> Any:
    """A pipeline that writes the row of the nearest timestep into the layers, one by one, before every call."""
    other = copy.deepcopy(pipe)
    qparams = step_scales_of(other.unet).qparams
    detach_step_scales(other.unet)
    layers = static_layers(other.unet)

    def write(module: Any, args: Any) -> None:
        distances = [abs(float(args[1]) - timestep) for timestep in qparams.timesteps]
        column = distances.index(min(distances))
        for row, name in enumerate(qparams.layers):
            layers[name].input_scale.data.fill_(float(qparams.scale[row, column]))
            layers[name].input_zero_point.data.fill_(int(qparams.zero_point[row, column]))

    other.unet.register_forward_pre_hook(write)
    return other


@pytest.mark.parametrize("mode", MODES)
def test_offloaded_layers_have_the_scales_of_the_step_or_are_counted(all_layers, mode, tmp_path):
    """What is loaded within a call, over the row that was put there before it, has the scales of all steps."""
    pipe, plain = copy.deepcopy(all_layers), copy.deepcopy(all_layers)
    within = mode == "sequential" or mode.endswith("disk")
    if within:
        detach_step_scales(plain.unet)
    MODES[mode](pipe.unet, tmp_path)
    for _ in range(2):
        assert torch.equal(picture(pipe), picture(plain))
    counted = pipe.compression_stats().components["unet"].methods[CONSUMER]
    assert (counted.hits == 0) == within
    assert [reason is OFFLOADED for reason in counted.misses] == [True] * within


def test_recorded_calls_are_made_again_and_tables_stay(tmp_path):
    """With tables for the path, a Calibration instead of items, and in a model that is compressed already."""
    pipe = tiny.build_pipeline("stable_diffusion")
    recorded = dc.Calibration.record(pipe, ITEMS, num_samples=2 * STEPS)
    pipe.compress(weights(), calibration=recorded, measure=False)
    layers = len(static_layers(pipe.unet))
    pipe.compress(path("all", "cache"), calibration=recorded)
    qparams = step_scales_of(pipe.unet).qparams
    assert (len(qparams.layers), qparams.timesteps) == (layers, (1.0, 251.0, 501.0, 751.0))
    expected = picture(pipe)
    stats = dc.compression_stats(pipe, strict=True).components["unet"].methods
    assert stats["temporal table"].hits == stats["temporal table"].planned
    assert stats[CONSUMER].hits == STEPS * layers
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert len(table_of(again.unet).schedules) == 1
    assert torch.equal(picture(again), expected)
    facts = dc.compression_report(again).components["unet"]["methods"]["temporal"]
    assert facts["step_scales"]["bytes"] == qparams.nbytes
    assert again.compression_plan(dc.TFMQConfig(num_inference_steps=STEPS, scope="all")).methods == []


def test_what_cannot_be_is_refused_before_anything_is_touched():
    pipe = tiny.build_pipeline("stable_diffusion")
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    with pytest.raises(ConfigError, match="scope='every' is unknown"):
        dc.TFMQConfig(scope="every")
    with pytest.raises(ConfigError, match="steps of a schedule"):
        dc.TFMQConfig(scope="all", num_inference_steps=())
    with pytest.raises(ConfigError, match="no layer has static inputs"):
        pipe.compress("w8a8", path("all"), algorithm=dc.RTNConfig(), calibration=ITEMS)
    dense_path = dc.QuantizationConfig(STATIC, dc.RTNConfig(), overrides={"*time_emb*": None})
    with pytest.raises(ConfigError, match="no layer of the timestep path has static inputs"):
        pipe.compress(dense_path, path("tib", "cache"), calibration=ITEMS)
    with pytest.raises(ConfigError, match="got a bare model"):
        pipe.unet.compress(weights(), path("all", "cache"), calibration=[tiny.inputs_for(pipe.unet)])
    with pytest.raises(ConfigError, match="item 1 cannot be run"):
        compressed("all", source=pipe, calibration=[ITEMS[0], {**ITEMS[1], "guidance_rescale": "much"}])
    assert step_scales_of(pipe.unet) is None
    assert not quantized_layers(pipe.unet)
    assert not pipe.unet._forward_pre_hooks
    after = pipe.unet.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_scales_of_each_step_bring_a_trained_model_nearer():
    """emoji_sd, every layer in 8 bits, 5 steps, on prompts and noise that no range was seen in."""
    pipe = DiffusionPipeline.from_pretrained(MODELS / "emoji_sd")
    pipe.set_progress_bar_config(disable=True)
    asked = [{"prompt": prompts, "num_inference_steps": 5} for prompts in (["red heart", "blue car"], ["brown dog"])]
    unseen = dc.Calibration.record(pipe, [{"prompt": "green apple", "num_inference_steps": 5}], num_samples=5, seed=9)

    def outputs() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([sample.call.run(pipe.unet)[0].flatten() for sample in unseen.of("unet")])

    dense = outputs()
    everything = dc.QuantizationConfig(STATIC, dc.RTNConfig(), overrides={"*": STATIC})
    pipe.compress(everything, calibration=asked, measure=False)
    overall = float(relative_error(dense, outputs()))
    pipe.compress(dc.TFMQConfig(num_inference_steps=5, scope="all"), calibration=asked)
    assert float(relative_error(dense, outputs())) < 0.9 * overall
