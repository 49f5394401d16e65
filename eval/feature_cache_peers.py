"""Feature caches beside those of other libraries and beside fewer steps: same model, same run, equal work.

    python eval/feature_cache_peers.py --model examples/reference_models/emoji_dit
    python eval/feature_cache_peers.py --model examples/reference_models/emoji_sd --guidance 3 --steps 50

Work is the denoiser's FLOPs over the loop. Schedules of ours leave out what `--speedups` asks for, units priced by
their FLOPs so that this does not hang on the machine. Of every other method that setting is drawn whose share is
nearest, as counted on two pictures. "Fewer steps" has as many steps as take the time of the calibrated schedule as
measured, and as take its work, both rounded up in its favour. Arms, of which `--methods` selects:

    fewer steps           of the same scheduler
    calibrated            `FeatureCacheConfig`: whole steps with the forecast of outputs, the default; copying; by block
    whole steps           by block at even distances (FORA), copied, and with the forecast of blocks
    learned               `HarmoniCaConfig` by block, also from the calibrated schedule by block; "Learning-to-Cache" is
                          its objective, where all steps count alike
    First-block, TaylorSeer, MagCache, PAB   of diffusers, through `enable_cache`
    DBCache               of cache-dit, if it is installed

DiT, PixArt and UNets have no `CacheMixin`: it is mixed in for those arms, and a cache context is open around their
calls. What a method cannot be put on is left out with a line that says so. MagCache's ratios are measured on a prompt
that is not compared.

Pictures start from the same noise in all arms, in float32, `--prompts` times `--seeds` of them. Speed is the time of
the denoiser's part of the loop with everything computed over that of the arm, of the first 16 pictures, drawn in turns.
PSNR is to the pictures of all steps, with its 95 % bootstrap interval over pictures. The classifier says how many
pictures are what was asked for, and the Fréchet distance is that of its embeddings to the pictures of all steps.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers import CacheMixin, DiffusionPipeline
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffuse_compress.caching import rehearsal as rehearsal_module
from diffuse_compress.caching.calibrate import calibrate_cache
from diffuse_compress.caching.config import FeatureCacheConfig, HarmoniCaConfig
from diffuse_compress.caching.forecast import with_forecast
from diffuse_compress.caching.recording import ATTENTION_ON_CPU, LoopClock, Profile, profile_units
from diffuse_compress.caching.rehearsal import Rehearsal, arguments_of_items
from diffuse_compress.caching.runtime import apply_cache, remove_cache
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.caching.training import train_cache
from diffuse_compress.caching.units import Unit, sites_of
from diffuse_compress.caching.whole_steps import even_steps
from diffuse_compress.calls import Call
from diffuse_compress.components import GROUPS, model_components
from diffuse_compress.errors import DiffuseCompressError
from diffuse_compress.evaluation.features import load_classifier
from diffuse_compress.evaluation.frechet import feature_statistics, frechet_distance
from diffuse_compress.evaluation.images import accepted_options
from diffuse_compress.evaluation.metrics import psnr
from diffuse_compress.evaluation.statistics import bootstrap_mean
from diffuse_compress.pipeline_call import seeded

_CALL = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 24}
_TRAJECTORIES = 8
_TRAINED = 64
_COUNTED = 2
_BATCH = 16
LEARNED = {
    "learned (HarmoniCa)": ("leave_one_out", False),
    "Learning-to-Cache objective": ("none", False),
    "calibrated by block, then learned": ("leave_one_out", True),
}
METHODS = ("ours", "learned", "diffusers", "cache-dit")


def priced_by_flops(model: nn.Module, units: Sequence[Unit], call: Call, **options: Any) -> Profile:
    """In place of `profile_units`: a step takes a second, a unit its share of the FLOPs."""
    flops = profile_units(model, units, call, **{**options, "repeats": 1}).flops
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter, torch.no_grad():
        call.run(model)
    shares = (1000 * flops / counter.get_total_flops()).float()
    return Profile(shares, max(0.0, 1000 - float(shares.sum())), flops)


Switch = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes a context inside of which the denoiser has a cache."""


