"""Features of pictures for distances between sets: Inception, CLIP or a classifier of one's own, on any number of
processes.

Pictures are taken in batches of consecutive ones, batch k by process k modulo their number, and features are gathered
in index order. A batch holds the same pictures whatever the number of processes, so they give the same bits.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.inception import DIMS, WEIGHTS_SHA256, find_weights, load_inception
from diffuse_compress.evaluation.samples import PictureSet, read_picture
from diffuse_compress.progress import track

__all__ = [
    "PREPROCESSING",
    "ClassifierExtractor",
    "ClipExtractor",
    "FeatureExtractor",
    "InceptionExtractor",
    "extract_features",
    "load_classifier",
]

_SIDE = 299
PREPROCESSING = {
    "pytorch-fid": "bilinear resize to 299 without antialiasing, half-pixel centres; 2x - 1",
    "torch-fidelity": "bilinear resize to 299 as in TensorFlow 1; (x - 128) / 128",
    "clean-fid": "bicubic resize to 299 with antialiasing, not rounded; (x - 128) / 128",
}
"""How three implementations bring pictures to the size of the Inception network; the numbers differ."""


class FeatureExtractor(Protocol):
    """Maps pictures to vectors.

    Attributes:
        name: what makes the features, with weights and preprocessing: two sets compare only under equal names.
        label: the same in a few words.
        is_published: distances may carry their published names (FID, KID; CMMD).
        device: where it runs.
    """

    name: str
    label: str
    is_published: bool
    device: torch.device

    def __call__(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """``features`` [B, D], and where the extractor has them ``logits`` [B, classes] and ``spatial`` [B, S], of
        uint8 pictures [B, 3, H, W] on the device."""
        ...


class InceptionExtractor:
    """The Inception network of FID.

    Args:
        preprocessing: key of :data:`PREPROCESSING`.
        dims: 64, 192, 768 or 2048 features.
        weights: path of the weight file; None looks where torch.hub keeps downloads.
        device: where to run.
        spatial: also return the features of sFID.

    Raises:
        ConfigError: unknown preprocessing or dims; no weights.
        CheckpointError: weights of another network.
    """

    def __init__(
        self,
        preprocessing: str = "pytorch-fid",
        dims: int = 2048,
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        *,
        spatial: bool = False,
    ) -> None:
        if preprocessing not in PREPROCESSING or dims not in DIMS:
            raise ConfigError(
                f"InceptionExtractor: need preprocessing of {', '.join(PREPROCESSING)} and dims of "
                f"{', '.join(map(str, DIMS))}, got {preprocessing!r} and {dims}."
            )
        self.device, self.preprocessing, self.dims, self.spatial = torch.device(device), preprocessing, dims, spatial
        network, digest = load_inception(find_weights(weights))
        module: Any = network  # torch's stubs do not list memory_format alone
        self._network = module.to(device=self.device, memory_format=torch.channels_last)
        published = digest == WEIGHTS_SHA256
        self.is_published = published and dims == 2048
        kind = "pt_inception-2015-12-05" if published else f"other weights than FID's ({digest})"
        self.label = f"{dims} Inception features" + ("" if published else ", other weights than FID's")
        self.name = f"Inception {kind}, {dims} features, {preprocessing}: {PREPROCESSING[preprocessing]}"

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        x = inception_input(pictures, self.preprocessing)
        return self._network(x.contiguous(memory_format=torch.channels_last), self.dims, spatial=self.spatial)


class ClipExtractor:
    """Image embeddings of a CLIP model of transformers, as CMMD takes them.

    Args:
        model: folder or Hub id; CMMD is defined on ``openai/clip-vit-large-patch14-336``. Only local files are read.
        device: where to run.

    Raises:
        ConfigError: the model is not on this machine.
    """

    PUBLISHED = "openai/clip-vit-large-patch14-336"

    def __init__(self, model: str = PUBLISHED, device: str | torch.device = "cpu") -> None:
        from transformers import CLIPVisionModelWithProjection

        self.device = torch.device(device)
        try:
            self._model = CLIPVisionModelWithProjection.from_pretrained(model, local_files_only=True)
            from transformers import CLIPImageProcessor  # its import warns where torchvision is absent

            processor = CLIPImageProcessor.from_pretrained(model, local_files_only=True)
        except OSError as error:
            raise ConfigError(
                f"{model}: no CLIP model of that name on this machine. Download it (hf download {model}), or give the "
                "folder of one with --clip."
            ) from error
        self._model = self._model.to(self.device).eval()
        self._side = int(self._model.config.image_size)
        self._mean, self._std = (torch.tensor(v, device=self.device).view(-1, 1, 1) for v in _norm_of(processor))
        self.is_published = model == self.PUBLISHED
        self.label = f"CLIP {Path(model).name} embeddings"
        self.name = f"CLIP {Path(model).name}, embeddings, bicubic resize to {self._side} without crop"

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        x = F.interpolate(pictures.float() / 255, size=(self._side, self._side), mode="bicubic").clamp_(0, 1)
        embeddings = self._model(pixel_values=((x - self._mean) / self._std).to(self._model.dtype)).image_embeds
        return {"features": embeddings.float()}


class ClassifierExtractor:
    """Embeddings and logits of a classifier of one's own: a Python file with ``load_classifier(folder)``.

    What it returns needs ``embeddings(pictures)`` [n, D] and ``classify(pictures)`` [n, classes] of pictures
    [n, 3, H, W] in [0, 1].

    Args:
        path: the file, or a folder with a ``classifier.py``.
        device: where to run.
        size: side in pixels to enlarge or shrink pictures to (bicubic, not antialiased); None leaves them.

    Raises:
        ConfigError: no such file, or without ``embeddings``.
    """

    is_published = False

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", size: int | None = None) -> None:
        self.device, self._size = torch.device(device), size
        classifier = load_classifier(path)
        if classifier is None or not hasattr(classifier, "embeddings"):
            raise ConfigError(
                f"{path}: need a classifier.py whose load_classifier(folder) returns an object with embeddings() and "
                "classify(). See examples/reference_models/emoji_pixart/classifier.py."
            )
        self._classifier = classifier.to(self.device) if hasattr(classifier, "to") else classifier
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", type(classifier).__name__).lower()
        self.label = f"{words} features"
        self.name = self.label + (f", pictures resized to {size}" if size else "")

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        x = pictures.float() / 255
        if self._size is not None and x.shape[-2:] != (self._size, self._size):
            x = F.interpolate(x, size=(self._size, self._size), mode="bicubic").clamp_(0, 1)
        return {"features": self._classifier.embeddings(x).float(), "logits": self._classifier.classify(x).float()}


def load_classifier(path: str | Path) -> Any:
    """What ``load_classifier(folder)`` of a file, or of a folder's ``classifier.py``, returns; None without one.

    The file is run: give only files that you trust.
    """
    path = Path(path)
    path = path / "classifier.py" if path.is_dir() else path
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("reference_classifier", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_classifier(path.parent) if hasattr(module, "load_classifier") else None


def inception_input(pictures: torch.Tensor, preprocessing: str) -> torch.Tensor:
    """[B, 3, 299, 299] float32 in [-1, 1] of uint8 pictures [B, 3, H, W]; see :data:`PREPROCESSING`."""
    x = pictures.float()
    if preprocessing == "pytorch-fid":
        return F.interpolate(x / 255, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False) * 2 - 1
    if preprocessing == "torch-fidelity":
        rows, columns = (_tensorflow_bilinear(side, _SIDE, x.device) for side in x.shape[-2:])
        return (rows @ x @ columns.T - 128) / 128
    resized = F.interpolate(x, size=(_SIDE, _SIDE), mode="bicubic", align_corners=False, antialias=True)
    return (resized.clamp(0, 255) - 128) / 128


def _tensorflow_bilinear(size: int, target: int, device: torch.device) -> torch.Tensor:
    """[target, size] weights of TensorFlow 1's bilinear resize: output pixel i lies at ``i * size / target``."""
    places = torch.arange(target, dtype=torch.float32) * (size / target)
    low = places.long().clamp_(max=size - 1)
    share = places - low
    weights = torch.zeros(target, size)
    weights.scatter_add_(1, low[:, None], (1 - share)[:, None])
    weights.scatter_add_(1, (low + 1).clamp_(max=size - 1)[:, None], share[:, None])
    return weights.to(device)


