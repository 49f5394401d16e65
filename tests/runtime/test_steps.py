"""The step protocol gives the right place or says that it does not know, whatever users do with their loops."""

from __future__ import annotations

import copy
import gc
import inspect
import os
import subprocess
import sys
import threading
import weakref
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    CacheMixin,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from torch import nn
from torch.utils.hooks import RemovableHandle

from diffuse_compress.errors import DiffuseCompressWarning
from diffuse_compress.runtime import events, run, steps
from diffuse_compress.runtime.sampling import SamplingSettings
from diffuse_compress.runtime.stats import PlanMissedError, Reason
from tiny import build, build_pipeline, call_kwargs

pytestmark = pytest.mark.usefixtures("fresh_thread")

SCHEDULERS = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax"))
# What these need beyond set_timesteps(n) and step(noise, t, sample); their loops differ from all others.
OTHER_LOOPS = {
    "AmusedScheduler": "token ids",
    "BlockRefinementScheduler": "token ids",
    "DiscreteDDIMScheduler": "token ids",
    "EntropyBoundScheduler": "token ids",
    "VQDiffusionScheduler": "token ids",
    "ScoreSdeVeScheduler": "step_pred",
    "ScoreSdeVpScheduler": "deprecated, no SchedulerMixin step",
    "KarrasVeScheduler": "deprecated",
    "RePaintScheduler": "needs an original image and a mask",
    "ConsistencyDecoderScheduler": "one or two steps only",
}


