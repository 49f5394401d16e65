"""Everything below the first resolution level of a UNet as one unit: its value is reused, and nothing in it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import diffuse_compress as dc
import tiny
from caching.loops import Operations, loop, schedule_for
from diffuse_compress.caching.calibrate import calibrate_cache
from diffuse_compress.caching.call import INJECTED, NAME
from diffuse_compress.caching.config import FeatureCacheConfig
from diffuse_compress.caching.recording import ATTENTION_ON_CPU, profile_units
from diffuse_compress.caching.runtime import apply_cache, cache_of, compile_variants, remove_cache
from diffuse_compress.caching.training import train_cache
from diffuse_compress.caching.units import sites_of, units_of
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError, DiffuseCompressWarning
from diffuse_compress.pipelines.graphs import graphed_calls_of
from diffuse_compress.runtime import steps
from tolerance import KERNEL, assert_close

pytestmark = pytest.mark.usefixtures("fresh_thread")

THREE = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
PLAIN = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
MODELS = [("unet_sd1", THREE), ("unet_sdxl", {}), ("unet", PLAIN)]
STEPS = 5


def built(
    name: str, config: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[Any, dict[str, Any], list[str]]:
    """A model, its inputs, and its units' names."""
    model = tiny.build(name, dtype=dtype, **config)
    return model, tiny.inputs_for(model, batch=1), [unit.name for unit in units_of(model, "level")]


def level_schedule(model: Any, level: str, rest: str | None = None) -> Any:
    """``level``: "1" and "0" by step for the unit; ``rest`` for all others."""
    units = units_of(model, "level")
    rows = [
        [int((level if u.kind == "level" else rest or "1" * len(level))[t]) for u in units] for t in range(len(level))
    ]
    return schedule_for(model, torch.tensor(rows, dtype=torch.uint8), "level")


class Stages:
    """A naive cache of the value: stages are left out by hand."""

    def __init__(self, model: Any, level: str) -> None:
        self.model, self.level, self.kept = model, level, None
        self.stage = model.up_blocks[-2]
        self.stock = type(self.stage).forward

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.level[steps.current().row] == "1":
            self.kept = self.stock(self.stage, *args, **kwargs)
        return self.kept


@pytest.mark.parametrize(("name", "config"), MODELS)
def test_the_value_is_reused(name, config):
    model, inputs, names = built(name, config)
    stage = len(model.up_blocks) - 2
    assert names.count(f"up_blocks.{stage}.below") == 1
    assert {n.split(".")[0] + n.split(".")[1] for n in names if not n.endswith("below")} == {
        "down_blocks0",
        f"up_blocks{stage + 1}",
    }
    stock = loop(model, inputs, STEPS)
    apply_cache(model, level_schedule(model, "11111"))
    assert all(torch.equal(a, b) for a, b in zip(loop(model, inputs, STEPS), stock, strict=True))
    remove_cache(model)
    level = "10010"
    naive = Stages(model, level)
    model.up_blocks[stage].forward = naive
    steps.track(model)
    expected = loop(model, inputs, STEPS)
    steps.untrack(model)
    del model.up_blocks[stage].forward
    apply_cache(model, level_schedule(model, level))
    found = loop(model, inputs, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[1], stock[1])
    counted = steps.tracker_of(model).last.methods[NAME]
    assert (counted.hits, counted.planned) == (3, 3)
    remove_cache(model)
    assert all(torch.equal(a, b) for a, b in zip(loop(model, inputs, STEPS), stock, strict=True))
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(("name", "config"), MODELS)
def test_nothing_below_the_level_runs(name, config):
    model, inputs, _ = built(name, config, torch.float32)
    ran: list[str] = []
    for module_name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, module_name=module_name: ran.append(module_name))
    below = sites_of(model, units_of(model, "level"))
    site = next(site for site in below if site.modules)
    inside = [n for n, _ in model.named_modules() if any(f"{n}.".startswith(f"{m}.") for m in site.modules)]
    flops, operations = [], []
    apply_cache(model, level_schedule(model, "101"))
    seen = FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU)
    for_each = Operations()

    def before(step: int, given: dict[str, Any]) -> dict[str, Any]:
        flops.append(seen.get_total_flops())
        operations.append(len(for_each.names))
        if step == 1:
            ran.clear()
        elif step == 2:
            assert not set(ran) & set(inside)
            assert "conv_in" in ran
        return given

    with seen, for_each:
        loop(model, inputs, 3, before=before)
    flops.append(seen.get_total_flops())
    operations.append(len(for_each.names))
    full, reused = flops[3] - flops[2], flops[2] - flops[1]
    remove_cache(model)
    with torch.no_grad():
        profile = profile_units(model, units_of(model, "level"), Call((), inputs), repeats=1)
    unit = next(index for index, unit in enumerate(units_of(model, "level")) if unit.kind == "level")
    # The unit's cost is that of all its modules.
    assert reused == full - int(profile.flops[unit])
    assert 0 < reused < 0.7 * full
    assert operations[2] - operations[1] < 0.6 * (operations[3] - operations[2])
    assert float(profile.cost_ms[unit]) > 0.25 * float(profile.cost_ms.sum())


