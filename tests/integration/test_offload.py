"""Offloading and device maps: the bits of the plain compressed run, twice; in the wrong order, an error and no harm.

What needs a second device (sequential offload, where every packed tensor is between steps) is in test_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import get_state, quantized_layers

PRESETS = ["w8a8", "fp8", "w8a16", "w4a16", "w4a8"]
CPU = torch.device("cpu")


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**tiny.inputs_for(model), return_dict=False)))


def block_level(model: Any, folder: Path | None = None) -> None:
    model.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=folder)


def leaf_level(model: Any, folder: Path | None = None) -> None:
    model.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=folder)


MODES: dict[str, Callable[[Any, Path], Any]] = {
    "whole": lambda model, folder: accelerate.cpu_offload_with_hook(model, "cpu"),
    "block": lambda model, folder: block_level(model),
    "leaf": lambda model, folder: leaf_level(model),
    "block-disk": block_level,
    "leaf-disk": leaf_level,
    # Between calls every tensor is on meta. (Whole pipelines fail on the CPU, dense ones too: test_cuda.py.)
    "sequential": lambda model, folder: accelerate.cpu_offload(model, CPU),
}
PIPELINE_MODES: dict[str, Callable[[Any], Any]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "block": lambda pipe: pipe.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1),
    "leaf": lambda pipe: pipe.enable_group_offload(CPU, offload_type="leaf_level"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preset", PRESETS)
def test_offload_after_compress_gives_the_plain_bits(preset: str, mode: str, tmp_path: Path) -> None:
    model = tiny.build("flux").compress(preset, measure=False)
    expected = output(model)
    inputs = tiny.inputs_for(model)
    MODES[mode](model, tmp_path)
    where = {tensor.device.type for tensor in model.parameters()}
    assert where == {"meta" if mode == "sequential" else "cpu"}
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(**inputs, return_dict=False)[0], expected)
        assert {tensor.device.type for tensor in model.parameters()} == where


@pytest.mark.parametrize(
    ("name", "mode", "mode_of_reload"),
    [(name, "model", "leaf") for name in tiny.PIPELINES if name != "pixart"] + [("pixart", "block", "model")],
)
def test_offload_of_a_pipeline_and_of_its_reload(name: str, mode: str, mode_of_reload: str, tmp_path: Path) -> None:
    pipe = tiny.build_pipeline(name).compress("w8a8", measure=False)
    expected = tiny.sample(pipe)
    pipe.save_pretrained(tmp_path)
    reloaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    for one, how in ((pipe, mode), (reloaded, mode_of_reload)):
        PIPELINE_MODES[how](one)
        assert torch.equal(tiny.sample(one), expected)
        assert torch.equal(tiny.sample(one), expected)


@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_compress_under_model_offload(preset: str) -> None:
    expected = tiny.sample(tiny.build_pipeline("flux").compress(preset, measure=False))
    pipe = tiny.build_pipeline("flux")
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.compress(preset)  # the measurement calls the model, hooks and all
    assert torch.equal(tiny.sample(pipe), expected)
    assert torch.equal(tiny.sample(pipe), expected)


REFUSED: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "block": (MODES["block"], r"hook 'group_offloading'. Call compress first, then enable_group_offload\(\)"),
    "leaf": (MODES["leaf"], r"hook 'group_offloading'. Call compress first, then enable_group_offload\(\)"),
    "leaf-disk": (MODES["leaf-disk"], r"hook 'group_offloading'. Call compress first"),
    "sequential": (
        MODES["sequential"],
        r"per-layer hooks. Call compress before enable_sequential_cpu_offload\(\).*remove_all_hooks\(\)",
    ),
}


@pytest.mark.parametrize("mode", REFUSED)
@pytest.mark.parametrize("name", ["pixart", "unet_sd1"])
def test_compress_under_hooks_names_the_order_and_touches_nothing(name: str, mode: str, tmp_path: Path) -> None:
    enable, message = REFUSED[mode]
    model = tiny.build(name)
    enable(model, tmp_path)
    before = {key: (id(tensor), tensor.device, tensor.dtype) for key, tensor in model.named_parameters()}
    with pytest.raises(dc.ModelStateError, match=message):
        model.compress("w8a8")
    assert {key: (id(tensor), tensor.device, tensor.dtype) for key, tensor in model.named_parameters()} == before
    assert get_state(model) is None
    assert not quantized_layers(model)


def test_compress_after_the_hooks_are_gone() -> None:
    expected = tiny.sample(tiny.build_pipeline("stable_diffusion").compress("w8a8", measure=False))
    pipe = tiny.build_pipeline("stable_diffusion")
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(dc.ModelStateError, match=r"unet\.conv_in: compress cannot replace layers"):
        pipe.compress("w8a8")
    pipe.remove_all_hooks()
    assert torch.equal(tiny.sample(pipe.compress("w8a8", measure=False)), expected)


@pytest.mark.parametrize("mode", ["leaf", "block", "sequential"])
def test_decompress_under_hooks_is_refused(mode: str, tmp_path: Path) -> None:
    model = tiny.build("pixart").compress("w8a8", measure=False)
    REFUSED[mode][0](model, tmp_path)
    for act in (model.decompress, model.dequantize):
        with pytest.raises(dc.ModelStateError, match="decompress cannot replace layers under"):
            act()
    assert quantized_layers(model)


# --- saving what is offloaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["whole", "block", "leaf"])
def test_save_under_hooks_that_keep_the_weights_in_memory(mode: str, tmp_path: Path) -> None:
    model = tiny.build("pixart").compress("w4a8", measure=False)
    expected = output(model)
    MODES[mode](model, tmp_path)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "saved")), expected)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("block-disk", "found them offloaded to disk by enable_group_offload"),
        ("leaf-disk", "found them offloaded to disk by enable_group_offload"),
        ("sequential", r"found a meta tensor.*remove_all_hooks\(\)"),
    ],
)
def test_save_of_weights_that_are_elsewhere_is_refused(mode: str, message: str, tmp_path: Path) -> None:
    model = tiny.build("pixart").compress("w4a8", measure=False)
    (MODES.get(mode) or REFUSED[mode][0])(model, tmp_path / "offload")
    with pytest.raises(dc.CheckpointError, match=message):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists() or not list((tmp_path / "saved").iterdir())


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_clipped_layer_under_sequential_hooks(offload_buffers: bool) -> None:
    """A clip is a buffer outside the state dict, and without one there is none: hooks fail on a buffer of None."""
    model = tiny.build("flux").compress("w8a8", measure=False)
    inputs = tiny.inputs_for(model)
    layers = [layer for layer in quantized_layers(model).values() if layer.scheme.activation is not None]

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    plain = run()
    for layer in layers:
        layer.set_input_clip(torch.tensor([0.5]))
    expected = run()
    assert not torch.equal(expected, plain)
    accelerate.cpu_offload(model, CPU, offload_buffers=offload_buffers)
    assert torch.equal(run(), expected)
    assert torch.equal(run(), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    for layer in layers:
        layer.set_input_clip(None)
    assert torch.equal(run(), plain)


@pytest.mark.parametrize("name", sorted(tiny.PIPELINES))
def test_pipeline_under_sequential_hooks(name: str, tmp_path: Path) -> None:
    """accelerate's hooks as ``enable_sequential_cpu_offload`` sets them; diffusers itself asks for a GPU there."""
    pipe = tiny.build_pipeline(name, dtype=torch.bfloat16)
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    pipe.compress({denoiser: "w8a8", "text_encoder": "w8a16"}, measure=False)
    expected = tiny.sample(pipe)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    for _ in range(2):
        assert torch.equal(tiny.sample(pipe), expected)
        layers = quantized_layers(getattr(pipe, denoiser)).values()
        assert {parameter.device.type for layer in layers for parameter in layer.parameters()} == {"meta"}
    with pytest.raises(dc.CheckpointError, match=r"found a meta tensor.*remove_all_hooks\(\)"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    pipe.remove_all_hooks()
    pipe.save_pretrained(tmp_path)
    assert torch.equal(tiny.sample(diffusers.DiffusionPipeline.from_pretrained(tmp_path)), expected)


# --- device maps ------------------------------------------------------------------------------------------------


def blocks_on_disk(model: nn.Module) -> dict[str, str]:
    tops = {name.partition(".")[0] for name, _ in [*model.named_modules(), *model.named_parameters()] if name}
    # T5 goes as a whole: transformers loses its tied embedding when half of it is on disk, dense models' too.
    return {name: "disk" if "blocks" in name or name in ("encoder", "shared") else "cpu" for name in tops}


DEVICE_MAPS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "cpu": lambda model: {"device_map": "cpu"},
    "whole": lambda model: {"device_map": {"": "cpu"}},
    "disk": lambda model: {"device_map": blocks_on_disk(model)},
    "max_memory": lambda model: {"device_map": "auto", "max_memory": {"cpu": 200_000}},
}


