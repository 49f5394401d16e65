"""A schedule says what it is, survives a file, and compiles to sums that are what its table means."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

import tiny
from caching.loops import random_mask
from diffuse_compress.caching.artefact import load_schedules, save_schedules
from diffuse_compress.caching.compiler import compile_schedule, within_memory
from diffuse_compress.caching.schedule import CachePoint, Guidance, Schedule, noise_levels
from diffuse_compress.caching.units import Site, Unit, sites_of, units_of
from diffuse_compress.errors import CheckpointError, ConfigError, DiffuseCompressWarning


def units(count: int) -> tuple[Unit, ...]:
    return tuple(Unit(f"blocks.{index // 2}", ("attn", "ff")[index % 2], "attention") for index in range(count))


def made(mask: torch.Tensor, **fields) -> Schedule:
    return Schedule.full(units(mask.shape[1]), len(mask), "Model", **fields).with_mask(mask, fields.get("coefficients"))


def sites(count: int, per_site: int = 2, chained: bool = True) -> list[Site]:
    return [
        Site(f"blocks.{i}", first, min(per_site, count - first), False, True, 0 if chained else i)
        for i, first in enumerate(range(0, count, per_site))
    ]


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_segments_add_what_each_unit_would_add_by_itself(seed, history, chained):
    num_steps, count = 8, 10
    mask = random_mask(num_steps, count, reused=0.7, seed=seed)
    coefficients = None
    if history > 1:
        # Few values, so that neighbours often agree.
        coefficients = torch.tensor([[1.5, -0.5], [1.0, 0.0]])[torch.randint(2, (num_steps, 1))].expand(-1, count, -1)
    schedule = made(mask).with_mask(mask, coefficients)
    program = compile_schedule(schedule, sites(count, chained=chained))
    fresh = torch.randn(num_steps, count, dtype=torch.float64)
    kept: dict[int, float] = {}
    for step, plan in enumerate(program.steps):
        naive = torch.zeros(count, dtype=torch.float64)
        for unit in range(count):
            past = [s for s in range(step + 1) if mask[s, unit]][::-1]
            if past[0] == step:
                naive[unit] = fresh[step, unit]
            else:
                weights = [1.0] if coefficients is None else coefficients[step, unit].tolist()
                naive[unit] = sum(w * fresh[s, unit] for w, s in zip(weights, past, strict=False))
        reused = torch.zeros(count, dtype=torch.bool)
        for segment in plan.segments:
            members = slice(segment.first, segment.last + 1)
            reused[members] = True
            total = sum(weight * kept[atom] for atom, weight in segment.terms)
            torch.testing.assert_close(float(naive[members].sum()), float(total))
        assert torch.equal(reused, mask[step] == 0)
        for atom in program.atoms:
            if atom.origin == step:
                assert mask[step, atom.first : atom.last + 1].all()
                kept[atom.index] = float(fresh[step, atom.first : atom.last + 1].sum())
            elif atom.release == step:
                del kept[atom.index]
        # Nothing is kept that no later step adds.
        assert sorted(kept) == sorted(atom.index for atom in program.live(step))


def test_whole_steps_are_one_tensor_and_nothing_merges_across_a_block_that_runs_in_part():
    mask = torch.ones(4, 6, dtype=torch.uint8)
    mask[1] = 0
    program = compile_schedule(made(mask), sites(6))
    assert [(atom.first, atom.last) for atom in program.atoms] == [(0, 5)]
    assert program.peak() == 1
    assert compile_schedule(made(mask), sites(6, chained=False)).peak() == 3
    assert compile_schedule(made(mask), sites(6), merge=False).peak() == 6
    mask[1] = torch.tensor([1, 0, 0, 0, 0, 1])  # the last block runs in part: what it reuses is its own
    program = compile_schedule(made(mask), sites(6))
    assert [(s.first, s.last) for s in program.steps[1].segments] == [(1, 3), (4, 4)]


def test_a_budget_gives_up_what_saves_least():
    mask = random_mask(10, 12, reused=0.6, seed=1)
    cost = torch.rand(12) + 0.1
    schedule = made(mask, cost_ms=cost)
    places = sites(12)
    before = compile_schedule(schedule, places).peak()
    fitted = within_memory(schedule, places, [8.0] * 6, 8.0 * 3)
    assert compile_schedule(fitted, places).peak() <= 3 < before
    assert bool((fitted.mask >= schedule.mask).all())
    assert fitted.reused > 0
    assert within_memory(schedule, places, [8.0] * 6, 8.0 * before) is schedule


def test_a_file_holds_all_of_it(tmp_path):
    mask = random_mask(50, 57)
    schedule = Schedule.full(
        units(57),
        50,
        "FluxTransformer2DModel",
        scheduler="FlowMatchEulerDiscreteScheduler",
        guidance=Guidance.SEQUENTIAL,
        cache_point=CachePoint.PRE_GATE,
        cost_ms=torch.rand(57),
        other_ms=3.5,
        flops=torch.rand(57, dtype=torch.float64) * 1e12,
        details={"trajectories": 8},
    ).with_mask(mask, torch.rand(50, 57, 3))
    path = save_schedules(tmp_path / "deep" / "cache.safetensors", {"": schedule})
    assert path.stat().st_size < 100_000
    again = load_schedules(path)[""]
    for field in dataclasses.fields(Schedule):
        one, other = getattr(schedule, field.name), getattr(again, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name
    with pytest.raises(ConfigError, match="at most 100000 bytes"):
        save_schedules(path, {"": dataclasses.replace(schedule, details={"notes": "x" * 100_000})})
    assert load_schedules(path)[""].units_hash == schedule.units_hash
    save_file({"mask": mask}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a cache schedule"):
        load_schedules(tmp_path / "other.safetensors")
    tensors, metadata = schedule.to_tensors()
    with pytest.raises(CheckpointError, match="newer release"):
        Schedule.from_tensors(tensors, {**metadata, "schema_version": 2})
    with pytest.raises(CheckpointError, match="hash"):
        Schedule.from_tensors(tensors, {**metadata, "units": [["other", "", "block"], *metadata["units"][1:]]})
    with pytest.raises(CheckpointError, match="incomplete"):
        Schedule.from_tensors({"mask": mask}, metadata)


def test_what_is_no_schedule_is_refused():
    mask = torch.ones(3, 2, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=r"uint8 \[steps, units\] = \[3, 4\]"):
        made(torch.ones(3, 4)).with_mask(mask)
    broken = mask.clone()
    broken[0, 1] = 0
    with pytest.raises(ConfigError, match="first row 1 only"):
        made(mask).with_mask(broken)
    with pytest.raises(ConfigError, match=r"cost_ms must be \[2\]"):
        made(mask, cost_ms=torch.tensor([1.0, -1.0]))
    with pytest.raises(ConfigError, match="coefficients must be"):
        made(mask).with_mask(mask, torch.ones(3, 1, 2))


def test_checks_name_what_differs():
    schedule = made(torch.ones(3, 4, dtype=torch.uint8), scheduler="A", guidance=Guidance.BATCHED)
    schedule.check("Model", units(4), scheduler="A", guidance=Guidance.BATCHED)
    with pytest.raises(ConfigError, match="made for Model, got a Other"):
        schedule.check("Other", units(4))
    with pytest.raises(ConfigError, match="4 there, 6 here"):
        schedule.check("Model", units(6))
    with pytest.raises(ConfigError, match=r"blocks\.0\.attn there, blocks\.0 here"):
        schedule.check("Model", (Unit("blocks.0"), *units(4)[1:]))
    with pytest.warns(DiffuseCompressWarning, match="calibrated with A, used with B"):
        schedule.check("Model", units(4), scheduler="B")
    with pytest.warns(DiffuseCompressWarning, match="calibrated with guidance batched, used with sequential"):
        schedule.check("Model", units(4), guidance=Guidance.SEQUENTIAL)


def test_rows_go_to_the_nearest_noise_level():
    mask = random_mask(10, 4)
    schedule = made(mask)
    finer = schedule.resampled(torch.linspace(1000, 50, 20), torch.linspace(1, 0.05, 20))
    nearest = [int((schedule.levels - level).abs().argmin()) for level in torch.linspace(1, 0.05, 20)]
    assert torch.equal(finer.mask[1:], mask[nearest[1:]])
    assert bool(finer.mask[0].all())
    same = schedule.resampled(schedule.timesteps, schedule.levels)
    assert torch.equal(same.mask, mask)


def test_noise_levels_agree_between_parametrizations():
    ddim, euler = DDIMScheduler(beta_schedule="scaled_linear"), EulerDiscreteScheduler(beta_schedule="scaled_linear")
    for scheduler in (ddim, euler):
        scheduler.set_timesteps(10)
    levels = noise_levels(ddim, ddim.timesteps)
    # The same training steps, found through alphas_cumprod and through sigmas.
    there = noise_levels(euler, euler.timesteps)
    interpolated = np.interp(ddim.timesteps.numpy(), euler.timesteps.numpy()[::-1], there.numpy()[::-1])
    torch.testing.assert_close(levels[:-1].double(), torch.from_numpy(interpolated)[:-1], atol=0.02, rtol=0)
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(10)
    torch.testing.assert_close(noise_levels(flow, flow.timesteps), flow.sigmas[:-1])
    assert bool((noise_levels(flow, flow.timesteps).diff() < 0).all())


def test_the_picture_shows_steps_and_shares():
    mask = torch.ones(3, 4, dtype=torch.uint8)
    mask[1] = 0
    mask[2, 1] = 0
    schedule = made(mask, cost_ms=torch.full((4,), 2.0), other_ms=2.0, flops=torch.full((4,), 1e12).double())
    text = str(schedule)
    assert "41.7 % reused" in text
    assert "7 of 12 TFLOP" in text
    assert "predicted speed-up 1.50x" in text
    assert text.splitlines()[-2].split() == ["1", "....", "100", "%", "reused"]
    assert text.splitlines()[-1].split()[1] == "#.##"
    assert schedule.picture(width=2).splitlines()[-1].split()[1] == "5#"


def test_units_stand_where_the_model_runs_them():
    unet = tiny.build("unet_sd1")
    wholes = units_of(unet)
    assert {type(unet.get_submodule(u.block)).__name__ for u in wholes} == {"ResnetBlock2D", "Transformer2DModel"}
    assert {site.chain for site in sites_of(unet, wholes)} == set(range(1, len(wholes) + 1))
    flux = tiny.build("flux")
    assert {site.chain for site in sites_of(flux, units_of(flux))} == {0}
    branches = units_of(flux, "branch")
    assert [unit.name for unit in branches if unit.branch] == [
        f"transformer_blocks.0.{name}" for name in ("attn", "ff", "ff_context")
    ]

    class Other(type(flux)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    flux.__class__ = Other  # what stands between its blocks is not known any more
    assert len({site.chain for site in sites_of(flux, units_of(flux))}) == 2
    with pytest.raises(ConfigError, match="all branches of a block in their order"):
        sites_of(flux, branches[1:])
    with pytest.raises(ConfigError, match="needs blocks"):
        units_of(torch.nn.Linear(2, 2))
