"""Every way in which users load a compressed checkpoint gives the bits of the model that was saved, twice."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.quantizers import auto as diffusers_auto
from PIL import Image
from torch import nn
from transformers.quantizers import auto as transformers_auto

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import get_state, quantized_layers
from diffuse_compress.integrations.quantizer import QuantizerMixin

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**tiny.inputs_for(model), return_dict=False)))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_twice(run: Callable[[], torch.Tensor], expected: torch.Tensor) -> None:
    assert torch.equal(run(), expected)
    assert torch.equal(run(), expected)


class Saved:
    """A compressed pipeline, where it was saved, and its picture."""

    def __init__(self, name: str, folder: Path, dtype: torch.dtype) -> None:
        self.pipe = tiny.build_pipeline(name, dtype=dtype)
        self.denoiser = "unet" if hasattr(self.pipe, "unet") else "transformer"
        self.pipe.compress({self.denoiser: "w8a8", "text_encoder": "w8a16"}, measure=False)
        self.folder, self.picture = folder, tiny.sample(self.pipe)
        self.pipe.save_pretrained(folder)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved("stable_diffusion", tmp_path_factory.mktemp("sd"), torch.float32)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved("pixart", tmp_path_factory.mktemp("half"), torch.bfloat16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("llama")
    model = tiny.build("llama", dtype=torch.bfloat16).compress("w4a8", measure=False)
    model.save_pretrained(folder)
    return model, folder


# --- classes ----------------------------------------------------------------------------------------------------


def test_auto_pipelines(sd: Saved) -> None:
    text = quiet(diffusers.AutoPipelineForText2Image.from_pretrained(sd.folder))
    assert type(text) is diffusers.StableDiffusionPipeline
    assert_twice(lambda: tiny.sample(text), sd.picture)
    arguments = dict(prompt="a red cat", strength=0.6, num_inference_steps=4, output_type="latent")
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mask = Image.new("L", (32, 32), 255)
    for auto, plain, more in (
        (diffusers.AutoPipelineForImage2Image, diffusers.StableDiffusionImg2ImgPipeline, {}),
        (diffusers.AutoPipelineForInpainting, diffusers.StableDiffusionInpaintPipeline, {"mask_image": mask}),
    ):
        loaded = quiet(auto.from_pretrained(sd.folder))
        assert type(loaded) is plain

        def picture(pipe: Any, more: dict[str, Any] = more) -> torch.Tensor:
            images: torch.Tensor = pipe(
                image=noise, **arguments, **more, generator=torch.Generator().manual_seed(0)
            ).images
            return images

        reference = quiet(plain(**sd.pipe.components, requires_safety_checker=False))
        assert_twice(lambda pipe=loaded, picture=picture: picture(pipe), picture(reference))


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: diffusers.AutoModel.from_pretrained(str(folder), subfolder="unet"),
        lambda folder: diffusers.AutoModel.from_pretrained(f"{folder}/unet"),
        lambda folder: diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        lambda folder: diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=True),
        lambda folder: diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", disable_mmap=True),
        lambda folder: diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True),
    ],
    ids=["auto", "auto-folder", "class", "low_cpu_mem_usage", "disable_mmap", "use_safetensors"],
)
def test_denoiser_alone(load: Callable[[Path], Any], sd: Saved) -> None:
    model = load(sd.folder)
    assert type(model) is diffusers.UNet2DConditionModel
    assert list(quantized_layers(model)) == list(quantized_layers(sd.pipe.unet))
    assert_twice(lambda: output(model), output(sd.pipe.unet))
    assert_twice(lambda: tiny.sample(quiet(type(sd.pipe).from_pretrained(sd.folder, unet=model))), sd.picture)


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder),
        lambda folder: transformers.LlamaForCausalLM.from_pretrained(folder.parent, subfolder=folder.name),
        lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
        lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16),
        lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True),
        lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True),
        lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, disable_mmap=True),
        lambda folder: diffusers.AutoModel.from_pretrained(str(folder.parent), subfolder=folder.name),
    ],
    ids=[
        "auto",
        "subfolder",
        "dtype-auto",
        "dtype",
        "torch_dtype",
        "low_cpu_mem",
        "local",
        "disable_mmap",
        "diffusers",
    ],
)
def test_language_model(load: Callable[[Path], Any], llama: tuple[Any, Path]) -> None:
    saved, folder = llama
    model = load(folder)
    assert model.dtype == torch.bfloat16
    assert quantized_layers(model).keys() <= quantized_layers(saved).keys() | {
        name.removeprefix("model.") for name in quantized_layers(saved)
    }
    if type(model) is type(saved):
        assert_twice(lambda: output(model), output(saved))
    else:  # AutoModel: the body
        ids = torch.arange(8)[None]
        with torch.no_grad():
            assert torch.equal(model(ids)[0], saved.model(ids)[0])


def test_body_and_text_encoders_by_their_auto_classes(llama: tuple[Any, Path], sd: Saved, half: Saved) -> None:
    saved, folder = llama
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(transformers.AutoModel.from_pretrained(folder)(ids)[0], saved.model(ids)[0])
    for pipe, cls in (
        (sd, transformers.CLIPTextModel),
        (half, transformers.T5EncoderModel),
        (half, diffusers.AutoModel),
    ):
        encoder = cls.from_pretrained(str(pipe.folder), subfolder="text_encoder")
        assert type(encoder) is type(pipe.pipe.text_encoder)
        assert_twice(lambda encoder=encoder: output(encoder), output(pipe.pipe.text_encoder))


def test_low_cpu_mem_usage_false_is_the_stock_error(sd: Saved) -> None:
    with pytest.raises(ValueError, match="`low_cpu_mem_usage` cannot be False or None when using quantization"):
        diffusers.UNet2DConditionModel.from_pretrained(sd.folder, subfolder="unet", low_cpu_mem_usage=False)


# --- dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"transformer": "bfloat16", "text_encoder": "bfloat16", "vae": "bfloat16"}),
        ({"dtype": None}, {"transformer": "bfloat16", "text_encoder": "bfloat16", "vae": "bfloat16"}),
        ({"dtype": torch.float16}, {"transformer": "float16", "text_encoder": "float16", "vae": "float16"}),
        (
            {"dtype": {"transformer": torch.bfloat16, "default": torch.float32}},
            {"transformer": "bfloat16", "text_encoder": "float32", "vae": "float32"},
        ),
        # As diffusers has it: what a dict does not name is float32.
        (
            {"dtype": {"transformer": torch.float16}},
            {"transformer": "float16", "text_encoder": "float32", "vae": "float32"},
        ),
    ],
    ids=["nothing", "none", "one", "dict", "dict-no-default"],
)
def test_dtypes_of_a_pipeline(arguments: dict[str, Any], expected: dict[str, str], half: Saved, tmp_path: Path) -> None:
    pipe = quiet(diffusers.DiffusionPipeline.from_pretrained(half.folder, **arguments))
    assert {name: str(getattr(pipe, name).dtype).removeprefix("torch.") for name in expected} == expected
    assert {layer.scale.dtype for layer in quantized_layers(pipe.transformer).values()} == {torch.float32}
    if set(expected.values()) == {"bfloat16"}:
        assert_twice(lambda: tiny.sample(pipe), half.picture)
        return
    cast = tiny.build_pipeline("pixart", dtype=torch.bfloat16)
    cast.compress({"transformer": "w8a8", "text_encoder": "w8a16"}, measure=False)
    for name, dtype in expected.items():
        getattr(cast, name).to(getattr(torch, dtype))
        for key, tensor in getattr(pipe, name).state_dict().items():
            other = getattr(cast, name).state_dict()[key]
            assert (tensor.dtype, True) == (other.dtype, torch.equal(tensor, other)), (name, key)
    # Not the cast model's own output: .to() rounds buffers too that no checkpoint holds.
    cast.transformer.save_pretrained(tmp_path)
    again = type(cast.transformer).from_pretrained(tmp_path)
    assert_twice(lambda: output(pipe.transformer), output(again))


def test_deprecated_torch_dtype(half: Saved) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(half.folder, torch_dtype=torch.bfloat16)
    assert_twice(lambda: tiny.sample(quiet(pipe)), half.picture)
    model = diffusers.PixArtTransformer2DModel.from_pretrained(
        half.folder, subfolder="transformer", torch_dtype=torch.float16
    )
    assert model.dtype == torch.float16
    assert {layer.compute_dtype for layer in quantized_layers(model).values()} == {torch.float16}


# --- the Hub's cache --------------------------------------------------------------------------------------------


def in_cache(folder: Path, cache: Path, name: str = "owner/small", branch: str = "main") -> str:
    """The repository ``name`` as the Hub's client would have put it in ``cache``: blobs, and links to them."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    (root / "refs").mkdir(parents=True)
    (root / "refs" / branch).write_text(COMMIT)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = root / "blobs" / f"{number:064x}"
        shutil.copy(file, blob)
        place = snapshot / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(blob)
    return name


