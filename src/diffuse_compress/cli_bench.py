"""``diffuse-compress bench``: tiles, layers, quality."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.arms import call_options
from diffuse_compress.errors import ConfigError, UnsupportedHardwareError
from diffuse_compress.evaluation.environment import command_line
from diffuse_compress.quality_bench.cells import (
    ALL,
    CALIBRATIONS,
    Settings,
    cross_product,
    read_algorithms,
    read_calibrations,
    read_options,
    read_schemes,
    read_subjects,
)
from diffuse_compress.quality_bench.results import write_results
from diffuse_compress.quality_bench.run import found_cells, run_cells
from diffuse_compress.quantization.algorithms.base import algorithm_kinds
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress_kernels import has_fast_int4

__all__ = ["add_bench"]

_QUALITY_EXAMPLES = """examples:
  # every algorithm there is in two formats, on a language model and on a pipeline
  diffuse-compress bench quality --models python_llama emoji_pixart --algorithms all --schemes w3g64 w4a8

  # what the samples are worth: of the task, of another one, noise; each with three seeds
  diffuse-compress bench quality --models python_llama --algorithms rtn awq gptq --schemes w3g64 \\
      --calibration matching other random --seeds 0 1 2

  # any folder or Hub id; one algorithm after the other; a field of a configuration
  diffuse-compress bench quality --models ./pixart --algorithms smoothquant+gptq --schemes w8a8 \\
      --option gptq.damping=0.02 --device cuda

