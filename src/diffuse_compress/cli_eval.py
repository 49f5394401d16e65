"""``diffuse-compress eval``: generate, paired, fid, vbench, report; the others are beside."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.arms import call_options, make_arms
from diffuse_compress.cli_eval_language import add_language
from diffuse_compress.cli_eval_reproduce import add_reproduce
from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.conditions import Condition, class_conditions, read_prompts, unconditional
from diffuse_compress.evaluation.environment import command_line, describe_device
from diffuse_compress.evaluation.features import (
    PREPROCESSING,
    ClassifierExtractor,
    ClipExtractor,
    FeatureExtractor,
    InceptionExtractor,
    load_classifier,
)
from diffuse_compress.evaluation.fid import METRICS, SetScorer, default_metrics, save_statistics
from diffuse_compress.evaluation.generation import generate
from diffuse_compress.evaluation.paired import CLIP, score_pairs
from diffuse_compress.evaluation.record_report import write_report
from diffuse_compress.evaluation.records import Metric, Record, load_record
from diffuse_compress.evaluation.samples import RECORD, PictureSet, open_pictures
from diffuse_compress.evaluation.vbench.isolated import IsolatedEnvironment, default_environment
from diffuse_compress.evaluation.vbench.results import metrics_of
from diffuse_compress.evaluation.vbench.runner import ENVIRONMENTS, STATIC_FILTER, evaluate_videos
from diffuse_compress.evaluation.vbench.suite import PromptSuite, find_suite, load_suite
from diffuse_compress.evaluation.vbench.videos import open_videos, prompts_of
from diffuse_compress.versions import installed_versions

__all__ = ["add_eval"]

_GENERATE_EXAMPLES = """examples:
  # the same prompts and seeds with the stored pipeline and two presets: runs/dense, runs/w8a8, runs/w4a8
  diffuse-compress eval generate ./pixart --recipe dense w8a8 w4a8 --prompts captions_val2014.json --count 5000 \\
      --steps 20 --guidance 4.5 --out runs

  # classes of DiT; samples of an unconditional model
  diffuse-compress eval generate ./dit --classes 0-999 --count 50000 --out runs
  diffuse-compress eval generate ./ddim --unconditional 50000 --steps 100 --out runs

  # on eight GPUs: the same files
  accelerate launch --num_processes 8 eval/generate.py ./pixart --prompts drawbench.csv --out runs

an interrupted run goes on with the same command.
"""
_PAIRED_EXAMPLES = """examples:
  diffuse-compress eval paired runs/dense runs/w8a8 runs/w4a8          # into their records
"""
_FID_EXAMPLES = """examples:
  diffuse-compress eval fid runs/dense runs/w8a8 runs/w4a8             # FID-to-dense and KID, into their records
  diffuse-compress eval fid coco_stats.npz runs/w4a8 --preprocessing torch-fidelity
  diffuse-compress eval fid runs/dense runs/w4a8 --features clip --metrics cmmd
  diffuse-compress eval fid ./photos --save-stats photos.npz           # pytorch-fid reads it

the Inception weights are looked for where torch.hub keeps pytorch-fid's and torch-fidelity's downloads.
"""
_VBENCH_EXAMPLES = """examples:
  # the prompts are in the package; one run for all dimensions but temporal_flickering, one for that
  diffuse-compress eval generate ./wan --prompts VBench_full_info.json --repetitions 5 --out runs
  diffuse-compress eval generate ./wan --prompts VBench_full_info.json --dimension temporal_flickering \\
      --repetitions 25 --out flickering
  diffuse-compress eval vbench runs/wan --also flickering/wan --fps 16

  diffuse-compress eval vbench ./videos --dimensions quality           # {prompt}-{index}.mp4 of any origin
  diffuse-compress eval vbench runs/wan --dimensions temporal_flickering --static-filter skip
  diffuse-compress eval vbench runs/own --any-prompts --dimensions imaging_quality subject_consistency

