"""A small judge: names the emoji in a 64 x 64 picture, among all 1,386.

Self-contained (torch and safetensors only), so that it can be loaded by its path::

    spec = importlib.util.spec_from_file_location("emoji_classifier", folder / "classifier.py")
    emoji_classifier = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emoji_classifier)
    classifier = emoji_classifier.load_classifier(folder)
    logits = classifier.classify(pipe(prompts, ...).images)        # [n, 1386]
    accuracy = classifier.accuracy(images, prompts, k=5)

It was trained on augmented glyphs of the font and has never seen a generated picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

FILE_NAME = "classifier.safetensors"


class _Norm(nn.GroupNorm):
    """Layer norm over channels and positions: no running statistics to store or to go stale."""

    def __init__(self, channels: int):
        super().__init__(1, channels)


class _Block(nn.Module):
    """Residual block: depthwise 5 x 5, then a pointwise MLP of twice the width."""

    def __init__(self, channels: int):
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = _Norm(channels)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.contract = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.expand(self.norm(self.spatial(x)))
        return x + self.contract(nn.functional.gelu(hidden))


class EmojiClassifier(nn.Module):
    """Four stages of `_Block` at 32, 16, 8 and 4 pixels, mean pooling, two linears.

    Args: captions: the class names, in the order of the logits.
    """

    widths, depths, embedding_width = (32, 48, 80, 96), (1, 2, 2, 1), 64

    def __init__(self, captions: Sequence[str]):
        super().__init__()
        self.captions = list(captions)
        layers: list[nn.Module] = [nn.Conv2d(3, self.widths[0], 3, stride=2, padding=1)]
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            if stage > 0:
                previous = self.widths[stage - 1]
                layers += [_Norm(previous), nn.Conv2d(previous, width, 2, stride=2)]
            layers += [_Block(width) for _ in range(depth)]
        self.features = nn.Sequential(*layers, _Norm(self.widths[-1]))
        self.embed = nn.Linear(self.widths[-1], self.embedding_width)
        self.head = nn.Linear(self.embedding_width, len(self.captions))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """[n, 3, 64, 64] float in [-1, 1] to logits [n, classes]."""
        return self.head(nn.functional.gelu(self._embedding(pictures)))

    def _embedding(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.embed(self.features(pictures).mean((2, 3)))

    @torch.no_grad()
    def classify(self, images, batch_size: int = 128) -> torch.Tensor:
        """Logits [n, classes] fp32, on the CPU.

        Args: images: what a pipeline returns: a list of PIL pictures, an [n, 64, 64, 3] array in
              [0, 1] or uint8, or an [n, 3, 64, 64] tensor in [0, 1].
        """
        return self._in_batches(self, images, batch_size)

    @torch.no_grad()
    def embeddings(self, images, batch_size: int = 128) -> torch.Tensor:
        """What the last linear but one makes of the pictures, to compare distributions by: [n, 64] fp32, on the CPU."""
        return self._in_batches(self._embedding, images, batch_size)

    def _in_batches(self, function, images, batch_size: int) -> torch.Tensor:
        weight = self.head.weight
        pictures = to_pictures(images)
        chunks = [function(chunk.to(weight.device, weight.dtype)).float().cpu() for chunk in pictures.split(batch_size)]
        return torch.cat(chunks)

    def names(self, images, k: int = 5) -> list[list[str]]:
        """The k most likely captions of each picture, best first."""
        best = self.classify(images).topk(k, dim=1).indices
        return [[self.captions[index] for index in row] for row in best.tolist()]

    def accuracy(self, images, prompts: Sequence[str], k: int = 1) -> float:
        """The share of pictures whose prompt is among the classifier's first k names."""
        found = [prompt in row for prompt, row in zip(prompts, self.names(images, k), strict=True)]
        return sum(found) / len(found)


def to_pictures(images) -> torch.Tensor:
    """PIL pictures, arrays or tensors (see `EmojiClassifier.classify`) to [n, 3, h, w] in [-1, 1]."""
    if isinstance(images, torch.Tensor):
        return images.float() * 2 - 1
    array = np.stack([np.asarray(image) for image in images])
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    return torch.from_numpy(array).float().permute(0, 3, 1, 2) / scale * 2 - 1


def glyph_boxes(images, threshold: float = 0.06) -> torch.Tensor:
    """Where the emoji stands on its white ground.

    Args:    images: as in `EmojiClassifier.classify`. threshold: least darkness, in [0, 1], of any
             colour channel that counts as ink.
    Returns: [n, 4] int64: left, top, right, bottom, the last two exclusive; zeros if all is white.
    """
    ink = ((1 - to_pictures(images)) / 2).amax(dim=1) > threshold
    boxes = []
    for picture in ink:
        rows, columns = picture.any(1).nonzero().flatten(), picture.any(0).nonzero().flatten()
        if len(rows) == 0:
            boxes.append([0, 0, 0, 0])
        else:
            boxes.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
    return torch.tensor(boxes)


def save_classifier(model: EmojiClassifier, folder: Path) -> Path:
    """Write `classifier.safetensors`: fp16 weights, with the captions in its metadata."""
    path = Path(folder) / FILE_NAME
    state = {name: value.half().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, path, metadata={"captions": json.dumps(model.captions)})
    return path


def load_classifier(folder: Path | str = Path(__file__).parent) -> EmojiClassifier:
    """The trained classifier of a folder: fp32, on the CPU, in eval mode."""
    with safe_open(Path(folder) / FILE_NAME, framework="pt") as file:
        captions = json.loads(file.metadata()["captions"])
        state = {name: file.get_tensor(name).float() for name in file.keys()}
    model = EmojiClassifier(captions)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def classify(images, folder: Path | str = Path(__file__).parent) -> torch.Tensor:
    """Logits [n, 1386] of the classifier that lies in ``folder``; see `EmojiClassifier.classify`."""
    return load_classifier(folder).classify(images)
