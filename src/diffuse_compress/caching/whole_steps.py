"""Which steps of a loop to compute, and how to make up for the others, from what a scheduler is given along it.

A step is left out by giving the scheduler a weighted sum of the last outputs of the denoiser, the samples they were
computed from and the sample of the step itself. The weights of each step are fitted by least squares.

How much the error of a step counts is asked of the scheduler itself: it is run over the recorded outputs with a
little added in one step, and what that makes of the last sample is the weight. What the denoiser would answer to the
changed samples is not known without running it, but lies between two extremes: nothing, as if the error were a part of
the picture, and all of it, as if it were noise that the denoiser sees and takes away. Candidates are searched with
weights from the one to the other, and then run.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffuse_compress.caching.forecast import weights_near_copying
from diffuse_compress.caching.loop_recorder import LoopRecorder
from diffuse_compress.caching.observing import Observer
from diffuse_compress.caching.outputs import aligned
from diffuse_compress.families.base import Streams
from diffuse_compress.logging import get_logger
from diffuse_compress.runtime.steps import current

__all__ = [
    "MOST_SEARCHED",
    "StepErrors",
    "StepFitter",
    "error_weights",
    "even_steps",
    "fewest_error",
    "first_steps",
    "keeps_to",
    "short_gaps",
]

_LOGGER = get_logger(__name__)
# Pulls weights towards copying where trajectories do not tell them apart: relative to the power of the last output.
_RIDGE = 1e-6
MOST_SEARCHED = 100
"""The table of errors grows with the cube of the steps, and takes a quarter of a GiB here."""
_SWEEPS = 40


# --- how much the error of a step counts ---------------------------------------------------------------------------


def error_weights(recorder: LoopRecorder, levels: torch.Tensor, seen_as_noise: Sequence[float]) -> list[torch.Tensor]:
    """[T] float64 for each share: change of the last sample for a change of the output of each step.

    Args:
        recorder: of a loop.
        levels: [T] noise levels.
        seen_as_noise: shares of an error in a sample that the denoiser takes away: 0 nothing, 1 all; what lies between
            is the geometric mean of the two, for which the scheduler need not be run again.
    """
    nothing, everything = (_responses(recorder, levels, share) for share in (0.0, 1.0))
    if nothing is None or everything is None:
        return [torch.ones(len(levels), dtype=torch.float64) for _ in seen_as_noise]
    low, high = nothing.abs().clamp_min(1e-12), everything.abs().clamp_min(1e-12)
    return [nothing.sign() * (low ** (1 - share) * high**share) for share in seen_as_noise]


def _responses(recorder: LoopRecorder, levels: torch.Tensor, share: float) -> torch.Tensor | None:
    steps = recorder.trajectories[0]
    generator = torch.Generator().manual_seed(0)
    disturbance = torch.randn(steps[0].output.shape, generator=generator, dtype=torch.float64)
    disturbance *= 1e-2 * steps[0].output.square().mean().sqrt()
    slopes = share * _noise_slopes(recorder, levels)
    try:
        plain = _replayed(recorder, slopes, None, disturbance)
        found = [_replayed(recorder, slopes, step, disturbance) - plain for step in range(len(steps))]
    except Exception as error:  # a scheduler may ask anything of its samples
        _LOGGER.info("errors of all steps count alike: %s cannot be run by itself (%s)", recorder.scheduler, error)
        return None
    weights = torch.stack([difference @ disturbance / (disturbance @ disturbance) for difference in found])
    return weights if bool(weights.isfinite().all()) else None


def _noise_slopes(recorder: LoopRecorder, levels: torch.Tensor) -> torch.Tensor:
    """[T]: by what the output of a denoiser that knows noise changes with noise in the scheduler's sample."""
    kind = getattr(getattr(recorder.scheduler, "config", None), "prediction_type", None) or "flow_prediction"
    noise = levels.double().clamp(1e-3, 1.0)
    slopes = {"sample": 0.0 * noise, "v_prediction": (1 - noise**2).clamp_min(0.0).sqrt() / noise}.get(kind, 1 / noise)
    # Models are given samples scaled to unit variance, the scheduler steps them as they are.
    scales = [
        1.0 if step.seen is None else float(step.seen @ step.sample / (step.sample @ step.sample).clamp_min(1e-12))
        for step in recorder.trajectories[0]
    ]
    return slopes * torch.tensor(scales, dtype=torch.float64)


