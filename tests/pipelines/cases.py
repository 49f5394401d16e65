"""Every custom pipeline of `pipelines/`, in its stock form, tiny, and a cheap call of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DiTPipeline

import tiny
from diffuse_compress.pipelines.mixin import CompressedPipelineMixin

FOLDER = Path(__file__).parents[2] / "pipelines"
FILES = {
    "stable_diffusion": "StableDiffusionPipeline",
    "stable_diffusion_img2img": "StableDiffusionImg2ImgPipeline",
    "stable_diffusion_xl": "StableDiffusionXLPipeline",
    "stable_diffusion_xl_img2img": "StableDiffusionXLImg2ImgPipeline",
    "pixart_alpha": "PixArtAlphaPipeline",
    "pixart_sigma": "PixArtSigmaPipeline",
    "flux": "FluxPipeline",
    "wan": "WanPipeline",
    "dit": "DiTPipeline",
}
GUIDED = {"flux": {"true_cfg_scale": 2.0, "negative_prompt": "a dog"}, "dit": {"guidance_scale": 4.0}}
STEPS = 3


def stock(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The stock pipeline of a file."""
    cls = getattr(diffusers, FILES[name])
    if cls is DiTPipeline:
        pipe = DiTPipeline(
            tiny.build("dit", dtype=dtype, num_embeds_ada_norm=1000),
            tiny.vae().to(dtype),
            DDIMScheduler(),
            {0: "cat", 1: "dog"},
        )
    else:
        made = tiny.build_pipeline(
            {"pixart_alpha": "pixart", "pixart_sigma": "pixart"}.get(name, name.removesuffix("_img2img")), dtype=dtype
        )
        pipe = made if type(made) is cls else as_class(made, cls)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_class(pipe: Any, cls: type) -> Any:
    """A pipeline of another class with the same parts."""
    made: Any = cls(
        **pipe.components, **({"requires_safety_checker": False} if "safety_checker" in pipe.components else {})
    )
    made.set_progress_bar_config(disable=True)
    return made


def with_mixin(pipe: Any) -> Any:
    """The pipeline as its custom class, with the same parts."""
    return as_class(pipe, type(type(pipe).__name__, (CompressedPipelineMixin, type(pipe)), {}))


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def sample(
    pipe: Any, *, guided: bool = True, steps: int = STEPS, seed: int = 0, side: int = 32, **kwargs: Any
) -> torch.Tensor:
    """Latents, or a picture, of one call."""
    generator = torch.Generator("cpu").manual_seed(seed)
    name = next(file for file, cls in FILES.items() if cls == type(pipe).__name__)
    call: dict[str, Any] = {"num_inference_steps": steps, "generator": generator}
    if name == "dit":
        call |= {"class_labels": [1], "output_type": "pt"}
    else:
        call |= {"prompt": "a red cat", "output_type": "latent"}
    if name.endswith("img2img"):
        picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
        call |= {"image": picture, "strength": 0.75}
    elif name != "dit":
        call |= {"height": side, "width": side}
    if name.startswith("pixart"):
        call |= {"use_resolution_binning": False, "clean_caption": False}
    if name.startswith(("pixart", "flux", "wan")):
        call |= {"max_sequence_length": tiny.TEXT_LENGTH}
    if name == "wan":
        call |= {"num_frames": 5}
    call |= GUIDED.get(name, {"guidance_scale": 3.0}) if guided else {"guidance_scale": 1.0}
    output = pipe(**{**call, **kwargs})
    found: torch.Tensor = output.frames if hasattr(output, "frames") else output.images
    return found