@pytest.mark.parametrize("arguments", [{"local_files_only": True}, {}], ids=["local_files_only", "HF_HUB_OFFLINE"])
def test_repository_in_the_cache(arguments: dict[str, Any], sd: Saved, tmp_path: Path) -> None:
    name = in_cache(sd.folder, tmp_path)
    options = [{"revision": "main"}, {"revision": COMMIT, "token": "hf_none"}, {"token": False}]
    for more in options if arguments else [{}]:
        pipe = diffusers.DiffusionPipeline.from_pretrained(name, cache_dir=tmp_path, **arguments, **more)
        assert torch.equal(tiny.sample(quiet(pipe)), sd.picture)
    assert torch.equal(tiny.sample(pipe), sd.picture)
    unet = diffusers.AutoModel.from_pretrained(name, subfolder="unet", cache_dir=tmp_path, **arguments)
    assert_twice(lambda: output(unet), output(sd.pipe.unet))
    encoder = transformers.CLIPTextModel.from_pretrained(
        name, subfolder="text_encoder", cache_dir=tmp_path, revision="main", **arguments
    )
    assert_twice(lambda: output(encoder), output(sd.pipe.text_encoder))
    with pytest.raises(OSError, match=r"(?i)offline|cache|local_files_only|cannot find"):
        diffusers.DiffusionPipeline.from_pretrained(name, cache_dir=tmp_path, revision="other", **arguments)