an interrupted evaluation goes on with the same command.
"""


def add_eval(verbs: Any) -> None:
    """Add the verb and its own verbs."""
    verb = verbs.add_parser(
        "eval",
        help="generate samples, score them, and report",
        description="Generate samples of several pipelines for the same prompts and seeds, score them against each "
        "other or against photographs, and put the scores into tables. Each command's --help has examples.",
    )
    parts = verb.add_subparsers(dest="eval_verb", required=True, metavar="COMMAND")
    _add_generate(parts)
    _add_paired(parts)
    _add_fid(parts)
    add_language(parts, _parser_of, _command)
    _add_vbench(parts)
    _add_report(parts)
    add_reproduce(parts, _parser_of, _place, _command)
    for part in parts.choices.values():
        part.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        part.add_argument("--debug", action="store_true", help="show the traceback of a failure")


def _parser_of(parts: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    found: argparse.ArgumentParser = parts.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return found


def _add_generate(parts: Any) -> None:
    verb = _parser_of(
        parts, "generate", "make the same samples with one or more pipelines, resumable", _GENERATE_EXAMPLES
    )
    verb.add_argument("pipelines", nargs="+", metavar="[NAME=]PATH_OR_REPO", help="folders or Hub ids")
    verb.add_argument(
        "--recipe",
        nargs="+",
        default=[],
        metavar="[NAME=]RECIPE",
        help="dense, presets (w4a4:rtn names the algorithm) or recipe files (default: dense)",
    )
    asked = verb.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompts", metavar="FILE", help=".txt, .csv, .tsv, .json (COCO, VBench) or .jsonl (GenEval)")
    asked.add_argument("--classes", metavar="LIST", help="class labels, e.g. 0-999")
    asked.add_argument("--unconditional", type=int, metavar="N", help="N samples of an unconditional pipeline")
    verb.add_argument("--count", type=int, metavar="N", help="first N prompts, or N classes in turn (default: all)")
    verb.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle the prompts before --count")
    verb.add_argument("--dimension", help="of a VBench suite: its prompts only")
    verb.add_argument("--repetitions", type=int, default=1, metavar="R", help="samples of each prompt (default: 1)")
    verb.add_argument("--seed", type=int, default=0, help="of sample 0; sample i has SEED + i (default: 0)")
    verb.add_argument("--batch-size", type=int, default=4, help="samples a call; part of a run's identity (default: 4)")
    verb.add_argument("--steps", type=int, help="num_inference_steps (default: the pipeline's)")
    verb.add_argument("--guidance", type=float, help="guidance_scale (default: the pipeline's)")
    verb.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another argument of the call, value in JSON"
    )
    verb.add_argument("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"])
    verb.add_argument("--device", help="default: cuda if there is one")
    verb.add_argument("--out", required=True, metavar="DIR", help="each pipeline with each recipe gets a folder in it")
    verb.set_defaults(run=_generate)


def _add_paired(parts: Any) -> None:
    verb = _parser_of(parts, "paired", "PSNR, SSIM, LPIPS, CLIP-I and flicker of runs against a run", _PAIRED_EXAMPLES)
    verb.add_argument("reference", metavar="REFERENCE", help="run of eval generate, mostly the dense pipeline's")
    verb.add_argument("samples", nargs="+", metavar="SAMPLES", help="runs of the same prompts and seeds")
    verb.add_argument("--clip", default=CLIP, metavar="PATH", help="CLIP model on this machine")
    verb.add_argument("--classifier", metavar="PATH", help="classifier.py or its folder, which is run: names pictures")
    verb.add_argument("--out", metavar="DIR", help="write records there, not into the runs")
    verb.set_defaults(run=_paired)


def _add_fid(parts: Any) -> None:
    verb = _parser_of(parts, "fid", "distances between sets of pictures: FID, KID, CMMD and more", _FID_EXAMPLES)
    verb.add_argument("reference", metavar="REFERENCE", help="run, folder of pictures, or .npz of statistics")
    verb.add_argument("samples", nargs="*", metavar="SAMPLES", help="runs or folders to compare with it")
    verb.add_argument(
        "--features",
        default="inception",
        metavar="KIND",
        help="inception, clip, or a classifier.py or its folder, which is run (default: inception)",
    )
    verb.add_argument("--metrics", nargs="+", choices=METRICS, metavar="METRIC", help=f"of {', '.join(METRICS)}")
    verb.add_argument("--preprocessing", default="pytorch-fid", choices=PREPROCESSING, help="default: pytorch-fid")
    verb.add_argument("--dims", type=int, default=2048, choices=(64, 192, 768, 2048), help="FID is 2048 (the default)")
    verb.add_argument("--weights", metavar="FILE", help="of the Inception network")
    verb.add_argument("--clip", default=ClipExtractor.PUBLISHED, metavar="PATH", help="CLIP model on this machine")
    verb.add_argument("--resize", type=int, metavar="SIDE", help="for a classifier: resize pictures to it")
    verb.add_argument("--resamples", type=int, metavar="R", help="of the bootstrap; 0 for no intervals")
    verb.add_argument("--limit", type=int, metavar="N", help="the first N pictures of every set")
    verb.add_argument("--recursive", action="store_true", help="pictures in subfolders too")
    verb.add_argument("--allow-unequal", action="store_true", help="compare sets of other sizes; recorded")
    verb.add_argument("--allow-other-prompts", action="store_true", help="compare runs of other prompts")
    verb.add_argument("--batch-size", type=int, default=64, help="pictures at a time (default: 64)")
    verb.add_argument("--workers", type=int, help="processes that decode pictures")
    verb.add_argument("--seed", type=int, default=0, help="of the bootstrap and of subsets (default: 0)")
    verb.add_argument("--device", help="default: cuda if there is one")
    verb.add_argument("--save-stats", metavar="FILE", help="write REFERENCE's statistics (.npz) and compare nothing")
    verb.add_argument("--out", metavar="DIR", help="write records there, not into the runs")
    verb.set_defaults(run=_fid)


def _add_vbench(parts: Any) -> None:
    verb = _parser_of(parts, "vbench", "VBench's dimensions of clips, and their published sums", _VBENCH_EXAMPLES)
    verb.add_argument("folder", metavar="FOLDER", help="run of clips, or folder of {prompt}-{index}.mp4")
    verb.add_argument("--also", nargs="+", default=[], metavar="DIR", help="more videos of the same pipeline")
    verb.add_argument(
        "--dimensions", nargs="+", default=["all"], metavar="NAME", help="names, quality, semantic or all (the default)"
    )
    prompts = verb.add_mutually_exclusive_group()
    prompts.add_argument("--suite", metavar="FILE", help="prompt suite (default: the installed package's)")
    prompts.add_argument("--any-prompts", action="store_true", help="the videos' own prompts; for 7 of the dimensions")
    verb.add_argument("--static-filter", default="run", choices=STATIC_FILTER, help="of temporal_flickering")
    verb.add_argument("--partial", action="store_true", help="score the videos that are there, and say so")
    verb.add_argument("--fps", type=float, help="of a run's clips; dynamic_degree needs it")
    verb.add_argument("--environment", default="auto", choices=ENVIRONMENTS, help="where vbench runs (default: auto)")
    verb.add_argument("--environment-folder", metavar="DIR", help="of the isolated environment, made on first use")
    verb.add_argument(
        "--weights", metavar="DIR", help="of weight files (default: $VBENCH_CACHE_DIR or ~/.cache/vbench)"
    )
    verb.add_argument("--no-download", action="store_true", help="of weight files")
    verb.add_argument("--device", help="default: cuda if there is one")
    verb.add_argument("--results", metavar="DIR", help="of kept results (default: FOLDER/vbench or FOLDER.vbench)")
    verb.add_argument("--out", metavar="DIR", help="write the record there, not into the run")
    verb.set_defaults(run=_vbench)


def _add_report(parts: Any) -> None:
    verb = _parser_of(parts, "report", "a table, a page and Pareto plots from records", "")
    verb.add_argument("records", nargs="+", metavar="RECORD", help="record.json files, or folders of runs")
    verb.add_argument("--out", required=True, metavar="DIR", help="gets report.md, report.html and records.json")
    verb.add_argument("--quality", metavar="METRIC", help="of the Pareto plots, or its beginning (default: the first)")
    verb.add_argument("--title", default="Evaluation", help="of the page")
    verb.set_defaults(run=_report)


# --- generate ---------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> None:
    conditions, name = _conditions(args)
    options = _call_options(args)
    device, state = _place(args.device)
    arms = make_arms(args.pipelines, args.recipe, dtype=args.dtype, device=device)
    folders = generate(
        arms,
        conditions,
        args.out,
        seed=args.seed,
        batch_size=args.batch_size,
        repetitions=args.repetitions,
        options=options,
        data_name=name,
        command=_command(),
        device=device,
        state=state,
    )
    if not _is_first(state):
        return
    records = {name: load_record(folder) for name, folder in folders.items()}
    if args.json:
        print(json.dumps({name: {"folder": str(folders[name]), "record": r.to_dict()} for name, r in records.items()}))
        return
    for name, record in records.items():
        cost = record.cost
        peak = (cost["peak_memory_bytes"] or 0) / 2**20
        print(
            f"{name}: {record.samples} samples in {folders[name]}, {cost['seconds_per_sample']:.3f} s each, "
            f"{cost['wall_seconds']:.1f} s in all, peak {peak:.0f} MiB {cost['peak_memory_kind']}"
        )


def _conditions(args: argparse.Namespace) -> tuple[list[Condition], str]:
    """What to draw, and the name of the set."""
    if args.prompts is None and (args.shuffle is not None or args.dimension is not None):
        raise ConfigError("eval generate: --shuffle and --dimension are for --prompts.")
    if args.prompts is not None:
        found = read_prompts(args.prompts, limit=args.count, shuffle=args.shuffle, dimension=args.dimension)
        shuffled = "" if args.shuffle is None else f", shuffled with seed {args.shuffle}"
        dimension = f" {args.dimension}" if args.dimension else ""
        return found, f"{Path(args.prompts).name}{dimension}{shuffled}"
    if args.classes is not None:
        return class_conditions(args.classes, args.count), f"classes {args.classes}"
    return unconditional(args.unconditional), "unconditional"


def _call_options(args: argparse.Namespace) -> dict[str, Any]:
    return call_options(args.set, args.steps, args.guidance)


# --- paired -----------------------------------------------------------------------------------------------------


def _paired(args: argparse.Namespace) -> None:
    reference = open_pictures(args.reference)
    classifier = None if args.classifier is None else load_classifier(args.classifier)
    if args.classifier is not None and classifier is None:
        raise ConfigError(f"{args.classifier}: need a classifier.py with load_classifier(folder).")
    sets = [open_pictures(path) for path in args.samples]
    _refuse_equal_names(args, sets)
    results = {}
    for pictures in sets:
        metrics, absent = score_pairs(reference, pictures, clip=args.clip, classifier=classifier)
        results[pictures.name] = _keep(pictures, metrics, torch.device("cpu"), None, args.out, absent)
        if not args.json:
            lines = [f"{pictures.name} against {reference.name}", *(f"  {metric}" for metric in metrics)]
            print("\n".join([*lines, *(f"  {name}: not measured: {reason}" for name, reason in absent.items())]))
    if args.json:
        print(json.dumps({name: record.to_dict() for name, record in results.items()}, indent=1))


# --- fid --------------------------------------------------------------------------------------------------------


def _fid(args: argparse.Namespace) -> None:
    from_file = args.reference.endswith(".npz")
    if bool(args.samples) == bool(args.save_stats) or (args.save_stats and from_file):
        raise ConfigError("eval fid: give REFERENCE and SAMPLES to compare, or a folder and --save-stats FILE.npz.")
    opening = {"recursive": args.recursive, "limit": args.limit}
    reference = args.reference if from_file else open_pictures(args.reference, **opening)
    sets = [open_pictures(path, **opening) for path in args.samples]
    _refuse_equal_names(args, sets)
    device, state = _place(args.device)
    extractor = _extractor(args, device)
    extraction = {"batch_size": args.batch_size, "workers": args.workers, "state": state}
    if args.save_stats:
        found = save_statistics(reference, extractor, args.save_stats, **extraction)
        if found is not None:
            print(json.dumps({"file": args.save_stats, "sha256": found.sha256}) if args.json else args.save_stats)
        return
    scorer = SetScorer(
        reference,
        extractor,
        args.metrics or tuple(default_metrics(extractor, from_file)),
        resamples=args.resamples,
        allow_unequal=args.allow_unequal,
        allow_other_prompts=args.allow_other_prompts,
        seed=args.seed,
        **extraction,
    )
    for pictures in sets:
        scorer.check(pictures)
    results = {}
    for pictures in sets:
        metrics = scorer.score(pictures)
        if _is_first(state):
            results[pictures.name] = _keep(pictures, metrics, device, state, args.out)
            if not args.json:
                print("\n".join([f"{pictures.name} against {Path(args.reference).name}", *(f"  {m}" for m in metrics)]))
    if _is_first(state):
        if args.json:
            print(json.dumps({name: record.to_dict() for name, record in results.items()}, indent=1))
        else:
            print(f"features: {extractor.name}")


def _extractor(args: argparse.Namespace, device: torch.device) -> FeatureExtractor:
    if args.features == "inception":
        spatial = "sfid" in (args.metrics or ()) or bool(args.save_stats)
        return InceptionExtractor(args.preprocessing, args.dims, args.weights, device, spatial=spatial)
    if args.features == "clip":
        return ClipExtractor(args.clip, device)
    return ClassifierExtractor(args.features, device, args.resize)


def _refuse_equal_names(args: argparse.Namespace, sets: Sequence[PictureSet]) -> None:
    """Names are the keys of --json and the files of --out."""
    names = [pictures.name for pictures in sets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None and (args.json or args.out):
        raise ConfigError(f"--json and --out need sets of different names, got {twice} twice. Score them one by one.")


def _keep(
    pictures: PictureSet,
    metrics: Sequence[Metric],
    device: torch.device,
    state: Any,
    out: str | None,
    absent: Mapping[str, str] | None = None,
) -> Record:
    """Put scores into the run's record, or into one of their own for a plain folder; only --out writes the latter."""
    path = pictures.folder / RECORD
    if path.is_file():
        record = load_record(path).with_metrics(metrics, absent)
    else:
        record = Record(
            name=pictures.name,
            model={"id": pictures.name, "class": None},
            recipe=None,
            device=describe_device(device, 1 if state is None else state.num_processes),
            versions=installed_versions(),
            date=datetime.date.today().isoformat(),
            command=_command(),
            data={"kind": "unknown", "name": pictures.name, "sha256": None},
            seeds={"base": None, "rule": "unknown"},
            samples=len(pictures),
            settings={},
            metrics=tuple(metrics),
        )
    if out is not None:
        record.save(Path(out) / f"{pictures.name}.json")
    elif path.is_file():
        record.save(path)
    return record


