"""``from_single_file`` of original-layout files: dense and then compressed, or quantized on the way: the same bits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import get_state, quantized_layers

CONFIG = dc.QuantizationConfig("w8a8")


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**tiny.inputs_for(model), return_dict=False)))


# --- the layouts of the original repositories -------------------------------------------------------------------

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def unet_original(model: Any, prefix: str = "model.diffusion_model.") -> dict[str, torch.Tensor]:
    """A UNet's tensors under the names of the latent-diffusion repository, as SDXL files have them."""
    per_block, with_attention = model.config.layers_per_block + 1, set()
    for name, _ in model.named_modules():
        if match := re.fullmatch(r"up_blocks\.(\d+)\.attentions\.0", name):
            with_attention.add(match[1])

    def renamed(owner: str) -> str:
        if owner in _UNET_ENDS:
            return _UNET_ENDS[owner]
        side, _, rest = owner.partition(".")
        if side == "mid_block":
            kind, number, rest = rest.split(".", 2)
            place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
            return f"{place}.{_RESNET.get(rest, rest) if kind == 'resnets' else rest}"
        block, kind, number, rest = rest.split(".", 3)
        if side == "down_blocks":
            index = int(block) * per_block + 1 + int(number)
            if kind == "downsamplers":
                return f"input_blocks.{(int(block) + 1) * per_block}.0.op"
            places = {"resnets": f"input_blocks.{index}.0", "attentions": f"input_blocks.{index}.1"}
        else:
            index = int(block) * per_block + int(number)
            if kind == "upsamplers":
                slot = 2 if block in with_attention else 1
                return f"output_blocks.{(int(block) + 1) * per_block - 1}.{slot}.conv"
            places = {"resnets": f"output_blocks.{index}.0", "attentions": f"output_blocks.{index}.1"}
        return f"{places[kind]}.{_RESNET.get(rest, rest) if kind == 'resnets' else rest}"

    found = {}
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        found[f"{prefix}{renamed(owner)}.{leaf}"] = tensor.contiguous()
    return found


_FLUX_ENDS = {
    "time_in": "time_text_embed.timestep_embedder",
    "vector_in": "time_text_embed.text_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",
}
_FLUX_STREAMS = {
    "img": {"qkv": ("to_q", "to_k", "to_v"), "out": "to_out.0", "q": "norm_q", "k": "norm_k", "tail": ""},
    "txt": {
        "qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
        "out": "to_add_out",
        "q": "norm_added_q",
        "k": "norm_added_k",
        "tail": "_context",
    },
}


def flux_original(model: Any) -> dict[str, torch.Tensor]:
    """A Flux transformer's tensors under the names of Black Forest Labs' repository."""
    state, found = model.state_dict(), {}

    def put(name: str, *sources: str) -> None:
        for leaf in ("weight", "bias"):
            if f"{sources[0]}.{leaf}" in state:
                found[f"{name}.{leaf}"] = torch.cat([state[f"{source}.{leaf}"] for source in sources])

    for name, source in _FLUX_ENDS.items():
        put(f"{name}.in_layer", f"{source}.linear_1")
        put(f"{name}.out_layer", f"{source}.linear_2")
    put("txt_in", "context_embedder")
    put("img_in", "x_embedder")
    put("final_layer.linear", "proj_out")
    for leaf in ("weight", "bias"):
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    for i in range(model.config.num_layers):
        ours, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, names in _FLUX_STREAMS.items():
            put(f"{theirs}.{stream}_mod.lin", f"{ours}.norm1{names['tail']}.linear")
            put(f"{theirs}.{stream}_attn.qkv", *(f"{ours}.attn.{name}" for name in names["qkv"]))
            put(f"{theirs}.{stream}_attn.proj", f"{ours}.attn.{names['out']}")
            put(f"{theirs}.{stream}_mlp.0", f"{ours}.ff{names['tail']}.net.0.proj")
            put(f"{theirs}.{stream}_mlp.2", f"{ours}.ff{names['tail']}.net.2")
            for side in ("q", "k"):
                norm = f"{'query' if side == 'q' else 'key'}_norm.scale"
                found[f"{theirs}.{stream}_attn.norm.{norm}"] = state[f"{ours}.attn.{names[side]}.weight"]
    for i in range(model.config.num_single_layers):
        ours, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        put(f"{theirs}.modulation.lin", f"{ours}.norm.linear")
        put(f"{theirs}.linear1", *(f"{ours}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))
        put(f"{theirs}.linear2", f"{ours}.proj_out")
        for side in ("query", "key"):
            found[f"{theirs}.norm.{side}_norm.scale"] = state[f"{ours}.attn.norm_{side[0]}.weight"]
    return found


def diffusers_layout(model: Any) -> dict[str, torch.Tensor]:
    """A file of the stock names, which from_single_file takes as it is."""
    return dict(model.state_dict())


_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "scale_shift_table": "modulation",
    "proj_out": "head.head",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    ".to_q": ".q",
    ".to_k": ".k",
    ".to_v": ".v",
    ".to_out.0": ".o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    ".norm2.": ".norm3.",
}


def wan_original(model: Any) -> dict[str, torch.Tensor]:
    """A Wan transformer's tensors under the names of Alibaba's repository."""
    found = {}
    for key, tensor in model.state_dict().items():
        name = "head.modulation" if key == "scale_shift_table" else key
        for ours, theirs in _WAN.items():
            name = name.replace(ours, theirs)
        found[name] = tensor.contiguous()
    return found


LAYOUTS = {"unet_sdxl": unet_original, "wan": wan_original, "flux": diffusers_layout, "sd3": diffusers_layout}


def write(model: Any, layout: Any, folder: Path) -> tuple[str, dict[str, Any]]:
    """The single file, and the arguments that tell from_single_file of the configuration."""
    model.save_config(folder / "config")
    save_file(layout(model), folder / "original.safetensors")
    return str(folder / "original.safetensors"), {"config": str(folder / "config")}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("unet_sdxl", torch.float32),
        ("wan", torch.float32),
        ("wan", torch.bfloat16),
        ("flux", torch.bfloat16),
        ("sd3", torch.float16),
    ],
)
def test_single_file_then_compress_or_quantized_on_its_way(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved = tiny.build(name, dtype=dtype)
    cls, kept = type(saved), list(type(saved)._keep_in_fp32_modules or ())
    file, arguments = write(saved, LAYOUTS[name], tmp_path)
    dense = cls.from_single_file(file, **arguments, dtype=dtype)
    for key, tensor in dense.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[key].to(tensor.dtype)), key
    if kept:
        # Without a quantizer, from_single_file rounds to bfloat16 what the class keeps in float32; from_pretrained does
        # not, and neither does it with one.
        saved.save_pretrained(tmp_path / "dense")
        dense = cls.from_pretrained(tmp_path / "dense", dtype=dtype)
    dense.compress("w8a8", measure=False)
    expected = output(dense)
    loaded = cls.from_single_file(file, **arguments, dtype=dtype, quantization_config=CONFIG)
    assert list(quantized_layers(loaded)) == list(quantized_layers(dense))
    for key, tensor in loaded.state_dict().items():
        other = dense.state_dict()[key]
        assert tensor.dtype == other.dtype, key
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), key
    assert get_state(loaded).config == get_state(dense).config
    assert torch.equal(output(loaded), expected)
    assert torch.equal(output(loaded), expected)
    assert list(cls._keep_in_fp32_modules or ()) == kept, "the class's own list has grown"
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(output(cls.from_pretrained(tmp_path / "saved")), expected)


