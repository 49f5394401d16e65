"""The part a layer plays in a model: inside a block, a modulation projection, an embedder, first or last.

Found from the module tree, so it answers for any model class: what repeats sits in a ``ModuleList``; what stands
outside every such list carries the model's inputs and outputs. Modulation projections (the linears that turn the
timestep embedding into AdaLN shifts and scales, or a UNet's ``time_emb_proj``) are told by the names that the
diffusers classes share. They see one row per sample. In a model that puts pictures or sounds among its text tokens,
what is not the language model plays a part of its own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

from torch import nn

__all__ = ["LayerRole", "block_elements", "block_lists", "has_matrix", "layer_roles"]


class LayerRole(str, Enum):
    """What a weight-carrying layer is for."""

    BLOCK = "block"
    MODULATION = "modulation"
    EMBEDDER = "embedder"
    OUTPUT = "output"
    OTHER_MODALITY = "other modality"


# One row per sample: AdaLN/AdaNorm linears (norm1.linear, adaln_single.linear, adaLN_modulation.1), resnet time
# projections, Wan's time_proj, Sana's and LTX's time_embed.linear, QwenImage's img_mod.1, DiT's proj_out_1, Stable
# Cascade's mapper, Kandinsky 3's context_mlp.
_MODULATION = re.compile(
    r"(?:^|\.)(?:"
    r"norm\w*\.linear(?:_1)?"
    r"|ada[lL][nN]\w*(?:\.\d+|\.linear|\.lin)?"
    r"|\w*_mod(?:\.\d+)?"
    r"|\w*modulation\w*(?:\.\d+|\.linear|\.lin)?"
    r"|time_emb_proj|time_proj|time_embed\.linear|context_mlp\.\d+|mapper\w*|proj_out_1"
    r")$"
)
_TIMESTEP_EMBEDDER = re.compile(r"(?:^|\.)(?:timestep_embedder|time_embed\w*|t_embedder)(?:\.|$)")
# The second layer of a text projection sees hidden features of every token, not raw inputs: a block's layer in all but
# place, and 2 to 3 % of a small model's products. (Pooled text embedders, one row per sample, are not meant.)
_TOKEN_PROJECTION = re.compile(r"(?:^|\.)(?:caption_projection|condition_embedder\.text_embedder)\.linear_2$")
# Outside blocks, these prepare inputs; a ModuleList of such a name is not a list of blocks.
_EMBEDDER = re.compile(
    r"(?:^|\.)(?:\w*embed(?:der|ding|dings|s)?\w*|caption_projection|patch_embed\w*|pos_embed\w*|conv_in"
    r"|emb|image_projection|encoder_hid_proj|add_embedding|time_embedding)(?:\.|$)"
)
_OUTPUT = re.compile(
    r"(?:^|\.)(?:proj_out\w*|conv_out|\w*final_layer\w*|norm_out|lm_head|output_projection|score|classifier)(?:\.|$)"
)
# A ModuleList of output layers, one per patch size (Z-Image).
_OUTPUT_LIST = re.compile(r"(?:^|\.)\w*final_layer\w*\.")
# What transformers' configs call the token that stands for a picture. Contrastive models (CLIP) and detectors have a
# text_config as well, but no such token: there both encoders are the model.
_MEDIA_TOKEN = re.compile(r"(?:image|img|vision|video|audio|speech|media)\w*_token_(?:id|index)\Z")
# Language models that take pictures otherwise (Idefics, GIT, Kosmos-2, Phi-4 multimodal) or make sounds (Moshi,
# MusicGen): the configs that they have of their other parts, and the names of these.
_MEDIA_CONFIG = re.compile(r"(?:vision|visual|image|video|audio|speech|codec|protein)\w*_config\Z|audio_encoder\Z")
_MEDIA_PART = re.compile(
    r"(?:\w+_)?(?:vision|visual|image|img|video|audio|speech|codec|protein|perceiver|multi_?modal|mm|token2wav|code2wav)"
    r"(?:_\w+)?\Z"
)


def layer_roles(model: nn.Module) -> dict[str, LayerRole]:
    """Role of every linear and convolution of ``model`` by qualified name, in registration order.

    A layer inside an element of a ``ModuleList`` (or of a ``Sequential`` whose elements repeat one class) is
    BLOCK, unless its name marks it as MODULATION. Outside, layers that run before the first list in registration
    order are EMBEDDER and those after it OUTPUT, unless their name says otherwise. A model without any list is all
    BLOCK except its first and last layer. In a vision-language or audio-language model all of this holds for the
    language model; towers, projectors and codecs are OTHER_MODALITY.
    """
    layers = [name for name, module in model.named_modules() if has_matrix(module)]
    lists = block_lists(model)
    roles: dict[str, LayerRole] = {}
    seen_block = False
    for name in layers:
        inside = any(name.startswith(prefix) for prefix in lists)
        seen_block = seen_block or inside
        roles[name] = _role(name, inside=inside, after_blocks=seen_block)
    if not lists and layers:
        for name in layers[1:-1]:
            roles[name] = LayerRole.MODULATION if _MODULATION.search(name) else LayerRole.BLOCK
        roles[layers[0]], roles[layers[-1]] = LayerRole.EMBEDDER, LayerRole.OUTPUT
    language = _language_parts(model)
    by_name = not language and _has_media_parts(model)
    for name in layers:
        if language:
            other = not name.startswith(language) and not _OUTPUT.search(name.rpartition(".")[2])
        else:
            # Not inside a block: what reads pictures there (Evolla's ``key_protein``) is the language model's.
            outside = itertools.takewhile(lambda part: not part.isdigit(), name.split("."))
            other = by_name and any(_MEDIA_PART.match(part) for part in outside)
        if other:
            roles[name] = LayerRole.OTHER_MODALITY
    return roles


def _language_parts(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the language model inside one of several modalities; () for any other model.

    transformers builds it from ``config.text_config``, and it keeps that object as its own config.
    """
    config: Any = getattr(model, "config", None)
    text = getattr(config, "text_config", None)
    if text is None or not any(_MEDIA_TOKEN.match(key) for key in vars(config)):
        return ()
    return tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "config", None) is text)


