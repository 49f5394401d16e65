"""What a kind of model is calibrated on and judged by: pipelines by their pictures, language models by a text.

A judge is made anew in the process of each cell. What it compares with, the dense model's outputs, is kept in a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.calls import Call, map_tensors
from diffuse_compress.compare import Drawn, draw, latent_errors
from diffuse_compress.components import GROUPS, SELF, is_pipeline, model_components
from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.conditions import Condition, conditions_digest, read_prompts
from diffuse_compress.evaluation.images import accepted_options, sample_seed
from diffuse_compress.evaluation.language_models import load_tokenizer
from diffuse_compress.evaluation.paired import paired_metric, paired_values
from diffuse_compress.evaluation.perplexity import (
    TextScore,
    perplexity_metrics,
    predicted_tokens,
    read_text,
    score_tokens,
)
from diffuse_compress.evaluation.records import Metric
from diffuse_compress.evaluation.statistics import Interval, bootstrap_mean, bootstrap_ratio
from diffuse_compress.pipeline_call import bundled_items, bundled_prompts, named_arguments, seeded
from diffuse_compress.quality_bench.cells import CALIBRATIONS, Settings, Subject

__all__ = ["Judge", "compressed_models", "judge_of", "timed"]

_EVAL_PROMPTS, _HELDOUT = "eval_prompts.txt", "heldout.txt"
_REFERENCE, _CALLS = "reference.safetensors", "calls.safetensors"
# Of any pipeline that has them: small pictures stay small, and captions are taken as they are.
_CALL = {"use_resolution_binning": False, "clean_caption": False}
# What denoisers call their first argument.
_LATENTS = ("hidden_states", "sample")
_TIMED_CALLS, _TIMED_SECONDS = 5, 2.0


class Judge(Protocol):
    """Calibrates and judges the models of one subject.

    Attributes:
        data: what they are judged on, as the ``data`` of a record.
        settings: likewise the ``settings``.
        samples: how many samples or windows that is.
    """

    data: dict[str, Any]
    settings: dict[str, Any]
    samples: int

    def calibration(self, target: Any, name: str, count: int, seed: int) -> Calibration:
        """Samples to calibrate the dense ``target`` on.

        Raises:
            ConfigError: the model has no such set.
        """
        ...

    def remember(self, target: Any, folder: Path) -> list[Metric]:
        """Keep what the dense ``target`` gives in a folder; the scores it has without another model."""
        ...

    def judge(self, target: Any, folder: Path) -> list[Metric]:
        """Scores against what :meth:`remember` kept."""
        ...

    def call(self, target: Any, folder: Path) -> Callable[[], Any]:
        """One call of the compressed model, to be timed."""
        ...


def judge_of(subject: Subject, settings: Settings, target: Any) -> Judge:
    """The judge for a model.

    Raises:
        ConfigError: neither a pipeline nor a language model, or one without prompts or text to judge it on.
    """
    return _PipelineJudge(subject, settings, target) if is_pipeline(target) else _TextJudge(subject, settings, target)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call, the first one not counted."""
    seconds: list[float] = []
    with torch.no_grad():
        while len(seconds) < 1 + _TIMED_CALLS and (len(seconds) < 3 or sum(seconds) < _TIMED_SECONDS):
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


# --- pipelines --------------------------------------------------------------------------------------------------


