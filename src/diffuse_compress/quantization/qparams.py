"""Scales and zero points of a tensor, and those of each row or group where the format shares or encodes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffuse_compress.quantization.bilevel import read_bilevel
from diffuse_compress.quantization.blocks import scale_rows
from diffuse_compress.quantization.scheme import Bilevel, PerBlock, PerInputGroup, PerTensor, WeightScheme

__all__ = ["QParams", "effective_scale", "expanded", "rows_of"]


@dataclass(frozen=True)
class QParams:
    """Quantization parameters of one tensor, as a :class:`QuantizedWeight` stores them.

    Attributes:
        scale: fp32, at least ``MIN_SCALE``.
        zero_point: None if symmetric, else int8 (fp32 with ``float_zero_point`` or ``additive_zero_point``) of
            ``scale``'s shape.
        group_scale: int8 [N, G]: in 1..16 for two-level scales, a byte of scale and zero point for bilevel ones.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    group_scale: torch.Tensor | None = None


def effective_scale(qparams: QParams) -> torch.Tensor:
    """fp32 size of one code step, per element of the granularity: ``scale``, times ``group_scale`` if two-level.

    Bilevel qparams are :func:`expanded` first.
    """
    return qparams.scale if qparams.group_scale is None else qparams.scale * qparams.group_scale.float()


def expanded(qparams: QParams, scheme: WeightScheme) -> QParams:
    """Qparams with one scale and zero point for each element of the granularity, fp32 and int8 [N, G] of bilevel ones;
    others as they are."""
    if not isinstance(scheme.granularity, Bilevel) or qparams.group_scale is None:
        return qparams
    return QParams(*read_bilevel(qparams.scale, qparams.group_scale))


def rows_of(qparams: QParams, scheme: WeightScheme, rows: slice | None, total: int) -> QParams:
    """Qparams of some of ``total`` rows: per tensor those of the whole, of runs of rows one for each weight, of blocks
    one for each row."""
    zero_point, group_scale = qparams.zero_point, qparams.group_scale
    if isinstance(scheme.granularity, PerInputGroup):
        groups = torch.arange(total, device=qparams.scale.device)[rows or slice(None)] // scheme.granularity.rows
        wide = None if zero_point is None else zero_point.t()[groups]
        return QParams(qparams.scale.t()[groups], wide)
    if isinstance(scheme.granularity, PerBlock):
        start, stop, _ = (rows or slice(None)).indices(total)
        return QParams(scale_rows(qparams.scale, scheme, stop - start, start))
    if rows is None or isinstance(scheme.granularity, PerTensor):
        return qparams
    return QParams(
        qparams.scale[rows],
        None if zero_point is None else zero_point[rows],
        None if group_scale is None else group_scale[rows],
    )
