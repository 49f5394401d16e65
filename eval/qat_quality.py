"""QVGen beside trainings without its branch, at equal steps and data, on the moving emoji; the command of
docs/training.md.

    python eval/qat_quality.py --device cuda --out qat.json                            # both formats, three seeds
    python eval/qat_quality.py --device cuda --out qat.json --arms qvgen --decay-fraction 0.4 0.6 1.0
    OMP_NUM_THREADS=1 python eval/qat_quality.py --rehearse                            # a minute on a CPU
    python eval/qat_quality.py --table qat*.json                                       # of earlier runs together

All arms quantize the same layers of emoji_wan (64x64, 9 frames) to the same formats, and start from the same ranges:

- start: not trained: rounded to nearest within ranges of least error, with the clips that trainings begin with;
- lsq: learns clips, noised, that the teacher draws without guidance, and not its outputs (the task loss, as LSQ);
- kd: learns the teacher's outputs, without a branch (as Q-DM);
- efficientdm: the same, weights frozen, a low-rank change of them trained;
- qvgen: the same as kd with the branch, which has left after ``--decay-fraction`` of the steps; an arm for each.

Data are calls of the teacher's own trajectories for every second line of the model's eval_prompts.txt (each names
another emoji): no data set. A seed decides noise, steps that are kept, and order. The clips that are judged are of the
other lines and of other noise, the same for all arms and seeds, by the deployed model:

    loss      squared error of the output over the teacher's mean square, on calls of trajectories that were not trained
              on, of the other lines
    PSNR      to the teacher's clips of the same noise, in dB, mean over clips
    motion    RMS of the error of the differences between frames, over RMS of the teacher's differences
    top-1     share of frames whose emoji the classifier of emoji_pixart names first
    moved     share of clips with the motion that was asked for; "both": and the emoji, by the frames' mean logits

``--out`` keeps what was measured; arms that it has are not run again. Beside it, ``*.curves.json`` keeps of each
training the loss and the norm of the gradient (before it was clipped) of every step, and the singular values of every
layer's branch, with its gates, at up to 25 steps.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

import diffuse_compress  # noqa: F401  (attaches compress)
from diffuse_compress.calls import Call
from diffuse_compress.evaluation.environment import command_line, describe_device
from diffuse_compress.evaluation.features import load_classifier
from diffuse_compress.training.batches import RecordedCalls, collated
from diffuse_compress.training.config import QVGenConfig
from diffuse_compress.training.loss import predicted
from diffuse_compress.training.order import draw_generator
from diffuse_compress.training.prepare import prepare
from diffuse_compress.training.sources import record_calls
from diffuse_compress.training.trainer import QATTrainer

MODELS = Path(__file__).resolve().parent.parent / "examples" / "reference_models"
MODEL, CLASSIFIER = MODELS / "emoji_wan", MODELS / "emoji_pixart"
FORMATS = ("w4a4", "w3a3")
ARMS = ("start", "lsq", "kd", "efficientdm", "qvgen")
# What must not differ between the arms of a file.
SETTINGS = ("steps", "batch_size", "items", "samples", "count", "inference_steps", "learning_rate", "phi_rank")
JUDGED_SEED, SNAPSHOTS = 1_000, 24
COLUMNS = {"loss": "held-out loss", "psnr": "PSNR, dB", "motion_error": "motion error"}
COLUMNS |= {"top1": "top-1", "moved": "moved", "both": "both", "grad_norm": "gradient norm"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--decay-fraction", type=float, nargs="+", default=[0.8], help="of qvgen, an arm for each")
    parser.add_argument("--steps", type=int, default=2000, help="of every training")
    parser.add_argument("--batch-size", type=int, default=16, help="calls of a training step")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of everything but clips")
    parser.add_argument("--phi-rank", type=int, default=32, help="of the branch; layers are 128 wide and more")
    parser.add_argument("--items", type=int, default=128, help="trajectories to train on")
    parser.add_argument("--samples", type=int, default=1024, help="calls kept of them")
    parser.add_argument("--inference-steps", type=int, default=20, help="of trajectories and clips")
    parser.add_argument("--count", type=int, default=128, help="clips of each arm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, help="start no arm after that time; call again to go on")
    parser.add_argument("--out", type=Path, help="results as JSON; a file that is there is completed")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these results and stop")
    parser.add_argument("--rehearse", action="store_true", help="one format and seed, and few of everything")
    options = parser.parse_args(arguments)
    if options.rehearse:
        few = {"formats": options.formats[:1], "seeds": [0], "steps": 8, "batch_size": 2, "phi_rank": 4, "items": 2}
        vars(options).update(few, samples=4, count=2, inference_steps=3)
    return options


def load_score() -> Any:
    """The model's own score.py, which draws and judges clips."""
    name = "emoji_wan_score"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, MODEL / "score.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses look up their annotations
        spec.loader.exec_module(module)
    return sys.modules[name]


