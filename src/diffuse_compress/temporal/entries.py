"""Rows of a table in memory: floats, or codes with one scale and one zero point for each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffuse_compress.quantization.numerics import quantize_weight
from diffuse_compress.quantization.packing import unpack
from diffuse_compress.quantization.scheme import NumberFormat, PerChannel, WeightScheme
from diffuse_compress.temporal.config import TableFormat

__all__ = ["Entries"]

_SCHEMES = {
    TableFormat.INT8: WeightScheme(NumberFormat.INT8, PerChannel(), symmetric=False),
    TableFormat.INT4: WeightScheme(NumberFormat.INT4, PerChannel(), symmetric=False),
}


@dataclass
class Entries:
    """A matrix [rows, columns] of which single rows are asked for.

    Attributes:
        values: [rows, columns] floats, or int8 codes (int4: packed, ``quantization/packing.py``).
        scale: fp32 [rows, 1] of codes, else None: ``row = scale * (codes - zero_point)``.
        zero_point: int8 [rows, 1] of codes, else None.
        columns: in a row.
        dtype: of what is given out.
        bits: of a code; 0 for floats.
    """

    values: torch.Tensor
    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    columns: int
    dtype: torch.dtype
    bits: int = 0

    @classmethod
    def of(cls, rows: torch.Tensor, form: TableFormat) -> Entries:
        """``rows`` [rows, columns] in this format, rounded to nearest.

        Raises:
            ModelStateError: to codes, and values are not finite.
        """
        scheme = _SCHEMES.get(form)
        if scheme is None:
            values = rows.to(form.dtype or rows.dtype).contiguous()
            return cls(values, None, None, rows.shape[1], rows.dtype)
        codes = quantize_weight(rows, scheme)
        return cls(codes.qweight, codes.scale, codes.zero_point, rows.shape[1], rows.dtype, scheme.format.bits)

    @property
    def nbytes(self) -> int:
        """Of everything that is stored."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def device(self) -> torch.device:
        """Where it stands."""
        return self.values.device

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by attribute."""
        named = {"values": self.values, "scale": self.scale, "zero_point": self.zero_point}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def select(self, index: torch.Tensor) -> torch.Tensor:
        """Rows [n, columns] at ``index``, int64 [n] on the same device; nothing is read by the host."""
        values = self.values.index_select(0, index)
        if self.scale is None or self.zero_point is None:
            return values.to(self.dtype)
        codes = unpack(values, self.bits, self.columns) if self.bits < 8 else values
        steps = codes.float() - self.zero_point.index_select(0, index).float()
        return (steps * self.scale.index_select(0, index)).to(self.dtype)

    def to(self, device: torch.device) -> Entries:
        """Itself, or a copy on ``device``."""
        if self.device == device:
            return self
        scale, zero_point = (None if t is None else t.to(device) for t in (self.scale, self.zero_point))
        return Entries(self.values.to(device), scale, zero_point, self.columns, self.dtype, self.bits)

    def equals(self, other: Entries) -> bool:
        """Does it hold the same, bit for bit? Waits for the device."""
        mine, others = self.tensors(), other.tensors()
        return mine.keys() == others.keys() and all(torch.equal(t, o) for t, o in _pairs(mine, others))

    def refill(self, other: Entries) -> bool:
        """Take over what ``other`` holds, at the same addresses, if both are of one shape: CUDA graphs know them."""
        mine, others = self.tensors(), other.tensors()
        if mine.keys() != others.keys() or (self.columns, self.dtype, self.bits) != (
            other.columns,
            other.dtype,
            other.bits,
        ):
            return False
        alike = all((t.shape, t.dtype, t.device) == (o.shape, o.dtype, o.device) for t, o in _pairs(mine, others))
        if alike:
            for tensor, source in _pairs(mine, others):
                tensor.copy_(source)
        return alike


def _pairs(mine: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(mine[name], others[name]) for name in mine]
