"""The schedule of least error within a budget of time, by a model in which every reuse does its own damage.

If unit k is reused in step t from its computation in step o, what it adds is wrong by ``delta_t - delta_o``, or by what
a forecast leaves of that. Relative to the streams it is added to, squared and averaged over trajectories, this is the
error e[o, t, k]; a step counts by its weight. Errors add up, so for a given price of time every unit has a best
schedule of its own, found by dynamic programming over its computations, and the price is set to meet the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffuse_compress.caching.recording import Trajectory
from diffuse_compress.errors import ConfigError

__all__ = ["cheapest_within", "reuse_errors", "schedule_error"]

_BISECTIONS = 40


def reuse_errors(trajectories: Sequence[Trajectory], *, gap: int | None = None) -> torch.Tensor:
    """e [T, T, K] float64: error of reusing in step t (second axis) what step o (first axis) computed; inf where t is
    not after o or either was not seen by any trajectory.

    Args:
        trajectories: recorded.
        gap: of a forecast from two computations, the second so many steps before o; None copies the one.
    """
    gram, times = _products(trajectories)
    count = len(times)
    diagonal = gram.diagonal().T  # [T, K]
    errors = torch.full_like(gram, torch.inf)
    for origin in range(count - 1):
        then = range(origin + 1, count)
        past, now, both = diagonal[origin], diagonal[then], gram[origin, then]
        error = now + past - 2 * both
        before = origin if gap is None else max(0, origin - gap)
        if before != origin and bool(times[before]):
            # Least squares of delta_t on delta_o and delta_before, in closed form.
            other, cross, ahead = diagonal[before], gram[before, origin], gram[before, then]
            determinant = (past * other - cross**2).clamp_min(1e-6 * past * other + 1e-300)
            explained = (both**2 * other - 2 * both * ahead * cross + ahead**2 * past) / determinant
            error = torch.minimum(error, now - explained)
        seen = times[then] & times[origin]
        errors[origin, then] = torch.where(seen[:, None], error.clamp_min(0.0), torch.inf)
    return errors


def _products(trajectories: Sequence[Trajectory]) -> tuple[torch.Tensor, torch.Tensor]:
    """([T, T, K] products of what a unit added in two steps, over the power of the streams; bool [T], steps seen)."""
    total = torch.zeros(())
    for trajectory in trajectories:
        scale = trajectory.power.double().nan_to_num(1.0).clamp_min(1e-12).rsqrt()
        total = total + trajectory.products * scale[:, None] * scale[None] / len(trajectories)
    return total, torch.stack([trajectory.seen.any(dim=1) for trajectory in trajectories]).all(dim=0)


def schedule_error(errors: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> float:
    """Sum of the errors of a mask [T, K] of 0 and 1."""
    latest = torch.zeros(mask.shape[1], dtype=torch.long)
    total = 0.0
    columns = torch.arange(mask.shape[1])
    for step in range(len(mask)):
        computes = mask[step].bool()
        latest = torch.where(computes, step, latest)
        found = errors[latest, step, columns]
        total += float(weights[step] * found[~computes].sum())
    return total


def cheapest_within(
    errors: torch.Tensor,
    weights: torch.Tensor,
    cost_ms: torch.Tensor,
    saved_ms: float,
    *,
    forced: torch.Tensor | None = None,
    longest: int | None = None,
) -> torch.Tensor:
    """The mask, uint8 [T, K], of least error that saves ``saved_ms`` over the loop.

    Args:
        errors: [T, T, K] of :func:`reuse_errors`.
        weights: [T], how much errors of a step count.
        cost_ms: [K], time of each unit.
        saved_ms: of all steps together.
        forced: bool [T], steps that compute everything; the first always does.
        longest: steps in a row in which a unit may be reused.

    Raises:
        ConfigError: so much cannot be saved.
    """
    count = len(weights)
    forced = torch.zeros(count, dtype=torch.bool) if forced is None else forced.clone()
    forced[0] = True
    segments = _segment_errors(errors, weights, forced, count if longest is None else longest)
    cost = cost_ms.double()

    def saved(mask: torch.Tensor) -> float:
        return float(((1 - mask.double()) @ cost).sum())

    # Prices at which nothing is computed that need not be, and at which no time is worth an error.
    low, high = 0.0, float(segments[segments.isfinite()].max()) / max(float(cost[cost > 0].min()), 1e-9) + 1.0
    best = _at_price(segments, cost, high)
    if saved(best) < saved_ms * (1 - 1e-9):
        raise ConfigError(
            f"cache calibration: at most {saved(best):.4g} ms of the loop can be saved with these units and steps, "
            f"{saved_ms:.4g} ms are wanted. Lower target_speedup."
        )
    for _ in range(_BISECTIONS):
        price = (low + high) / 2 if low == 0 else (low * high) ** 0.5
        mask = _at_price(segments, cost, price)
        if saved(mask) >= saved_ms:
            best, high = mask, price
        else:
            low = price
    return _repaired(best, segments, cost, saved(best) - saved_ms)


def _segment_errors(errors: torch.Tensor, weights: torch.Tensor, forced: torch.Tensor, longest: int) -> torch.Tensor:
    """[T, T + 1, K]: error of computing in step o and next in step s, s = T for never again; inf if not allowed."""
    count, _, units = errors.shape
    result = torch.full((count, count + 1, units), torch.inf, dtype=torch.float64)
    for origin in range(count):
        total = torch.zeros(units, dtype=torch.float64)
        for then in range(origin + 1, count + 1):
            result[origin, then] = total
            if then == count or forced[then] or then - origin > longest:
                break
            total = total + weights[then] * errors[origin, then]
    return result


def _at_price(segments: torch.Tensor, cost: torch.Tensor, price: float) -> torch.Tensor:
    """For each unit the steps to compute in, if a millisecond is worth ``price``: shortest paths over its steps."""
    count, _, units = segments.shape
    best = torch.full((count + 1, units), torch.inf, dtype=torch.float64)
    before = torch.zeros(count + 1, units, dtype=torch.long)
    best[0] = price * cost
    for then in range(1, count + 1):
        through = best[:then] + segments[:then, then]
        found = through.min(dim=0)
        before[then] = found.indices
        best[then] = found.values + (price * cost if then < count else 0.0)
    mask = torch.zeros(count, units, dtype=torch.uint8)
    columns = torch.arange(units)
    at = before[count]
    while True:
        mask[at, columns] = 1
        if bool((at == 0).all()):
            return mask
        at = torch.where(at > 0, before[at, columns], at)


def _repaired(mask: torch.Tensor, segments: torch.Tensor, cost: torch.Tensor, spare_ms: float) -> torch.Tensor:
    """What the budget leaves over is spent on the reuses that do most damage for their time."""
    mask = mask.clone()
    gains = _gains(mask, segments) / cost.clamp_min(1e-9)
    while True:
        allowed = gains.masked_fill(cost > spare_ms, 0.0)
        at = int(allowed.argmax())
        step, unit = divmod(at, mask.shape[1])
        if not float(allowed[step, unit]) > 0.0:
            return mask
        mask[step, unit] = 1
        spare_ms -= float(cost[unit])
        gains[:, unit] = _gains(mask[:, unit, None], segments[:, :, unit, None])[:, 0] / max(float(cost[unit]), 1e-9)


def _gains(mask: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """[T, K]: by how much less error there is if that unit is computed in that step, too; 0 where it is."""
    count, units = mask.shape
    steps, columns = torch.arange(count)[:, None].expand(count, units), torch.arange(units).expand(count, units)
    computed = mask.bool()
    origin = torch.where(computed, steps, -1).cummax(dim=0).values
    until = torch.where(computed, steps, count).flip(0).cummin(dim=0).values.flip(0)
    gains = segments[origin, until, columns] - segments[origin, steps, columns] - segments[steps, until, columns]
    return torch.where(computed, 0.0, gains)