class Denoiser(nn.Module):
    """Records the place of each of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[steps.StepContext | None] = []

    def forward(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        self.seen.append(steps.current())
        return sample * self.weight

    def rows(self) -> list[int | None]:
        return [context.row for context in self.seen]

    def steps(self) -> list[int | None]:
        return [context.step for context in self.seen]

    def problems(self) -> list[str | None]:
        return [None if context.problem is None else context.problem.what for context in self.seen]


@pytest.fixture
def denoiser():
    model = Denoiser()
    steps.track(model)
    yield model
    steps.untrack(model)


@pytest.fixture
def unreadable(monkeypatch):
    """Timesteps as on a device: their values cannot be read in the loop."""
    monkeypatch.setattr(run, "_readable", lambda timestep: None)


def loop(model: nn.Module, scheduler: Any, *, scaled: bool = False, calls: int = 1, timesteps: Any = None) -> None:
    """A hand-written sampling loop. ``scaled`` hides the schedule's storage, as Flux's ``t / 1000`` does."""
    train = getattr(scheduler.config, "num_train_timesteps", 1000)
    sample = torch.zeros(1, 4, 8, 8)
    for t in scheduler.timesteps if timesteps is None else timesteps:
        for _ in range(calls):
            noise = model(sample, t / train if scaled else t)
        sample = scheduler.step(noise, t, sample, return_dict=False)[0]


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in OTHER_LOOPS])
def test_every_scheduler_counts_its_rows(name, scaled, denoiser):
    cls = getattr(diffusers, name)
    try:
        scheduler = cls()
        kwargs = {"mu": 1.0} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}
        scheduler.set_timesteps(6, **kwargs)
        loop(Denoiser(), copy.deepcopy(scheduler))
        scheduler.set_timesteps(6, **kwargs)
    except Exception as error:
        pytest.skip(f"cannot be used in a plain loop: {type(error).__name__}: {str(error)[:80]}")
    unused = cls()  # some constructors set a schedule: that is no run
    before = unused.to_json_string()
    loop(denoiser, scheduler, scaled=scaled)
    count = len(scheduler.timesteps)
    assert denoiser.steps() == list(range(count))
    # 1.0 is the first row's t / 1000, and the last row's t itself in schedules that end at 1.
    first, *_, last_but_one, last = scheduler.timesteps.tolist()
    unclear = 1 if scaled and first / 1000 == 1.0 == last != last_but_one else 0
    assert denoiser.problems() == [run.START_UNKNOWN.what] * unclear + [None] * (count - unclear)
    assert denoiser.rows()[unclear:] == list(range(unclear, count))
    assert [int(context.index) for context in denoiser.seen[unclear:]] == list(range(unclear, count))
    assert unused.to_json_string() == before


def test_most_schedulers_are_covered(denoiser):
    """The skip above must not swallow the list."""
    usable = 0
    for name in SCHEDULERS:
        if name in OTHER_LOOPS:
            continue
        try:
            scheduler = getattr(diffusers, name)()
            scheduler.set_timesteps(4)
            loop(Denoiser(), scheduler)
            usable += 1
        except Exception:
            continue
    assert usable >= 32


@torch.no_grad()
def test_score_sde_ends_an_iteration_with_step_pred(denoiser):
    scheduler = diffusers.ScoreSdeVeScheduler()
    scheduler.set_timesteps(4)
    scheduler.set_sigmas(4)
    sample = torch.zeros(1, 3, 8, 8)
    for t in scheduler.timesteps:
        for _ in range(scheduler.config.correct_steps):
            sample = scheduler.step_correct(denoiser(sample, t), sample).prev_sample
        sample = scheduler.step_pred(denoiser(sample, t), t, sample).prev_sample
    assert denoiser.steps() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [context.call for context in denoiser.seen] == [0, 1] * 4


def test_signatures_and_files_stay(denoiser, tmp_path):
    assert "eta" in inspect.signature(DDIMScheduler.step).parameters
    assert "mu" in inspect.signature(FlowMatchEulerDiscreteScheduler.set_timesteps).parameters
    assert "guidance_scale" in inspect.signature(diffusers.StableDiffusionPipeline.__call__).parameters
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.save_pretrained(tmp_path / "wrapped")
    steps.untrack(denoiser)
    events.uninstall()
    try:
        assert not hasattr(DDIMScheduler.step, "__wrapped__")
        scheduler.save_pretrained(tmp_path / "plain")
    finally:
        events.install(steps._LISTENER)
    name = "scheduler_config.json"
    assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@torch.no_grad()
def test_nothing_is_stored_on_a_scheduler(denoiser):
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    untouched = EulerDiscreteScheduler()
    untouched.set_timesteps(4)
    loop(denoiser, scheduler)
    loop(Denoiser(), untouched)
    assert vars(scheduler).keys() == vars(untouched).keys()


@torch.no_grad()
def test_classes_defined_later_and_nested_steps_count_once(denoiser):
    class Mine(EulerDiscreteScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs)

        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)

    scheduler = Mine()
    scheduler.set_timesteps(5)
    loop(denoiser, scheduler, scaled=True)
    assert denoiser.steps() == [0, 1, 2, 3, 4]
    assert denoiser.seen[0].run.taken == 5


@torch.no_grad()
def test_two_schedulers_in_one_iteration_count_once(denoiser):
    """LTX2 steps a video and an audio scheduler."""
    video, audio = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()
    audio.set_timesteps(4)
    video.set_timesteps(4)
    sample = torch.zeros(1, 4)
    for t in video.timesteps:
        noise = denoiser(sample, t / 1000)
        video.step(noise, t, sample)
        audio.step(noise, t, sample)
    assert denoiser.steps() == [0, 1, 2, 3]
    assert denoiser.problems()[1:] == [None] * 3


@torch.no_grad()
@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("scaled", [False, True])
def test_two_loops_in_turn_are_told_apart_or_refused(denoiser, scaled, readable, request):
    if not readable:
        request.getfixturevalue("unreadable")
    first, second = EulerDiscreteScheduler(), EulerDiscreteScheduler()
    first.set_timesteps(4)
    second.set_timesteps(4)
    sample = torch.zeros(1, 4)
    for row in range(4):
        for scheduler in (first, second):
            t = scheduler.timesteps[row]
            scheduler.step(denoiser(sample, t / 1000 if scaled else t), t, sample)
            context = denoiser.seen[-1]
            # Never a wrong answer: not a row, and not the storage of the other loop's features.
            assert context.row in (row, None)
            assert context.run is None or context.run.scheduler() is scheduler
    known = sum(context.problem is None for context in denoiser.seen)
    assert known == 8 if not scaled else known >= (2 if readable else 0)
    assert (steps.SCHEDULERS_IN_TURN.what in denoiser.problems()) == scaled


@torch.no_grad()
def test_an_interrupted_run_does_not_live_on(denoiser):
    sample = torch.zeros(1, 4)
    first = EulerDiscreteScheduler()
    first.set_timesteps(10)
    for t in first.timesteps[:5]:
        first.step(denoiser(sample, t), t, sample)
    first.set_timesteps(3)
    denoiser.seen.clear()
    loop(denoiser, first)
    assert denoiser.steps() == [0, 1, 2]
    # Another scheduler, its timesteps hidden but readable.
    second = FlowMatchEulerDiscreteScheduler()
    first.set_timesteps(10)
    for t in first.timesteps[:5]:
        first.step(denoiser(sample, t), t, sample)
    denoiser.seen.clear()
    second.set_timesteps(8)
    loop(denoiser, second, scaled=True)
    assert denoiser.steps()[1:] == list(range(1, 8))
    assert denoiser.rows()[0] in (0, None)


@torch.no_grad()
def test_an_interrupted_run_is_in_the_way_until_its_scheduler_is_gone(denoiser, unreadable):
    sample = torch.zeros(1, 4)
    first, second = EulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()
    first.set_timesteps(10)
    for t in first.timesteps[:5]:
        first.step(denoiser(sample, t), t, sample)
    second.set_timesteps(8)
    denoiser.seen.clear()
    for row, t in enumerate(second.timesteps):
        if row == 4:
            del first
        second.step(denoiser(sample, t / 1000), t, sample)
    assert denoiser.problems()[:4] == [steps.SCHEDULERS_IN_TURN.what] * 4
    assert denoiser.rows()[4:] == [4, 5, 6, 7]


@torch.no_grad()
def test_a_paused_request_goes_on(denoiser):
    """A server that pauses one hand-written loop for another."""
    first, second = EulerDiscreteScheduler(), EulerDiscreteScheduler()
    first.set_timesteps(6)
    loop(denoiser, first, timesteps=first.timesteps[:2])
    second.set_timesteps(6)
    loop(denoiser, second, timesteps=second.timesteps[:4])
    denoiser.seen.clear()
    loop(denoiser, first, timesteps=first.timesteps[2:])
    assert denoiser.rows() == [2, 3, 4, 5]
    assert {context.run.scheduler() for context in denoiser.seen} == {first}


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("readable", [True, False])
def test_copies_of_a_set_scheduler_in_turn(denoiser, scaled, readable, request):
    if not readable:
        request.getfixturevalue("unreadable")
    original = EulerDiscreteScheduler()
    original.set_timesteps(4)
    copies, sample = [copy.deepcopy(original), copy.deepcopy(original)], torch.zeros(1, 4)
    for row in range(4):
        for mine in copies:
            t = mine.timesteps[row]
            mine.step(denoiser(sample, t / 1000 if scaled else t), t, sample)
            assert denoiser.seen[-1].row in (row, None)
    assert None in denoiser.rows()


@torch.no_grad()
def test_a_copy_with_its_schedule_hidden_on_a_device_is_refused_after_the_start(denoiser, unreadable):
    original = EulerDiscreteScheduler()
    original.set_timesteps(4)
    loop(denoiser, copy.deepcopy(original), scaled=True)
    assert denoiser.problems() == [run.START_UNKNOWN.what] + [run.COPIED.what] * 3


@torch.no_grad()
@pytest.mark.parametrize("hand", ["number", "clone", "batch", "reversed", "whole and reversed"])
@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
@pytest.mark.parametrize("start", [0, 4])
def test_timesteps_that_are_no_views(denoiser, cls, hand, start):
    """What people hand to models: numbers, clones, whole batches, 1 - t / 1000. Img2img by hand, no begin index."""
    scheduler, sample = cls(), torch.zeros(2, 4)
    scheduler.set_timesteps(10)
    form = {
        "number": float,
        "clone": torch.clone,
        "batch": lambda t: torch.full((2,), float(t), dtype=torch.bfloat16 if t.is_floating_point() else torch.int64),
        "reversed": lambda t: (1000 - t.expand(2)) / 1000,
        "whole and reversed": lambda t: 1000 - t,
    }[hand]
    for t in scheduler.timesteps[start:]:
        scheduler.step(denoiser(sample, form(t)), t, sample)
    assert denoiser.steps() == list(range(10 - start))
    known = [row for row in denoiser.rows() if row is not None]
    assert known == list(range(10 - len(known), 10))
    assert len(known) >= 9 - start
    assert denoiser.seen[-1].run.num_steps == 10 - start


@torch.no_grad()
@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_hidden_start_on_a_device_is_known_after_one_step(denoiser, cls, unreadable):
    plans = []
    steps.track(denoiser, steps.Consumer("planner", lambda run: plans.append(run.num_steps)))
    scheduler = cls()
    scheduler.set_timesteps(10)
    loop(denoiser, scheduler, timesteps=scheduler.timesteps[6:], scaled=True)
    assert denoiser.rows() == [None, 7, 8, 9]
    assert denoiser.steps() == [0, 1, 2, 3]
    assert denoiser.problems() == [run.START_UNKNOWN.what, None, None, None]
    assert plans == [4]


@torch.no_grad()
def test_another_schedule_that_is_only_looked_at(denoiser):
    looked_at, used = EulerDiscreteScheduler(), DDIMScheduler()
    used.set_timesteps(5)
    looked_at.set_timesteps(8)
    loop(denoiser, used, scaled=True)
    assert denoiser.rows()[:4] == [0, 1, 2, 3]
    # The last one, 0, is the other's last, too.
    assert denoiser.rows()[4] in (4, None)
    assert {context.run.scheduler() for context in denoiser.seen[:4]} == {used}


@torch.no_grad()
def test_a_loop_that_never_steps_is_found_out(denoiser, unreadable):
    scheduler, sample = EulerDiscreteScheduler(), torch.zeros(1, 4)
    scheduler.set_timesteps(30)
    loop(denoiser, scheduler, timesteps=scheduler.timesteps[:3])
    denoiser.seen.clear()
    for sigma in torch.linspace(1, 0, 20):
        denoiser(sample, sigma)
    assert denoiser.problems()[2:] == [run.JUMPED.what] * 18


@torch.no_grad()
@pytest.mark.parametrize("readable", [True, False])
def test_samples_at_different_timesteps(denoiser, readable, request):
    if not readable:
        request.getfixturevalue("unreadable")
    scheduler, sample = diffusers.DDIMParallelScheduler(), torch.zeros(3, 4)
    scheduler.set_timesteps(9)
    for start in (0, 3, 6):
        rows = scheduler.timesteps[start : start + 3]
        scheduler.batch_step_no_noise(denoiser(sample, rows), rows, sample)
        if readable:
            denoiser(sample, rows.clone())
    assert set(denoiser.problems()) == {run.SEVERAL_ROWS.what}
    assert denoiser.seen[0].index is None


@torch.no_grad()
def test_a_forward_without_names():
    class Wrapped(Denoiser):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().forward(*args, **kwargs)

    model = Wrapped()
    steps.track(model)
    scheduler, sample = EulerDiscreteScheduler(), torch.zeros(1, 4)
    for by_name in (False, True):
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps[1:]:
            noise = model(sample, timestep=t) if by_name else model(sample, t)
            scheduler.step(noise, t, sample)
        assert model.rows() == [1, 2]
        model.seen.clear()


@torch.no_grad()
def test_a_schedule_set_in_the_users_own_constructor(denoiser):
    class Request:
        def __init__(self) -> None:
            self.scheduler = EulerDiscreteScheduler()
            self.scheduler.set_timesteps(3)

    loop(denoiser, Request().scheduler)
    assert denoiser.rows() == [0, 1, 2]


@torch.no_grad()
def test_past_the_end_is_unknown(denoiser):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    loop(denoiser, scheduler)
    loop(denoiser, scheduler, scaled=True)
    assert denoiser.steps() == [0, 1, 2, None, None, None]
    assert denoiser.problems()[3:] == [run.PAST_THE_END.what] * 3


@torch.no_grad()
def test_no_schedule_is_unknown(denoiser):
    denoiser(torch.zeros(1, 4), 999)
    assert denoiser.problems() == [steps.NO_SCHEDULE.what]
    assert denoiser.seen[0].index is None
    assert steps.stats_of({"unet": denoiser}).components["unet"].unknown[steps.NO_SCHEDULE] == 1


@torch.no_grad()
@pytest.mark.parametrize("cls", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
@pytest.mark.parametrize("begin_index", [False, True])
def test_a_run_may_start_within_the_schedule(cls, begin_index, denoiser):
    """img2img: with and without set_begin_index, which older schedulers lack."""
    scheduler = cls()
    scheduler.set_timesteps(10)
    if begin_index:
        if not hasattr(scheduler, "set_begin_index"):
            pytest.skip("has no begin index")
        scheduler.set_begin_index(6)
    rest = scheduler.timesteps[6:]
    loop(denoiser, scheduler, timesteps=rest, scaled=begin_index)
    count = len(rest)
    assert denoiser.steps() == list(range(count))
    assert denoiser.rows() == list(range(6, 6 + count))
    assert denoiser.seen[0].run.num_steps == count


@torch.no_grad()
def test_a_hidden_start_is_found_after_one_step(denoiser):
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    loop(denoiser, scheduler, timesteps=scheduler.timesteps[6:], scaled=True)
    assert denoiser.rows()[1:] == [7, 8, 9]
    assert denoiser.steps() == [0, 1, 2, 3]


@torch.no_grad()
@pytest.mark.parametrize("cls", [HeunDiscreteScheduler, PNDMScheduler])
def test_repeated_timesteps_are_rows_of_their_own(cls, denoiser):
    scheduler = cls(skip_prk_steps=True) if cls is PNDMScheduler else cls()
    scheduler.set_timesteps(5)
    timesteps = scheduler.timesteps.tolist()
    assert len(set(timesteps)) < len(timesteps)
    loop(denoiser, scheduler)
    assert denoiser.rows() == list(range(len(timesteps)))


@torch.no_grad()
def test_calls_of_a_step(denoiser):
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    loop(denoiser, scheduler, calls=2)
    assert [(context.step, context.call) for context in denoiser.seen] == [(s, c) for s in range(3) for c in (0, 1)]


@torch.no_grad()
def test_a_copy_per_request_and_a_swapped_scheduler(denoiser):
    original = EulerDiscreteScheduler()
    for _ in range(2):
        mine = copy.deepcopy(original)
        mine.set_timesteps(4)
        denoiser.seen.clear()
        loop(denoiser, mine)
        assert denoiser.steps() == [0, 1, 2, 3]
    # Copied with its schedule: the original must not be the one that steps.
    original.set_timesteps(4)
    mine = copy.deepcopy(original)
    denoiser.seen.clear()
    loop(denoiser, mine, scaled=True)
    assert denoiser.rows() == [0, 1, 2, 3]
    assert original.step_index is None
    swapped = DPMSolverMultistepScheduler.from_config(original.config)
    swapped.set_timesteps(6)
    denoiser.seen.clear()
    loop(denoiser, swapped)
    assert denoiser.steps() == list(range(6))


@torch.no_grad()
def test_threads_have_runs_of_their_own(denoiser):
    barrier = threading.Barrier(2)
    seen: dict[int, list[int | None]] = {}

    class Meeting(EulerDiscreteScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            barrier.wait(timeout=20)
            return super().step(*args, **kwargs)

    def generate(count: int) -> None:
        with torch.no_grad():
            scheduler = Meeting()
            scheduler.set_timesteps(count)
            sample = torch.zeros(1, 4)
            seen[count] = []
            for t in scheduler.timesteps[:5]:
                denoiser(sample, t / 1000)
                seen[count].append(len([c for c in denoiser.seen if c.run and c.run.num_rows == count]) - 1)
                scheduler.step(sample, t, sample)

    threads = [threading.Thread(target=generate, args=(count,)) for count in (5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for count in (5, 6):
        assert [c.step for c in denoiser.seen if c.run.num_rows == count] == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_two_experts_share_the_count():
    """Wan 2.2: the second model's first call is in the middle of the schedule."""
    high, low = Denoiser(), Denoiser()
    for only_low in (False, True):
        steps.track(low)
        if not only_low:
            steps.track(high)
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(6)
        sample = torch.zeros(1, 4)
        for i, t in enumerate(scheduler.timesteps):
            scheduler.step((high if i < 4 else low)(sample, t.expand(1)), t, sample)
        if not only_low:
            assert high.steps() == [0, 1, 2, 3]
        assert low.steps() == [4, 5]
        assert low.rows() == [4, 5]
        low.seen.clear()
        steps.untrack(high)
        steps.untrack(low)