def _norm_of(processor: Any) -> tuple[list[float], list[float]]:
    return list(processor.image_mean), list(processor.image_std)


class _Pictures(torch.utils.data.Dataset[Any]):
    """Batches of pictures, decoded in a worker; problems come back as values, so that they keep their message."""

    def __init__(self, files: Sequence[Path], batches: Sequence[range]) -> None:
        self._files, self._batches = files, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, position: int) -> torch.Tensor | str:
        found: list[torch.Tensor] = []
        for index in self._batches[position]:
            try:
                picture = read_picture(self._files[index])
            except ConfigError as error:
                return str(error)
            if found and picture.shape != found[0].shape:
                return _sizes_text(self._files[index], picture, found[0])
            found.append(picture)
        return torch.stack(found)


def _sizes_text(path: Path, picture: torch.Tensor, expected: torch.Tensor) -> str:
    sizes = [f"{side.shape[-1]} x {side.shape[-2]}" for side in (picture, expected)]
    return (
        f"{path}: pictures of a set must have one size, got {sizes[0]} after {sizes[1]}. The resize is part of the "
        "metric: bring them to one size first, all in the same way."
    )


def default_workers(device: torch.device) -> int:
    """Processes that decode pictures: none on the CPU, where they would take the cores that compute."""
    return 0 if device.type == "cpu" else min(32, len(os.sched_getaffinity(0)))


