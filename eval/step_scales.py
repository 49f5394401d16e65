"""Trajectory errors of static input scales, one for all steps or one for each, on the reference models; the command of
docs/temporal.md.

    OMP_NUM_THREADS=1 python eval/step_scales.py

Every linear and convolution of the denoiser has int8 weights, one scale per row, and int8 inputs of one static scale
(and zero point), its timestep path too, whose codes are learned on the timesteps. The ways differ in these scales:

- overall: one for all steps;
- tib: one for each step in the layers of the timestep path;
- all: one for each step in every layer;
- dynamic: beside them, a scale for every row of an input, measured in each call.

A way's pictures are drawn from the same noise as the dense model's, none of which ranges were seen in. Errors are
``RMS(x - y) / RMS(x)``, x the dense model's: "output", what the denoiser gives where the dense loop was, and
"trajectory", what it is given in its own loop, both as means over the steps; "end", the pictures (latents).
``--run-steps`` runs another number of steps than was calibrated.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import diffuse_compress as dc
from diffuse_compress.calls import Call
from diffuse_compress.pipeline_call import from_noise
from diffuse_compress.temporal.features import relative_error
from diffuse_compress.temporal.step_scales import step_scales_of

MODELS = Path(__file__).resolve().parent.parent / "examples" / "reference_models"
NAMES = ("emoji_ddim", "emoji_sd")
WAYS = ("overall", "tib", "all", "dynamic")
PROMPTS = ("yellow smiling face", "red heart", "green apple", "blue car", "white cat face", "brown dog")


def scheme(way: str, symmetric: bool) -> dc.Scheme:
    """The format of every layer."""
    if way == "dynamic":
        return dc.Scheme(dc.WeightScheme("int8"), dc.ActivationScheme("int8"))
    static = dc.ActivationScheme("int8", dc.PerTensor(), dynamic=False, symmetric=symmetric)
    return dc.Scheme(dc.WeightScheme("int8"), static)


def items(name: str, seed: int, count: int, steps: int) -> list[dict[str, Any]]:
    """Arguments of calls that draw four pictures each, of noise and prompts that follow from the seed."""
    found = []
    for number in range(count):
        given: dict[str, Any] = {
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed + number),
        }
        if name == "emoji_ddim":
            given["batch_size"] = 4
        else:
            first = (seed + number) % len(PROMPTS)
            given["prompt"] = [PROMPTS[(first + i) % len(PROMPTS)] for i in range(4)]
        found.append(given)
    return found


@dataclass
class Trajectory:
    """Arguments of the denoiser's calls, its outputs, and what the pipeline gives in the end."""

    calls: list[Call]
    outputs: list[torch.Tensor]
    end: torch.Tensor


def trajectory(pipe: Any, arguments: dict[str, Any]) -> Trajectory:
    """Of a call of the pipeline."""
    calls, outputs = [], []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Call(args, kwargs).copied())
        outputs.append(output[0].clone())

    handle = pipe.unet.register_forward_hook(look, with_kwargs=True)
    form = {} if "batch_size" in arguments else {"output_type": "latent"}
    try:
        images = pipe(**from_noise(pipe, arguments | form | ({} if form else {"output_type": "numpy"}), 0)).images
    finally:
        handle.remove()
    return Trajectory(calls, outputs, torch.as_tensor(images))


def errors(pipe: Any, dense: Trajectory, arguments: dict[str, Any]) -> tuple[float, float, float]:
    """(of the output, of the trajectory, of its end)."""
    own = trajectory(pipe, arguments)
    outputs = [(x, call.run(pipe.unet)[0]) for call, x in zip(dense.calls, dense.outputs, strict=True)]
    given = [(one.args[0], other.args[0]) for one, other in zip(dense.calls, own.calls, strict=True)]
    pairs = outputs, given, [(dense.end, own.end)]
    return tuple(  # type: ignore[return-value]
        statistics.fmean(float(relative_error(x.flatten(), y.flatten())) for x, y in some) for some in pairs
    )


def one_seed(name: str, seed: int, options: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """{way: (error of the output, of the trajectory, of its end, seconds of compress, bytes of step scales)}."""
    pipe = DiffusionPipeline.from_pretrained(MODELS / name)
    pipe.set_progress_bar_config(disable=True)
    run_steps = options.run_steps or options.steps
    asked = items(name, 100 + 1000 * seed, options.items, run_steps)
    dense = [trajectory(pipe, arguments) for arguments in asked]
    results = {}
    for way in options.ways:
        other, form = copy.deepcopy(pipe), scheme(way, options.symmetric)
        weights = dc.QuantizationConfig(form, dc.RTNConfig(), overrides={"*": form}, seed=seed)
        scope = way if way in ("tib", "all") else None
        path = dc.TFMQConfig(maintenance="tib", num_inference_steps=options.steps, iterations=100, scope=scope)
        data = None if way == "dynamic" else items(name, 1000 * seed, options.items, options.steps)
        begin = time.perf_counter()
        other.compress(weights, path, calibration=data, measure=False)
        seconds = time.perf_counter() - begin
        found = [errors(other, one, given) for one, given in zip(dense, asked, strict=True)]
        scales = step_scales_of(other.unet)
        size = 0 if scales is None else scales.qparams.nbytes
        results[way] = (*(statistics.fmean(some) for some in zip(*found, strict=True)), seconds, size)
    return results


def main(argv: list[str] | None = None) -> None:
    """Print a table of markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NAMES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=20, help="that are calibrated")
    parser.add_argument("--run-steps", type=int, help="of the loops that are compared; the same by default")
    parser.add_argument("--items", type=int, default=2, help="calls of the pipeline to calibrate on, and to compare")
    parser.add_argument("--symmetric", action="store_true", help="no zero points")
    options = parser.parse_args(argv)
    print("| model | way | output | trajectory | end | seconds | KiB of step scales |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models:
        found = [one_seed(name, seed, options) for seed in options.seeds]
        for way in options.ways:
            *values, seconds, size = zip(*(results[way] for results in found), strict=True)
            cells = [f"{statistics.fmean(error):.3g} ({min(error):.3g}-{max(error):.3g})" for error in values]
            rest = [f"{statistics.median(seconds):.1f}", f"{size[0] / 1024:.1f}"]
            print(f"| {' | '.join([name, way, *cells, *rest])} |", flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
