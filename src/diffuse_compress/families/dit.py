"""DiT: class-conditional, AdaLN-Zero with an embedder of its own in every block (arXiv 2212.09748)."""

from __future__ import annotations

from diffuse_compress.families.base import Family, TemporalMap, in_lists
from diffuse_compress.families.basic_block import BASIC_TRANSFORMER_BLOCK

__all__ = ["DIT"]

DIT = Family(
    name="dit",
    classes=("DiTTransformer2DModel",),
    blocks=in_lists("transformer_blocks"),
    kinds={"BasicTransformerBlock": BASIC_TRANSFORMER_BLOCK},
    temporal=lambda model: TemporalMap(
        timestep=("transformer_blocks.*.norm1.emb.timestep_embedder.*",),
        timestep_and_condition=("transformer_blocks.*.norm1.linear", "proj_out_1"),
        condition=("transformer_blocks.*.norm1.emb.class_embedder.*",),
    ),
    chained=frozenset({"50b144f47fba94c0"}),
    sensitive=("pos_embed", "proj_out_2"),
)
