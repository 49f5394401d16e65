"""int8 convolutions on this GPU beside cuDNN bf16 (channels last, benchmarked algorithms), SDXL's layers at batch 2.

    python -m diffuse_compress_kernels.benchmarks.gpu_conv --out gpu_conv.json

"product" arms are the convolution of quantized samples alone; "layer" includes quantizing the input and rearranging
the weight. Checked against a float64 convolution of the same codes first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from diffuse_compress_kernels.benchmarks.gpu_linear import environment
from diffuse_compress_kernels.int8_conv2d.op import int8_conv2d, output_size
from diffuse_compress_kernels.triton_kernels.conv import conv2d_int8, quantize_samples
from diffuse_compress_kernels.triton_kernels.tiles import TileConfig
from diffuse_compress_kernels.triton_kernels.timing import time_arms

__all__ = ["SHAPES", "main"]

# (batch, channels, height and width, out_channels, kernel, stride)
SHAPES = (
    (2, 320, 128, 320, 3, 1),
    (2, 640, 64, 640, 3, 1),
    (2, 1280, 32, 1280, 3, 1),
    (2, 960, 128, 320, 3, 1),
    (2, 1920, 64, 640, 3, 1),
    (2, 2560, 32, 1280, 3, 1),
    (2, 320, 128, 320, 3, 2),
    (2, 1920, 32, 1280, 1, 1),
)
SETS = 4


def _tiles(channels: int) -> list[TileConfig]:
    steps = [size for size in (128, 64, 32) if channels % size == 0][:2]
    shapes = ((128, 128, 4), (256, 128, 8), (128, 64, 4))
    return [TileConfig(m, n, k, warps, stages) for k in steps for m, n, warps in shapes for stages in (3, 4)]


def run_shape(shape: tuple[int, int, int, int, int, int], rounds: int) -> dict[str, Any]:
    """Microseconds by arm."""
    batch, channels, side, outputs, kernel, stride = shape
    pad, columns = kernel // 2, channels * kernel * kernel
    x = [torch.randn(batch, channels, side, side, device="cuda").bfloat16() for _ in range(SETS)]
    w8 = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8, device="cuda")
    scale, bias = torch.rand(outputs, 1, device="cuda") * 1e-3, torch.randn(outputs, device="cuda").bfloat16()
    dense = w8.bfloat16().view(outputs, channels, kernel, kernel).to(memory_format=torch.channels_last)
    last = [t.to(memory_format=torch.channels_last) for t in x]
    geometry = {"kernel": (kernel, kernel), "stride": (stride, stride), "padding": (pad,) * 4}
    size = output_size((side, side), [kernel] * 2, [stride] * 2, [pad] * 4, [1, 1])
    quantized = [quantize_samples(t, (-127, 127), (pad,) * 4) for t in last]
    by_tap = w8.view(outputs, channels, -1).transpose(1, 2).reshape(outputs, columns)
    y = int8_conv2d(x[0], w8, scale, bias, **geometry)  # type: ignore[arg-type]
    codes = quantized[0][0].permute(0, 3, 1, 2).double() * quantized[0][1].double()[:, None, None, None]
    expected = F.conv2d(codes[:1], (w8.double() * scale.double()).view(dense.shape), bias.double(), stride)
    error = float((y[:1].double() - expected).norm() / expected.norm())
    if not error < 4e-3:
        raise SystemExit(f"{shape}: relative RMS error {error:.2e}")
    arms: dict[str, Any] = {
        "bf16": lambda i: F.conv2d(last[i], dense, bias, stride, pad),
        "layer, x channels last": lambda i: int8_conv2d(last[i], w8, scale, bias, **geometry),  # type: ignore[arg-type]
        "layer, x contiguous": lambda i: int8_conv2d(x[i], w8, scale, bias, **geometry),  # type: ignore[arg-type]
        "part quantize": lambda i: quantize_samples(last[i], (-127, 127), (pad,) * 4),
        "part rearrange": lambda i: w8.view(outputs, channels, -1).transpose(1, 2).contiguous(),
    }
    for config in _tiles(channels):
        arms[f"product {config.name}"] = lambda i, config=config: conv2d_int8(
            *quantized[i],
            by_tap,
            scale,
            size,
            (kernel, kernel),
            (stride, stride),
            (1, 1),
            torch.bfloat16,
            bias=bias,
            config=config,
        )
    failures: dict[str, str] = {}
    times = time_arms(arms, SETS, rounds=rounds, failures=failures)
    print(f"{shape}: bf16 {times['bf16']:.1f} us", flush=True)
    for name in sorted(times, key=times.__getitem__):
        note = f"{times[name]:8.1f} us" if name.startswith("part") else f"{times['bf16'] / times[name]:8.2f}"
        print(f"    {name:40s} {note}", flush=True)
    return {"shape": list(shape), "microseconds": times, "failures": failures}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_conv.json"), help="results, rewritten after each shape")
    parser.add_argument("--rounds", type=int, default=7, help="timed replays per arm")
    options = parser.parse_args(arguments)
    torch.backends.cudnn.benchmark = True
    record: dict[str, Any] = {"environment": environment("cuda"), "shapes": []}
    for shape in SHAPES:
        record["shapes"].append(run_shape(shape, options.rounds))
        options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