class Bench:
    """A pipeline with what it is asked for, and what its pictures are compared with.

    Attributes:
        compared: [(item, caption, seed)] of all pictures.
        others: items that are not compared, to calibrate and train on.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.learned = arguments.learned
        self.steps, self.guidance, self.batch_size = arguments.steps, arguments.guidance, arguments.batch_size
        self.pipe: Any = DiffusionPipeline.from_pretrained(arguments.model).to(arguments.device)
        self.pipe.set_progress_bar_config(disable=True)
        parts = model_components(self.pipe).items()
        self.name, self.model = next((name, part) for name, part in parts if GROUPS["denoisers"].match(name))
        self.classifier = load_classifier(arguments.classifier)
        items = self._items(arguments)
        self.others = [item for item, _ in items[-_TRAINED:]]
        self.compared = [(*pair, 1000 * seed) for seed in arguments.seeds for pair in items[: arguments.prompts]]
        self.options = accepted_options(self.pipe, _CALL) | {"guidance_scale": self.guidance}
        self.clock = LoopClock()
        self.full_flops = self.reference = self.embedded = None
        self.done: list[str] = []

    def _items(self, arguments: argparse.Namespace) -> list[tuple[Any, str]]:
        if hasattr(self.pipe, "get_label_ids"):
            names = sorted(self.pipe.labels, key=self.pipe.labels.get)
            random.Random(0).shuffle(names)
            return [(self.pipe.labels[name], name) for name in names]
        return [(prompt, prompt) for prompt in arguments.asked.read_text().splitlines()]

    def draw(self, first: int, steps: int, count: int = _BATCH, output: str = "np") -> tuple[Any, float]:
        """(output for some pictures, seconds of the denoiser's part of the loop)."""
        part = self.compared[first : first + count]
        name = "class_labels" if hasattr(self.pipe, "get_label_ids") else "prompt"
        generators = [seeded(seed + first + index) for index, (_, _, seed) in enumerate(part)]
        given = {name: [item for item, _, _ in part], "generator": generators, "output_type": output}
        self.clock.reset()
        with torch.no_grad():
            made = self.pipe(num_inference_steps=steps, **given, **self.options).images
        seconds = self.clock.seconds
        return (torch.as_tensor(made).permute(0, 3, 1, 2) if output == "np" else made), seconds

    def left_out(self, steps: int, switch: Switch) -> float:
        """Share of the denoiser's FLOPs over the loop that do not run."""

        def counted(steps: int) -> int:
            with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
                self.draw(0, steps, _COUNTED, "latent")
            return sum(counter.get_flop_counts()[type(self.model).__name__].values())

        if self.full_flops is None:
            self.full_flops = counted(self.steps)
        with switch():
            return 1 - counted(steps) / self.full_flops

    def row(self, arm: str, switch: Switch, steps: int | None = None, share: float | None = None) -> float:
        """Draw all pictures of an arm and print its row; returns its speed. ``share`` is left out, if it is known."""
        steps = self.steps if steps is None else steps
        full = reduced = 0.0
        pictures, reference = [], []
        with self.clock.on(self.model):
            for first in range(0, len(self.compared), _BATCH):
                timed = first == 0
                if timed or self.reference is None:
                    made, seconds = self.draw(first, self.steps)
                    full += seconds if timed else 0.0
                    reference.append(made)
                with switch():
                    made, seconds = self.draw(first, steps)
                reduced += seconds if timed else 0.0
                pictures.append(made)
        if self.reference is None:
            self.reference = torch.cat(reference)
            self.embedded = feature_statistics(self.classifier.embeddings(self.reference))
        drawn = torch.cat(pictures)
        values = psnr(self.reference, drawn)
        quality = f"{bootstrap_mean(values.clamp(max=100.0)):}" if bool(values.isfinite().all()) else "equal"
        accuracy = 100 * self.classifier.accuracy(drawn, [caption for _, caption, _ in self.compared])
        distance = frechet_distance(feature_statistics(self.classifier.embeddings(drawn)), self.embedded)
        share = self.left_out(steps, switch) if share is None else share
        speed = full / reduced
        print(
            f"| {arm} | {speed:.2f}x | {100 * share:.0f} % | {quality} | {accuracy:.1f} % | {distance:.3g} |",
            flush=True,
        )
        return speed

    def nearest(self, settings: Sequence[tuple[str, Switch]], share: float) -> tuple[str, Switch, float]:
        """The setting that leaves out about as much, of some that leave out ever more, and how much."""
        tried: list[tuple[str, Switch, float]] = []
        for text, switch in settings:
            tried.append((text, switch, self.left_out(self.steps, switch)))
            if tried[-1][2] >= share:
                break
        return min(tried, key=lambda setting: abs(setting[2] - share))

    # --- ours ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def scheduled(self, schedule: Schedule) -> Iterator[None]:
        """With a schedule of ours."""
        apply_cache(self.model, schedule)
        try:
            yield
        finally:
            remove_cache(self.model)

    def calibrated(self, speedup: float, **options: Any) -> Schedule:
        """What the fast calibration finds."""
        config = FeatureCacheConfig(target_speedup=speedup, num_inference_steps=self.steps, seed=10_000, **options)
        return calibrate_cache(self.pipe, self.others, config, **self.options).schedules[self.name]

    def arms_of_ours(self, speedup: float, denoising_steps: int, learned: bool) -> Iterator[tuple[str, Switch]]:
        """The calibrated schedule comes first."""
        call = {**self.options, "num_inference_steps": self.steps}
        found = self.calibrated(speedup)
        yield "calibrated", lambda: self.scheduled(found)
        for name, options in (
            ("calibrated, copied", {"history": 1}),
            ("calibrated, by block", {"granularity": "block"}),
            ("calibrated, by block, copied", {"granularity": "block", "history": 1}),
        ):
            other = self.calibrated(speedup, **options)
            yield name, lambda other=other: self.scheduled(other)
        rehearsal = Rehearsal(self.pipe, "block", 10_000)
        rehearsal.record(arguments_of_items(self.pipe, self.others, call, _TRAJECTORIES), None)
        full = rehearsal.full_schedule(self.name)
        reused = round(self.steps * (1 - float(found.mask.float().mean())))
        computed = even_steps(torch.arange(self.steps) == 0, self.steps - reused)
        whole = full.with_mask(computed[:, None].expand_as(full.mask))
        yield "whole steps (FORA)", lambda: self.scheduled(whole)
        trajectories = rehearsal.recorders[self.name].trajectories
        ahead = with_forecast(whole, sites_of(self.model, whole.units), trajectories)
        yield "whole steps, forecast", lambda: self.scheduled(ahead)
        if not learned:
            return
        begun = {self.name: self.calibrated(speedup, granularity="block")}
        for name, (estimator, begins) in LEARNED.items():
            if name not in self.learned:
                continue
            config = HarmoniCaConfig(
                target_speedup=speedup,
                trajectories=max(1, denoising_steps // self.steps),
                batch_size=self.batch_size,
                learning_rate=0.1 if denoising_steps < 2000 else 0.02,
                estimator=estimator,
                seed=20_000,
            )
            trained = train_cache(self.pipe, self.others, config, initial=begun if begins else None, **call)
            schedule = trained.schedules[self.name]
            yield name, lambda schedule=schedule: self.scheduled(schedule)

    # --- diffusers' -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stock(self, config: Any) -> Iterator[None]:
        """With a cache of diffusers, in a cache context."""
        cls = type(self.model)
        if not issubclass(cls, CacheMixin):
            self.model.__class__ = type(cls.__name__, (cls, CacheMixin), {})
        try:
            self.model.enable_cache(config)
            try:
                with self.model.cache_context("all"):
                    yield
            finally:
                self.model._reset_stateful_cache()
                self.model.disable_cache()
        finally:
            self.model.__class__ = cls

    def arms_of_diffusers(self) -> Iterator[tuple[str, list[tuple[str, Switch]]]]:
        """(name, settings) of each method."""
        seen: list[float] = []

        def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[:] = [float(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0])]

        self.model.register_forward_pre_hook(watch, with_kwargs=True)

        def setting(text: str, make: Callable[[], Any]) -> tuple[str, Switch]:
            return text, lambda: self.stock(make())

        yield (
            "First-block cache",
            [
                setting(f"threshold {value}", lambda value=value: diffusers.FirstBlockCacheConfig(threshold=value))
                for value in (0.02, 0.05, 0.08, 0.12, 0.2, 0.3)
            ],
        )
        branches = [r".*transformer_blocks\.\d+\.(attn\d?|ff)"]
        yield (
            "TaylorSeer, all branches",
            [
                setting(
                    f"every {every}th step",
                    lambda every=every: diffusers.TaylorSeerCacheConfig(
                        cache_interval=every,
                        max_order=1,
                        cache_identifiers=branches,
                        taylor_factors_dtype=torch.float32,
                    ),
                )
                for every in (2, 3, 4, 5)
            ],
        )
        ratios = self._magnitudes()
        if ratios is not None:
            yield (
                "MagCache",
                [
                    setting(
                        f"threshold {value}",
                        lambda value=value: diffusers.MagCacheConfig(
                            threshold=value, num_inference_steps=self.steps, mag_ratios=list(ratios)
                        ),
                    )
                    for value in (0.03, 0.06, 0.12, 0.24, 0.5)
                ],
            )
        yield (
            "PAB, attention",
            [
                setting(
                    f"every {every}th step",
                    lambda every=every: diffusers.PyramidAttentionBroadcastConfig(
                        spatial_attention_block_skip_range=every,
                        cross_attention_block_skip_range=every,
                        current_timestep_callback=lambda: seen[0],
                    ),
                )
                for every in (2, 3, 4, 6)
            ],
        )

    def _magnitudes(self) -> list[float] | None:
        """MagCache's ratios, measured by itself, which are only printed."""
        found: list[float] = []
        config = diffusers.MagCacheConfig(calibrate=True, num_inference_steps=self.steps)
        call = {**self.options, "num_inference_steps": self.steps, "output_type": "latent", "generator": seeded(9)}
        (arguments,) = arguments_of_items(self.pipe, self.others[:1], call)
        try:
            with self.stock(config), contextlib.redirect_stdout(_Lines(found)):
                self.pipe(**arguments)
        except (ValueError, IndexError, DiffuseCompressError) as error:
            print(f"(MagCache does not apply: {error})", flush=True)
        return found or None

    # --- cache-dit --------------------------------------------------------------------------------------------

    def arms_of_cache_dit(self) -> Iterator[tuple[str, list[tuple[str, Switch]]]]:
        """DBCache, last, since it changes the pipeline's class."""
        os.environ.setdefault("CACHE_DIT_ENABLE_LOGGERS_SUPPRESS", "1")  # its log goes to stdout
        import cache_dit

        @contextlib.contextmanager
        def cached(threshold: float, warmup: int) -> Iterator[None]:
            config = cache_dit.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                residual_diff_threshold=threshold,
                max_warmup_steps=warmup,
                num_inference_steps=self.steps,
            )
            cache_dit.enable_cache(self.pipe, cache_config=config)
            try:
                yield
            finally:
                cache_dit.disable_cache(self.pipe)

        yield (
            "DBCache (cache-dit)",
            [
                (f"threshold {value}, {warmup} first steps", lambda value=value, warmup=warmup: cached(value, warmup))
                for value in (0.08, 0.15, 0.3, 0.6)
                for warmup in (2, 4)
            ],
        )


