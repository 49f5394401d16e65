"""The Triton int8 convolution on this GPU beside cuDNN bf16, on the convolutions of SDXL and Stable Diffusion 1.5.

    python -m diffuse_compress_kernels.benchmarks.gpu_conv2d --minutes 6 --out gpu_conv2d.json

Every configuration is first compared with exact integers on fresh data, in outputs filled with a sentinel; what fails
is not timed. Then cuDNN (autotuned, channels-last and NCHW, with its bias) and all configurations are replayed as CUDA
graphs in turns, on buffers rotated past the L2 cache; at last the fastest ones with the quantization of their input in
the same graph. Medians go to ``--out`` after every shape, so a run may be cut off at any time.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from diffuse_compress_kernels.benchmarks.conv_shapes import SD15_CONVOLUTIONS, SDXL_CONVOLUTIONS, Convolution
from diffuse_compress_kernels.benchmarks.gpu_checks import guarded, intact, run_checks
from diffuse_compress_kernels.benchmarks.gpu_linear import environment
from diffuse_compress_kernels.int8_conv2d import int8_conv2d
from diffuse_compress_kernels.int8_linear import cpu
from diffuse_compress_kernels.triton_kernels.conv2d import conv2d
from diffuse_compress_kernels.triton_kernels.conv_candidates import conv_candidates
from diffuse_compress_kernels.triton_kernels.conv_geometry import ConvConfig, ConvShape
from diffuse_compress_kernels.triton_kernels.conv_quantize import quantize_pictures
from diffuse_compress_kernels.triton_kernels.conv_tables import choose_conv
from diffuse_compress_kernels.triton_kernels.conv_weight import taps_last
from diffuse_compress_kernels.triton_kernels.launch import forget_counters
from diffuse_compress_kernels.triton_kernels.timing import time_arms

__all__ = ["check_config", "check_quantize", "check_weight", "main"]

ROTATED_BYTES = 300 << 20
FINALISTS = 3
HERE = "diffuse_compress_kernels.benchmarks.gpu_conv2d"


def _geometry(convolution: Convolution, *, gaps: bool = True) -> ConvShape:
    samples, channels, size, _, kernel, stride, _ = convolution
    border = kernel // 2
    return ConvShape(
        samples, size, size, channels, (kernel, kernel), (stride, stride), (border,) * 4, gaps=gaps and kernel > 1
    )


def _for_mode(shape: ConvShape, mode: str) -> ConvShape:
    """Pictures that "box" loads need no gaps."""
    return replace(shape, gaps=mode != "box" and any(shape.padding))


# --- checks -----------------------------------------------------------------------------------------------------


def _exact_sums(codes: torch.Tensor, weight: torch.Tensor, shape: ConvShape, zero: int) -> torch.Tensor:
    """int64 [B, N, Ho, Wo] of codes [B, C, H, W] and weight [N, C, kh, kw]."""
    left, right, top, bottom = shape.padding
    padded = F.pad(codes.double() - zero, (left, right, top, bottom))
    columns = F.unfold(padded, shape.kernel, shape.dilation, 0, shape.stride)
    return (weight.double().flatten(1) @ columns).long().unflatten(2, shape.out)


def _taps_last(weight: torch.Tensor, stored: int) -> torch.Tensor:
    """[N, taps * stored] of [N, C, kh, kw], by stock operations."""
    return F.pad(weight.permute(0, 2, 3, 1), (0, stored - weight.shape[1])).flatten(1).contiguous()


def _picture_codes(codes: torch.Tensor, shape: ConvShape) -> torch.Tensor:
    """[B, C, H, W] out of the stored layout."""
    pictures = codes[shape.lead :].view(shape.samples, *shape.pitch, -1)
    return pictures[:, : shape.height, : shape.width, : shape.channels].permute(0, 3, 1, 2)


def check_config(config: ConvConfig, kernel: int, stride: int, device: str) -> None:
    """Raise unless sums are exact and floats right, for sizes that no tile divides."""
    big = device == "cuda"
    samples, channels, outputs = (3, 304, 328) if big else (2, 40, 24)
    height, width = (37, 29) if big else (9, 7)
    dtype = torch.bfloat16 if big else torch.float16
    border = kernel // 2
    shape = ConvShape(samples, height, width, channels, (kernel, kernel), (stride, stride), (border,) * 4)
    shape = _for_mode(shape, config.mode)
    x = torch.randn(samples, channels, height, width, device=device).to(dtype)
    weight = torch.randint(-128, 128, (outputs, channels, kernel, kernel), dtype=torch.int8, device=device)
    w_scale, bias = torch.rand(outputs, 1, device=device) * 0.01, torch.randn(outputs, device=device).to(dtype)
    codes, scale = quantize_pictures(x, shape, -127, 127)
    sums = _exact_sums(_picture_codes(codes, shape), weight, shape, 0)
    expected = sums * scale.double().view(-1, 1, 1, 1) * w_scale.double().view(-1, 1, 1) + bias.double().view(-1, 1, 1)
    stored = _taps_last(weight, shape.stored_channels)
    results = []
    for out_dtype, layout in ((torch.int32, "last"), (dtype, "last"), (dtype, "last"), (dtype, "first")):
        sizes = (samples, *shape.out, outputs) if layout == "last" else (samples, outputs, *shape.out)
        out, buffer = guarded(sizes, out_dtype, device)
        out = out.permute(0, 3, 1, 2) if layout == "last" else out
        exact = out_dtype == torch.int32
        conv2d(codes, None if exact else scale, stored, w_scale, shape, config, bias=None if exact else bias, out=out)
        if not intact(buffer):
            raise ValueError("wrote outside the output")
        if exact and not torch.equal(out.long(), sums):
            raise ValueError(f"{int((out.long() != sums).sum())} of {out.numel()} sums are wrong")
        if not exact:
            results.append(out)
    error = float((results[0].double() - expected).norm() / expected.norm())
    if not error < 2.5e-3:
        raise ValueError(f"relative RMS error {error:.2e}")
    if not all(torch.equal(result, results[0]) for result in results[1:]):
        raise ValueError("two calls, or the two layouts, differ")


def check_quantize(layout: str, gaps: bool, given: bool, device: str) -> None:
    """Raise unless codes, gaps and scales are the CPU's."""
    samples, channels, height, width = (3, 300, 45, 37) if device == "cuda" else (2, 20, 9, 7)
    x = torch.randn(samples, channels, height, width, device=device).to(torch.bfloat16)
    x[1] *= 30
    if layout == "last":
        x = x.to(memory_format=torch.channels_last)
    pre = torch.rand(channels, device=device) + 0.5
    shape = ConvShape(samples, height, width, channels, (3, 3), padding=(1, 1, 1, 1), gaps=gaps)
    scale = torch.tensor([0.02], device=device) if given else None
    zero = torch.tensor([-9], dtype=torch.int8, device=device) if given else None
    codes, measured = quantize_pictures(x, shape, -128 if given else -127, 127, scale, zero, pre)
    host = (x.float().cpu() * pre.cpu().view(-1, 1, 1)).flatten(1)
    expected, expected_scale = cpu.quantize_rows(
        host, -128 if given else -127, 127, None if scale is None else scale.cpu(), None if zero is None else zero.cpu()
    )
    if not torch.equal(measured.cpu(), expected_scale.flatten()):
        raise ValueError("the scales differ")
    if not torch.equal(_picture_codes(codes, shape).cpu(), expected.view(x.shape)):
        raise ValueError("codes differ")
    stored = codes[shape.lead :].view(samples, *shape.pitch, -1)
    fill = -9 if given else 0
    rest = [codes[: shape.lead], stored[:, height:], stored[:, :, width:]]
    if not all(bool((part == fill).all()) for part in rest):
        raise ValueError("gaps hold something else than 0")


