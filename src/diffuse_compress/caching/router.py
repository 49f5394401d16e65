"""A router: how much of each unit is computed in each step, as numbers that gradients can move.

A table of logits z [T, K] gives scores r = sigmoid(z). While it is trained a unit adds ``r * fresh + (1 - r) * kept``
to the streams, where ``kept`` is what is kept of it from earlier steps. Where r is above the threshold, what is added
is kept in its turn. The schedule that comes of it computes above the threshold, and reuses below.

Source: HarmoniCa (Huang et al. 2024, arXiv 2410.01723). Differs: ``kept`` may be a forecast from the last two, and
scores are computed on the CPU, where thresholds can be told without waiting for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from diffuse_compress.caching.config import HarmoniCaConfig
from diffuse_compress.caching.observing import Observer
from diffuse_compress.caching.store import signature
from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.families.base import Streams
from diffuse_compress.runtime.steps import current

__all__ = [
    "RouterTable",
    "SoftCache",
    "cumulative",
    "gains",
    "leave_one_out",
    "reused_within",
]

_CLAMP = 5.0
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
# Of the running mean of what a unit's computation is worth.
_MEMORY = 0.9
# Initial logits of a schedule: of what it computes, and of what it reuses how far below the threshold.
_COMPUTED, _BELOW = 2.0, 0.5


class RouterTable:
    """Scores of one model's units, and what Adam knows of them. All float64 on the CPU.

    Args:
        seen: bool [T], steps in which the model runs; the first of them computes all and is not trained.
        cost_ms: [K], of the units.
        config: of the training.
        generator: of the initial logits, normally distributed.
        initial: uint8 [T, K] of a schedule to begin with, or None.

    Attributes:
        logits, first, second: [T, K], and Adam's moments.
        updates: int64 [T], of each row.
        worth: [T, K], running mean of how much less error computing a unit makes.
        trained: bool [T].
    """

    def __init__(
        self,
        seen: torch.Tensor,
        cost_ms: torch.Tensor,
        config: HarmoniCaConfig,
        generator: torch.Generator,
        initial: torch.Tensor | None = None,
    ) -> None:
        shape = (len(seen), len(cost_ms))
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64).clamp_(-_CLAMP, _CLAMP)
        if initial is not None:
            # Nearly what the schedule does: right above the threshold a unit would be mostly reused.
            reused = math.log(config.threshold / (1 - config.threshold)) - _BELOW
            self.logits = torch.where(initial.bool(), max(_COMPUTED, reused + 2 * _BELOW), reused).double()
        self.trained = seen.clone()
        self.trained[int(seen.nonzero()[0])] = False
        self.logits[~self.trained] = _CLAMP
        self.first, self.second, self.worth = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        self.updates = torch.zeros(len(seen), dtype=torch.int64)
        self.cost_ms = cost_ms.double()
        self._config = config

    @property
    def scores(self) -> torch.Tensor:
        """r [T, K]."""
        return self.logits.sigmoid()

    @property
    def mask(self) -> torch.Tensor:
        """uint8 [T, K], 1 computes."""
        return (self.scores > self._config.threshold).to(torch.uint8)

    def learn(self, row: int, gradient: torch.Tensor, worth: torch.Tensor) -> None:
        """A step of Adam on one row.

        Args:
            row: of the table.
            gradient: [K], of the loss by the scores of the row.
            worth: [K], of the units in this step.
        """
        score = self.logits[row].sigmoid()
        slope = gradient * score * (1 - score)
        self.updates[row] += 1
        count = int(self.updates[row])
        self.first[row] = _BETAS[0] * self.first[row] + (1 - _BETAS[0]) * slope
        self.second[row] = _BETAS[1] * self.second[row] + (1 - _BETAS[1]) * slope**2
        mean, square = self.first[row] / (1 - _BETAS[0] ** count), self.second[row] / (1 - _BETAS[1] ** count)
        self.logits[row] -= self._config.learning_rate * mean / (square.sqrt() + _EPSILON)
        self.logits[row].clamp_(-_CLAMP, _CLAMP)
        self.worth[row] = worth if count == 1 else _MEMORY * self.worth[row] + (1 - _MEMORY) * worth

    def state(self) -> dict[str, torch.Tensor]:
        """What changes while it is trained."""
        names = ("logits", "first", "second", "updates", "worth")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Set what :meth:`state` gave."""
        for name, value in state.items():
            getattr(self, name).copy_(value)


def reused_within(tables: Sequence[RouterTable], saved_ms: float) -> list[torch.Tensor]:
    """Masks that reuse the units of least score until that much time is saved: uint8 [T, K] for each table.

    Of equal scores, which there are at the limits, the unit goes first whose computation is worth least for its time.
    """
    listed = []
    for number, table in enumerate(tables):
        worth = table.worth / table.cost_ms.clamp_min(1e-9)
        for row in table.trained.nonzero().flatten().tolist():
            for unit, score in enumerate(table.scores[row].tolist()):
                listed.append((score, float(worth[row, unit]), number, row, unit))
    masks = [torch.ones(table.logits.shape, dtype=torch.uint8) for table in tables]
    for _, _, number, row, unit in sorted(listed):
        if saved_ms <= 0:
            break
        masks[number][row, unit] = 0
        saved_ms -= float(tables[number].cost_ms[unit])
    if saved_ms > 1e-9:
        raise ConfigError(
            f"router training: the units of these models cannot save another {saved_ms:.3g} ms of a loop. Lower "
            "target_speedup, or run fewer steps."
        )
    return masks