@pytest.mark.parametrize("placed", DEVICE_MAPS)
@pytest.mark.parametrize(
    ("name", "preset"),
    [*(("pixart", preset) for preset in PRESETS), ("unet_sd1", "w8a8"), ("t5_encoder", "w8a16"), ("llama", "w4a8")],
)
def test_reload_with_a_device_map(name: str, preset: str, placed: str, tmp_path: Path) -> None:
    model = tiny.build(name).compress(preset, measure=False)
    expected = output(model)
    model.save_pretrained(tmp_path / "saved")
    arguments = DEVICE_MAPS[placed](model)
    if placed == "disk" and name == "llama":
        arguments = {"device_map": {"model": "disk", "lm_head": "cpu"}}
    folder = {"offload_folder": tmp_path / "offload"} if placed in ("disk", "max_memory") else {}
    reloaded = type(model).from_pretrained(tmp_path / "saved", **arguments, **folder)
    inputs = tiny.inputs_for(model)
    where = {tensor.device.type for tensor in reloaded.parameters()}
    assert ("meta" in where) == (placed in ("disk", "max_memory")), "or the map put nothing on disk"
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(next(iter(reloaded(**inputs, return_dict=False))), expected)
        assert {tensor.device.type for tensor in reloaded.parameters()} == where
    if "meta" in where:
        with pytest.raises(dc.CheckpointError, match=r"save_pretrained needs the weights in memory.*device_map="):
            reloaded.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_reload_a_pipeline_with_a_device_map(device_map: str, tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart").compress({"transformer": "w8a8", "text_encoder": "w8a16"}, measure=False)
    expected = tiny.sample(pipe)
    pipe.save_pretrained(tmp_path)
    reloaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, device_map=device_map)
    reloaded.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.sample(reloaded), expected)
    assert torch.equal(tiny.sample(reloaded), expected)