class _Lines:
    """Takes the list of numbers that is printed."""

    def __init__(self, found: list[float]) -> None:
        self.found = found

    def write(self, text: str) -> int:
        """Part of what is printed."""
        if text.strip().startswith("["):
            start = text.rfind("[") + 1
            numbers = text[start : text.find("]", start)]
            with contextlib.suppress(ValueError):
                self.found[:] = [float(value) for value in numbers.split(",")]
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


def compare(bench: Bench, speedup: float, methods: Sequence[str], denoising_steps: int) -> None:
    """All rows for a speed-up that our calibration is asked for."""
    share = 0.0
    for number, (name, switch) in enumerate(bench.arms_of_ours(speedup, denoising_steps, "learned" in methods)):
        if number and "ours" not in methods and name not in LEARNED:
            continue
        speed = bench.row(f"{name}, for {speedup:g}x" if number < 2 else name, switch)
        if number == 0:
            share = bench.left_out(bench.steps, switch)
            for steps in sorted({math.ceil(bench.steps / speed), math.ceil(bench.steps * (1 - share))}):
                bench.row(f"{steps} steps", contextlib.nullcontext, steps)
    others = {"diffusers": bench.arms_of_diffusers, "cache-dit": bench.arms_of_cache_dit}
    for library in (library for library in others if library in methods):
        try:
            for name, settings in others[library]():
                _row_of_nearest(bench, name, settings, share)
        except ImportError as error:
            print(f"({error})", flush=True)


