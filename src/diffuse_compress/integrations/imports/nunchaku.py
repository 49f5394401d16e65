"""Checkpoints of diffusers' ``nunchaku_lite`` method, which diffusers itself loads on some NVIDIA GPUs only.

They are read from the files. Tensors stand in the order in which the warps of nunchaku's kernels fetch them (layouts:
nunchaku's packer and kernels, Apache-2.0, repository nunchaku-ai/nunchaku, release 1.2). With N outputs and K inputs:

SVDQ int4 (``svdq_w4a4``): ``y = Q(x / smooth) @ W.T + bias + (x @ down.T) @ up.T``, W signed int4 with a scale per 64
columns. An int32 of ``qweight`` holds eight columns of one row; the words of a tile of 128 rows and 64 columns are
ordered ``[n / 16 % 8][n % 8][k / 8 % 4][n / 8 % 2][k / 32 % 2]``. Vectors over channels (scales of one group, bias,
smooth) are in ``[c / 128][c / 16 % 8][c / 2 % 4][c / 8 % 2][c % 2]``, and the low-rank matrices in tiles of 16 x 16
ordered ``[n % 8][k / 2 % 4][n / 8 % 2][k / 8 % 2][k % 2]``. Q rounds the input to int4; we have no such scale per 64
columns of the input, so the layer comes over as weight-only, which is more exact than its source.

AWQ (``awq_w4a16``): ``w = q * wscales + wzeros`` with q in 0..15 and both per 64 columns, in plain [K / 64, N]. Four
rows stand together, 64 columns of each in turn; of 32 columns nibble ``a + 4 * c`` of word ``b`` is column
``8 * a + 2 * b + c``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffuse_compress.integrations.imports.base import ForeignLayer, NotImportableError
from diffuse_compress.quantization.numerics import dequantize
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.packing import pack
from diffuse_compress.quantization.scheme import NumberFormat, PerGroup, ScaleRule, Scheme, WeightScheme

__all__ = ["METHOD", "TENSORS", "Section", "read", "sections"]

METHOD = "nunchaku_lite"
TENSORS = {
    "svdq_w4a4": ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up"),
    "awq_w4a16": ("qweight", "wscales", "wzeros"),
}
"""Tensors of a layer beside its bias, by method."""
_GROUP = 64
_SVDQ = WeightScheme(NumberFormat.INT4, PerGroup(_GROUP), scale_rule=ScaleRule.AMAX_OVER_HALF_RANGE)
_AWQ = WeightScheme(NumberFormat.INT4, PerGroup(_GROUP), symmetric=False, additive_zero_point=True)


@dataclass(frozen=True)
class Section:
    """One method of a checkpoint and its layers."""

    method: str
    precision: str
    group_size: int
    targets: tuple[str, ...]


def sections(config: Mapping[str, Any]) -> list[Section]:
    """The methods that a ``quantization_config`` of config.json names."""
    return [
        Section(method, str(raw.get("precision")), int(raw.get("group_size", 0)), tuple(raw.get("targets", ())))
        for method in TENSORS
        if (raw := config.get(method)) is not None
    ]


def read(section: Section, tensors: Mapping[str, torch.Tensor], sizes: tuple[int, int]) -> ForeignLayer:
    """One layer of a checkpoint.

    Args:
        section: where it is listed.
        tensors: of the layer, without its name.
        sizes: (out_features, in_features) of the model's layer.

    Raises:
        NotImportableError: NVFP4, or tensors of other shapes than the layouts have.
    """
    if section.precision != "int4" or section.group_size != _GROUP:
        raise NotImportableError(
            f"nunchaku {section.method} in {section.precision}, groups of {section.group_size} (only int4 in groups of "
            f"{_GROUP} can be): take the int4 checkpoint, or compress the original model"
        )
    lost = [name for name in TENSORS[section.method] if name not in tensors]
    if lost:
        raise NotImportableError(f"the checkpoint lacks its {', '.join(lost)}: download it again")
    reader = _read_svdq if section.method == "svdq_w4a4" else _read_awq
    return reader(tensors, *sizes)


# --- SVDQ -------------------------------------------------------------------------------------------------------


def _read_svdq(tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> ForeignLayer:
    _require_multiples("svdq_w4a4", rows, 128, columns, 128)
    rank = tensors["proj_down"].shape[1]
    shapes = {
        "qweight": (rows, columns // 2),
        "wscales": (columns // _GROUP, rows),
        "smooth_factor": (columns,),
        "proj_down": (columns, rank),
        "proj_up": (rows, rank),
        "bias": (rows,),
    }
    _require_shapes(tensors, shapes)
    if rank % 16:
        raise NotImportableError(f"a low-rank branch of rank {rank}, no multiple of 16: the checkpoint is damaged")
    scale = _channels(tensors["wscales"], columns // _GROUP).T.float().contiguous()
    weight = QuantizedWeight(pack(_svdq_codes(tensors["qweight"]), 4), scale, None, None, columns, _SVDQ)
    smooth = _channels(tensors["smooth_factor"], 1)[0].float()
    # Where nothing was smoothed the branch of ones is left out.
    extra: dict[str, Any] = {} if bool((smooth == 1).all()) else {"act_pre_scale": smooth.reciprocal()}
    if rank:
        extra["low_rank"] = (_low_rank(tensors["proj_down"], True), _low_rank(tensors["proj_up"], False))
    bias = tensors.get("bias")
    return ForeignLayer(
        weight,
        Scheme(_SVDQ),
        tensors["wscales"].dtype,
        "nunchaku SVDQ int4, inputs left in 16 bits",
        extra,
        None if bias is None else _channels(bias, 1)[0].contiguous(),
    )


def _svdq_codes(packed: torch.Tensor) -> torch.Tensor:
    """int8 codes [N, K] of ``qweight`` [N, K / 2]."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    words = packed.contiguous().view(torch.int32).reshape(rows // 128, columns // 64, 8, 8, 4, 2, 2)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    nibbles = (words.unsqueeze(-1) >> shifts) & 0xF
    # [n tile, k tile, n / 16, n % 8, k / 8 % 4, n / 8 % 2, k / 32 % 2, k % 8] to rows and columns
    codes = nibbles.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(rows, columns)
    return (((codes + 8) & 0xF) - 8).to(torch.int8)


