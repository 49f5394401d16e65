"""Rotating the residual stream inside a model's weights, which are rounded afterwards: at random, or as was learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.engine import calibrating, memory_explained, sample_weights
from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.calibration.work_folder import FinishedBlocks
from diffuse_compress.calls import NO_AUTOCAST, autocast_as
from diffuse_compress.integrations.doors import untie_head
from diffuse_compress.plan import ComponentPlan
from diffuse_compress.progress import Callback, bar
from diffuse_compress.quantization.algorithms.base import steps_of
from diffuse_compress.quantization.algorithms.spinquant import RotationLearner, SpinQuantConfig
from diffuse_compress.quantization.residual import Rotations, hadamard_rotations, rotate_residual
from diffuse_compress.transaction import Transaction

__all__ = ["rotate"]

_STATE = "rotations"
_SEED = "residual stream"
_SAVED_EVERY = 10  # steps


def rotate(
    target: Any,
    model: nn.Module,
    part: ComponentPlan,
    spill: Transaction,
    calibration: Calibration | None,
    finished: FinishedBlocks | None,
    device: torch.device | str | None,
    callback: Callback | None,
) -> None:
    """Rotate the residual stream of ``part``, in place; what changes is spilled before.

    Raises:
        ConfigError: rotations are to be learned by the loss of tokens, and the samples have none.
        ModelStateError: memory runs out.
    """
    stream = part.residual
    assert stream is not None
    spill.on_rollback(untie_head(model, stream.head, stream.embedding))
    config = next((step for step in steps_of(part.spec.algorithm) if isinstance(step, SpinQuantConfig)), None)
    rotations = None
    if config is not None:
        assert calibration is not None  # it needs one, which was checked
        rotations = _learned(target, model, part, config, calibration, finished, device, callback)
    kept = 0
    with bar(f"Rotating {part.class_name}", stream.num_parameters(model), target, callback) as advance:

        def keep(parameter: nn.Parameter) -> None:
            nonlocal kept
            spill.keep(parameter)
            kept += 1
            advance(kept, {"component": part.name})

        rotate_residual(model, stream, part.spec.generator(_SEED), keep, rotations)


def _learned(
    target: Any,
    model: nn.Module,
    part: ComponentPlan,
    config: SpinQuantConfig,
    calibration: Calibration,
    finished: FinishedBlocks | None,
    device: torch.device | str | None,
    callback: Callback | None,
) -> Rotations:
    """The rotations of ``part``; what a run with the same ``work_dir`` has learned already is gone on from."""
    assert part.residual is not None
    samples = calibration.of(part.name, part.compute_dtype)
    there = torch.device(device) if device is not None else next(model.parameters()).device
    generator = part.spec.generator(_SEED)
    start = hadamard_rotations(part.residual, generator)

    def load() -> tuple[int, Rotations] | None:
        found = None if finished is None else finished.load_state(_STATE)
        if found is None:
            return None
        return int(found["step"]), start.of([found[str(index)] for index in range(len(start.matrices))])

    def save(step: int, rotations: Rotations) -> None:
        if finished is not None and (step % _SAVED_EVERY == 0 or step == config.iterations):
            matrices = {str(index): matrix for index, matrix in enumerate(rotations.matrices)}
            finished.save_state(_STATE, {"step": torch.tensor(step), **matrices})

    with (
        bar(f"Learning rotations of {part.class_name}", config.iterations, target, callback) as advance,
        calibrating(model),
        memory_explained(there, len(samples)),
        autocast_as(NO_AUTOCAST),
    ):
        learner = RotationLearner(model, part.residual, part.own_layers, config, there)
        return learner.learn(
            start,
            [sample.call for sample in samples],
            sample_weights(samples, model),
            generator,
            load=load,
            save=save,
            advance=lambda step, metrics: advance(step, {"component": part.name, **metrics}),
        )
