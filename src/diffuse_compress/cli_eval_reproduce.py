"""``diffuse-compress eval reproduce``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.errors import ConfigError, nearest
from diffuse_compress.evaluation.experiments import NoAccessError, load_experiments
from diffuse_compress.evaluation.record_report import comparison_table, table_notes
from diffuse_compress.evaluation.records import load_record
from diffuse_compress.evaluation.samples import RECORD
from diffuse_compress.reproduce import describe, reproduce, require_possible

__all__ = ["add_reproduce"]

_EXAMPLES = """examples:
  diffuse-compress eval reproduce FLUX.1-dev --recipe w4a8 --dry-run   # what it would download and make
  diffuse-compress eval reproduce PixArt-Sigma --recipe w4a8 w8a8      # reproduced/PixArt-Sigma/dense, .../w4a8, ...
  diffuse-compress eval report reproduced/*/* --out report

experiments: {names}
weights come from the Hub at a pinned commit, with your token; without access the records say so, and so does the exit
code. an interrupted run goes on with the same command.
"""


def add_reproduce(
    parts: Any,
    parser_of: Callable[..., argparse.ArgumentParser],
    place: Callable[[str | None], tuple[torch.device, Any]],
    command: Callable[[], str],
) -> None:
    """Add the command.

    Args:
        parts: the verb's commands.
        parser_of: makes a parser among ``parts`` from name, summary and examples.
        place: the device of this process, and accelerate's state where there are several.
        command: the command as it was typed.
    """
    examples = _EXAMPLES.format(names=", ".join(load_experiments()))
    verb = parser_of(
        parts, "reproduce", "measure recipes on published weights: pinned commit, prompts, seeds", examples
    )
    verb.add_argument("names", nargs="+", metavar="NAME", help="experiments")
    verb.add_argument(
        "--recipe",
        nargs="+",
        required=True,
        metavar="[NAME=]RECIPE",
        help="presets (w4a16:hqq names the algorithm) or recipe files; the dense model is measured in any case",
    )
    verb.add_argument("--experiments", metavar="FILE", help="other experiments, in the form of experiments.json")
    verb.add_argument("--dry-run", action="store_true", help="say what would be downloaded and made, and stop")
    verb.add_argument("--device", help="default: cuda if there is one")
    verb.add_argument("--out", default="reproduced", metavar="DIR", help="default: ./reproduced")
    verb.set_defaults(run=partial(_reproduce, place=place, command=command))


def _reproduce(
    args: argparse.Namespace, place: Callable[[str | None], tuple[torch.device, Any]], command: Callable[[], str]
) -> None:
    known = load_experiments(args.experiments)
    # People write names as they like: flux.1-dev.
    by_lower = {name.lower(): name for name in known}
    unknown = [name for name in args.names if name.lower() not in by_lower]
    if unknown:
        raise ConfigError(f"eval reproduce: no experiment {unknown[0]!r}; {nearest(unknown[0], known)}.")
    device, state = place(args.device)
    found: dict[str, Any] = {}
    refused = []
    names = [by_lower[name.lower()] for name in args.names]
    for name in names:  # before hours of work on the first of them
        require_possible(known[name], args.recipe, args.out)
    for name in names:
        folder = Path(args.out) / name
        try:
            if args.dry_run:
                found[name] = describe(known[name], args.recipe, args.out)
                continue
            reproduce(known[name], args.recipe, args.out, device=device, command=command(), state=state)
        except NoAccessError as error:
            refused.append(f"{name}: not measured: {error}")
        if not args.dry_run:
            found[name] = {path.parent.name: load_record(path) for path in sorted(folder.glob(f"*/{RECORD}"))}
    if state is None or state.process_index == 0:
        _print_reproduced(found, args.json, args.out)
    if refused:
        args.json = False  # the one object has been printed, and says it too
        raise NoAccessError("\n".join(refused))


def _print_reproduced(found: dict[str, Any], as_json: bool, out: str) -> None:
    """Records, or texts of a dry run."""
    if as_json:
        plain = {
            name: one if isinstance(one, str) else {k: r.to_dict() for k, r in one.items()}
            for name, one in found.items()
        }
        print(json.dumps(plain, indent=1))
        return
    for one in found.values():
        if isinstance(one, str):
            print(one)
    records = [record for one in found.values() if not isinstance(one, str) for record in one.values()]
    if records:
        print(comparison_table(records), *(f"- {note}" for note in table_notes(records)), sep="\n")
        print(f"\nrecords: {', '.join(str(Path(out) / name) for name in found)}")
