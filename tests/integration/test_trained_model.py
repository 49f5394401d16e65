"""Presets by features on a trained pipeline, emoji_pixart, after a reload: the bits of the plain run, twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffuse_compress.demo import demo_model_path
from diffuse_compress.integrations.component import quantized_layers

PRESETS = ["w8a8", "w4a16", "w4a8", "fp8"]
CPU = torch.device("cpu")


def load(folder: Path, **arguments: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any, **arguments: Any) -> torch.Tensor:
    images: torch.Tensor = pipe(
        "red heart",
        num_inference_steps=2,
        guidance_scale=3.0,
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **arguments,
    ).images
    return images


@pytest.fixture(scope="module", params=PRESETS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, torch.Tensor]:
    """A preset, the folder of the pipeline compressed with it, and its picture."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = load(demo_model_path())
    dense = picture(pipe)
    pipe.compress({"transformer": request.param, "text_encoder": "w8a16"}, measure=False)
    expected = picture(pipe)
    assert not torch.equal(expected, dense)
    pipe.save_pretrained(folder)
    return request.param, folder, expected


def _model_offload(pipe: Any) -> Any:
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def _group_offload(pipe: Any, **how: Any) -> Any:
    pipe.enable_group_offload(CPU, **how)
    return pipe


def _compiled(pipe: Any) -> Any:
    torch._dynamo.reset()
    pipe.transformer.compile(backend="aot_eager", fullgraph=True)
    return pipe


def _attention(pipe: Any) -> Any:
    pipe.transformer.set_attention_backend("native")
    return pipe


LINES: dict[str, Callable[[Any], Any]] = {
    "reload": lambda pipe: pipe,
    "model-offload": _model_offload,
    "block-offload": lambda pipe: _group_offload(pipe, offload_type="block_level", num_blocks_per_group=1),
    "leaf-offload": lambda pipe: _group_offload(pipe, offload_type="leaf_level"),
    "cast": lambda pipe: pipe.to(torch.float32).to("cpu", torch.float32),
    "from_pipe": lambda pipe: diffusers.PixArtAlphaPipeline.from_pipe(pipe),
    "attention": _attention,
    "compile": _compiled,
}


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[pytest.mark.slow] if line == "compile" else []) for line in LINES]
)
def test_feature_gives_the_plain_bits(line: str, saved: tuple[str, Path, torch.Tensor]) -> None:
    _, folder, expected = saved
    pipe = LINES[line](load(folder))
    pipe.set_progress_bar_config(disable=True)
    assert len(quantized_layers(pipe.transformer)) > 30
    assert torch.equal(picture(pipe), expected)
    assert torch.equal(picture(pipe), expected)


@pytest.mark.parametrize(
    "arguments", [{"device_map": "balanced"}, {"dtype": torch.float32}], ids=["device_map", "dtype"]
)
def test_loaded_otherwise_it_gives_the_plain_bits(
    arguments: dict[str, Any], saved: tuple[str, Path, torch.Tensor]
) -> None:
    pipe = load(saved[1], **arguments)
    assert torch.equal(picture(pipe), saved[2])
    assert torch.equal(picture(pipe), saved[2])


def test_in_bfloat16_it_runs_and_saves(saved: tuple[str, Path, torch.Tensor], tmp_path: Path) -> None:
    pipe = load(saved[1], dtype=torch.bfloat16)
    expected = picture(pipe)
    assert expected.dtype == torch.bfloat16
    pipe.save_pretrained(tmp_path)
    assert torch.equal(picture(load(tmp_path)), expected)


def test_adapter_before_or_after_compress_and_taken_off(saved: tuple[str, Path, torch.Tensor]) -> None:
    peft = pytest.importorskip("peft")
    preset, folder, plain = saved
    first, second = load(demo_model_path()), load(folder)
    for pipe in (first, second):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
            peft.inject_adapter_in_model(config, pipe.transformer)
    first.compress({"transformer": preset, "text_encoder": "w8a16"}, measure=False)
    expected = picture(second)
    assert torch.equal(picture(second), expected)
    assert not torch.equal(expected, plain)
    assert torch.equal(picture(first), expected)
    layers = [module for module in second.transformer.modules() if isinstance(module, peft.tuners.lora.Linear)]
    for layer in layers:
        layer.merge()
    assert not torch.equal(picture(second), plain)
    for layer in layers:
        layer.unmerge()
    assert torch.equal(picture(second), expected)
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(picture(second), plain)


def test_callback_and_interruption_leave_the_next_call_alone(saved: tuple[str, Path, torch.Tensor]) -> None:
    pipe = load(saved[1])
    seen: list[int] = []
    picture(pipe, callback=lambda step, timestep, latents: seen.append(step))
    assert seen == [0, 1]

    class Stop(Exception):
        pass

    def stop(step: int, timestep: Any, latents: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        picture(pipe, callback=stop)
    assert torch.equal(picture(pipe), saved[2])
