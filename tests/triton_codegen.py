"""Triton kernels compiled for a GPU that is not there: what the machine code is made of."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffuse_compress_kernels.triton_kernels.tiles import TileConfig
from diffuse_compress_kernels.triton_kernels.w4a8 import w4a8_kernel
from diffuse_compress_kernels.triton_kernels.w4a16 import w4a16_kernel
from diffuse_compress_kernels.triton_kernels.w8a8 import w8a8_kernel

# Bytes of shared memory that one block may use, CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability": 163 KB on 8.0, 99 KB on 8.6, 8.9 and 12.0, 227 KB on 9.0 and 10.0.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@dataclass(frozen=True)
class Code:
    """Facts of a compiled kernel.

    Attributes:
        ptx: its text.
        shared: bytes of shared memory of a block.
        registers: per thread.
        spills: loads and stores of spilled registers.
        loop: instructions of the innermost loop that multiplies, 0 if there is none.
        sass: machine code.
    """

    ptx: str
    shared: int
    registers: int
    spills: int
    loop: int
    sass: str


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    num_warps: int,
    num_stages: int,
    tmp_path: Path,
) -> Code:
    """Compile for a compute capability; pointers and sizes are multiples of 16, other parameters None."""
    names = kernel.arg_names
    aligned = [
        name
        for name, kind in signature.items()
        if kind.startswith("*") or (kind == "i32" and (name in ("K", "N") or name.startswith("stride")))
    ]
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in names},
        {(names.index(name),): constants.get(name) for name in names if name not in signature},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return inspect_code(compiled, tmp_path)


def inspect_code(compiled: Any, folder: Path) -> Code:
    """What a compiled kernel is made of; ``folder`` for its binary."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage, sass = _dump("--dump-resource-usage", cubin), _dump("-sass", cubin)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return Code(compiled.asm["ptx"], compiled.metadata.shared, int(registers[1]), spills, _loop_length(sass), sass)


def _dump(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def _loop_length(sass: str) -> int:
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    shortest = 0
    for address, text in lines:
        jump = re.search(r"BRA[^`]*0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < int(address, 16):
            body = [code for at, code in lines if int(jump[1], 16) <= int(at, 16) <= int(address, 16)]
            if any("MMA" in code for code in body) and (not shortest or len(body) < shortest):
                shortest = len(body)
    return shortest


def compile_product(kind: str, config: TileConfig, capability: int, tmp_path: Path, **options: Any) -> Code:
    """A product's kernel; ``kind`` as in the tables, "w4a8-two-level" and "w8a16" besides."""
    kernel = (
        w8a8_kernel if kind.startswith("w8") else {"w4a8": w4a8_kernel, "w4a16": w4a16_kernel}[kind[:5].rstrip("-")]
    )
    packed = kind.startswith("w4")
    x_type = {"w8a8-fp8": "fp8e4nv", "w4a16": "bf16", "w8a16": "bf16"}.get(kind, "i8")
    w_type, columns = ("u8", 64) if packed else ("i8" if kind == "w8a16" else x_type, config.block_k)
    sizes = ("M", "N", "K", "stride_xm", "stride_wn", "stride_ym", "programs")
    signature = {"y_ptr": "*bf16", "bias_ptr": "*bf16", **dict.fromkeys(sizes, "i32")}
    if config.tma:
        signature["x"] = f"tensordesc<{x_type}[{config.block_m}, {columns}]>"
        signature["w"] = f"tensordesc<{w_type}[{config.block_n}, {columns}]>"
        signature["y_desc"] = f"tensordesc<bf16[{config.block_m}, {config.block_n}]>"
    else:
        signature |= {"x": f"*{x_type}", "w": f"*{w_type}"}
    x_scales = "none" if kind.endswith("a16") else "rows"
    w_scales = "none" if kind == "w4a16" else "rows"
    for name, scales in (("x_scale_ptr", x_scales), ("w_scale_ptr", w_scales)):
        if scales != "none":
            signature[name] = "*fp32"
    if config.split_k > 1:
        signature |= {"parts_ptr": "*fp32" if x_type != "i8" else "*i32", "counters_ptr": "*i32"}
    constants: dict[str, Any] = {
        "X_SCALES": x_scales,
        "W_SCALES": w_scales,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GROUP_M": config.group_m,
        "SPLIT_K": config.split_k,
        "TMA": config.tma,
        "PERSISTENT": config.programs_per_sm > 0,
        "EVEN_K": True,
    }
    if not packed:
        constants |= {"BLOCK_K": config.block_k, "WEIGHT_LEFT": config.weight_left, "INTEGER": x_type == "i8"}
        constants["ASM"] = kind == "w8a16"
    else:
        constants["ASM"] = options.get("asm", True)
        signature["stride_gn"] = "i32"
    if kind.startswith("w4a8"):
        constants["TWO_LEVEL"] = kind == "w4a8-two-level"
        if constants["TWO_LEVEL"]:
            signature["group_scale_ptr"] = "*i8"
    if kind == "w4a16":
        constants["GROUP_SIZE"] = options.get("group_size", 128)
        signature |= {"group_scale_ptr": "*fp32", "zero_ptr": "*i8"}
    return compile_kernel(kernel, signature, constants, capability, config.num_warps, config.num_stages, tmp_path)
