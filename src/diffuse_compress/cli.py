"""``diffuse-compress``: compress, train, info, demo, bench, eval."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffuse_compress import __version__
from diffuse_compress.anatomy import GENERIC, model_anatomy, step_behaviour
from diffuse_compress.api import compress, compression_plan, compression_report
from diffuse_compress.caching.artefact import FILE_NAME, load_schedules
from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.card_results import attach_results, require_results_of
from diffuse_compress.cli_bench import add_bench
from diffuse_compress.cli_eval import add_eval
from diffuse_compress.cli_train import add_train
from diffuse_compress.components import SELF, model_components
from diffuse_compress.demo import PROMPTS, run_demo
from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.component import describe_methods, get_state, quantized_layers
from diffuse_compress.integrations.hub_kernels import BACKENDS, export_kernels
from diffuse_compress.integrations.quantization_config import QUANT_METHOD
from diffuse_compress.integrations.saving import FORMATS, require_format
from diffuse_compress.method_presets import METHOD_PRESETS
from diffuse_compress.plan import CompressionPlan, stored_bytes
from diffuse_compress.plan_text import align, format_bytes
from diffuse_compress.quantization.algorithms.base import algorithm_from_dict, algorithm_to_dict
from diffuse_compress.quantization.dispatch import compute_path
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.recipe import Recipe, as_recipe
from diffuse_compress.report import report_kind, report_of
from diffuse_compress.report_text import SPEED, format_count, headline
from diffuse_compress.skeleton import default_dtype, load, local_folder, read_skeleton
from diffuse_compress.versions import installed_versions

__all__ = ["main"]

_EXAMPLES = """examples:
  diffuse-compress demo                                         # offline, about a minute on a CPU
  diffuse-compress info                                         # presets, and how this machine computes them
  diffuse-compress compress ./pixart --recipe w4a8 --dry-run    # the plan; reads no weights
  diffuse-compress compress ./pixart --recipe w4a8 --out ./pixart-w4a8 --report report.html

Every verb explains itself: diffuse-compress compress --help
"""
_COMPRESS_EXAMPLES = """examples:
  # the denoiser in int4 with int8 activations, with pictures before and after in the report
  diffuse-compress compress ./pixart --recipe w4a8 --out ./pixart-w4a8 --report report.html \\
      --preview "a red bicycle" --preview "a lighthouse at dawn"

  # the denoiser with --recipe's preset, the text encoder with its own
  diffuse-compress compress ./pixart --recipe w4a8 --components transformer,text_encoder=w8a16 --out ./small

  # only look: one line per kind of tensor, exact bytes, nothing loaded, nothing written
  diffuse-compress compress black-forest-labs/FLUX.1-dev --recipe w4a8 --dry-run

  # under a size, with a format for each layer
  diffuse-compress compress ./pixart --target-size 350MB --out ./pixart-350

  # a recipe saved from Python: pipe.compression_recipe().save("recipe.json")
  diffuse-compress compress ./fine-tune --recipe recipe.json --out ./fine-tune-w4a8

what comes out loads with plain diffusers or transformers, after `import diffuse_compress`.
presets: {presets}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 130 interrupted (argparse exits with 2)."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the boundary: a user gets the message, --debug the traceback
        if args.debug:
            traceback.print_exc()
        # Messages of our own errors are written for users; another one needs its class to be understood.
        ours = type(error).__module__.startswith("diffuse_compress")
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        if getattr(args, "json", False):
            print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}))
        print(f"error: {text}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffuse-compress",
        description="Make diffusers and transformers models smaller and faster; they stay what they are.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_compress(verbs)
    info = verbs.add_parser(
        "info",
        help="versions, device and presets; or what a folder holds",
        description="Without PATH: versions, device, and every preset as resolved. With PATH: its models, the parts "
        "their layers play, and the report of what is compressed. Reads no weights.",
    )
    info.add_argument("model", nargs="?", metavar="PATH", help="folder or Hub id of a pipeline or model")
    info.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    info.set_defaults(run=_info)
    demo = verbs.add_parser(
        "demo",
        help="compress a small trained pipeline that comes with the package, offline",
        description="Loads the bundled text-to-emoji pipeline, prints the plan, compresses it, generates pictures "
        "before and after, writes report.html and the compressed pipeline, reloads it and compares bit for bit.",
    )
    demo.add_argument("--preset", default="w4a8", help=f"one of {', '.join(PRESETS)} (default: w4a8)")
    demo.add_argument("--out", default="diffuse_compress_demo", metavar="DIR", help="default: ./diffuse_compress_demo")
    demo.add_argument("--prompt", action="append", metavar="NAME", help="name of an emoji; repeat for more pictures")
    demo.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    demo.add_argument("--device", help="where to run, e.g. cuda (default: cpu)")
    demo.set_defaults(run=_demo)
    add_bench(verbs)
    add_eval(verbs)
    add_train(verbs)
    _add_export_kernels(verbs)
    for name, verb in verbs.choices.items():
        if name == "eval":
            continue  # its commands have the option
        verb.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


def _add_export_kernels(verbs: Any) -> None:
    verb = verbs.add_parser(
        "export-kernels",
        help="write the kernels as a Hub repository of their own",
        description="Writes the kernels in the layout of Hugging Face's `kernels` library: source and builds for CPUs "
        "and CUDA devices. kernels.get_local_kernel loads the folder, kernels.get_kernel what is uploaded of it.",
    )
    verb.add_argument("folder", metavar="DIR", help="new or empty")
    verb.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="where it is to be published")
    verb.add_argument("--version", type=int, default=1, help="of the functions (default: 1)")
    verb.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS, help="default: all")
    verb.set_defaults(run=_export_kernels)


