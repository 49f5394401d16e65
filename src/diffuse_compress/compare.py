"""Two pipelines, the same prompts and noise: what the second changes, in numbers and side by side."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.components import is_pipeline
from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.conditions import Condition
from diffuse_compress.evaluation.images import RESERVED, draw_batch
from diffuse_compress.evaluation.metrics import PSNR_CAP_DB
from diffuse_compress.evaluation.paired import CLIP, paired_interval, paired_metric, paired_values
from diffuse_compress.evaluation.records import Metric
from diffuse_compress.evaluation.samples import write_atomically
from diffuse_compress.evaluation.statistics import Interval
from diffuse_compress.pipeline_call import untouched
from diffuse_compress.progress import track
from diffuse_compress.report_html import data_uri, render_template
from diffuse_compress.skeleton import default_dtype, load, local_folder

__all__ = ["Drawn", "PairedComparison", "compare", "draw", "latent_errors"]

_FRAME_MILLISECONDS = 125


@dataclass(frozen=True)
class PairedComparison:
    """What :func:`compare` found; ``print`` shows it.

    Attributes:
        names: of the two sides; the first is the reference.
        metrics: means with intervals, in the order of the page.
        absent: {metric: why it could not be measured here}.
        per_sample: {metric: [prompts, seeds] float64}.
        latent_error: relative error of the latents after each step, with its interval; empty if absent.
        seconds: a sample, of each side, the first call included.
        out: the page, or None.
    """

    names: tuple[str, str]
    metrics: tuple[Metric, ...]
    absent: dict[str, str]
    per_sample: dict[str, torch.Tensor] = field(repr=False)
    latent_error: tuple[Interval, ...]
    seconds: tuple[float, float]
    out: Path | None

    def __getitem__(self, name: str) -> Metric:
        """The metric of a name. Raises KeyError for one that was not measured, with the reason."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise KeyError(f"{name}: {self.absent.get(name, 'measured are ' + ', '.join(m.name for m in self.metrics))}")

    def __str__(self) -> str:
        lines = [f"{self.names[1]} against {self.names[0]}"]
        lines += [f"  {metric}" for metric in self.metrics]
        lines += [f"  {name}: not measured: {reason}" for name, reason in self.absent.items()]
        if self.latent_error:
            lines.append("  latent error by step: " + " ".join(f"{error.value:.3g}" for error in self.latent_error))
        lines.append(f"  seconds a sample: {self.seconds[0]:.3g} and {self.seconds[1]:.3g}, first call included")
        return "\n".join([*lines, f"  pictures: {self.out}"] if self.out else lines)


def compare(
    a: Any,
    b: Any,
    prompts: str | Sequence[str] | Sequence[int] | None,
    seeds: Iterable[int] = range(4),
    out: str | Path | None = "compare.html",
    *,
    batch_size: int = 4,
    names: tuple[str, str] | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    clip: str = CLIP,
    **pipe_kwargs: Any,
) -> PairedComparison:
    """Draw every prompt with every seed on both sides, and measure what changed.

    Each sample has a CPU generator of its own, so both sides start from the same noise. Folders and Hub ids are loaded
    one after the other, so only one is in memory at a time. Means are over samples; a prompt's seeds are averaged
    before prompts are resampled for the intervals.

    Args:
        a: the reference, mostly the uncompressed pipeline: a diffusers pipeline, a folder or a Hub id.
        b: the other one. Pipelines are run where they are and left as they were.
        prompts: texts, class labels of a class-conditional pipeline, or None for an unconditional one.
        seeds: of each prompt's samples.
        out: HTML page with all pictures side by side; None writes none.
        batch_size: samples a call.
        names: of the two sides on the page.
        device: for what is loaded here; CUDA if there is one, else the CPU.
        dtype: for what is loaded here: "auto" (as stored; float16 becomes float32 on a CPU) or a name of torch's.
        clip: CLIP model on this machine, for CLIP-I.
        **pipe_kwargs: for both pipelines' calls (``num_inference_steps=``, ``guidance_scale=``, ...).

    Raises:
        ConfigError: nothing to compare, other sizes or numbers of frames on the two sides, or arguments that are set
            here.
    """
    conditions, numbers = [_condition(p) for p in _listed(prompts)], [int(seed) for seed in seeds]
    reserved = sorted(RESERVED & set(pipe_kwargs))
    if not conditions or not numbers or reserved or batch_size < 1 or a is b:
        what = f"no {', '.join(reserved)}" if reserved else "two pipelines, prompts, seeds and batch_size >= 1"
        got = "one pipeline twice" if a is b else f"{len(conditions)} prompts, {len(numbers)} seeds, {batch_size=}"
        raise ConfigError(f"compare: needs {what}, got {got}. Seeds and outputs are set here.")
    if out is not None and Path(out).suffix.lower() != ".html":
        raise ConfigError(f"compare: out must end with .html, got {out}.")
    titles = names or _names(a, b)
    asked = [(condition, seed) for condition in conditions for seed in numbers]
    sides = []
    for side, title in zip((a, b), titles, strict=True):
        with _loaded(side, device, dtype) as pipe:
            sides.append(draw(pipe, asked, batch_size, pipe_kwargs, title))
    result = _result(sides[0], sides[1], (len(conditions), len(numbers)), titles, clip, out)
    if result.out is not None:
        write_atomically(result.out, _page(result, sides[0], sides[1], conditions, numbers))
    return result


