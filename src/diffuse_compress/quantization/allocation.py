"""Which format each layer gets so that the sum of errors is least under a budget: a multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from diffuse_compress.errors import ConfigError

__all__ = ["allocate"]

_MAX_UNITS = 1 << 16


def allocate(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Choose one option of each item so that the errors add up to little and the costs to no more than ``budget``.

    Dynamic programming over the budget, in units of the costs' greatest common divisor. Where that would be more than
    65,536 units, costs are rounded up to larger ones, and what this leaves of the budget goes to the options that
    lower the error most for their cost; the result then is near the least error, not always at it.

    Args:
        costs: of each item's options, at least one.
        errors: of the same options, 0 or more.
        budget: of all chosen options together.

    Returns:
        Index of the chosen option of each item.

    Raises:
        ConfigError: the cheapest options cost more than ``budget``.
    """
    least = [min(options) for options in costs]
    spare = budget - sum(least)
    if spare < 0:
        raise ConfigError(f"allocate: the cheapest options cost {sum(least)}, more than the budget of {budget}.")
    extra = [[cost - low for cost in options] for options, low in zip(costs, least, strict=True)]
    # More than the dearest options cost is never spent.
    spare = min(spare, sum(max(options) for options in extra))
    unit = max(math.gcd(*(cost for options in extra for cost in options), 0), -(-spare // _MAX_UNITS), 1)
    chosen = _least_error([[-(-cost // unit) for cost in options] for options in extra], errors, spare // unit)
    return _spend_the_rest(chosen, extra, errors, spare)


def _least_error(units: list[list[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Exact, in whole units: ``best[b]`` is the least error of the items so far at a cost of at most ``b``."""
    best = np.zeros(budget + 1)
    choices = []
    for costs, values in zip(units, errors, strict=True):
        found = np.full(budget + 1, np.inf)
        choice = np.zeros(budget + 1, dtype=np.int16)
        for option, (cost, value) in enumerate(zip(costs, values, strict=True)):
            if cost > budget:
                continue
            candidate = best[: budget + 1 - cost] + value
            better = candidate < found[cost:]
            found[cost:][better] = candidate[better]
            choice[cost:][better] = option
        best = found
        choices.append(choice)
    left, chosen = budget, []
    for costs, choice in zip(reversed(units), reversed(choices), strict=True):
        chosen.append(int(choice[left]))
        left -= costs[chosen[-1]]
    return chosen[::-1]


def _spend_the_rest(
    chosen: list[int], costs: list[list[int]], errors: Sequence[Sequence[float]], budget: int
) -> list[int]:
    chosen = list(chosen)
    left = budget - sum(options[choice] for options, choice in zip(costs, chosen, strict=True))
    while True:
        moves = []
        for item, choice in enumerate(chosen):
            for option, cost in enumerate(costs[item]):
                more, gain = cost - costs[item][choice], errors[item][choice] - errors[item][option]
                if gain > 0 and more <= left:
                    moves.append((gain / max(more, 1), item, option, more))
        if not moves:
            return chosen
        _, item, option, more = max(moves)
        chosen[item], left = option, left - more
