"""PixArt-alpha and -sigma: one AdaLN table for all blocks, cross-attention to text (arXiv 2310.00426)."""

from __future__ import annotations

from torch import nn

from diffuse_compress.families.base import Family, TemporalMap, in_lists
from diffuse_compress.families.basic_block import BASIC_TRANSFORMER_BLOCK

__all__ = ["PIXART"]


def _temporal(model: nn.Module) -> TemporalMap:
    embedder = "adaln_single.emb.timestep_embedder.*"
    condition = ("caption_projection.*", "transformer_blocks.*.attn2.to_k", "transformer_blocks.*.attn2.to_v")
    # With resolution and aspect ratio added, the table depends on them too.
    if getattr(model, "use_additional_conditions", False):
        sizes = ("adaln_single.emb.resolution_embedder.*", "adaln_single.emb.aspect_ratio_embedder.*")
        return TemporalMap((embedder,), ("adaln_single.linear",), condition + sizes)
    return TemporalMap((embedder, "adaln_single.linear"), (), condition)


PIXART = Family(
    name="pixart",
    classes=("PixArtTransformer2DModel",),
    blocks=in_lists("transformer_blocks"),
    kinds={"BasicTransformerBlock": BASIC_TRANSFORMER_BLOCK},
    temporal=_temporal,
    chained=frozenset({"31486fce9b9bd018"}),
    sensitive=("pos_embed", "proj_out", "caption_projection"),
)