def prompts(count: int, *, training: bool) -> list[str]:
    """Captions; those of trainings are none of the others."""
    lines = (MODEL / "eval_prompts.txt").read_text().splitlines()
    known = lines[1::2] if training else lines[::2]
    return [known[index % len(known)] for index in range(count)]


def load(device: str) -> Any:
    """The dense pipeline, in float32, silent."""
    pipe = DiffusionPipeline.from_pretrained(MODEL).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- data ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model: nn.Module, data: RecordedCalls, device: str, size: int = 16) -> list[torch.Tensor]:
    """What a model answers to each call, on the CPU."""
    found: list[torch.Tensor] = []
    for first in range(0, len(data), size):
        places = range(first, min(first + size, len(data)))
        batch = collated([data.draw(place, draw_generator(0, 0)) for place in places]).to(device)
        found += predicted(batch.call.run(model), batch).float().cpu().split(1)
    return found


def trajectories(pipe: Any, seed: int, options: argparse.Namespace, *, training: bool) -> RecordedCalls:
    """Calls of the teacher's trajectories with guidance, and its outputs."""
    arguments = {**load_score().DEFAULTS, "num_inference_steps": options.inference_steps}
    asked = prompts(options.items, training=training)
    calls = record_calls(pipe, asked, num_samples=options.samples, seed=seed, **arguments)
    return calls.with_targets(outputs(pipe.transformer, calls, options.device))


@torch.no_grad()
def task_of(pipe: Any, data: RecordedCalls, seed: int, options: argparse.Namespace) -> RecordedCalls:
    """The same calls with noised clips in them, and noise minus clip as what is to be learned.

    A clip is the teacher's own for the text of the call (none where that is the empty one), drawn without guidance: the
    teacher's outputs are what is expected of noise minus clip then. At most 64 clips of no text are drawn.
    """
    arguments = {**load_score().DEFAULTS, "num_inference_steps": options.inference_steps, "guidance_scale": 1.0}
    texts: list[torch.Tensor] = []
    model: nn.Module = pipe.transformer

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        texts.append(kwargs["encoder_hidden_states"].cpu())

    known: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        asked = [*dict.fromkeys(prompts(options.items, training=True)), *[""] * min(64, options.items)]
        for first in range(0, len(asked), 16):
            part, noise = asked[first : first + 16], torch.Generator().manual_seed(7_000_003 + 10_000 * seed + first)
            drawn = pipe(part, generator=noise, output_type="latent", **arguments).frames.float().cpu()
            known += zip(texts[-1], drawn, strict=True)
    finally:
        handle.remove()
    together = torch.stack([text for text, _ in known])
    calls, truths, generator = [], [], torch.Generator().manual_seed(seed)
    for place in range(len(data)):
        call = data.call(place)
        distances = (together - call.kwargs["encoder_hidden_states"].cpu()).flatten(1).norm(dim=1)
        same = (distances <= distances.min() + 1e-3).nonzero().flatten()
        clip = known[int(same[place % len(same)])][1][None]
        sigma = (call.kwargs["timestep"].float() / 1000).reshape(-1, 1, 1, 1, 1).cpu()
        noise = torch.randn(clip.shape, generator=generator)
        sample = ((1 - sigma) * clip + sigma * noise).to(call.kwargs["hidden_states"].dtype)
        calls.append(Call(call.args, {**call.kwargs, "hidden_states": sample}))
        truths.append(noise - clip)
    return RecordedCalls(calls, truths=truths)


