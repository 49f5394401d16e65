"""PixArt-alpha and -sigma: one AdaLN table for all blocks, cross-attention to text (arXiv 2310.00426)."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffuse_compress.families.base import Family, TemporalMap, in_lists
from diffuse_compress.families.basic_block import BASIC_TRANSFORMER_BLOCK, PROCESSORS
from diffuse_compress.families.embedding import Reader, attended

__all__ = ["PIXART"]


def _temporal(model: nn.Module) -> TemporalMap:
    embedder = "adaln_single.emb.timestep_embedder.*"
    text = ("transformer_blocks.*.attn2.to_k", "transformer_blocks.*.attn2.to_v")
    condition: tuple[str, ...] = ("caption_projection.*", *text)
    known: dict[str, Any] = {
        "readers": (Reader(text, ("encoder_hidden_states",), attended, PROCESSORS),),
        "conditions": ("encoder_hidden_states", "added_cond_kwargs"),
    }
    # With resolution and aspect ratio added, the table depends on them too.
    if getattr(model, "use_additional_conditions", False):
        sizes = ("adaln_single.emb.resolution_embedder.*", "adaln_single.emb.aspect_ratio_embedder.*")
        return TemporalMap((embedder,), ("adaln_single.linear",), condition + sizes, **known)
    return TemporalMap((embedder, "adaln_single.linear"), (), condition, **known)


PIXART = Family(
    name="pixart",
    classes=("PixArtTransformer2DModel",),
    blocks=in_lists("transformer_blocks"),
    kinds={"BasicTransformerBlock": BASIC_TRANSFORMER_BLOCK},
    temporal=_temporal,
    chained=frozenset({"31486fce9b9bd018"}),
    sensitive=("pos_embed", "proj_out", "caption_projection"),
)
