"""Roles found from the module tree, against the facts of published models and of classes nobody described."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
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


_TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
_VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
_IDEFICS_VISION = {**_VISION, "embed_dim": 32}
_KOSMOS_TEXT = dict(vocab_size=64, embed_dim=32, layers=2, ffn_dim=64, attention_heads=2, max_position_embeddings=32)
_PHI_AUDIO = dict(hidden_size=32, intermediate_size=64, num_blocks=2, num_attention_heads=2)
# None of them says in its config which token stands for a picture; Idefics and GIT have no text_config either.
TOWERS = {
    "idefics": (
        lambda: transformers.IdeficsForVisionText2Text(
            transformers.IdeficsConfig(
                **_TEXT, vision_config=_IDEFICS_VISION, use_resampler=True, cross_layer_interval=1
            )
        ),
        ("model.layers.", "model.gated_cross_attn_layers."),
        ("model.vision_model.", "model.perceiver_resampler."),
    ),
    "git": (
        lambda: transformers.GitForCausalLM(transformers.GitConfig(**_TEXT, vision_config=_VISION)),
        ("git.encoder.layer.",),
        ("git.image_encoder.", "git.visual_projection."),
    ),
    "kosmos2": (
        lambda: transformers.Kosmos2ForConditionalGeneration(
            transformers.Kosmos2Config(text_config=_KOSMOS_TEXT, vision_config=_VISION)
        ),
        ("text_model.model.layers.",),
        ("vision_model.", "image_to_text_projection."),
    ),
    "phi4_multimodal": (
        lambda: transformers.Phi4MultimodalForCausalLM(
            transformers.Phi4MultimodalConfig(**_TEXT, vision_config=_VISION, audio_config=_PHI_AUDIO, pad_token_id=0)
        ),
        ("model.layers.",),
        ("model.embed_tokens_extend.image_embed.", "model.embed_tokens_extend.audio_embed."),
    ),
}


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_models_without_a_token_for_pictures_are_another_modality(name: str) -> None:
    make, blocks, others = TOWERS[name]
    with torch.device("meta"):
        roles = layer_roles(make())
    assert {layer for layer, role in roles.items() if role is LayerRole.BLOCK} == {
        layer for layer in roles if layer.startswith(blocks)
    }
    assert {layer for layer, role in roles.items() if role is LayerRole.OTHER_MODALITY} == {
        layer for layer in roles if layer.startswith(others)
    }
    assert all(any(layer.startswith(prefix) for layer in roles) for prefix in (*blocks, *others))


def test_encoders_of_pictures_and_speech_that_are_the_model_are_no_other_modality() -> None:
    text = {**_TEXT, "max_position_embeddings": 16}
    speech = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
    speech |= dict(encoder_attention_heads=2, decoder_attention_heads=2)
    with torch.device("meta"):
        models = [
            transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=_VISION)),
            transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**speech)),
            transformers.SamModel(transformers.SamConfig(vision_config=dict(num_hidden_layers=1))),
        ]
    for model in models:
        assert LayerRole.OTHER_MODALITY not in layer_roles(model).values(), type(model).__name__
