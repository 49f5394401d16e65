"""Seeded calls of a pipeline: pictures and clips that are the same whatever the order and the device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.conditions import Condition
from diffuse_compress.evaluation.metrics import as_clips, as_pictures
from diffuse_compress.pipeline_call import named_arguments, outputs_of, seeded

__all__ = ["RESERVED", "accepted_options", "draw_batch", "generate_pictures", "sample_seed"]

RESERVED = frozenset({"prompt", "class_labels", "generator", "output_type", "return_dict"})
"""Arguments of a pipeline's call that are set here."""


def sample_seed(base_seed: int, index: int, repetition: int = 0) -> int:
    """Seed of one sample, from a hash: below 2**63, unrelated for neighbours, independent of batches and ranks."""
    digest = hashlib.blake2b(f"{base_seed}:{index}:{repetition}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def accepted_options(pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that ``pipe.__call__`` has an argument for."""
    known = named_arguments(pipe)
    return {name: value for name, value in options.items() if name in known}


def generate_pictures(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    batch_size: int = 32,
    options: Mapping[str, Any] | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """One picture for each prompt.

    Every sample draws from a CPU generator of its own, seeded by ``sample_seed(seed, index)``, and its starting noise
    in float32 where the pipeline takes ``latents``: it depends on neither batch size, device nor dtype (a pipeline in
    bfloat16 would draw other numbers from the same generator). Global random states are not touched.

    Args:
        pipe: a text-to-image pipeline on the device to use. Its scheduler must draw no noise of its own, or draw it
            from the generators passed in.
        prompts: n texts.
        seed: of the run.
        batch_size: prompts per call.
        options: further arguments of the call (``num_inference_steps``, ``guidance_scale``, ...).
        on_batch: called with the number of pictures done so far.

    Returns:
        [n, 3, H, W] float32 in [0, 1] on the CPU; not rounded to 8 bits.

    Raises:
        ConfigError: no prompts, or options that this function sets itself.
    """
    options = dict(options or {})
    reserved = RESERVED & set(options)
    if reserved or not prompts or batch_size < 1:
        what = f"options without {', '.join(sorted(reserved))}" if reserved else "prompts and batch_size >= 1"
        raise ConfigError(f"generate_pictures: need {what}, got {len(prompts)} prompts, batch_size={batch_size}.")
    pictures = []
    for start in range(0, len(prompts), batch_size):
        part = [Condition(prompt) for prompt in prompts[start : start + batch_size]]
        pictures.append(draw_batch(pipe, part, [sample_seed(seed, start + i) for i in range(len(part))], options))
        if on_batch is not None:
            on_batch(start + len(part))
    return torch.cat(pictures).contiguous()


@torch.no_grad()
def draw_batch(
    pipe: Any, conditions: Sequence[Condition], seeds: Sequence[int], options: Mapping[str, Any]
) -> torch.Tensor:
    """One call of a pipeline, each sample with a CPU generator of its own.

    Where the pipeline takes ``latents`` of its default size, each sample's starting noise is drawn from its generator
    in float32: it does not depend on the dtype then. In float32 that is what ``generator=`` alone gives.

    Args:
        pipe: text-to-image, text-to-video, class-conditional or unconditional.
        conditions: n of one kind.
        seeds: n seeds.
        options: further arguments of the call; one ``negative_prompt`` text stands for all.

    Returns:
        Pictures [n, 3, H, W] or clips [n, F, 3, H, W], float32 in [0, 1] on the CPU, not rounded to 8 bits.

    Raises:
        ConfigError: conditions that the pipeline does not take, or an output without pictures.
    """
    generators = [seeded(seed) for seed in seeds]
    arguments = {**_asked(pipe, conditions), **options}
    if isinstance(arguments.get("negative_prompt"), str):
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(conditions)
    if not {"latents", "height", "width", "num_images_per_prompt"} & set(options):
        arguments |= _starting_noise(pipe, generators)
    found = outputs_of(pipe(**arguments, generator=generators, output_type="pt"))
    if found is None or len(found) != len(conditions):
        got = "none" if found is None else len(found)
        raise ConfigError(f"{type(pipe).__name__}: need a picture or clip for each of {len(conditions)}, got {got}.")
    is_clip = getattr(found, "ndim", 0) == 5 or isinstance(found[0], list)
    return (as_clips(found) if is_clip else as_pictures(found)).clamp_(0, 1)


def _asked(pipe: Any, conditions: Sequence[Condition]) -> dict[str, Any]:
    """The arguments that say what to draw."""
    kind, known = conditions[0].kind, named_arguments(pipe)
    name = {"prompts": "prompt", "classes": "class_labels", "unconditional": "batch_size"}[kind]
    if name not in known or "generator" not in known:
        lacks = name if name not in known else "generator"
        takes = ", ".join(sorted({"prompt", "class_labels", "batch_size", "generator"} & known)) or "none of them"
        raise ConfigError(
            f"{type(pipe).__name__}: cannot be asked for {kind}: it takes no {lacks}, but {takes}. Ask for prompts, "
            "classes or unconditional samples as it takes them."
        )
    if kind == "unconditional":
        return {"batch_size": len(conditions)}
    return {name: [item.prompt if kind == "prompts" else item.class_label for item in conditions]}


def _starting_noise(pipe: Any, generators: Sequence[torch.Generator]) -> dict[str, torch.Tensor]:
    """``{"latents": noise}`` of the pipeline's default size, or nothing where that cannot be told."""
    denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    size, channels = (getattr(getattr(denoiser, "config", None), name, None) for name in ("sample_size", "in_channels"))
    if denoiser is None:
        return {}
    if "latents" not in named_arguments(pipe) or not isinstance(size, int) or not isinstance(channels, int):
        return {}
    # A denoiser that also sees a picture (inpainting, editing) has more inputs than there is noise.
    if getattr(getattr(getattr(pipe, "vae", None), "config", None), "latent_channels", channels) != channels:
        return {}
    noise = torch.cat([torch.randn(1, channels, size, size, generator=generator) for generator in generators])
    return {"latents": noise.to(pipe.device, denoiser.dtype)}