def _add_compress(verbs: Any) -> None:
    verb = verbs.add_parser(
        "compress",
        help="compress a pipeline or model folder, or a Hub repository",
        description="Loads a pipeline or model, compresses it, and writes it with save_pretrained.",
        epilog=_COMPRESS_EXAMPLES.format(presets=", ".join(PRESETS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("model", metavar="PATH_OR_REPO", help="folder, or Hub id (owner/name)")
    verb.add_argument("--recipe", metavar="PRESET|FILE", help="a preset, or a recipe saved as JSON")
    verb.add_argument(
        "--components",
        metavar="NAME[=PRESET],...",
        help="components or groups (denoisers, text_encoders, vaes, all) to compress; without =PRESET by --recipe "
        "(default: denoisers)",
    )
    verb.add_argument("--algorithm", metavar="KIND", help="instead of the preset's, e.g. hqq")
    verb.add_argument(
        "--modules-to-not-convert", nargs="+", metavar="PATTERN", help="modules that stay dense, e.g. attn2 '*.ff.*'"
    )
    verb.add_argument(
        "--target-size",
        metavar="SIZE",
        help="e.g. 11GB or 10GiB: of the compressed components; each layer gets its own of the preset's formats "
        "(default preset: w4a16)",
    )
    verb.add_argument("--target-bits", type=float, metavar="BITS", help="the same by average bits per weight, e.g. 4.5")
    verb.add_argument(
        "--calibration", metavar="FILE", help="samples saved from Python: Calibration.record(pipe, prompts).save(FILE)"
    )
    _add_outputs(verb)
    verb.add_argument("--no-measure", action="store_true", help="do not run the pipeline to measure its output error")
    verb.add_argument(
        "--dry-run", action="store_true", help="print the plan and stop; reads no weights but for a target"
    )
    verb.add_argument("--device", help="where to run, e.g. cuda (default: cpu)")
    verb.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "float16", "bfloat16"],
        help="of what is not quantized (default: as stored; float16 becomes float32 on the CPU)",
    )
    verb.add_argument("--seed", type=int, help="of algorithms that draw random numbers")
    verb.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    verb.set_defaults(run=_compress)


def _add_outputs(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--out", metavar="DIR", help="folder for the compressed pipeline or model")
    verb.add_argument(
        "--format",
        choices=FORMATS,
        help="of --out and --push: torchao for plain diffusers and transformers, int8 and float8 only; the others for "
        "language models, read by transformers, vLLM and SGLang",
    )
    verb.add_argument(
        "--push", metavar="REPO", help="push to this repository of the Hub (the token of `hf auth login`)"
    )
    verb.add_argument("--private", action="store_true", help="with --push: make a private repository")
    verb.add_argument(
        "--results",
        nargs="+",
        metavar="RECORD",
        help="records of eval, or runs' folders, for the card of --out and --push",
    )
    verb.add_argument("--report", metavar="FILE", help="write the report: .html, .json or .md")
    verb.add_argument("--preview", action="append", metavar="PROMPT", help="generate before and after; repeat for more")


# --- compress ---------------------------------------------------------------------------------------------------


def _compress(args: argparse.Namespace) -> None:
    _check_compress(args)
    methods = _methods(args.recipe, args.components)
    options = {
        "modules_to_not_convert": args.modules_to_not_convert,
        "algorithm": algorithm_from_dict({"kind": args.algorithm}) if args.algorithm else None,
        "seed": args.seed,
        "device": args.device,
        "calibration": Calibration.load(args.calibration) if args.calibration else None,
        "target_size": args.target_size,
        "target_bits": args.target_bits,
    }
    searches = args.target_size is not None or args.target_bits is not None
    is_foreign = args.format not in (None, QUANT_METHOD)
    target = _read(args, weights=searches or not (args.dry_run or is_foreign))
    if searches or args.dry_run or is_foreign:
        plan = compression_plan(target, *methods, **options)
        if is_foreign:
            _require_format(args.format, target, plan)
        if args.dry_run:
            print(json.dumps(plan.to_dict(), indent=2) if args.json else plan)
            return
        if searches:  # found once; compressing takes it as it is
            methods, options = (plan,), {"device": args.device}
        else:
            target = _read(args, weights=True)
    if args.results and methods and not args.calibration:
        asked = as_recipe(plan.request()) if searches else _asked(methods, options)
        require_results_of(target, asked, args.results)  # before minutes of work
    before = [get_state(model) for model in model_components(target).values()]
    compress(target, *methods, **options, preview=args.preview, measure=not args.no_measure)
    if all(get_state(model) is state for model, state in zip(model_components(target).values(), before, strict=True)):
        print(f"{args.model}: already compressed this way; nothing is changed.", file=sys.stderr)
    report = compression_report(target)
    if args.results:
        attach_results(target, args.results)
    if args.out:
        target.save_pretrained(args.out, format=args.format)
    pushed = None
    if args.push:
        pushed = str(target.push_to_hub(args.push, private=args.private or None, format=args.format))
    if args.report:
        report.save(args.report)
    if args.json:
        print(
            json.dumps(
                {"out": args.out, "pushed": pushed, "report_file": args.report, "report": report.to_dict()}, indent=2
            )
        )
        return
    print(report)
    for what, path in (("compressed", args.out), ("pushed", pushed), ("report", args.report)):
        if path:
            print(f"{what}: {path}")


def _check_compress(args: argparse.Namespace) -> None:
    """What can be said before anything is read."""
    if not (args.out or args.push or args.report or args.dry_run):
        raise ConfigError(
            "compress: say what to write: --out DIR, --push REPO, --report FILE, or --dry-run to see the plan."
        )
    if (args.format or args.private) and not (args.out or args.push):
        raise ConfigError("compress: --format and --private are about what is written: give --out DIR or --push REPO.")
    if args.results and not (args.out or args.push):
        raise ConfigError("compress: --results go into the card of what is written: give --out DIR or --push REPO.")
    if args.report:
        report_kind(args.report)
    _check_writable(args.out, args.report)


def _asked(methods: tuple[Any, ...], options: dict[str, Any]) -> Recipe:
    return as_recipe(*methods, **{name: options[name] for name in ("modules_to_not_convert", "algorithm", "seed")})


def _read(args: argparse.Namespace, *, weights: bool) -> Any:
    """The model, or its skeleton, which costs no weights to fetch or read."""
    folder = local_folder(args.model, weights=weights)
    dtype = default_dtype(args.dtype, folder, args.device)
    return load(folder, dtype, args.device) if weights else read_skeleton(folder, dtype)


def _require_format(format: str, skeleton: Any, plan: CompressionPlan) -> None:
    """Before minutes of work: will what comes out be something that the format holds?"""
    for name, model in model_components(skeleton).items():
        part = plan.components.get(name)
        if part is not None or quantized_layers(model):
            require_format(format, name or type(model).__name__, model, part.assigned if part else None)


def _check_writable(out: str | None, report: str | None) -> None:
    """Before minutes of work: can the results be written at all?"""
    for option, folder in (("--out", out), ("--report", report and str(Path(report).parent))):
        if not folder:
            continue
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{option}: needs a folder, {path} is a file.")
        existing = next(part for part in (path, *path.absolute().parents) if part.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise ConfigError(f"{option}: cannot write in {existing} ({error.strerror}).") from error


def _methods(recipe: str | None, components: str | None) -> tuple[Any, ...]:
    """Arguments of ``compress`` for --recipe and --components."""
    is_file = recipe is not None and (recipe.endswith(".json") or Path(recipe).is_file())
    if is_file:
        if components:
            raise ConfigError("compress: a recipe file names its components; leave out --components.")
        return (Recipe.load(str(recipe)),)
    if not components:
        return () if recipe is None else (recipe,)
    chosen: dict[str, str | None] = {}
    for item in components.split(","):
        name, _, preset = item.strip().partition("=")
        value = preset or recipe
        if not name or value is None:
            raise ConfigError(
                f"--components: {item!r} needs a preset: {item.strip() or 'NAME'}=w8a8, or --recipe PRESET."
            )
        chosen[name] = None if value.lower() == "none" else value
    return (chosen,)


# --- info -------------------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> None:
    facts = _path_facts(args.model) if args.model else _machine_facts()
    if args.json:
        print(json.dumps(facts, indent=2))
    elif args.model:
        print("\n".join(_path_lines(facts)))
    else:
        print("\n".join(_machine_lines(facts)))


def _machine_facts() -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described = {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
        }
    else:
        described = {"type": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}
    presets = {}
    for name, preset in PRESETS.items():
        path = compute_path(preset.scheme, device)
        presets[name] = {
            "summary": preset.summary,
            "aliases": list(preset.aliases),
            "needs_calibration": preset.needs_calibration,
            "scheme": preset.scheme.to_dict(),
            "modulation_scheme": preset.modulation_scheme.to_dict(),
            "algorithm": algorithm_to_dict(preset.algorithm),
            "calibrated_algorithm": algorithm_to_dict(preset.calibrated),
            "computed_by": path.description,
            "faster_than_dense": path.faster_than_dense,
        }
    methods = {name: preset.summary for name, preset in METHOD_PRESETS.items()}
    return {"versions": installed_versions(), "device": described, "presets": presets, "method_presets": methods}


def _machine_lines(facts: dict[str, Any]) -> list[str]:
    device = dict(facts["device"])
    if "memory_bytes" in device:
        device["memory"] = format_bytes(device.pop("memory_bytes"))
    lines = [
        "versions: " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "device: " + ", ".join(f"{key} {value}" for key, value in device.items()),
    ]
    for name, preset in facts["presets"].items():
        lines += ["", f"{name}: {preset['summary']}"]
        table = [("also written", ", ".join(preset["aliases"]))]
        if preset["needs_calibration"]:
            table.append(("needs", preset["needs_calibration"]))
        for label in ("scheme", "modulation_scheme"):
            scheme = preset[label]
            table.append((f"{label}: weights", _fields(scheme["weights"])))
            table.append((f"{label}: inputs", _fields(scheme["input_activations"])))
        table.append(("algorithm", _fields(preset["algorithm"])))
        calibrated = algorithm_from_dict(preset["calibrated_algorithm"]).summary
        table.append(("with calibration", calibrated))
        table.append(("computed here by (bf16)", f"{preset['computed_by']}; {SPEED[preset['faster_than_dense']]}"))
        lines += align(table)
    lines += [
        "",
        "with calibration, weights and timestep path together:",
        *align(list(facts["method_presets"].items())),
    ]
    return lines


def _fields(values: dict[str, Any] | None) -> str:
    return "as they come" if values is None else ", ".join(f"{key}={value}" for key, value in values.items())


def _path_facts(name: str) -> dict[str, Any]:
    folder = local_folder(name, weights=False)
    target = read_skeleton(folder)
    models = model_components(target)
    compressed = any(get_state(model) is not None for model in models.values())
    caches = load_schedules(folder / FILE_NAME) if (folder / FILE_NAME).is_file() else {}
    return {
        "path": name,
        "class": type(target).__name__,
        "components": {part: _model_facts(model) for part, model in models.items()},
        "feature_caches": {part: str(schedule) for part, schedule in caches.items()},
        "steps": step_behaviour(folder),
        "report": report_of(target).to_dict() if compressed else None,
    }


def _model_facts(model: Any) -> dict[str, Any]:
    """Class, size, anatomy, and the scheme and algorithm if compressed."""
    quantized = quantized_layers(model)
    state = get_state(model)
    schemes: dict[str, int] = {}
    for layer in quantized.values():
        schemes[layer.scheme.name] = schemes.get(layer.scheme.name, 0) + 1
    compressed = None
    if state is not None and not state.config.spec.is_dense:
        spec = state.config.spec
        compressed = {
            "preset": spec.preset,
            "algorithm": algorithm_to_dict(spec.algorithm),
            "layers": schemes,
            "schemes": {scheme.name: scheme.to_dict() for scheme in _distinct(quantized)},
        }
    return {
        "class": type(model).__name__,
        "stored_bytes": stored_bytes(model),
        "anatomy": model_anatomy(model),
        "compressed": compressed,
        "methods": describe_methods(state),
    }


def _distinct(quantized: dict[str, Any]) -> list[Scheme]:
    return list(dict.fromkeys(layer.scheme for layer in quantized.values()))


def _path_lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"{facts['path']}: {facts['class']}"]
    for name, part in facts["components"].items():
        title = f"{name} ({part['class']})" if name != SELF else part["class"]
        lines += ["", f"{title}: {format_bytes(part['stored_bytes'])}"]
        table = [("role", "layers", "parameters")]
        roles = part["anatomy"]["roles"]
        table += [(r, str(entry["layers"]), format_count(entry["parameters"])) for r, entry in roles.items()]
        lines += align(table) if roles else []
        lines += _anatomy_lines(part["anatomy"])
        lines += [f"  {title}: {text}" for title, text in part["methods"].items()]
        if part["compressed"] is None:
            lines.append("  weights not compressed" if part["methods"] else "  not compressed")
        else:
            found = part["compressed"]
            counts = ", ".join(f"{count} x {scheme}" for scheme, count in found["layers"].items())
            lines.append(f"  compressed: {counts}; algorithm {_fields(found['algorithm'])}")
    for name, picture in facts["feature_caches"].items():
        lines += ["", f"feature cache in {FILE_NAME}, for {name}:" if name else f"feature cache in {FILE_NAME}:"]
        lines += [f"  {line}" for line in picture.splitlines()]
    if facts["steps"] is not None:
        lines += ["", *_step_lines(facts["steps"])]
    if facts["report"] is not None:
        lines += ["", headline(facts["report"]), *([facts["report"]["hint"]] if facts["report"]["hint"] else [])]
    return lines


def _anatomy_lines(anatomy: dict[str, Any]) -> list[str]:
    generic = anatomy["family"] == GENERIC
    stock = " (no file describes this class); its blocks keep their stock forwards"
    lines = [f"  family: {anatomy['family']}{stock if generic else ''}"]
    for name, block in anatomy["blocks"].items():
        branches = f": {', '.join(block['branches'])}" if block["branches"] else ""
        unfused = f"; runs its stock forward: {block['unfused']}" if block["unfused"] and not generic else ""
        lines.append(f"  {block['count']} x {name}{branches}{unfused}")
    share = 100 * anatomy["modulation_share"]
    if share:
        size = format_count(anatomy["parameters"])
        lines.append(f"  modulation (one row per sample): {share:.1f} % of {size} parameters")
    if anatomy["dependence"] is not None and anatomy["dependence"]["timestep"]:
        parts = [f"{format_count(n)} on {what}" for what, n in anatomy["dependence"].items() if n and what != "sample"]
        lines.append(f"  parameters that do not see the sample: {', '.join(parts)}")
        for kind, found in anatomy["temporal_map"].items():
            names = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in found.items())
            lines += [f"  depend on {kind} alone: {names}"] if found else []
    return lines


def _step_lines(steps: dict[str, Any]) -> list[str]:
    lines = [f"steps: {steps['scheduler'] or 'no scheduler'}"]
    if steps["row"] is not None:
        lines[0] += f" (order {steps['order']}); the place in the schedule comes from {steps['row']}"
    names = " and ".join(steps["denoisers"]) or "no denoiser"
    lines.append(f"  in a step, {names}: {steps['calls']}")
    if steps["boundary_ratio"] is not None:
        first, second = steps["denoisers"][:2]
        lines.append(f"  {first} runs above {steps['boundary_ratio']} of the timesteps, {second} below: one schedule")
    return lines


# --- demo -------------------------------------------------------------------------------------------------------


def _export_kernels(args: argparse.Namespace) -> None:
    folder = export_kernels(args.folder, args.repo_id, version=args.version, backends=args.backends)
    print(
        f'Wrote {folder}. Load it with kernels.get_local_kernel(Path("{folder}")), publish it with\n'
        f"  hf upload {args.repo_id} {folder} . --revision v{args.version}"
    )


def _demo(args: argparse.Namespace) -> None:
    run_demo(args.preset, args.out, args.prompt or PROMPTS, seed=args.seed, device=args.device)


if __name__ == "__main__":
    sys.exit(main())
