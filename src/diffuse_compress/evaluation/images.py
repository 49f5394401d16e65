"""Seeded generation of many pictures with a pipeline, the same whatever the batch size, the order and the device."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.metrics import as_pictures

__all__ = ["accepted_options", "generate_pictures", "sample_seed"]


def sample_seed(base_seed: int, index: int, repetition: int = 0) -> int:
    """Seed of one sample, from a hash: below 2**63, unrelated for neighbours, independent of batches and ranks."""
    digest = hashlib.blake2b(f"{base_seed}:{index}:{repetition}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def accepted_options(pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that ``pipe.__call__`` has an argument for."""
    known = inspect.signature(type(pipe).__call__).parameters
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
    reserved = {"prompt", "generator", "output_type"} & set(options)
    if reserved or not prompts or batch_size < 1:
        what = f"options without {', '.join(sorted(reserved))}" if reserved else "prompts and batch_size >= 1"
        raise ConfigError(f"generate_pictures: need {what}, got {len(prompts)} prompts, batch_size={batch_size}.")
    pictures = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        generators = [torch.Generator("cpu").manual_seed(sample_seed(seed, start + i)) for i in range(len(part))]
        noise = _starting_noise(pipe, generators) if "latents" not in options else {}
        with torch.no_grad():
            output = pipe(part, generator=generators, output_type="pt", **noise, **options)
        pictures.append(as_pictures(output.images).clamp_(0, 1))
        if on_batch is not None:
            on_batch(start + len(part))
    return torch.cat(pictures).contiguous()


def _starting_noise(pipe: Any, generators: Sequence[torch.Generator]) -> dict[str, torch.Tensor]:
    """``{"latents": noise}`` of the pipeline's default size, or nothing where that cannot be told."""
    denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    size, channels = (getattr(getattr(denoiser, "config", None), name, None) for name in ("sample_size", "in_channels"))
    if denoiser is None:
        return {}
    takes_latents = "latents" in inspect.signature(type(pipe).__call__).parameters
    if not takes_latents or not isinstance(size, int) or not isinstance(channels, int):
        return {}
    noise = torch.cat([torch.randn(1, channels, size, size, generator=generator) for generator in generators])
    return {"latents": noise.to(pipe.device, denoiser.dtype)}
