"""Denoisers of published pipelines at their true shapes with random weights: for time and memory, not for quality."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from diffuse_compress.caching.units import units_of
from diffuse_compress.calls import Call
from diffuse_compress.families.published import published_config

__all__ = ["REHEARSAL_CONFIGS", "ShapePipeline", "StepTimes", "random_denoiser"]

_UNET = dict(layers_per_block=1, attention_head_dim=(2, 4))
_FEW = dict(num_layers=2, num_attention_heads=2)

REHEARSAL_CONFIGS: dict[str, dict[str, Any]] = {
    "cogvideox_2b": _FEW,
    "cogvideox_5b": _FEW,
    "dit_xl_2_256": _FEW,
    "flux1_dev": dict(num_layers=2, num_single_layers=2, num_attention_heads=2),
    "flux1_schnell": dict(num_layers=2, num_single_layers=2, num_attention_heads=2),
    "hunyuanvideo": dict(num_layers=1, num_single_layers=1, num_refiner_layers=1, num_attention_heads=2),
    "pixart_xl_2_1024": dict(num_layers=3, num_attention_heads=2, cross_attention_dim=144),
    "qwenimage": _FEW,
    "sd15": dict(_UNET, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))
    | dict(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
    "sd35_large": dict(_FEW, caption_projection_dim=128),
    "sd35_medium": dict(_FEW, caption_projection_dim=128),
    "sd3_medium": dict(_FEW, caption_projection_dim=128),
    "sdxl_base": dict(_UNET, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"))
    | dict(up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=1),
    "wan21_t2v_14b": _FEW,
    "wan21_t2v_1_3b": _FEW,
    "wan22_t2v_a14b": _FEW,
}
"""What makes each published denoiser small, to rehearse a script: over its published configuration."""


def random_denoiser(
    shape: str, device: torch.device, dtype: torch.dtype, *, tiny: bool = False, component: str | None = None
) -> Any:
    """The denoiser of a published pipeline with random weights, frozen and in eval mode.

    Args:
        shape: name in ``families.published``.
        device: where it is made.
        dtype: of all its floating-point tensors.
        tiny: with the few layers of ``REHEARSAL_CONFIGS``.
        component: of a pipeline with two denoisers; the first by default.
    """
    pipeline = published_config(shape)
    part = pipeline.components[component or pipeline.denoisers[0]]
    cls: Any = part.model_class()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = REHEARSAL_CONFIGS[shape] if tiny else {}
            return cls.from_config({**part.config, **small}).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


class ShapePipeline:
    """A pipeline around such a denoiser, without text encoders, and arguments of its calls.

    Args:
        shape: one of "flux1_dev", "pixart_xl_2_1024", "dit_xl_2_256", "sdxl_base".
        device: where the denoiser is.
        dtype: of its weights.
        tiny: a rehearsal, with small inputs too.
        mixin: base class before the stock pipeline's.

    Attributes:
        pipe: asked for latents, its call draws no progress bar.
        model: the denoiser.
        items: what is asked for.
        call: arguments of every call.
    """

    def __init__(
        self,
        shape: str,
        device: torch.device,
        *,
        tiny: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        mixin: type | None = None,
    ) -> None:
        self.shape, self.device, self.dtype, self.tiny, self.mixin = shape, device, dtype, tiny, mixin
        self.model: Any = random_denoiser(shape, device, dtype, tiny=tiny)
        make = {
            "flux1_dev": self._flux,
            "pixart_xl_2_1024": self._pixart,
            "dit_xl_2_256": self._dit,
            "sdxl_base": self._sdxl,
        }[shape]
        self.pipe, self.items, self.call = make()
        self.pipe.set_progress_bar_config(disable=True)

    def _randn(self, *sizes: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(sizes))
        return torch.randn(*sizes, generator=generator).to(self.device, self.dtype)

    def _class(self, stock: type) -> Any:
        return stock if self.mixin is None else type(stock.__name__, (self.mixin, stock), {})

    def _flux(self) -> tuple[Any, list[Any], dict[str, Any]]:
        import diffusers

        absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe = self._class(diffusers.FluxPipeline)(scheduler=scheduler, transformer=self.model, **absent)
        side, tokens, config = 64 if self.tiny else 1024, 16 if self.tiny else 512, self.model.config
        text = self._randn(1, tokens, config.joint_attention_dim)
        item = {"prompt_embeds": text, "pooled_prompt_embeds": self._randn(1, config.pooled_projection_dim)}
        return pipe, [item] * 8, {"height": side, "width": side, "guidance_scale": 3.5}

    def _pixart(self) -> tuple[Any, list[Any], dict[str, Any]]:
        import diffusers

        absent = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        scheduler = diffusers.DPMSolverMultistepScheduler()
        pipe = self._class(diffusers.PixArtAlphaPipeline)(scheduler=scheduler, transformer=self.model, **absent)
        side, tokens = 128 if self.tiny else 1024, 120
        text = self._randn(1, tokens, self.model.config.caption_channels)
        mask = torch.ones(1, tokens, device=self.device)
        item = {"prompt_embeds": text, "prompt_attention_mask": mask, "negative_prompt": None}
        item |= {"negative_prompt_embeds": -text, "negative_prompt_attention_mask": mask}
        call = {"height": side, "width": side, "guidance_scale": 4.5, "use_resolution_binning": False}
        return pipe, [item] * 8, call

    def _dit(self) -> tuple[Any, list[Any], dict[str, Any]]:
        import diffusers

        codec = diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(32,), sample_size=32)
        scheduler = diffusers.DDIMScheduler()
        codec = codec.to(self.device, self.dtype).eval()
        pipe = self._class(diffusers.DiTPipeline)(self.model, codec, scheduler)
        return pipe, list(range(0, 1000, 31)), {"guidance_scale": 1.5}

    def _sdxl(self) -> tuple[Any, list[Any], dict[str, Any]]:
        import diffusers

        absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        scheduler = diffusers.EulerDiscreteScheduler()
        pipe = self._class(diffusers.StableDiffusionXLPipeline)(scheduler=scheduler, unet=self.model, **absent)
        side, config = 64 if self.tiny else 1024, self.model.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        text, vector = self._randn(1, 77, config.cross_attention_dim), self._randn(1, pooled)
        item = {"prompt_embeds": text, "pooled_prompt_embeds": vector}
        item |= {"negative_prompt_embeds": -text, "negative_pooled_prompt_embeds": -vector}
        return pipe, [item] * 8, {"height": side, "width": side, "guidance_scale": 5.0}

    def run(self, steps: int, **more: Any) -> None:
        """One loop, from the same noise; ``more`` goes to the pipeline."""
        given = {**self.call, **more, "num_inference_steps": steps, "output_type": "latent"}
        item = self.items[0] if isinstance(self.items[0], dict) else {"class_labels": [self.items[0]]}
        generator = torch.Generator("cpu").manual_seed(0)
        with torch.no_grad():
            self.pipe(**item, **given, generator=generator)

    def captured(self) -> Call:
        """Arguments of a forward."""
        seen: list[Call] = []

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(Call(args, kwargs))

        handle = self.model.register_forward_pre_hook(keep, with_kwargs=True)
        self.run(2)
        handle.remove()
        return seen[-1]

    def compile_blocks(self) -> None:
        """Each block by itself: of a UNet each residual block and each block of its transformers."""
        for module in self._blocks():
            module.compile(fullgraph=True, dynamic=False)

    def _blocks(self) -> Iterator[nn.Module]:
        if type(self.model).__name__ != "UNet2DConditionModel":
            yield from (self.model.get_submodule(unit.block) for unit in units_of(self.model))
            return
        for module in self.model.modules():
            if type(module).__name__ in ("ResnetBlock2D", "BasicTransformerBlock"):
                yield module


class StepTimes:
    """Milliseconds of the denoiser in each step of a loop, its hooks included; on a GPU by its own clock."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._marks = list[list[Any]]()
        # Of the host: a call begins, its forward begins, the call is over.
        self._hosts = list[list[float]]()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside, calls are timed."""
        handles = [
            self._model.register_forward_pre_hook(lambda *_: self._enter(), prepend=True),
            self._model.register_forward_pre_hook(lambda *_: self._hosts[-1].append(time.perf_counter())),
            self._model.register_forward_hook(lambda *_: self._leave()),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self) -> None:
        self._hosts.append([time.perf_counter()])
        self._marks.append([self._mark()])

    def _leave(self) -> None:
        self._marks[-1].append(self._mark())
        self._hosts[-1].append(time.perf_counter())

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> list[float]:
        """Of all calls."""
        if self._device.type != "cuda":
            return [1000 * (after - before) for before, after in self._marks]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in self._marks]

    def host_milliseconds(self) -> list[tuple[float, float]]:
        """Of all calls, what the host took to start them, and how much of that hooks before the forward took: those
        that were there when :meth:`on` began."""
        return [(1000 * (over - begun), 1000 * (ready - begun)) for begun, ready, over in self._hosts]
