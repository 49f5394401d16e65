"""What the tests of temporal tables share: every class of denoiser, called in a loop as its pipeline calls it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import tiny
from diffuse_compress.runtime import steps
from diffuse_compress.runtime.stats import MethodStats
from diffuse_compress.temporal.lookup import CONSUMER
from families.composition import extra_inputs

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
_FLOW = ("sd3", "sd35", "flux", "qwenimage", "hunyuan_video", "wan")
_FRACTIONS = ("flux", "qwenimage")


def inputs_for(model: torch.nn.Module, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of one call; the timestep is put in by :func:`loop`."""
    inputs = extra_inputs(model, tiny.inputs_for(model, batch=batch, seed=seed))
    if model.config.get("time_cond_proj_dim"):
        inputs["timestep_cond"] = torch.randn(batch, 8, generator=torch.Generator().manual_seed(seed))
    if model.config.get("ofs_embed_dim"):
        inputs["ofs"] = torch.full((1,), 2.0)
    return inputs


def scheduler_for(name: str, count: int = 3) -> Any:
    """A scheduler of the kind that the class is sampled with, set to ``count`` steps."""
    scheduler = FlowMatchEulerDiscreteScheduler() if name in _FLOW else DDIMScheduler()
    scheduler.set_timesteps(count)
    if name in _FRACTIONS:
        scheduler.set_begin_index(0)  # as their pipelines do: 1.0 may be the first t / 1000 and the last t
    return scheduler


def as_given(name: str, t: torch.Tensor, batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A schedule's timestep as the pipeline of the class hands it to its model."""
    if name in _FRACTIONS:
        return t.expand(batch).to(dtype) / 1000
    return t.to(dtype).expand(batch) if name == "hunyuan_video" else t.expand(batch)


@torch.no_grad()
def loop(name: str, model: Any, *prompts: dict[str, Any], scheduler: Any = None) -> list[torch.Tensor]:
    """Outputs of every call: one for each of ``prompts`` in every step (sequential guidance if there are two)."""
    scheduler = scheduler or scheduler_for(name)
    outputs = []
    for t in scheduler.timesteps:
        for prompt in prompts:
            batch = len(next(iter(prompt.values())))
            given = as_given(name, t, batch, model.dtype)
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
