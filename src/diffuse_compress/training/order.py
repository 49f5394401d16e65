"""Which items a step sees: a function of the step, so that a resumed training goes on with the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffuse_compress.pipeline_call import seeded

__all__ = ["BatchOrder", "draw_generator"]

_STREAMS = 1_000_003
_LIMIT = 2**62


def draw_generator(seed: int, number: int) -> torch.Generator:
    """The generator of the ``number``-th draw of a training."""
    return seeded((seed * _STREAMS + number + 1) % _LIMIT)


class BatchOrder:
    """Batches of items of one signature, in another order every epoch; the last of a signature is filled up.

    Args:
        signatures: of each item.
        size: items of a batch, of all processes together.
        seed: of the order.
    """

    def __init__(self, signatures: Sequence[str], size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._buckets: dict[str, list[int]] = {}
        for index, signature in enumerate(signatures):
            self._buckets.setdefault(signature, []).append(index)
        self.per_epoch = sum(-(-len(bucket) // size) for bucket in self._buckets.values())
        self._epoch: tuple[int, list[list[int]]] | None = None

    def __call__(self, number: int) -> list[int]:
        """Items of the ``number``-th batch."""
        epoch, place = divmod(number, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._batches(epoch)
        return self._epoch[1][place]

    def _batches(self, epoch: int) -> list[list[int]]:
        generator, batches = seeded((self.seed * _STREAMS + epoch) % _LIMIT), list[list[int]]()
        for bucket in self._buckets.values():
            order = [bucket[place] for place in torch.randperm(len(bucket), generator=generator).tolist()]
            order = order + (order * self.size)[: -len(order) % self.size]
            batches += [order[start : start + self.size] for start in range(0, len(order), self.size)]
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
