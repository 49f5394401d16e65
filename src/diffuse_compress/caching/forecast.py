"""What a reused unit would have added, as a weighted sum of what it added when it was last computed.

Copying the last change is one such sum, extrapolating it along the steps another (TaylorSeer, Liu et al. 2025, arXiv
2503.06923, at order 1). Here the weights of each step are those that fit recorded trajectories best, by least squares;
L2P (arXiv 2604.26365) learns such weights for whole models. They are shared by the units that a step reuses together,
whose sum is all that is kept of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffuse_compress.caching.compiler import compile_schedule
from diffuse_compress.caching.recording import Trajectory
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.caching.units import Site
from diffuse_compress.errors import ConfigError

__all__ = ["fit_forecast", "unit_forecast", "weights_near_copying", "with_forecast"]

# Pulls weights towards copying where trajectories do not tell them apart: relative to the power of the last change.
_RIDGE = 1e-4


def with_forecast(
    schedule: Schedule, sites: Sequence[Site], trajectories: Sequence[Trajectory], *, history: int = 2
) -> Schedule:
    """``schedule`` with coefficients [T, K, history] fitted to the trajectories it was made from.

    Raises:
        ConfigError: a history of less than 2 would only copy, and trajectories must be of the schedule's steps.
    """
    if history < 2:
        raise ConfigError(f"cache forecast: history must be at least 2 computations, got {history}.")
    steps = len(trajectories[0].power)
    if steps != schedule.num_steps:
        raise ConfigError(f"cache forecast: the schedule has {schedule.num_steps} steps, the trajectories {steps}.")
    program = compile_schedule(schedule.with_mask(schedule.mask), sites)
    mask = schedule.mask.bool()
    fits: list[_Fit] = []
    for step, plan in enumerate(program.steps):
        for segment in plan.segments:
            alike: dict[tuple[int, ...], list[int]] = {}
            for unit in range(segment.first, segment.last + 1):
                origins = mask[:step, unit].nonzero().flatten().flip(0)[:history]
                alike.setdefault(tuple(origins.tolist()), []).append(unit)
            # Units that were computed in different steps are forecast apart.
            fits += [_Fit(step, members, origins) for origins, members in alike.items()]
    coefficients = torch.zeros(schedule.num_steps, len(schedule.units), history)
    coefficients[:, :, 0] = 1.0
    for fit, weights in zip(fits, _fitted(trajectories, fits, history), strict=True):
        coefficients[fit.step, list(fit.units)] = weights
    return schedule.with_mask(schedule.mask, coefficients)


def unit_forecast(trajectories: Sequence[Trajectory], unit: int, column: Sequence[bool], history: int) -> torch.Tensor:
    """Weights [T, history] float32 of one unit by itself, for every step as if that one reused it.

    Args:
        trajectories: recorded.
        unit: index of it.
        column: of T steps those that compute it, the first among them.
        history: computations before the step that are summed up.
    """
    origins = [[then for then in range(step - 1, -1, -1) if column[then]][:history] for step in range(len(column))]
    fits = [_Fit(step, [unit], found) for step, found in enumerate(origins) if len(found) == history]
    weights = torch.zeros(len(column), history)
    weights[:, 0] = 1.0
    if fits:
        weights[[fit.step for fit in fits]] = _fitted(trajectories, fits, history)
    return weights


def fit_forecast(
    trajectories: Sequence[Trajectory], units: Sequence[int], origins: Sequence[int], step: int
) -> torch.Tensor:
    """Weights [len(origins)] float32 of the changes in ``origins``, the latest first, that fit those in ``step``."""
    return _fitted(trajectories, [_Fit(step, units, origins)], len(origins))[0]


@dataclass(frozen=True)
class _Fit:
    """Units that ``step`` forecasts with the same weights, from what they added in ``origins``, the latest first."""

    step: int
    units: Sequence[int]
    origins: Sequence[int]


def _fitted(trajectories: Sequence[Trajectory], fits: Sequence[_Fit], history: int) -> torch.Tensor:
    """Weights [len(fits), history] float32, all fits at once; 0 beyond the origins that a fit has."""
    if not fits:
        return torch.zeros(0, history)
    # One row for each unit of each fit, summed up over the fit in the end.
    group = torch.tensor([index for index, fit in enumerate(fits) for _ in fit.units])
    unit = torch.tensor([unit for fit in fits for unit in fit.units])
    step = torch.tensor([fit.step for fit in fits])[group]
    padded = [[*fit.origins, *[0] * (history - len(fit.origins))] for fit in fits]
    there = torch.tensor([[place < len(fit.origins) for place in range(history)] for fit in fits])
    origins = torch.tensor(padded)[group]
    gram = torch.zeros(len(fits), history, history, dtype=torch.float64)
    target = torch.zeros(len(fits), history, dtype=torch.float64)
    for trajectory in trajectories:
        # Streams of unlike power count alike.
        scale = trajectory.power.double().clamp_min(1e-12)[step, unit].reciprocal().nan_to_num(0.0)
        seen = trajectory.seen[origins, unit[:, None]] | ~there[group]
        scale = torch.where(seen.all(dim=1), scale, 0.0)
        products = trajectory.products
        past = products[origins[:, :, None], origins[:, None, :], unit[:, None, None]]
        gram.index_add_(0, group, past * scale[:, None, None])
        target.index_add_(0, group, products[origins, step[:, None], unit[:, None]] * scale[:, None])
    gram *= there[:, :, None] & there[:, None, :]
    target *= there
    copying = torch.zeros(history, dtype=torch.float64)
    copying[0] = 1.0
    known = gram[:, :1, 0] > 0.0
    return torch.where(known, weights_near_copying(gram, target, _RIDGE), copying).float()


def weights_near_copying(gram: torch.Tensor, target: torch.Tensor, ridge: float) -> torch.Tensor:
    """Weights [..., F] float64 of features, the first of which is the last output: those of
    ``min |now - features c|^2 + ridge |feature_0|^2 |c - copying|^2``.

    Args:
        gram: [..., F, F] products of the features.
        target: [..., F] products of the features and what they are to make up for.
        ridge: pulls towards copying the first feature, where trajectories do not tell weights apart.
    """
    copying = torch.zeros(gram.shape[-1], dtype=torch.float64)
    copying[0] = 1.0
    pull = ridge * gram[..., 0, 0].clamp_min(1e-30)
    system = gram + pull[..., None, None] * torch.eye(gram.shape[-1], dtype=torch.float64)
    return torch.linalg.solve(system, target + pull[..., None] * copying)
