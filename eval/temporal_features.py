"""Errors of temporal features on the reference models, by how they are kept; the command of docs/temporal.md.

    OMP_NUM_THREADS=1 python eval/temporal_features.py

For each model, format and seed the features (what the layers of the timestep path give that nothing of the path reads)
are compared with the dense model's, at every timestep of the pipeline's loop of ``--steps`` steps:

- rtn: rounded to nearest;
- blocks: every block reconstructed (BRECQ) on samples of ``--samples`` calls of the loop, the path's layers in it with
  the rest;
- tib: codes of the path learned on the timesteps;
- cache: tables of the dense weights; what reads a label too is made of the weights rounded to nearest;
- auto: tables, and for what reads a label too learned codes.

The whole path is quantized, its embedder too. The error is RMS of the difference over RMS; a feature is mismatched
where it has a larger cosine with the dense feature of another timestep than with that of its own. Both are means over
layers, samples and timesteps. Conditions and samples are of the seed, and none of those that codes were learned on.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import diffuse_compress as dc
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.pipeline_call import from_noise
from diffuse_compress.quantization.algorithms.brecq import BRECQConfig
from diffuse_compress.temporal.block import TemporalBlock, edges_of, feature_layers, given_of
from diffuse_compress.temporal.config import TableConfig
from diffuse_compress.temporal.features import Features, mismatched, relative_error
from diffuse_compress.temporal.layout import layout_of
from diffuse_compress.temporal.prepare import loop_calls
from diffuse_compress.temporal.table import table_of
from diffuse_compress.temporal.tiar import observe_loop

MODELS = Path(__file__).resolve().parent.parent / "examples" / "reference_models"
NAMES = ("emoji_ddim", "emoji_sd", "emoji_dit")
# Formats of the path's layers in the two presets.
PATH_FORMAT = {"w8a8": "w8a16", "w4a8": "w4a16"}
PROMPTS = ("yellow smiling face", "red heart", "green apple", "blue car", "white cat face", "brown dog")


def items(name: str, seed: int, count: int) -> list[dict[str, Any]]:
    """Arguments of calls that draw ``count`` pictures in all, of conditions that follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    if name == "emoji_ddim":
        return [{"batch_size": 1, "generator": torch.Generator().manual_seed(1000 * seed + i)} for i in range(count)]
    if name == "emoji_sd":
        return [{"prompt": PROMPTS[(seed + number) % len(PROMPTS)]} for number in range(count)]
    labels = torch.randint(1000, (count,), generator=generator).tolist()
    return [{"class_labels": [label]} for label in labels]


def denoiser(pipe: Any) -> tuple[str, Any]:
    return ("unet", pipe.unet) if hasattr(pipe, "unet") else ("transformer", pipe.transformer)


def errors(names: list[str], dense: Features, found: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(relative error, share of mismatched features), means."""
    error, share = [], []
    for name in names:
        pair = (x.unflatten(0, (-1, dense.batch)).transpose(0, 1) for x in (dense.outputs[name], found[name]))
        for one, other in zip(*pair, strict=True):
            error.append(float(relative_error(one, other).mean()))
            share.append(float(mismatched(one, other).double().mean()))
    return statistics.fmean(error), statistics.fmean(share)


def main(argv: list[str] | None = None) -> None:
    """Print a table of markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NAMES)
    parser.add_argument("--presets", nargs="+", default=list(PATH_FORMAT))
    parser.add_argument("--ways", nargs="+", default=["rtn", "blocks", "tib", "cache", "auto"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=100, help="of BRECQ")
    options = parser.parse_args(argv)
    print("| model | format | way | error | lowest to highest | mismatched, % | seconds |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models:
        for preset in options.presets:
            measure(name, preset, options)


def measure(name: str, preset: str, options: argparse.Namespace) -> None:
    """Rows of one model and format."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(options.seeds):
        for way, values in one_seed(name, preset, seed, options).items():
            found.setdefault(way, []).append(values)
    for way, values in found.items():
        error, share, seconds = zip(*values, strict=True)
        span = f"{min(error):.2g} to {max(error):.2g}"
        cells = [name, preset, way, f"{statistics.fmean(error):.2g}", span, f"{100 * statistics.fmean(share):.2f}"]
        print(f"| {' | '.join([*cells, f'{statistics.median(seconds):.1f}'])} |", flush=True)


def one_seed(name: str, preset: str, seed: int, options: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """{way: (error, share of mismatched features, seconds of compress)}."""
    pipe = DiffusionPipeline.from_pretrained(MODELS / name)
    pipe.set_progress_bar_config(disable=True)
    component, model = denoiser(pipe)
    layout = layout_of(model, TableConfig())
    item = items(name, 100 + seed, 1)[0]
    arguments = from_noise(pipe, {**item, "num_inference_steps": options.steps}, seed)
    calls = loop_calls(pipe, {component: model}, arguments)[component]
    dense = observe_loop(layout, model, calls)
    edges = edges_of([dense])
    block = TemporalBlock({layer: model.get_submodule(layer) for layer in dense.outputs}, edges)
    names, given = feature_layers(block, layout.layers), given_of(block, dense)
    overrides = dict.fromkeys(dense.outputs, PATH_FORMAT[preset])
    kept = {way: dc.TFMQConfig(maintenance=way, num_inference_steps=options.steps) for way in ("tib", "cache", "auto")}
    drawn = [{**i, "num_inference_steps": options.steps} for i in items(name, seed, 2)]
    calibration = dc.Calibration.record(pipe, drawn, num_samples=options.samples) if "blocks" in options.ways else None
    blocks = QuantizationConfig(preset, BRECQConfig(iterations=options.iterations), overrides=overrides, seed=seed)
    nearest = QuantizationConfig(preset, dc.RTNConfig(), overrides=overrides, seed=seed)
    ways: dict[str, tuple[Any, ...]] = {"rtn": (nearest,), "blocks": (blocks,)}
    ways |= {way: (nearest, config) for way, config in kept.items()}
    results = {}
    for way in options.ways:
        other = copy.deepcopy(pipe)
        begin = time.perf_counter()
        other.compress(*ways[way], calibration=calibration if way == "blocks" else None, measure=False)
        seconds = time.perf_counter() - begin
        compressed = getattr(other, component)
        block = TemporalBlock({layer: compressed.get_submodule(layer) for layer in dense.outputs}, edges)
        found = block.outputs(given, looked_up(compressed, dense))
        results[way] = (*errors(names, dense, found), seconds)
    return results


def looked_up(model: Any, dense: Features) -> dict[str, torch.Tensor]:
    """[rows, out] of what the tables of a compressed model hold."""
    table = table_of(model)
    return {
        name: rows.repeat_interleave(dense.batch, dim=0)
        for schedule in (() if table is None else table.schedules)
        for part in schedule.rows
        for name, rows in part.rows().items()
        if name in dense.outputs
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
