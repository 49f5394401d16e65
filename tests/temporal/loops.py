"""What the tests of temporal tables share: every class of denoiser, called in a loop as its pipeline calls it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import tiny
from diffuse_compress.evaluation.denoiser_inputs import timestep_as_given
from diffuse_compress.runtime import steps
from diffuse_compress.runtime.stats import MethodStats
from diffuse_compress.temporal.lookup import CONSUMER

# One model for each class, several where a configuration changes what depends on what.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("unet", {}),
    ("unet", {"num_class_embeds": 5, "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet"}),
    ("unet_sd1", {}),
    ("unet_sd1", {"time_cond_proj_dim": 8}),
    ("unet_sdxl", {}),
    ("dit", {}),
    ("pixart", {}),
    ("pixart", {"use_additional_conditions": True, "attention_head_dim": 48, "cross_attention_dim": 192}),
    ("sd3", {}),
    ("sd35", {}),
    ("flux", {}),
    ("wan", {}),
    ("cogvideox", {}),
    ("cogvideox", {"ofs_embed_dim": 64}),
    ("hunyuan_video", {}),
    ("hunyuan_video", {"image_condition_type": "token_replace"}),
    ("qwenimage", {}),
]
IDS = [f"{name}-{index}" for index, (name, _) in enumerate(CASES)]
FLOW = ("sd3", "sd35", "flux", "qwenimage", "hunyuan_video", "wan")
_FRACTIONS = ("flux", "qwenimage")

inputs_for = tiny.inputs_for
"""Arguments of one call; the timestep is put in by :func:`loop`."""


def scheduler_for(name: str, count: int = 3) -> Any:
    """A scheduler of the kind that the class is sampled with, set to ``count`` steps."""
    scheduler = FlowMatchEulerDiscreteScheduler() if name in FLOW else DDIMScheduler()
    scheduler.set_timesteps(count)
    if name in _FRACTIONS:
        scheduler.set_begin_index(0)  # as their pipelines do: 1.0 may be the first t / 1000 and the last t
    return scheduler


@torch.no_grad()
def loop(name: str, model: Any, *prompts: dict[str, Any], scheduler: Any = None) -> list[torch.Tensor]:
    """Outputs of every call: one for each of ``prompts`` in every step (sequential guidance if there are two)."""
    scheduler = scheduler or scheduler_for(name)
    outputs = []
    for t in scheduler.timesteps:
        for prompt in prompts:
            batch = len(next(iter(prompt.values())))
            given = timestep_as_given(model, t, batch)
            outputs.append(model(**{**prompt, "timestep": given, "return_dict": False})[0].clone())
        # What the scheduler makes of the sample does not matter here; only that it steps.
        scheduler.step(outputs[-1].float(), t, outputs[-1].float())
    return outputs


def stats(model: torch.nn.Module) -> MethodStats:
    """Of the table, over the last loop."""
    tracker = steps.tracker_of(model)
    assert tracker is not None and tracker.last is not None  # noqa: PT018
    return tracker.last.method(CONSUMER)


def reasons(model: torch.nn.Module) -> dict[str, int]:
    """Why layers ran live in the last loop, and how often."""
    return {reason.what: count for reason, count in stats(model).misses.items()}
