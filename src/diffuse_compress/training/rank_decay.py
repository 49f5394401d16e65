"""The branch leaves by halves: which rank is in force at which step, how the leaving part fades, and what is left.

Huang et al. 2025, "QVGen", arXiv 2505.11497, section 3.3. A phase starts with a branch of rank ``r`` whose components
are in order of their singular values. The smallest ``ratio * r`` are multiplied by ``u``, which goes from 1 to 0 within
the phase; the next phase starts with the rest. Differences from the released code: the decomposition is of the r x r
core, which costs O((n + m) r^2) and not a full decomposition of an n x m product, is exact, and has fixed signs, so
that all ranks of a distributed run get one result; what the last gate has left of the leaving part is added to the
weight and not dropped, so that the function of the layer does not jump; and moments of the optimizer, which belong to
factors that have been turned, are forgotten or turned along.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.training.config import Gate, QVGenConfig

__all__ = ["RankDecay", "core_svd", "rank_path", "singular_values", "turn_moments"]


def rank_path(rank: int, ratio: float, last_rank: int) -> list[int]:
    """Ranks in force, one per phase, and 0 at the end: 32, 16, 8, 4, 2, 1, 0 for a ratio of 1/2 and a last rank of 1.

    Args:
        rank: at the start, at least 1.
        ratio: share that leaves in a phase, in (0, 1]; at least one component does.
        last_rank: from here on all that is left leaves together.

    Raises:
        ConfigError: values outside of these.
    """
    if rank < 1 or not 0 < ratio <= 1 or last_rank < 1:
        raise ConfigError(
            "rank decay: need rank >= 1, 0 < ratio <= 1 and last_rank >= 1, got "
            f"rank={rank}, ratio={ratio}, last_rank={last_rank}."
        )
    path = [rank]
    while path[-1] > last_rank:
        # The product of decimal fractions may be a hair above the whole number that is meant.
        path.append(min(path[-1] - 1, math.floor((1 - ratio) * path[-1] + 1e-9)))
    return path if path[-1] == 0 else [*path, 0]


class RankDecay:
    """Phase, rank and gate of every step.

    Args:
        config: of the training.
        total_steps: optimizer steps of the whole training.

    Attributes:
        path: ranks of the phases, and what is left after the last.
        starts: step at which each entry of ``path`` comes into force.

    Raises:
        ConfigError: fewer steps than phases.
    """

    def __init__(self, config: QVGenConfig, total_steps: int) -> None:
        self._gate = config.gate
        self.rank = config.phi_rank
        if not config.decay:
            self.path, self.starts = [self.rank], [0]
            return
        self.path = rank_path(config.phi_rank, config.decay_ratio, config.smallest_rank)
        steps, phases = round(config.decay_fraction * total_steps), len(self.path) - 1
        if steps < phases:
            raise ConfigError(
                f"rank decay: the branch leaves in {phases} phases of at least one step each, within "
                f"decay_fraction={config.decay_fraction} of the training, got {total_steps} steps. Train longer, or "
                "take a smaller phi_rank, a larger decay_ratio, or decay=False."
            )
        self.starts = [phase * steps // phases for phase in range(phases + 1)]

    def at(self, step: int) -> tuple[int, int, torch.Tensor]:
        """What is in force at a step, counted from 0.

        Returns:
            number of the phase; rank; gate of each component, fp32 [phi_rank]: 1 for those that stay, ``u`` for those
            that leave in this phase, 0 for those that have left.
        """
        phase = max(number for number, start in enumerate(self.starts) if start <= step)
        rank = self.path[phase]
        gate = torch.zeros(self.rank)
        gate[:rank] = 1.0
        if rank and phase + 1 < len(self.path):
            start, end = self.starts[phase : phase + 2]
            gate[self.path[phase + 1] : rank] = self._fade((step - start) / (end - start))
        return phase, rank, gate

    def _fade(self, share: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * share)) if self._gate is Gate.COSINE else 1.0 - share


def core_svd(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The factors of ``up @ down`` along its singular vectors, and the values, by way of its r x r core.

    ``up = Q1 R1`` and ``down.T = Q2 R2`` give ``up @ down = Q1 (R1 R2.T) Q2.T``, so that the decomposition of the
    bracket is that of the product. float64 throughout: the factors are thin.

    Args:
        up: [N, r] floating point, r at most N and K.
        down: [r, K].

    Returns:
        up fp32 [N, r] and down fp32 [r, K] with the square root of the values in each, values fp32 [r] descending. The
        entry of largest magnitude of each column of ``up`` is positive.
    """
    left, left_core = torch.linalg.qr(up.detach().double())
    right, right_core = torch.linalg.qr(down.detach().double().t())
    turn_left, values, turn_right = torch.linalg.svd(left_core @ right_core.t())
    new_up, new_down = left @ turn_left, turn_right @ right.t()
    largest = new_up.gather(0, new_up.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(new_up)
    root = values.sqrt()
    return (new_up * sign * root).float(), (new_down * sign.t() * root.unsqueeze(1)).float(), values.float()


def singular_values(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Those of ``up @ down``, fp32 [r], descending; of the cores alone."""
    _, left = torch.linalg.qr(up.detach().double(), mode="r")
    _, right = torch.linalg.qr(down.detach().double().t(), mode="r")
    return torch.linalg.svdvals(left @ right.t()).float()


def turn_moments(state: dict[str, Any], turn: torch.Tensor, rank: int, *, columns: bool) -> None:
    """Turn Adam's moments of a factor, in place, as the factor's gradient turns: ``grad @ turn``.

    The second moment, of which only the diagonal is kept, turns as if the gradient's entries were independent.

    Args:
        state: of the parameter in the optimizer; with ``exp_avg`` and ``exp_avg_sq``, else nothing happens.
        turn: [old, new] for components of the factor.
        rank: components that are in force; the moments of the others become 0.
        columns: components are columns (``up``), not rows (``down``).
    """
    for name, factor in (("exp_avg", turn), ("exp_avg_sq", turn.square())):
        moment = state.get(name)
        if moment is None:
            return
        values = moment if columns else moment.t()
        turned = values[:, : turn.shape[0]].to(factor) @ factor
        values.zero_()
        values[:, :rank] = turned[:, :rank].to(values)
