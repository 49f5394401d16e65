"""What changes between two sets of pictures or clips that were drawn from the same prompts and noise."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.comparison import Classifier
from diffuse_compress.evaluation.features import ClipExtractor
from diffuse_compress.evaluation.metrics import PSNR_CAP_DB, SSIM_WINDOW, as_pictures, flicker, psnr, ssim
from diffuse_compress.evaluation.records import Metric
from diffuse_compress.evaluation.samples import PictureSet, Sample, read_clip, read_picture
from diffuse_compress.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    paired_proportion_difference,
    wilson_interval,
)

__all__ = ["CLIP", "naming_metrics", "paired_interval", "paired_metric", "paired_values", "score_pairs"]

CLIP = "openai/clip-vit-large-patch14"
"""CLIP-I is mostly given of this model."""
_LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"
_PAIRS_AT_A_TIME = 64

_HOW = {
    "PSNR": ("whole picture, equal ones count as 100 dB", True, "dB"),
    "SSIM": ("Gaussian window of 11, each colour channel", True, ""),
    "LPIPS": ("lpips, AlexNet", False, ""),
    "CLIP-I": ("cosine of CLIP image embeddings", True, ""),
    "Latent error": ("‖x - x̂‖ / ‖x‖ after the last step", False, ""),
    "Flicker change": ("mean absolute difference of neighbouring frames, second less first", False, "of 255"),
}


def paired_values(x: torch.Tensor, y: torch.Tensor, clip: str = CLIP) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """PSNR, SSIM, LPIPS and CLIP-I of each pair, of clips also the change of flicker.

    Args:
        x: pictures [n, 3, H, W] or clips [n, F, 3, H, W] in [0, 1], the reference.
        y: of the same shape.
        clip: folder or Hub id of a CLIP model on this machine.

    Returns:
        ``{metric: [n] values}``, of clips means over frames, and ``{metric: why it could not be measured here}``.
    """
    values = {"PSNR": _by_frame(lambda p, q: psnr(p, q).clamp_(max=PSNR_CAP_DB), x, y)}
    absent: dict[str, str] = {}
    if min(x.shape[-2:]) >= SSIM_WINDOW:
        values["SSIM"] = _by_frame(ssim, x, y)
    else:
        absent["SSIM"] = f"pictures are smaller than its window of {SSIM_WINDOW} pixels"
    for name, function in (("LPIPS", _lpips), ("CLIP-I", lambda: _clip_similarity(clip))):
        try:
            values[name] = _by_frame(function(), x, y)
        except ConfigError as error:
            absent[name] = str(error)
    if x.dim() == 5:
        values["Flicker change"] = 255 * (flicker(y) - flicker(x))
    return values, absent


def score_pairs(
    reference: PictureSet, samples: PictureSet, *, clip: str = CLIP, classifier: Classifier | None = None
) -> tuple[list[Metric], dict[str, str]]:
    """Paired metrics of two runs of the same prompts and seeds, from their files.

    Args:
        reference: mostly the dense pipeline's run.
        samples: the other run.
        clip: CLIP model on this machine.
        classifier: names pictures by captions; adds how often they are named as the reference's, and as the prompt.

    Returns:
        The metrics, and why others are absent.

    Raises:
        ConfigError: runs of other prompts or seeds, or of other sizes.
    """
    if not reference.is_paired_with(samples) or reference.samples is None or samples.samples is None:
        difference = reference.mismatch(samples) or "their seeds or numbers differ, or one is no run"
        raise ConfigError(
            f"{samples.folder}: paired metrics need two runs of the same prompts and seeds, but {difference}. Generate "
            "both with one eval generate command."
        )
    found: dict[str, list[torch.Tensor]] = {}
    absent: dict[str, str] = {}
    for start in range(0, len(samples), _PAIRS_AT_A_TIME):
        x, y = (_read(side, start, start + _PAIRS_AT_A_TIME) for side in (reference, samples))
        if x.shape != y.shape:
            raise ConfigError(
                f"{samples.folder}: paired metrics need pictures of one size, got {list(y.shape[1:])} against "
                f"{list(x.shape[1:])}."
            )
        values, absent = paired_values(x, y, clip)
        for name, value in values.items():
            found.setdefault(name, []).append(value.double().cpu())
    groups = _by_condition(samples.samples)
    metrics = [paired_metric(name, torch.cat(parts)[groups], reference.name) for name, parts in found.items()]
    if classifier is not None:
        metrics += naming_metrics(reference, samples, classifier)
    return metrics, absent


def _by_condition(samples: Sequence[Sample]) -> torch.Tensor:
    """[prompts or classes, samples of each] indices; [n, 1] where nothing was asked for or their numbers differ."""
    found: dict[Any, list[int]] = {}
    for i, sample in enumerate(samples):
        asked = sample.prompt, sample.class_label
        found.setdefault(i if asked == (None, None) else asked, []).append(i)
    if len({len(group) for group in found.values()}) == 1:
        return torch.tensor(list(found.values()))
    return torch.arange(len(samples))[:, None]


def naming_metrics(reference: PictureSet, samples: PictureSet, classifier: Classifier) -> list[Metric]:
    """How often a classifier names pictures as the reference's, and, where prompts are its captions, as the prompt."""
    names = []
    for side in (reference, samples):
        pictures = as_pictures(torch.stack([read_picture(path) for path in side.files]))
        names.append([classifier.captions[i] for i in classifier.classify(pictures).argmax(dim=1).tolist()])
    count = len(samples)
    how = {"implementation": f"{type(classifier).__name__} of the folder", "unit": "%"}
    about = {"name": reference.name, "count": count}
    same = wilson_interval(sum(a == b for a, b in zip(*names, strict=True)), count)
    found = [_percent("Same name", same, reference=about, **how)]
    asked = [sample.prompt for sample in samples.samples or ()]
    if asked and set(asked) <= set(classifier.captions):
        right = [[name == prompt for name, prompt in zip(side, asked, strict=True)] for side in names]
        found.append(_percent("Right name", wilson_interval(sum(right[1]), count), **how))
        found.append(
            _percent("Right name, change", paired_proportion_difference(right[0], right[1]), reference=about, **how)
        )
    return found