def check_weight(device: str) -> None:
    """Raise unless the order of the weight is right."""
    for channels, kernel in ((300, 3), (37, 1), (64, 5)):
        weight = torch.randint(-128, 128, (11, channels, kernel, kernel), dtype=torch.int8, device=device)
        stored = -(-channels // 16) * 16
        for form in (weight, weight.flatten(1), weight.contiguous(memory_format=torch.channels_last)):
            if not torch.equal(taps_last(form, (kernel, kernel), stored), _taps_last(weight, stored)):
                raise ValueError(f"wrong order of {list(form.shape)}")


def _checks(convolutions: list[Convolution], device: str, chosen: bool) -> list[tuple[str, str, tuple[Any, ...]]]:
    checks: dict[str, tuple[str, str, tuple[Any, ...]]] = {"weight": ("weight", f"{HERE}:check_weight", (device,))}
    for layout in ("last", "first"):
        for gaps in (True, False):
            for given in (True, False):
                name = f"quantize {layout} gaps={gaps} given={given}"
                checks[name] = (name, f"{HERE}:check_quantize", (layout, gaps, given, device))
    for convolution in convolutions:
        shape = _geometry(convolution)
        for config in _candidates(shape, convolution[3], chosen):
            name = f"{shape.kernel[0]}x{shape.kernel[0]}s{shape.stride[0]} {config.name}"
            checks[name] = (name, f"{HERE}:check_config", (config, shape.kernel[0], shape.stride[0], device))
    return list(checks.values())


# --- timing -----------------------------------------------------------------------------------------------------


class _Buffers:
    """Operands of one convolution, several times."""

    def __init__(self, convolution: Convolution) -> None:
        samples, channels, size, outputs, kernel, stride, _ = convolution
        self.shape = _geometry(convolution)
        self.stride, self.border = stride, kernel // 2
        one = samples * channels * size * size * 3 + outputs * channels * kernel * kernel * 3
        self.sets = max(3, min(24, -(-ROTATED_BYTES // one)))

        def randn(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device="cuda").to(torch.bfloat16)

        last = torch.channels_last
        self.x = [randn(samples, channels, size, size) for _ in range(self.sets)]
        self.x_last = [x.to(memory_format=last) for x in self.x]
        self.w = [randn(outputs, channels, kernel, kernel) for _ in range(self.sets)]
        self.w_last = [w.to(memory_format=last) for w in self.w]
        self.bias = randn(outputs)
        self.w8 = [w.float().mul(30).clamp(-127, 127).to(torch.int8) for w in self.w]
        self.w8_last = [_taps_last(w, self.shape.stored_channels) for w in self.w8]
        self.w_scale = torch.rand(outputs, 1, device="cuda")
        out = (samples, outputs, *self.shape.out)
        self.out = [torch.empty(out, device="cuda", dtype=torch.bfloat16) for _ in range(self.sets)]
        self.out_last = [y.contiguous(memory_format=last) for y in self.out]
        self.codes: dict[bool, tuple[list[torch.Tensor], torch.Tensor]] = {}

    def codes_for(self, shape: ConvShape) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Codes of every set with or without gaps, and a scale."""
        if shape.gaps not in self.codes:
            pairs = [quantize_pictures(x, shape, -127, 127) for x in self.x_last]
            self.codes[shape.gaps] = [pair[0] for pair in pairs], pairs[0][1]
        return self.codes[shape.gaps]

    def product(self, config: ConvConfig) -> Callable[[int], object]:
        """The convolution alone."""
        shape = _for_mode(self.shape, config.mode)
        codes, scale = self.codes_for(shape)
        return lambda i: conv2d(
            codes[i], scale, self.w8_last[i], self.w_scale, shape, config, bias=self.bias, out=self.out_last[i]
        )

    def whole(self, config: ConvConfig, *, last: bool) -> Callable[[int], object]:
        """Quantization and convolution, with a weight that stands as the kernel reads it."""
        shape = _for_mode(self.shape, config.mode)
        x, out = (self.x_last, self.out_last) if last else (self.x, self.out)

        def run(i: int) -> object:
            codes, scale = quantize_pictures(x[i], shape, -127, 127)
            return conv2d(codes, scale, self.w8_last[i], self.w_scale, shape, config, bias=self.bias, out=out[i])

        return run

    def operator(self, *, last: bool) -> Callable[[int], object]:
        """What a layer calls: the weight as layers store it, the configuration from the table."""
        x = self.x_last if last else self.x
        return lambda i: int8_conv2d(
            x[i],
            self.w8[i].flatten(1),
            self.w_scale,
            self.bias,
            kernel=self.shape.kernel,
            stride=self.shape.stride,
            padding=self.shape.padding,
        )

    def check(self, config: ConvConfig) -> str:
        """ "ok" if the sums of this very shape are exact, at places drawn at random."""
        shape = _for_mode(self.shape, config.mode)
        codes, _ = self.codes_for(shape)
        outputs = self.bias.numel()
        out = torch.full_like(self.out_last[0], 7, dtype=torch.int32)
        conv2d(codes[0], None, self.w8_last[0], None, shape, config, out=out)
        left, right, top, bottom = shape.padding
        padded = F.pad(_picture_codes(codes[0], shape).double(), (left, right, top, bottom))
        for _ in range(48):
            b, h, w = (int(torch.randint(0, size, ())) for size in (shape.samples, *shape.out))
            h0, w0 = h * shape.stride[0], w * shape.stride[1]
            patch = padded[b, :, h0 : h0 + shape.kernel[0], w0 : w0 + shape.kernel[1]]
            sums = self.w8[0].double().reshape(outputs, -1) @ patch.flatten()
            if not torch.equal(out[b, :, h, w].double(), sums):
                return f"wrong sums at {(b, h, w)}"
        return "ok"

    def baselines(self) -> dict[str, Callable[[int], object]]:
        """cuDNN as the stock layer calls it, and the passes around a product."""

        def conv(x: list[torch.Tensor], w: list[torch.Tensor], bias: torch.Tensor | None) -> Callable[[int], object]:
            return lambda i: F.conv2d(x[i], w[i], bias, self.stride, self.border)

        flat, gapped = _for_mode(self.shape, "box"), _for_mode(self.shape, "gather")
        scale = torch.rand(1, device="cuda")
        return {
            "bf16": conv(self.x_last, self.w_last, self.bias),
            "bf16 no bias": conv(self.x_last, self.w_last, None),
            "bf16 nchw": conv(self.x, self.w, self.bias),
            "quantize": lambda i: quantize_pictures(self.x_last[i], flat, -127, 127),
            "quantize gaps": lambda i: quantize_pictures(self.x_last[i], gapped, -127, 127),
            "quantize nchw": lambda i: quantize_pictures(self.x[i], flat, -127, 127),
            "quantize static": lambda i: quantize_pictures(self.x_last[i], flat, -127, 127, scale),
            "copy": lambda i: self.x_last[i].clone(memory_format=torch.preserve_format),
            "relay weight": lambda i: taps_last(self.w8[i], self.shape.kernel, self.shape.stored_channels),
        }


def _candidates(shape: ConvShape, outputs: int, chosen: bool) -> list[ConvConfig]:
    """All configurations, or the one that the operator takes."""
    if not chosen:
        return conv_candidates(shape)
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return [choose_conv(shape, outputs, capability, zero_point=False)]


def time_convolution(
    label: str, convolution: Convolution, verdicts: dict[str, str], rounds: int, chosen: bool
) -> dict[str, Any]:
    """The record of one convolution."""
    start = time.perf_counter()
    buffers = _Buffers(convolution)
    shape = buffers.shape
    failures: dict[str, str] = {}
    family = f"{shape.kernel[0]}x{shape.kernel[0]}s{shape.stride[0]}"
    candidates = _candidates(shape, convolution[3], chosen)
    configs = {c.name: c for c in candidates if verdicts.get(f"{family} {c.name}") == "ok"}
    arms = buffers.baselines() | {name: buffers.product(config) for name, config in configs.items()}
    times = time_arms(arms, buffers.sets, rounds=rounds, failures=failures)
    ranked = sorted((name for name in configs if name in times), key=times.__getitem__)
    finalists: dict[str, Callable[[int], object]] = {"bf16": arms["bf16"], "bf16 nchw": arms["bf16 nchw"]}
    # The fastest of each kind of load: gaps cost time in the quantization.
    fastest = ranked[:FINALISTS] + [next((n for n in ranked if n.startswith(m)), "") for m in ("shift", "gather")]
    at_size = {}
    for name in dict.fromkeys(name for name in fastest if name):
        at_size[name] = buffers.check(configs[name])
        finalists[f"whole {name}"] = buffers.whole(configs[name], last=True)
        finalists[f"whole nchw {name}"] = buffers.whole(configs[name], last=False)
    finalists |= {"operator": buffers.operator(last=True), "operator nchw": buffers.operator(last=False)}
    whole = time_arms(finalists, buffers.sets, rounds=rounds, failures=failures)
    operations = 2 * shape.samples * shape.out[0] * shape.out[1] * convolution[3] * convolution[1] * shape.taps
    record = _record(label, convolution, times, whole, ranked, operations)
    del arms, finalists, buffers
    forget_counters()
    torch.cuda.empty_cache()
    return record | {
        "at size": at_size,
        "failures": failures,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _record(
    label: str,
    convolution: Convolution,
    times: dict[str, float],
    whole: dict[str, float],
    ranked: list[str],
    operations: int,
) -> dict[str, Any]:
    dense = times["bf16"]
    ratios: dict[str, Any] = {"product": dense / times[ranked[0]] if ranked else None}
    nchw = {name: time for name, time in whole.items() if name.startswith("whole nchw ")}
    last = {name: time for name, time in whole.items() if name.startswith("whole ") and name not in nchw}
    for key, arms, stock in (("whole", last, "bf16"), ("whole nchw", nchw, "bf16 nchw")):
        if arms:
            best = min(arms, key=arms.__getitem__)
            ratios[key], ratios[f"{key} config"] = whole[stock] / arms[best], best.removeprefix(key + " ")
    for key, stock in (("operator", "bf16"), ("operator nchw", "bf16 nchw")):
        if key in whole:
            ratios[key] = whole[stock] / whole[key]
    if last:
        ratios["whole to no bias"] = times["bf16 no bias"] / min(last.values())
    print(f"{label}: bf16 {dense:.1f} us ({operations / dense / 1e6:.0f} T), no bias {times['bf16 no bias']:.1f}, "
          f"nchw {times['bf16 nchw']:.1f}, quantize {times['quantize']:.1f}, nchw {times['quantize nchw']:.1f}, "
          f"copy {times['copy']:.1f}, relay {times['relay weight']:.1f}", flush=True)  # fmt: skip
    for name in ranked[:4]:
        print(f"    {dense / times[name]:.2f} {operations / times[name] / 1e6:5.0f} T  {name}", flush=True)
    shown = {key: round(value, 2) if isinstance(value, float) else value for key, value in ratios.items()}
    print(f"    {shown}", flush=True)
    return {
        "label": label,
        "convolution": list(convolution),
        "ratios": ratios,
        "microseconds": {name: round(times[name], 2) for name in sorted(times, key=times.__getitem__)},
        "whole": {name: round(whole[name], 2) for name in sorted(whole, key=whole.__getitem__)},
    }


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean and worst ratio over the convolutions of SDXL."""
    result = {}
    for kind in ("product", "whole", "whole to no bias", "whole nchw", "operator", "operator nchw"):
        ratios = [r["ratios"][kind] for r in records if r["label"] in SDXL_CONVOLUTIONS and r["ratios"].get(kind)]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            result[kind] = {"geometric mean": round(mean, 3), "worst": round(min(ratios), 3), "count": len(ratios)}
    return result


def main(arguments: list[str] | None = None) -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6, help="stop before the first shape after this time")
    parser.add_argument("--out", type=Path, default=Path("gpu_conv2d.json"), help="results, rewritten after each shape")
    parser.add_argument("--only", nargs="+", help="labels of shapes that contain one of these words")
    parser.add_argument("--chosen", action="store_true", help="time only the configurations that the operator takes")
    parser.add_argument("--rounds", type=int, default=9, help="timed replays per arm")
    parser.add_argument("--dry-run", action="store_true", help="checks alone, on the CPU: TRITON_INTERPRET=1")
    options = parser.parse_args(arguments)
    end = time.perf_counter() + 60 * options.minutes
    device = "cpu" if options.dry_run else "cuda"
    record: dict[str, Any] = {"environment": environment(device), "checks": {}, "shapes": []}
    print(json.dumps(record["environment"]), flush=True)
    convolutions = {**SDXL_CONVOLUTIONS, **SD15_CONVOLUTIONS}
    if options.only:
        convolutions = {k: v for k, v in convolutions.items() if any(word in k for word in options.only)}
    record["checks"] = run_checks(_checks(list(convolutions.values()), device, options.chosen), device)
    options.out.write_text(json.dumps(record, indent=1))
    if options.dry_run:
        return
    torch.backends.cudnn.benchmark = True
    for label, convolution in convolutions.items():
        if time.perf_counter() > end:
            print("out of time", flush=True)
            break
        record["shapes"].append(time_convolution(label, convolution, record["checks"], options.rounds, options.chosen))
        record["summary"] = _summary(record["shapes"])
        options.out.write_text(json.dumps(record, indent=1))
    print(json.dumps(record.get("summary")), flush=True)


if __name__ == "__main__":
    main()
