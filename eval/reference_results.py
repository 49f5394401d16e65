"""What every preset costs the small trained pipelines in examples/: the command of docs/results.md.

    python eval/reference_results.py --out bench/reference                             # all presets, tens of minutes
    python eval/reference_results.py --out bench/reference --markdown docs/results.md  # and put the tables there

Every pipeline draws the same prompts, classes or seeds as it is stored, with every preset, and with every preset
calibrated on prompts (classes, seeds) that it is not asked for; and is scored against its own uncompressed pictures:
PSNR and SSIM, how often the emoji classifier names them alike, and the Fréchet distance of that classifier's features.
Goes on where it stopped. ``--markdown`` replaces what lies between the two marks.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.api import compress
from diffuse_compress.arms import DENSE, make_arm, make_arms
from diffuse_compress.evaluation.conditions import Condition, class_conditions, read_prompts, unconditional
from diffuse_compress.evaluation.environment import command_line
from diffuse_compress.evaluation.features import ClassifierExtractor, load_classifier
from diffuse_compress.evaluation.fid import SetScorer
from diffuse_compress.evaluation.generation import Arm, generate
from diffuse_compress.evaluation.paired import score_pairs
from diffuse_compress.evaluation.record_report import comparison_table, table_notes, write_report
from diffuse_compress.evaluation.records import Record, load_record
from diffuse_compress.evaluation.samples import open_pictures
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.recipe import as_recipe

MODELS = Path(__file__).resolve().parent.parent / "examples" / "reference_models"
CLASSIFIER = MODELS / "emoji_pixart"
COSTS = ("on disk",)  # what a machine that does other work as well can tell
BEGIN, END = "<!-- begin: eval/reference_results.py -->", "<!-- end: eval/reference_results.py -->"


@dataclass(frozen=True)
class Model:
    """One reference pipeline: what it is asked for, and how it is called (as its card recommends).

    share: of ``--count`` that it draws, where a sample is dear. size: that pictures are brought to for the classifier.
    """

    asked: str
    options: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    size: int | None = None

    def conditions(self, count: int) -> list[Condition]:
        """The first ``count`` of what it is asked for."""
        if self.asked == "classes":
            return class_conditions(range(0, 1000, 7), count)  # spread over the whole list
        if self.asked == "unconditional":
            return unconditional(count)
        return read_prompts(MODELS / self.asked / "eval_prompts.txt", limit=count)

    def calibration(self, count: int) -> list[dict[str, Any]]:
        """Arguments of ``count`` calls for the last things that it can be asked for, seeds from 10000 on."""
        if self.asked == "classes":
            asked: list[dict[str, Any]] = [{"class_labels": [label]} for label in range(3, 1000, 7)][:count]
        elif self.asked == "unconditional":
            asked = [{}] * count
        else:
            prompts = read_prompts(MODELS / self.asked / "eval_prompts.txt")[-count:]
            asked = [{"prompt": condition.prompt} for condition in prompts]
        seeds = (torch.Generator().manual_seed(10_000 + index) for index in range(count))
        return [{**self.options, **item, "generator": seed} for item, seed in zip(asked, seeds, strict=True)]


STEPS = {"num_inference_steps": 20}
REFERENCE_MODELS = {
    "emoji_pixart": Model(
        "emoji_pixart",
        {
            **STEPS,
            "guidance_scale": 2.0,
            "use_resolution_binning": False,
            "clean_caption": False,
            "max_sequence_length": 24,
        },
    ),
    "emoji_sd": Model("emoji_pixart", {**STEPS, "guidance_scale": 3.0}),
    "emoji_dit": Model("classes", {**STEPS, "guidance_scale": 2.0}),
    "emoji_ddim": Model("unconditional", STEPS, size=64),
    "emoji_wan": Model(
        "emoji_wan",
        {
            **STEPS,
            "guidance_scale": 3.0,
            "height": 64,
            "width": 64,
            "num_frames": 9,
            "max_sequence_length": 16,
        },
        share=0.25,
    ),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=list(REFERENCE_MODELS), choices=REFERENCE_MODELS, metavar="MODEL"
    )
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS), metavar="PRESET")
    parser.add_argument(
        "--calibration-items", type=int, default=16, metavar="N", help="to calibrate on; 0 leaves these arms out"
    )
    parser.add_argument("--count", type=int, default=64, help="samples of each pipeline, a quarter for clips")
    parser.add_argument("--steps", type=int, help="instead of each model's own number")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench/reference"), help="runs, records, and a page for each")
    parser.add_argument("--markdown", type=Path, help="document that gets the tables")
    return parser.parse_args(arguments)


def calibrated_arm(name: str, preset: str, items: int, device: str) -> Arm:
    """The pipeline with a preset's calibrated algorithm."""
    recipe = as_recipe(preset, is_calibrated=lambda key: True)
    dense = make_arm(f"{preset}-calibrated", str(MODELS / name), None, device=device)
    return replace(dense, recipe=recipe.to_dict(), load=functools.partial(_calibrated, dense.load, name, preset, items))