def _has_media_parts(model: nn.Module) -> bool:
    """Whether this is a language model with parts for pictures or sounds: it generates, or such a one is inside it.

    What encodes pictures or sounds and does nothing else (a CLIP, a SAM, an encoder-decoder for speech) is not.
    """
    configs = list(_configs(getattr(model, "config", None)))
    if not any(_MEDIA_CONFIG.match(key) for config in configs for key in vars(config)):
        return False
    # Adapters are seen past, so this may be a view of the model, whose first module is the model itself.
    itself: Any = next(module for _, module in model.named_modules())
    generates = hasattr(itself, "can_generate") and itself.can_generate()
    return generates or any(_MEDIA_TOKEN.match(key) for config in configs for key in vars(config))


def _configs(config: Any) -> Iterator[Any]:
    """A transformers config and those inside it."""
    if hasattr(config, "model_type"):
        yield config
        for value in vars(config).values():
            yield from _configs(value)


def _role(name: str, *, inside: bool, after_blocks: bool) -> LayerRole:
    # adaln_single.emb.timestep_embedder.linear_1 is an embedder; adaln_single.linear a modulation projection. DiT
    # repeats the timestep embedder in every block: one row per sample there too.
    if _MODULATION.search(name) or (inside and _TIMESTEP_EMBEDDER.search(name)):
        return LayerRole.MODULATION
    if _TOKEN_PROJECTION.search(name):
        return LayerRole.BLOCK
    if inside and not _OUTPUT_LIST.search(name):
        return LayerRole.BLOCK
    if _EMBEDDER.search(name):
        return LayerRole.EMBEDDER
    if _OUTPUT.search(name) or after_blocks:
        return LayerRole.OUTPUT
    return LayerRole.EMBEDDER


def has_matrix(module: nn.Module) -> bool:
    """A linear or a convolution."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def block_lists(model: nn.Module) -> list[str]:
    """Prefixes (``transformer_blocks.``) of the outermost lists that hold layers and are not embedders."""
    prefixes: list[str] = []
    for name, module in model.named_modules():
        repeated = isinstance(module, nn.ModuleList) or _repeats_one_class(module)
        nested = any(name.startswith(prefix) for prefix in prefixes)
        leaf = name.rpartition(".")[2]
        if name and repeated and not nested and not _EMBEDDER.search(leaf):
            if any(has_matrix(sub) for sub in module.modules()):
                prefixes.append(f"{name}.")
    return prefixes


def block_elements(model: nn.Module) -> list[str]:
    """Names of the elements of ``block_lists``, in registration order."""
    prefixes = block_lists(model)
    return [
        name
        for name, _ in model.named_modules()
        for prefix in prefixes
        if name.startswith(prefix) and name.removeprefix(prefix).isdigit()
    ]


def _repeats_one_class(module: nn.Module) -> bool:
    """A Sequential of two or more composite elements of one class, as in models that stack blocks so."""
    children = list(module.children())
    kinds = {type(child) for child in children}
    composite = all(any(True for _ in child.children()) for child in children)
    return isinstance(module, nn.Sequential) and len(children) > 1 and len(kinds) == 1 and composite
