"""Distances between feature sets that assume no normal distribution: KID, CMMD, precision and recall, and the
Inception Score of one set. Float64; pairs of samples are treated in blocks, so memory grows with N, not N²."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from diffuse_compress.errors import ConfigError

__all__ = [
    "CMMD_SCALE",
    "MeanDiscrepancy",
    "cmmd",
    "inception_score",
    "kernel_distance",
    "kernel_distance_subsets",
    "maximum_mean_discrepancy",
    "precision_recall",
]

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
NEIGHBOURS = 3
_BLOCK_PAIRS = 1 << 23


@dataclass(frozen=True)
class MeanDiscrepancy:
    """A squared maximum mean discrepancy and the values of its bootstrap resamples.

    Attributes:
        value: the estimate.
        resampled: [resamples] estimates on resampled sets.
    """

    value: float
    resampled: np.ndarray


def polynomial_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``(x·y / D + 1)³`` of [n, D] and [m, D]: [n, m]. Source: Bińkowski et al. 2018, arXiv 1801.01401, section 4."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``exp(-|x - y|² / (2 σ²))`` with σ = 10 of [n, D] and [m, D]: [n, m]."""
    return torch.exp(_squared_distances(x, y) / (-2 * CMMD_SIGMA**2))


def maximum_mean_discrepancy(
    x: torch.Tensor,
    y: torch.Tensor,
    kernel: Kernel,
    *,
    unbiased: bool,
    resamples: int = 0,
    paired: bool = False,
    seed: int = 0,
) -> MeanDiscrepancy:
    """Squared maximum mean discrepancy of two sets, with bootstrap resamples from the same pass over all pairs.

    Source: Gretton et al. 2012 (JMLR 13), eq. 3 (unbiased: no sample meets itself) and eq. 5 (biased). Of paired sets
    the unbiased estimate is their eq. 4, which leaves out the pairs (x[i], y[i]) too: they are no independent draws.

    Args:
        x: [n, D].
        y: [m, D].
        kernel: of [n, D] and [m, D] blocks.
        unbiased: leave out the diagonal; the value may be negative.
        resamples: number of bootstrap samples.
        paired: x[i] and y[i] belong together (one prompt, one seed) and are drawn together; then n is m.
        seed: of the generator that draws them.
    """
    x, y = x.double(), y.double()
    wx, wy = _multiplicities(len(x), len(y), resamples, paired, seed)
    wx, wy = wx.to(x.device), wy.to(x.device)
    sums = _weighted_pair_sum(x, x, wx, wx, kernel), _weighted_pair_sum(y, y, wy, wy, kernel)
    cross = _weighted_pair_sum(x, y, wx, wy, kernel)
    within = []
    for points, weights, total in ((x, wx, sums[0]), (y, wy, sums[1])):
        count = len(points)
        if unbiased:
            within.append((total - _diagonal(points, points, kernel) @ weights) / (count * (count - 1)))
        else:
            within.append(total / count**2)
    pairs = len(x) * len(y)
    if unbiased and paired:
        cross, pairs = cross - _diagonal(x, y, kernel) @ wx, pairs - len(x)
    values = (within[0] + within[1] - 2 * cross / pairs).cpu().numpy()
    return MeanDiscrepancy(float(values[0]), values[1:])


def kernel_distance(
    x: torch.Tensor, y: torch.Tensor, *, resamples: int = 0, paired: bool = False, seed: int = 0
) -> MeanDiscrepancy:
    """Kernel distance over all pairs: the unbiased estimate that means over subsets scatter around.

    Source: Bińkowski et al. 2018, arXiv 1801.01401. Arguments as :func:`maximum_mean_discrepancy`; at least two
    samples a side.
    """
    _at_least(2, x, y)
    return maximum_mean_discrepancy(
        x, y, polynomial_kernel, unbiased=True, resamples=resamples, paired=paired, seed=seed
    )


