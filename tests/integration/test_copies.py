"""``from_unet`` and its like: of a compressed model they make what they make of its dense equal, with a warning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import quantized_layers

EMBEDDING = dict(conditioning_embedding_out_channels=(16, 32, 32))
HEADS = dict(num_layers=1, attention_head_dim=32, num_attention_heads=4)


def _motion(unet: Any) -> Any:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_num_attention_heads=4, motion_norm_num_groups=8
    )
    return diffusers.UNetMotionModel.from_unet2d(unet, adapter)


def _hunyuan_dit() -> Any:
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=128,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=128,
        cross_attention_dim_t5=128,
        pooled_projection_dim=1024,
        text_len=8,
        text_len_t5=8,
        activation_fn="gelu-approximate",
    )


BUILDERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "controlnet": ("unet_sd1", lambda unet: diffusers.ControlNetModel.from_unet(unet, **EMBEDDING)),
    "controlnet-xl": ("unet_sdxl", lambda unet: diffusers.ControlNetModel.from_unet(unet, **EMBEDDING)),
    "union": ("unet_sdxl", lambda unet: diffusers.ControlNetUnionModel.from_unet(unet, **EMBEDDING)),
    "sparse": (
        # It writes into the list of block types, which is one where the configuration comes from a file.
        lambda: tiny.build("unet_sd1", down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"]),
        lambda unet: diffusers.SparseControlNetModel.from_unet(unet, **EMBEDDING),
    ),
    "xs": (
        lambda: tiny.build("unet_sd1", layers_per_block=2),
        lambda unet: diffusers.UNetControlNetXSModel.from_unet(
            unet, size_ratio=0.5, ctrl_optional_kwargs=dict(num_attention_heads=4, **EMBEDDING)
        ),
    ),
    "motion": ("unet_sd1", _motion),
    "flux": (
        "flux",
        lambda transformer: diffusers.FluxControlNetModel.from_transformer(transformer, num_single_layers=1, **HEADS),
    ),
    "sd3": ("sd3", lambda transformer: diffusers.SD3ControlNetModel.from_transformer(transformer, num_layers=1)),
    "qwenimage": (
        "qwenimage",
        lambda transformer: diffusers.QwenImageControlNetModel.from_transformer(transformer, **HEADS),
    ),
    "hunyuan-dit": (
        _hunyuan_dit,
        lambda transformer: diffusers.HunyuanDiT2DControlNetModel.from_transformer(
            transformer, transformer_num_layers=2
        ),
    ),
}


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make()


@pytest.mark.parametrize("name", BUILDERS)
def test_copy_of_a_compressed_model_is_the_copy_of_its_dense_equal(name: str) -> None:
    source, build = BUILDERS[name]
    model: Any = tiny.build(source) if isinstance(source, str) else seeded(source).eval()
    model.compress("w8a8", measure=False, overrides={"*": "w8a8"})
    dense = copy.deepcopy(model).decompress()
    expected = seeded(lambda: build(dense)).state_dict()
    keys = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.warns(dc.errors.DiffuseCompressWarning, match=r"is compressed; the copy is dense.*Call compress\(\)"):
        made = seeded(lambda: build(model))
    assert made.state_dict().keys() == expected.keys()
    for key, tensor in made.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert not quantized_layers(made)
    assert "quantization_config" not in made.config
    # The source is as it was, and its state dicts are packed again.
    assert keys.keys() == model.state_dict().keys()
    assert all(
        torch.equal(keys[key].view(torch.uint8), now.view(torch.uint8)) for key, now in model.state_dict().items()
    )
    made.compress("w4a16", measure=False)
    assert quantized_layers(made)


def test_copy_of_a_dense_model_and_a_class_made_later_are_as_ever() -> None:
    dense = tiny.build("unet_sd1")
    net = diffusers.ControlNetModel.from_unet(dense, **EMBEDDING)
    assert torch.equal(net.conv_in.weight, dense.conv_in.weight)

    class Mine(diffusers.ControlNetModel):
        @classmethod
        def from_unet(cls, unet: Any) -> nn.Module:
            made = nn.Conv2d(4, unet.conv_in.out_channels, 3)
            made.load_state_dict(unet.conv_in.state_dict())
            return made

    dense.compress("w8a8", measure=False, overrides={"conv_in": "w8a8"})
    with pytest.warns(dc.errors.DiffuseCompressWarning, match=r"Mine\.from_unet"):
        assert torch.equal(Mine.from_unet(dense).weight, dense.conv_in.weight)