@torch.no_grad()
def test_per_token_timesteps(denoiser):
    """Wan 2.2 TI2V hands every token its own timestep: 0 where the picture is given."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    sample = torch.zeros(1, 4)
    for t in scheduler.timesteps:
        scheduler.step(denoiser(sample, torch.cat([torch.zeros(3), t.expand(5)])[None]), t, sample)
    assert denoiser.rows() == [0, 1, 2, 3]
    assert all(context.per_token for context in denoiser.seen)


@torch.no_grad()
def test_an_exception_leaves_nothing_behind(denoiser):
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(RuntimeError):
        denoiser(torch.zeros(1, 4), scheduler.timesteps[0].expand(2, 3) @ torch.zeros(2))
    assert steps.current() is None
    denoiser.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        denoiser(torch.zeros(1, 4), scheduler.timesteps[0])
    assert steps.current() is None


def test_gradients_block_reuse_and_no_place_is_lost(denoiser):
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    denoiser(torch.zeros(1, 4), scheduler.timesteps[0])
    context = denoiser.seen[0]
    assert context.problem is None
    assert context.blocker is steps.GRADIENT
    with torch.no_grad():
        assert context.blocker is None


def test_a_deep_copied_model_is_tracked_on_its_own(denoiser):
    twin = copy.deepcopy(denoiser)
    assert steps.tracker_of(twin) is not steps.tracker_of(denoiser)
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    with torch.no_grad():
        loop(twin, scheduler)
    assert twin.steps() == [0, 1, 2]
    assert denoiser.seen == []
    assert steps.tracker_of(twin).last.steps == 3
    assert steps.tracker_of(denoiser).last is None


def test_untrack_leaves_no_hook(denoiser):
    steps.track(denoiser, steps.Consumer("a"))
    steps.track(denoiser, steps.Consumer("b"))
    steps.untrack(denoiser, "a")
    assert steps.tracker_of(denoiser) is not None
    steps.untrack(denoiser, "b")
    assert not denoiser._forward_pre_hooks
    assert not denoiser._forward_hooks
    assert not denoiser._forward_pre_hooks_with_kwargs
    assert not denoiser._forward_hooks_always_called


# Whole pipelines ------------------------------------------------------------------------------------------------------


class Recorder:
    """A consumer that plans to save one unit in every step but the first, and does what ``act`` says."""

    def __init__(self, model: nn.Module, strict: bool = False) -> None:
        self.seen: list[steps.StepContext] = []
        self.reason: Reason | None = None
        self.model = model
        steps.track(model, steps.Consumer("recorder", lambda run: [0] + [1] * (run.num_steps - 1), strict=strict))
        self.handle = model.register_forward_pre_hook(self.act)

    def act(self, module: nn.Module, args: Any) -> None:
        context = steps.current()
        self.seen.append(context)
        if context.step and self.reason is None:
            context.hit("recorder")
        elif context.step:
            context.miss("recorder", self.reason)

    def remove(self) -> None:
        steps.untrack(self.model)
        self.handle.remove()


@pytest.fixture
def pixart():
    pipe = build_pipeline("pixart")
    recorder = Recorder(pipe.transformer)
    yield pipe, recorder
    recorder.remove()


def test_a_pipeline_call(pixart):
    pipe, recorder = pixart
    arguments = call_kwargs(pipe) | {"num_inference_steps": 5}
    for _ in range(2):
        recorder.seen.clear()
        pipe(**arguments)
        assert [context.step for context in recorder.seen] == [0, 1, 2, 3, 4]
        stats = pipe.compression_stats()
        call = stats.components["transformer"]
        assert (call.planned_steps, call.steps, call.calls) == (5, 5, 5)
        method = call.methods["recorder"]
        assert (method.planned, method.hits, method.achieved) == (4, 4, 1.0)
        assert stats.to_dict()["transformer"]["methods"]["recorder"]["reasons"] == {}


def test_a_missed_plan_warns_once_with_reason_and_fix(pixart):
    pipe, recorder = pixart
    recorder.reason = Reason("the moon is full", "wait")
    arguments = call_kwargs(pipe) | {"num_inference_steps": 4}
    with pytest.warns(
        DiffuseCompressWarning, match=r"recorder saved 0 of 3 .*the moon is full \(3 times\)\. Fix: wait"
    ):
        pipe(**arguments)
    pipe(**arguments)  # a second warning would be an error here
    assert "computed 3 times: the moon is full" in str(pipe.compression_stats())
    with pytest.raises(PlanMissedError, match="the moon is full"):
        pipe.compression_stats(strict=True)


def test_strict_raises_in_the_call():
    pipe = build_pipeline("pixart")
    recorder = Recorder(pipe.transformer, strict=True)
    recorder.reason = Reason("the moon is full", "wait")
    with pytest.raises(PlanMissedError, match="wait"):
        pipe(**call_kwargs(pipe) | {"num_inference_steps": 4})
    recorder.remove()


def test_an_interrupt_and_an_exception_end_the_run(pixart):
    pipe, recorder = pixart
    arguments = call_kwargs(pipe) | {"num_inference_steps": 4}

    def explode(*_: Any) -> None:
        if len(recorder.seen) == 3:
            raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(explode)
    recorder.seen.clear()
    with pytest.raises(KeyboardInterrupt):
        pipe(**arguments)
    handle.remove()
    run = recorder.seen[-1].run
    run.storage(pipe)["kept"] = torch.zeros(1)
    assert steps.current() is None
    assert len(steps._thread.scopes) == 1
    recorder.seen.clear()
    pipe(**arguments)
    assert [context.step for context in recorder.seen] == [0, 1, 2, 3]
    assert recorder.seen[0].run is not run


def test_an_interrupted_pipeline_is_no_missed_plan():
    pipe = build_pipeline("stable_diffusion")
    recorder = Recorder(pipe.unet)

    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 2
        return kwargs

    pipe(**call_kwargs(pipe) | {"num_inference_steps": 6, "callback_on_step_end": stop})
    method = pipe.compression_stats().components["unet"].methods["recorder"]
    # What was interrupted does not count.
    assert (method.planned, method.hits) == (2, 2)
    assert pipe.compression_stats().components["unet"].planned_steps == 6
    assert pipe.compression_stats().missed() == []
    pipe._interrupt = False
    recorder.seen.clear()
    pipe(**call_kwargs(pipe) | {"num_inference_steps": 3})
    assert [context.step for context in recorder.seen] == [0, 1, 2]
    recorder.remove()


def test_a_batch_that_changes_and_a_swapped_scheduler():
    pipe = build_pipeline("stable_diffusion")
    recorder = Recorder(pipe.unet)

    def drop_guidance(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    arguments = call_kwargs(pipe) | {"num_inference_steps": 4, "guidance_scale": 5.0}
    pipe(**arguments, callback_on_step_end=drop_guidance, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert [context.step for context in recorder.seen] == [0, 1, 2, 3]
    for cls in (DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler):
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        recorder.seen.clear()
        pipe(**arguments)
        assert [context.row for context in recorder.seen] == list(range(len(pipe.scheduler.timesteps)))
    recorder.remove()


def test_two_pipelines_share_a_denoiser():
    first = build_pipeline("stable_diffusion")
    second = type(first)(**{**first.components, "scheduler": EulerDiscreteScheduler()}, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    recorder = Recorder(first.unet)
    for pipe, count in ((first, 3), (second, 5), (first, 4)):
        recorder.seen.clear()
        pipe(**call_kwargs(pipe) | {"num_inference_steps": count})
        assert [context.step for context in recorder.seen] == list(range(count))
    assert first.compression_stats().components["unet"].planned_steps == 4
    assert second.compression_stats().components["unet"].planned_steps == 5
    recorder.remove()


def test_sequential_guidance_is_told_by_branch():
    pipe = build_pipeline("wan")
    recorder = Recorder(pipe.transformer)
    pipe(**call_kwargs(pipe) | {"num_inference_steps": 3, "guidance_scale": 4.0})
    assert [(context.step, context.key) for context in recorder.seen] == [
        (step, name) for step in range(3) for name in ("cond", "uncond")
    ]
    recorder.remove()


def test_flux_scales_its_timesteps():
    pipe = build_pipeline("flux")
    recorder = Recorder(pipe.transformer)
    pipe(**call_kwargs(pipe) | {"num_inference_steps": 4})
    assert [context.row for context in recorder.seen] == [0, 1, 2, 3]
    recorder.remove()


def test_no_value_is_read_back(pixart, monkeypatch):
    """No `.item()` in the loop: it would make the host wait for the device."""
    pipe, _ = pixart
    forbidden: list[str] = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
            frame = inspect.currentframe().f_back
            if "runtime" in frame.f_code.co_filename:
                forbidden.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    pipe(**call_kwargs(pipe) | {"num_inference_steps": 3})
    assert forbidden == []


def test_compiled_models_are_said_to_be_unseen():
    pipe = build_pipeline("pixart")
    steps.track(pipe.transformer, steps.Consumer("cache"))
    known = SamplingSettings(("AnotherScheduler",), (50,))
    steps.track(pipe.transformer, steps.Consumer("static scales", saves=False, calibrated=known))  # has nothing to say
    pipe.transformer.compile(backend="eager", fullgraph=True)
    with pytest.warns(DiffuseCompressWarning, match=r"^transformer: cache saved nothing: the model was not seen.*Fix"):
        pipe(**call_kwargs(pipe) | {"num_inference_steps": 2})
    assert pipe.compression_stats().components["transformer"].unknown[steps.NOT_SEEN] == 1
    pipe(**call_kwargs(pipe) | {"num_inference_steps": 2})
    with pytest.raises(PlanMissedError, match="compile_repeated_blocks"):
        pipe.compression_stats(strict=True)
    steps.untrack(pipe.transformer)


def test_the_warning_points_at_the_users_line(pixart):
    pipe, recorder = pixart
    recorder.reason = Reason("the moon is full", "wait")
    with pytest.warns(DiffuseCompressWarning, match="^transformer: recorder saved 0 of 3") as caught:
        pipe(**call_kwargs(pipe) | {"num_inference_steps": 4})
    assert [warning.filename for warning in caught if "recorder" in str(warning.message)] == [__file__]


def test_a_method_that_is_never_reached_has_missed_its_plan(pixart):
    pipe, recorder = pixart
    recorder.handle.remove()
    with pytest.warns(DiffuseCompressWarning, match=r"saved 0 of 3 .*was not reached"):
        pipe(**call_kwargs(pipe) | {"num_inference_steps": 4})


@torch.no_grad()
def test_hand_written_loops_are_checked_at_their_end(denoiser):
    recorder = Recorder(denoiser)
    recorder.reason = Reason("the moon is full", "wait")
    scheduler, sample = EulerDiscreteScheduler(), torch.zeros(1, 4)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps[:3]:
        scheduler.step(denoiser(sample, t), t, sample)
    denoiser(sample, t := scheduler.timesteps[3])
    with pytest.warns(DiffuseCompressWarning, match="^Denoiser: recorder saved 0 of 3") as caught:
        scheduler.step(sample, t, sample)
    assert caught[0].filename == __file__
    assert steps.stats_of({"unet": denoiser}).missed() == [("unet", "recorder")]
    recorder.remove()


@torch.no_grad()
def test_a_loop_without_a_scheduler_is_told_so_once(denoiser):
    steps.track(denoiser, steps.Consumer("cache"))
    for sigma in (1.0, 0.9):
        denoiser(torch.zeros(1, 4), sigma)
    with pytest.warns(DiffuseCompressWarning, match="^Denoiser: cache saved nothing: no scheduler"):
        denoiser(torch.zeros(1, 4), 0.8)
    for sigma in (0.7, 0.6):
        denoiser(torch.zeros(1, 4), sigma)


@torch.no_grad()
def test_settings_far_from_a_calibration_are_told_of_once_for_each(denoiser):
    def consumer(*steps_: int) -> steps.Consumer:
        known = SamplingSettings(("EulerDiscreteScheduler",), steps_, ("none",), ((4, 8, 8),))
        return steps.Consumer("static scales", saves=False, calibrated=known)

    def run_steps(count: int) -> None:
        scheduler = EulerDiscreteScheduler()
        scheduler.set_timesteps(count)
        loop(denoiser, scheduler)

    steps.track(denoiser, consumer(4))
    for sigma in (1.0, 0.9, 0.8, 0.7):
        denoiser(torch.zeros(1, 4), sigma)  # no scheduler: nothing is known of it
    for count in (2, 4, 8):
        run_steps(count)
    with pytest.warns(
        DiffuseCompressWarning, match=r"^Denoiser: static scales .* 4 steps, and this call ran with 9 st"
    ):
        run_steps(9)
    run_steps(9)
    steps.track(denoiser, consumer(4))
    run_steps(9)
    steps.track(denoiser, consumer(30))
    with pytest.warns(DiffuseCompressWarning, match="with 30 steps, and this call ran with 9 steps"):
        run_steps(9)
    steps.untrack(denoiser, "another")
    assert steps.tracker_of(denoiser) is not None


@torch.no_grad()
@pytest.mark.parametrize("lost", [False, True])
def test_each_expert_answers_for_its_own_steps(lost):
    """Wan 2.2: both have a plan for the whole schedule. Steps that nobody was seen in are not forgiven."""
    high, low = Denoiser(), Denoiser()
    recorders = [Recorder(high), Recorder(low)]
    scheduler, sample = FlowMatchEulerDiscreteScheduler(), torch.zeros(1, 4)
    scheduler.set_timesteps(6)
    for i, t in enumerate(scheduler.timesteps):
        told = torch.stack([t, t - 1]) if lost and i == 3 else t
        noise = (high if i < 4 else low)(sample, told)
        if i < 5:
            scheduler.step(noise, t, sample)
    with pytest.warns(DiffuseCompressWarning, match="^Denoiser: recorder saved 2 of 3") if lost else nullcontext():
        scheduler.step(noise, t, sample)
    first, second = (steps.tracker_of(model).last.methods["recorder"] for model in (high, low))
    assert (first.planned, first.hits) == (3, 2 if lost else 3)
    assert (second.planned, second.hits) == (2, 2)
    for recorder in recorders:
        recorder.remove()


def test_statistics_are_those_of_the_pipeline_that_is_asked():
    first = build_pipeline("stable_diffusion")
    second = type(first)(**first.components, requires_safety_checker=False)
    recorder = Recorder(first.unet)
    first(**call_kwargs(first) | {"num_inference_steps": 3})
    assert second.compression_stats().components["unet"].calls == 0
    first.scheduler.set_timesteps(2)
    with torch.no_grad():
        for t in first.scheduler.timesteps:
            sample = torch.zeros(1, 4, 8, 8)
            noise = first.unet(sample, t, torch.zeros(1, 4, first.unet.config.cross_attention_dim)).sample
            first.scheduler.step(noise, t, sample)
    assert first.compression_stats().components["unet"].planned_steps == 2
    recorder.remove()


def test_a_tracked_model_follows_its_steps_in_a_fresh_process(tmp_path, monkeypatch):
    program = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
from diffusers import DDIMScheduler
from diffuse_compress.runtime import steps
scheduler = DDIMScheduler()
scheduler.set_timesteps(3)
seen = []
model.register_forward_pre_hook(lambda module, args: seen.append(steps.current().row))
with torch.no_grad():
    for t in scheduler.timesteps:
        scheduler.step(model(torch.zeros(1, 4, 16, 16), t).sample, t, torch.zeros(1, 4, 16, 16))
assert seen == [0, 1, 2], seen
"""
    model = build("unet")
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # where a fresh process begins
    steps.track(model)
    torch.save(model, tmp_path / "model.pt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.pt")], check=True, timeout=120, env=environment
    )


