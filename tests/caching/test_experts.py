"""Two experts that take turns (Wan 2.2): each is calibrated and learned on its own steps, follows them, is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

import diffuse_compress as dc
import tiny
from diffuse_compress.caching.runtime import cache_of
from diffuse_compress.caching.schedule import Guidance
from tolerance import KERNEL, assert_close

pytestmark = pytest.mark.usefixtures("fresh_thread")

STEPS = 10
EXPERTS = ("transformer", "transformer_2")
# The first steps of a schedule shifted by 3 are long: six of ten are above half of its noise.
CONFIGS = {
    "calibrated": dc.FeatureCacheConfig(target_speedup=1.15, num_inference_steps=STEPS, num_trajectories=1),
    "learned": dc.HarmoniCaConfig(beta=0.2, num_inference_steps=STEPS, trajectories=2, refresh_every=1000),
    "learned for a speed-up": dc.HarmoniCaConfig(target_speedup=1.1, num_inference_steps=STEPS, trajectories=1),
}
ITEM = {"prompt": "a red cat", "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": tiny.TEXT_LENGTH}


def experts() -> Any:
    one = tiny.build_pipeline("wan")
    second = tiny.build("wan", seed=1, in_channels=16, out_channels=16)
    pipe = WanPipeline(**{**one.components, "transformer_2": second, "boundary_ratio": 0.7})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seen_by(pipe: Any) -> dict[str, list[int]]:
    """Calls of each expert in each step."""
    counts = {name: [0] * STEPS for name in EXPERTS}
    handles = [
        getattr(pipe, name).register_forward_hook(
            lambda *_, name=name: counts[name].__setitem__(at[0], counts[name][at[0]] + 1)
        )
        for name in EXPERTS
    ]
    at = [0]

    def advance(pipe: Any, step: int, t: Any, kwargs: Any) -> Any:
        at[0] = step + 1
        return kwargs

    tiny.sample(pipe, num_inference_steps=STEPS, callback_on_step_end=advance)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("kind", ["calibrated", "learned for a speed-up"])
def test_each_expert_has_a_schedule_of_its_own_steps(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("diffuse_compress.caching.rehearsal.MAX_CHECKS", 40)
    pipe = experts()
    calls = seen_by(pipe)
    first = [count > 0 for count in calls["transformer"]]
    assert 3 <= sum(first) <= 7
    assert [count > 0 for count in calls["transformer_2"]] == [not seen for seen in first]
    stock = tiny.sample(pipe, num_inference_steps=STEPS)
    before = {n: {k: v.clone() for k, v in getattr(pipe, n).state_dict().items()} for n in EXPERTS}

    pipe.compress(CONFIGS[kind], calibration=[ITEM], measure=False)
    boundary = sum(first)
    for name, own in (("transformer", range(boundary)), ("transformer_2", range(boundary, STEPS))):
        schedule = cache_of(getattr(pipe, name)).schedule
        reused = (schedule.mask == 0).any(dim=1).nonzero().flatten().tolist()
        # Nothing is reused in steps of the other, nor in the first of its own.
        assert set(reused) <= set(own[1:])
        assert schedule.num_steps == STEPS
        assert schedule.guidance is Guidance.SEQUENTIAL
        after = getattr(pipe, name).state_dict()
        assert all(torch.equal(after[key], value) for key, value in before[name].items())
    assert any((cache_of(getattr(pipe, name)).schedule.mask == 0).any() for name in EXPERTS)

    cached = tiny.sample(pipe, num_inference_steps=STEPS)
    assert not torch.equal(cached, stock)
    stats = dc.compression_stats(pipe, strict=True).components
    for name in EXPERTS:
        wanted = int((cache_of(getattr(pipe, name)).schedule.mask == 0).sum())
        method = stats[name].method("feature cache")
        assert (method.hits, method.planned, dict(method.misses)) == (wanted, wanted, {})
    # What the first has kept is not held while the second runs.
    assert cache_of(pipe.transformer).last_bytes == 0 or not (cache_of(pipe.transformer).schedule.mask == 0).any()

    file = pipe.save_cache(tmp_path / "alone")
    other = experts().load_cache(file)
    assert torch.equal(tiny.sample(other, num_inference_steps=STEPS), cached)
    pipe.save_pretrained(tmp_path / "whole")
    again = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    again.set_progress_bar_config(disable=True)
    # Weights that are read from a file may lie otherwise in memory, which another order of sums goes with.
    assert_close(tiny.sample(again, num_inference_steps=STEPS), stock, KERNEL[torch.float32] * 10)
    again.load_cache(tmp_path / "whole")
    assert_close(tiny.sample(again, num_inference_steps=STEPS), cached, KERNEL[torch.float32] * 10)


def test_experts_that_are_quantized_keep_their_schedules_in_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("diffuse_compress.caching.rehearsal.MAX_CHECKS", 40)
    pipe = experts()
    pipe.compress("w8a8", measure=False)
    pipe.compress(CONFIGS["learned"], calibration=[ITEM], measure=False)
    cached = tiny.sample(pipe, num_inference_steps=STEPS)
    schedules = {name: cache_of(getattr(pipe, name)).schedule for name in EXPERTS}
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for name in EXPERTS:
        assert torch.equal(cache_of(getattr(again, name)).schedule.mask, schedules[name].mask)
    assert_close(tiny.sample(again, num_inference_steps=STEPS), cached, KERNEL[torch.float32] * 10)