# --- vbench -----------------------------------------------------------------------------------------------------


def _vbench(args: argparse.Namespace) -> None:
    videos = open_videos(args.folder, args.also, args.results)
    environment = Path(args.environment_folder) if args.environment_folder else default_environment()
    if args.any_prompts:
        suite = PromptSuite.of_any_prompts(prompts_of(videos.paths))
    else:
        suite = load_suite(args.suite or find_suite([environment]))
    device, _ = _place(args.device)
    results = evaluate_videos(
        videos,
        suite,
        args.dimensions,
        device=device,
        environment=args.environment,
        isolated=IsolatedEnvironment(environment),
        weights=args.weights,
        download=not args.no_download,
        static_filter=args.static_filter,
        partial=args.partial,
        fps=args.fps,
    )
    metrics = metrics_of(results)
    name = videos.record.name if videos.record is not None else videos.folder.resolve().name
    record = _keep(PictureSet(name, tuple(videos.paths.values()), videos.folder), metrics, device, None, args.out)
    if args.json:
        print(json.dumps({name: record.to_dict()}, indent=1))
    else:
        print("\n".join([name, *(f"  {metric}" for metric in metrics)]))


# --- report -----------------------------------------------------------------------------------------------------


def _report(args: argparse.Namespace) -> None:
    written = write_report(
        [load_record(path) for path in args.records], args.out, quality=args.quality, title=args.title
    )
    if args.json:
        print(json.dumps({path.suffix.lstrip("."): str(path) for path in written}))
        return
    print(written[0].read_text(encoding="utf-8"))
    print("\n".join(str(path) for path in written))


# --- shared -----------------------------------------------------------------------------------------------------


def _place(device: str | None) -> tuple[torch.device, Any]:
    """The device of this process, and accelerate's state where there are several."""
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return wanted, None
    from accelerate import PartialState

    state = PartialState(cpu=wanted.type == "cpu")
    return torch.device(state.device), state


def _is_first(state: Any) -> bool:
    return state is None or state.process_index == 0


def _command() -> str:
    program = Path(sys.argv[0]).name
    is_script = program.endswith(".py") and program != "cli.py"
    return command_line(f"python eval/{program}" if is_script else "diffuse-compress", sys.argv[1:])
