"""How far the student is from its teacher."""

from __future__ import annotations

from typing import Any

import torch

from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.training.batches import Batch, sample_of

__all__ = ["distance", "has_task", "output_of", "predicted", "task_loss"]

_IGNORED = -100  # of cross_entropy


def output_of(output: Any) -> torch.Tensor:
    """The tensor in what a model returns: its prediction, or logits.

    Raises:
        ModelStateError: there is none.
    """
    found = output
    for name in ("sample", "logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    if isinstance(output, list | tuple) and output:
        found = output[0]
    if not isinstance(found, torch.Tensor):
        raise ModelStateError(
            f"training: no tensor in the {type(output).__name__} that the model returns. Pass forward=, a function of "
            "(model, batch) that returns the one to be learned."
        )
    return found


def predicted(output: Any, batch: Batch) -> torch.Tensor:
    """What a sampler is given of a model's output: without a variance beside it (PixArt's and DiT's second half)."""
    found, sample = output_of(output), sample_of(batch.call)
    if sample is not None and sample.is_floating_point() and found.ndim == sample.ndim > 3:
        if found.shape[1] == 2 * sample.shape[1] and found.shape[2:] == sample.shape[2:]:
            return found[:, : sample.shape[1]]
    return found


def distance(student: torch.Tensor, teacher: torch.Tensor, batch: Batch, kind: str = "mse") -> torch.Tensor:
    """Mean over the rows of the weighted error, a scalar in float32.

    Args:
        student: output [rows, ...]; of language models logits [rows, tokens, vocabulary], of which padding (0 in a 2-d
            ``attention_mask``) does not count.
        teacher: its like.
        batch: that they are for.
        kind: "mse", or "kl", the divergence of the student's next token from the teacher's.

    Raises:
        ModelStateError: they are of different shapes.
    """
    student, teacher = student.float(), teacher.float()
    if student.shape != teacher.shape:
        raise ModelStateError(
            f"training: what is learned has the shape {tuple(teacher.shape)}, and the model's output "
            f"{tuple(student.shape)}. Give data of this model, or loss=."
        )
    if kind == "kl":
        error = torch.nn.functional.kl_div(
            student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1, keepdim=True)
    else:
        error = (student - teacher).square()
    weight = batch.weight.to(error.device, torch.float32)
    mask = batch.call.kwargs.get("attention_mask")
    sample = sample_of(batch.call)
    of_tokens = sample is not None and not sample.is_floating_point() and error.ndim == 3
    if of_tokens and isinstance(mask, torch.Tensor) and mask.shape == error.shape[:2]:
        shown = mask.to(error.device, torch.float32)
        per_row = (error.mean(-1) * shown).sum(1) / shown.sum(1).clamp_min(1)
    elif error.ndim == 0 or len(error) != len(weight):
        return error.mean()
    else:
        per_row = error.flatten(1).mean(1) if error.ndim > 1 else error
    return (per_row * weight).mean()


def has_task(batch: Batch) -> bool:
    """Whether a batch says what is right, without a teacher: noised latents do, and texts, of their next tokens."""
    return batch.truth is not None or _tokens(batch) is not None


def task_loss(student: torch.Tensor, batch: Batch) -> torch.Tensor:
    """How far the student is from what the data say: :func:`distance` to ``batch.truth``, or of a language model the
    cross entropy of the next token, padding left out.

    Raises:
        ConfigError: the data do not say (:func:`has_task`).
    """
    if batch.truth is not None:
        return distance(student, batch.truth, batch)
    tokens = _tokens(batch)
    if tokens is None or student.ndim != 3:
        raise ConfigError(
            'training: method="lsq" learns what the data say, and these calls say nothing of their outputs. Give clips '
            'or pictures with captions, latents, or texts for a language model; or learn of the teacher: method="kd".'
        )
    wanted = tokens[:, 1:].to(student.device)
    mask = batch.call.kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == tokens.shape:
        wanted = wanted.masked_fill(mask[:, 1:].to(wanted.device) == 0, _IGNORED)
    return torch.nn.functional.cross_entropy(student[:, :-1].float().flatten(0, 1), wanted.flatten())


def _tokens(batch: Batch) -> torch.Tensor | None:
    found = batch.call.kwargs.get("input_ids", batch.call.args[0] if batch.call.args else None)
    is_text = isinstance(found, torch.Tensor) and found.ndim == 2 and not found.is_floating_point()
    return found if is_text else None
