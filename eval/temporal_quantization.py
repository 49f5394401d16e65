"""TFMQ beside the same quantization without it: what the pictures lose; the command of docs/temporal.md.

    python eval/temporal_quantization.py --device cuda --out tfmq.json                     # three models, three seeds
    OMP_NUM_THREADS=1 python eval/temporal_quantization.py --rehearse                      # a minute on a CPU
    python eval/temporal_quantization.py --table tfmq*.json                                # of earlier runs together
    python eval/temporal_quantization.py --evaluations                                     # what recording costs

All arms quantize the same layers to the same formats, the whole timestep path among them, on the same recorded calls:

- rtn: rounded to nearest;
- blocks: every block reconstructed (BRECQ), its temporal projections in it;
- freeze: the same without them; these are rounded to nearest where they are computed, and tables serve the loop;
- tfmq: the same, and the path is learned on the timesteps;
- tfmq-auto: the same, tables where they are nearer;
- tfmq-split: tfmq, and convolutions over skip connections in two parts;
- tfmq-split-attention: attention's products on int8 codes, too.

A seed decides the calibration and what algorithms draw. ``--count`` pictures of other conditions are drawn from fixed
noise. The error is RMS of the difference of what the loop ends with (latents, pixels of emoji_ddim) over RMS, of all
samples together; the Fréchet distance is between the emoji classifier's features of both sets of pictures. Arms that
``--out`` has are not run again.

``--evaluations`` counts calls of the denoiser: of recording, which runs each item once, and of the authors' way to the
same calls, which for every step that is kept runs the loop from noise up to it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

import diffuse_compress as dc
from diffuse_compress.evaluation.environment import command_line, describe_device
from diffuse_compress.evaluation.features import ClassifierExtractor
from diffuse_compress.evaluation.frechet import feature_statistics, frechet_distance
from diffuse_compress.families.base import Dependence
from diffuse_compress.quantization.algorithms.brecq import BRECQConfig
from diffuse_compress.temporal.layout import layout_of

MODELS = Path(__file__).resolve().parent.parent / "examples" / "reference_models"
CLASSIFIER = MODELS / "emoji_pixart"
GUIDANCE = {"emoji_ddim": {}, "emoji_sd": {"guidance_scale": 3.0}, "emoji_dit": {"guidance_scale": 2.0}}
# Of the timestep path's layers.
PATH_FORMAT = {"w8a8": "w8a16", "w4a8": "w4a16", "w4a16": "w4a16"}
ARMS = ("rtn", "blocks", "freeze", "tfmq", "tfmq-auto", "tfmq-split", "tfmq-split-attention")
MAINTENANCE = {
    "freeze": "cache",
    "tfmq": "tib",
    "tfmq-auto": "auto",
    "tfmq-split": "tib",
    "tfmq-split-attention": "tib",
}
# What must not differ between the arms of a file.
SETTINGS = ("steps", "count", "samples", "items", "iterations")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(GUIDANCE), choices=list(GUIDANCE))
    parser.add_argument("--formats", nargs="+", default=["w4a8", "w8a8"], choices=list(PATH_FORMAT))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--count", type=int, default=1024, help="pictures of each arm")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--items", type=int, default=16, help="trajectories to record")
    parser.add_argument("--samples", type=int, default=64, help="calls kept of them")
    parser.add_argument("--iterations", type=int, default=300, help="of BRECQ, for each layer and then for the block")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="results as JSON; a file that is there is completed")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these results and stop")
    parser.add_argument("--evaluations", action="store_true", help="count calls of the denoiser and stop")
    parser.add_argument("--rehearse", action="store_true", help="one model, format and seed, and few of everything")
    options = parser.parse_args(arguments)
    if options.rehearse:
        few = {"models": ["emoji_ddim"], "formats": ["w4a8"], "seeds": [0], "steps": 4, "count": 8, "items": 2}
        vars(options).update(few, samples=4, iterations=5, batch_size=8)
    return options


def conditions(name: str, count: int, *, calibration: bool) -> list[Any]:
    """What a model is asked for, ``count`` times; None of its own. Those of calibration are none of the others."""
    if name == "emoji_ddim":
        return [None] * count
    if name == "emoji_dit":
        known: list[Any] = list(range(3 if calibration else 0, 1000, 7))
    else:
        lines = [x for x in (CLASSIFIER / "eval_prompts.txt").read_text().splitlines() if x and not x.startswith("#")]
        known = lines[1::2] if calibration else lines[::2]
    return [known[index % len(known)] for index in range(count)]


def call(name: str, asked: list[Any], seeds: list[int], steps: int) -> dict[str, Any]:
    """Arguments of one call of the pipeline."""
    given = {
        "emoji_ddim": {"batch_size": len(seeds)},
        "emoji_dit": {"class_labels": asked},
        "emoji_sd": {"prompt": asked},
    }
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return {**given[name], **GUIDANCE[name], "generator": generators, "num_inference_steps": steps}


def load(name: str, device: str) -> Any:
    """The pipeline, silent."""
    pipe = DiffusionPipeline.from_pretrained(MODELS / name).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe: Any) -> nn.Module:
    """The model that is quantized."""
    found: nn.Module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return found


def draw(pipe: Any, name: str, options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the loop ends with, pictures [n, 3, H, W] uint8), both on the CPU."""
    asked, ends, pictures = conditions(name, options.count, calibration=False), [], []
    stock, last = pipe.scheduler.step, {}

    def step(*args: Any, **kwargs: Any) -> Any:
        found = stock(*args, **kwargs)
        last["sample"] = found[0] if isinstance(found, tuple) else found.prev_sample
        return found

    pipe.scheduler.step = step
    try:
        for first in range(0, options.count, options.batch_size):
            seeds = [1_000_000 + number for number in range(first, min(first + options.batch_size, options.count))]
            part = asked[first : first + len(seeds)]
            made = pipe(**call(name, part, seeds, options.steps), output_type="np").images
            ends.append(last["sample"].float().cpu())
            pictures.append((torch.as_tensor(made).permute(0, 3, 1, 2) * 255).round().to(torch.uint8))
    finally:
        del pipe.scheduler.step
    return torch.cat(ends), torch.cat(pictures)


