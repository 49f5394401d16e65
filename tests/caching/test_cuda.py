"""On a GPU: a schedule under offloading, kept on the host, compiled by Inductor, and activations as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch._dynamo.utils import counters

import diffuse_compress as dc
import tiny
from caching.loops import loop, random_mask, schedule_for
from diffuse_compress.caching.call import NAME
from diffuse_compress.caching.noise import exact_inputs, rounds_inputs
from diffuse_compress.caching.runtime import cache_of, compile_variants
from diffuse_compress.caching.units import units_of
from tolerance import KERNEL, assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_thread")]

STEPS = 6
REFERENCE_MODELS = Path(__file__).parents[2] / "examples" / "reference_models"
CUDA = torch.device("cuda")
OFFLOADS: dict[str, Callable[[Any], Any]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "block": lambda pipe: pipe.enable_group_offload(CUDA, offload_type="block_level", num_blocks_per_group=1),
    "leaf": lambda pipe: pipe.enable_group_offload(CUDA, offload_type="leaf_level", use_stream=True),
}


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def schedule_of(model: Any, granularity: str) -> Any:
    return schedule_for(model, random_mask(STEPS, len(units_of(model, granularity))), granularity)


def assert_followed(pipe: Any) -> None:
    method = next(iter(pipe.compression_stats().components.values())).method(NAME)
    assert (method.hits, dict(method.misses)) == (method.planned, {})
    assert method.hits > 0


@pytest.mark.parametrize("preset", [None, "w8a8", "w4a16"])
@pytest.mark.parametrize("mode", OFFLOADS)
@pytest.mark.parametrize(("name", "granularity"), [("pixart", "branch"), ("stable_diffusion", "level")])
def test_offloaded_denoisers_follow_a_schedule(name: str, granularity: str, mode: str, preset: str | None) -> None:
    pipe = tiny.build_pipeline(name, dtype=torch.bfloat16)
    if preset is not None:
        pipe.compress(preset, measure=False)
    pipe.enable_cache(schedule_of(denoiser(pipe), granularity))
    twin = tiny.build_pipeline(name, dtype=torch.bfloat16)
    if preset is not None:
        twin.compress(preset, measure=False)
    twin.enable_cache(cache_of(denoiser(pipe)).schedule)
    expected = tiny.sample(twin.to("cuda"), num_inference_steps=STEPS)
    OFFLOADS[mode](pipe)
    for _ in range(2):
        found = tiny.sample(pipe, num_inference_steps=STEPS)
        assert_close(found.float(), expected.float(), KERNEL[torch.bfloat16] * 10)
        assert_followed(pipe)


@pytest.mark.parametrize(("name", "granularity"), [("flux", "block"), ("unet_sd1", "level")])
def test_what_is_kept_on_the_host_comes_back_in_time(name: str, granularity: str) -> None:
    model = tiny.build(name).to("cuda")
    inputs = tiny.inputs_for(model)
    model.enable_cache(schedule_of(model, granularity))
    expected = loop(model, inputs, STEPS)
    model.enable_cache(schedule_of(model, granularity), cache_device="cpu")
    for _ in range(5):
        for one, other in zip(loop(model, inputs, STEPS), expected, strict=True):
            assert torch.equal(one, other)


def test_inductor_compiles_each_variant_once() -> None:
    model = tiny.build("pixart", num_layers=3).to("cuda")
    inputs = tiny.inputs_for(model)
    model.enable_cache(schedule_of(model, "branch"))
    expected = loop(model, inputs, STEPS)
    torch._dynamo.reset()
    counters.clear()
    variants = compile_variants(model)
    for _ in range(2):
        found = loop(model, inputs, STEPS)
        assert int(counters["stats"]["unique_graphs"]) == len(variants)
        assert not counters["graph_break"]
    torch._dynamo.reset()
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, KERNEL[torch.float32] * 10)


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "fp8"])
def test_exact_inputs_on_the_paths_of_a_gpu(preset: str) -> None:
    model = tiny.build("pixart", dtype=torch.bfloat16).to("cuda").compress(preset, measure=False)
    inputs = tiny.inputs_for(model)
    with torch.no_grad():
        rounded = model(**inputs)[0]
        with exact_inputs(model):
            exact = model(**inputs)[0]
        assert torch.equal(model(**inputs)[0], rounded)
        assert rounds_inputs(model)
        assert not torch.equal(exact, rounded)
        model.decompress()
        assert_close(exact.float(), model(**inputs)[0].float(), KERNEL[torch.bfloat16] * 10)


def test_a_pipeline_whose_timesteps_are_copied_to_the_device_is_followed_from_its_first_step():
    pipe = DiffusionPipeline.from_pretrained(REFERENCE_MODELS / "emoji_dit").to("cuda")
    pipe.set_progress_bar_config(disable=True)
    mask = torch.tensor([1, 0, 1, 1, 0], dtype=torch.uint8)[:, None]
    weights = torch.tensor([1.5, -0.5]).expand(5, 1, 2).clone(), torch.full((5, 3), 0.1)
    pipe.enable_cache(schedule_for(pipe.transformer, mask, "model").with_mask(mask, *weights))
    with warnings.catch_warnings():
        warnings.simplefilter("error", dc.DiffuseCompressWarning)
        pipe(class_labels=[1, 2], num_inference_steps=5, output_type="np")
    stats = pipe.compression_stats().components["transformer"].method(NAME)
    assert (stats.hits, dict(stats.misses)) == (2, {})
