"""The knapsack behind mixed precision, against every combination."""

from __future__ import annotations

import itertools
import random

import pytest

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization import allocation
from diffuse_compress.quantization.allocation import allocate


def problem(seed: int, items: int = 6) -> tuple[list[list[int]], list[list[float]]]:
    draw = random.Random(seed)
    costs = [[draw.randrange(1, 60) * 8 for _ in range(draw.randrange(1, 5))] for _ in range(items)]
    return costs, [[draw.random() for _ in options] for options in costs]


def least_error(costs: list[list[int]], errors: list[list[float]], budget: int) -> float:
    best = float("inf")
    for choice in itertools.product(*(range(len(options)) for options in costs)):
        if sum(options[i] for options, i in zip(costs, choice, strict=True)) <= budget:
            best = min(best, sum(values[i] for values, i in zip(errors, choice, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_allocate_finds_the_least_error(seed: int) -> None:
    costs, errors = problem(seed)
    lowest, highest = sum(map(min, costs)), sum(map(max, costs))
    for budget in (lowest, (lowest + highest) // 2, highest + 5):
        chosen = allocate(costs, errors, budget)
        assert sum(options[i] for options, i in zip(costs, chosen, strict=True)) <= budget
        found = sum(values[i] for values, i in zip(errors, chosen, strict=True))
        assert found == pytest.approx(least_error(costs, errors, budget))


def test_allocate_with_rounded_costs_stays_in_the_budget_and_near_the_least_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(allocation, "_MAX_UNITS", 64)
    worst = 1.0
    for seed in range(20):
        costs, errors = problem(seed)
        budget = (sum(map(min, costs)) + sum(map(max, costs))) // 2
        chosen = allocate(costs, errors, budget)
        assert sum(options[i] for options, i in zip(costs, chosen, strict=True)) <= budget
        found = sum(values[i] for values, i in zip(errors, chosen, strict=True))
        worst = max(worst, found / least_error(costs, errors, budget))
    assert worst < 1.1


def test_allocate_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="cheapest options cost 30, more than the budget of 29"):
        allocate([[10, 20], [20, 40]], [[1.0, 0.0], [1.0, 0.0]], 29)
