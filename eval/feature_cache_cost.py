"""What a feature cache costs and saves at true shapes: steps, loops, memory, calibration and router training.

    python eval/feature_cache_cost.py --out bench/feature_cache.jsonl                    # on a GPU, under 9 minutes
    python eval/feature_cache_cost.py --parts training flux-w8a8 pixart-w8a8 --out bench/feature_cache.jsonl
    python eval/feature_cache_cost.py --tiny --device cpu                                # a rehearsal without a GPU

Weights are random: speed and memory, no quality. Loops are those of the stock pipelines, from prompts' embeddings to
latents, of FLUX.1-dev (1024x1024, 512 tokens of text) and PixArt-XL-2-1024 (guidance in one batch of two), in bfloat16
and with "w8a8", blocks as units where nothing else is said. Every result is a JSON line, written as soon as it is
known; nothing is started after ``--minutes``. Lines by ``what``:

    step        milliseconds of the denoiser in a step that computes everything and in one that reuses everything,
                by blocks ("all"), and as one with a forecast ("all by model")
    loop        seconds of the denoiser's part of a loop with everything computed, and with a schedule that reuses
                ``reused_share`` of its time by the profile: ``predicted`` and ``real`` speed-up, and the bytes kept.
                Runs without and with the cache take turns. Schedules: "by model", the denoiser as one; "whole steps";
                "middle blocks" in three steps of four, which fills fewer steps; "scattered", any block in any step,
                which merges nothing
    calibrate   seconds of `calibrate_cache` on eight trajectories of 28 steps
    training    seconds of `train_cache` for 1,000 denoising steps, an estimate of lambda every 500 included, and its
                peak memory, on the DiT-XL/2 shape at 256x256, eight labels with guidance; "unfrozen" computes the
                gradients of all weights, too, as the released code of HarmoniCa does

Modes: eager; "blocks", each compiled (fullgraph); "variants", `compile_variants`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import diffuse_compress  # noqa: F401  (attaches compress)
from diffuse_compress.caching import trainer
from diffuse_compress.caching.calibrate import calibrate_cache
from diffuse_compress.caching.config import FeatureCacheConfig, HarmoniCaConfig
from diffuse_compress.caching.recording import LoopClock, profile_units
from diffuse_compress.caching.runtime import apply_cache, cache_of, compile_variants, remove_cache
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.caching.training import train_cache
from diffuse_compress.caching.units import units_of
from diffuse_compress.caching.whole_steps import even_steps
from diffuse_compress.evaluation.cost_lines import CostLines
from diffuse_compress.evaluation.true_shapes import ShapePipeline, StepTimes

REUSED_SHARE = 0.55
MODES = {
    "eager": ("all by model", "by model", "all", "whole steps", "middle blocks", "scattered"),
    "blocks": ("all by model", "by model", "all", "whole steps", "middle blocks"),
    "variants": ("whole steps",),
}
PARTS = ("flux", "calibrate", "pixart", "training", "flux-w8a8", "pixart-w8a8")
SHAPES = {"flux": "flux1_dev", "calibrate": "flux1_dev", "pixart": "pixart_xl_2_1024"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of the router training")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=10, help="of the loops that are timed")
    parser.add_argument("--repeats", type=int, default=2, help="loops of each kind")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no measurement after that time")
    parser.add_argument("--tiny", action="store_true", help="small models and inputs, to see that everything runs")
    parser.add_argument("--out", type=Path, help="append JSON lines here as well")
    return parser.parse_args(arguments)


# --- schedules --------------------------------------------------------------------------------------------------


def masks(steps: int, cost_ms: torch.Tensor, other_ms: float) -> dict[str, torch.Tensor]:
    """Masks [steps, units] of which each reuses `REUSED_SHARE` of the loop's time, as nearly as it can from below."""
    units, total = len(cost_ms), float(cost_ms.sum())
    wanted = REUSED_SHARE * steps * (total + other_ms)
    found: dict[str, torch.Tensor] = {}
    whole = torch.ones(steps, units, dtype=torch.uint8)
    count = min(steps - 1, math.floor(wanted / total))
    whole[[1 + round(i * (steps - 2) / max(1, count - 1)) for i in range(count)]] = 0
    left, rest = wanted - count * total, whole[1:].any(dim=1).nonzero().flatten() + 1
    for unit in range(units if len(rest) else 0):  # part of one more step
        if float(cost_ms[unit]) <= left:
            whole[rest[0], unit], left = 0, left - float(cost_ms[unit])
    found["whole steps"] = whole
    often = [step for step in range(1, steps) if step % 4]
    middle, order = torch.ones(steps, units, dtype=torch.uint8), sorted(range(units), key=lambda u: abs(u - units / 2))
    for unit in order:
        if float(((1 - middle.float()) @ cost_ms).sum()) + len(often) * float(cost_ms[unit]) <= wanted:
            middle[often, unit] = 0
    found["middle blocks"] = middle
    scattered, left = torch.ones(steps, units, dtype=torch.uint8), wanted
    for place in torch.randperm((steps - 1) * units, generator=torch.Generator().manual_seed(0)).tolist():
        step, unit = 1 + place // units, place % units
        if float(cost_ms[unit]) <= left:
            scattered[step, unit], left = 0, left - float(cost_ms[unit])
    found["scattered"] = scattered
    return found