class _PipelineJudge:
    """Pictures for the same prompts and noise, and the denoiser on recorded calls of the dense pipeline.

    Judged are the first prompts of ``eval_prompts.txt`` beside the model, of the package's own where there are none;
    calibrated is on the rest of them.
    """

    def __init__(self, subject: Subject, settings: Settings, pipe: Any) -> None:
        self.how = settings
        asked = {**_CALL, **subject.call}
        self.options = {**accepted_options(pipe, asked), **settings.call}
        file = (subject.prompts or subject.folder) / _EVAL_PROMPTS
        self.has_prompts = "prompt" in named_arguments(pipe)
        self.has_own_prompts = self.has_prompts and file.is_file()
        pool = self._pool(pipe, file)
        count = settings.prompts
        if len(pool) < 2 * count:
            raise ConfigError(
                f"{subject.name}: has {len(pool)} prompts or classes, and half of them are to calibrate on: --prompts "
                f"can be {len(pool) // 2} at most, got {count}."
            )
        self.asked, self.rest = pool[:count], pool[count:]
        self.samples = count
        kind = "prompts" if self.has_prompts else self.asked[0].kind
        name = file.name if self.has_own_prompts else "prompts of the package" if self.has_prompts else kind
        self.data = {"kind": kind, "name": name, "sha256": conditions_digest(self.asked)}
        self.settings = {**self.options, "batch_size": settings.batch_size}

    def _pool(self, pipe: Any, file: Path) -> list[Condition]:
        if self.has_own_prompts:
            return read_prompts(file)
        wanted = 4 * self.how.prompts
        items = bundled_items(pipe, wanted)
        if self.has_prompts:
            return [Condition(str(item)) for item in items]
        if "class_labels" in named_arguments(pipe):
            # Neighbouring classes are alike: those to judge on and those to calibrate on are mixed.
            order = torch.randperm(len(items), generator=seeded(0)).tolist()
            return [Condition(class_label=int(items[i])) for i in order]
        return [Condition()] * wanted

    def calibration(self, target: Any, name: str, count: int, seed: int) -> Calibration:
        conditions = self._conditions(name)
        order = torch.randperm(len(conditions), generator=seeded(seed)).tolist()
        # As many items as samples, each at one step, are the most that a set of this size can differ in.
        items = [_item(conditions[i]) for i in order[:count]]
        given = {key: value for key, value in self.options.items() if key != "output_type"}
        found = Calibration.record(target, items, num_samples=count, seed=1_000_000 + 1000 * seed, **given)
        return _noised(found, seed) if name == "random" else found

    def _conditions(self, name: str) -> list[Condition]:
        if name in ("matching", "random"):
            return self.rest
        if name not in CALIBRATIONS:
            return read_prompts(name)
        if not self.has_own_prompts:
            what = "has no prompts of its own" if self.has_prompts else "takes no prompts"
            raise ConfigError(f"calibration 'other': the pipeline {what}, so there are none of another domain.")
        return [Condition(prompt) for prompt in bundled_prompts()]

    def remember(self, target: Any, folder: Path) -> list[Metric]:
        drawn = self._draw(target)
        items = [_item(condition) for condition in self.asked]
        calls = Calibration.record(target, items, num_samples=self.samples, seed=2_000_000, **self.options)
        folder.mkdir(parents=True, exist_ok=True)
        calls.save(folder / _CALLS)
        kept = {f"output.{i}": value for i, value in enumerate(self._outputs(target, calls))}
        kept |= {f"latents.{i}": value for i, value in enumerate(drawn.latents[-1:])}
        save_file({"pictures": drawn.pictures.contiguous(), **kept}, folder / _REFERENCE)
        return []

    def judge(self, target: Any, folder: Path) -> list[Metric]:
        kept = load_file(folder / _REFERENCE)
        latents = [value for name, value in kept.items() if name.startswith("latents.")]
        dense, own = Drawn(kept["pictures"], latents, 0.0), self._draw(target)
        values, _ = paired_values(dense.pictures, own.pictures)
        errors = latent_errors(dense, Drawn(own.pictures, own.latents[-1:], 0.0))
        if errors is not None:
            values["Latent error"] = errors[-1]
        outputs = self._outputs(target, Calibration.load(folder / _CALLS))
        pairs = [(kept[f"output.{i}"].double(), value.double()) for i, value in enumerate(outputs)]
        metrics = [_output_error(pairs)]
        return metrics + [paired_metric(name, value[:, None].double(), "dense") for name, value in values.items()]

    def call(self, target: Any, folder: Path) -> Callable[[], Any]:
        calls = Calibration.load(folder / _CALLS)
        name = sorted(calls.components)[0]
        model = model_components(target)[name]
        first = calls.of(name)[0].call.to(next(model.parameters()).device)
        return lambda: first.run(model)

    def _draw(self, pipe: Any) -> Drawn:
        asked = [(condition, sample_seed(0, index)) for index, condition in enumerate(self.asked)]
        return draw(pipe, asked, self.how.batch_size, self.options, "Drawing")

    def _outputs(self, pipe: Any, calls: Calibration) -> list[torch.Tensor]:
        """What the denoisers give for every recorded call, on the CPU."""
        found = []
        models = model_components(pipe)
        with torch.no_grad():
            for name in sorted(calls.components):
                device = next(models[name].parameters()).device
                for sample in calls.of(name):
                    output = sample.call.to(device).run(models[name])
                    first = output[0] if isinstance(output, tuple) else output.to_tuple()[0]
                    found.append(first.float().cpu().contiguous())
        return found


def _item(condition: Condition) -> Any:
    """As ``Calibration.record`` takes it."""
    if condition.prompt is not None:
        return condition.prompt
    return {"batch_size": 1} if condition.class_label is None else condition.class_label


def _noised(calibration: Calibration, seed: int) -> Calibration:
    """The same calls with noise for the latents: what a denoiser never sees but at the first step."""
    generator = seeded(seed)

    def noisy(call: Call) -> Call:
        given = call.args[0] if call.args else next(call.kwargs[name] for name in _LATENTS if name in call.kwargs)
        noise = torch.randn(given.shape, generator=generator).to(given)
        arguments = map_tensors(lambda tensor: noise if tensor is given else tensor, (call.args, dict(call.kwargs)))
        return Call(*arguments)

    changed = {
        name: [dataclasses.replace(sample, call=noisy(sample.call)) for sample in samples]
        for name, samples in calibration.components.items()
    }
    return Calibration(changed, calibration.settings)


