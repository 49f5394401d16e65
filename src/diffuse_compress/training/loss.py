"""How far the student is from its teacher."""

from __future__ import annotations

from typing import Any

import torch

from diffuse_compress.errors import ModelStateError
from diffuse_compress.training.batches import Batch, sample_of

__all__ = ["distance", "output_of", "predicted"]


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
    """
    student, teacher = student.float(), teacher.float()
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
