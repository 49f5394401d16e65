"""DiT: class-conditional, AdaLN-Zero with an embedder of its own in every block (arXiv 2212.09748)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffuse_compress.families.base import Family, TemporalMap, in_lists
from diffuse_compress.families.basic_block import BASIC_TRANSFORMER_BLOCK
from diffuse_compress.families.embedding import Entry, Reader

__all__ = ["DIT"]

_SOURCES = ("timestep", "class_labels")


def _embedding(entry: Entry, norm: str) -> torch.Tensor:
    """What a block's own embedder makes of timestep and label; the first block's is asked for the output too."""
    embedder = entry.model.get_submodule(f"{norm}.emb")
    return entry.once(norm, lambda: embedder(*(entry[source] for source in _SOURCES), hidden_dtype=entry.dtype))


def _modulation(entry: Entry, layer: str) -> torch.Tensor:
    embedded: torch.Tensor = entry.parent(layer).silu(_embedding(entry, layer.rpartition(".")[0]))
    return embedded


def _output(entry: Entry, layer: str) -> torch.Tensor:
    return F.silu(_embedding(entry, "transformer_blocks.0.norm1"))


DIT = Family(
    name="dit",
    classes=("DiTTransformer2DModel",),
    blocks=in_lists("transformer_blocks"),
    kinds={"BasicTransformerBlock": BASIC_TRANSFORMER_BLOCK},
    temporal=lambda model: TemporalMap(
        timestep=("transformer_blocks.*.norm1.emb.timestep_embedder.*",),
        timestep_and_condition=("transformer_blocks.*.norm1.linear", "proj_out_1"),
        condition=("transformer_blocks.*.norm1.emb.class_embedder.*",),
        readers=(
            Reader(
                ("transformer_blocks.*.norm1.linear",),
                _SOURCES,
                _modulation,
                through=("transformer_blocks.*.norm1.emb.timestep_embedder",),
            ),
            Reader(("proj_out_1",), _SOURCES, _output),
        ),
        conditions=("class_labels",),
    ),
    chained=frozenset({"50b144f47fba94c0"}),
    sensitive=("pos_embed", "proj_out_2"),
)