def _by_model(model: nn.Module, full: Schedule) -> dict[str, Schedule]:
    """Schedules of the model as one unit, with a forecast of two outputs: all steps, and `REUSED_SHARE` of them."""
    cost = full.cost_ms.sum()[None] + full.other_ms
    one = Schedule.full(units_of(model, "model"), full.num_steps, full.model, cost_ms=cost)
    first = torch.arange(full.num_steps) == 0
    computed = even_steps(first, full.num_steps - int(REUSED_SHARE * full.num_steps + 1e-9))
    found = {"all by model": first[:, None], "by model": computed[:, None]}
    outputs = torch.tensor([1.5, -0.5]).expand(full.num_steps, 1, 2)
    inputs = torch.tensor([0.1, -0.2, 0.1]).expand(full.num_steps, 3)
    return {name: one.with_mask(mask, outputs.contiguous(), inputs.contiguous()) for name, mask in found.items()}


# --- measurements -----------------------------------------------------------------------------------------------


class Bench:
    """Runs what was asked for and writes the lines."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.lines = CostLines(partial(print, flush=True), self.device, options.out, options.minutes, tiny=options.tiny)

    def run(self, part: str) -> None:
        """One of ``PARTS``."""
        if part == "training":
            self.training()
            return
        kind, _, scheme = part.partition("-")
        subject = ShapePipeline(SHAPES[kind], self.device, tiny=self.options.tiny)
        if scheme:
            subject.model.compress(scheme, measure=False)
        (self.calibration if kind == "calibrate" else self.loops)(subject, scheme or "bf16")

    def loops(self, subject: ShapePipeline, scheme: str) -> None:
        """Steps and loops in all modes; compiled ones come last, since blocks stay compiled."""
        for mode in MODES:
            if mode not in self.options.modes or self.lines.over:
                continue
            named = {"shape": subject.shape, "scheme": scheme, "mode": mode}
            with self.lines.reported(what="loop", **named):
                if mode == "blocks":
                    subject.compile_blocks()
                self._mode(subject, mode, named)
        torch._dynamo.reset()

    def _mode(self, subject: ShapePipeline, mode: str, named: Mapping[str, str]) -> None:
        steps, model = self.options.steps, subject.model
        subject.run(2)  # compiles, and warms up
        units = units_of(model)
        profile = profile_units(model, units, subject.captured(), repeats=3)
        full = Schedule.full(units, steps, type(model).__name__, cost_ms=profile.cost_ms, other_ms=profile.other_ms)
        reused = torch.zeros_like(full.mask)
        reused[0] = 1
        chosen = {"all": reused, **masks(steps, profile.cost_ms, profile.other_ms)}
        schedules = {name: full.with_mask(mask) for name, mask in chosen.items()} | _by_model(model, full)
        for name in MODES[mode]:
            if self.lines.over:
                return
            apply_cache(model, schedules[name])
            try:
                if mode == "variants":
                    compile_variants(model)
                measure = self._step if name.startswith("all") else self._loop
                measure(subject, name, named)
            finally:
                remove_cache(model)

    def _step(self, subject: ShapePipeline, name: str, named: Mapping[str, str]) -> None:
        cache = cache_of(subject.model)
        times: dict[bool, list[float]] = {}
        for enabled in (True, False):
            cache.enable(subject.model, enabled)
            subject.run(self.options.steps)
            found = []
            for _ in range(self.options.repeats):
                clock = StepTimes(subject.model, self.device)
                with clock.on():
                    subject.run(self.options.steps)
                found += clock.milliseconds()[1:]
            times[enabled] = found
        full, reused = statistics.median(times[False]), statistics.median(times[True])
        ratio = reused / full
        times = {"full_ms": full, "reused_ms": reused, "ratio": ratio}
        self.lines.write(what="step", **named, schedule=name, **times, goal="ratio <= 0.03")

    def _loop(self, subject: ShapePipeline, name: str, named: Mapping[str, str]) -> None:
        steps, cache = self.options.steps, cache_of(subject.model)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        subject.run(steps)
        for _ in range(self.options.repeats):
            for enabled in (False, True):
                cache.enable(subject.model, enabled)
                seconds[enabled].append(_seconds(subject, steps))
        schedule = cache.schedule
        real = statistics.median(seconds[False]) / statistics.median(seconds[True])
        predicted = schedule.predicted_speedup
        size = sum(value.numel() * value.element_size() for value in subject.model.state_dict().values())
        self.lines.write(
            what="loop",
            **named,
            schedule=name,
            steps=steps,
            reused_share=1 - 1 / predicted,
            full_seconds=statistics.median(seconds[False]),
            cached_seconds=statistics.median(seconds[True]),
            predicted=predicted,
            real=real,
            real_over_predicted=real / predicted,
            kept_bytes=cache.peak_bytes,
            kept_over_model=cache.peak_bytes / size,
            goal="real >= 1.9 at a share of 0.55, real_over_predicted >= 0.93, kept_over_model < 0.06",
        )

    def calibration(self, subject: ShapePipeline, scheme: str) -> None:
        """Eight trajectories of 28 steps, of the dense model's own loop."""
        started = time.perf_counter()
        steps = 10 if self.options.tiny else 28
        config = FeatureCacheConfig(target_speedup=1.6, num_inference_steps=steps)
        found = calibrate_cache(subject.pipe, subject.items, config, **subject.call)
        self.lines.write(
            what="calibrate",
            shape=subject.shape,
            scheme=scheme,
            steps=steps,
            trajectories=len(subject.items),
            seconds=time.perf_counter() - started,
            checking_forwards=found.forwards,
            predicted=found.predicted_speedup,
            measured=found.measured_speedup,
            goal="seconds < 60",
        )

    def training(self) -> None:
        """A router on the DiT-XL/2 shape, frozen and not, in float32 (with TF32) and bfloat16."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            for dtype in (getattr(torch, name) for name in self.options.dtypes):
                for frozen in (True, False):
                    if self.lines.over:
                        return
                    named = {"shape": "dit_xl_2_256", "dtype": str(dtype).removeprefix("torch."), "frozen": frozen}
                    with self.lines.reported(what="training", **named):
                        self._train(dtype, frozen, named)
        finally:
            torch.set_float32_matmul_precision(before)

    def _train(self, dtype: torch.dtype, frozen: bool, named: Mapping[str, Any]) -> None:
        subject = ShapePipeline("dit_xl_2_256", self.device, tiny=self.options.tiny, dtype=dtype)
        steps, batch = 10, 2 if self.options.tiny else 8
        marks: list[float] = []

        def callback(stage: str, done: int, total: int, metrics: Any) -> None:
            if stage.startswith("Training"):
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                    if done == 1:
                        torch.cuda.reset_peak_memory_stats(self.device)
                marks.append(time.perf_counter())

        config = HarmoniCaConfig(
            target_speedup=1.3,
            granularity="branch",
            trajectories=4,
            batch_size=batch,
            num_inference_steps=steps,
            refresh_every=2 * steps,
        )
        with contextlib.nullcontext() if frozen else _unfrozen(subject.model):
            train_cache(subject.pipe, subject.items[:batch], config, callback=callback, **subject.call)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        # Trajectories 2 and 4 are plain, 3 begins with an estimate.
        taken = [after - before for before, after in itertools.pairwise(marks)]
        plain, estimate = min(taken), max(0.0, max(taken) - min(taken))
        self.lines.write(
            what="training",
            **named,
            batch=batch,
            steps=steps,
            seconds_per_step=plain / steps,
            seconds_of_lambda=estimate,
            seconds_per_1000_steps=1000 * plain / steps + 2 * estimate,
            peak_bytes=peak,
        )


def _seconds(subject: ShapePipeline, steps: int) -> float:
    """Of the denoiser's part of a loop."""
    clock = LoopClock()
    with clock.on(subject.model):
        subject.run(steps)
        return clock.stop()


@contextlib.contextmanager
def _unfrozen(model: nn.Module) -> Iterator[None]:
    """Inside, a router's training computes the gradients of all weights of ``model``, and drops them."""
    grad: Callable[..., Any] = torch.autograd.grad
    weights = list(model.parameters())

    def all_gradients(outputs: Any, inputs: list[torch.Tensor], **options: Any) -> Any:
        return grad(outputs, [*inputs, *weights], **options)[: len(inputs)]

    @contextlib.contextmanager
    def thawed(models: Any) -> Iterator[None]:
        model.requires_grad_(True)
        try:
            yield
        finally:
            model.requires_grad_(False)

    with mock.patch.object(trainer, "_frozen", thawed), mock.patch.object(torch.autograd, "grad", all_gradients):
        yield


def main(arguments: list[str] | None = None) -> int:
    """Measure everything that was asked for."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    bench = Bench(options)
    for part in PARTS:
        if part in options.parts and not bench.lines.over:
            with bench.lines.reported(what=part):
                bench.run(part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
