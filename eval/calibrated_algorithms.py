"""What each calibrated algorithm costs in output error, on samples it has not seen; the command of docs/calibration.md.

    python eval/calibrated_algorithms.py --model examples/reference_models/emoji_pixart \\
        --formats w3g64 w4g64 --seeds 0 1 2 --variants trained outliers --out results.json
    (on a GPU with 16 CPU cores: the same with --device cuda --workers 8)
    python eval/calibrated_algorithms.py --table results*.json      # print the table of earlier runs together

The denoiser is calibrated on calls that are recorded with one set of prompts, and its output compared with the dense
one on calls of other prompts and other noise: ``||dense - ours|| / ||dense||`` over all of them. A seed decides the
calls, the steps that they are taken from, and what algorithms draw. The variant ``outliers`` is a denoiser of the same
function with outlier channels. Results are written after each arm, and arms that the file has already are not run
again. With ``--workers`` several run at a time, each in a process of its own; seconds then are those of a busy machine.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

import diffuse_compress as dc
from diffuse_compress.evaluation.environment import command_line, describe_device
from diffuse_compress.evaluation.outliers import add_outlier_channels
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig

FORMATS = {
    "w4g64": dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT4, dc.PerGroup(64), symmetric=False)),
    "w3g64": dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT3, dc.PerGroup(64), symmetric=False)),
    "w2g64": dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT2, dc.PerGroup(64), symmetric=False)),
}
PRESETS = ("w8a8", "w4a8")
# Static inputs: formats of their own, for each observer; what works on one row stays weight-only, as in the preset.
STATIC = {
    name: dc.Scheme(
        dc.WeightScheme(dc.NumberFormat.INT8),
        dc.ActivationScheme(dc.NumberFormat.INT8, dc.PerTensor(), dynamic=False, symmetric=symmetric),
    )
    for name, symmetric in (("w8a8-static", True), ("w8a8-static-asymmetric", False))
}
# What must not differ between the arms of a file.
SETTINGS = ("iterations", "prompts", "samples", "steps", "guidance")


def algorithms(iterations: int | None) -> dict[str, AlgorithmConfig | list[AlgorithmConfig]]:
    """The arms; ``iterations`` instead of the defaults of those that learn."""
    steps = {} if iterations is None else {"iterations": iterations}
    return {
        "rtn": dc.RTNConfig(),
        "smoothquant": dc.SmoothQuantConfig(),
        "awq": dc.AWQConfig(),
        "gptq": dc.GPTQConfig(),
        "gptaq": dc.GPTQConfig(asymmetric=True),
        "awq+gptq": [dc.AWQConfig(), dc.GPTQConfig()],
        "adaround": dc.AdaRoundConfig(**steps),
        "brecq": dc.BRECQConfig(**steps),
        "awq+brecq": [dc.AWQConfig(), dc.BRECQConfig(**steps)],
        "adadim": dc.AdaDimConfig(),
        "tesseraq": dc.TesseraQConfig(),
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("examples/reference_models/emoji_pixart"))
    parser.add_argument("--formats", nargs="+", default=["w4g64", "w3g64"], choices=[*FORMATS, *PRESETS, *STATIC])
    parser.add_argument(
        "--observers", nargs="+", default=["minmax"], help="of static inputs; mse:2 is mse with that norm"
    )
    parser.add_argument("--algorithms", nargs="+", choices=list(algorithms(None)), help="default: all")
    parser.add_argument("--iterations", type=int, help="of the algorithms that learn")
    parser.add_argument("--prompts", type=int, default=8, help="to calibrate on, and as many to compare on")
    parser.add_argument("--samples", type=int, default=16, help="calls kept of each set")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=["trained"], choices=["trained", "outliers"])
    parser.add_argument("--device", help="where blocks are calibrated")
    parser.add_argument("--workers", type=int, default=1, help="arms that are run at a time")
    parser.add_argument("--out", type=Path, help="results as JSON; a file that is there is completed")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these results and stop")
    return parser.parse_args(arguments)


def record(pipe: Any, options: argparse.Namespace, seed: int) -> tuple[dc.Calibration, dc.Calibration]:
    """Samples to calibrate on, and others of other prompts to compare on."""
    lines = [line for line in (options.model / "eval_prompts.txt").read_text().splitlines() if line.strip()]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = [lines[index] for index in order[: 2 * options.prompts]]
    if len(prompts) < 2:
        raise SystemExit(f"{options.model / 'eval_prompts.txt'} must hold two prompts at least, got {len(prompts)}.")
    half = len(prompts) // 2
    given = {
        "num_samples": options.samples,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
    }
    return (
        dc.Calibration.record(pipe, prompts[:half], seed=1000 * seed, **given),
        dc.Calibration.record(pipe, prompts[half:], seed=1000 * seed + 500, **given),
    )


def outputs(model: torch.nn.Module, calibration: dc.Calibration) -> torch.Tensor:
    """What the denoiser gives for every sample, one after the other."""
    with torch.no_grad():
        found = [sample.call.run(model) for sample in calibration.of("transformer")]
    return torch.cat([(value if isinstance(value, tuple) else value.to_tuple())[0].double() for value in found])


@functools.lru_cache(maxsize=2)
def case(model: Path, prompts: int, samples: int, steps: int, guidance: float, variant: str, seed: int) -> Any:
    """(samples to calibrate on, samples to compare on, what the dense denoiser gives for these)."""
    options = argparse.Namespace(model=model, prompts=prompts, samples=samples, steps=steps, guidance=guidance)
    dense = load(options, variant)
    calibration, unseen = record(dense, options, seed)
    return calibration, unseen, outputs(dense.transformer, unseen)


def measure(options: argparse.Namespace, arm: str) -> dict[str, float]:
    """{"error", "seconds"} of an arm "variant/format/algorithm/seed"."""
    variant, form, name, seed = arm.split("/")
    fixed = (options.model, options.prompts, options.samples, options.steps, options.guidance)
    calibration, unseen, expected = case(*fixed, variant, int(seed))
    algorithm = algorithms(options.iterations)[name]
    config = dc.QuantizationConfig(**format_options(options)[form], algorithm=algorithm, seed=int(seed))
    data = calibration if config.spec.needs_calibration else None
    pipe, started = load(options, variant), time.perf_counter()
    pipe.compress(config, device=options.device, measure=False, calibration=data)
    seconds = time.perf_counter() - started
    error = float((outputs(pipe.transformer, unseen) - expected).norm() / expected.norm())
    return {"error": error, "seconds": seconds}


def measured(options: argparse.Namespace, arms: Sequence[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Each arm with its result, as they are done."""
    if options.workers == 1:
        for arm in arms:
            yield arm, measure(options, arm)
        return
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    with concurrent.futures.ProcessPoolExecutor(
        options.workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)
    ) as pool:
        running = {pool.submit(measure, options, arm): arm for arm in arms}
        try:
            for done in concurrent.futures.as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All arms: {"settings", "environments", "arms": {"variant/format/algorithm/seed": {"error", "seconds"}}}."""
    names = options.algorithms or list(algorithms(None))
    arms = [
        f"{variant}/{form}/{name}/{seed}"
        for seed in options.seeds
        for variant in options.variants
        for form in format_options(options)
        for name in names
    ]
    settings = {"model": options.model.name} | {key: getattr(options, key) for key in SETTINGS}
    results: dict[str, Any] = {"settings": settings, "environments": [], "arms": {}}
    if options.out is not None and options.out.exists():
        results = json.loads(options.out.read_text())
        if results["settings"] != settings:
            raise SystemExit(f"{options.out}: its arms were run with {results['settings']}, these with {settings}.")
    results["environments"].append(environment(options))
    left = [arm for arm in arms if arm not in results["arms"]]
    for arm, found in tqdm(measured(options, left), total=len(left), unit="arm"):
        results["arms"][arm] = found
        if options.out is not None:
            part = options.out.with_suffix(".part")  # a run that is killed leaves the last whole file
            part.write_text(json.dumps(results, indent=1))
            part.replace(options.out)
    return results


def format_options(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """{label: arguments of QuantizationConfig}."""
    found: dict[str, dict[str, Any]] = {}
    for form in options.formats:
        if form not in STATIC:
            found[form] = {"scheme": FORMATS.get(form, form)}
            continue
        for text in options.observers:
            kind, _, norm = text.partition(":")
            observer = dc.ObserverConfig(kind, **({"norm": float(norm)} if norm else {}))
            found[f"{form} {text}"] = {"scheme": STATIC[form], "modulation_scheme": "w8a16", "observer": observer}
    return found


def load(options: argparse.Namespace, variant: str) -> Any:
    """The pipeline, silent."""
    pipe = DiffusionPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    if variant == "outliers":
        add_outlier_channels(pipe.transformer)
    return pipe


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Where and with what the run was made."""
    return {
        "device": describe_device(options.device or "cpu", options.workers),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": command_line("python eval/calibrated_algorithms.py", sys.argv[1:]),
    }