def test_half_precision_repository_in_the_cache_comes_back_as_saved(half: Saved, tmp_path: Path) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(in_cache(half.folder, tmp_path), cache_dir=tmp_path)
    assert {part.dtype for part in (pipe.vae, pipe.transformer, pipe.text_encoder)} == {torch.bfloat16}
    assert_twice(lambda: tiny.sample(quiet(pipe)), half.picture)


# --- shards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", [None, "cpu", "balanced"])
def test_sharded_pipeline(device_map: str | None, half: Saved, tmp_path: Path) -> None:
    half.pipe.save_pretrained(tmp_path, max_shard_size="100KB")
    assert list((tmp_path / "transformer").glob("*.index.json"))
    assert list((tmp_path / "text_encoder").glob("*.index.json"))
    pipe = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path, device_map=device_map))
    assert_twice(lambda: tiny.sample(pipe), half.picture)
    assert get_state(pipe.transformer).config == get_state(half.pipe.transformer).config


@pytest.mark.parametrize("preset", ["w8a8", "w4a16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_more_is_set_aside_on_a_gpu_than_the_compressed_model_takes(preset: str, dtype: torch.dtype) -> None:
    """What both libraries' warm-up of the allocator computes, for models on meta as they see them."""
    for name in ("flux", "llama"):
        model = tiny.build(name, dtype=dtype)
        dense = {key: (tensor.numel(), tensor.element_size()) for key, tensor in model.named_parameters()}
        known = (diffusers_auto if name == "flux" else transformers_auto).AUTO_QUANTIZER_MAPPING
        quantizer = known["diffuse_compress"](dc.QuantizationConfig(preset), pre_quantized=False)
        quantizer._await_dense_weights(model)
        if name == "flux":
            quantizer.update_torch_dtype(dtype)
            aside = sum(count for count, _ in dense.values()) // quantizer.get_cuda_warm_up_factor() * dtype.itemsize
        else:
            sizes = {key: quantizer.param_element_size(model, key, value) for key, value in model.named_parameters()}
            aside = sum(count * sizes[key] for key, (count, _) in dense.items())
        model.compress(preset, measure=False)
        taken = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
        assert 0.25 * taken < aside <= taken


def test_sharded_dense_model_quantized_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, mapped = tiny.build("pixart"), []
    dense.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    stock = QuantizerMixin._quantize_arrived

    def spy(self: Any, *args: Any) -> None:
        stock(self, *args)
        if sys.platform.startswith("linux"):
            lines = Path("/proc/self/maps").read_text().splitlines()
            mapped.append({line.split()[-1] for line in lines if str(tmp_path) in line})

    monkeypatch.setattr(QuantizerMixin, "_quantize_arrived", spy)
    loaded = type(dense).from_pretrained(tmp_path, quantization_config=dc.QuantizationConfig("w8a8"))
    # What stays dense must not keep earlier shards in memory; eval/compress_memory.py --load measures the peak.
    assert max(map(len, mapped), default=1) == 1
    assert_twice(lambda: output(loaded), output(dense.compress("w8a8", measure=False)))
