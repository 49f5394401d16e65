"""The one container of a quantized weight, as it stands in memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffuse_compress.quantization.scheme import WeightScheme

__all__ = ["QuantizedWeight", "SparseOutliers"]

MAX_SPARSE_COLUMNS = 1 << 16


@dataclass
class SparseOutliers:
    """Single weights [N, K] that are added to what the codes stand for, row by row (compressed sparse rows).

    Attributes:
        rows: int32 [N + 1]; entries ``rows[n]`` to ``rows[n + 1]`` are row n's.
        columns: int16 [E], the low 16 bits of the column (K is at most 65536), ascending in a row.
        values: [E], the layer's dtype.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    @classmethod
    def at(cls, mask: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> SparseOutliers | None:
        """Those of ``values`` [N, K] where the bool ``mask`` [N, K] is true, in ``dtype``; None if it nowhere is."""
        row, column = mask.nonzero(as_tuple=True)
        if not row.numel():
            return None
        ends = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(dim=1).cumsum(0)])
        return cls(ends.to(torch.int32), column.to(torch.int16), values[row, column].to(dtype))

    def add_to(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """Add the entries of rows ``first`` on to ``weight``, fp32 [n, K] of these rows, in place.

        Which entries these are is not looked up: that would wait for the device. All are gone over, and those of other
        rows add 0.
        """
        entries = torch.arange(self.columns.shape[0], device=self.columns.device, dtype=torch.int32)
        row = torch.searchsorted(self.rows, entries, right=True) - 1 - first
        here = (row >= 0) & (row < weight.shape[0])
        place = row * weight.shape[1] + (self.columns.long() & (MAX_SPARSE_COLUMNS - 1))
        values = torch.where(here, self.values.detach().float(), 0.0)
        weight.view(-1).index_add_(0, torch.where(here, place, 0), values)
        return weight

    def to(self, device: torch.device) -> SparseOutliers:
        """The same on ``device``."""
        return SparseOutliers(self.rows.to(device), self.columns.to(device), self.values.to(device))


@dataclass
class QuantizedWeight:
    """A weight [N, K] as codes and quantization parameters; convolutions are flattened to K = C*kh*kw.

    Attributes:
        qweight: int8 [N, K] (int8), float8_e4m3fn [N, K] (fp8), or int8 bytes [N, ceil(K/128) * 16 * bits]
            (int4, int3, int2; layouts in ``packing.py``).
        scale: fp32: [1, 1] per tensor, [N, 1] per channel and two-level, [N, G] per group, [K, G] where the G groups
            are of rows (``PerInputGroup``), [ceil(N / 128), ceil(K / 128)] per block. > 0 where we chose it; one that
            was imported may be negative or 0 (GGUF's Q4_0).
        zero_point: None if symmetric, else int8 (fp32 with ``float_zero_point``) of ``scale``'s shape, in the
            domain of the signed codes: ``w = scale * (q - zero_point)``; with ``additive_zero_point`` fp32 in the
            domain of the weight: ``w = scale * q + zero_point``. None in bilevel formats, whose zero points are in
            ``group_scale``.
        group_scale: int8 [N, G]: 1..16 for two-level scales; for bilevel ones a byte with the zero point in its high
            half and the code of the scale in its low one, beside ``scale`` [N, 2 * ceil(G / 16)], bases and then steps.
            Else None.
        in_features: K before padding.
        scheme: how all of this is to be read.
        outliers: single weights that are added, of bilevel formats only.
    """

    qweight: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    group_scale: torch.Tensor | None
    in_features: int
    scheme: WeightScheme
    outliers: SparseOutliers | None = None
