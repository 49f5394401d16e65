"""Casts, and components in several hands: from_pipe, deepcopy, saving again, two pipelines of one transformer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import get_state, quantized_layers

PRESETS = ["w8a8", "fp8", "w8a16", "w4a16", "w4a8"]
PACKED = ("qweight", "scale", "zero_point", "group_scale")
HALF = (torch.bfloat16, torch.float16)


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**tiny.inputs_for(model), return_dict=False)))


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same_tensors(model: nn.Module, expected: dict[str, torch.Tensor], only: tuple[str, ...] = ()) -> None:
    for key, tensor in model.state_dict().items():
        if not only or key.rpartition(".")[2] in only:
            assert tensor.dtype == expected[key].dtype, key
            assert torch.equal(tensor.view(torch.uint8), expected[key].view(torch.uint8)), key


def compressed(dtype: torch.dtype = torch.bfloat16, preset: str = "w8a8") -> Any:
    pipe = tiny.build_pipeline("stable_diffusion", dtype=dtype)
    return pipe.compress({"unet": preset, "text_encoder": "w8a16"}, measure=False)


def read(file: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as handle:
        return handle.metadata(), {key: handle.get_tensor(key) for key in handle.keys()}


# --- casts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["pixart", "llama"])
def test_cast_to_the_compute_dtype_is_a_no_op(name: str, preset: str, dtype: torch.dtype) -> None:
    model = tiny.build(name, dtype=dtype).compress(preset, measure=False)
    before = tensors(model)
    method = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "half"}[dtype]
    for cast in (
        lambda: model.to(dtype),
        lambda: model.to("cpu", dtype),
        lambda: model.to(device="cpu", dtype=dtype),
        lambda: getattr(model, method)(),
    ):
        assert cast() is model
        assert model.dtype == dtype
        assert_same_tensors(model, before)


@pytest.mark.parametrize("name", ["pixart", "wan", "t5_encoder"])
@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
def test_cast_to_the_compute_dtype_keeps_what_a_load_in_it_keeps_in_float32(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    # Wan's modulation tables, T5's wo in float16, and PixArt's position table, a buffer that no checkpoint holds.
    dense = {"modules_to_not_convert": ["wo"]} if name == "t5_encoder" else {}
    model = tiny.build(name, dtype=dtype).compress("w8a8", measure=False, **dense)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, dtype=dtype)
    expected, before = output(model), tensors(model)
    method = {torch.bfloat16: "bfloat16", torch.float16: "half"}[dtype]
    for cast in (lambda: model.to(dtype), lambda: model.to("cpu", dtype), lambda: getattr(model, method)()):
        assert cast() is model
        assert_same_tensors(model, before)
        assert torch.equal(output(model), expected)
    assert {part.dtype for part in model.to(torch.float32).parameters() if part.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=["fp64", "fp32", "fp16"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["pixart", "llama"])
def test_cast_to_another_dtype_changes_the_compute_dtype_alone(name: str, preset: str, dtype: torch.dtype) -> None:
    model = tiny.build(name, dtype=torch.bfloat16).compress(preset, measure=False)
    before = tensors(model)
    model.to(dtype)
    assert model.dtype == dtype
    assert {layer.compute_dtype for layer in quantized_layers(model).values()} == {dtype}
    assert_same_tensors(model, before, PACKED)
    assert output(model).dtype == dtype
    assert output(model).isfinite().all()
    # Back again: from bfloat16 to float32 and to bfloat16 loses nothing, so neither does a detour by accident.
    if dtype != torch.float16:
        assert_same_tensors(model.to(torch.bfloat16), before)


@pytest.mark.parametrize("name", ["pixart", "llama"])
def test_cast_to_float8_is_refused(name: str) -> None:
    model = tiny.build(name, dtype=torch.bfloat16).compress("w8a16", measure=False)
    before = tensors(model)
    with pytest.raises(dc.ModelStateError, match=r"compute in float32, bfloat16 or float16, got .*float8_e4m3fn"):
        model.to(torch.float8_e4m3fn)
    assert_same_tensors(model, before, PACKED)


def test_half_of_a_model_quantized_by_others_stays_refused() -> None:
    model = tiny.build("llama")
    model.is_quantized = True
    with pytest.raises(ValueError, match=r"`.half\(\)` is not supported"):
        model.half()


@pytest.mark.parametrize(("name", "expected"), [("pixart", False), ("llama", True)])
def test_is_quantized_says_what_each_library_makes_of_it(name: str, expected: bool) -> None:
    # diffusers asks it to refuse casts, which ours survive. transformers' Trainer asks it to refuse full fine-tuning.
    model = tiny.build(name).compress("w8a8", measure=False)
    assert bool(getattr(model, "is_quantized", False)) is expected


def test_pipeline_cast_reaches_every_component() -> None:
    pipe = compressed(torch.bfloat16)
    expected = tiny.sample(pipe)
    assert torch.equal(tiny.sample(pipe.to("cpu", torch.bfloat16)), expected)
    assert torch.equal(tiny.sample(pipe), expected)
    assert tiny.sample(pipe.to(torch.float32)).dtype == torch.float32
    assert {part.dtype for part in (pipe.unet, pipe.text_encoder, pipe.vae)} == {torch.float32}


# --- from_pipe --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["w8a8", "fp8", "w4a8"])
def test_from_pipe_leaves_both_pipelines_as_they_are(preset: str) -> None:
    pipe = compressed(torch.bfloat16, preset)
    expected = tiny.sample(pipe)
    before = {name: tensors(getattr(pipe, name)) for name in ("unet", "text_encoder", "vae")}
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    for name, state in before.items():
        assert getattr(other, name) is getattr(pipe, name)
        assert_same_tensors(getattr(pipe, name), state)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    arguments = dict(prompt="a red cat", image=image, strength=0.5, num_inference_steps=4, output_type="latent")
    pictures = [other(**arguments, generator=torch.Generator().manual_seed(0)).images for _ in range(2)]
    assert pictures[0].dtype == torch.bfloat16
    assert torch.equal(*pictures)
    assert torch.equal(tiny.sample(pipe), expected)


def test_from_pipe_with_a_compressed_component_of_its_own_and_by_auto_pipeline() -> None:
    dense, other = tiny.build_pipeline("stable_diffusion", dtype=torch.bfloat16), compressed()
    before = {name: tensors(getattr(dense, name)) for name in ("text_encoder", "vae")}
    mixed = diffusers.StableDiffusionPipeline.from_pipe(dense, unet=other.unet)
    for name, state in before.items():
        assert_same_tensors(getattr(mixed, name), state)
    assert mixed.unet.dtype == torch.bfloat16
    auto = diffusers.AutoPipelineForImage2Image.from_pipe(other)
    assert auto.unet is other.unet
    assert auto.unet.dtype == torch.bfloat16


def test_from_pipe_with_a_dtype_or_without_compression_does_as_it_is_told() -> None:
    pipe = compressed(torch.bfloat16)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=torch.float32)
    assert other.unet.dtype == other.vae.dtype == torch.float32
    dense = tiny.build_pipeline("stable_diffusion", dtype=torch.bfloat16)
    assert diffusers.StableDiffusionImg2ImgPipeline.from_pipe(dense).unet.dtype == torch.float32


# --- copies and shares ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "preset"),
    [("unet_sdxl", "w8a8"), *((name, preset) for name in ("pixart", "t5_encoder") for preset in PRESETS)],
)
def test_deepcopy_is_a_model_of_its_own(name: str, preset: str, tmp_path: Path) -> None:
    model = tiny.build(name).compress(preset, measure=False)
    expected = output(model)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin), expected)
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "twin")), expected)
    twin.decompress()
    assert get_state(model) is not None
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_saving_again_writes_the_same(preset: str, tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart").compress({"transformer": preset, "text_encoder": preset}, measure=False)
    pipe.save_pretrained(tmp_path / "first")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    for file in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        (metadata, first), (again_metadata, second) = (read(tmp_path / side / file) for side in ("first", "second"))
        assert metadata == again_metadata
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert torch.equal(tensor.view(torch.uint8), second[key].view(torch.uint8)), key


def test_two_pipelines_of_one_transformer() -> None:
    first = tiny.build_pipeline("stable_diffusion")
    second = diffusers.StableDiffusionPipeline(**first.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    first.compress("w8a8", measure=False)
    expected = tiny.sample(first)
    assert torch.equal(tiny.sample(second), expected)
    second.compress("w8a8", measure=False)  # already so
    with pytest.raises(dc.CompressionConflictError, match="unet: already compressed"):
        second.compress("w4a8")
    second.compress({"text_encoder": "w8a16"}, measure=False)
    assert get_state(first.text_encoder) is get_state(second.text_encoder) is not None
    assert torch.equal(tiny.sample(first), tiny.sample(second))
    second.decompress()
    assert not quantized_layers(first.unet)


# --- what a class keeps in float32 ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*tiny.DENOISERS, "hunyuan_video", "cogvideox", "qwenimage", "t5_encoder"])
def test_dtype_in_half_precision_is_that_of_the_dense_model(name: str) -> None:
    for dtype in HALF:
        model = tiny.build(name, dtype=dtype)
        before = model.dtype
        assert model.compress("w8a8", measure=False).dtype == before == dtype


@pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
def test_wan_in_half_precision_runs_saves_and_reloads(dtype: torch.dtype, tmp_path: Path) -> None:
    # Its first parameter, the modulation table, stays float32; the pipeline casts latents to the model's dtype.
    pipe = tiny.build_pipeline("wan", dtype=dtype).compress("w8a8", measure=False)
    expected = tiny.sample(pipe)
    assert torch.equal(tiny.sample(pipe), expected)
    pipe.save_pretrained(tmp_path)
    reloaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    assert reloaded.transformer.scale_shift_table.dtype == torch.float32
    assert torch.equal(tiny.sample(reloaded), expected)


# --- what a pipeline's from_pretrained makes of dtypes ----------------------------------------------------------


def test_a_component_that_the_user_cast_or_trained_is_left_alone(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart", dtype=torch.bfloat16).compress({"text_encoder": "w8a16"}, measure=False)
    pipe.save_pretrained(tmp_path)
    mine = type(pipe.transformer).from_pretrained(tmp_path / "transformer").to(torch.float32)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.mul_(1.00123)
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    whole = diffusers.DiffusionPipeline.from_pretrained(tmp_path, transformer=mine)
    by_hand = type(pipe)(**{**whole.components, "transformer": mine})
    for again in (whole, by_hand):
        assert again.vae.dtype == torch.bfloat16
        assert again.transformer.dtype == torch.float32
        assert all(torch.equal(tensor, before[name]) for name, tensor in again.transformer.state_dict().items())


def test_dtypes_are_those_of_the_variant_that_is_loaded(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart").compress({"transformer": "w8a8"}, measure=False)
    pipe.save_pretrained(tmp_path)
    copy.deepcopy(pipe.vae).half().save_pretrained(tmp_path / "vae", variant="fp16")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert again.vae.dtype == again.transformer.dtype == torch.float32
    assert torch.equal(tiny.sample(again), tiny.sample(pipe))