def _calibrated(load: Callable[[], Any], name: str, preset: str, items: int) -> Any:
    return compress(load(), preset, calibration=REFERENCE_MODELS[name].calibration(items), measure=False)


def run_model(name: str, options: argparse.Namespace, command: str) -> list[Record]:
    """Records of one pipeline, the dense one first."""
    model, folder = REFERENCE_MODELS[name], options.out / name
    # Plain rounding, also where the preset asks for a calibrated algorithm: said in the arm's name.
    recipes = [f"{preset}:rtn" if PRESETS[preset].needs_calibration else preset for preset in options.presets]
    arms = make_arms([str(MODELS / name)], [DENSE, *recipes], device=options.device)
    if options.calibration_items:
        arms += [calibrated_arm(name, preset, options.calibration_items, options.device) for preset in options.presets]
    folders = generate(
        arms,
        model.conditions(max(2, round(options.count * model.share))),
        folder,
        batch_size=options.batch_size,
        options={**model.options, **({"num_inference_steps": options.steps} if options.steps else {})},
        data_name=model.asked if model.asked in ("classes", "unconditional") else f"{model.asked}/eval_prompts.txt",
        command=command,
        device=options.device,
    )
    dense = open_pictures(folders[DENSE])
    classifier = load_classifier(CLASSIFIER)
    scorer = SetScorer(dense, ClassifierExtractor(CLASSIFIER, size=model.size), ["fid"])
    for arm, path in folders.items():
        if arm == DENSE:
            continue
        pictures = open_pictures(path)
        # Pictures of 32 pixels are too small for the classifier to name.
        metrics, _ = score_pairs(dense, pictures, classifier=None if model.size else classifier)
        load_record(path).with_metrics([*metrics, *scorer.score(pictures)]).save(path / "record.json")
    records = [load_record(path) for path in folders.values()]
    write_report(records, folder / "report", title=f"{name}, every preset")
    return records


def put(document: Path, text: str) -> None:
    """Replace what lies between the marks."""
    whole = document.read_text(encoding="utf-8")
    if BEGIN not in whole or END not in whole:
        raise SystemExit(f"{document}: needs the lines {BEGIN} and {END}; the tables go between them.")
    head, tail = whole.partition(BEGIN)[0], whole.partition(END)[2]
    document.write_text(f"{head}{BEGIN}\n{text}{END}{tail}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    command = command_line("python eval/reference_results.py", sys.argv[1:] if arguments is None else arguments)
    parts, notes = [], {}
    for name in options.models:
        records = run_model(name, options, command)
        parts.append(f"### {name}\n\n{comparison_table(records, COSTS)}")
        notes |= dict.fromkeys(table_notes(records))
    text = "\n".join([*parts, *(f"- {note}" for note in notes)]) + "\n"
    if options.markdown:
        put(options.markdown, text)
    print(text)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
