"""One set of pictures against the dense pipeline's, prompt by prompt: picture metrics and the classifier's verdicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from diffuse_compress.evaluation.metrics import PSNR_CAP_DB, bounding_box, psnr, ssim
from diffuse_compress.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    paired_bootstrap,
    paired_proportion_difference,
    wilson_interval,
)

__all__ = ["Classifier", "Comparison", "Reference", "psnr_difference"]


class Classifier(Protocol):
    """Names pictures: logits [n, classes] for pictures [n, 3, H, W] in [0, 1], and a caption for each class."""

    captions: list[str]

    def classify(self, images: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Comparison:
    """What differs from the dense pictures; intervals are 95 %, over prompts.

    Attributes:
        psnr, ssim: means over whole pictures (equal pictures count as ``PSNR_CAP_DB``).
        box_psnr, box_ssim: on the bounding box of what the dense picture shows.
        psnr_of_mean_error: PSNR of the squared error averaged over all prompts; ruled by the worst pictures.
        worst_prompt: index of the prompt of lowest PSNR.
        agreement: share of pictures that the classifier names as it names the dense one.
        accuracy: share that it names as the prompt does.
        accuracy_change: ``accuracy`` minus the dense pipeline's, from the discordant pairs.
    """

    psnr: Interval
    ssim: Interval
    box_psnr: Interval
    box_ssim: Interval
    psnr_of_mean_error: float
    worst_prompt: int
    agreement: Interval | None = None
    accuracy: Interval | None = None
    accuracy_change: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)


class Reference:
    """The dense pictures, their boxes and names.

    Args:
        pictures: [n, 3, H, W] in [0, 1].
        prompts: n texts.
        classifier: None leaves the verdicts out.
    """

    def __init__(self, pictures: torch.Tensor, prompts: Sequence[str], classifier: Classifier | None = None) -> None:
        self.pictures, self.prompts, self.classifier = pictures, list(prompts), classifier
        self.boxes = bounding_box(pictures)
        self.names = None if classifier is None else self._names(pictures)

    def _names(self, pictures: torch.Tensor) -> list[str]:
        assert self.classifier is not None
        best = self.classifier.classify(pictures).argmax(dim=1).tolist()
        return [self.classifier.captions[index] for index in best]

    @property
    def accuracy(self) -> Interval | None:
        """Share of dense pictures that are named as their prompt."""
        if self.names is None:
            return None
        return wilson_interval(sum(self._right(self.names)), len(self.prompts))

    def _right(self, names: Sequence[str]) -> list[bool]:
        return [name == prompt for name, prompt in zip(names, self.prompts, strict=True)]

    def psnr(self, pictures: torch.Tensor) -> torch.Tensor:
        """PSNR of each picture, [n] float64, at most ``PSNR_CAP_DB``."""
        return psnr(self.pictures, pictures).clamp_(max=PSNR_CAP_DB)

    def compare(self, pictures: torch.Tensor) -> Comparison:
        """Metrics of ``pictures`` [n, 3, H, W], made from the same prompts in the same order."""
        whole = self.psnr(pictures)
        box = psnr(self.pictures, pictures, boxes=self.boxes).clamp_(max=PSNR_CAP_DB)
        error = (self.pictures.double() - pictures.double()).square().mean()
        verdicts: dict[str, Interval] = {}
        if self.names is not None:
            names = self._names(pictures)
            same = sum(a == b for a, b in zip(names, self.names, strict=True))
            right = self._right(names)
            verdicts = {
                "agreement": wilson_interval(same, len(names)),
                "accuracy": wilson_interval(sum(right), len(names)),
                "accuracy_change": paired_proportion_difference(self._right(self.names), right),
            }
        return Comparison(
            psnr=bootstrap_mean(whole),
            ssim=bootstrap_mean(ssim(self.pictures, pictures)),
            box_psnr=bootstrap_mean(box),
            box_ssim=bootstrap_mean(ssim(self.pictures, pictures, boxes=self.boxes)),
            psnr_of_mean_error=min(PSNR_CAP_DB, float(-10 * torch.log10(error))),
            worst_prompt=int(whole.argmin()),
            **verdicts,
        )


def psnr_difference(reference: Reference, first: torch.Tensor, second: torch.Tensor) -> Interval:
    """Mean PSNR of ``second`` minus that of ``first``, both against the dense pictures, paired by prompt; in dB."""
    return paired_bootstrap(reference.psnr(first), reference.psnr(second))
