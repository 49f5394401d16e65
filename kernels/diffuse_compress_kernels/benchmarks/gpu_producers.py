"""Norms and activations with the quantization of their rows, on this GPU, alone and before a quantized product.

    python -m diffuse_compress_kernels.benchmarks.gpu_producers --minutes 5 --out gpu_producers.json

First every kernel is compared with the stock torch operations (how many values and codes differ) and its codes, bit
for bit, with the quantization of the rows that it keeps. Then, per layer of a model: the fused kernel by number of
warps, the same as separate launches, the stock operations, eager and compiled, and a copy; and the chain of producer
and product beside the stock chain with cuBLAS bf16. All arms of a shape are replayed as CUDA graphs in turns, on
buffers rotated past the L2 cache. Medians go to ``--out`` after every shape, so a run may be cut off at any time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from diffuse_compress_kernels.benchmarks.gpu_checks import run_checks
from diffuse_compress_kernels.benchmarks.gpu_linear import environment
from diffuse_compress_kernels.int8_linear import cpu
from diffuse_compress_kernels.triton_kernels.fused_rows import Quantization, activation_rows, norm_rows
from diffuse_compress_kernels.triton_kernels.launch import forget_counters
from diffuse_compress_kernels.triton_kernels.rows import quantize_rows
from diffuse_compress_kernels.triton_kernels.tiles import TileConfig
from diffuse_compress_kernels.triton_kernels.timing import time_arms
from diffuse_compress_kernels.triton_kernels.w4a8 import w4a8
from diffuse_compress_kernels.triton_kernels.w8a8 import w8a8

__all__ = ["check_activation", "check_norm", "main"]

HERE = "diffuse_compress_kernels.benchmarks.gpu_producers"
ROTATED_BYTES = 300 << 20
EPS = 1e-6
INT8, FP8, KEPT = Quantization(), Quantization(-448, 448), Quantization(keep=True)
PRODUCTS = {
    "w8a8": TileConfig(128, 128, 128, 4, 3, tma=True),
    "w4a8": TileConfig(128, 128, 128, 4, 3, tma=True, programs_per_sm=2),
}
# By one each: a sum or a library function may end in another bit, and a value that is rounded to 16 bits on the other
# side.
MOST_FLIPS = 2e-3


@dataclass(frozen=True)
class Layer:
    """What stands before a product, and the product.

    Attributes:
        kind: "layer" (norm and modulation), "rms", "gelu", "gelu_tanh", "geglu" or "swiglu".
        rows: M.
        columns: K.
        outputs: N of the product.
        samples: whose rows share a modulation.
        work: dtype of norm and modulation.
    """

    kind: str
    rows: int
    columns: int
    outputs: int
    samples: int = 1
    work: torch.dtype = torch.bfloat16


LAYERS = {
    "pixart attn qkv": Layer("layer", 8192, 1152, 3456, 2),
    "flux single qkv": Layer("layer", 4608, 3072, 9216),
    "wan1.3b attn qkv": Layer("layer", 32760, 1536, 4608, 1, torch.float32),
    "pixart ff down": Layer("gelu_tanh", 8192, 4608, 1152),
    "wan14b ff up": Layer("layer", 32760, 5120, 13824, 1, torch.float32),
    "flux ff down": Layer("gelu_tanh", 4096, 12288, 3072),
    "pixart ff up": Layer("layer", 8192, 1152, 4608, 2),
    "wan1.3b ff down": Layer("gelu_tanh", 32760, 8960, 1536),
    "wan1.3b ff up": Layer("layer", 32760, 1536, 8960, 1, torch.float32),
    "flux single proj_mlp": Layer("layer", 4608, 3072, 12288),
    "sdxl ff down 32": Layer("geglu", 2048, 5120, 1280),
    "pixart attn q": Layer("layer", 8192, 1152, 1152, 2),
    "llama prefill gate_up": Layer("rms", 2048, 4096, 28672),
    "llama prefill down": Layer("swiglu", 2048, 14336, 4096),
    "cogvideox2b ff up": Layer("layer", 17776, 1920, 7680),
}


def stock(kind: str, work: torch.dtype) -> Callable[..., torch.Tensor]:
    """The stock operations of a kind, as the models write them."""

    def layer(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(x.to(work), (x.shape[-1],), None, None, EPS)
        return (normed * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        values = x.float()
        values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * values.to(x.dtype)

    def geglu(x: torch.Tensor) -> torch.Tensor:
        values, gate = x.chunk(2, dim=-1)
        return values * F.gelu(gate)

    def swiglu(x: torch.Tensor) -> torch.Tensor:
        gate, values = x.chunk(2, dim=-1)
        return F.silu(gate) * values

    functions: dict[str, Callable[..., torch.Tensor]] = {
        "layer": layer,
        "rms": rms,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "geglu": geglu,
        "swiglu": swiglu,
    }
    return functions[kind]


def fused(layer: Layer, how: Quantization, arguments: tuple[torch.Tensor, ...], warps: int | None = None) -> Any:
    """(codes, scale, kept) of a layer's producer."""
    x, *rest = arguments
    x = x.flatten(0, -2)
    if layer.kind == "layer":
        scale, shift = rest
        return norm_rows(x, how, rms=False, eps=EPS, scale=scale, shift=shift, work_dtype=layer.work, num_warps=warps)
    if layer.kind == "rms":
        return norm_rows(x, how, rms=True, eps=EPS, weight=rest[0], num_warps=warps)
    half = x.shape[1] // 2
    if layer.kind == "geglu":
        return activation_rows(x[:, half:], how, kind="gelu", other=x[:, :half], num_warps=warps)
    if layer.kind == "swiglu":
        return activation_rows(x[:, :half], how, kind="silu", other=x[:, half:], num_warps=warps)
    return activation_rows(x, how, kind=layer.kind, num_warps=warps)