# --- what counts how much ---------------------------------------------------------------------------------------


def leave_one_out(generate: Callable[[Collection[int]], torch.Tensor], rows: Sequence[int]) -> dict[int, float]:
    """Mean square change of the picture if one step is computed, and all others are cached, for each of ``rows``.

    ``generate(cached)`` draws the same picture with the steps ``cached`` under the router, the others computed.
    """
    all_cached = generate(rows)
    return {row: _distance(generate([r for r in rows if r != row]), all_cached) for row in rows}


def cumulative(generate: Callable[[Collection[int]], torch.Tensor], rows: Sequence[int]) -> dict[int, float]:
    """Mean square change of the picture if one more step is cached, step by step from the first; otherwise as
    :func:`leave_one_out`."""
    before, found = generate([]), {}
    for number, row in enumerate(rows):
        now = generate(rows[: number + 1])
        found[row], before = _distance(now, before), now
    return found


def gains(
    generate: Callable[[Collection[int]], tuple[torch.Tensor, Mapping[int, torch.Tensor]]], rows: Sequence[int]
) -> dict[int, float]:
    """Mean square change of the picture for each relative squared error of the prediction in a step, for each of
    ``rows``.

    ``generate(reused)`` draws the same picture with everything reused in the steps ``reused`` and computed in the
    others, and returns it with what was predicted in each step.
    """
    picture, predicted = generate([])
    found = {}
    for row in rows:
        changed, other = generate([row])
        error = _distance(other[row], predicted[row]) / max(float(predicted[row].double().square().mean()), 1e-12)
        found[row] = _distance(changed, picture) / max(error, 1e-12)
    return found


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).double().square().mean())


# --- the cache of a student -------------------------------------------------------------------------------------


@dataclass
class SoftCache(Observer):
    """An observer under which units add a mix of what they compute and what is kept of them.

    Attributes:
        table: of the model.
        history: changes that are kept.
        coefficients: [T, K, history] of a forecast, or None to copy the last change.
        passive: units compute and nothing is kept, but in the first step.
        whole: what is mixed holds nothing of what was computed.
        cached: steps in which units are mixed; in others they are computed, and kept.
        leaves: {row: scores of the row on the model's device}, of which gradients are wanted; made as rows are met.
        last_row: step of the latest unit.
    """

    table: RouterTable
    history: int
    coefficients: torch.Tensor | None = None
    passive: bool = False
    whole: bool = False
    cached: frozenset[int] = frozenset()
    leaves: dict[int, torch.Tensor] = field(default_factory=dict)
    last_row: int | None = None
    _kept: dict[object, list[Streams]] = field(default_factory=dict)
    _single: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    _stores: dict[int, list[bool]] = field(default_factory=dict)

    def begin(self, cached: Iterable[int]) -> None:
        """Before a run: nothing is kept."""
        self.cached = frozenset(cached)
        self._kept.clear()
        self.forget()

    def forget(self) -> None:
        """The table has changed."""
        self.leaves.clear()
        self._single.clear()
        self._stores.clear()

    def unit(self, index: int, streams: Streams, compute: Callable[[], Streams]) -> Streams:
        """The mix; see :class:`Observer`."""
        context = current()
        if context is None or context.row is None:
            why = "" if context is None or context.problem is None else f": {context.problem.what}"
            raise ModelStateError(f"router training: the place in the sampling loop is not known{why}.")
        row = self.last_row = context.row
        starts = not bool(self.table.trained[row])
        if self.passive and not starts:
            return compute()
        fresh = compute()
        kept = self._kept.setdefault((context.key, index), [])
        if kept and signature(kept[0]) != signature(fresh):
            kept.clear()
        if starts or not kept or row not in self.cached:
            self._keep(kept, fresh)
            return fresh
        past = self._forecast(kept, row, index)
        weight = self._weights(row, fresh)[index]
        # One reduction makes the gradient of the weight: two would cancel in half precision.
        mixed = {name: past[name] + weight * (value - past[name]) for name, value in fresh.items()}
        if self._stores[row][index]:
            self._keep(kept, mixed)
        return mixed

    def _keep(self, kept: list[Streams], made: Streams) -> None:
        kept.insert(0, {name: value.detach() for name, value in made.items()})
        del kept[self.history :]

    def _forecast(self, kept: list[Streams], row: int, index: int) -> Streams:
        if self.coefficients is None or len(kept) < self.history:
            return kept[0]
        weights = self.coefficients[row, index].tolist()
        if weights[1:] == [0.0] * len(weights[1:]) and weights[0] == 1.0:
            return kept[0]
        total = {name: value * weights[0] for name, value in kept[0].items()}
        for weight, past in zip(weights[1:], kept[1:], strict=True):
            total = {name: value + weight * past[name] for name, value in total.items()}
        return total

    def _weights(self, row: int, fresh: Streams) -> tuple[torch.Tensor, ...]:
        """Scores of a row, one by one."""
        if row not in self._single:
            value = next(iter(fresh.values()))
            scores = self.table.scores[row] * (not self.whole)
            precise = value.dtype == torch.float64
            leaf = scores.to(value.device, torch.float64 if precise else torch.float32)
            self.leaves[row] = leaf.requires_grad_(torch.is_grad_enabled())
            self._single[row] = leaf.unbind()
            self._stores[row] = (scores > self.table._config.threshold).tolist()
        return self._single[row]
