"""What each quantization preset costs in picture quality, beside controls; the command of docs/benchmarks.md.

    python eval/quantization_presets.py --model examples/reference_models/emoji_pixart \\
        --prompts 256 --steps 20 --outliers --fake --out results.json --markdown
    python eval/quantization_presets.py --table results.json         # print the tables of an earlier run

Every arm makes the same prompts from the same starting noise (one generator per prompt), in float32 except where it
says otherwise, and is compared with the dense float32 pipeline: PSNR and SSIM on the whole picture and on the box
around the glyph, and the verdicts of the classifier that lies in the model's folder (its classifier.py is run). The
controls say how large such numbers are for changes that nobody minds. ``--outliers`` repeats the presets on a
transformer of the same function with outlier channels; ``--fake`` adds each preset simulated in float32 from the same
codes. Results are written after each arm; ``--resume`` goes on where a run stopped.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

import diffuse_compress as dc
from diffuse_compress.evaluation.comparison import Reference, psnr_difference
from diffuse_compress.evaluation.environment import command_line, device_name
from diffuse_compress.evaluation.fake_quantize import to_fake_quantized
from diffuse_compress.evaluation.features import load_classifier
from diffuse_compress.evaluation.images import accepted_options, generate_pictures
from diffuse_compress.evaluation.macs import count_macs, share_at_scheme
from diffuse_compress.evaluation.outliers import add_outlier_channels
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.presets import PRESETS

OUTLIERS = "outliers/"
CONTROLS = {
    "bf16": "whole pipeline in bfloat16",
    "bf16-weights": "denoiser's weights rounded to bfloat16, computed in float32",
    "fewer-steps": "one step fewer",
    "other-seed": "other starting noise",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a pipeline with a transformer")
    parser.add_argument("--prompt-file", type=Path, help="one prompt a line (default: eval_prompts.txt of the model)")
    parser.add_argument("--prompts", type=int, default=256, help="use the first N prompts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--presets", nargs="*", default=list(PRESETS), choices=list(PRESETS), metavar="PRESET")
    parser.add_argument("--controls", nargs="*", default=list(CONTROLS), choices=list(CONTROLS), metavar="CONTROL")
    every = {"type": int, "nargs": "?", "const": sys.maxsize, "default": 0, "metavar": "N"}
    parser.add_argument("--outliers", **every, help="outlier channels, same function, on the first N prompts or all")
    parser.add_argument("--fake", **every, help="each preset simulated in float32, on the first N prompts or all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, default=Path("results.json"), help="pictures go to OUT's .pictures folder")
    parser.add_argument("--resume", action="store_true", help="keep the arms that OUT already has")
    parser.add_argument("--markdown", action="store_true", help="print tables at the end")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="only print the tables of this file")
    options = parser.parse_args(arguments)
    if options.model is None and options.table is None:
        parser.error("give --model, or --table to print earlier results")
    return options


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The first ``--prompts`` lines of the prompt file."""
    path = options.prompt_file or options.model / "eval_prompts.txt"
    prompts = [line for line in path.read_text().splitlines() if line.strip()][: options.prompts]
    if not prompts:
        raise SystemExit(f"{path} holds no prompts.")
    return prompts