def test_compress_under_a_device_map(tmp_path: Path) -> None:
    dense = tiny.build("pixart")
    dense.save_pretrained(tmp_path / "dense")
    here = {name: "cpu" for name in blocks_on_disk(dense)}
    mapped = type(dense).from_pretrained(tmp_path / "dense", device_map=here)
    assert torch.equal(output(mapped.compress("w8a8")), output(dense.compress("w8a8")))
    elsewhere = type(dense).from_pretrained(
        tmp_path / "dense", device_map=blocks_on_disk(dense), offload_folder=tmp_path / "offload"
    )
    with pytest.raises(dc.ModelStateError, match=r"compress before .* dispatching with a device_map"):
        elsewhere.compress("w8a8")


@pytest.mark.parametrize("name", ["pixart", "t5_encoder"])
def test_quantizing_while_loading_takes_no_disk(name: str, tmp_path: Path) -> None:
    dense = tiny.build(name)
    dense.save_pretrained(tmp_path / "dense")
    config = dc.QuantizationConfig("w8a8")
    loaded = type(dense).from_pretrained(tmp_path / "dense", device_map="cpu", quantization_config=config)
    assert torch.equal(output(loaded), output(dense.compress("w8a8", measure=False)))
    for arguments in (DEVICE_MAPS["disk"](dense), {"device_map": "auto", "max_memory": {"cpu": 100_000}}):
        with pytest.raises(dc.ModelStateError, match=r"quantizing while loading needs every weight in memory.*on disk"):
            type(dense).from_pretrained(
                tmp_path / "dense", quantization_config=config, offload_folder=tmp_path / "offload", **arguments
            )
