"""Input columns that are found at run time and multiplied beside the codes (LLM.int8).

Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv 2208.07339, section
3.2::

    y = sum over columns h in O of x_h W_h^T  +  Q(x without O) Q(W without O)^T,    O = {h: some |x_h| >= threshold}

As in the authors' code for inference W_h is dequantized from its int8 codes, so that nothing dense is stored, and O is
found over all rows of a call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffuse_compress.quantization.packed import QuantizedWeight

__all__ = ["divide", "outlier_columns"]


def outlier_columns(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """bool [K]: where a value of an input [..., K] has the magnitude ``threshold`` or more."""
    return (x.detach().abs() >= threshold).reshape(-1, x.shape[-1]).any(dim=0)


def divide(
    x: torch.Tensor, weight: QuantizedWeight, threshold: float, pre_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is left for the int8 product, and what the outlier columns give.

    Args:
        x: [..., K].
        weight: int8 [N, K], one scale per row or tensor, symmetric.
        threshold: at least 0.
        pre_scale: fp32 [K] that the int8 product multiplies the input by: codes are those of the weight over it.

    Returns:
        x with zeros in the outlier columns, x itself if there is none; the product [..., N] in the dtype of x of these
        columns and their dequantized weights, None if there is none.

    Cost:
        On a GPU the device is waited for, since how many columns there are decides on the work. Where that cannot be
        (torch.compile, CUDA graphs, meta tensors) a whole dense product is made, mostly of zeros.
    """
    mask = outlier_columns(x, threshold)
    if _cannot_wait(x):
        values = _dequantized(weight.qweight, weight.scale, pre_scale, x.dtype)
        return torch.where(mask, 0, x), F.linear(torch.where(mask, x, 0), values)
    columns = mask.nonzero().flatten()
    if not columns.numel():
        return x, None
    codes = weight.qweight.index_select(1, columns)
    values = _dequantized(codes, weight.scale, None if pre_scale is None else pre_scale[columns], x.dtype)
    return x.index_fill(-1, columns, 0), F.linear(x.index_select(-1, columns), values)


def _dequantized(
    codes: torch.Tensor, scale: torch.Tensor, pre_scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    values = codes.detach().float() * scale.detach()
    return (values if pre_scale is None else values * pre_scale.detach()).to(dtype)


def _cannot_wait(x: torch.Tensor) -> bool:
    return torch.compiler.is_compiling() or x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing())
