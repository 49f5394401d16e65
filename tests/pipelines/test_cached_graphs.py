"""A feature cache whose steps are replayed as graphs: one for each pattern, and what one keeps the others add."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

import diffuse_compress as dc
import tiny
from caching.loops import loop, random_mask, schedule_for
from diffuse_compress.caching.call import CHANGED, NAME, OVER_BUDGET
from diffuse_compress.caching.runtime import cache_of
from diffuse_compress.caching.units import units_of
from diffuse_compress.pipelines.graphs import CONSUMER, WARMING_UP, graphed_calls_of
from diffuse_compress.runtime import steps
from diffuse_compress.temporal.config import TableConfig
from diffuse_compress.temporal.table import attach_table
from pipelines.cases import denoiser, sample, stock, with_mixin
from pipelines.tape import Tape
from tolerance import KERNEL, assert_close

STEPS = 6
ON = {"cuda_graph": True, "steps": STEPS}
CASES = [("pixart_alpha", "block"), ("flux", "branch"), ("wan", "block"), ("stable_diffusion", "block")]
CASES += [("dit", "block")]


def counted(pipe: Any, method: str = CONSUMER) -> tuple[int, dict[str, int]]:
    found = next(iter(pipe.compression_stats().components.values())).method(method)
    return found.hits, {reason.what: count for reason, count in found.misses.items()}


def cached(name: str, granularity: str = "block", *, forecast: bool = False, seed: int = 0, **placement: Any) -> Any:
    """A pipeline whose denoiser follows a schedule of many patterns."""
    ours = with_mixin(stock(name))
    model = denoiser(ours)
    mask = random_mask(STEPS, len(units_of(model, granularity)), seed=seed)
    schedule = schedule_for(model, mask, granularity)
    if forecast:
        weights = torch.tensor([1.25, -0.25]).expand(*mask.shape, 2).clone()
        schedule = schedule.with_mask(mask, weights)
    ours.enable_cache(schedule, **placement)
    return ours


def whole_steps(ours: Any, computed: str) -> None:
    """``computed``: 1 and 0 for each step."""
    model = denoiser(ours)
    rows = torch.tensor([[int(digit)] for digit in computed], dtype=torch.uint8)
    ours.enable_cache(schedule_for(model, rows.expand(-1, len(units_of(model)))))


@pytest.mark.parametrize(("name", "granularity"), CASES)
@pytest.mark.parametrize("forecast", [False, True], ids=["copy", "forecast"])
def test_replays_are_the_cached_calls(name: str, granularity: str, forecast: bool, recorders: list[Tape]) -> None:
    ours = cached(name, granularity, forecast=forecast)
    model = denoiser(ours)
    expected = [sample(ours, steps=STEPS, seed=seed) for seed in range(2)]
    calls = STEPS * (2 if name in ("flux", "wan") else 1)
    planned = counted(ours, NAME)[0]
    assert planned > 0
    for turn, seed in enumerate((0, 1, 0, 1)):
        assert_close(sample(ours, **ON, seed=seed), expected[seed], KERNEL[torch.float32])
        assert counted(ours, NAME) == (planned, {})
        hits, misses = counted(ours)
        assert set(misses) <= {WARMING_UP.what}
        assert hits == (calls if turn > 1 else hits)
    # As many as there are kinds of steps, whatever is guided and how.
    graphs = graphed_calls_of(model).num_graphs
    assert recorders[0].recorded == graphs
    program = next(iter(cache_of(model)._programs.values()))
    assert graphs == len({pattern for pattern, _ in program.patterns.values()})


def test_steps_that_do_the_same_share_a_graph(recorders: list[Tape]) -> None:
    ours = with_mixin(stock("pixart_alpha"))
    whole_steps(ours, "101011")
    expected = sample(ours, steps=STEPS)
    for _ in range(3):
        # One tensor is added to one, so that nothing is rounded another way.
        assert torch.equal(sample(ours, **ON), expected)
    assert counted(ours) == (STEPS, {})
    # Computing for later steps, reusing, and computing for none.
    assert recorders[0].recorded == 3
    with ours.cache_disabled():
        stock_picture = sample(ours, steps=STEPS)
        for _ in range(2):
            assert torch.equal(sample(ours, **ON), stock_picture)
        assert counted(ours) == (STEPS, {})
    assert not torch.equal(stock_picture, expected)
    assert recorders[0].recorded == 4
    assert torch.equal(sample(ours, **ON), expected)
    assert recorders[0].recorded == 4


@pytest.mark.parametrize("name", ["pixart_alpha", "flux", "wan"])
def test_steps_that_are_left_out_as_wholes_need_no_graph(name: str, recorders: list[Tape]) -> None:
    ours = with_mixin(stock(name))
    model = denoiser(ours)
    mask = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.uint8)[:, None]
    weights = torch.tensor([1.5, -0.5]).expand(STEPS, 1, 2).clone(), torch.full((STEPS, 3), 0.1)
    ours.enable_cache(schedule_for(model, mask, "model").with_mask(mask, *weights))
    expected = sample(ours, steps=STEPS)
    calls = 4 * (2 if name in ("flux", "wan") else 1)
    for _ in range(3):
        assert_close(sample(ours, **ON), expected, KERNEL[torch.float32])
        assert counted(ours, NAME) == (2, {})
    assert counted(ours) == (calls, {})
    assert recorders[0].recorded == 1
    assert torch.equal(sample(ours, steps=STEPS), expected)


def test_what_is_kept_outlives_the_next_replay(recorders: list[Tape]) -> None:
    """Step 2 keeps in the graph that kept in step 0, of which step 3 forecasts."""
    ours = with_mixin(stock("pixart_alpha"))
    model = denoiser(ours)
    mask = torch.tensor([1, 0, 1, 0, 1, 0], dtype=torch.uint8)[:, None].expand(-1, len(units_of(model)))
    schedule = schedule_for(model, mask)
    ours.enable_cache(schedule.with_mask(mask, torch.tensor([2.0, -1.0]).expand(*mask.shape, 2).clone()))
    expected = sample(ours, steps=STEPS)
    for _ in range(4):
        found = sample(ours, **ON)
    assert counted(ours) == (STEPS, {})
    assert_close(found, expected, KERNEL[torch.float32])


@pytest.mark.parametrize("placement", [{"cache_dtype": "bfloat16"}, {"cache_device": "cpu"}, {"memory_budget": 1}])
def test_what_is_kept_may_be_kept_elsewhere_or_not_at_all(placement: dict[str, Any], recorders: list[Tape]) -> None:
    whole = cached("pixart_alpha", **placement)
    over = "memory_budget" in placement
    with pytest.warns(dc.DiffuseCompressWarning, match="memory budget") if over else contextlib.nullcontext():
        expected = sample(whole, steps=STEPS)
        for _ in range(3):
            found = sample(whole, **ON)
    assert counted(whole) == (STEPS, {})
    assert_close(found, expected, KERNEL[torch.float32])
    if over:
        assert set(counted(whole, NAME)[1]) == {OVER_BUDGET.what}
        assert cache_of(denoiser(whole)).last_bytes == 0


def test_shapes_schedules_and_numbers_of_steps(recorders: list[Tape]) -> None:
    ours = cached("pixart_alpha")
    sizes = {side: sample(ours, steps=STEPS, side=side) for side in (32, 48)}
    for side in (32, 48, 32, 48, 32, 48):
        assert_close(sample(ours, **ON, side=side), sizes[side], KERNEL[torch.float32])
    assert counted(ours) == (STEPS, {})
    with pytest.warns(dc.DiffuseCompressWarning, match="made for 6 steps"):
        expected = sample(ours, steps=9)
    for _ in range(3):
        found = sample(ours, cuda_graph=True, steps=9)
    assert_close(found, expected, KERNEL[torch.float32])
    assert counted(ours) == (9, {})
    ours.disable_cache(remove=True)
    whole_steps(ours, "100100")
    expected = sample(ours, steps=STEPS)
    for _ in range(3):
        found = sample(ours, **ON)
    assert_close(found, expected, KERNEL[torch.float32])
    assert counted(ours) == (STEPS, {})


def test_a_run_that_changes_computes_what_it_may_not_reuse(recorders: list[Tape]) -> None:
    """Guidance ends in the middle: the batch shrinks."""
    ours = with_mixin(stock("pixart_alpha"))
    whole_steps(ours, "110010")
    model = denoiser(ours)
    expected = sample(ours, steps=STEPS)
    for _ in range(3):
        sample(ours, **ON)

    def run(graphed: bool) -> list[torch.Tensor]:
        inputs = tiny.inputs_for(model)

        def drop(step: int, given: dict[str, Any]) -> dict[str, Any]:
            return {n: v[:1] if isinstance(v, torch.Tensor) and v.ndim and step >= 3 else v for n, v in given.items()}

        with graphed_calls_of(model).used(model) if graphed else contextlib.nullcontext():
            return loop(model, inputs, STEPS, scheduler=DDIMScheduler(), before=drop)

    with pytest.warns(dc.DiffuseCompressWarning, match="changed during the run"):
        wanted = run(False)
    missed = steps.tracker_of(model).last.methods[NAME].misses
    for _ in range(4):
        found = run(True)
        assert steps.tracker_of(model).last.methods[NAME].misses == missed
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, KERNEL[torch.float32])
    assert {reason.what for reason in missed} == {CHANGED.what}
    assert steps.tracker_of(model).last.methods[CONSUMER].hits == STEPS
    assert_close(sample(ours, **ON), expected, KERNEL[torch.float32])


def test_with_tables_and_quantized(recorders: list[Tape]) -> None:
    ours = with_mixin(stock("pixart_alpha"))
    ours.compress("w8a8", dc.TFMQConfig(num_inference_steps=STEPS), measure=False)
    whole_steps(ours, "110100")
    expected = sample(ours, steps=STEPS)
    for _ in range(3):
        assert torch.equal(sample(ours, **ON), expected)
    assert counted(ours) == (STEPS, {})
    assert counted(ours, NAME)[1] == {}


def test_tables_alone_are_as_before(recorders: list[Tape]) -> None:
    ours = cached("dit")
    attach_table(denoiser(ours), TableConfig(exact=True))
    expected = sample(ours, steps=STEPS)
    for _ in range(3):
        found = sample(ours, **ON)
    assert_close(found, expected, KERNEL[torch.float32])
    assert counted(ours) == (STEPS, {})