def weights_digest(folder: Path) -> str:
    """Hash of every weight file of the pipeline, so that no run is resumed on another model."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Where and with what a run was made."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno", "src", "kernels"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit + ("+changes" if changed else ""),
        "date": datetime.date.today().isoformat(),
        "command": command_line("python eval/quantization_presets.py", sys.argv[1:]),
    }


class Study:
    """All arms of a run: makes them, keeps their pictures, writes the results after each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.prompts = options, read_prompts(options)
        self.classifier = load_classifier(options.model)
        self.settings = {
            "model": options.model.name,
            "weights": weights_digest(options.model),
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16],
            "steps": options.steps,
            "guidance": options.guidance,
            "seed": options.seed,
            "device": torch.device(options.device).type,
        }
        self.folder = options.out.with_suffix(".pictures")
        self.results: dict[str, Any] = {"settings": self.settings, "environment": environment(options), "arms": {}}
        if options.resume and options.out.exists():
            self._resume()

    def _resume(self) -> None:
        found = json.loads(self.options.out.read_text())
        other = {key: found["settings"].get(key) for key, value in self.settings.items()}
        different = [key for key, value in self.settings.items() if other[key] != value]
        if different:
            raise SystemExit(
                f"--resume: {self.options.out} was made with other {', '.join(different)}. Choose another --out."
            )
        self.results["arms"] = found["arms"]

    def arms(self) -> list[str]:
        """Names in the order in which they run; the dense pictures come first."""
        options = self.options
        names = ["dense", *options.controls]
        for preset in options.presets:
            names.append(preset)
            if options.fake:
                names.append(f"{preset}:fake")
                if preset == "fp8" and torch.device(options.device).type == "cpu":
                    names.append(f"{preset}:fake-as-written")
        if options.outliers:
            controls = [name for name in options.controls if name == "bf16"]
            names += [f"{OUTLIERS}{name}" for name in ("dense", *controls, *options.presets)]
        return names

    def run(self) -> dict[str, Any]:
        """Make the arms that are missing."""
        names = self.arms()
        todo = [name for name in names if not self._is_made(name)]
        with tqdm(total=sum(len(self._prompts(name)) for name in todo), unit="picture", smoothing=0.05) as bar:
            for name in todo:
                bar.set_description(name)
                self._run_arm(name, bar)
                self._save()
        self._save()
        return self.results

    def _is_made(self, name: str) -> bool:
        arm = self.results["arms"].get(name)
        if arm is None or not self._file(name).exists():
            return False
        return "psnr" not in arm or arm["psnr"]["count"] == len(self._prompts(name))

    def _run_arm(self, name: str, bar: Any) -> None:
        done = 0

        def on_batch(count: int) -> None:
            nonlocal done
            bar.update(count - done)
            done = count

        pipe, record = self._pipeline(name)
        own = {"num_inference_steps": self.options.steps, "guidance_scale": self.options.guidance}
        if name == "fewer-steps":
            own["num_inference_steps"] -= 1
        started = time.perf_counter()
        pictures = generate_pictures(
            pipe,
            self._prompts(name),
            seed=self.options.seed + (name == "other-seed"),
            batch_size=self.options.batch_size,
            options={**accepted_options(pipe, DEFAULTS), **own},
            on_batch=on_batch,
        )
        record.update(seconds=round(time.perf_counter() - started, 2), commit=self.results["environment"]["commit"])
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file({"pictures": pictures}, self._file(name))
        self.results["arms"][name] = {**record, **self._score(name, pictures)}

    def _prompts(self, name: str) -> list[str]:
        """What an arm draws: all prompts, or the first of them. Each has its own noise, so they compare pairwise."""
        limit = self.options.outliers if name.startswith(OUTLIERS) else self.options.fake if ":" in name else None
        return self.prompts[:limit]

    def _score(self, name: str, pictures: torch.Tensor) -> dict[str, Any]:
        prompts, count = self._prompts(name), len(pictures)
        if name == "dense":
            accuracy = Reference(pictures, prompts, self.classifier).accuracy
            return {} if accuracy is None else {"accuracy": vars(accuracy)}
        reference = Reference(self._pictures("dense")[:count], prompts, self.classifier)
        scores = reference.compare(pictures).to_dict()
        if ":" in name:
            real = self._pictures(name.partition(":")[0])[:count]
            scores["real_minus_fake_db"] = vars(psnr_difference(reference, pictures, real))
            scores["psnr_to_real"] = float(Reference(real, prompts).psnr(pictures).mean())
        return scores

    def _pipeline(self, name: str) -> tuple[Any, dict[str, Any]]:
        """The pipeline of an arm, on its device, and what is known of it before it runs."""
        options, record = self.options, {}
        pipe = load_pipeline(options.model, torch.bfloat16 if name.endswith("bf16") else torch.float32)
        arm = name.removeprefix(OUTLIERS)
        if name != arm:
            add_outlier_channels(pipe.transformer)
        if arm == "bf16-weights":
            for parameter in pipe.transformer.parameters():
                parameter.data = parameter.data.bfloat16().float()
        pipe.to(options.device)
        preset, _, fake = arm.partition(":")
        if preset in PRESETS:
            pipe.compress(preset_config(preset), measure=False)
            if not fake:
                record = self._describe(pipe, preset, with_file=name == arm)
            else:
                to_fake_quantized(pipe.transformer, follow_device=fake == "fake")
        return pipe, record

    def _describe(self, pipe: Any, preset: str, with_file: bool) -> dict[str, Any]:
        """Share of MACs, compute paths and file size of a compressed pipeline."""
        layers = [module for module in pipe.transformer.modules() if hasattr(module, "compute_path")]
        record: dict[str, Any] = {"paths": sorted({layer.compute_path().name for layer in layers})}
        if with_file:
            own = {**accepted_options(pipe, DEFAULTS), "num_inference_steps": 2, "guidance_scale": 1.0}
            macs = count_macs(pipe.transformer, lambda: generate_pictures(pipe, self.prompts[:1], options=own))
            record["macs_at_claimed_precision"] = share_at_scheme(pipe.transformer, macs, PRESETS[preset].scheme)
            record.update(file_sizes(self.options.model, preset))
        return record

    def _file(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '-').replace(':', '-')}.safetensors"

    def _pictures(self, name: str) -> torch.Tensor:
        return load_file(self._file(name))["pictures"]

    def _save(self) -> None:
        order = {name: index for index, name in enumerate(self.arms())}
        arms = self.results["arms"]
        self.results["arms"] = {name: arms[name] for name in sorted(arms, key=lambda name: order.get(name, len(order)))}
        temporary = self.options.out.with_suffix(".tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        os.replace(temporary, self.options.out)


# Arguments that a pipeline takes if it knows them: small pictures, short captions.
DEFAULTS = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 24}


