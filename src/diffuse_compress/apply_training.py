"""Quantization-aware training as ``compress`` does it, and what a trained model carries once it is converted."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from diffuse_compress.components import compute_dtype_of, model_components, resolve_names, unwrap
from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.component import ComponentState, layer_entries
from diffuse_compress.integrations.doors import marks_of
from diffuse_compress.integrations.origin import repository_of
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.plan import CompressionPlan
from diffuse_compress.progress import Callback
from diffuse_compress.training.config import QVGenConfig
from diffuse_compress.training.options import TrainerOptions
from diffuse_compress.training.prepare import Prepared, planned_spec
from diffuse_compress.training.snapshot import Kept, keep, restored_on_failure
from diffuse_compress.training.trainer import QATTrainer

__all__ = ["deploy", "mark_trained", "train_models", "training_among"]


def deploy(prepared: Prepared, *, drop_phi: bool = False) -> nn.Module:
    """Convert a trained model and mark it as ``compress`` does: ``save_pretrained`` writes packed weights, and plain
    ``from_pretrained`` reads them.

    Args:
        prepared: of a diffusers or transformers model.
        drop_phi: as in :meth:`Prepared.convert`.

    Raises:
        ConfigError: the model is of neither library; nothing is converted then.
        ModelStateError: a branch has not left yet.
    """
    marks_of(unwrap(prepared.model))  # raises before anything is converted
    prepared.convert(drop_phi=drop_phi)
    mark_trained(prepared)
    return prepared.model


def mark_trained(prepared: Prepared) -> None:
    """Mark a model whose trained layers are converted."""
    root = unwrap(prepared.model)
    mark, _ = marks_of(root)
    config = QuantizationConfig.from_spec(prepared.spec, compute_dtype_of(root))
    mark(root, ComponentState(config, layer_entries(root), base_model=repository_of(root)))


def train_models(
    target: Any,
    plan: CompressionPlan,
    configs: Mapping[str, QVGenConfig],
    data: Any,
    work_dir: str | Path | None = None,
    callback: Callback | None = None,
    *,
    options: TrainerOptions | None = None,
) -> None:
    """Train these models one after the other, and deploy them; if one fails, all are as they were.

    Args:
        target: a pipeline or model.
        plan: whose components are trained; others are what they are to be already.
        configs: of each training, by component; "" for a bare model.
        data: see ``training_data``; of several experts each draws its own.
        work_dir: for checkpoints, one folder for each component; a training that was stopped goes on from there.
        options: of the run; by default none but checkpoints every tenth of the training.
        callback: of progress.

    Raises:
        DiffuseCompressError: see :class:`QATTrainer`.
    """
    models = model_components(target)
    configs = {name: config for name, config in configs.items() if name in plan.components}
    kept: dict[str, Kept] = {}
    with contextlib.ExitStack() as stack:
        for name in configs:
            _, unmark = marks_of(models[name])
            spill = stack.enter_context(restored_on_failure(models[name], work_dir))
            kept[name] = keep(models[name], spill)
            spill.on_rollback(functools.partial(unmark, models[name]))
        for name, config in configs.items():
            own = options or _default_options(config, work_dir, name)
            trainer = QATTrainer(target, config, data, component=name, options=own, callback=callback)
            trainer.train_within(kept[name])
            trainer.convert()
            assert trainer.prepared is not None
            mark_trained(trainer.prepared)


def training_among(
    target: Any, methods: Sequence[Any], data: Any = None
) -> tuple[tuple[Any, ...], dict[str, QVGenConfig]]:
    """(``methods`` with the formats that a training leads to in its place, {component: training asked for}).

    Raises:
        ConfigError: a training beside other methods, ``data`` without a training, or one that no layer of the model
            would take part in.
    """
    given = methods[0] if len(methods) == 1 and isinstance(methods[0], Mapping) else {"denoisers": None}
    alone = methods[0] if len(methods) == 1 and isinstance(methods[0], QVGenConfig) else None
    asked = {key: alone or value for key, value in given.items()}
    trained = {key: config for key, config in asked.items() if isinstance(config, QVGenConfig)}
    if not trained:
        if any(isinstance(method, QVGenConfig) for method in methods):
            raise ConfigError(
                "compress: QVGenConfig trains by itself; call compress with it first, and with the other methods after."
            )
        if data is not None:
            raise ConfigError(
                "compress: data= is of a training: compress(QVGenConfig(...), data=...). Others calibrate."
            )
        return tuple(methods), {}
    if any(value is not None and key not in trained for key, value in asked.items()):
        raise ConfigError("compress: a training is a call of its own: compress the other components after it.")
    names = resolve_names(list(trained), target)
    configs = {name: config for key, config in trained.items() for name in names[key]}
    models = model_components(target)
    planned = {
        name: QuantizationConfig.from_spec(planned_spec(models[name], config), compute_dtype_of(models[name]))
        for name, config in configs.items()
    }
    return (planned,), configs


def _default_options(config: QVGenConfig, work_dir: str | Path | None, name: str) -> TrainerOptions:
    if work_dir is None:
        return TrainerOptions()
    return TrainerOptions(
        output_dir=Path(work_dir) / (name or "model"),
        checkpointing_steps=max(1, config.max_train_steps // 10),
        checkpoints_total_limit=2,
        resume_from_checkpoint="latest",
    )
