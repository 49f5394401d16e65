"""Fast calibration: errors and forecasts are what they say, the search finds the best, and the budget is met."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import tiny
from diffuse_compress.caching.calibrate import calibrate_cache
from diffuse_compress.caching.config import FeatureCacheConfig
from diffuse_compress.caching.forecast import fit_forecast, unit_forecast, with_forecast
from diffuse_compress.caching.recording import LoopClock, Trajectory, profile_units
from diffuse_compress.caching.rehearsal import Rehearsal
from diffuse_compress.caching.runtime import apply_cache, cache_of, remove_cache
from diffuse_compress.caching.schedule import Guidance, Schedule
from diffuse_compress.caching.search import cheapest_within, reuse_errors, schedule_error
from diffuse_compress.caching.units import Site, Unit, units_of
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.macs import count_macs
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.runtime.steps import tracker_of

EMOJI = Path(__file__).parents[2] / "examples" / "reference_models" / "emoji_pixart"


def trajectories(count: int, steps: int, units: int, seed: int = 0) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Trajectory(
            torch.randn(steps, units, 16, generator=generator).cumsum(dim=0),
            torch.rand(steps, units, generator=generator) + 0.5,
        )
        for _ in range(count)
    ]


def test_errors_are_mean_squares_relative_to_the_streams():
    recorded = trajectories(3, 5, 2)
    recorded[0].power[4], recorded[0].deltas[4] = torch.nan, torch.nan
    recorded = [*recorded[1:]]
    errors = reuse_errors(recorded)
    for origin, then, unit in itertools.product(range(5), range(5), range(2)):
        naive = [
            float((t.deltas[then, unit] - t.deltas[origin, unit]).double().square().sum() / t.power[then, unit])
            for t in recorded
        ]
        assert torch.isinf(errors[origin, then, unit]) == (then <= origin)
        if then > origin:
            # Products are taken over the power of each step: exact where it does not change between the two.
            assert errors[origin, then, unit] > 0
            assert len(naive) == 2
    steady = [Trajectory(t.deltas, torch.full_like(t.power, 2.0)) for t in recorded]
    errors = reuse_errors(steady)
    expected = torch.stack([(t.deltas[3] - t.deltas[1]).double().square().sum(-1) / 2.0 for t in steady]).mean(0)
    torch.testing.assert_close(errors[1, 3], expected)


def test_errors_of_a_forecast_are_residuals_of_least_squares():
    recorded = [Trajectory(t.deltas, torch.ones_like(t.power)) for t in trajectories(2, 6, 3)]
    errors = reuse_errors(recorded, gap=2)
    now, past = (torch.cat([t.deltas[row, 1] for t in recorded]).double() for row in (4, 3))
    before = torch.cat([t.deltas[1, 1] for t in recorded]).double()
    basis = torch.stack([past, before], dim=1)
    solution = torch.linalg.lstsq(basis, now[:, None]).solution
    residual = (now - (basis @ solution)[:, 0]).square().sum() / 2
    torch.testing.assert_close(errors[3, 4, 1], residual)
    assert bool((errors <= reuse_errors(recorded)).all())


def test_steps_that_were_not_seen_are_never_reused():
    recorded = trajectories(1, 6, 2)
    recorded[0].deltas[3:], recorded[0].power[3:] = torch.nan, torch.nan
    errors = reuse_errors(recorded)
    assert bool(torch.isinf(errors[:, 3:]).all())
    assert bool(errors[0, 1].isfinite().all())


@pytest.mark.parametrize("drawn", range(3))
def test_the_search_finds_what_trying_all_masks_finds(drawn):
    steps, units = 5, 2
    errors = reuse_errors(trajectories(2, steps, units, drawn))
    weights, cost = torch.rand(steps).double() + 0.1, torch.tensor([1.0, 3.0])
    masks = []
    for bits in itertools.product((0, 1), repeat=(steps - 1) * units):
        mask = torch.cat([torch.ones(1, units), torch.tensor(bits).float().view(steps - 1, units)]).to(torch.uint8)
        saved = float(((1 - mask.float()) @ cost).sum())
        masks.append((saved, schedule_error(errors, weights, mask)))
    for wanted in (2.0, 5.0, 9.0, 16.0):
        mask = cheapest_within(errors, weights, cost, wanted)
        saved, error = float(((1 - mask.float()) @ cost).sum()), schedule_error(errors, weights, mask)
        assert saved >= wanted
        # The price reaches the masks of the convex hull: none that saves as much has less error.
        assert error <= min(e for s, e in masks if s >= saved) + 1e-9
    with pytest.raises(ConfigError, match="at most 16 ms"):
        cheapest_within(errors, weights, cost, 17.0)
    forced = torch.tensor([False, False, True, False, False])
    mask = cheapest_within(errors, weights, cost, 8.0, forced=forced, longest=1)
    assert bool(mask[2].all())
    assert not bool(((mask[:-1] == 0) & (mask[1:] == 0)).any())


def test_a_forecast_of_a_line_is_exact():
    start, slope = torch.randn(3, 32), torch.randn(3, 32)
    line = torch.stack([start + step * slope for step in range(6)])
    recorded = [Trajectory(line, torch.ones(6, 3))]
    torch.testing.assert_close(fit_forecast(recorded, [0, 1], [3, 1], 5), torch.tensor([2.0, -1.0]), atol=1e-2, rtol=0)
    assert fit_forecast([Trajectory(torch.zeros(6, 3, 4), torch.ones(6, 3))], [0], [3, 1], 5).tolist() == [1.0, 0.0]
    units = tuple(Unit(f"b.{i}") for i in range(3))
    sites = [Site(unit.block, i, 1, True, True, 0) for i, unit in enumerate(units)]
    mask = torch.ones(6, 3, dtype=torch.uint8)
    mask[[2, 4, 5]] = 0
    schedule = with_forecast(Schedule.full(units, 6, "M").with_mask(mask), sites, recorded)
    torch.testing.assert_close(
        schedule.coefficients[[2, 4, 5], 1],
        torch.tensor([[2.0, -1.0], [1.5, -0.5], [2.0, -1.0]]),
        atol=1e-2,
        rtol=0,
    )
    # Each unit by itself has weights for steps that compute it, too.
    alone = unit_forecast(recorded, 1, mask[:, 1].bool().tolist(), 2)
    expected = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, -1.0], [3.0, -2.0], [1.5, -0.5], [2.0, -1.0]])
    torch.testing.assert_close(alone, expected, atol=2e-2, rtol=0)
    with pytest.raises(ConfigError, match="at least 2"):
        with_forecast(schedule, sites, recorded, history=1)
    with pytest.raises(ConfigError, match="the trajectories 5"):
        with_forecast(schedule, sites, trajectories(1, 5, 3))


def test_a_forecast_leaves_out_trajectories_that_did_not_see_its_steps():
    first, second = trajectories(2, 6, 3)
    alone = fit_forecast([first], [0, 2], [3, 1], 5)
    second.deltas[1], second.power[1] = torch.nan, torch.nan
    assert torch.equal(fit_forecast([first, second], [0, 2], [3, 1], 5), alone)
    assert not torch.equal(fit_forecast([first, second], [0, 2], [3, 2], 5), fit_forecast([first], [0, 2], [3, 2], 5))


def test_a_large_model_is_searched_in_no_time():
    steps, units = 50, 57
    # Equal units are all reused at the same price: the budget is met by what is computed after all, one by one.
    line = torch.randn(steps, 1, 64).cumsum(dim=0).expand(steps, units, 64)
    recorded = [Trajectory(line.clone(), torch.ones(steps, units)) for _ in range(8)]
    listed = tuple(Unit(f"b.{i}") for i in range(units))
    sites = [Site(unit.block, i, 1, True, True, 0) for i, unit in enumerate(listed)]
    began = time.process_time()
    mask = cheapest_within(reuse_errors(recorded), torch.ones(steps), torch.ones(units), 0.41 * steps * units)
    with_forecast(Schedule.full(listed, steps, "M").with_mask(mask), sites, recorded)
    # Measured 0.4 s; going through units and steps one by one took 2.6 s.
    assert time.process_time() - began < 1.5
    assert int((mask == 0).sum()) == math.ceil(0.41 * steps * units)


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w8a16", "w4a16", "fp8"])
@pytest.mark.parametrize(("name", "granularity"), [("pixart", "branch"), ("unet_sd1", "block")])
def test_units_of_a_packed_model_count_the_flops_of_the_dense_one(name, granularity, preset):
    model = tiny.build(name)
    call, units = Call((), tiny.inputs_for(model)), units_of(model, granularity)
    dense = profile_units(model, units, call, repeats=1).flops
    macs = count_macs(model, lambda: call.run(model))
    inside = sum(count for layer, count in macs.items() if any(layer.startswith(f"{u.block}.") for u in units))
    model.compress(preset, measure=False)
    assert any(isinstance(layer, QuantizedLinear) for layer in model.modules())
    packed = profile_units(model, units, call, repeats=1).flops
    assert packed.tolist() == dense.tolist()
    # Attention products are counted on the CPU, too.
    assert float(dense.sum()) > 2 * inside > 0


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = DiffusionPipeline.from_pretrained(EMOJI)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL: dict[str, Any] = {
    "num_inference_steps": 10,
    "guidance_scale": 2.0,
    "use_resolution_binning": False,
    "clean_caption": False,
    "max_sequence_length": 24,
}


def test_calibration_of_a_trained_model_meets_its_budget(pipe, untouched_rng, monkeypatch):
    monkeypatch.setattr("diffuse_compress.caching.rehearsal._LONG_SECONDS", math.inf)  # on a slow machine, too
    model = pipe.transformer
    seen: list[tuple[str, int, int]] = []
    prompts = (prompt for prompt in ("red heart", "teddy bear", "never used"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = calibrate_cache(
        pipe,
        prompts,
        FeatureCacheConfig(granularity="block", target_speedup=1.3, num_trajectories=2),
        callback=lambda stage, done, total, metrics: seen.append((stage, done, total)),
        **CALL,
    )
    schedule = found.schedules["transformer"]
    assert found.predicted_speedup >= 1.3
    assert abs(schedule.predicted_speedup - found.predicted_speedup) < 1e-6
    # Three candidates, and six runs to tell the time by.
    assert len(found.candidates) == 3
    assert found.forwards == 90
    assert 0 < found.error == min(candidate.error for candidate in found.candidates) < 0.1
    assert (schedule.scheduler, schedule.guidance) == (type(pipe.scheduler).__name__, Guidance.BATCHED)
    assert schedule.flops is not None
    assert seen[0] == ("Recording what units add", 1, 2)
    assert seen[-1][0] == "Checking schedules"
    assert "1.3" in str(found)
    assert next(prompts) == "never used"
    # The pipeline is as it was.
    assert cache_of(model) is None
    assert tracker_of(model) is None
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    apply_cache(model, schedule)
    with pytest.raises(ConfigError, match="transformer has a cache"):
        calibrate_cache(pipe, ["red heart"], **CALL)
    remove_cache(model)


@pytest.mark.parametrize(
    ("steps", "cached", "run_seconds"),
    [
        (10, [True] * 3 + [False, True] * 3, 0.1),
        (10, [True] * 3 + [False, True], 2.0),  # long ones are not repeated
        (33, [True] * 2 + [False], 0.1),
        (50, [True, False], 2.0),
    ],
)
def test_timed_runs_take_turns_within_a_hundred_forwards(pipe, monkeypatch, steps, cached, run_seconds):
    model, ran = pipe.transformer, []

    def run(rehearsal, arguments, index):
        if ran or rehearsal.references:
            ran.append(cache_of(model) is not None)
        return ran_before(rehearsal, arguments, index)

    def seconds(clock):
        # A machine that gets busier with every run.
        return run_seconds * (1.0 if ran[-1] else 2.0) * (1 + 0.01 * len(ran))

    ran_before = Rehearsal.run
    monkeypatch.setattr(Rehearsal, "run", run)
    monkeypatch.setattr(LoopClock, "stop", seconds)
    call = CALL | {"num_inference_steps": steps}
    found = calibrate_cache(pipe, ["red heart"], FeatureCacheConfig(granularity="block", target_speedup=1.2), **call)
    assert ran == cached
    assert found.forwards == steps * len(cached) <= 100
    assert found.measured_speedup == pytest.approx(2.0, rel=0.03)


def test_what_cannot_be_calibrated_is_refused(pipe):
    few = CALL | {"num_inference_steps": 8}
    with pytest.raises(ConfigError, match="fewer than 10 steps"):
        calibrate_cache(pipe, ["red heart"], **few)
    with pytest.raises(ConfigError, match="must be above 1"):
        FeatureCacheConfig(target_speedup=1.0)
    with pytest.raises(ConfigError, match="at least one prompt"):
        calibrate_cache(pipe, [], **CALL)
    with pytest.raises(ConfigError, match="num_trajectories must be 1 to 8"):
        FeatureCacheConfig(num_trajectories=9)
    with pytest.raises(ConfigError, match="history must be at least 1"):
        FeatureCacheConfig(history=0)
    with pytest.raises(ConfigError, match="longest_reuse must be at least 1"):
        FeatureCacheConfig(longest_reuse=0)
    with pytest.raises(ConfigError, match="Put it in a list"):
        calibrate_cache(pipe, "red heart", **CALL)
    with pytest.raises(ConfigError, match="needs a diffusers pipeline"):
        calibrate_cache(pipe.transformer, ["red heart"])
    for granularity in ("block", "model"):
        config = FeatureCacheConfig(granularity=granularity, target_speedup=40.0, num_trajectories=1)
        with pytest.raises(ConfigError, match=r"Lower target_speedup"):
            calibrate_cache(pipe, ["red heart"], config, **CALL)
    assert tracker_of(pipe.transformer) is None


def test_sequential_guidance_and_few_steps_if_forced():
    pipe = tiny.build_pipeline("wan")
    call = {
        name: value
        for name, value in tiny.call_kwargs(pipe).items()
        if name not in ("prompt", "generator", "output_type")
    }
    found = calibrate_cache(
        pipe,
        ["a red cat"],
        FeatureCacheConfig(target_speedup=1.1, granularity="branch", history=1, force=True),
        **call | {"num_inference_steps": 4},
    )
    schedule = found.schedules["transformer"]
    assert schedule.guidance is Guidance.SEQUENTIAL
    assert schedule.coefficients is None
    assert schedule.units == units_of(pipe.transformer, "branch")
    assert found.forwards == 8 * (3 + 6)
