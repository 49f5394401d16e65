"""What a pipeline is more than its denoiser: adapters, ControlNet, other tasks, refiner, switches, callbacks.

Each feature is put on before and after compress: both ways must give the same bits, twice, or stop with one error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention import AttentionModuleMixin
from PIL import Image
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import get_state, quantized_layers

LATENT = dict(prompt="a red cat", output_type="latent")


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**tiny.inputs_for(model), return_dict=False)))


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, **kwargs: Any) -> torch.Tensor:
    images: torch.Tensor = pipe(**LATENT, **kwargs, generator=torch.Generator().manual_seed(0)).images
    assert images.isfinite().all()
    return images


# --- other tasks ------------------------------------------------------------------------------------------------


def _controlnet(pipe: Any, **kwargs: Any) -> diffusers.ControlNetModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = diffusers.ControlNetModel.from_unet(
            pipe.unet, conditioning_channels=3, conditioning_embedding_out_channels=(16, 32, 32)
        )
        for parameter in net.parameters():
            if not parameter.any():  # its outputs start at zero, and would show nothing
                nn.init.normal_(parameter, std=0.05)
    return net.eval()


def _image_to_image() -> tuple[Any, dict[str, Any]]:
    parts = tiny.build_pipeline("stable_diffusion").components
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    return pipe, dict(image=picture(), strength=0.6, num_inference_steps=4)


def _inpaint() -> tuple[Any, dict[str, Any]]:
    parts = tiny.build_pipeline("stable_diffusion").components
    pipe = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    sizes = dict(height=32, width=32, strength=0.6, num_inference_steps=4)
    return pipe, dict(image=picture(), mask_image=picture(1).convert("L"), **sizes)


def _with_controlnet() -> tuple[Any, dict[str, Any]]:
    dense = tiny.build_pipeline("stable_diffusion")
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **dense.components, controlnet=_controlnet(dense), requires_safety_checker=False
    )
    return pipe, dict(image=picture(), height=32, width=32, num_inference_steps=2)


TASKS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "img2img": _image_to_image,
    "inpaint": _inpaint,
    "controlnet": _with_controlnet,
}


@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_run_save_and_reload(task: str, preset: str, tmp_path: Path) -> None:
    pipe, arguments = TASKS[task]()
    dense = call(quiet(pipe), **arguments)
    pipe.compress({"unet": preset, **({"controlnet": preset} if task == "controlnet" else {})}, measure=False)
    expected = call(pipe, **arguments)
    assert not torch.equal(expected, dense)
    assert torch.equal(call(pipe, **arguments), expected)
    pipe.save_pretrained(tmp_path)
    reloaded = quiet(type(pipe).from_pretrained(tmp_path))
    assert len(quantized_layers(reloaded.unet)) == len(quantized_layers(pipe.unet)) > 0
    assert torch.equal(call(reloaded, **arguments), expected)


def test_controlnet_beside_a_compressed_unet_in_one_pipeline() -> None:
    # A part that from_pipe is given: it keeps its dtype, and the shared UNet its codes.
    base = tiny.build_pipeline("stable_diffusion")
    net = _controlnet(base)
    base.compress("w8a8", measure=False)
    expected = tiny.sample(base)
    pipe = quiet(diffusers.StableDiffusionControlNetPipeline.from_pipe(base, controlnet=net))
    arguments = dict(image=picture(), height=32, width=32, num_inference_steps=2)
    assert torch.equal(call(pipe, **arguments), call(pipe, **arguments))
    silent = call(pipe, **arguments, controlnet_conditioning_scale=0.0)
    assert torch.equal(silent, call(base, height=32, width=32, num_inference_steps=2))
    assert torch.equal(tiny.sample(base), expected)


def test_base_and_refiner_share_what_they_share() -> None:
    base = tiny.build_pipeline("stable_diffusion_xl").compress("w8a8", measure=False)
    shared = {name: base.components[name] for name in ("vae", "text_encoder_2", "tokenizer_2", "scheduler")}
    refiner = quiet(
        diffusers.StableDiffusionXLImg2ImgPipeline(
            **shared,
            text_encoder=base.text_encoder,
            tokenizer=base.tokenizer,
            unet=tiny.build("unet_sdxl", seed=5),
            add_watermarker=False,
        )
    ).compress("w4a8", measure=False)

    def both() -> torch.Tensor:
        latents = call(base, height=32, width=32, num_inference_steps=4, denoising_end=0.5)
        return call(refiner, image=latents, num_inference_steps=4, denoising_start=0.5)

    expected = both()
    assert torch.equal(both(), expected)
    assert {layer.scheme.name for layer in quantized_layers(base.unet).values()} == {"w8a8", "w8a16"}
    assert "w4a8" in {layer.scheme.name for layer in quantized_layers(refiner.unet).values()}


# --- IP-Adapter -------------------------------------------------------------------------------------------------


def _load_ip_adapter(pipe: Any) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    width, cross = 32, pipe.unet.config.cross_attention_dim
    vision = dict(hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, patch_size=8, projection_dim=width)).eval()
        projection = {"proj.weight": torch.randn(4 * cross, width) / 10, "proj.bias": torch.zeros(4 * cross)}
        norm = {"norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)}
        layers, number = {}, 1
        for name in pipe.unet.attn_processors:
            if not name.endswith("attn1.processor"):
                rows = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
                layers |= {f"{number}.to_{part}_ip.weight": torch.randn(rows, cross) / 10 for part in ("k", "v")}
                number += 2
    pipe.register_modules(
        image_encoder=encoder, feature_extractor=CLIPImageProcessor(crop_size=32, size={"shortest_edge": 32})
    )
    state = {"image_proj": {**projection, **norm}, "ip_adapter": layers}
    pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)


@pytest.mark.parametrize("preset", ["w8a8", "w4a16"])
def test_ip_adapter_loaded_before_or_after_compress(preset: str, tmp_path: Path) -> None:
    arguments = dict(ip_adapter_image=picture(), height=32, width=32, num_inference_steps=2)
    plain = tiny.build_pipeline("stable_diffusion").compress(preset, measure=False)
    without = tiny.sample(plain)
    _load_ip_adapter(plain)
    expected = call(plain, **arguments)
    assert torch.equal(call(plain, **arguments), expected)
    assert not torch.equal(call(plain, **{**arguments, "ip_adapter_image": picture(7)}), expected)

    first = tiny.build_pipeline("stable_diffusion")
    _load_ip_adapter(first)
    first.compress(preset, measure=False)
    # Saving and loading knows nothing of an adapter: its layers stay as they are, and it is loaded again.
    assert quantized_layers(first.unet).keys() == quantized_layers(plain.unet).keys()
    assert torch.equal(call(first, **arguments), expected)
    assert torch.equal(call(first, **arguments), expected)
    first.save_pretrained(tmp_path)
    reloaded = quiet(type(first).from_pretrained(tmp_path, image_encoder=None, safety_checker=None))
    assert torch.equal(tiny.sample(reloaded), without)
    _load_ip_adapter(reloaded)
    assert torch.equal(call(reloaded, **arguments), expected)
    first.unload_ip_adapter()
    assert torch.equal(tiny.sample(first), without)


def test_an_ip_adapter_beside_folded_values_is_warned_of() -> None:
    """It adds to what to_v returns, in which to_out's scale is folded; one that was there before prevents that."""
    config = dc.QuantizationConfig("w8a8", algorithm=dc.SmoothQuantConfig(fold=True))
    pipe, first = tiny.build_pipeline("stable_diffusion"), tiny.build_pipeline("stable_diffusion")
    items = [tiny.inputs_for(pipe.unet)]
    pipe.unet.compress(config, calibration=items, measure=False)
    with pytest.warns(dc.errors.DiffuseCompressWarning, match=r"IP-Adapter: smoothing scales .* fold=False"):
        _load_ip_adapter(pipe)
    _load_ip_adapter(first)
    items[0]["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, 1, 32)]}
    first.unet.compress(config, calibration=items, measure=False)
    layers = quantized_layers(first.unet)
    assert not any(layer.folded for name, layer in layers.items() if name.endswith(("attn2.to_v", "attn2.to_out.0")))
    assert any(layer.folded for name, layer in layers.items() if name.endswith("attn1.to_out.0"))


def test_decompress_leaves_an_ip_adapter_on() -> None:
    pipe = tiny.build_pipeline("stable_diffusion")
    _load_ip_adapter(pipe)
    pipe.compress("w8a8", measure=False).decompress()
    assert pipe.unet.config.encoder_hid_dim_type == "ip_image_proj"


# --- refused: what would make dense copies, or round what stayed dense ------------------------------------------


@pytest.mark.parametrize("name", ["pixart", "unet_sdxl", "flux", "sd3", "wan"])
def test_fusing_projections_is_refused_before_and_after(name: str) -> None:
    model = tiny.build(name)
    model.fuse_qkv_projections()
    with pytest.raises(dc.ModelStateError, match=r"found them fused.*unfuse_qkv_projections\(\)"):
        model.compress("w8a8")
    model = tiny.build(name).compress("w8a8", measure=False)
    expected, modules = output(model), [type(module) for module in model.modules()]
    with pytest.raises(dc.ModelStateError, match=r"fuse_qkv_projections: needs dense projections, found \S+ in w8a8"):
        model.fuse_qkv_projections()
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(output(model), expected)


def test_unfused_again_compresses_and_dense_attention_fuses() -> None:
    model = tiny.build("flux")
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    assert torch.equal(output(model.compress("w8a8")), output(tiny.build("flux").compress("w8a8")))
    part = tiny.build("flux").compress("w8a8", modules_to_not_convert=["attn"], measure=False)
    expected = output(part)
    part.fuse_qkv_projections()
    assert any(isinstance(m, AttentionModuleMixin) and m.fused_projections for m in part.modules())
    assert torch.equal(output(part), expected)


@pytest.mark.parametrize("name", ["pixart", "unet_sd1"])
def test_layerwise_casting_is_refused_before_and_after(name: str) -> None:
    model = tiny.build(name).compress("w8a8", measure=False)
    expected, state = output(model), {key: tensor.dtype for key, tensor in model.state_dict().items()}
    with pytest.raises(dc.ModelStateError, match=r"enable_layerwise_casting: needs a dense model, .*Leave it out"):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert {key: tensor.dtype for key, tensor in model.state_dict().items()} == state
    assert torch.equal(output(model), expected)
    cast = tiny.build(name)
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for act in (cast.compression_plan, cast.compress):
        with pytest.raises(dc.ModelStateError, match=r"needs the weights themselves, .* hook 'layerwise_casting'"):
            act("w8a8")
    assert get_state(cast) is None


def test_layerwise_casting_by_the_function_is_refused_too() -> None:
    model = tiny.build("pixart").compress("w8a8", measure=False)
    scales = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.endswith("scale")}
    with pytest.raises(dc.ModelStateError, match="compute in float32, bfloat16 or float16"):
        diffusers.hooks.apply_layerwise_casting(
            model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32, skip_modules_pattern=("norm",)
        )
    assert all(torch.equal(model.state_dict()[key], scale) for key, scale in scales.items())