def load_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """A fresh pipeline without progress bar."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def preset_config(preset: str) -> dc.QuantizationConfig:
    """The preset; plain rounding written out where it is not the default."""
    algorithm = RTNConfig() if PRESETS[preset].needs_calibration else None
    return dc.QuantizationConfig(preset, algorithm=algorithm)


def file_sizes(folder: Path, preset: str) -> dict[str, Any]:
    """Bytes of the transformer's weight files, bfloat16 and compressed from bfloat16, as ``save_pretrained`` writes."""

    def saved_bytes(change: Callable[[ModelMixin], object]) -> int:
        model = load_pipeline(folder, torch.bfloat16).transformer
        change(model)
        with tempfile.TemporaryDirectory() as target:
            model.save_pretrained(target)
            return sum(path.stat().st_size for path in Path(target).glob("*.safetensors"))

    dense = saved_bytes(lambda model: None)
    small = saved_bytes(lambda model: model.compress(preset_config(preset), measure=False))
    return {"file_bytes_bf16": dense, "file_bytes": small, "file_ratio": small / dense}


# --- tables -----------------------------------------------------------------------------------------------------


def _interval(value: dict[str, Any] | None, digits: int, percent: bool = False, sign: bool = False) -> str:
    if value is None:
        return "–"
    factor, plus = (100 if percent else 1), "+" if sign else ""
    mean, low, high = (f"{value[key] * factor:{plus}.{digits}f}" for key in ("value", "low", "high"))
    return f"{mean} [{low}, {high}]"


def quality_rows(results: dict[str, Any], prefix: str) -> list[list[str]]:
    """One row for each arm of a column."""
    rows = []
    for name, arm in results["arms"].items():
        outliers = name.startswith(OUTLIERS)
        if "psnr" not in arm or ":" in name or outliers != (prefix == OUTLIERS):
            continue
        label = name.removeprefix(OUTLIERS)
        rows.append(
            [
                f"`{label}`" if label in PRESETS else label,
                _interval(arm["psnr"], 1),
                _interval(arm["ssim"], 3),
                _interval(arm["box_psnr"], 1),
                _interval(arm["box_ssim"], 3),
                _interval(arm.get("agreement"), 1, percent=True),
                _interval(arm.get("accuracy"), 1, percent=True),
                _interval(arm.get("accuracy_change"), 1, percent=True, sign=True),
            ]
        )
    return rows


def size_rows(results: dict[str, Any]) -> list[list[str]]:
    """Precision, size and simulation of every preset."""
    rows = []
    for name, arm in results["arms"].items():
        if name not in PRESETS or "file_ratio" not in arm:
            continue
        fake = results["arms"].get(f"{name}:fake", {})
        written = results["arms"].get(f"{name}:fake-as-written", {})
        rows.append(
            [
                f"`{name}`",
                ", ".join(arm["paths"]),
                f"{100 * arm['macs_at_claimed_precision']:.1f} %",
                f"{arm['file_ratio']:.3f}",
                _interval(fake.get("real_minus_fake_db"), 2, sign=True),
                _interval(written.get("real_minus_fake_db"), 2, sign=True) if written else "same",
                f"{arm['seconds']:.0f}",
            ]
        )
    return rows


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/benchmarks.md."""
    settings, where = results["settings"], results["environment"]
    dense = results["arms"].get("dense", {}).get("accuracy")
    header = ["", "PSNR, dB", "SSIM", "glyph PSNR, dB", "glyph SSIM", "same name, %", "right name, %", "change, points"]
    parts = [
        f"{settings['prompts']} prompts, {settings['steps']} steps, guidance {settings['guidance']}, seed "
        f"{settings['seed']}; {where['device']}, {where['threads']} thread(s), torch {where['torch']}, "
        f"{where['date']}, commit {where['commit']}.",
        f"`{where['command']}`",
        f"The dense float32 pipeline: right name {_interval(dense, 1, percent=True)} %.",
        _table(header, quality_rows(results, "")),
    ]
    if any(name.startswith(OUTLIERS) for name in results["arms"]):
        count = next(arm["psnr"]["count"] for name, arm in results["arms"].items() if name.startswith(OUTLIERS))
        intro = f"With outlier channels (same function in float32), the first {count} prompts:"
        parts += [intro, _table(header, quality_rows(results, OUTLIERS))]
    size_header = [
        "",
        "path",
        "MACs at that precision",
        "file over bf16",
        "real - simulated, dB",
        "as written, dB",
        "s",
    ]
    parts.append(_table(size_header, size_rows(results)))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    if options.table is not None:
        print(markdown(json.loads(options.table.read_text())))
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    results = Study(options).run()
    if options.markdown:
        print(markdown(results))


if __name__ == "__main__":
    main()