def kernel_distance_subsets(
    x: torch.Tensor, y: torch.Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of the kernel distance over random subsets, as papers report it.

    The deviation is of single subsets, which overlap: no interval of the mean.

    Args:
        x: [n, D].
        y: [m, D].
        subsets: number of them.
        subset_size: samples of each, at most n and m.
        seed: of the generator that draws them.
    """
    _at_least(2, x, y)
    size = min(subset_size, len(x), len(y))
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        parts = [side[torch.from_numpy(generator.permutation(len(side))[:size])] for side in (x, y)]
        values.append(kernel_distance(parts[0], parts[1]).value)
    return float(np.mean(values)), float(np.std(values))


def cmmd(
    x: torch.Tensor, y: torch.Tensor, *, resamples: int = 0, paired: bool = False, seed: int = 0
) -> MeanDiscrepancy:
    """Maximum mean discrepancy of CLIP embeddings, times 1000.

    Source: Jayasumana et al. 2024, arXiv 2401.09603: embeddings of length one, a Gaussian kernel with σ = 10, and the
    estimate that keeps the diagonal. Arguments as :func:`maximum_mean_discrepancy`; embeddings of any length.
    """
    unit = [torch.nn.functional.normalize(side.double(), dim=1) for side in (x, y)]
    found = maximum_mean_discrepancy(
        unit[0], unit[1], gaussian_kernel, unbiased=False, resamples=resamples, paired=paired, seed=seed
    )
    return MeanDiscrepancy(CMMD_SCALE * found.value, CMMD_SCALE * found.resampled)


def precision_recall(
    reference: torch.Tensor, samples: torch.Tensor, *, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Share of samples within the reference's manifold, and of references within the samples'.

    Source: Kynkäänniemi et al. 2019, arXiv 1904.06991: a set's manifold is the union of balls around its points that
    reach to their ``neighbours``-th neighbour in the set.

    Args:
        reference: [n, D].
        samples: [m, D].
        neighbours: k.

    Raises:
        ConfigError: a set of no more than ``neighbours`` points.
    """
    _at_least(neighbours + 1, reference, samples)
    reference, samples = reference.double(), samples.double()
    precision = _share_inside(samples, reference, _radii(reference, neighbours))
    return precision, _share_inside(reference, samples, _radii(samples, neighbours))


def inception_score(logits: torch.Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of ``exp(E[KL(p(y|x) || p(y))])`` over splits.

    Source: Salimans et al. 2016, arXiv 1606.03498, section 4. Samples are shuffled first, since folders are often
    sorted by class.

    Args:
        logits: [N, classes].
        splits: parts of equal size that the score is taken of; as many as there are samples at most.
        seed: of the shuffle.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(logits))).to(logits.device)
    log_p = logits[order].double().log_softmax(dim=1)
    scores = []
    for part in torch.tensor_split(log_p, min(splits, len(log_p))):
        p = part.exp()
        divergence = (p * (part - p.mean(dim=0).log())).sum(dim=1).mean()
        scores.append(float(divergence.exp()))
    return float(np.mean(scores)), float(np.std(scores))


def _multiplicities(n: int, m: int, resamples: int, paired: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each sample is taken: [n, 1 + resamples] and [m, 1 + resamples]; the first column is the plain set."""
    generator = np.random.default_rng(seed)
    wx = generator.multinomial(n, np.full(n, 1 / n), size=resamples).T
    wy = wx if paired else generator.multinomial(m, np.full(m, 1 / m), size=resamples).T
    plain = [np.concatenate([np.ones((len(w), 1)), w], axis=1) for w in (wx, wy)]
    return torch.from_numpy(plain[0]), torch.from_numpy(plain[1])


def _diagonal(x: torch.Tensor, y: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    """[n] kernel of x[i] and y[i]."""
    return torch.stack([kernel(one[None], two[None])[0, 0] for one, two in zip(x, y, strict=True)])


def _weighted_pair_sum(
    x: torch.Tensor, y: torch.Tensor, wx: torch.Tensor, wy: torch.Tensor, kernel: Kernel
) -> torch.Tensor:
    """``Σ_ij wx_i k(x_i, y_j) wy_j`` for each column of the weights."""
    total = torch.zeros(wx.shape[1], dtype=torch.float64, device=x.device)
    rows = max(1, _BLOCK_PAIRS // max(1, len(y)))
    for start in range(0, len(x), rows):
        block = kernel(x[start : start + rows], y)
        total += (wx[start : start + rows] * (block @ wy)).sum(dim=0)
    return total


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T).clamp_min(0)


def _radii(points: torch.Tensor, neighbours: int) -> torch.Tensor:
    """[n] squared distance of each point to its k-th neighbour other than itself."""
    rows = max(1, _BLOCK_PAIRS // len(points))
    found = []
    for start in range(0, len(points), rows):
        distances = _squared_distances(points[start : start + rows], points)
        itself = torch.arange(start, start + len(distances), device=points.device)
        distances[torch.arange(len(distances), device=points.device), itself] = 0
        found.append(distances.kthvalue(neighbours + 1, dim=1).values)
    return torch.cat(found)


def _share_inside(points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor) -> float:
    rows = max(1, _BLOCK_PAIRS // len(centres))
    inside = sum(
        int((_squared_distances(part, centres) <= radii[None]).any(dim=1).sum()) for part in points.split(rows)
    )
    return inside / len(points)


def _at_least(count: int, *sides: torch.Tensor) -> None:
    if min(len(side) for side in sides) < count:
        raise ConfigError(
            f"discrepancy: need at least {count} samples a side, got {' and '.join(str(len(side)) for side in sides)}."
        )