def operands(layer: Layer, device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """Random inputs of a layer's producer: x [samples, tokens, ...] and its vectors."""
    wide = layer.columns * (2 if layer.kind in ("geglu", "swiglu") else 1)
    x = torch.randn(layer.samples, layer.rows // layer.samples, wide, device=device)
    # Channels of different size, and a mean: as in a residual stream.
    x = (x * (torch.rand(wide, device=device) * 3 + 0.2) + torch.randn(wide, device=device) * 0.5).to(dtype)
    if layer.kind == "layer":
        work = dtype if layer.work != torch.float32 else torch.float32
        return x, *(torch.randn(layer.samples, layer.columns, device=device).mul(0.3).to(work) for _ in range(2))
    if layer.kind == "rms":
        return x, torch.randn(layer.columns, device=device).to(dtype)
    return (x,)


# --- checks -----------------------------------------------------------------------------------------------------


def _compare(layer: Layer, device: str, dtype: torch.dtype) -> None:
    arguments = operands(layer, device, dtype)
    work = dtype if layer.work != torch.float32 else torch.float32
    expected = stock(layer.kind, work)(*arguments).flatten(0, -2)
    layer = replace(layer, work=work)
    codes, scale, kept = fused(layer, KEPT, arguments)
    again, again_scale = cpu.quantize_rows(kept.cpu(), -127, 127)
    if not torch.equal(scale.cpu(), again_scale) or not torch.equal(codes.cpu(), again):
        raise ValueError("codes are not those of the rows that were kept")
    theirs, their_scale = cpu.quantize_rows(expected.cpu(), -127, 127)
    steps = (codes.cpu().int() - theirs.int()).abs()
    values, flips = float((kept != expected).double().mean()), float((steps > 0).double().mean())
    print(f"        {layer.kind} K={layer.columns} {dtype} {work}: {values:.1e} of the values are not the stock ones, "
          f"{flips:.1e} of the codes", flush=True)  # fmt: skip
    if int(steps.max()) > 1 or flips > MOST_FLIPS:
        raise ValueError(f"{flips:.1e} of the codes are not the stock ones, by up to {int(steps.max())}")
    if not bool(((kept.cpu().double() - expected.cpu().double()).abs() <= 1.01 * their_scale.double()).all()):
        raise ValueError("a value is more than a step of the codes away from the stock one")
    if device == "cuda":
        # The interpreter truncates where float8 is rounded.
        codes, scale, kept = fused(layer, Quantization(-448, 448, keep=True), arguments)
        quotients = (kept.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        if not torch.equal(codes.float(), quotients.float()):
            raise ValueError("float8 codes are not those of the rows that were kept")


def check_norm(kind: str, columns: int, work: torch.dtype, dtype: torch.dtype, device: str) -> None:
    """Raise unless a norm's values are (nearly) stock and its codes exactly those of its values."""
    rows = 2046 if device == "cuda" else 6
    _compare(Layer(kind, rows, columns, 8, 2 if kind == "layer" else 1, work), device, dtype)


def check_activation(kind: str, columns: int, dtype: torch.dtype, device: str) -> None:
    """As :func:`check_norm`."""
    _compare(Layer(kind, 515 if device == "cuda" else 5, columns, 8), device, dtype)


def _checks(device: str) -> list[tuple[str, str, tuple[Any, ...]]]:
    checks: list[tuple[str, str, tuple[Any, ...]]] = []
    sizes = (100, 1152, 3072, 5120) if device == "cuda" else (100,)
    for dtype in (torch.bfloat16, torch.float16):
        for columns in sizes:
            for kind, work in (("layer", dtype), ("layer", torch.float32), ("rms", dtype)):
                name = f"{kind} {columns} {dtype} {work}"
                checks.append((name, f"{HERE}:check_norm", (kind, columns, work, dtype, device)))
            for kind in ("gelu", "gelu_tanh", "geglu", "swiglu"):
                checks.append((f"{kind} {columns} {dtype}", f"{HERE}:check_activation", (kind, columns, dtype, device)))
    return checks


# --- timing -----------------------------------------------------------------------------------------------------


def _producer_arms(
    layer: Layer, inputs: list[tuple[torch.Tensor, ...]], compiled: Callable[..., torch.Tensor]
) -> dict[str, Callable[[int], object]]:
    eager = stock(layer.kind, layer.work)

    def separate(i: int) -> object:
        return quantize_rows(eager(*inputs[i]).flatten(0, -2), -127, 127)

    def compiled_separate(i: int) -> object:
        return quantize_rows(compiled(*inputs[i]).flatten(0, -2), -127, 127)

    arms: dict[str, Callable[[int], object]] = {
        "copy": lambda i: inputs[i][0].clone(),
        "eager": lambda i: eager(*inputs[i]),
        "compiled": lambda i: compiled(*inputs[i]),
        "eager, quantize_rows": separate,
        "compiled, quantize_rows": compiled_separate,
        "fused fp8": lambda i: fused(layer, FP8, inputs[i]),
        "fused int8 keep": lambda i: fused(layer, KEPT, inputs[i]),
    }
    for warps in (w for w in (1, 2, 4, 8, 16) if 6 <= layer.columns // (32 * w) <= 128):
        arms[f"fused int8 w{warps}"] = lambda i, warps=warps: fused(layer, INT8, inputs[i], warps)  # type: ignore[misc]
    return arms


def _chain_arms(
    layer: Layer, inputs: list[tuple[torch.Tensor, ...]], compiled: Callable[..., torch.Tensor], warps: int
) -> dict[str, Callable[[int], object]]:
    """Producer and product in one graph."""
    rows, columns, outputs, sets = layer.rows, layer.columns, layer.outputs, len(inputs)
    eager = stock(layer.kind, layer.work)

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")

    dense = [torch.randn(outputs, columns, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    w8 = [random(outputs, columns) for _ in range(sets)]
    w4 = [random(outputs, -(-columns // 128) * 64) for _ in range(sets)]
    wf = [w.to(torch.float8_e4m3fn) for w in dense]
    w_scale = torch.rand(outputs, 1, device="cuda")
    bias = torch.randn(outputs, device="cuda", dtype=torch.bfloat16)
    y = [torch.empty(rows, outputs, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]

    def bf16(function: Callable[..., torch.Tensor]) -> Callable[[int], object]:
        return lambda i: torch.addmm(bias, function(*inputs[i]).flatten(0, -2), dense[i].t(), out=y[i])

    def run_w8a8(i: int) -> object:
        codes, scale, _ = fused(layer, INT8, inputs[i], warps)
        return w8a8(codes, scale, w8[i], w_scale, PRODUCTS["w8a8"], bias=bias, out=y[i])

    def run_w4a8(i: int) -> object:
        codes, scale, _ = fused(layer, INT8, inputs[i], warps)
        return w4a8(codes, scale, w4[i], w_scale, PRODUCTS["w4a8"], bias=bias, out=y[i])

    def run_fp8(i: int) -> object:
        codes, scale, _ = fused(layer, FP8, inputs[i], warps)
        return torch._scaled_mm(
            codes, wf[i].t(), scale_a=scale, scale_b=w_scale.t(), bias=bias, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip

    def run_separate(i: int) -> object:
        codes, scale = quantize_rows(eager(*inputs[i]).flatten(0, -2), -127, 127)
        return w8a8(codes, scale, w8[i], w_scale, PRODUCTS["w8a8"], bias=bias, out=y[i])

    def run_product(i: int) -> object:
        return torch.addmm(bias, inputs[i][0].flatten(0, -2)[:, :columns], dense[i].t(), out=y[i])

    return {
        "cublas alone": run_product,
        "eager, cublas": bf16(eager),
        "compiled, cublas": bf16(compiled),
        "fused, w8a8": run_w8a8,
        "fused, w4a8": run_w4a8,
        "fused, fp8 scaled_mm": run_fp8,
        "eager, quantize_rows, w8a8": run_separate,
    }


def time_layer(label: str, layer: Layer, rounds: int) -> dict[str, Any]:
    """The record of one layer."""
    start = time.perf_counter()
    inputs_bytes = layer.rows * layer.columns * 2 * (2 if layer.kind in ("geglu", "swiglu") else 1)
    sets = max(3, min(24, -(-ROTATED_BYTES // (inputs_bytes * 2))))
    inputs = [operands(layer, "cuda") for _ in range(sets)]
    torch._dynamo.reset()
    compiled = torch.compile(stock(layer.kind, layer.work), dynamic=False)
    failures: dict[str, str] = {}
    times = time_arms(_producer_arms(layer, inputs, compiled), sets, rounds=rounds, failures=failures)
    ours = [name for name in times if name.startswith("fused int8 w")]
    fastest = min(ours, key=times.__getitem__)
    chain = time_arms(
        _chain_arms(layer, inputs, compiled, int(fastest.rsplit("w", 1)[1])), sets, rounds=rounds, failures=failures
    )
    elements = layer.rows * layer.columns
    read = inputs_bytes / times[fastest] / 1e6
    rate, copied = read + elements / times[fastest] / 1e6, 2 * inputs_bytes / times["copy"] / 1e6
    ratios = {
        "producer to eager": times["eager"] / times[fastest],
        "producer to compiled": times["compiled"] / times[fastest],
        "producer to separate": times["eager, quantize_rows"] / times[fastest],
        **{
            f"{name} to {base}": chain[base] / chain[name]
            for name in ("fused, w8a8", "fused, w4a8", "fused, fp8 scaled_mm")
            for base in ("eager, cublas", "compiled, cublas")
            if name in chain and base in chain
        },
    }
    print(f"{label} {layer.rows}x{layer.columns}: {fastest} {times[fastest]:.1f} us, {rate:.2f} TB/s (copy "
          f"{copied:.2f}); eager {times['eager']:.1f}, compiled {times['compiled']:.1f}, "
          f"separate {times['eager, quantize_rows']:.1f}", flush=True)  # fmt: skip
    print(f"    { {name: round(value, 2) for name, value in ratios.items()} }", flush=True)
    forget_counters()
    torch.cuda.empty_cache()
    return {
        "label": label,
        "kind": layer.kind,
        "shape": [layer.rows, layer.outputs, layer.columns],
        "fastest": fastest,
        "terabytes per second": [round(rate, 3), round(copied, 3)],
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "microseconds": {name: round(times[name], 2) for name in sorted(times, key=times.__getitem__)},
        "chain": {name: round(chain[name], 2) for name in sorted(chain, key=chain.__getitem__)},
        "failures": failures,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(arguments: list[str] | None = None) -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="stop before the first layer after this time")
    parser.add_argument("--out", type=Path, default=Path("gpu_producers.json"), help="results, rewritten every layer")
    parser.add_argument("--only", nargs="+", help="labels of layers that contain one of these words")
    parser.add_argument("--rounds", type=int, default=9, help="timed replays per arm")
    parser.add_argument("--dry-run", action="store_true", help="checks alone, on the CPU: TRITON_INTERPRET=1")
    options = parser.parse_args(arguments)
    end = time.perf_counter() + 60 * options.minutes
    device = "cpu" if options.dry_run else "cuda"
    record: dict[str, Any] = {"environment": environment(device), "checks": {}, "layers": []}
    print(json.dumps(record["environment"]), flush=True)
    record["checks"] = run_checks(_checks(device), device)
    options.out.write_text(json.dumps(record, indent=1))
    if options.dry_run:
        return
    for label, layer in LAYERS.items():
        if options.only and not any(word in label for word in options.only):
            continue
        if time.perf_counter() > end:
            print("out of time", flush=True)
            break
        record["layers"].append(time_layer(label, layer, options.rounds))
        options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