algorithms: {algorithms}
schemes: {schemes}; or weights alone in groups: w2g64, w3g128, w4g32, ...
what cannot be is a row that says why. an interrupted run, killed or not, goes on with the same command.
"""


def add_bench(verbs: Any) -> None:
    """Add the verb; without one of its own verbs it is ``tiles``."""
    bench = verbs.add_parser(
        "bench",
        help="measure this GPU's kernels, or the quality of algorithms and formats",
        description="`tiles` (the default) finds this GPU's fastest tile shapes and keeps them where the kernels look. "
        "`layers` times quantized layers of published models, quantization of the input included, beside dense ones. "
        "`quality` measures models times algorithms times formats.",
    )
    parts = bench.add_subparsers(dest="what", metavar="WHAT")
    tiles = parts.add_parser("tiles", help="tile shapes of the kernels (the default)")
    layers = parts.add_parser("layers", help="whole layers beside cuBLAS")
    layers.add_argument("--out", metavar="FILE", help="JSON (default: gpu_layers.json)")
    for part in (bench, tiles, layers):
        # A part leaves alone what was said before it.
        default = False if part is bench else argparse.SUPPRESS
        part.add_argument("--quick", action="store_true", default=default, help="about 20 seconds instead of minutes")
    bench.set_defaults(run=_kernels, what="tiles")
    _add_quality(parts)
    for part in parts.choices.values():
        part.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show a failure's traceback")


def _add_quality(parts: Any) -> None:
    kinds = [kind for kind in algorithm_kinds() if kind != "trained"]
    verb = parts.add_parser(
        "quality",
        help="models times algorithms times formats: quality, calibration, memory, bytes and time in one table",
        description="Compresses every model with every algorithm in every format, each in a process of its own, and "
        "judges it against the dense one: language models by perplexity and by how often the next token is the dense "
        "model's, pipelines by the denoiser's output and by pictures of the same noise.",
        epilog=_QUALITY_EXAMPLES.format(algorithms=", ".join(kinds), schemes=", ".join(PRESETS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument(
        "--models", nargs="+", required=True, metavar="MODEL", help="reference models by name, folders or Hub ids"
    )
    verb.add_argument(
        "--algorithms", nargs="+", default=[ALL], metavar="KIND[+KIND]", help="kinds, or all (the default)"
    )
    verb.add_argument(
        "--schemes", nargs="+", default=[ALL], metavar="SCHEME", help="presets, all of them (the default), or w3g64"
    )
    verb.add_argument("--option", action="append", default=[], metavar="KIND.FIELD=VALUE", help="of an algorithm")
    verb.add_argument(
        "--calibration",
        nargs="+",
        default=["matching"],
        metavar="SET[:N]",
        help=f"{', '.join(CALIBRATIONS)}, or a file of prompts or text; N samples (default: matching)",
    )
    verb.add_argument("--samples", type=int, metavar="N", help="of a calibration set (default: 16)")
    verb.add_argument("--seeds", type=int, nargs="+", default=[0], help="of samples and algorithms (default: 0)")
    verb.add_argument("--outliers", action="store_true", help="each model also with outlier channels, same function")
    verb.add_argument("--prompts", type=int, metavar="N", help="that pipelines are judged on (default: 16)")
    verb.add_argument("--windows", type=int, metavar="N", help="of text for language models (default: 32)")
    verb.add_argument("--window", type=int, metavar="N", help="tokens of one (default: the model's, at most 2048)")
    verb.add_argument("--text", metavar="FILE", help="for language models (default: heldout.txt beside the model)")
    verb.add_argument("--steps", type=int, help="num_inference_steps (default: as the model's card says)")
    verb.add_argument("--guidance", type=float, help="guidance_scale (default: likewise)")
    verb.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another argument of the call, value in JSON"
    )
    verb.add_argument("--batch-size", type=int, default=8, help="samples or windows at a time (default: 8)")
    verb.add_argument("--quick", action="store_true", help="4 prompts, windows and samples, 4 steps: a first look")
    verb.add_argument("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"])
    verb.add_argument("--device", default="cpu", help="default: cpu")
    verb.add_argument(
        "--in-process", action="store_true", help="no process for each cell: starts sooner, a CPU's memory is not told"
    )
    verb.add_argument("--table", action="store_true", help="measure nothing: the table of the rows that are there")
    verb.add_argument("--retry", action="store_true", help="measure those rows anew that have no result")
    verb.add_argument("--out", default="quality", metavar="DIR", help="default: ./quality")
    verb.set_defaults(run=_quality)


# --- the kernels ------------------------------------------------------------------------------------------------


def _kernels(args: argparse.Namespace) -> None:
    if not has_fast_int4(torch.device("cuda")):
        raise UnsupportedHardwareError(
            "bench: needs an NVIDIA GPU of compute capability 8.0 or more and triton. For CPUs: "
            "python -m diffuse_compress_kernels.benchmarks.cpu_linear."
        )
    # By name: these modules import triton, which a machine without such a GPU need not have.
    folder = "diffuse_compress_kernels.benchmarks"
    if args.what == "tiles":
        importlib.import_module(f"{folder}.tune").main(["--seconds", "20" if args.quick else "240"])
    else:
        minutes, out = "0.3" if args.quick else "5", args.out or "gpu_layers.json"
        importlib.import_module(f"{folder}.gpu_layers").main(["--minutes", minutes, "--out", out])


# --- quality ----------------------------------------------------------------------------------------------------


def _quality(args: argparse.Namespace) -> None:
    settings = _settings(args)
    options = read_options(args.option)
    cells = cross_product(
        read_subjects(args.models, outliers=args.outliers),
        read_schemes(args.schemes),
        read_algorithms(args.algorithms, options),
        read_calibrations(args.calibration),
        list(dict.fromkeys(args.seeds)),
    )
    # The command of a table is the one that measures it.
    typed = [word for word in sys.argv[1:] if word not in ("--table", "--retry")]
    out, command = Path(args.out), command_line("diffuse-compress", typed)
    if args.table:
        there = found_cells(cells, settings, out)
        if not there:
            raise ConfigError(f"--table: {out} has no results of this command yet. Leave it out to measure.")
        if len(there) < len(cells):
            print(f"{len(cells) - len(there)} of {len(cells)} cells are not measured yet.", file=sys.stderr)
        cells = there
    records = run_cells(cells, settings, out, command=command, retry=args.retry, isolated=not args.in_process)
    files = write_results(cells, records, out, command)
    print(files["md"].read_text(encoding="utf-8"))
    print(f"written: {', '.join(map(str, files.values()))}")


def _settings(args: argparse.Namespace) -> Settings:
    steps = args.steps if args.steps is not None else 4 if args.quick else None
    few, usual = 4, {"prompts": 16, "windows": 32, "samples": 16}
    counts = {
        name: given if given is not None else few if args.quick else usual[name]
        for name, given in (("prompts", args.prompts), ("windows", args.windows), ("samples", args.samples))
    }
    return Settings(
        device=args.device,
        dtype=args.dtype,
        window=args.window,
        batch_size=args.batch_size,
        call=call_options(args.set, steps, args.guidance),
        text=args.text,
        **counts,
    )