def test_a_tracked_model_can_be_pickled(denoiser, tmp_path):
    steps.track(denoiser, steps.Consumer("with a default plan"))
    torch.save(denoiser, tmp_path / "model.pt")
    assert steps.tracker_of(torch.load(tmp_path / "model.pt", weights_only=False)) is not None


def test_a_compiled_wrapper_is_seen_through(denoiser):
    assert steps.tracker_of(torch.compile(denoiser, backend="eager")) is steps.tracker_of(denoiser)


@torch.no_grad()
@pytest.mark.parametrize("hidden", ["", "in numbers", "on a device"])
def test_a_restarted_loop_is_unknown(denoiser, hidden, request):
    if hidden == "on a device":
        request.getfixturevalue("unreadable")
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(7)
    loop(denoiser, scheduler, timesteps=scheduler.timesteps[:3], scaled=bool(hidden))
    loop(denoiser, scheduler, scaled=bool(hidden))
    # Of a hidden timestep on a device, the first step is what gives the restart away.
    told = 1 if hidden == "on a device" else 0
    assert denoiser.problems()[3 + told : 7] == [run.JUMPED.what] * (4 - told)
    assert denoiser.problems()[7:] == [run.PAST_THE_END.what] * 3


@torch.no_grad()
@pytest.mark.parametrize("begin_index", [False, True])
@pytest.mark.parametrize("hidden", ["", "in numbers", "on a device"])
def test_a_loop_that_steps_by_itself(denoiser, hidden, begin_index, request):
    """RF-Inversion, FlowEdit: the user's own update. Followed where the timestep proves its row."""
    if hidden == "on a device":
        request.getfixturevalue("unreadable")
    scheduler, sample = FlowMatchEulerDiscreteScheduler(), torch.zeros(1, 4)
    scheduler.set_timesteps(6)
    if begin_index:
        scheduler.set_begin_index(0)
    for row, t in enumerate(scheduler.timesteps):
        denoiser(sample, t / 1000 if hidden else t)
        assert denoiser.seen[-1].row in (row, None)
        assert denoiser.seen[-1].step == row or denoiser.seen[-1].problem is not None
    assert denoiser.rows()[1:] == ([None] * 5 if hidden else list(range(1, 6)))


