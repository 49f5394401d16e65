"""The loops of diffusers' pipelines: what a denoiser is called with first, from the variables of the pipeline's call.

A stock ``__call__`` prepares all conditions, opens its progress bar and loops. Between the two nothing of it can be
overridden, but when the progress bar is opened the variables have what the loop will hand on, tensor for tensor. Their
names are those that diffusers' own ``callback_on_step_end`` reads them by; one that is missing in another version is a
``KeyError``, and leaves the tables to the loop's first step. ``tests/pipelines/`` holds every entry against the call
that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["LOOPS", "TIMESTEP", "FirstCall", "Loop", "loop_of"]

TIMESTEP = "t"
"""The variable that runs through the schedule in every loop of :data:`LOOPS`."""


@dataclass(frozen=True)
class FirstCall:
    """A denoiser's first call in a loop.

    Attributes:
        model: the denoiser, as the pipeline holds it.
        element: of ``scheduler.timesteps``.
        arguments: by name; the sample may have other values than it will.
        branch: name of the cache context around it.
    """

    model: nn.Module
    element: torch.Tensor
    arguments: Mapping[str, Any]
    branch: str | None = None


Loop = Callable[[Any, Mapping[str, Any]], Iterator[FirstCall]]
"""First calls of a pipeline, given the variables of its call; none if they cannot be told."""


def loop_of(pipeline: type) -> Loop | None:
    """The loop of a pipeline class; None if it is not known."""
    return next((LOOPS[cls.__name__] for cls in pipeline.__mro__ if _is_stock(cls) and cls.__name__ in LOOPS), None)


def _is_stock(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "diffusers"


def _doubled(latents: torch.Tensor, guided: bool) -> torch.Tensor:
    """Of batched guidance."""
    return torch.cat([latents] * 2) if guided else latents


def _expanded(element: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    return element[None].to(sample.device).expand(sample.shape[0])


def _unet(pipe: Any, known: Mapping[str, Any]) -> Iterator[FirstCall]:
    arguments = {
        "sample": _doubled(known["latents"], pipe.do_classifier_free_guidance),
        "timestep": known["timesteps"][0],
        "encoder_hidden_states": known["prompt_embeds"],
        "timestep_cond": known["timestep_cond"],
        "cross_attention_kwargs": pipe.cross_attention_kwargs,
        "added_cond_kwargs": known["added_cond_kwargs"],
    }
    yield FirstCall(pipe.unet, known["timesteps"][0], arguments)


def _unet_xl(pipe: Any, known: Mapping[str, Any]) -> Iterator[FirstCall]:
    added = {"text_embeds": known["add_text_embeds"], "time_ids": known["add_time_ids"]}
    if known["ip_adapter_image"] is not None or known["ip_adapter_image_embeds"] is not None:
        added["image_embeds"] = known["image_embeds"]
    yield from _unet(pipe, {**known, "added_cond_kwargs": added})


def _pixart(pipe: Any, known: Mapping[str, Any]) -> Iterator[FirstCall]:
    sample = _doubled(known["latents"], known["do_classifier_free_guidance"])
    arguments = {
        "hidden_states": sample,
        "encoder_hidden_states": known["prompt_embeds"],
        "encoder_attention_mask": known["prompt_attention_mask"],
        "timestep": _expanded(known["timesteps"][0], sample),
        "added_cond_kwargs": known["added_cond_kwargs"],
    }
    yield FirstCall(pipe.transformer, known["timesteps"][0], arguments)


def _flux(pipe: Any, known: Mapping[str, Any]) -> Iterator[FirstCall]:
    if known["image_embeds"] is not None or known["negative_image_embeds"] is not None:
        return  # the loop puts them into the arguments in turn
    latents, element = known["latents"], known["timesteps"][0]
    shared = {
        "hidden_states": latents,
        "timestep": element.expand(latents.shape[0]).to(latents.dtype) / 1000,
        "guidance": known["guidance"],
        "img_ids": known["latent_image_ids"],
        "joint_attention_kwargs": pipe.joint_attention_kwargs,
    }
    for branch, prefix in (("cond", ""), ("uncond", "negative_")) if known["do_true_cfg"] else (("cond", ""),):
        conditions = {
            "pooled_projections": known[f"{prefix}pooled_prompt_embeds"],
            "encoder_hidden_states": known[f"{prefix}prompt_embeds"],
            "txt_ids": known[f"{prefix}text_ids"],
        }
        yield FirstCall(pipe.transformer, element, {**shared, **conditions}, branch)


def _wan(pipe: Any, known: Mapping[str, Any]) -> Iterator[FirstCall]:
    if pipe.config.expand_timesteps:
        return  # every token has a timestep of its own, and no table serves it
    latents, element, boundary = known["latents"], known["timesteps"][0], known["boundary_timestep"]
    # The second expert's are left to its own first call: offloaded, both would not fit in.
    model = pipe.transformer if boundary is None or element >= boundary else pipe.transformer_2
    shared = {
        "hidden_states": latents.to(known["transformer_dtype"]),
        "timestep": element.expand(latents.shape[0]),
        "attention_kwargs": known["attention_kwargs"],
    }
    conditions = {"cond": known["prompt_embeds"]}
    if pipe.do_classifier_free_guidance:
        conditions["uncond"] = known["negative_prompt_embeds"]
    for branch, embeds in conditions.items():
        yield FirstCall(model, element, {**shared, "encoder_hidden_states": embeds}, branch)


def _dit(pipe: Any, known: Mapping[str, Any]) -> Iterator[FirstCall]:
    sample, element = known["latent_model_input"], pipe.scheduler.timesteps[0]
    arguments = {
        "hidden_states": sample,
        "timestep": _expanded(element, sample),
        "class_labels": known["class_labels_input"],
    }
    yield FirstCall(pipe.transformer, element, arguments)


LOOPS: dict[str, Loop] = {
    "StableDiffusionPipeline": _unet,
    "StableDiffusionImg2ImgPipeline": _unet,
    "StableDiffusionXLPipeline": _unet_xl,
    "StableDiffusionXLImg2ImgPipeline": _unet_xl,
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
    "FluxPipeline": _flux,
    "WanPipeline": _wan,
    "DiTPipeline": _dit,
}
"""By name of the stock class."""