def record(pipe: Any, name: str, seed: int, options: argparse.Namespace) -> dc.Calibration:
    """Calls of some trajectories, of the seed."""
    asked = conditions(name, options.items * (seed + 1), calibration=True)[-options.items :]
    numbers = [10_000 * (seed + 1) + index for index in range(options.items)]
    items = [call(name, [one], [number], options.steps) for one, number in zip(asked, numbers, strict=True)]
    return dc.Calibration.record(pipe, items, num_samples=options.samples, seed=seed)


def methods(arm: str, form: str, path: list[str], seed: int, options: argparse.Namespace) -> list[Any]:
    """What ``compress`` is given."""
    algorithm = dc.RTNConfig() if arm == "rtn" else BRECQConfig(iterations=options.iterations)
    further = {"split_skips": "split" in arm, "attention": "int8" if "attention" in arm else None}
    overrides = dict.fromkeys(path, PATH_FORMAT[form])
    weights = dc.QuantizationConfig(form, algorithm, overrides=overrides, seed=seed, **further)
    if arm not in MAINTENANCE:
        return [weights]
    return [weights, dc.TFMQConfig(maintenance=MAINTENANCE[arm], num_inference_steps=options.steps)]


class Case:
    """A model, what it draws dense, and how far others are from that."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.judge = ClassifierExtractor(CLASSIFIER, options.device, size=64)
        pipe = load(name, options.device)
        layers = layout_of(denoiser(pipe), dc.TableConfig()).layers
        self.path = [layer for layer, kind in layers.items() if kind is not Dependence.CONDITION]
        self.ends, pictures = draw(pipe, name, options)
        self.features = self.features_of(pictures)
        self.calibrations: dict[int, dc.Calibration] = {}

    def features_of(self, pictures: torch.Tensor) -> Any:
        """Statistics of the classifier's features."""
        parts = [self.judge(part.to(self.options.device))["features"].cpu() for part in pictures.split(64)]
        return feature_statistics(torch.cat(parts))

    def measure(self, form: str, arm: str, seed: int) -> dict[str, float]:
        """{"error", "distance", "seconds"} of one arm."""
        pipe = load(self.name, self.options.device)
        if seed not in self.calibrations:
            self.calibrations = {seed: record(pipe, self.name, seed, self.options)}
        given = {} if arm == "rtn" else {"calibration": self.calibrations[seed]}
        began = time.perf_counter()
        pipe.compress(*methods(arm, form, self.path, seed, self.options), **given, measure=False)
        seconds = time.perf_counter() - began
        ends, pictures = draw(pipe, self.name, self.options)
        distance = frechet_distance(self.features_of(pictures), self.features)
        return {"error": float((ends - self.ends).norm() / self.ends.norm()), "distance": distance, "seconds": seconds}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All arms: {"settings", "environments", "arms": {"model/format/arm/seed": what was measured}}."""
    settings = {key: getattr(options, key) for key in SETTINGS}
    results: dict[str, Any] = {"settings": settings, "environments": [], "arms": {}}
    if options.out is not None and options.out.exists():
        results = json.loads(options.out.read_text())
        if results["settings"] != settings:
            raise SystemExit(f"{options.out}: its arms were run with {results['settings']}, these with {settings}.")
    results["environments"].append(
        {
            "device": describe_device(options.device, 1),
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "command": command_line("python eval/temporal_quantization.py", sys.argv[1:]),
        }
    )
    for name in options.models:
        wanted = [(seed, form, arm) for seed in options.seeds for form in options.formats for arm in options.arms]
        left = [one for one in wanted if f"{name}/{one[1]}/{one[2]}/{one[0]}" not in results["arms"]]
        case = Case(name, options) if left else None
        for seed, form, arm in left:
            assert case is not None
            found = results["arms"][f"{name}/{form}/{arm}/{seed}"] = case.measure(form, arm, seed)
            print(f"{name}/{form}/{arm}/{seed}: {found}", file=sys.stderr, flush=True)
            if options.out is not None:
                part = options.out.with_suffix(".part")  # a run that is killed leaves the last whole file
                part.write_text(json.dumps(results, indent=1))
                part.replace(options.out)
    return results


def table(arms: dict[str, dict[str, float]]) -> str:
    """Means of the seeds, lowest and highest in brackets, as Markdown."""
    found: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for key, values in arms.items():
        found.setdefault(tuple(key.split("/")[:3]), []).append(values)
    lines = ["| model | format | arm | error | Fréchet distance | seconds |", "|---" * 6 + "|"]
    for key, values in sorted(found.items(), key=lambda item: (*item[0][:2], ARMS.index(item[0][2]))):
        cells = [_span([one[name] for one in values]) for name in ("error", "distance")]
        seconds = f"{statistics.median(one['seconds'] for one in values):.0f}"
        lines.append(f"| {' | '.join([*key, *cells, seconds])} |")
    return "\n".join(lines)


def _span(values: list[float]) -> str:
    spread = f" ({min(values):.3g}-{max(values):.3g})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{spread}"


class _Enough(Exception):
    """The step that is kept was reached."""


def evaluations(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Calls of the denoiser, and seconds: of recording, and of a run from noise up to each call that was kept."""
    pipe, counted = load(name, options.device), {"calls": 0, "last": -1}

    def count(module: nn.Module, args: Any) -> None:
        counted["calls"] += 1
        if counted["calls"] == counted["last"]:
            raise _Enough

    handle = denoiser(pipe).register_forward_pre_hook(count)
    began = time.perf_counter()
    calibration = record(pipe, name, 0, options)
    ours, seconds = counted["calls"], time.perf_counter() - began
    began, total = time.perf_counter(), 0
    asked = conditions(name, options.items, calibration=True)
    kept = [sample for component in calibration.components for sample in calibration.of(component)]
    for sample in kept:
        counted.update(calls=0, last=sample.step + 1)
        try:
            pipe(**call(name, [asked[sample.item]], [10_000 + sample.item], options.steps), output_type="np")
        except _Enough:
            pass
        total += counted["calls"]
    handle.remove()
    theirs = time.perf_counter() - began
    return {"kept": len(kept), "calls": ours, "seconds": seconds, "their calls": total, "their seconds": theirs}


def main(arguments: list[str] | None = None) -> None:
    """Measure, count, or print the table of results."""
    options = parse_arguments(arguments)
    if options.evaluations:
        print("| model | calls kept | denoiser run | s | from noise for each | s | ratio |\n" + "|---" * 7 + "|")
        for name in options.models:
            kept, ours, seconds, theirs, their_seconds = evaluations(name, options).values()
            cells = [name, kept, ours, f"{seconds:.1f}", theirs, f"{their_seconds:.1f}", f"{theirs / ours:.2f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
        return
    files = [json.loads(path.read_text()) for path in options.table] if options.table else [run(options)]
    print(table({arm: found for file in files for arm, found in file["arms"].items()}))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