@torch.no_grad()
@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_copy_of_the_schedule_on_a_device(denoiser, cls, unreadable):
    """``for t in reversed(scheduler.timesteps)`` is one too: its elements prove nothing."""
    scheduler = cls()
    scheduler.set_timesteps(5)
    loop(denoiser, scheduler, timesteps=scheduler.timesteps.clone()[2:])
    assert denoiser.rows() == ([None] * 3 if cls is DDIMScheduler else [None, 3, 4])
    if cls is DDIMScheduler:
        denoiser.seen.clear()
        loop(denoiser, scheduler, timesteps=scheduler.timesteps.flip(0))
        assert denoiser.rows() == [None] * 5


@torch.no_grad()
@pytest.mark.parametrize("own_update", [False, True])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_a_reversed_loop(denoiser, own_update, steps_offset):
    """Inversion by hand."""
    scheduler = DDIMScheduler(steps_offset=steps_offset)
    scheduler.set_timesteps(5)
    for row, t in zip((4, 3, 2, 1, 0), reversed(scheduler.timesteps), strict=True):
        noise = denoiser(torch.zeros(1, 4), t)
        assert denoiser.seen[-1].row in (row, None)
        if not own_update:
            scheduler.step(noise, t, torch.zeros(1, 4))


@torch.no_grad()
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler])
def test_timesteps_that_replace_the_schedule(denoiser, cls, hidden):
    """Distilled models' scripts."""
    scheduler = cls()
    for own in ([999, 500, 100, 20], [801, 401]):
        scheduler.set_timesteps(4)
        scheduler.timesteps = torch.tensor(own, dtype=scheduler.timesteps.dtype)
        denoiser.seen.clear()
        loop(denoiser, scheduler, scaled=hidden)
        assert denoiser.rows() == list(range(len(own)))
        assert [int(context.run.timesteps[context.row]) for context in denoiser.seen] == own
        assert denoiser.seen[0].run.num_steps == len(own)