def _percent(name: str, interval: Interval, **more: Any) -> Metric:
    scaled = Interval(100 * interval.value, 100 * interval.low, 100 * interval.high, interval.count)
    return Metric.from_interval(name, scaled, higher_is_better=True, **more)


def _read(pictures: PictureSet, start: int, stop: int) -> torch.Tensor:
    """[n, 3, H, W], or [n, F, 3, H, W] of clips, in [0, 1]."""
    found = []
    for sample in (pictures.samples or ())[start:stop]:
        path = pictures.folder / sample.file
        found.append(read_clip(path) if sample.frames else read_picture(path))
    if len({one.shape for one in found}) > 1:
        raise ConfigError(f"{pictures.folder}: pictures of a run must have one size, got several.")
    return as_pictures(torch.stack(found))


def _by_frame(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """[n] values of pictures; of clips, the mean over their frames."""
    if x.dim() == 4:
        return function(x, y)
    return function(x.flatten(0, 1), y.flatten(0, 1)).reshape(x.shape[:2]).mean(dim=1)


def _lpips() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    if importlib.util.find_spec("lpips") is None:
        raise ConfigError("needs pip install lpips, which brings torchvision")
    backbone = Path(torch.hub.get_dir()) / "checkpoints" / _LPIPS_BACKBONE
    if not backbone.is_file():
        raise ConfigError(
            f"needs {_LPIPS_BACKBONE} of torchvision in the folder checkpoints of torch.hub.get_dir(); nothing is "
            "downloaded here"
        )
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).eval()

    @torch.no_grad()
    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(16), y.split(16), strict=True)
        return torch.cat([network(p * 2 - 1, q * 2 - 1).flatten() for p, q in parts])

    return distance


def _clip_similarity(model: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    extractor = ClipExtractor(model)

    def embeddings(pictures: torch.Tensor) -> torch.Tensor:
        parts = (pictures * 255).round().to(torch.uint8).split(16)
        return torch.cat([extractor(part)["features"] for part in parts])

    return lambda x, y: torch.nn.functional.cosine_similarity(embeddings(x), embeddings(y))


def paired_metric(name: str, values: torch.Tensor, reference: str) -> Metric:
    """The mean of paired values, with an interval over prompts; over seeds if there is one prompt, or none.

    Args:
        name: of :func:`paired_values`, or "Latent error".
        values: [prompts, seeds]; a prompt's seeds are averaged before prompts are resampled.
        reference: name of the first set.
    """
    how, higher, unit = _HOW[name]
    interval = paired_interval(values)
    return Metric.from_interval(
        name, interval, how, higher_is_better=higher, unit=unit, reference={"name": reference, "count": interval.count}
    )


def paired_interval(values: torch.Tensor) -> Interval:
    """Mean of [prompts, seeds] values, and its interval: see :func:`paired_metric`."""
    by_prompt = values.mean(dim=1)
    units = by_prompt if len(by_prompt) > 1 else values.flatten()
    value = float(values.mean())
    if len(units) < 2:
        return Interval(value, float("-inf"), float("inf"), values.numel())
    found = bootstrap_mean(units)
    return Interval(value, found.low, found.high, values.numel())