def _output_error(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Metric:
    """Relative error of the denoiser over recorded calls, in percent, with a bootstrap interval over them."""
    squared = np.array([float((x - y).square().sum()) for x, y in pairs])
    norms = np.array([float(x.square().sum()) for x, _ in pairs])
    if not np.isfinite(squared).all():
        interval = Interval(math.inf, -math.inf, math.inf, len(pairs))
    else:
        found = bootstrap_ratio(squared, norms)
        value, low, high = (100 * math.sqrt(max(0.0, end)) for end in (found.value, found.low, found.high))
        interval = Interval(value, low, high, len(pairs))
    return Metric.from_interval(
        "Output error",
        interval,
        "‖y - ŷ‖ / ‖y‖ of the denoiser on calls of the dense pipeline",
        higher_is_better=False,
        unit="%",
        reference={"name": "dense", "count": len(pairs)},
    )


# --- language models --------------------------------------------------------------------------------------------


class _TextJudge:
    """Perplexity on the first windows of a text, and how often the next token is the dense model's.

    Calibrated is on other windows of the text, drawn from what follows the judged ones.
    """

    def __init__(self, subject: Subject, settings: Settings, model: nn.Module) -> None:
        path = Path(settings.text) if settings.text else subject.folder / _HELDOUT
        if not path.is_file():
            raise ConfigError(f"{subject.name}: need a text to judge a language model on. Give --text FILE.")
        if not hasattr(model, "get_input_embeddings") or not hasattr(model, "generate"):
            raise ConfigError(f"{subject.name}: need a pipeline or a language model, got a {type(model).__name__}.")
        self.how, self.tokenizer = settings, load_tokenizer(subject.folder)
        tokens = self._tokens(read_text(path))
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
        self.window = settings.window or min(2048, limit or 2048)
        end = settings.windows * self.window
        if len(tokens) < end + self.window:
            most = len(tokens) // self.window - 1
            raise ConfigError(
                f"{path.name}: has {len(tokens)} tokens, and what follows {settings.windows} windows of {self.window} "
                f"is to calibrate on: --windows can be {most} at most."
            )
        self.tokens, self.rest, self.samples = tokens[:end], tokens[end:], settings.windows
        self.vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator, union-attr]
        digest = hashlib.sha256(self.tokens.numpy().astype("<i8").tobytes()).hexdigest()[:16]
        self.data = {"kind": "texts", "name": path.name, "sha256": digest}
        self.settings = {"window": self.window, "windows": settings.windows, "batch_size": settings.batch_size}

    def _tokens(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text, verbose=False).input_ids)

    def calibration(self, target: Any, name: str, count: int, seed: int) -> Calibration:
        generator = seeded(seed)
        if name == "random":
            rows = torch.randint(self.vocabulary, (count, self.window), generator=generator)
        else:
            rows = self._windows(name, count, generator)
        return Calibration.record(target, [row[None] for row in rows], num_samples=count, seed=seed)

    def _windows(self, name: str, count: int, generator: torch.Generator) -> torch.Tensor:
        """[count, window] tokens from random places of a text."""
        if name == "matching":
            tokens = self.rest
        else:
            text = "\n".join(bundled_prompts()) if name == "other" else read_text(name)
            tokens = self._tokens(text)
        room = len(tokens) - self.window
        if room < 0:
            raise ConfigError(f"calibration {name!r}: has {len(tokens)} tokens, fewer than a window of {self.window}.")
        starts = torch.randint(room + 1, (count,), generator=generator).tolist()
        return torch.stack([tokens[start : start + self.window] for start in starts])

    def remember(self, target: Any, folder: Path) -> list[Metric]:
        score, predicted = self._score(target), self._predicted(target)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"nats": torch.from_numpy(score.nats), "tokens": torch.from_numpy(score.tokens)}
        save_file({**arrays, "predicted": predicted}, folder / _REFERENCE)
        return perplexity_metrics(score, self.data["name"])

    def judge(self, target: Any, folder: Path) -> list[Metric]:
        kept = load_file(folder / _REFERENCE)
        score = self._score(target)
        dense = TextScore(kept["nats"].numpy(), kept["tokens"].numpy(), score.window, score.stride, score.digest)
        same = (self._predicted(target) == kept["predicted"]).double().mean(dim=1)
        agreement = bootstrap_mean(100 * same.numpy())
        return [
            *perplexity_metrics(score, self.data["name"], reference=("dense", dense)),
            Metric.from_interval(
                "same token",
                agreement,
                "share of positions whose most probable next token is the dense model's",
                higher_is_better=True,
                unit="%",
                reference={"name": "dense", "count": agreement.count},
            ),
        ]

    def call(self, target: Any, folder: Path) -> Callable[[], Any]:
        row = self.tokens[None, : self.window].to(next(target.parameters()).device)
        return lambda: target(row, use_cache=False)

    def _score(self, model: Any) -> TextScore:
        return score_tokens(model, self.tokens, window=self.window, batch_size=self.how.batch_size)

    def _predicted(self, model: Any) -> torch.Tensor:
        return predicted_tokens(model, self.tokens, window=self.window, batch_size=self.how.batch_size)


def compressed_models(target: Any) -> list[nn.Module]:
    """The models that are compressed: a pipeline's denoisers, or the model itself."""
    models = model_components(target)
    return [model for name, model in models.items() if name == SELF or GROUPS["denoisers"].match(name)]