@torch.no_grad()
def test_bf16_timesteps_near_the_start(denoiser):
    for start in (0, 1, 2, 3):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(50)
        denoiser.seen.clear()
        for t in scheduler.timesteps[start:]:
            noise = denoiser(torch.zeros(1, 4), (t / 1000).to(torch.bfloat16).expand(1))
            scheduler.step(noise, t, torch.zeros(1, 4))
        assert denoiser.rows()[1:] == list(range(start + 1, 50))
        assert denoiser.rows()[0] in (start, None)


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("warm_up", [1, torch.tensor(1.0), torch.tensor([999.0])])
def test_a_warm_up_call_does_not_cost_the_run(denoiser, warm_up, scaled):
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    denoiser(torch.zeros(1, 4), warm_up)
    loop(denoiser, scheduler, scaled=scaled)
    assert denoiser.rows()[2:] == [1, 2, 3, 4]
    assert denoiser.steps()[2:] == [1, 2, 3, 4]


@torch.no_grad()
def test_numpy_timesteps(denoiser):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    loop(denoiser, scheduler, timesteps=scheduler.timesteps.numpy()[1:])
    assert denoiser.rows() == [1, 2, 3, 4]


@torch.no_grad()
def test_several_steps_in_a_row(denoiser):
    """Panorama pipelines step a copy of the scheduler's state for every view."""
    scheduler, sample = DDIMScheduler(), torch.zeros(1, 4)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        for _ in range(3):
            scheduler.step(denoiser(sample, t), t, sample)
    assert denoiser.rows() == [row for row in range(4) for _ in range(3)]
    assert [context.call for context in denoiser.seen] == [0, 1, 2] * 4