def test_configuration_of_a_compressed_model_quantizes_a_single_file_alike(tmp_path: Path) -> None:
    dense = tiny.build("unet_sdxl")
    file, arguments = write(dense, unet_original, tmp_path)
    dense.compress("w4a8", measure=False, modules_to_not_convert=["attn2"])
    config = get_state(dense).config
    loaded = type(dense).from_single_file(file, **arguments, quantization_config=config)
    assert list(quantized_layers(loaded)) == list(quantized_layers(dense))
    assert torch.equal(output(loaded), output(dense))


@pytest.mark.parametrize("name", LAYOUTS)
def test_file_of_a_compressed_model_is_refused(name: str, tmp_path: Path) -> None:
    model = tiny.build(name).compress("w8a8", measure=False)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    for arguments in ({}, {"quantization_config": CONFIG}):
        with pytest.raises(dc.CheckpointError, match=r"needs a dense model's file.*from_pretrained\(folder\)"):
            type(model).from_single_file(str(file), config=str(tmp_path), **arguments)


def test_pipeline_from_a_compressed_file_is_refused(tmp_path: Path) -> None:
    model = tiny.build("flux").compress("w8a8", measure=False)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    for given in ((file,), ()):
        named = {} if given else {"pretrained_model_link_or_path": str(file)}
        with pytest.raises(dc.CheckpointError, match=r"FluxPipeline.from_single_file: needs a dense model's file"):
            diffusers.FluxPipeline.from_single_file(*given, **named)


def test_pipeline_from_a_single_file(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("stable_diffusion_xl")
    pipe.save_pretrained(tmp_path / "pipe")
    save_file(unet_original(pipe.unet), tmp_path / "xl.safetensors")
    parts = {name: part for name, part in pipe.components.items() if part is not None and name != "unet"}
    loaded = type(pipe).from_single_file(str(tmp_path / "xl.safetensors"), config=str(tmp_path / "pipe"), **parts)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.sample(loaded), tiny.sample(pipe))
    expected = tiny.sample(pipe.compress("w8a8", measure=False))
    loaded.compress("w8a8", measure=False)
    assert torch.equal(tiny.sample(loaded), expected)
    unet = type(pipe.unet).from_single_file(
        str(tmp_path / "xl.safetensors"), config=str(tmp_path / "pipe"), subfolder="unet", quantization_config=CONFIG
    )
    loaded = type(pipe).from_single_file(
        str(tmp_path / "xl.safetensors"), config=str(tmp_path / "pipe"), **parts, unet=unet
    )
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.sample(loaded), expected)
    loaded.save_pretrained(tmp_path / "small")
    reloaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "small")
    reloaded.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.sample(reloaded), expected)


@pytest.mark.slow
def test_flux_file_of_the_original_layout(tmp_path: Path) -> None:
    """diffusers splits Flux's fused layers at its true width, 3072, so this is one block of each kind at that size."""
    with torch.device("meta"):
        saved = diffusers.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=24,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            guidance_embeds=True,
        )
    saved = saved.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in saved.parameters():
        parameter.normal_(0, 0.02, generator=generator)
    file, arguments = write(saved, flux_original, tmp_path)
    del saved
    dense = diffusers.FluxTransformer2DModel.from_single_file(file, **arguments, dtype=torch.bfloat16)
    config = dc.QuantizationConfig("w8a16", modules_to_not_convert=["ff", "ff_context", "norm1", "norm1_context"])
    dense.compress(config, measure=False)
    loaded = diffusers.FluxTransformer2DModel.from_single_file(
        file, **arguments, dtype=torch.bfloat16, quantization_config=config
    )
    assert list(quantized_layers(loaded)) == list(quantized_layers(dense))
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[key]), key