# --- arms ---------------------------------------------------------------------------------------------------------


def arms_of(options: argparse.Namespace) -> list[str]:
    """Names of the arms, "qvgen-0.8" for each fraction."""
    return [
        name
        for arm in options.arms
        for name in ([f"qvgen-{fraction:g}" for fraction in options.decay_fraction] if arm == "qvgen" else [arm])
    ]


def config_of(arm: str, form: str, seed: int, options: argparse.Namespace) -> QVGenConfig:
    """What is trained."""
    method, _, fraction = arm.partition("-")
    return QVGenConfig(
        form,
        method="kd" if method == "start" else method,
        phi_rank=options.phi_rank,
        decay_fraction=float(fraction or 0.8),
        learning_rate=options.learning_rate,
        max_train_steps=options.steps,
        train_batch_size=options.batch_size,
        seed=seed,
    )


class Bench:
    """What the teacher draws, and how far others are from that."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.score = options, load_score()
        self.asked = prompts(options.count, training=False)
        self.classifier = load_classifier(CLASSIFIER)
        pipe = load(options.device)
        self.held_out = trajectories(pipe, JUDGED_SEED, options, training=False)
        self.clips = self._draw(pipe)
        self.teacher = self._judged(self.clips)
        self._data: tuple[int, dict[str, RecordedCalls]] | None = None

    def _draw(self, pipe: Any) -> torch.Tensor:
        """Clips [n, frames, 3, 64, 64]."""
        steps = self.options.inference_steps
        found: torch.Tensor = self.score.generate(pipe, self.asked, seed=JUDGED_SEED, num_inference_steps=steps)
        return found

    def _judged(self, clips: torch.Tensor) -> dict[str, float]:
        verdict = self.score.judge(self.classifier, clips, self.asked)
        return {"top1": verdict.top1, "moved": verdict.motion, "both": verdict.both}

    def _training_data(self, seed: int) -> dict[str, RecordedCalls]:
        """{"kd", "lsq"} of a seed; the last one's are kept."""
        if self._data is None or self._data[0] != seed:
            pipe = load(self.options.device)
            taught = trajectories(pipe, seed, self.options, training=True)
            found = {"kd": taught}
            if "lsq" in self.options.arms:
                found["lsq"] = task_of(pipe, taught, seed, self.options)
            self._data = seed, found
        return self._data[1]

    def measure(self, form: str, arm: str, seed: int) -> tuple[dict[str, float], dict[str, Any]]:
        """(figures, curves) of one arm."""
        pipe, config = load(self.options.device), config_of(arm, form, seed, self.options)
        if arm == "start":
            prepare(pipe.transformer, config, total_steps=config.max_train_steps).convert()
            return self._figures(pipe), {}
        data = self._training_data(seed)["lsq" if arm == "lsq" else "kd"]
        began = time.perf_counter()
        curves = self._train(pipe, config, data)
        found = {
            "seconds": time.perf_counter() - began,
            "grad_norm": statistics.fmean(curves["grad_norm"]),
            "train_loss": statistics.fmean(curves["loss"][-50:]),
        }
        return {**self._figures(pipe), **found}, curves

    def _train(self, pipe: Any, config: QVGenConfig, data: RecordedCalls) -> dict[str, Any]:
        every = max(1, config.max_train_steps // SNAPSHOTS) if config.has_phi else None
        trainer = QATTrainer(pipe, config, data, teacher="cached", spectrum_steps=every)
        result = trainer.train()
        trainer.convert()
        spectra = {
            step: {name: rounded(values) for name, values in layers.items()} for step, layers in result.spectra.items()
        }
        return {"loss": rounded(result.losses), "grad_norm": rounded(result.gradient_norms), "spectrum": spectra}

    def _figures(self, pipe: Any) -> dict[str, float]:
        targets = [self.held_out.target(place) for place in range(len(self.held_out))]
        wanted = torch.cat([target for target in targets if target is not None])
        found = torch.cat(outputs(pipe.transformer, self.held_out, self.options.device))
        loss = float((found - wanted).square().mean() / wanted.square().mean())
        clips = self._draw(pipe)
        mse = (clips - self.clips).double().square().flatten(1).mean(1).clamp_min(1e-10)
        moving = self.clips.diff(dim=1)
        motion = float((clips.diff(dim=1) - moving).norm() / moving.norm())
        psnr = float((-10 * mse.log10()).mean())
        return {"loss": loss, "psnr": psnr, "motion_error": motion, **self._judged(clips)}


def rounded(values: torch.Tensor) -> list[float]:
    """To four digits, for files."""
    return [float(f"{value:.4g}") for value in values.tolist()]


# --- files --------------------------------------------------------------------------------------------------------


def write(path: Path, content: Any, indent: int | None = 1) -> None:
    """Replace a file; a run that is killed leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=indent))
    part.replace(path)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """{"settings", "environments", "teacher", "arms": {"format/arm/seed": what was measured}}."""
    began, settings = time.monotonic(), {key: getattr(options, key) for key in SETTINGS}
    results: dict[str, Any] = {"settings": settings, "environments": [], "arms": {}}
    curves: dict[str, Any] = {}
    aside = None if options.out is None else options.out.with_suffix(".curves.json")
    if options.out is not None and options.out.exists():
        results = json.loads(options.out.read_text())
        if results["settings"] != settings:
            raise SystemExit(f"{options.out}: its arms were run with {results['settings']}, these with {settings}.")
    if aside is not None and aside.exists():
        curves = json.loads(aside.read_text())
    results["environments"].append(
        {
            "device": describe_device(options.device, 1),
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "command": command_line("python eval/qat_quality.py", sys.argv[1:]),
        }
    )
    wanted = [(seed, form, arm) for seed in options.seeds for form in options.formats for arm in arms_of(options)]
    left = [one for one in wanted if f"{one[1]}/{one[2]}/{one[0]}" not in results["arms"]]
    bench = Bench(options) if left else None
    for seed, form, arm in left:
        if options.minutes is not None and time.monotonic() >= began + 60 * options.minutes:
            break
        assert bench is not None
        key = f"{form}/{arm}/{seed}"
        results["teacher"] = bench.teacher
        found, curve = bench.measure(form, arm, seed)
        results["arms"][key], curves[key] = found, curve
        print(f"{key}: {found}", file=sys.stderr, flush=True)
        if options.out is not None and aside is not None:
            write(aside, curves, None)
            write(options.out, results)
    return results


def table(results: dict[str, Any]) -> str:
    """Means of the seeds, lowest and highest in brackets, as Markdown."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for key, values in results["arms"].items():
        form, arm, _ = key.split("/")
        found.setdefault((form, arm), []).append(values)
    lines = [f"| format | arm | seeds | {' | '.join(COLUMNS.values())} |", "|---" * (3 + len(COLUMNS)) + "|"]
    if "teacher" in results:
        lines.append(f"| | teacher | | {' | '.join(_span([results['teacher']], name) for name in COLUMNS)} |")
    for (form, arm), values in sorted(found.items(), key=lambda item: (FORMATS.index(item[0][0]), _place(item[0][1]))):
        lines.append(f"| {form} | {arm} | {len(values)} | {' | '.join(_span(values, name) for name in COLUMNS)} |")
    return "\n".join(lines)


def _place(arm: str) -> tuple[int, str]:
    return ARMS.index(arm.partition("-")[0]), arm


def _span(found: list[dict[str, float]], name: str) -> str:
    values = [one[name] for one in found if name in one]
    if not values:
        return ""
    spread = f" ({min(values):.3g}-{max(values):.3g})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{spread}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, or print the table of results."""
    options = parse_arguments(arguments)
    if options.table:
        results: dict[str, Any] = {"arms": {}}
        for path in options.table:
            read = json.loads(path.read_text())
            results = {**results, **read, "arms": {**results["arms"], **read["arms"]}}
        print(table(results))
        return
    print(table(run(options)))


if __name__ == "__main__":
    main()