@torch.no_grad()
def test_a_branching_search(denoiser):
    """A copy in mid-loop looks ahead; the original goes on."""
    scheduler, sample = EulerDiscreteScheduler(), torch.zeros(1, 4)
    scheduler.set_timesteps(4)
    for row, t in enumerate(scheduler.timesteps):
        if row == 2:
            scout = copy.deepcopy(scheduler)
            scout.step(denoiser(sample, scout.timesteps[2]), scout.timesteps[2], sample)
            denoiser(sample, scout.timesteps[3])
            assert denoiser.seen.pop().row is None
            denoiser.seen.pop()
        scheduler.step(denoiser(sample, t), t, sample)
    assert denoiser.rows() == [0, 1, 2, 3]


@torch.no_grad()
def test_a_branch_that_opens_twice_without_a_step(unreadable):
    class Cached(Denoiser, CacheMixin):
        pass

    model = Cached()
    steps.track(model)
    scheduler, sample = FlowMatchEulerDiscreteScheduler(), torch.zeros(1, 4)
    scheduler.set_timesteps(6)
    loop(model, scheduler, timesteps=scheduler.timesteps[:2], scaled=True)
    model.seen.clear()
    for name in ("cond", "uncond", "cond"):
        with model.cache_context(name):
            model(sample, scheduler.timesteps[2] / 1000)
    assert model.problems() == [None, None, run.JUMPED.what]
    assert [context.key for context in model.seen[:2]] == ["cond", "uncond"]