def _replayed(
    recorder: LoopRecorder, slopes: torch.Tensor, disturbed: int | None, disturbance: torch.Tensor
) -> torch.Tensor:
    """The last sample, if outputs follow what happens to the samples by ``slopes`` and one is disturbed."""
    scheduler = copy.deepcopy(recorder.scheduler)
    steps = recorder.trajectories[0]
    shape = (*[1] * (recorder.dimensions - 1), -1)
    sample = steps[0].sample
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # torch.manual_seed would seed GPUs, too.
        torch.default_generator.manual_seed(0)
        for number, step in enumerate(steps):
            output = step.output + slopes[number] * (sample - step.sample)
            if number == disturbed:
                output = output + disturbance
            given = {"model_output": output.view(shape), "timestep": step.timestep, "sample": sample.view(shape)}
            result = scheduler.step(**given, **step.options)
            following = result[0] if isinstance(result, tuple) else result.prev_sample
            sample = following.double().flatten()
    return sample


# --- errors of leaving out steps ----------------------------------------------------------------------------------


class StepErrors:
    """What leaving out steps does to the last sample, by recorded trajectories.

    Args:
        products: [2T, 2T] of :meth:`LoopRecorder.features`.
        inputs: samples are known.
        components: name of the denoiser of each step; outputs of another are no help.
        history: outputs that a forecast is made of, at most 2 here; 1 copies.

    Attributes:
        first: bool [T] of :func:`first_steps`, which have nothing to make up for them.
    """

    def __init__(self, products: torch.Tensor, inputs: bool, components: Sequence[str], history: int) -> None:
        self.steps, self.products = len(components), products
        self._index = torch.full((self.steps, self.steps + 1, self.steps + 1), -1, dtype=torch.long)
        fits: list[tuple[int, list[int]]] = []
        for step, name in enumerate(components):
            before = [other for other in range(step) if components[other] == name]
            for latest in before:
                earlier = [other for other in before if other < latest] if history > 1 else []
                for other in [*earlier, self.steps]:
                    self._index[step, latest, other] = len(fits)
                    fits.append((step, [latest] if other == self.steps else [latest, other]))
        self.first = first_steps(components)
        self._history = history
        self._residuals = torch.zeros(len(fits), 2 * self.steps, dtype=torch.float64)
        if fits:
            self._residuals = _left(products, inputs, fits, min(history, 2))
        self._powers = torch.einsum("np,pq,nq->n", self._residuals, products, self._residuals).clamp_min(0.0)

    def of(self, masks: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[M] float64: error of each mask, bool [M, T]: the mean of how errors add up if they have nothing to do with
        one another, and as they did on the recorded trajectories."""
        numbers = torch.where(masks, torch.arange(self.steps), -1)
        latest = _shifted(numbers.cummax(dim=1).values, -1)
        # Of the step before a step's latest computation, the latest.
        earlier = torch.where(latest > 0, latest.gather(1, latest.clamp_min(0)), -1)
        earlier = torch.where((earlier >= 0) & (self._history > 1), earlier, self.steps)
        found = self._index[torch.arange(self.steps), latest.clamp_min(0), earlier]
        # Across two denoisers the earlier one is no help.
        alone = self._index[torch.arange(self.steps), latest.clamp_min(0), self.steps]
        found = torch.where(found < 0, alone, found)
        impossible = (~masks & (found < 0)).any(dim=1)
        used = torch.where(masks, 0.0, weights)
        found = found.clamp_min(0)
        apart = (used**2 * self._powers[found]).sum(dim=1)
        total = torch.einsum("mt,mtp->mp", used, self._residuals[found])
        together = torch.einsum("mp,pq,mq->m", total, self.products, total)
        return torch.where(impossible, torch.inf, (apart + together) / 2)


def first_steps(components: Sequence[str]) -> torch.Tensor:
    """Bool [T]: the first step of each denoiser."""
    return torch.tensor([name not in components[:step] for step, name in enumerate(components)])


def _shifted(values: torch.Tensor, first: int) -> torch.Tensor:
    return torch.cat([torch.full_like(values[:, :1], first), values[:, :-1]], dim=1)


def _left(products: torch.Tensor, inputs: bool, fits: Sequence[tuple[int, list[int]]], history: int) -> torch.Tensor:
    """[N, 2T]: what the best forecast of each (step, computed steps before it, the latest first) leaves of the output
    of that step, as a sum of all outputs and samples."""
    count = len(products) // 2
    columns = torch.zeros(len(fits), 2 * history + 1, dtype=torch.long)
    there = torch.zeros(columns.shape, dtype=torch.bool)
    for row, (step, origins) in enumerate(fits):
        samples = [count + step, *(count + origin for origin in origins)] if inputs and history > 1 else []
        for first, found in ((0, origins), (history, samples)):
            columns[row, first : first + len(found)] = torch.tensor(found, dtype=torch.long)
            there[row, first : first + len(found)] = True
    targets = torch.tensor([step for step, _ in fits])
    weights = torch.zeros(columns.shape, dtype=torch.float64)
    weights[:, 0] = 1.0
    if history > 1:
        system = products[columns[:, :, None], columns[:, None, :]]
        system = torch.where(there[:, :, None] & there[:, None, :], system, 0.0)
        weights = weights_near_copying(system, torch.where(there, products[columns, targets[:, None]], 0.0), _RIDGE)
    left = torch.zeros(len(fits), len(products), dtype=torch.float64)
    left[torch.arange(len(fits)), targets] = 1.0
    return left.scatter_add_(1, columns, torch.where(there, -weights, 0.0))


class StepFitter(Observer):
    """Fits a forecast for the steps that a mask leaves out, on the trajectories that it leads to.

    Everything is computed, but in such a step the scheduler is given the forecast, whose weights are fitted to the
    output just computed and to those of the trajectories before. Fitted to trajectories without a cache they would not
    do: there a sample is nearly a sum of the outputs and samples before it, so that large weights cancel each other,
    which they do no longer where the samples are a little different.

    Args:
        mask: bool [T], computed steps.
        history: outputs that a forecast is made of; 1 copies the last one.
    """

    def __init__(self, mask: torch.Tensor, history: int) -> None:
        self._mask: list[bool] = mask.tolist()
        self._history = history
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._weights: dict[int, torch.Tensor] = {}
        self._past: dict[Any, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}
        self._run: int | None = None

    def unit(self, index: int, streams: Streams, compute: Callable[[], Streams]) -> Streams:
        """Computes, and returns the forecast in a step that the mask leaves out."""
        made = compute()
        context = current()
        if context is None or context.run is None or context.row is None or "output" not in made:
            return made
        if context.run.number != self._run:
            self._run, self._past = context.run.number, {}
        past, output = self._past.setdefault(context.key, []), made["output"]
        if past and past[0][0].shape != output.shape:
            past.clear()
        given = aligned(streams["input"], output.shape) if "input" in streams else None
        if self._mask[context.row] or not past:
            past.insert(0, (output.clone(), None if given is None else given.clone()))
            del past[self._history :]
            return made
        features = [value for value, _ in past] + [None] * (self._history - len(past))
        if self._history > 1:
            features += [given, *(sample for _, sample in past)] + [None] * (self._history - len(past))
        # What there is none of has a row of zeros, and no weight.
        rows = torch.stack([torch.zeros_like(output) if v is None else v for v in features]).flatten(1).double()
        weights = self._fit(context.row, rows, output.flatten().double())
        total: torch.Tensor = weights.to(rows.device) @ rows
        return {"output": total.to(output.dtype).view_as(output)}

    def _fit(self, row: int, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self._history < 2:
            return torch.ones(1, dtype=torch.float64)
        products = (features @ features.T / len(target)).cpu(), (features @ target / len(target)).cpu()
        if row in self._sums:
            products = products[0] + self._sums[row][0], products[1] + self._sums[row][1]
        self._sums[row] = products
        self._weights[row] = weights_near_copying(*products, _RIDGE)
        return self._weights[row]

    @property
    def coefficients(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Float32 [T, 1, history] of the outputs, the latest first, and [T, 1 + history] of the samples, that of the
        step first; None, None for a copy."""
        if self._history < 2:
            return None, None
        outputs = torch.zeros(len(self._mask), 1, self._history)
        outputs[:, :, 0] = 1.0
        samples = torch.zeros(len(self._mask), 1 + self._history)
        for row, weights in self._weights.items():
            outputs[row, 0], samples[row] = weights[: self._history].float(), weights[self._history :].float()
        return outputs, samples


# --- which steps --------------------------------------------------------------------------------------------------


def even_steps(first: torch.Tensor, computed: int, power: float = 1.0) -> torch.Tensor:
    """Bool [T]: so many steps at even distances, the first of each denoiser among them; ``power`` below 1 has them
    closer together towards the end."""
    steps = len(first)
    mask = first.clone()
    for number in range(computed):
        mask[round((steps - 1) * (number / max(1, computed - 1)) ** power)] = True
    for step in range(1, steps):
        if int(mask.sum()) >= computed:
            break
        mask[step] = True
    spare = int(mask.sum()) - computed
    for step in [step for step in range(steps - 1, 0, -1) if bool(mask[step]) and not bool(first[step])][:spare]:
        mask[step] = False
    return mask


def short_gaps(first: torch.Tensor, computed: int, longest: int) -> torch.Tensor | None:
    """Bool [T]: so many steps, never more than ``longest`` left out in a row; None if that takes more."""
    begins = [*first.nonzero().flatten().tolist(), len(first)]
    lengths = [end - start for start, end in itertools.pairwise(begins)]
    counts = [-(-length // (longest + 1)) for length in lengths]
    if sum(counts) > computed:
        return None
    for _ in range(computed - sum(counts)):
        widest = max(range(len(lengths)), key=lambda part: lengths[part] / counts[part])
        counts[widest] += 1
    mask = torch.zeros_like(first)
    for start, length, count in zip(begins, lengths, counts, strict=False):
        mask[[start + number * length // count for number in range(count)]] = True
    return mask


def keeps_to(mask: torch.Tensor, longest: int | None) -> bool:
    """No more than so many steps are left out in a row."""
    return longest is None or int(_longest_run(~mask[None])) <= longest


def fewest_error(
    errors: StepErrors, weights: torch.Tensor, starts: Sequence[torch.Tensor], *, longest: int | None = None
) -> torch.Tensor:
    """The mask of least error that is reached from ``starts`` by computing one step in the place of another.

    Args:
        errors: of leaving out steps.
        weights: [T] of :func:`error_weights`.
        starts: masks of as many computed steps.
        longest: most steps left out in a row, to which the starts keep.
    """
    found = [_descended(errors, weights, start, longest) for start in starts]
    return min(found, key=lambda pair: pair[0])[1]


def _descended(
    errors: StepErrors, weights: torch.Tensor, mask: torch.Tensor, longest: int | None
) -> tuple[float, torch.Tensor]:
    best = float(errors.of(mask[None], weights)[0])
    for _ in range(_SWEEPS):
        gives = (mask & ~errors.first).nonzero().flatten()
        takes = (~mask).nonzero().flatten()
        if not len(gives) or not len(takes):
            break
        pairs = torch.cartesian_prod(gives, takes)
        masks = mask.repeat(len(pairs), 1)
        rows = torch.arange(len(pairs))
        masks[rows, pairs[:, 0]], masks[rows, pairs[:, 1]] = False, True
        if longest is not None:
            masks = masks[_longest_run(~masks) <= longest]
        if not len(masks):
            break
        found = torch.cat([errors.of(part, weights) for part in masks.split(256)])
        at = int(found.argmin())
        if not float(found[at]) < best * (1 - 1e-9):
            break
        best, mask = float(found[at]), masks[at]
    return best, mask


def _longest_run(left_out: torch.Tensor) -> torch.Tensor:
    """[M]: most steps in a row that each mask leaves out."""
    run = torch.zeros(len(left_out), dtype=torch.long)
    most = run.clone()
    for step in range(left_out.shape[1]):
        run = torch.where(left_out[:, step], run + 1, 0)
        most = torch.maximum(most, run)
    return most
