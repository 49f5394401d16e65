"""Composed blocks read every argument of their stock forward, or leave the call to it."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

import tiny
from diffuse_compress.families.registry import family_of
from diffuse_compress.runtime.blocks import own
from families.composition import CASES, IDS, Watch, output_of


def _spatial_attention() -> Attention:
    return Attention(32, heads=2, dim_head=16, norm_num_groups=8, residual_connection=True, bias=True).eval()


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((2, 32, 4, 4), {"encoder_hidden_states": (2, 5, 32)}),
        ((2, 32, 4, 4), {"attention_mask": (2, 1, 16)}),
        ((2, 16, 32), {}),
    ],
    ids=["text", "mask", "tokens"],
)
def test_arguments_that_spatial_attention_is_not_composed_for(shape, arguments):
    block, watch = _spatial_attention(), Watch()
    x = torch.randn(shape)
    extra = {name: torch.randn(size) for name, size in arguments.items()}
    with torch.no_grad():
        expected = block(x, **extra)
        own(block, watch)
        assert torch.equal(block(x, **extra), expected)
        assert watch.seen == []
        block(torch.randn(2, 32, 4, 4), temb=None)
    assert watch.seen == ["attention"]


def test_deprecated_and_missing_arguments_meet_the_stock_forward():
    """What the class warns of or refuses, it warns of and refuses composed, too."""
    resnet = ResnetBlock2D(in_channels=32, temb_channels=16, groups=8, time_embedding_norm="scale_shift").eval()
    own(resnet, Watch())
    x, temb = torch.randn(1, 32, 4, 4), torch.randn(1, 16)
    with pytest.warns(FutureWarning, match="`scale` argument is deprecated"):
        resnet(x, temb, scale=0.5)
    unconditional = ResnetBlock2D(in_channels=32, temb_channels=None, groups=8, time_embedding_norm="scale_shift")
    own(unconditional, Watch())
    with pytest.raises(ValueError, match="`temb` should not be None"):
        unconditional(x, None)
    block = tiny.build("unet_sd1").mid_block.attentions[0].transformer_blocks[0]
    own(block, Watch())
    with pytest.raises(AttributeError, match="fuser"):
        block(torch.randn(1, 4, 64), cross_attention_kwargs={"gligen": {"objs": None}})
    decoder = tiny.build("llama")
    layer = decoder.model.layers[0]
    own(layer, Watch())
    with pytest.raises(TypeError, match="positional arguments"):
        layer(torch.randn(1, 4, 128), *[None] * 6)


def further_arguments(name: str) -> tuple[torch.nn.Module, dict]:
    """A model called with what its pipelines pass only sometimes."""
    if name == "cogvideox":
        model = tiny.build(name, use_rotary_positional_embeddings=True)
        angles = torch.randn(2 * 4 * 4, 32)
        return model, tiny.inputs_for(model) | {"image_rotary_emb": (angles.cos(), angles.sin())}
    if name == "qwenimage":
        model = tiny.build(name, zero_cond_t=True)
        inputs = tiny.inputs_for(model, batch=1)
        reference = {"img_shapes": [[(1, 4, 4)] * 2], "hidden_states": inputs["hidden_states"].repeat(1, 2, 1)}
        return model, inputs | reference
    model = tiny.build(name)
    mask = torch.arange(16) < torch.tensor([[16], [8]])
    return model, tiny.inputs_for(model) | {"encoder_attention_mask": mask}


@pytest.mark.parametrize("name", ["cogvideox", "qwenimage", "unet_sd1"])
def test_arguments_that_are_rarely_given(name):
    model, inputs = further_arguments(name)
    expected, watch = output_of(model, inputs), Watch()
    for block in family_of(model).blocks(model):
        own(model.get_submodule(block), watch)
    assert torch.equal(output_of(model, inputs), expected)
    assert watch.seen


@pytest.mark.parametrize(("name", "config"), CASES, ids=IDS)
def test_begin_knows_every_argument_of_the_stock_forward(name, config):
    model = tiny.build(name, **config)
    family = family_of(model)
    for block in map(model.get_submodule, family.blocks(model)):
        known = set(inspect.signature(family.kind_of(block).begin).parameters)
        stock = list(inspect.signature(type(block).forward).parameters.values())[1:]
        named = {parameter.name for parameter in stock if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}
        # Decoder layers pass all they are given to their attention.
        assert named <= known or type(block).__module__.startswith("transformers.")