def extract_features(
    pictures: PictureSet,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    state: Any = None,
) -> dict[str, torch.Tensor]:
    """Features of a set, in its order, float32 on the extractor's device, on every process.

    Args:
        pictures: of one size.
        extractor: see :class:`FeatureExtractor`.
        batch_size: pictures a call; part of what fixes the last bits.
        workers: decoding processes; None picks.
        state: accelerate's ``PartialState`` of a run on several processes, or None.

    Raises:
        ConfigError: unreadable pictures or several sizes; the message names the file.
    """
    rank, world = (0, 1) if state is None else (state.process_index, state.num_processes)
    starts = range(0, len(pictures), batch_size)
    batches = [range(start, min(start + batch_size, len(pictures))) for start in starts]
    own = list(range(rank, len(batches), world))
    workers = default_workers(extractor.device) if workers is None else workers
    first = read_picture(pictures.files[0])
    found = _run(pictures, extractor, [batches[k] for k in own], workers, first, quiet=rank != 0)
    if world > 1:
        from accelerate.utils import gather_object

        moved = {key: [part.cpu() for part in parts] for key, parts in found.items()}
        places = {k: (parts, i) for numbers, parts in gather_object([(own, moved)]) for i, k in enumerate(numbers)}
        ordered = [places[k] for k in range(len(batches))]
        found = {key: [parts[key][i].to(extractor.device) for parts, i in ordered] for key in ordered[0][0]}
    return {key: torch.cat(parts) for key, parts in found.items()}


def _run(
    pictures: PictureSet,
    extractor: FeatureExtractor,
    batches: Sequence[range],
    workers: int,
    first: torch.Tensor,
    *,
    quiet: bool,
) -> dict[str, list[torch.Tensor]]:
    on_gpu = extractor.device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        _Pictures(pictures.files, batches),
        batch_size=None,
        num_workers=min(workers, len(batches)),
        pin_memory=on_gpu,
        prefetch_factor=4 if workers and batches else None,
    )
    found: dict[str, list[torch.Tensor]] = {}
    bar = SimpleNamespace(_progress_bar_config={"disable": quiet or len(batches) < 2})
    for batch, images in zip(
        track(batches, f"features of {pictures.name}", bar, None, {}), _checked(loader), strict=True
    ):
        if images[0].shape != first.shape:
            raise ConfigError(_sizes_text(pictures.files[batch[0]], images[0], first))
        for key, value in extractor(images.to(extractor.device, non_blocking=on_gpu)).items():
            found.setdefault(key, []).append(value)
    return found


def _checked(loader: Any) -> Iterator[torch.Tensor]:
    for item in loader:
        if isinstance(item, str):
            raise ConfigError(item)
        yield item