def test_with_other_units_and_a_forecast_and_as_graphs(recorders):
    model, inputs, names = built("unet_sd1", THREE, torch.float32)
    schedule = level_schedule(model, "110110", "101011")
    schedule = schedule.with_mask(schedule.mask, torch.tensor([1.5, -0.5]).expand(6, len(names), 2).clone())
    values: list[torch.Tensor] = []
    stage = model.up_blocks[-1]
    apply_cache(model, schedule)
    handle = stage.register_forward_pre_hook(
        lambda _, a, k: values.append(k["hidden_states"].clone()), with_kwargs=True
    )
    expected = loop(model, inputs, 6)
    handle.remove()
    assert_close(values[2], 1.5 * values[1] - 0.5 * values[0], KERNEL[torch.float32])
    assert_close(values[5], 1.5 * values[4] - 0.5 * values[3], KERNEL[torch.float32])
    with graphed_calls_of(model).used(model):
        for _ in range(3):
            found = loop(model, inputs, 6)
    assert steps.tracker_of(model).last.methods["CUDA graph"].hits == 6
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, KERNEL[torch.float32])


def test_stages_compile_as_wholes():
    shape = {"block_out_channels": (32, 32), "layers_per_block": 1, "in_channels": 3, "out_channels": 3}
    stages = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model, inputs, _ = built("unet", {**shape, **stages, "add_attention": False}, torch.float32)
    apply_cache(model, level_schedule(model, "101"))
    expected = loop(model, inputs, 3)
    torch._dynamo.reset()
    counters.clear()
    variants = compile_variants(model, backend="eager")
    for _ in range(2):
        found = loop(model, inputs, 3)
        assert int(counters["stats"]["unique_graphs"]) == len(variants)
        assert not counters["graph_break"]
    torch._dynamo.reset()
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, KERNEL[torch.float32])


def test_what_writes_to_the_value_does_not_change_what_is_kept():
    """FreeU scales what a stage is given, in place."""
    model, inputs, _ = built("unet_sd1", THREE)
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    apply_cache(model, level_schedule(model, "100"))
    values: list[torch.Tensor] = []
    for stage in model.up_blocks[1:]:
        stage.resolution_idx = 0
    model.up_blocks[-1].register_forward_pre_hook(
        lambda _, a, k: values.append(k["hidden_states"].clone()), with_kwargs=True
    )
    loop(model, inputs, 3)
    assert torch.equal(values[1], values[0])
    assert torch.equal(values[2], values[0])


def test_what_a_controlnet_adds_inside_is_never_lost():
    model, inputs, _ = built("unet_sd1", THREE)
    with torch.no_grad():
        shapes: list[torch.Size] = []
        handles = [
            stage.register_forward_hook(lambda _, a, out: shapes.extend(o.shape for o in out[1]))
            for stage in model.down_blocks
        ]
        handles.append(model.mid_block.register_forward_hook(lambda _, a, out: shapes.append(out.shape)))
        handles.append(model.conv_in.register_forward_hook(lambda _, a, out: shapes.append(out.shape)))
        model(**inputs)
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    added = {"down_block_additional_residuals": drawn[:-1], "mid_block_additional_residual": drawn[-1]}

    def fading(step: int, given: dict[str, Any]) -> dict[str, Any]:
        down = [residual / (1 + step) for residual in added["down_block_additional_residuals"]]
        return {**given, "down_block_additional_residuals": down, "mid_block_additional_residual": drawn[-1] * step}

    stock = loop(model, inputs, 3, before=fading)
    apply_cache(model, level_schedule(model, "100"))
    with pytest.warns(DiffuseCompressWarning, match="ControlNet or an adapter"):
        found = loop(model, inputs, 3, before=fading)
    assert all(torch.equal(a, b) for a, b in zip(found, stock, strict=True))
    missed = steps.tracker_of(model).last.methods[NAME].misses
    assert {reason.what: count for reason, count in missed.items()} == {INJECTED.what: 2}


def test_models_without_levels_are_refused():
    skips = {"down_block_types": ("SkipDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "SkipUpBlock2D")}
    shape = {"in_channels": 3, "out_channels": 3, "block_out_channels": (32, 128)}
    for model in (tiny.build("dit"), tiny.build("unet", **skips, **shape)):
        with pytest.raises(ConfigError, match="not known to have resolution levels"):
            units_of(model, "level")

    class Other(type(tiny.build("unet_sd1"))):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = tiny.build("unet_sd1")
    model.__class__ = Other
    with pytest.raises(ConfigError, match="not known to have resolution levels"):
        units_of(model, "level")


CALL: dict[str, Any] = {
    "num_inference_steps": 10,
    "guidance_scale": 2.0,
    "height": 32,
    "width": 32,
    "output_type": "latent",
}


def test_it_is_calibrated_learned_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("diffuse_compress.caching.rehearsal.MAX_CHECKS", 20)
    pipe = tiny.build_pipeline("stable_diffusion")
    found = calibrate_cache(
        pipe, ["a cat"], FeatureCacheConfig(target_speedup=1.15, granularity="level", num_trajectories=1), **CALL
    )
    schedule = found.schedules["unet"]
    assert [unit.kind for unit in schedule.units].count("level") == 1
    pipe.enable_cache(schedule)
    expected = tiny.sample(pipe, num_inference_steps=10)
    pipe.save_cache(tmp_path)
    other = tiny.build_pipeline("stable_diffusion").load_cache(tmp_path)
    assert torch.equal(tiny.sample(other, num_inference_steps=10), expected)
    assert cache_of(other.unet).schedule.units == schedule.units
    pipe.disable_cache(remove=True)
    config = dc.HarmoniCaConfig(beta=0.05, granularity="level", trajectories=1, num_inference_steps=10, history=1)
    learned = train_cache(pipe, ["a cat"], config, height=32, width=32, output_type="latent")
    assert learned.schedules["unet"].units == schedule.units
