"""Rows of a table in memory, side by side for all layers.

One gather for each call fetches the rows of every layer: a layer then gives out its part, and nothing that it does
depends on how many timesteps there are. Blocks that were compiled with one number of steps run with another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from diffuse_compress.quantization.numerics import quantize_weight
from diffuse_compress.quantization.packing import unpack
from diffuse_compress.quantization.scheme import NumberFormat, PerChannel, WeightScheme
from diffuse_compress.temporal.config import TableFormat

__all__ = ["StoredRows", "store"]

_SCHEMES = {
    TableFormat.INT8: WeightScheme(NumberFormat.INT8, PerChannel(), symmetric=False),
    TableFormat.INT4: WeightScheme(NumberFormat.INT4, PerChannel(), symmetric=False),
}


@dataclass
class StoredRows:
    """Tables of layers that give one dtype, as columns of one matrix.

    Attributes:
        columns: (first, end) of each layer's in a row of floats; layers with equal tables share them.
        values: [rows, width] floats, or int8 codes (int4: packed, ``quantization/packing.py``).
        scale: fp32 [rows, tables] of codes, else None: ``row = scale * (codes - zero_point)``.
        zero_point: int8 [rows, tables] of codes, else None.
        widths: int64 [tables] of codes, how many columns have a scale; None for floats.
        width: columns of a row of floats.
        dtype: of what the layers give.
        bits: of a code; 0 for floats.
        place: int32 [rows of the schedule], which row of ``values`` is meant, -1 where there is none; None where there
            is one for each. What is given out of a row that is not there is NaN.
    """

    columns: dict[str, tuple[int, int]]
    values: torch.Tensor
    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    widths: torch.Tensor | None
    width: int
    dtype: torch.dtype
    bits: int
    place: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Of the schedule."""
        return (self.values if self.place is None else self.place).shape[0]

    @property
    def nbytes(self) -> int:
        """Of everything that is stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by attribute."""
        named = {name: getattr(self, name) for name in ("values", "scale", "zero_point", "widths", "place")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def fetch(self, index: torch.Tensor) -> torch.Tensor:
        """Rows [n, width] at ``index``, int64 [n] on the same device, in a new tensor; the host reads nothing."""
        values = self.values.index_select(0, index)
        if self.scale is None or self.zero_point is None or self.widths is None:
            return values.to(self.dtype)
        codes = unpack(values, self.bits, self.width) if self.bits < 8 else values
        zero_point, scale = (
            t.index_select(0, index).repeat_interleave(self.widths, dim=1, output_size=self.width)
            for t in (self.zero_point, self.scale)
        )
        return codes.float().sub_(zero_point).mul_(scale).to(self.dtype)

    def lay_out(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every layer's rows [n, out] at ``index``, contiguous, as the layer itself would have made them."""
        there = None if self.place is None else self.place.index_select(0, index)
        row = self.fetch(index if there is None else there.clamp(min=0))
        if there is not None:
            row = row.masked_fill((there < 0)[:, None], torch.nan)
        places = list(dict.fromkeys(self.columns.values()))
        parts = [row[:, first:end] for first, end in places]
        if row.shape[0] > 1:
            sizes = [part.numel() for part in parts]
            own = row.new_empty(sum(sizes)).split(sizes)
            mine = [flat.view(part.shape) for flat, part in zip(own, parts, strict=True)]
            torch._foreach_copy_(mine, parts)
            parts = mine
        given = dict(zip(places, parts, strict=True))
        return {name: given[place] for name, place in self.columns.items()}

    def rows(self) -> dict[str, torch.Tensor]:
        """Every layer's table [rows, out], as it is given out."""
        return self.lay_out(torch.arange(self.num_rows, device=self.values.device))

    @property
    def exact(self) -> bool:
        """Are the rows as they were computed?"""
        return self.values.dtype == self.dtype

    def move(self, device: torch.device) -> None:
        """Stand on ``device`` from now on."""
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.to(device))


def store(
    layers: Mapping[str, torch.Tensor], form: TableFormat, kept: Mapping[str, Sequence[bool]] | None = None
) -> list[StoredRows]:
    """Tables [rows, out] of several layers in this format, those of one dtype together; equal ones are kept once.

    Args:
        layers: tables by name.
        form: of the rows.
        kept: of layers of which not all rows are kept: is this one? Those with the same rows go together.

    Raises:
        ModelStateError: to codes, and values are not finite.
    """
    alike: dict[tuple[torch.dtype, tuple[bool, ...] | None], dict[str, torch.Tensor]] = {}
    for name, rows in layers.items():
        some = tuple((kept or {}).get(name, ()))
        alike.setdefault((rows.dtype, None if all(some) else some), {})[name] = rows
    found = []
    for (dtype, some), tables in alike.items():
        if some is None:
            found.append(_together(tables, form, dtype))
            continue
        there = torch.tensor(some, device=next(iter(tables.values())).device)
        part = _together({name: rows[there] for name, rows in tables.items()}, form, dtype)
        part.place = torch.where(there, there.cumsum(0) - 1, -1).int()
        found.append(part)
    return found


def _together(layers: Mapping[str, torch.Tensor], form: TableFormat, dtype: torch.dtype) -> StoredRows:
    distinct: list[torch.Tensor] = []
    number: dict[str, int] = {}
    for name, rows in layers.items():
        # DiT has a copy of one embedder in every block.
        same = (i for i, other in enumerate(distinct) if other.shape == rows.shape and torch.equal(other, rows))
        number[name] = next(same, len(distinct))
        if number[name] == len(distinct):
            distinct.append(rows)
    scheme = _SCHEMES.get(form)
    if scheme is None:
        widths = [rows.shape[1] for rows in distinct]
        values = torch.cat(distinct, dim=1).to(form.dtype or dtype)
        return StoredRows(_places(number, widths, widths), values, None, None, None, sum(widths), dtype, 0)
    codes = [quantize_weight(rows, scheme) for rows in distinct]
    bits = scheme.format.bits
    # Packed rows end in codes that nobody asks for.
    stored = [code.qweight.shape[1] * 8 // bits for code in codes]
    return StoredRows(
        columns=_places(number, [rows.shape[1] for rows in distinct], stored),
        values=torch.cat([code.qweight for code in codes], dim=1),
        scale=torch.cat([code.scale for code in codes], dim=1),
        zero_point=torch.cat([code.zero_point for code in codes if code.zero_point is not None], dim=1),
        widths=torch.tensor(stored, device=distinct[0].device),
        width=sum(stored),
        dtype=dtype,
        bits=bits,
    )


def _places(number: Mapping[str, int], widths: list[int], stored: list[int]) -> dict[str, tuple[int, int]]:
    starts = [sum(stored[:i]) for i in range(len(stored))]
    return {name: (starts[i], starts[i] + widths[i]) for name, i in number.items()}
