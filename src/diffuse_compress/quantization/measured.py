"""What was measured of each compute path: whether a layer is faster there than the dense one. None: not measured."""

from __future__ import annotations

import platform

import torch

from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress_kernels import has_fast_int4, has_fast_int8

__all__ = ["measured_conv", "measured_on_cpu", "measured_on_gpu"]

_FP32, _BF16 = torch.float32, torch.bfloat16
# Speed against the dense layer in the input's dtype: geometric mean over the PixArt-XL linear layers at 64 and 1024
# rows (w8a8 on "vnni" and "amx": PixArt-XL and SDXL, 64 to 4096 rows), one thread, by
# `python -m diffuse_compress_kernels.benchmarks.cpu_linear`, 2026-11. Key: path, CPU, 8-bit weight, input dtype.
# "plain": Zen 3 (AVX2), torch 2.13, a busy machine. "amx": Sapphire Rapids, torch 2.11. "vnni": the same with oneDNN
# held to AVX512_CORE_BF16. Its dense bf16 is slower than its fp32 then, which no real CPU with bf16 instructions
# shares: integer products with bf16 inputs stay unmeasured there. So does everything else without an entry.
_MEASURED: dict[tuple[str, str, bool, torch.dtype], float] = {
    ("int8-cpu", "plain", True, _FP32): 0.80,
    ("int8-cpu", "plain", True, _BF16): 4.97,
    ("int8-cpu", "plain", False, _FP32): 0.74,
    ("int8-cpu", "plain", False, _BF16): 4.47,
    ("int8-vnni", "vnni", True, _FP32): 2.38,
    ("int8-vnni", "vnni", False, _FP32): 1.67,
    ("int8-vnni", "amx", True, _FP32): 3.15,
    ("int8-vnni", "amx", True, _BF16): 0.97,
    ("dequantize", "plain", True, _FP32): 0.93,
    ("dequantize", "plain", True, _BF16): 6.04,
    ("dequantize", "plain", False, _FP32): 0.99,
    ("dequantize", "plain", False, _BF16): 4.90,
    ("dequantize", "vnni", True, _FP32): 0.81,
    ("dequantize", "vnni", True, _BF16): 0.77,
    ("dequantize", "vnni", False, _FP32): 0.71,
    ("dequantize", "vnni", False, _BF16): 0.71,
    ("dequantize-weight-only", "plain", True, _FP32): 0.55,
    ("dequantize-weight-only", "plain", True, _BF16): 3.20,
    ("dequantize-weight-only", "vnni", True, _FP32): 0.36,
    ("dequantize-weight-only", "vnni", True, _BF16): 0.43,
}


# The same against cuBLAS bf16 on GPUs, input quantization included: geometric means over the layers of many tokens in
# the kernels' benchmarks/shapes.py, by `python -m diffuse_compress_kernels.benchmarks.gpu_layers`, torch 2.11, triton
# 3.6, 2026-11 (not the run of docs/benchmarks.md): all 24; the 4 with fewer than NARROW out_features, where quantizing
# the input takes as long as is saved; the 20 others. "w8a16-cuda" is one layer, 4096 x 9216 x 3072, by graph replays.
# Key: name of the device, path, weight bits.
NARROW = 1536
_MEASURED_GPU: dict[tuple[str, str, int], tuple[float, float, float]] = {
    ("NVIDIA H200", "int8-cuda", 8): (1.31, 0.87, 1.41),
    ("NVIDIA H200", "int8-cuda", 4): (1.24, 0.81, 1.35),
    ("NVIDIA H200", "fp8-cuda", 8): (1.49, 0.92, 1.64),
    ("NVIDIA H200", "int4-cuda", 4): (0.94, 0.88, 0.95),
    ("NVIDIA H100 80GB HBM3", "w8a16-cuda", 8): (0.90, 0.90, 0.90),
}


def measured_on_gpu(
    path: str, scheme: Scheme, device: torch.device, dtype: torch.dtype, outputs: int | None
) -> bool | None:
    """What was measured on this GPU, for linear layers with the Triton kernels.

    Args:
        path: as :class:`ComputePath` names it.
        scheme: the layer's.
        device: of the layer.
        dtype: of the input.
        outputs: out_features; None judges layers of all sizes together.
    """
    if dtype != _BF16 or not torch.cuda.is_available() or not has_fast_int4(device):
        return None
    ratios = _MEASURED_GPU.get((torch.cuda.get_device_name(device), path, scheme.weight.format.bits))
    if ratios is None:
        return None
    return ratios[0 if outputs is None else 1 if outputs < NARROW else 2] > 1


# Convolutions with int8 weights against cuDNN bf16 with its bias, both channels-last, input quantization and order of
# the weight included: geometric means over the convolutions of SDXL, by
# `python -m diffuse_compress_kernels.benchmarks.gpu_conv2d`, same device and versions. Key: device, 1x1, stride 1.
_MEASURED_CONV: dict[tuple[str, bool, bool], float] = {
    ("NVIDIA H200", False, True): 1.32,
    ("NVIDIA H200", False, False): 0.88,
    ("NVIDIA H200", True, True): 0.91,
}


def measured_conv(
    path: str,
    scheme: Scheme,
    device: torch.device,
    dtype: torch.dtype,
    kernel: tuple[int, int],
    stride: tuple[int, int],
) -> bool | None:
    """What was measured on this GPU, for convolutions with the Triton kernel."""
    if path != "int8-cuda" or dtype != _BF16 or scheme.weight.format.bits != 8:
        return None
    if not torch.cuda.is_available() or not has_fast_int4(device):
        return None
    key = (torch.cuda.get_device_name(device), kernel == (1, 1), stride == (1, 1))
    ratio = _MEASURED_CONV.get(key)
    return None if ratio is None else ratio > 1


def measured_on_cpu(path: str, scheme: Scheme, dtype: torch.dtype) -> bool | None:
    """What was measured on this kind of CPU, for linear layers."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    cpu = "amx" if torch.cpu._is_amx_tile_supported() else "vnni" if has_fast_int8() else "plain"
    ratio = _MEASURED.get((path, cpu, scheme.weight.format.bits == 8, dtype))
    return None if ratio is None else ratio > 1