def _result(
    first: Drawn, second: Drawn, shape: tuple[int, int], titles: tuple[str, str], clip: str, out: str | Path | None
) -> PairedComparison:
    if first.pictures.shape != second.pictures.shape:
        raise ConfigError(
            f"compare: both sides must give pictures of one size, got {list(first.pictures.shape[1:])} and "
            f"{list(second.pictures.shape[1:])}. Give height= and width= (num_frames=)."
        )
    values, absent = _measure(first, second, clip)
    per_sample = {name: value.double().cpu().reshape(shape) for name, value in values.items()}
    errors = latent_errors(first, second)
    return PairedComparison(
        titles,
        tuple(paired_metric(name, value, titles[0]) for name, value in per_sample.items()),
        absent,
        per_sample,
        () if errors is None else tuple(paired_interval(step.reshape(shape)) for step in errors),
        (first.seconds, second.seconds),
        None if out is None else Path(out),
    )


@dataclass
class Drawn:
    """What a pipeline drew.

    Attributes:
        pictures: [n, 3, H, W] or [n, F, 3, H, W] in [0, 1].
        latents: [n, ...] after each step; empty where steps do not compare.
        seconds: a sample, the first call included.
    """

    pictures: torch.Tensor
    latents: list[torch.Tensor]
    seconds: float


def _listed(prompts: Any) -> list[Any]:
    return [prompts] if prompts is None or isinstance(prompts, str | int) else list(prompts)


def _condition(prompt: Any) -> Condition:
    return Condition(prompt) if prompt is None or isinstance(prompt, str) else Condition(class_label=int(prompt))


def _names(a: Any, b: Any) -> tuple[str, str]:
    found = [Path(side).name if isinstance(side, str | Path) else default for side, default in ((a, "a"), (b, "b"))]
    return (found[0], found[1]) if found[0] != found[1] else (f"{found[0]} (a)", f"{found[1]} (b)")


@contextlib.contextmanager
def _loaded(side: Any, device: str | torch.device | None, dtype: str) -> Iterator[Any]:
    """The pipeline; of a path, only for the time of the block."""
    if is_pipeline(side):
        yield side
        return
    if not isinstance(side, str | Path):
        raise ConfigError(f"compare: needs diffusers pipelines, folders or Hub ids, got {type(side).__name__}.")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = local_folder(str(side), weights=True)
    pipe = load(folder, default_dtype(dtype, folder, place), str(place))
    if not is_pipeline(pipe):
        raise ConfigError(f"{side}: compare needs a pipeline, got a single {type(pipe).__name__}.")
    yield pipe
    del pipe
    gc.collect()
    if place.type == "cuda":
        torch.cuda.empty_cache()


