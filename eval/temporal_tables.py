"""Temporal tables on the reference models: step time, bytes and error; the command of docs/temporal.md.

    OMP_NUM_THREADS=1 python eval/temporal_tables.py

Every model runs the denoising loop of its own scheduler on random latents and conditions of a fixed seed, with and
without a table in turn, ``--repeats`` times. A step's time is the median, over all steps but the first of each run, of
the thread's own seconds, so that other work on the machine counts little: run it with one thread. The first step builds
what is missing and is shown by itself. The error is that of what layers give in all steps, against the layers
computed: RMS of the difference over RMS, of the worst layer, and the largest difference over the row's RMS.
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
from torch import nn

from diffuse_compress.temporal.config import TableConfig, TableFormat
from diffuse_compress.temporal.lookup import LayerLookup
from diffuse_compress.temporal.table import attach_table, detach_table

MODELS = Path(__file__).resolve().parent.parent / "examples" / "reference_models"
NAMES = ("emoji_ddim", "emoji_sd", "emoji_pixart", "emoji_dit", "emoji_wan")


def inputs_of(model: Any, batch: int, seed: int = 0) -> dict[str, Any]:
    """Random arguments of the model's forward, without the timestep."""
    config, generator = model.config, torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    kind = type(model).__name__
    size = config.get("sample_size") or 16
    if kind == "WanTransformer3DModel":
        return {
            "hidden_states": randn(config.in_channels, 3, 16, 16),
            "encoder_hidden_states": randn(16, config.text_dim),
        }
    latents = randn(config.in_channels, size, size)
    if kind == "DiTTransformer2DModel":
        labels = torch.randint(config.num_embeds_ada_norm, (batch,), generator=generator)
        return {"hidden_states": latents, "class_labels": labels}
    if kind == "PixArtTransformer2DModel":
        sizes = {"resolution": None, "aspect_ratio": None}
        text = randn(16, config.caption_channels)
        return {"hidden_states": latents, "encoder_hidden_states": text, "added_cond_kwargs": sizes}
    if kind == "UNet2DConditionModel":
        return {"sample": latents, "encoder_hidden_states": randn(16, config.cross_attention_dim)}
    return {"sample": latents}


@torch.no_grad()
def run(model: nn.Module, scheduler: Any, inputs: dict[str, Any], steps: int) -> list[float]:
    """Seconds of every step."""
    scheduler.set_timesteps(steps)
    sample_name = next(iter(inputs))
    sample, seconds = inputs[sample_name], []
    for t in scheduler.timesteps:
        begin = time.thread_time()
        found = model(**{**inputs, sample_name: sample, "timestep": t.expand(len(sample)), "return_dict": False})[0]
        seconds.append(time.thread_time() - begin)
        sample = scheduler.step(found[:, : sample.shape[1]], t, sample, return_dict=False)[0]
    return seconds


def times(model: nn.Module, scheduler: Any, inputs: dict[str, Any], steps: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of steps by arm, taken in turn; "build" are first steps of runs with a table."""
    tabled = copy.deepcopy(model)
    attach_table(tabled)
    found: dict[str, list[float]] = {"live": [], "table": [], "build": []}
    for arm in (model, tabled):
        run(arm, scheduler, inputs, steps)
    for _ in range(repeats):
        found["live"] += run(model, scheduler, inputs, steps)[1:]
        first, *rest = run(tabled, scheduler, inputs, steps)
        found["table"] += rest
        found["build"].append(first)
    return found


def outputs(model: nn.Module, names: list[str], scheduler: Any, inputs: dict[str, Any], steps: int) -> dict[str, Any]:
    """What layers give in every step."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, a, output, name=name: seen.setdefault(name, []).append(output.clone())
        )
        for name in names
    ]
    run(model, scheduler, inputs, steps)
    for handle in handles:
        handle.remove()
    # Those before the last ones are of the build.
    return {name: values[-steps:] for name, values in seen.items()}


def errors(model: nn.Module, scheduler: Any, inputs: dict[str, Any], steps: int, form: str, exact: bool | None) -> Any:
    """(bytes of the tables, worst relative RMS, worst relative maximum)."""
    table = attach_table(model, TableConfig(table=TableFormat(form), exact=exact, conditions=False))
    names = [name for name in table.lookups if name not in table.left]
    found = outputs(model, names, scheduler, inputs, steps)
    sizes = table.nbytes()
    detach_table(model)
    reference = outputs(model, names, scheduler, inputs, steps)
    rms = maximum = 0.0
    for name in names:
        for value, live in zip(found[name], reference[name], strict=True):
            scale = live.double().square().mean().sqrt()
            rms = max(rms, float((value - live).double().square().mean().sqrt() / scale))
            maximum = max(maximum, float((value - live).abs().max() / scale))
    return sizes["schedules"] + sizes["request"], rms, maximum


def main(argv: list[str] | None = None) -> None:
    """Print two tables of markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NAMES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args(argv)
    rows, precision = [], []
    for name in options.models:
        pipe = DiffusionPipeline.from_pretrained(MODELS / name)
        model = (getattr(pipe, "unet", None) or pipe.transformer).eval()
        inputs = inputs_of(model, options.batch)
        seconds = times(model, pipe.scheduler, inputs, options.steps, options.repeats)
        live, tabled, build = (1e3 * statistics.median(seconds[arm]) for arm in ("live", "table", "build"))
        table = attach_table(model)
        run(model, pipe.scheduler, inputs, options.steps)
        sizes = [f"{size / 1024:.0f}" for size in list(table.nbytes().values())[:3]]
        cells = [name, _layers(table.lookups), *sizes, f"{live:.2f}", f"{tabled:.2f}", f"{build:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
        detach_table(model)
        for form, exact in (("live", None), ("live", False), *((f.value, None) for f in list(TableFormat)[1:])):
            size, rms, maximum = errors(model, pipe.scheduler, inputs, options.steps, form, exact)
            label = f"{form}{', all rows at once' if exact is False else ''}"
            precision.append(f"| {name} | {label} | {size / 1024:.1f} | {rms:.1e} | {maximum:.1e} |")
    heads = ["model", "layers", "schedule, KiB", "request, KiB", "weights, KiB", "live, ms", "tables, ms", "first, ms"]
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows, sep="\n")
    print("\n| model | table | KiB | RMS | maximum |", "|---|---|---|---|---|", *precision, sep="\n")


def _layers(lookups: dict[str, LayerLookup]) -> str:
    kinds = [lookup.dependence.value for lookup in lookups.values()]
    return " + ".join(str(kinds.count(kind)) for kind in ("timestep", "timestep and condition", "condition"))


if __name__ == "__main__":
    main()
