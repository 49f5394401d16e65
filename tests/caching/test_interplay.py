"""A schedule together with what else users do to a pipeline: the cached picture stays what a naive cache gives, or the
reason why not is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionImg2ImgPipeline
from torch._dynamo.utils import counters

import diffuse_compress as dc
import tiny
from caching.loops import loop, naive_cache, random_mask, schedule_for
from diffuse_compress.caching.call import ADAPTERS, NAME
from diffuse_compress.caching.runtime import cache_of
from diffuse_compress.caching.units import units_of
from diffuse_compress.temporal.config import TableConfig
from diffuse_compress.temporal.table import attach_table
from tolerance import KERNEL, assert_close

pytestmark = pytest.mark.usefixtures("fresh_thread")

STEPS = 6


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def schedule_of(pipe: Any, granularity: str = "block", seed: int = 0) -> Any:
    model = denoiser(pipe)
    return schedule_for(model, random_mask(STEPS, len(units_of(model, granularity)), seed=seed), granularity)


def picture(pipe: Any, **kwargs: Any) -> torch.Tensor:
    return tiny.sample(pipe, **{"num_inference_steps": STEPS, **kwargs})


def counted(pipe: Any) -> tuple[int, int, dict[str, int]]:
    """(reused, planned, why not)."""
    found = next(iter(pipe.compression_stats().components.values())).method(NAME)
    return found.hits, found.planned, {reason.what: count for reason, count in found.misses.items()}


def assert_followed(pipe: Any) -> None:
    hits, planned, misses = counted(pipe)
    assert hits == planned > 0
    assert misses == {}


def naive(pipe: Any, schedule: Any, sample: Callable[[Any], torch.Tensor] = picture) -> torch.Tensor:
    """The picture under a naive cache."""
    with naive_cache(denoiser(pipe), schedule):
        return sample(pipe)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(found, expected, KERNEL[torch.float32] * 10)


# --- formats and tables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["w8a8", "fp8", "w8a16", "w4a16", "w4a8", "w4a4"])
def test_every_format(preset):
    pipe = tiny.build_pipeline("pixart")
    pipe.compress(preset, measure=False, algorithm=dc.RTNConfig())
    dense = picture(pipe)
    schedule = schedule_of(pipe, "branch")
    # Of neighbours the sum is kept: rounded otherwise, it would turn into another code of an activation.
    schedule = schedule.with_mask(schedule.mask | (torch.arange(len(schedule.units)) % 2).to(torch.uint8))
    expected = naive(pipe, schedule)
    pipe.enable_cache(schedule)
    for _ in range(2):
        assert torch.equal(picture(pipe), expected)
        assert_followed(pipe)
    assert not torch.equal(expected, dense)
    with pipe.cache_disabled():
        assert torch.equal(picture(pipe), dense)


@pytest.mark.parametrize("name", ["stable_diffusion", "flux"])
def test_exact_tables_change_no_bit_of_a_cached_picture(name):
    pipe = tiny.build_pipeline(name)
    pipe.enable_cache(schedule_of(pipe))
    expected = picture(pipe)
    attach_table(denoiser(pipe), TableConfig(exact=True))
    for _ in range(2):
        assert torch.equal(picture(pipe), expected)
    assert_followed(pipe)
    assert dc.compression_stats(pipe, strict=True)


# --- adapters ------------------------------------------------------------------------------------------------------


def adapter(seed: int) -> dict[str, torch.Tensor]:
    peft = pytest.importorskip("peft")
    twin = tiny.build_pipeline("stable_diffusion")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin.unet.add_adapter(
            peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        )
    state = peft.utils.get_peft_model_state_dict(twin.unet)
    return {f"unet.{key}": value.detach().clone() for key, value in state.items()}


@pytest.mark.parametrize("preset", [None, "w8a16"])
def test_loras_are_loaded_weighted_switched_fused_and_unloaded(preset):
    pipe = tiny.build_pipeline("stable_diffusion")
    if preset:
        pipe.compress(preset, measure=False)
    schedule = schedule_of(pipe)
    plain = naive(pipe, schedule)
    pipe.enable_cache(schedule)
    pipe.load_lora_weights(adapter(1), adapter_name="one")
    pipe.load_lora_weights(adapter(2), adapter_name="two")
    seen = []
    steps: list[Callable[[], Any]] = [
        lambda: pipe.set_adapters("one"),
        lambda: pipe.set_adapters("one", 0.5),
        lambda: pipe.set_adapters(["one", "two"], [0.7, 0.3]),
        lambda: pipe.disable_lora(),
        lambda: pipe.enable_lora(),
        lambda: pipe.fuse_lora(adapter_names=["two"]),
        lambda: pipe.unfuse_lora(),
    ]
    # How adapters are fused into packed weights is for tests/integration/test_lora.py.
    for change in steps[:4] if preset else steps:
        change()
        found = picture(pipe)
        # Between runs nothing is in the cache: each follows the schedule from its first step.
        assert_followed(pipe)
        pipe.disable_cache(remove=True)
        assert_near(found, naive(pipe, schedule))
        pipe.enable_cache(schedule)
        seen.append(found)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert_near(seen[3], plain)
    pipe.unload_lora_weights()
    assert_near(picture(pipe), plain)
    assert_followed(pipe)


def test_a_lora_that_is_scaled_during_a_run_empties_the_cache():
    pipe = tiny.build_pipeline("stable_diffusion")
    pipe.load_lora_weights(adapter(1), adapter_name="one")
    units = units_of(pipe.unet)
    mask = torch.zeros(STEPS, len(units), dtype=torch.uint8)
    mask[0] = 1
    pipe.enable_cache(schedule_for(pipe.unet, mask))

    def scale(pipe: Any, step: int, t: Any, kwargs: Any) -> Any:
        if step == 2:
            pipe.set_adapters("one", 0.25)
        return kwargs

    with pytest.warns(dc.DiffuseCompressWarning, match="adapters changed"):
        picture(pipe, callback_on_step_end=scale)
    assert counted(pipe) == (4 * len(units), 5 * len(units), {ADAPTERS.what: len(units)})


# --- other pipelines on the same denoiser --------------------------------------------------------------------------


def test_a_controlnet_pipeline():
    base = tiny.build_pipeline("stable_diffusion")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        control = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 32, 96)).eval()
        for parameter in control.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    parts = {**base.components, "controlnet": control}
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    hint = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def controlled(pipe: Any) -> torch.Tensor:
        return pipe(
            "a red cat",
            image=hint,
            num_inference_steps=STEPS,
            height=32,
            width=32,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    free = picture(base)
    schedule = schedule_of(pipe)
    expected = naive(pipe, schedule, controlled)
    pipe.unet.enable_cache(schedule)
    assert_near(controlled(pipe), expected)
    assert_followed(pipe)
    assert not torch.equal(controlled(pipe), free)
    # All residual blocks of it reused, the residuals of the ControlNet still change the picture.
    pipe.unet.disable_cache(remove=True)
    mask = torch.zeros(STEPS, len(schedule.units), dtype=torch.uint8)
    mask[0] = 1
    pipe.unet.enable_cache(schedule_for(pipe.unet, mask))
    whole = controlled(pipe)
    hint.mul_(0.1)
    assert not torch.equal(controlled(pipe), whole)


@pytest.mark.parametrize("strength", [0.67, 1.0])
def test_image_to_image_begins_in_the_middle(strength):
    base = tiny.build_pipeline("stable_diffusion")
    pipe = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    start = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def changed(pipe: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        call = {"strength": strength, "num_inference_steps": STEPS, "generator": generator, "output_type": "latent"}
        return pipe("a red cat", image=start, **call).images

    mask = torch.zeros(STEPS, len(units_of(pipe.unet)), dtype=torch.uint8)
    mask[::2] = 1
    stock = changed(pipe)
    schedule = schedule_for(pipe.unet, mask)
    expected = naive(pipe, schedule, changed)
    pipe.unet.enable_cache(schedule)
    found = changed(pipe)
    assert_near(found, expected)
    assert_followed(pipe)
    # As many steps reuse as are left, but the first, which has nothing to reuse.
    left = round(strength * STEPS)
    assert counted(pipe)[0] == int((mask[STEPS - left + 1 :] == 0).sum())
    assert not torch.equal(found, stock)


def test_two_pipelines_in_turn_share_a_denoiser_and_one_is_interrupted():
    pipe = tiny.build_pipeline("stable_diffusion")
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    pipe.enable_cache(schedule_of(pipe))
    assert cache_of(other.unet) is cache_of(pipe.unet)
    start = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def changed() -> torch.Tensor:
        return other(
            "a red cat",
            image=start,
            strength=0.5,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    expected, theirs = picture(pipe), changed()

    def stop(pipe: Any, step: int, t: Any, kwargs: Any) -> Any:
        pipe._interrupt = step == 2
        return kwargs

    assert not torch.equal(picture(pipe, callback_on_step_end=stop), expected)
    assert torch.equal(changed(), theirs)
    assert torch.equal(picture(pipe), expected)
    assert_followed(pipe)


@pytest.mark.parametrize("steps", [3, 9])
def test_other_numbers_of_steps_warn_once_and_follow_the_nearest_rows(steps):
    pipe = tiny.build_pipeline("pixart")
    pipe.enable_cache(schedule_of(pipe))
    with pytest.warns(dc.DiffuseCompressWarning, match=f"made for {STEPS} steps, and this run has {steps}"):
        first = picture(pipe, num_inference_steps=steps)
    assert torch.equal(picture(pipe, num_inference_steps=steps), first)
    hits, planned, misses = counted(pipe)
    assert (hits, misses) == (planned, {})
    picture(pipe)
    assert_followed(pipe)


# --- offload and torch.compile ----------------------------------------------------------------------------------------

CPU = torch.device("cpu")
OFFLOADS: dict[str, Callable[[Any], Any]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "block": lambda pipe: pipe.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1),
    "leaf": lambda pipe: pipe.enable_group_offload(CPU, offload_type="leaf_level"),
}


@pytest.mark.parametrize(
    ("name", "granularity", "mode"),
    [
        *(("pixart", "branch", mode) for mode in OFFLOADS),
        ("flux", "block", "block"),
        ("stable_diffusion", "level", "block"),
        ("stable_diffusion", "level", "leaf"),
    ],
)
def test_offloading_before_and_after(name, granularity, mode):
    plain = tiny.build_pipeline(name)
    schedule = schedule_of(plain, granularity)
    plain.enable_cache(schedule)
    expected = picture(plain)
    for cache_first in (True, False):
        pipe = tiny.build_pipeline(name)
        if cache_first:
            pipe.enable_cache(schedule)
        OFFLOADS[mode](pipe)
        if not cache_first:
            pipe.enable_cache(schedule)
        for _ in range(2):
            assert torch.equal(picture(pipe), expected)
            assert_followed(pipe)


@pytest.mark.parametrize("cache_first", [True, False])
@pytest.mark.parametrize(("name", "granularity"), [("flux", "branch"), ("unet_sd1", "level")])
def test_sequential_offloading_brings_no_weights_of_what_is_left_out(name, granularity, cache_first):
    model = tiny.build(name)
    inputs = tiny.inputs_for(model, batch=1)
    mask = torch.ones(STEPS, len(units_of(model, granularity)), dtype=torch.uint8)
    mask[1:3] = 0
    schedule = schedule_for(model, mask, granularity)
    model.enable_cache(schedule)
    expected = loop(model, inputs, STEPS)
    if not cache_first:
        model.disable_cache(remove=True)
    accelerate.cpu_offload(model, CPU)
    if not cache_first:
        model.enable_cache(schedule)
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}
    last = next(unit.block for unit in reversed(schedule.units))
    layer = next(m for m in model.get_submodule(last).modules() if isinstance(m, torch.nn.Linear))
    brought: list[int] = []
    hook = layer._hf_hook
    stock = hook.pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: brought.append(at[0]) or stock(module, *args, **kwargs)
    at = [0]

    def note(step: int, given: dict[str, Any]) -> dict[str, Any]:
        at[0] = step
        return given

    found = loop(model, inputs, STEPS, before=note)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert set(brought) == {0, 3, 4, 5}


def test_regional_compilation_has_one_graph_and_no_break_and_compiles_once(fresh_compiler):
    pipe = tiny.build_pipeline("stable_diffusion")
    schedule = schedule_of(pipe)
    pipe.enable_cache(schedule)
    expected = picture(pipe)
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    graphs = []
    for _ in range(2):
        assert_near(picture(pipe), expected)
        graphs.append(int(counters["stats"]["unique_graphs"]))
    assert 1 <= graphs[0] == graphs[1] <= 4
    assert not counters["graph_break"]
    assert_followed(pipe)
    pipe.unet.compile(backend="eager")
    with pytest.raises(Exception, match=r"compile_repeated_blocks\(\), or compile_variants"):
        picture(pipe)
