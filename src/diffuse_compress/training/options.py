"""How a training is run, beside what ``QVGenConfig`` says of what is learned: checkpoints, logs, validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffuse_compress.errors import ConfigError

__all__ = ["LOSSES", "LR_SCHEDULERS", "TEACHERS", "TrainerOptions"]

_COUNTS = ("spectrum_steps", "lr_num_cycles")
TEACHERS = ("copy", "cached")
LOSSES = ("mse", "kl")
LR_SCHEDULERS = ("cosine", "cosine_with_restarts", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """Options of ``QATTrainer``, under the names that diffusers' training scripts have.

    Args:
        output_dir: for checkpoints, logs and validation; None writes nothing.
        checkpointing_steps: optimizer steps between two checkpoints; None makes none.
        checkpoints_total_limit: checkpoints that are kept, the newest.
        resume_from_checkpoint: "latest", or the folder of one.
        report_to: trackers of accelerate: "tensorboard", "wandb", ..., "all", a GeneralTracker of the caller's, or a
            list.
        tracker_name: of the run.
        tracker_settings: of its tracker, by the tracker's name.
        log_every: steps between two logs.
        spectrum_steps: singular values of the branches are kept at the first step and every so many
            (``TrainingResult.spectra``); trackers get the mean largest and the share of small ones. None keeps none.
        lr_scheduler: "cosine" to 0, "constant", "linear" to 0, or "cosine_with_restarts"; each after the warm-up.
        lr_num_cycles: of the last.
        teacher: "copy", a frozen dense copy beside the student; "cached", its outputs for inputs that never change.
        loss: "mse", or "kl" of two language models' next tokens.
        optimizer_8bit: moments in 8 bits: by bitsandbytes on a GPU where it is installed, else by torchao.
        held_out: items that are not trained on, whose loss with and without the branch is logged.
        validation_steps: steps between two validations; None makes none but at the end.
        validation_prompts: prompts, or dicts of the call's arguments, generated in each with the branch and without it.
        validation_arguments: of these calls: num_inference_steps, height, ...

    Raises:
        ConfigError: a value that is none of these.
    """

    output_dir: str | Path | None = None
    checkpointing_steps: int | None = None
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | Path | None = None
    report_to: Any = None
    tracker_name: str = "diffuse-compress-train"
    tracker_settings: Mapping[str, Any] = field(default_factory=dict)
    log_every: int = 1
    spectrum_steps: int | None = None
    lr_scheduler: str = "cosine"
    lr_num_cycles: int = 1
    teacher: str = "copy"
    loss: str = "mse"
    optimizer_8bit: bool = False
    held_out: int = 0
    validation_steps: int | None = None
    validation_prompts: tuple[Any, ...] = ()
    validation_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("checkpointing_steps", "checkpoints_total_limit", "validation_steps", "log_every", *_COUNTS):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"training: {name} must be an integer of at least 1, got {value!r}.")
        if not isinstance(self.held_out, int) or self.held_out < 0:
            raise ConfigError(f"training: held_out must be a number of items, got {self.held_out!r}.")
        for name, known in (("teacher", TEACHERS), ("loss", LOSSES), ("lr_scheduler", LR_SCHEDULERS)):
            if getattr(self, name) not in known:
                choices = " or ".join(repr(each) for each in known)
                raise ConfigError(f"training: {name} must be {choices}, got {getattr(self, name)!r}.")
        needing = self.checkpointing_steps is not None or self.resume_from_checkpoint is not None
        if self.output_dir is None and (needing or self.report_to):
            raise ConfigError("training: checkpoints and trackers need output_dir=.")
        object.__setattr__(self, "validation_prompts", tuple(self.validation_prompts))
