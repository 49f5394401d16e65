"""Order of a convolution's weight: from [N, C, taps], as layers store it, to [N, taps, C], as the kernel reads it.

A copy at the speed of memory, a few per cent of the convolution. A weight that stands channels-last needs none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from diffuse_compress_kernels.triton_kernels.plans import plan_for, start_and_keep
from diffuse_compress_kernels.triton_kernels.start import variant

__all__ = ["taps_last", "taps_last_kernel"]

MAX_BLOCK = 1024


@triton.jit
def taps_last_kernel(w_ptr, out_ptr, C, CS, TAPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program per output channel and BLOCK_C input channels; CS of them in ``out``, those past C are 0.

    Tap by tap: the strided reads of all but the first find their lines in the multiprocessor's own cache.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    places = w_ptr + n * C * TAPS + c * TAPS
    out_places = out_ptr + n * CS * TAPS + c
    for tap in tl.static_range(TAPS):
        values = tl.load(places + tap, mask=c < C, other=0)
        tl.store(out_places + tap * CS, values, mask=c < CS)


def taps_last(weight: torch.Tensor, kernel: tuple[int, int], stored: int) -> torch.Tensor:
    """int8 [N, taps * stored channels], contiguous; a view of ``weight`` where that is possible.

    Args:
        weight: int8 [N, C * taps] or [N, C, kh, kw].
        kernel: (kh, kw).
        stored: channels of a tap in the result.
    """
    taps = kernel[0] * kernel[1]
    outputs, channels = weight.shape[0], weight[0].numel() // taps
    if stored == channels:
        if taps == 1 and weight.is_contiguous():
            return weight.reshape(outputs, -1)
        if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            return weight.permute(0, 2, 3, 1).reshape(outputs, -1)
    out, weight = torch.empty(outputs, taps * stored, dtype=torch.int8, device=weight.device), weight.contiguous()
    key = ("taps", weight.shape, kernel, stored, weight.device.index)
    plan = plan_for(key, weight.device)
    if plan is not None and plan.run(weight.device.index, (weight, out)):
        return out
    block = min(MAX_BLOCK, triton.next_power_of_2(stored))
    chosen = variant(taps_last_kernel, TAPS=taps, BLOCK_C=block, num_warps=4)
    grid = (outputs, -(-stored // block), 1)
    start_and_keep(key, chosen, weight.device, grid, (weight, out), (channels, stored))
    return out