# --- switches and callbacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "_native_math"])
@pytest.mark.parametrize("name", ["flux", "wan", "unet_sdxl", "pixart"])
def test_attention_backend_set_before_or_after_compress(name: str, backend: str) -> None:
    first = tiny.build(name)
    first.set_attention_backend(backend)
    first.compress("w4a8", measure=False)
    model = tiny.build(name).compress("w4a8", measure=False)
    model.set_attention_backend(backend)
    assert torch.equal(output(model), output(first))
    assert torch.equal(output(model), output(first))


@pytest.mark.parametrize("preset", ["w8a8", "w4a16"])
def test_freeu_on_and_off(preset: str) -> None:
    switch = dict(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    first = tiny.build_pipeline("stable_diffusion")
    first.enable_freeu(**switch)
    first.compress(preset, measure=False)
    pipe = tiny.build_pipeline("stable_diffusion").compress(preset, measure=False)
    plain = tiny.sample(pipe)
    pipe.enable_freeu(**switch)
    assert torch.equal(tiny.sample(pipe), tiny.sample(first))
    assert not torch.equal(tiny.sample(pipe), plain)
    pipe.disable_freeu()
    assert torch.equal(tiny.sample(pipe), plain)


@pytest.mark.parametrize("preset", ["w8a8", "w4a16"])
def test_callback_that_halves_the_batch(preset: str) -> None:
    """Guidance cut off after two of four steps."""
    pipe = tiny.build_pipeline("stable_diffusion").compress(preset, measure=False)
    batches: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))

    def cut(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    arguments = dict(
        num_inference_steps=4, callback_on_step_end=cut, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    first = tiny.sample(pipe, **arguments)
    assert batches == [2, 2, 1, 1]
    assert torch.equal(tiny.sample(pipe, **arguments), first)
    handle.remove()
    assert torch.equal(tiny.sample(pipe, **arguments), first)


def test_interrupted_call_leaves_the_next_one_alone() -> None:
    pipe = tiny.build_pipeline("stable_diffusion").compress("w8a8", measure=False)
    expected = tiny.sample(pipe, num_inference_steps=4)

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return tensors

    assert not torch.equal(tiny.sample(pipe, num_inference_steps=4, callback_on_step_end=stop), expected)
    assert torch.equal(tiny.sample(pipe, num_inference_steps=4), expected)
