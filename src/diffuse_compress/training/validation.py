"""What a training is worth so far: the loss on items that it does not see, and clips, with the branch and without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.pipeline_call import from_noise, outputs_of, picture_of, untouched
from diffuse_compress.training.batches import TrainingData
from diffuse_compress.training.order import draw_generator

__all__ = ["generated", "held_out_loss", "psnr", "student_in"]

_HELD_OUT_STREAM = 7_919
_LIMIT_DB = 100.0


@torch.no_grad()
def held_out_loss(
    loss: Callable[[Any], torch.Tensor], data: TrainingData, items: Sequence[int], seed: int
) -> torch.Tensor:
    """Mean of ``loss(batch)`` over items, whose noise is the same every time."""
    found = [
        loss(data.draw(index, draw_generator(seed + _HELD_OUT_STREAM, number))) for number, index in enumerate(items)
    ]
    return torch.stack(found).mean()


@contextlib.contextmanager
def student_in(pipe: Any, component: str, model: nn.Module) -> Iterator[None]:
    """Inside, the pipeline runs ``model`` as its ``component``, and leaves no trace of it."""
    with untouched(pipe):
        vars(pipe)[component] = model
        yield


def generated(
    pipe: Any, prompts: Sequence[Any], arguments: Mapping[str, Any], seed: int, places: Sequence[Path] | None = None
) -> list[torch.Tensor]:
    """Latents, float32 on the CPU, of what the pipeline makes of each prompt; item i from noise ``seed + i``. Where
    clips are written they are those that the VAE is given, in its own scale.

    Args:
        pipe: is called once for each prompt.
        prompts: or dicts of the call's arguments.
        arguments: of all calls.
        seed: of the noise.
        places: where to write pictures or clips, without suffix.
    """
    found = []
    for index, prompt in enumerate(prompts):
        given = {**arguments, **(dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt})}
        if places is None:
            output = pipe(**from_noise(pipe, given, seed + index))
            found.append(torch.as_tensor(outputs_of(output)).float().cpu())
            continue
        with _decoded_by(pipe.vae) as latents:
            output = pipe(**from_noise(pipe, {**given, "output_type": "pil"}, seed + index, decode=True))
        found.append(torch.cat(latents))
        _save(output, places[index])
    return found


@contextlib.contextmanager
def _decoded_by(vae: Any) -> Iterator[list[torch.Tensor]]:
    """What a VAE is given inside, float32 on the CPU."""
    stock, seen = vae.decode, list[torch.Tensor]()

    def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(latents.detach().float().cpu())
        return stock(latents, *args, **kwargs)

    vae.decode = decode
    try:
        yield seen
    finally:
        del vae.decode


def _save(output: Any, path: Path) -> None:
    """Write what a pipeline has made: a picture, or a clip as an animated one."""
    found = outputs_of(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = found[0] if found is not None and len(found) and isinstance(found[0], list) else None
    if frames:
        frames[0].save(path.with_suffix(".gif"), save_all=True, append_images=frames[1:], duration=100, loop=0)
        return
    picture = picture_of(output)
    if picture is not None:
        picture.save(path.with_suffix(".png"))


def psnr(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Of two tensors in decibels, by the range of the reference; at most 100."""
    error = float((found - reference).double().square().mean())
    peak = float(reference.max() - reference.min())
    if error == 0 or peak == 0:
        return _LIMIT_DB if error == 0 else 0.0
    return min(_LIMIT_DB, 10 * float(torch.log10(torch.tensor(peak**2 / error, dtype=torch.float64))))
