"""Pictures with a feature cache beside those of fewer steps; the commands of docs/caching.md.

    python eval/feature_cache.py --model examples/reference_models/emoji_pixart --prompts 32 --steps 20
    python eval/feature_cache.py --model examples/reference_models/emoji_pixart --prompts 32 --speedups 1.33 2

Every arm draws the same prompts from the same starting noise, in float32, and is compared with the pictures of all
steps without a cache by its mean PSNR.

With ``--shares`` arms have an equal share of reused work: N of T steps leave out 1 - N/T. "whole steps" reuses all
blocks at even distances (FORA), "searched" is the first schedule that `calibrate_cache` tries, with that share; both
copy the last change or forecast from the last two. Every unit counts as one unit of time, so that results do not hang
on the machine.

With ``--speedups`` arms take an equal time as predicted from a profile of this machine: "calibrated" is the result of
`calibrate_cache`, "trained" that of `train_cache` (HarmoniCa's router), from random scores or from the calibrated
schedule, on prompts that are not compared; fewer steps are rounded up, in their favour.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffuse_compress.caching.calibrate import calibrate_cache
from diffuse_compress.caching.config import FeatureCacheConfig, HarmoniCaConfig
from diffuse_compress.caching.forecast import with_forecast
from diffuse_compress.caching.observing import observed
from diffuse_compress.caching.recording import Recorder
from diffuse_compress.caching.runtime import apply_cache, remove_cache
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.caching.search import cheapest_within, reuse_errors
from diffuse_compress.caching.training import train_cache
from diffuse_compress.caching.units import sites_of, units_of
from diffuse_compress.components import GROUPS, model_components
from diffuse_compress.evaluation.images import accepted_options
from diffuse_compress.evaluation.metrics import psnr
from diffuse_compress.pipeline_call import seeded

_CALL = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 24}
_TRAJECTORIES = 8
_TRAINED = 64


def pictures(pipe: Any, items: list[Any], steps: int, guidance: float, seed: int) -> torch.Tensor:
    """[B, 3, H, W] in [0, 1]."""
    call = accepted_options(pipe, _CALL)
    name = "prompt" if isinstance(items[0], str) else "class_labels"
    drawn = []
    for start in range(0, len(items), 16):
        part = items[start : start + 16]
        generators = [seeded(seed + start + index) for index in range(len(part))]
        made = pipe(
            **{name: part},
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
            **call,
        )
        drawn.append(torch.as_tensor(made.images).permute(0, 3, 1, 2))
    return torch.cat(drawn)


def record(pipe: Any, model: torch.nn.Module, units: Any, items: list[Any], arguments: argparse.Namespace) -> Recorder:
    """Eight trajectories of other items and seeds than those that are compared."""
    recorder = Recorder(units)
    with observed(model, units, recorder):
        for index, item in enumerate(items):
            pictures(pipe, [item], arguments.steps, arguments.guidance, 10_000 + index)
            recorder.end_run()
    return recorder


def schedules(recorder: Recorder, model: torch.nn.Module, units: Any, share: float) -> dict[str, Schedule]:
    """Arms by name."""
    steps = len(recorder.timesteps)
    full = Schedule.full(units, steps, type(model).__name__, timesteps=recorder.timesteps, levels=recorder.levels)
    count = round(steps * (1 - share))
    computed = {round(index * (steps - 1) / max(1, count - 1)) for index in range(count)}
    whole = torch.zeros_like(full.mask)
    whole[sorted(computed)] = 1
    gap, evenly = max(1, round(1 / (1 - share))), torch.ones(steps, dtype=torch.float64)
    cost = torch.ones(len(units))
    saved = share * steps * len(units)
    searched = cheapest_within(reuse_errors(recorder.trajectories), evenly, cost, saved)
    ahead = cheapest_within(reuse_errors(recorder.trajectories, gap=gap), evenly, cost, saved)
    sites = sites_of(model, units)
    arms = {"whole steps": full.with_mask(whole), "searched": full.with_mask(searched)}
    for name, mask in (("whole steps, forecast", whole), ("searched, forecast", ahead)):
        arms[name] = with_forecast(full.with_mask(mask), sites, recorder.trajectories)
    return arms


def compare_speedups(pipe: Any, model: torch.nn.Module, arguments: argparse.Namespace, others: list[Any]) -> None:
    """Rows of arms that take an equal time."""
    call = accepted_options(pipe, _CALL)
    call |= {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
    compared = items_of(arguments)[: arguments.prompts]

    def drawn(steps: int) -> torch.Tensor:
        return pictures(pipe, compared, steps, arguments.guidance, arguments.seed)

    reference = drawn(arguments.steps)
    print("| speed-up, predicted | arm | PSNR, dB |\n|---|---|---|", flush=True)
    for speedup in arguments.speedups:
        fewer = math.ceil(arguments.steps / speedup)
        value = psnr(reference, drawn(fewer)).mean()
        print(f"| {arguments.steps / fewer:.2f} | {fewer} steps | {value:.2f} |", flush=True)
        for granularity in arguments.granularity:
            options = {"target_speedup": speedup, "granularity": granularity, "history": arguments.history}
            fast = FeatureCacheConfig(seed=arguments.seed + 10_000, **options)
            calibrated = calibrate_cache(pipe, others, fast, **call)
            config = HarmoniCaConfig(
                trajectories=arguments.trajectories,
                learning_rate=arguments.learning_rate,
                estimator=arguments.estimator,
                seed=arguments.seed + 20_000,
                **options,
            )
            arms = {
                "calibrated": lambda found=calibrated: found,
                "trained": lambda config=config: train_cache(pipe, others, config, **call),
                "calibrated, then trained": lambda config=config, found=calibrated: train_cache(
                    pipe, others, config, initial=found.schedules, **call
                ),
            }
            for name, make in arms.items():
                found = make()
                (schedule,) = found.schedules.values()
                apply_cache(model, schedule)
                value = psnr(reference, drawn(arguments.steps)).mean()
                remove_cache(model)
                print(f"| {found.predicted_speedup:.2f} | {name}, by {granularity} | {value:.2f} |", flush=True)


def items_of(arguments: argparse.Namespace) -> list[Any]:
    """Prompts or class labels of the model."""
    listed = arguments.model / "eval_prompts.txt"
    return listed.read_text().splitlines() if listed.exists() else list(range(1000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--granularity", nargs="+", default=["block", "branch"])
    parser.add_argument("--speedups", type=float, nargs="+", default=[])
    parser.add_argument("--history", type=int, default=2, help="with --speedups: of the forecast; 1 copies")
    parser.add_argument("--trajectories", type=int, default=60, help="of a router's training")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of a router's training")
    parser.add_argument("--estimator", default="leave_one_out", help="of lambda in a router's training")
    arguments = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    model = next(part for name, part in model_components(pipe).items() if GROUPS["denoisers"].match(name))
    items = items_of(arguments)
    if arguments.speedups:
        compare_speedups(pipe, model, arguments, items[-_TRAINED:])
        return
    compared, others = items[: arguments.prompts], items[-_TRAJECTORIES:]

    def drawn(steps: int) -> torch.Tensor:
        return pictures(pipe, compared, steps, arguments.guidance, arguments.seed)

    reference = drawn(arguments.steps)
    print("| reused | arm | PSNR, dB |\n|---|---|---|", flush=True)
    for share in arguments.shares:
        fewer = round(arguments.steps * (1 - share))
        print(f"| {100 * share:.0f} % | {fewer} steps | {psnr(reference, drawn(fewer)).mean():.2f} |", flush=True)
        for granularity in arguments.granularity:
            units = units_of(model, granularity)
            recorder = record(pipe, model, units, others, arguments)
            for name, schedule in tqdm(schedules(recorder, model, units, share).items(), desc=granularity):
                apply_cache(model, schedule)
                value = psnr(reference, drawn(arguments.steps)).mean()
                remove_cache(model)
                reused = 100 * schedule.reused
                print(f"| {reused:.0f} % | {name}, by {granularity} | {value:.2f} |", flush=True)


if __name__ == "__main__":
    main()