def draw(
    pipe: Any, asked: Sequence[tuple[Condition, int]], batch_size: int, options: dict[str, Any], title: str
) -> Drawn:
    """Samples of a pipeline and their latents after each step; the pipeline is left as it was.

    Args:
        pipe: a diffusers pipeline, where it is.
        asked: (what for, seed) of each sample.
        batch_size: samples a call.
        options: further arguments of the call.
        title: of the progress bar.
    """
    batches = [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
    pictures: list[torch.Tensor] = []
    latents: list[list[torch.Tensor]] = []
    started = time.perf_counter()
    with untouched(pipe):
        seen: list[torch.Tensor] = []
        _watch_steps(pipe, seen)
        for batch in track(batches, f"{title}: batches", None, None, {}):
            seen.clear()
            pictures.append(draw_batch(pipe, [c for c, _ in batch], [s for _, s in batch], options))
            # DiT takes its steps on both halves of guidance, which are equal.
            latents.append([step[: len(batch)] for step in seen if step.shape[0] % len(batch) == 0])
    seconds = (time.perf_counter() - started) / len(asked)
    whole = len({len(steps) for steps in latents}) == 1
    joined = [torch.cat([steps[i] for steps in latents]) for i in range(len(latents[0]))] if whole else []
    return Drawn(torch.cat(pictures), joined, seconds)


def _watch_steps(pipe: Any, seen: list[torch.Tensor]) -> None:
    """Keep what each step of the scheduler returns. Inside ``untouched`` the scheduler is a copy, so nothing stays."""
    scheduler: Any = getattr(pipe, "scheduler", None)
    if not callable(getattr(scheduler, "step", None)):
        return
    original: Callable[..., Any] = scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        after = output[0] if isinstance(output, tuple) else getattr(output, "prev_sample", None)
        if isinstance(after, torch.Tensor):
            seen.append(after.detach().float().cpu())
        return output

    scheduler.step = step


# --- measurement ------------------------------------------------------------------------------------------------


def _measure(first: Drawn, second: Drawn, clip: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """{metric: [n]} and {metric: why not}."""
    values, absent = paired_values(first.pictures, second.pictures, clip)
    errors = latent_errors(first, second)
    if errors is None:
        counts = f"{len(first.latents)} and {len(second.latents)}"
        absent["Latent error"] = f"the schedulers made {counts} comparable steps"
    else:
        values["Latent error"] = errors[-1]
    return values, absent


def latent_errors(first: Drawn, second: Drawn) -> torch.Tensor | None:
    """[steps, n] relative errors of the latents after each step, or None where the two sides' steps do not match."""
    one, two = first.latents, second.latents
    if not one or [step.shape for step in one] != [step.shape for step in two]:
        return None
    pairs = [(x.double().flatten(1), y.double().flatten(1)) for x, y in zip(one, two, strict=True)]
    return torch.stack([(x - y).norm(dim=1) / x.norm(dim=1).clamp_min(1e-30) for x, y in pairs])


# --- the page ---------------------------------------------------------------------------------------------------


def _page(
    result: PairedComparison, first: Drawn, second: Drawn, conditions: Sequence[Condition], seeds: Sequence[int]
) -> str:
    largest = max((error.value for error in result.latent_error), default=0.0)
    decibels = result.per_sample["PSNR"].flatten().tolist()
    asked = [(condition, seed) for condition in conditions for seed in seeds]
    worst = min(range(len(decibels)), key=decibels.__getitem__)
    pictures = [
        {
            "prompt": f"{_title(condition)}seed {seed}",
            "psnr_db": None if decibels[i] >= PSNR_CAP_DB else decibels[i],
            "is_worst": i == worst and len(asked) > 1,
            "before": _picture_uri(first.pictures[i]),
            "after": _picture_uri(second.pictures[i]),
            "pixelated": max(first.pictures.shape[-2:]) <= 128,
        }
        for i, (condition, seed) in enumerate(asked)
    ]
    return render_template(
        "compare.html.j2",
        names=result.names,
        prompts=len(conditions),
        seeds=len(seeds),
        unit="prompts" if len(conditions) > 1 else "seeds",
        metrics=result.metrics,
        absent=result.absent,
        seconds=result.seconds,
        latent_error=[
            {"error": e.value, "interval": str(e), "width": 100 * e.value / largest if largest else 0}
            for e in result.latent_error
        ],
        pictures=pictures,
    )


def _title(condition: Condition) -> str:
    asked = {"prompts": condition.prompt, "classes": f"class {condition.class_label}", "unconditional": ""}
    return f"{asked[condition.kind]}, " if asked[condition.kind] else ""


def _picture_uri(values: torch.Tensor) -> str:
    """A picture [3, H, W], or a clip [F, 3, H, W] as an animated PNG."""
    from PIL import Image

    frames = (values * 255).round().to(torch.uint8)
    frames = frames[None] if frames.dim() == 3 else frames
    images = [Image.fromarray(frame.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()) for frame in frames]
    if len(images) == 1:
        return data_uri(images[0])
    return data_uri(images[0], images[1:], _FRAME_MILLISECONDS)