def _channels(packed: torch.Tensor, groups: int) -> torch.Tensor:
    """[groups, C] of a vector over channels for each group, in the order of the kernels."""
    tiles = packed.reshape(-1, groups, 8, 4, 2, 2)
    return tiles.permute(1, 0, 2, 4, 3, 5).reshape(groups, -1)


def _low_rank(packed: torch.Tensor, down: bool) -> torch.Tensor:
    """[r, K] of ``proj_down`` [K, r], or [N, r] of ``proj_up`` [N, r]."""
    channels, rank = packed.shape
    tiles = packed.reshape(channels // 16, rank // 16, 8, 4, 2, 2, 2)
    # [channel tile, rank tile, n % 8, k / 2 % 4, n / 8, k / 8, k % 2] to 16 x 16
    squares = tiles.permute(0, 1, 4, 2, 5, 3, 6).reshape(channels // 16, rank // 16, 16, 16)
    if down:
        return squares.permute(1, 2, 0, 3).reshape(rank, channels)
    return squares.permute(0, 2, 1, 3).reshape(channels, rank)


# --- AWQ --------------------------------------------------------------------------------------------------------


def _read_awq(tensors: Mapping[str, torch.Tensor], rows: int, columns: int) -> ForeignLayer:
    _require_multiples("awq_w4a16", rows, 4, columns, 64)
    groups = (columns // _GROUP, rows)
    _require_shapes(
        tensors, {"qweight": (rows // 4, columns // 2), "wscales": groups, "wzeros": groups, "bias": (rows,)}
    )
    codes = _awq_codes(tensors["qweight"])
    scale, zeros = (tensors[name].T.float().contiguous() for name in ("wscales", "wzeros"))
    weight = QuantizedWeight(pack(codes - 8, 4), scale, zeros + 8 * scale, None, columns, _AWQ)
    theirs = codes.float().view(rows, -1, _GROUP) * scale[..., None] + zeros[..., None]
    if not torch.equal(dequantize(weight), theirs.view(rows, columns)):
        raise NotImportableError("its scaled zeros are too large for its scales to be shifted exactly; keep it dense")
    bias = tensors.get("bias")
    return ForeignLayer(weight, Scheme(_AWQ), tensors["wscales"].dtype, "nunchaku AWQ int4", bias=bias)


def _awq_codes(packed: torch.Tensor) -> torch.Tensor:
    """int8 codes 0..15 [N, K] of ``qweight`` int32 [N / 4, K / 2]."""
    rows, columns = 4 * packed.shape[0], 2 * packed.shape[1]
    words = packed.reshape(rows // 4, columns // 64, 4, 2, 4)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    nibbles = ((words.unsqueeze(-1) >> shifts) & 0xF).unflatten(-1, (2, 4))
    # [row / 4, k / 64, row % 4, k / 32 % 2, b, c, a] to rows and columns
    return nibbles.permute(0, 2, 1, 3, 6, 4, 5).reshape(rows, columns).to(torch.int8)


# --- shapes -----------------------------------------------------------------------------------------------------


def _require_multiples(method: str, rows: int, row_step: int, columns: int, column_step: int) -> None:
    if rows % row_step or columns % column_step:
        raise NotImportableError(
            f"nunchaku {method} of {rows} outputs and {columns} inputs, no multiples of {row_step} and {column_step}, "
            "is padded in a way that is not read here: compress the original model"
        )


def _require_shapes(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise NotImportableError(
                f"{name} must have shape {list(shape)}, got {list(tensor.shape)}: the checkpoint is for another model"
            )