def table(arms: dict[str, dict[str, float]]) -> str:
    """Mean of the seeds and their spread in percent, as Markdown."""
    cells: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for arm, found in arms.items():
        variant, form, name, _ = arm.split("/")
        cells.setdefault((variant, form, name), []).append(found)
    columns = list(dict.fromkeys((variant, form) for variant, form, _ in cells))
    lines = ["| | " + " | ".join(f"{form}, {variant}, % | s" for variant, form in columns) + " |"]
    lines.append("|---" * (1 + 2 * len(columns)) + "|")
    for name in (name for name in algorithms(None) if any(name == key[2] for key in cells)):
        shown = [_cell(cells.get((*column, name), [])) for column in columns]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _cell(found: Sequence[dict[str, float]]) -> str:
    if not found:
        return "|"
    errors = [100 * one["error"] for one in found]
    spread = f" ± {statistics.stdev(errors):.2g}" if len(errors) > 1 else ""
    return f"{statistics.mean(errors):.3g}{spread} | {statistics.mean(one['seconds'] for one in found):.0f}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, or print the table of results."""
    options = parse_arguments(arguments)
    if options.table:
        parts = [json.loads(path.read_text())["arms"] for path in options.table]
    else:
        parts = [run(options)["arms"]]
    print(table({arm: found for part in parts for arm, found in part.items()}))


if __name__ == "__main__":
    main()
