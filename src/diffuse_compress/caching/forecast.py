"""What a reused unit would have added, as a weighted sum of what it added when it was last computed.

Copying the last change is one such sum, extrapolating it along the steps another (TaylorSeer, Liu et al. 2025, arXiv
2503.06923, at order 1). Here the weights of each step are those that fit recorded trajectories best, by least squares;
L2P (arXiv 2604.26365) learns such weights for whole models. They are shared by the units that a step reuses together,
whose sum is all that is kept of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffuse_compress.caching.compiler import compile_schedule
from diffuse_compress.caching.recording import Trajectory
from diffuse_compress.caching.schedule import Schedule
from diffuse_compress.caching.units import Site
from diffuse_compress.errors import ConfigError

__all__ = ["fit_forecast", "unit_forecast", "with_forecast"]

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
    coefficients = torch.zeros(schedule.num_steps, len(schedule.units), history)
    coefficients[:, :, 0] = 1.0
    mask = schedule.mask.bool()
    for step, plan in enumerate(program.steps):
        for segment in plan.segments:
            units = range(segment.first, segment.last + 1)
            origins = {unit: mask[:step, unit].nonzero().flatten().flip(0)[:history].tolist() for unit in units}
            # Units that were computed in different steps are forecast apart.
            for alike in {tuple(found) for found in origins.values()}:
                members = [unit for unit in units if tuple(origins[unit]) == alike]
                fitted = fit_forecast(trajectories, members, list(alike), step)
                coefficients[step, members] = torch.nn.functional.pad(fitted, (0, history - len(alike)))
    return schedule.with_mask(schedule.mask, coefficients)


def unit_forecast(trajectories: Sequence[Trajectory], unit: int, column: Sequence[bool], history: int) -> torch.Tensor:
    """Weights [T, history] float32 of one unit by itself, for every step as if that one reused it.

    Args:
        trajectories: recorded.
        unit: index of it.
        column: of T steps those that compute it, the first among them.
        history: computations before the step that are summed up.
    """
    weights = torch.zeros(len(column), history)
    weights[:, 0] = 1.0
    for step in range(1, len(column)):
        origins = [then for then in range(step - 1, -1, -1) if column[then]][:history]
        if len(origins) == history:
            weights[step] = fit_forecast(trajectories, [unit], origins, step)
    return weights


def fit_forecast(
    trajectories: Sequence[Trajectory], units: Sequence[int], origins: Sequence[int], step: int
) -> torch.Tensor:
    """Weights [len(origins)] float32 of the changes in ``origins``, the latest first, that fit those in ``step``."""
    gram = torch.zeros(len(origins), len(origins), dtype=torch.float64)
    target = torch.zeros(len(origins), dtype=torch.float64)
    for trajectory in trajectories:
        past = trajectory.deltas[list(origins)][:, list(units)].double()
        now = trajectory.deltas[step, list(units)].double()
        if bool(past.isnan().any()) or bool(now.isnan().any()):
            continue
        # Streams of unlike power count alike.
        scale = trajectory.power[step, list(units)].double().clamp_min(1e-12).rsqrt()[:, None]
        rows, aim = (past * scale).flatten(1), (now * scale).flatten()
        gram += rows @ rows.T
        target += rows @ aim
    copying = torch.zeros(len(origins), dtype=torch.float64)
    copying[0] = 1.0
    ridge = _RIDGE * float(gram[0, 0])
    if ridge == 0.0:
        return copying.float()
    # min |now - past c|^2 + ridge |c - copying|^2
    system = gram + ridge * torch.eye(len(origins), dtype=torch.float64)
    return torch.linalg.solve(system, target + ridge * copying).float()