@torch.no_grad()
@pytest.mark.parametrize("gone", ["scheduler", "model"])
def test_an_interrupted_loop_keeps_nothing_alive(gone):
    model, scheduler = Denoiser(), EulerDiscreteScheduler()
    tracker = weakref.ref(steps.track(model))
    scheduler.set_timesteps(5)
    model(torch.zeros(1, 4), scheduler.timesteps[0])
    kept = torch.zeros(3)
    model.seen.pop().storage["features"] = kept
    kept = weakref.ref(kept)
    if gone == "scheduler":
        del scheduler
    else:
        del model
    gc.collect()
    assert kept() is None
    assert (tracker() is None) == (gone == "model")


def test_a_pipeline_whose_components_cannot_be_listed():
    class Odd(diffusers.DiffusionPipeline):
        def __init__(self, unet, scheduler, image_size):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, error=None):
            self.scheduler.set_timesteps(3)
            loop(self.unet, self.scheduler)
            if error:
                raise error

    model = Denoiser()
    pipe = Odd(model, EulerDiscreteScheduler(), 8)
    steps.track(model)
    pipe()
    assert model.rows() == [0, 1, 2]
    with pytest.raises(KeyError):
        pipe(KeyError("the user's"))


def test_a_pipeline_that_calls_another_has_its_statistics():
    class Outer(diffusers.DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)
            self.inner = Inner(unet, scheduler)

        def __call__(self):
            self.inner()

    class Inner(diffusers.DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self):
            self.scheduler.set_timesteps(3)
            loop(self.unet, self.scheduler)

    model = Denoiser()
    steps.track(model)
    pipe = Outer(model, EulerDiscreteScheduler())
    pipe()
    assert pipe.compression_stats().components["unet"].steps == 3


@torch.no_grad()
def test_an_unfinished_loop_is_checked_at_the_next_schedule(denoiser):
    recorder = Recorder(denoiser)
    recorder.reason = Reason("the moon is full", "wait")
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    loop(denoiser, scheduler, timesteps=scheduler.timesteps[:4])
    with pytest.warns(DiffuseCompressWarning, match="recorder saved 0 of 3"):
        scheduler.set_timesteps(5)
    recorder.remove()