def _row_of_nearest(bench: Bench, name: str, settings: Sequence[tuple[str, Switch]], share: float) -> None:
    try:
        text, switch, found = bench.nearest(settings, share)
        bench.row(f"{name}, {text}", switch, share=found)
    except Exception as error:  # methods of other libraries fail in their own ways
        print(f"({name} does not apply: {type(error).__name__}: {str(error)[:160]})", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.6])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="calibrated comes first")
    parser.add_argument("--denoising-steps", type=int, default=900, help="that a router is trained for")
    parser.add_argument("--learned", nargs="+", default=list(LEARNED), choices=list(LEARNED))
    parser.add_argument("--batch-size", type=int, default=1, help="items of a trajectory of the router training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--classifier", type=Path, help="folder of the judge; emoji_pixart beside the model by default")
    parser.add_argument("--asked", type=Path, help="file of prompts; those of the judge's folder by default")
    options = parser.parse_args(arguments)
    options.classifier = options.classifier or options.model.parent / "emoji_pixart"
    options.asked = options.asked or options.classifier / "eval_prompts.txt"
    bench = Bench(options)
    print(
        "| arm | speed | FLOPs left out | PSNR, dB (95 %) | as asked | Fréchet |\n|---|---|---|---|---|---|", flush=True
    )
    bench.row(f"all {bench.steps} steps", contextlib.nullcontext)
    with mock.patch.object(rehearsal_module, "profile_units", priced_by_flops):
        for speedup in options.speedups:
            compare(bench, speedup, options.methods, options.denoising_steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
