"""Roles found from the module tree, against the facts of published models and of classes nobody described."""

from __future__ import annotations

import re

import pytest
from torch import nn

from diffuse_compress.families.published import list_published, meta_components, published_config
from diffuse_compress.families.roles import LayerRole, layer_roles
from families import unknown_classes

# Layers that are not BLOCK, by pattern with indices as "*"; what is not listed here must be a block's.
MODULATION = {
    "flux1_dev": {
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
        "single_transformer_blocks.*.norm.linear",
        "norm_out.linear",
    },
    "sd35_large": {
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
        "norm_out.linear",
    },
    "pixart_xl_2_1024": {"adaln_single.linear"},
    "dit_xl_2_256": {
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1.emb.timestep_embedder.linear_1",
        "transformer_blocks.*.norm1.emb.timestep_embedder.linear_2",
        "proj_out_1",
    },
    "wan21_t2v_14b": {"condition_embedder.time_proj"},
    "cogvideox_5b": {
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm2.linear",
        "norm_out.linear",
    },
    "qwenimage": {"transformer_blocks.*.img_mod.*", "transformer_blocks.*.txt_mod.*", "norm_out.linear"},
    "sdxl_base": {
        "down_blocks.*.resnets.*.time_emb_proj",
        "up_blocks.*.resnets.*.time_emb_proj",
        "mid_block.resnets.*.time_emb_proj",
    },
}
OUTPUT = {
    "flux1_dev": {"proj_out"},
    "sd35_large": {"proj_out"},
    "pixart_xl_2_1024": {"proj_out"},
    "dit_xl_2_256": {"proj_out_2"},
    "wan21_t2v_14b": {"proj_out"},
    "cogvideox_5b": {"proj_out"},
    "qwenimage": {"proj_out"},
    "sdxl_base": {"conv_out"},
}


def _by_role(model: nn.Module) -> dict[LayerRole, set[str]]:
    found: dict[LayerRole, set[str]] = {role: set() for role in LayerRole}
    for name, role in layer_roles(model).items():
        found[role].add(re.sub(r"\.\d+(?=\.|$)", ".*", name))
    return found


@pytest.mark.parametrize("name", sorted(MODULATION))
def test_layer_roles_published_models(name: str) -> None:
    component = published_config(name).denoisers[0]
    (model,) = meta_components(name, [component]).values()
    roles = _by_role(model)
    assert roles[LayerRole.MODULATION] == MODULATION[name]
    assert roles[LayerRole.OUTPUT] == OUTPUT[name]
    assert roles[LayerRole.BLOCK].isdisjoint(roles[LayerRole.EMBEDDER])


@pytest.mark.parametrize("name", list_published())
def test_layer_roles_blocks_hold_most_parameters(name: str) -> None:
    component = published_config(name).denoisers[0]
    (model,) = meta_components(name, [component]).values()
    modules = dict(model.named_modules())
    total = sum(parameter.numel() for parameter in model.parameters())
    outside = sum(
        modules[layer].weight.numel()
        for layer, role in layer_roles(model).items()
        if role in (LayerRole.EMBEDDER, LayerRole.OUTPUT)
    )
    assert outside / total < 0.015


@pytest.mark.parametrize("name", sorted(unknown_classes.unknown_classes()))
def test_layer_roles_unknown_class_finds_blocks(name: str) -> None:
    roles = layer_roles(unknown_classes.build(name))
    counts = {role: sum(1 for other in roles.values() if other is role) for role in LayerRole}
    assert counts[LayerRole.BLOCK] > len(roles) / 2
    assert 0 < counts[LayerRole.EMBEDDER] + counts[LayerRole.OUTPUT] < len(roles) / 2


def test_layer_roles_model_without_lists_keeps_first_and_last() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    assert list(layer_roles(model).values()) == [LayerRole.EMBEDDER, LayerRole.BLOCK, LayerRole.OUTPUT]
