"""Router training: gradients, weights of steps, guidance of every kind, resuming, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import multiprocessing
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

import diffuse_compress  # noqa: F401  attaches compress
import tiny
from diffuse_compress.caching import encoding, rehearsal, router, trainer
from diffuse_compress.caching.artefact import load_schedules, save_schedules
from diffuse_compress.caching.config import HarmoniCaConfig, LambdaEstimator
from diffuse_compress.caching.pairs import Pair, paired
from diffuse_compress.caching.recording import Profile
from diffuse_compress.caching.router import (
    RouterTable,
    SoftCache,
    cumulative,
    gains,
    leave_one_out,
    reused_within,
)
from diffuse_compress.caching.runtime import apply_cache, cache_of, remove_cache
from diffuse_compress.caching.schedule import Guidance, Schedule
from diffuse_compress.caching.training import train_cache
from diffuse_compress.caching.units import units_of
from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.runtime.steps import tracker_of

STEPS = 4
PROMPTS = ["a red cat", "the blue house", "a green tree"]


def call_of(pipe: Any, steps: int = STEPS, **kwargs: Any) -> dict[str, Any]:
    call = {n: v for n, v in tiny.call_kwargs(pipe).items() if n not in ("prompt", "generator", "output_type")}
    return call | {"num_inference_steps": steps} | kwargs


def config_of(**kwargs: Any) -> HarmoniCaConfig:
    fields: dict[str, Any] = {"trajectories": 2, "granularity": "branch", "learning_rate": 0.5}
    asked = {} if "target_speedup" in kwargs else {"beta": 1e-3}
    return HarmoniCaConfig(**{**fields, **asked, **kwargs})


def prepared(pipe: Any, config: HarmoniCaConfig, **kwargs: Any) -> Any:
    """A training that is about to begin."""
    given = rehearsal.arguments_of_items(pipe, PROMPTS, call_of(pipe, **kwargs))
    recorded = rehearsal.Rehearsal(pipe, config.granularity, config.seed, cache_point=config.cache_point, force=True)
    recorded.record(given[:1], None)
    return trainer.RouterTrainer(recorded, given, config, trainer.Processes(None), None, {})


@pytest.fixture(autouse=True)
def _profile(monkeypatch) -> None:
    """Times as they could be measured, other ones each time, whatever else the machine is doing."""
    calls = itertools.count(1)

    def profile_units(model, units, call, before_gates):
        cost = torch.linspace(1, 2, len(units)) * (1 + 0.1 / next(calls)) * (1 + int(os.environ.get("RANK", 0)))
        return Profile(cost, 0.5, torch.ones(len(units), dtype=torch.float64))

    monkeypatch.setattr(rehearsal, "profile_units", profile_units)


def spy(monkeypatch: Any, cls: Any) -> list[torch.Tensor]:
    """What schedulers of a class are given."""
    original, seen = cls.step, []

    @functools.wraps(original)
    def step(self, model_output, *args, **kwargs):
        seen.append(model_output.clone())
        return original(self, model_output, *args, **kwargs)

    monkeypatch.setattr(cls, "step", step)
    return seen


@pytest.fixture
def lessons(monkeypatch) -> list[tuple[int, torch.Tensor, torch.Tensor, Pair]]:
    """(row, gradient, worth) of what tables would have learned, with the predictions; they do not change."""
    seen: list[Any] = []
    original = trainer.RouterTrainer._learn

    def learn(self, pair):
        seen.append(pair)
        original(self, pair)

    monkeypatch.setattr(trainer.RouterTrainer, "_learn", learn)
    monkeypatch.setattr(RouterTable, "learn", lambda self, *lesson: seen.append(lesson))
    return seen


# --- predictions and gradients ------------------------------------------------------------------------------------


def test_a_pair_is_handled_as_two_tensors_would_be():
    student, teacher = torch.randn(4, 6, 3, requires_grad=True), torch.randn(4, 6, 3)

    def guided(value):
        uncond, cond = value.chunk(2)
        mixed = uncond + 3.0 * (cond - uncond)
        mixed = mixed * cond.std(dim=(1, 2), keepdim=True) / mixed.std(dim=(1, 2), keepdim=True)
        mixed[:, 0] *= 0.5
        return torch.cat([mixed, mixed.float()]).split(3, dim=1)[0]

    with torch.no_grad():
        found = guided(paired((student,), (teacher,))[0])
    assert isinstance(found, Pair)
    assert found.shape == (4, 3, 3)
    assert torch.equal(found.student, guided(student * 1))
    assert torch.equal(found.teacher, guided(teacher.clone()))
    assert not found.teacher.requires_grad
    (gradient,) = torch.autograd.grad(found.student.square().sum(), student)
    (expected,) = torch.autograd.grad(guided(student * 1).square().sum(), student)
    torch.testing.assert_close(gradient, expected)


GUIDED = [("pixart", Guidance.BATCHED), ("wan", Guidance.SEQUENTIAL), ("flux", Guidance.NONE)]


@pytest.mark.parametrize(("name", "guidance"), GUIDED, ids=[name for name, _ in GUIDED])
def test_predictions_are_compared_after_guidance(name, guidance, lessons, monkeypatch):
    pipe = tiny.build_pipeline(name)
    seen = spy(monkeypatch, type(pipe.scheduler))
    trained = prepared(pipe, config_of())
    assert trained.full["transformer"].guidance is guidance
    stock, arguments = list(seen), trained._batches[0]
    with trained.running():
        seen.clear()
        trained.draw(arguments, 0, trained.rows, learning=False)
        soft = list(seen)
        seen.clear()
        trained.draw(arguments, 0, trained.rows, learning=True)
    pairs = [lesson for lesson in lessons if isinstance(lesson, Pair)]
    assert len(pairs) == STEPS - 1
    # The teacher sees the student's latents: up to the first step that is trained they are the stock pipeline's.
    assert torch.equal(pairs[0].teacher, stock[1])
    assert not torch.equal(pairs[1].teacher, stock[2])
    # The scheduler goes on with the student's, without gradients, whose trajectory is that of the cache.
    for pair, alone, given in zip(pairs, soft[1:], seen[1:], strict=True):
        assert torch.equal(pair.student, alone)
        assert torch.equal(given, alone)
        assert type(given) is torch.Tensor
        assert not given.requires_grad


@pytest.mark.parametrize(
    ("name", "granularity", "history"),
    [("pixart", "branch", 2), ("pixart", "block", 1), ("stable_diffusion", "block", 1)],
)
def test_gradients_of_the_table_are_finite_differences(name, granularity, history, lessons):
    pipe = tiny.build_pipeline(name, dtype=torch.float64)
    trained = prepared(pipe, config_of(granularity=granularity, history=history, beta=0.25))
    table, arguments, step = next(iter(trained.tables.values())), trained._batches[0], 1e-3
    if history > 1:
        next(iter(trained.caches.values())).coefficients = torch.randn(*table.logits.shape, history)
    trained.weights = torch.rand(STEPS, dtype=torch.float64) + 0.5

    def errors() -> torch.Tensor:
        """Of the steps that are trained, by their weights."""
        trained._errors = []
        trained.draw(arguments, 3, trained.rows, learning=True)
        return trained.weights[1:] * torch.tensor(trained._errors, dtype=torch.float64)

    with trained.running():
        errors()
        learned = [lesson for lesson in lessons if isinstance(lesson, tuple)]
        assert [row for row, _, _ in learned] == trained.rows
        for row, gradient, worth in (learned[0], learned[-1]):
            torch.testing.assert_close(gradient, 0.25 - worth)
            for unit in (0, len(worth) - 1):
                before, score = float(table.logits[row, unit]), table.scores[row, unit]
                found = []
                for sign in (1, -1):
                    table.logits[row, unit] = before + sign * step
                    found.append(errors()[row - 1])
                table.logits[row, unit] = before
                expected = (found[0] - found[1]) / (2 * step) / (score * (1 - score))
                torch.testing.assert_close(-worth[unit], expected, rtol=1e-4, atol=1e-11)
                assert abs(float(expected)) > 1e-9


def test_adam_moves_one_row_and_stays_within_its_limits():
    seen = torch.tensor([False, True, True, True])
    table = RouterTable(seen, torch.ones(3), config_of(learning_rate=0.1), torch.Generator().manual_seed(0))
    assert table.trained.tolist() == [False, False, True, True]
    assert bool(table.mask[:2].all())
    reference = torch.nn.Parameter(table.logits[2].clone())
    adam = torch.optim.AdamW([reference], lr=0.1, weight_decay=0.0)
    untouched = table.logits[3].clone()
    for _ in range(3):
        gradient = torch.randn(3, dtype=torch.float64)
        adam.zero_grad()
        (reference.sigmoid() * gradient).sum().backward()
        adam.step()
        table.learn(2, gradient, gradient)
        torch.testing.assert_close(table.logits[2], reference.detach())
    assert torch.equal(table.logits[3], untouched)
    for _ in range(1000):
        table.learn(2, torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64), gradient)
    assert table.logits[2][:2].tolist() == [-5.0, 5.0]


@pytest.mark.parametrize("history", [1, 2])
def test_what_is_kept_is_what_was_added_where_scores_are_above_the_threshold(history, monkeypatch):
    steps, generator = 6, torch.Generator().manual_seed(0)
    table = RouterTable(torch.ones(steps, dtype=torch.bool), torch.ones(2), config_of(), generator)
    table.logits[1:] = torch.tensor([[1.0, -3.0], [-3.0, 1.0], [0.5, -5.0], [-5.0, 0.0], [2.0, -2.0]])
    cache = SoftCache(table, history)
    if history == 2:
        cache.coefficients = torch.randn(steps, 2, 2, generator=generator)
    place = SimpleNamespace(row=0, key="cond", problem=None)
    monkeypatch.setattr(router, "current", lambda: place)
    for cached in ([1, 2, 3, 4, 5], [1, 3, 5]):
        cache.begin(cached)
        kept: dict[Any, list[torch.Tensor]] = {}
        for row, key, unit in itertools.product(range(steps), ("cond", "uncond"), (0, 1)):
            fresh = torch.randn(3, dtype=torch.float64, generator=generator)
            place.row, place.key = row, key
            added = cache.unit(unit, {}, lambda fresh=fresh: {"hidden_states": fresh})["hidden_states"]
            past, expected = kept.setdefault((key, unit), []), fresh
            score = float(table.logits[row, unit].sigmoid())
            if row in cached:
                old = past[0]
                if history == 2 and len(past) > 1:
                    weights = cache.coefficients[row, unit].tolist()
                    old = weights[0] * past[0] + weights[1] * past[1]
                expected = score * fresh + (1 - score) * old
            if row not in cached or score > 0.1:
                kept[key, unit] = [expected, *past][:2]
            torch.testing.assert_close(added, expected)
            assert set(cache.leaves) <= set(cached)


# --- weights of steps ---------------------------------------------------------------------------------------------


def test_weights_are_what_a_naive_reference_gives():
    rows = [1, 2, 4]
    pictures = {
        frozenset(cached): torch.randn(2, 3, 4) for count in range(4) for cached in itertools.combinations(rows, count)
    }
    drawn: list[frozenset[int]] = []

    def generate(cached):
        drawn.append(frozenset(cached))
        return pictures[frozenset(cached)]

    def norm(one, other):
        return float(sum((a - b) ** 2 for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)))

    found = leave_one_out(generate, rows)
    every = pictures[frozenset(rows)]
    assert found == pytest.approx({row: norm(pictures[frozenset(rows) - {row}], every) / 24 for row in rows})
    assert len(drawn) == len(rows) + 1
    found = cumulative(generate, rows)
    chain = [frozenset(), frozenset({1}), frozenset({1, 2}), frozenset({1, 2, 4})]
    pairs = itertools.pairwise(chain)
    assert found == pytest.approx(
        {r: norm(pictures[a], pictures[b]) / 24 for r, (a, b) in zip(rows, pairs, strict=True)}
    )


def test_a_gain_is_the_change_of_the_picture_for_that_of_the_prediction():
    generator = torch.Generator().manual_seed(0)
    pictures = {row: torch.randn(2, 3, generator=generator) for row in (None, 1, 2)}
    predicted = {row: {t: torch.randn(4, generator=generator) for t in (1, 2)} for row in (None, 1, 2)}

    def generate(reused):
        (row,) = reused or [None]
        return pictures[row], predicted[row]

    found = gains(generate, [1, 2])
    for row in (1, 2):
        change = (pictures[row] - pictures[None]).square().sum() / 6
        error = (predicted[row][row] - predicted[None][row]).square().sum() / predicted[None][row].square().sum()
        assert found[row] == pytest.approx(float(change / error))


@pytest.mark.parametrize("estimator", list(LambdaEstimator))
def test_weights_come_from_finished_pictures(estimator):
    pipe = tiny.build_pipeline("pixart")
    trained = prepared(pipe, config_of(estimator=estimator))
    arguments, seed = trained._item(0)
    with trained.running():
        trained._set_weights(0)
        weights = trained.weights.clone()
        # What a run leaves behind is not in the next.
        again = [trained.draw(arguments, seed, trained.rows, learning=False) for _ in range(2)]
        uncached = trained.draw(arguments, seed, [], learning=False)
        without = {
            row: trained.draw(arguments, seed, [r for r in trained.rows if r != row], learning=False)
            for row in trained.rows
        }
    stock = pipe(**arguments, generator=torch.Generator().manual_seed(seed), output_type="latent").images.double()
    assert torch.equal(uncached, stock)
    assert torch.equal(*again)
    assert not torch.equal(again[0], stock)
    assert weights[0] == 0
    if estimator is LambdaEstimator.NONE:
        assert weights[1:].tolist() == [1.0] * (STEPS - 1)
        return
    if estimator is LambdaEstimator.GAIN:
        # Not of the scores.
        trained.tables["transformer"].logits.fill_(-1.0)
        with trained.running():
            trained._set_weights(0)
            trained.draw(arguments, seed, [2], learning=False, whole=True)
        assert torch.equal(trained.weights, weights)
        assert list(trained._given) == list(range(STEPS))
        table = trained.tables["transformer"].logits
        table[2] = -800.0
        with trained.running():
            alone = trained.draw(arguments, seed, [2], learning=False)
            assert torch.equal(alone, trained.draw(arguments, seed, [2], learning=False, whole=True))
    torch.testing.assert_close(weights[1:].mean(), torch.tensor(1.0, dtype=torch.float64))
    if estimator is LambdaEstimator.LEAVE_ONE_OUT:
        raw = torch.stack([(without[row] - again[0]).square().mean() for row in trained.rows])
        torch.testing.assert_close(weights[1:], raw / raw.mean())


def test_noise_and_items_are_others_for_every_trajectory_of_every_process():
    pipe = tiny.build_pipeline("pixart")
    trained = prepared(pipe, config_of())
    drawn = []
    for index in (0, 1):
        trained._processes = trainer.Processes(SimpleNamespace(num_processes=2, process_index=index))
        drawn.extend(trained._item(number) for number in range(6))
    assert len({seed for _, seed in drawn}) == 12
    prompts = [arguments["prompt"] for arguments, _ in drawn]
    assert {prompt: prompts.count(prompt) for prompt in PROMPTS} == dict.fromkeys(PROMPTS, 4)


def _one_of_two(index: int, folder: Path, port: int) -> None:
    """A process of a training."""
    torch.set_num_threads(1)
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    from accelerate import PartialState

    state, means = PartialState(cpu=True, backend="gloo"), []
    original = trainer.Processes.mean

    def mean(self, values):
        means.append((values.clone(), original(self, values)))
        return means[-1][1]

    trainer.Processes.mean = mean
    found = trained_on(
        tiny.build_pipeline("pixart"), config_of(target_speedup=1.3), state=state, work_dir=folder / "work"
    )
    kept = {"mask": found.schedules["transformer"].mask, "trace": found.trace, "weights": found.weights}
    torch.save({"means": means, **kept}, folder / f"{index}.pt")
    state.destroy_process_group()


def test_two_processes_learn_from_the_mean_of_their_gradients(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_one_of_two, args=(index, tmp_path, port)) for index in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    one, other = (torch.load(tmp_path / f"{index}.pt") for index in (0, 1))
    for name in ("mask", "trace", "weights"):
        assert torch.equal(one[name], other[name])
    assert len(one["means"]) == len(other["means"]) == 1 + 1 + 2 * (STEPS - 1)
    for (mine, shared), (theirs, same) in zip(one["means"], other["means"], strict=True):
        assert not torch.equal(mine, theirs)
        assert torch.equal(shared, same)
        torch.testing.assert_close(shared, (mine + theirs) / 2)
    assert sorted(path.name for path in (tmp_path / "work" / "router").iterdir()) == [
        "manifest.json",
        "profile.safetensors",
        "router.safetensors",
    ]


# --- schedulers ---------------------------------------------------------------------------------------------------

SCHEDULERS = [
    (DDIMScheduler, STEPS),
    (DDPMScheduler, STEPS),
    (DPMSolverMultistepScheduler, STEPS),
    (UniPCMultistepScheduler, STEPS),
    (EulerAncestralDiscreteScheduler, STEPS),
    (HeunDiscreteScheduler, 2 * STEPS - 1),
]


@pytest.mark.parametrize(("cls", "rows"), SCHEDULERS, ids=[cls.__name__ for cls, _ in SCHEDULERS])
def test_every_scheduler_goes_on_from_the_student(cls, rows, lessons, monkeypatch):
    pipe = tiny.build_pipeline("pixart")
    pipe.scheduler = cls()
    seen = spy(monkeypatch, cls)
    trained = prepared(pipe, config_of())
    assert len(trained.weights) == rows
    with trained.running():
        seen.clear()
        soft = trained.draw(trained._batches[0], 5, trained.rows, learning=False)
        alone = list(seen)
        seen.clear()
        learned = trained.draw(trained._batches[0], 5, trained.rows, learning=True)
    assert [lesson[0] for lesson in lessons if isinstance(lesson, tuple)] == list(range(1, rows))
    assert len(seen) == rows
    assert all(torch.equal(one, other) for one, other in zip(seen, alone, strict=True))
    assert torch.equal(learned, soft)
    assert type(pipe.scheduler) is cls


@pytest.mark.parametrize(("cache_point", "granularity"), [("post_gate", "block"), ("pre_gate", "branch")])
def test_with_decisions_for_scores_the_student_is_the_cache_of_the_schedule(cache_point, granularity):
    pipe = tiny.build_pipeline("pixart")
    trained = prepared(pipe, config_of(cache_point=cache_point, granularity=granularity, history=1))
    table, arguments = trained.tables["transformer"], trained._batches[0]
    generator = torch.Generator().manual_seed(1)
    table.logits[1:] = torch.where(torch.rand(table.logits[1:].shape, generator=generator) > 0.5, 40.0, -800.0)
    with trained.running():
        soft = trained.draw(arguments, 5, trained.rows, learning=False)
        uncached = trained.draw(arguments, 5, [], learning=False)
    schedule = trained.schedules()["transformer"]
    assert schedule.cache_point.value == cache_point
    assert 0 < schedule.reused < 0.7
    apply_cache(pipe.transformer, schedule)
    hard = pipe(**arguments, generator=torch.Generator().manual_seed(5), output_type="latent").images.double()
    remove_cache(pipe.transformer)
    torch.testing.assert_close(soft, hard, rtol=1e-4, atol=1e-5)
    assert float((soft - uncached).abs().max()) > 1e-2


# --- whole trainings ----------------------------------------------------------------------------------------------


def trained_on(pipe: Any, config: HarmoniCaConfig, **kwargs: Any) -> Any:
    options = {name: kwargs.pop(name) for name in ("work_dir", "callback", "state", "initial") if name in kwargs}
    return train_cache(pipe, PROMPTS, dataclasses.replace(config, force=True), **options, **call_of(pipe, **kwargs))


def test_a_higher_price_reuses_more():
    pipe = tiny.build_pipeline("pixart")
    shares, prices = [], (1e-9, 1e-5, 1.0)
    for beta in prices:
        config = config_of(beta=beta, trajectories=6, learning_rate=1.0, estimator="none", history=1)
        found = trained_on(pipe, config)
        shares.append(found.schedules["transformer"].reused)
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] == pytest.approx((STEPS - 1) / STEPS)


@pytest.mark.parametrize("granularity", ["block", "branch"])
def test_a_wanted_speedup_is_met_by_less_than_a_unit(granularity, untouched_rng, tmp_path):
    pipe = tiny.build_pipeline("pixart")
    seen: list[tuple[str, int, int, dict[str, Any]]] = []
    config = config_of(target_speedup=1.25, granularity=granularity, trajectories=3)
    found = trained_on(pipe, config, callback=lambda *told: seen.append(told))
    schedule = found.schedules["transformer"]
    full = STEPS * (float(schedule.cost_ms.double().sum()) + schedule.other_ms)
    saved = float(((1 - schedule.mask.double()) @ schedule.cost_ms.double()).sum())
    assert 0 <= saved - full * (1 - 1 / 1.25) <= float(schedule.cost_ms.max())
    assert found.predicted_speedup == pytest.approx(schedule.predicted_speedup)
    assert (schedule.scheduler, schedule.guidance) == (type(pipe.scheduler).__name__, Guidance.BATCHED)
    assert schedule.coefficients.shape == (*schedule.mask.shape, 2)
    assert schedule.details["target_speedup"] == 1.25
    assert [told[:3] for told in seen[-3:]] == [("Training a router", n, 3) for n in (1, 2, 3)]
    assert set(seen[-1][3]) == {"error", "reused", "price"}
    assert bool((found.trace[:, 2] > 0).all())
    assert found.error > 0
    assert found.soft_error > 0
    assert "trained on 3 trajectories" in str(found)
    # It is the artefact that a calibration gives.
    again = load_schedules(save_schedules(tmp_path / "cache.safetensors", {"": schedule}))[""]
    apply_cache(pipe.transformer, again)
    pipe(PROMPTS[0], **call_of(pipe), generator=torch.Generator(), output_type="latent")
    assert pipe.compression_stats().components["transformer"].methods["feature cache"].hits == int(
        (again.mask == 0).sum()
    )
    remove_cache(pipe.transformer)


def test_a_training_begins_with_a_schedule():
    pipe = tiny.build_pipeline("pixart")
    units = units_of(pipe.transformer, "branch")
    mask = torch.ones(STEPS, len(units), dtype=torch.uint8)
    mask[1::2, ::2] = 0
    schedule = Schedule.full(units, STEPS, "PixArtTransformer2DModel").with_mask(mask)
    config = config_of(trajectories=1, learning_rate=1e-3, estimator="none")
    found = trained_on(pipe, config, initial={"transformer": schedule})
    assert torch.equal(found.schedules["transformer"].mask, mask)
    # Steps of 1.2 take every score, of which the farthest is 4.2 above the threshold, below it.
    found = trained_on(
        pipe,
        config_of(beta=1.0, trajectories=4, learning_rate=1.2, estimator="none"),
        initial={"transformer": schedule},
    )
    assert not bool(found.schedules["transformer"].mask[1:].any())
    with pytest.raises(ConfigError, match="initial holds a schedule for 'unet', and there are transformer"):
        trained_on(pipe, config, initial={"unet": schedule})
    with pytest.raises(ConfigError, match="must have 4 steps, got 5"):
        trained_on(pipe, config, initial={"transformer": Schedule.full(units, 5, "PixArtTransformer2DModel")})
    with pytest.raises(ConfigError, match="its units are not those"):
        trained_on(pipe, config_of(granularity="block"), initial={"transformer": schedule})
    assert tracker_of(pipe.transformer) is None


def test_the_price_rises_while_the_loop_takes_too_long():
    trained = prepared(tiny.build_pipeline("pixart"), config_of(target_speedup=1.3))
    table = trained.tables["transformer"]
    trained.price, prices = 1.0, []
    # Computing everything by half saves nothing.
    for logit in (5.0, -1.0, -5.0):
        table.logits[table.trained] = logit
        trained._set_price()
        prices.append(trained.price)
    assert prices[0] > 1.0
    assert prices[1] / prices[0] == pytest.approx(prices[0])
    assert prices[2] < prices[1]
    dear = trained._prices("transformer") / table.cost_ms
    torch.testing.assert_close(dear, dear[:1].expand_as(dear))


def test_of_equal_scores_what_is_worth_least_for_its_time_is_reused():
    seen = torch.ones(3, dtype=torch.bool)
    table = RouterTable(seen, torch.tensor([1.0, 2.0]), config_of(), torch.Generator())
    table.logits[1:] = torch.tensor([[-5.0, -5.0], [1.0, -5.0]])
    table.worth[1:] = torch.tensor([[3.0, 4.0], [0.0, 8.0]])
    assert reused_within([table], 2.0)[0].tolist() == [[1, 1], [1, 0], [1, 1]]
    assert reused_within([table], 2.5)[0].tolist() == [[1, 1], [0, 0], [1, 1]]
    assert reused_within([table], 0.0)[0].tolist() == [[1, 1]] * 3
    with pytest.raises(ConfigError, match=r"cannot save another 1 ms"):
        reused_within([table], 7.0)


class StopError(Exception):
    pass


def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path):
    pipe = tiny.build_pipeline("pixart")
    config = config_of(target_speedup=1.3, trajectories=4, refresh_every=8, batch_size=2)

    def stop(stage, done, total, metrics):
        if stage == "Training a router" and done == 3:
            raise StopError

    with pytest.raises(StopError):
        trained_on(pipe, config, work_dir=tmp_path / "stopped", callback=stop)
    went_on: list[int] = []
    found = trained_on(
        pipe,
        config,
        work_dir=tmp_path / "stopped",
        callback=lambda stage, done, *_: went_on.append(done) if stage.startswith("Training") else None,
    )
    assert went_on == [4]
    profile = tmp_path / "stopped" / "router" / "profile.safetensors"
    folder = tmp_path / "whole" / "router"
    folder.mkdir(parents=True)
    (folder / profile.name).write_bytes(profile.read_bytes())  # times of units are never measured alike
    whole = trained_on(pipe, config, work_dir=tmp_path / "whole")
    for one, other in ((found, whole),):
        assert torch.equal(one.trace, other.trace)
        assert torch.equal(one.weights, other.weights)
        assert one.error == other.error
        mine, theirs = one.schedules["transformer"], other.schedules["transformer"]
        assert torch.equal(mine.mask, theirs.mask)
        assert torch.equal(mine.coefficients, theirs.coefficients)
    state = [(tmp_path / name / "router" / "router.safetensors").read_bytes() for name in ("stopped", "whole")]
    assert state[0] == state[1]
    with pytest.raises(ConfigError, match=r"holds 2 files of another calibration.*learning_rate 0.5 -> 0.1"):
        trained_on(
            pipe,
            config_of(target_speedup=1.3, trajectories=4, refresh_every=8, batch_size=2, learning_rate=0.1),
            work_dir=tmp_path / "stopped",
        )


@pytest.mark.parametrize("fails", [False, True])
def test_the_pipeline_stays_as_it_is(fails):
    pipe = tiny.build_pipeline("pixart")
    model, encoder = pipe.transformer, pipe.text_encoder
    model.train()
    model.enable_gradient_checkpointing()
    model.proj_out.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    attributes = dict(vars(pipe))
    asked: list[int] = []
    handle = encoder.register_forward_hook(lambda *_: asked.append(1))

    def callback(stage, done, total, metrics):
        assert not any(p.requires_grad for p in model.parameters()) or not stage.startswith("Training")
        if fails and stage.startswith("Training"):
            raise StopError

    config = config_of(beta=1e-3, trajectories=5, estimator="none")
    if fails:
        with pytest.raises(StopError):
            trained_on(pipe, config, callback=callback)
    else:
        trained_on(pipe, config, callback=callback)
        # Prompt and negative prompt, where items were recorded and in seven runs at the end; all once for training.
        assert len(asked) == 2 * len(PROMPTS) + (len(PROMPTS) + 1) + 2 * 7
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert model.gradient_checkpointing
    assert vars(pipe) == attributes
    assert pipe.text_encoder is encoder
    assert (cache_of(model), tracker_of(model)) == (None, None)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not model._forward_hooks


def test_a_quantized_model_is_trained_as_the_dense_one_of_its_weights(lessons):
    pipe = tiny.build_pipeline("pixart")
    dense = copy.deepcopy(pipe)
    pipe.compress("w4a16")
    for name, layer in pipe.transformer.named_modules():
        if hasattr(layer, "qweight"):
            dense.transformer.get_submodule(name).weight.data = layer.weight.detach().clone()
    packed = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    slopes = []
    for each in (pipe, dense):
        lessons.clear()
        trained = prepared(each, config_of())
        with trained.running():
            trained.draw(trained._batches[0], 0, trained.rows, learning=True)
        slopes.append(torch.stack([lesson[2] for lesson in lessons if isinstance(lesson, tuple)]))
    assert packed["transformer_blocks.0.attn1.to_q.qweight"].dtype == torch.int8
    assert float(slopes[1].abs().min()) > 0
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-9)
    assert all(torch.equal(value, packed[name]) for name, value in pipe.transformer.state_dict().items())


def test_what_cannot_be_trained_is_refused():
    pipe = tiny.build_pipeline("pixart")
    config, call = config_of(), call_of(pipe)
    with pytest.raises(ConfigError, match="fewer than 10 steps"):
        train_cache(pipe, PROMPTS, config, **call)
    with pytest.raises(ConfigError, match=r"generator\. Leave it out"):
        train_cache(pipe, PROMPTS, dataclasses.replace(config, force=True), generator=torch.Generator(), **call)
    with pytest.raises(ConfigError, match=r"batch_size=2 puts prompts .* together, and cannot do that with dict"):
        train_cache(pipe, [{"prompt": "a"}], config_of(batch_size=2, force=True), **call)
    with pytest.raises(ConfigError, match=r"cannot save another .* Lower target_speedup"):
        train_cache(pipe, PROMPTS, config_of(target_speedup=50.0, force=True), **call)
    with torch.inference_mode(), pytest.raises(ModelStateError, match="Call it outside"):
        train_cache(pipe, PROMPTS, dataclasses.replace(config, force=True), **call)
    wrong = [
        ({"beta": 1.0, "target_speedup": 2.0}, "either beta or target_speedup is needed"),
        ({"beta": None}, "either beta or target_speedup is needed, got beta=None"),
        ({"beta": -1.0}, "beta must be above 0, got -1.0"),
        ({"target_speedup": 1.0, "beta": None}, "target_speedup must be above 1"),
        ({"estimator": "first"}, "estimator must be 'leave_one_out', 'cumulative', 'gain', 'none', got 'first'"),
        ({"threshold": 1.0}, "threshold must be between 0 and 1"),
        ({"cache_point": "pre_gate"}, 'needs granularity="branch"'),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ]
    for fields, message in wrong:
        with pytest.raises(ConfigError, match=message):
            HarmoniCaConfig(**{"beta": 1.0, **fields})
    assert tracker_of(pipe.transformer) is None


def test_predictions_that_leave_torch_are_refused(monkeypatch):
    pipe = tiny.build_pipeline("pixart")
    monkeypatch.setattr(trainer, "paired", lambda student, teacher: teacher)
    with pytest.raises(ModelStateError, match="no gradient can be told"):
        trained_on(pipe, config_of())


def test_a_loop_without_a_scheduler_of_the_pipeline_is_refused(monkeypatch):
    monkeypatch.setattr(trainer, "schedulers_of", lambda pipe: {})
    with pytest.raises(ModelStateError, match="none has stepped with what the denoiser predicts"):
        trained_on(tiny.build_pipeline("pixart"), config_of(estimator="none"))


def test_encoders_wait_on_the_cpu_and_come_back_for_new_questions():
    moves: list[str] = []

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))
            self.asked = 0

        def to(self, device):
            moves.append(str(device))

        def forward(self, ids, mask=None):
            self.asked += 1
            return (ids * 2,)

    encoder = Encoder()
    stand_in = encoding._StandIn(encoder, movable=True)
    stand_in(torch.tensor([1, 2]))
    stand_in.put_away()
    assert stand_in(torch.tensor([1, 2]))[0].device.type == "meta"
    assert (moves, encoder.asked) == (["cpu"], 1)
    stand_in(torch.tensor([1, 2]), mask=torch.tensor([1, 0]))
    assert (moves, encoder.asked) == (["cpu", "meta", "cpu"], 2)
    stand_in.bring_back()
    assert moves[3:] == ["meta"]
    assert stand_in.asked == 2


def test_in_half_precision_gradients_are_much_the_same(lessons):
    slopes = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        lessons.clear()
        trained = prepared(tiny.build_pipeline("pixart", dtype=dtype), config_of(granularity="block"))
        with trained.running():
            trained.draw(trained._batches[0], 0, trained.rows, learning=True)
        slopes.append(torch.cat([lesson[2] for lesson in lessons if isinstance(lesson, tuple)]))
    for other in slopes[1:]:
        assert float(torch.nn.functional.cosine_similarity(slopes[0], other, dim=0)) > 0.95
        assert float(other.abs().min()) > 0


def test_files_that_are_damaged_are_named(tmp_path):
    pipe = tiny.build_pipeline("pixart")
    trained_on(pipe, config_of(), work_dir=tmp_path)
    state = Path(tmp_path, "router", "router.safetensors")
    state.write_bytes(state.read_bytes()[:50])
    with pytest.raises(Exception, match=r"router\.safetensors is damaged"):
        trained_on(pipe, config_of(), work_dir=tmp_path)
