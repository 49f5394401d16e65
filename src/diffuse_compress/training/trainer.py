"""The loop of quantization-aware training: a student that rounds learns from its dense teacher.

In every step both see the same calls of the model, made by ``batches.py`` of whatever the data are, and the student
learns to predict what the teacher does. No ground truth is needed, so any input will do; those of the pipeline's own
trajectories are what it will see. Everything random is a function of seed and step, so a training that goes on from a
checkpoint gives the losses, bit for bit, that it would have given.

Source: QVGen (Huang et al. 2025, arXiv 2505.11497, algorithm 1). Differs from its released code in the recipe: levels
of noise come from the pipeline's own scheduler with its shift; every sample of a batch has its own; quantizer
parameters do not decay; gradients are those of float32 masters; latents are encoded once; the teacher runs without
gradients; a failure raises, and leaves the model as it was.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.engine import calibration_blocks
from diffuse_compress.calibration.work_folder import digest_of_weights
from diffuse_compress.components import compute_dtype_of, is_pipeline, model_components
from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.logging import get_logger
from diffuse_compress.progress import Callback, bar
from diffuse_compress.training.batches import Batch, RecordedCalls, collated
from diffuse_compress.training.checkpoints import Checkpoint, find_checkpoint, load_checkpoint, save_checkpoint
from diffuse_compress.training.config import QVGenConfig, TrainingMethod
from diffuse_compress.training.loss import distance, has_task, output_of, predicted, task_loss
from diffuse_compress.training.optimization import (
    Average,
    clip_gradients,
    learning_rate_factor,
    make_optimizer,
    restored_state,
    set_learning_rates,
    stored_state,
    uncompiled_on_cpu,
)
from diffuse_compress.training.options import TrainerOptions
from diffuse_compress.training.order import BatchOrder, draw_generator
from diffuse_compress.training.prepare import Prepared, prepare
from diffuse_compress.training.processes import Team, gathered, placed, unshard
from diffuse_compress.training.setup import accelerated, cast_back, checkpoint_blocks, component_of, precision_of
from diffuse_compress.training.snapshot import Kept, keep, restored_on_failure
from diffuse_compress.training.sources import training_data
from diffuse_compress.training.validation import generated, held_out_loss, psnr, student_in
from diffuse_compress.versions import installed_versions

__all__ = ["QATTrainer", "TrainingResult"]

_logger = get_logger(__name__)
_STAGE = "Training"
_SMALL = 14
_LEAST_SCALE = 2.0**-8  # of losses in float16: that of the gradients is 2**16 at first
Forward = Callable[[nn.Module, Batch], Any]
"""``forward(model, batch)``: what is learned of the model's output."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training did.

    Attributes:
        steps: optimizer steps.
        losses: float64 [steps], of each.
        gradient_norms: float64 [steps], before they were clipped.
        validation: at each validation {"step", "kd_with_phi", "kd_without_phi", ...}.
        component: that was trained, "" for a bare model.
        spectra: {step: {layer: singular values of its branch, gates included}}, where ``spectrum_steps`` asks for them.
    """

    steps: int
    losses: torch.Tensor = field(repr=False)
    gradient_norms: torch.Tensor = field(repr=False)
    validation: Sequence[Mapping[str, float]] = ()
    component: str = ""
    spectra: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict, repr=False)

    def summary(self) -> str:
        """First and last losses, in a line."""
        first, last = (float(part.mean()) if len(part) else 0.0 for part in (self.losses[:10], self.losses[-10:]))
        return f"{self.component or 'model'}: {self.steps} steps, loss {first:.4g} at first and {last:.4g} at last"

    __str__ = summary


class QATTrainer:
    """Trains one model, in place; nothing is touched before :meth:`train`.

    Args:
        target: a diffusers pipeline, whose denoiser learns, or any model.
        config: of what is learned.
        data: see :func:`~diffuse_compress.training.sources.training_data`.
        options: of the run; their fields may be given by name instead.
        component: of a pipeline, if it has several denoisers.
        forward: ``forward(model, batch)``, the prediction that is learned; by default the tensor that the model returns
            (without the variance that some return beside it), or logits.
        loss: ``loss(student, teacher, batch)``, a scalar; by default that of ``options``. With ``method="lsq"``, which
            has no teacher, the second is ``batch.truth``.
        teacher: another dense model to learn from; or as in ``options``, by default a frozen copy.
        accelerator: accelerate's, of a run on several processes or with trackers of the caller's; one is made where
            a launcher has started several.
        callback: ``callback(stage, done, total, metrics)``; raising in it cancels and restores.

    Raises:
        ConfigError: options that exclude each other, or a component that is not there.
    """

    def __init__(
        self,
        target: Any,
        config: QVGenConfig,
        data: Any = None,
        *,
        options: TrainerOptions | None = None,
        component: str | None = None,
        forward: Forward | None = None,
        loss: Callable[[torch.Tensor, Any, Batch], torch.Tensor] | str | None = None,
        teacher: nn.Module | str | None = None,
        accelerator: Any = None,
        callback: Callback | None = None,
        **named: Any,
    ) -> None:
        self.target, self.config, self.callback = target, config, callback
        if isinstance(teacher, str):
            named["teacher"], teacher = teacher, None
        if isinstance(loss, str):
            named["loss"], loss = loss, None
        if options is not None and named:
            raise ConfigError(f"training: options= is complete: put {', '.join(named)} into it.")
        self.options = options or TrainerOptions(**named)
        self.component = component_of(target, component)
        self.model: nn.Module = model_components(target)[self.component]
        self._data_given, self._forward_given, self._loss = data, forward, loss
        self._teacher_given = teacher
        self._accelerator = accelerator
        self.prepared: Prepared | None = None
        self.result: TrainingResult | None = None
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._validation: list[dict[str, float]] = []
        self._spectra: dict[int, dict[str, torch.Tensor]] = {}

    # --- the verbs ------------------------------------------------------------------------------------------------

    def train(self) -> TrainingResult:
        """All steps that are left; the model is a student afterwards, whose layers round (:meth:`convert`).

        Raises:
            DiffuseCompressError: data, checkpoints or settings that do not fit; the model is as it was.
        """
        with restored_on_failure(self.model, self.options.output_dir) as spill:
            return self.train_within(keep(self.model, spill))

    def train_within(self, kept: Kept) -> TrainingResult:
        """:meth:`train` inside a transaction of the caller's, who has written the model down in it and restores it."""
        if self.prepared is not None:
            raise ModelStateError("training: this trainer has trained already. Make another one to go on.")
        if torch.is_inference_mode_enabled():
            raise ModelStateError("training: needs gradients, and torch.inference_mode() is on. Call it outside.")
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with (
            accelerated(self.options, self._accelerator, self.config) as accelerator,
            torch.random.fork_rng(devices=list(devices)),
            torch.enable_grad(),
        ):
            self._team = Team(accelerator)
            self._accelerator = accelerator
            try:
                self._begin()
                self._loop()
                self._finish()
            except BaseException:
                self.prepared = None
                raise
            kept.put_back_flags()
        self.result = TrainingResult(
            len(self._losses),
            torch.tensor(self._losses, dtype=torch.float64),
            torch.tensor(self._norms, dtype=torch.float64),
            tuple(self._validation),
            self.component,
            dict(self._spectra),
        )
        _logger.info("%s", self.result)
        return self.result

    def convert(self) -> nn.Module:
        """The trained layers as the deployed ones, in the model's own dtypes; returns the model.

        Raises:
            ModelStateError: before :meth:`train`.
        """
        if self.prepared is None or self.result is None:
            raise ModelStateError("training: train() comes before convert().")
        self.prepared.convert()
        cast_back(self.model, self._dtypes, self._dtype)
        return self.model

    # --- preparation ----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        config, team = self.config, self._team
        self._dtype = compute_dtype_of(self.model)
        self._device = next(self.model.parameters()).device
        if self._accelerator is not None and team.count > 1:
            self._device = self._accelerator.device
            self.model.to(self._device)
        self.data = training_data(
            self.target,
            self.component,
            self._data_given,
            space=config.loss_space.value,
            seed=config.seed,
            folder=self._data_folder(),
            callback=self.callback,
        )
        self._dtypes = {name: p.dtype for name, p in self.model.named_parameters()}
        self._precision = precision_of(config.mixed_precision, self._dtype, self._accelerator)
        self._fingerprint = self._described()
        self._split()
        self.teacher = self._make_teacher()
        self._references: list[torch.Tensor] | None = None
        if self.options.validation_prompts and is_pipeline(self.target):
            self._references = self._generate()
        if self._precision is not None:
            for parameter in self.model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.float()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.prepared = prepare(self.model, config, total_steps=config.max_train_steps)
        if config.gradient_checkpointing:
            checkpoint_blocks(self.model)
        groups = list(self.prepared.parameter_groups(config))
        self._parameters = [p for group in groups for p in group["params"]]
        self._team.same(self._parameters)  # once: factors of a decomposition may come with other signs elsewhere
        if team.shards:
            groups = self._shard(groups)
        self.optimizer = make_optimizer(groups, betas=config.betas, eps=config.eps, in_8bit=self.options.optimizer_8bit)
        self.average = self._averaged()
        self._scaler = torch.amp.GradScaler(self._device.type) if self._precision is torch.float16 else None
        self._resume()

    def _data_folder(self) -> Path | None:
        """For latents; of several processes each keeps its own in memory, and the command encodes before them."""
        folder = self.options.output_dir
        return None if folder is None or self._team.count > 1 else Path(folder) / "data"

    def _split(self) -> None:
        """Items that are trained on, and those that are held out."""
        held = self.options.held_out
        if held >= len(self.data):
            raise ConfigError(f"training: held_out={held} leaves none of {len(self.data)} items to train on.")
        order = torch.randperm(len(self.data), generator=draw_generator(self.config.seed, -1)).tolist()
        self._held_out, self._items = order[:held], sorted(order[held:])
        size = self.config.train_batch_size * self._team.count
        signatures = [self.data.signature(index) if size > 1 else "" for index in self._items]
        self._order = BatchOrder(signatures, size, self.config.seed)

    def _make_teacher(self) -> nn.Module | None:
        """The frozen dense model; None where its outputs are known, or the data say what is right."""
        if self.config.method is TrainingMethod.LSQ:
            if self._teacher_given is not None:
                raise ConfigError('training: method="lsq" has no teacher; leave teacher= out, or take method="kd".')
            first = self.data.draw(0, draw_generator(0, 0))
            if self._loss is None and not has_task(first):
                task_loss(torch.empty(0), first)  # raises, saying what to give
            return None
        if self._teacher_given is not None:
            return self._teacher_given.requires_grad_(False).eval().to(self._device)
        if self.options.teacher == "cached":
            if not isinstance(self.data, RecordedCalls):
                raise ConfigError(
                    'training: teacher="cached" keeps outputs for inputs that never change, and latents get other '
                    'noise at every draw. Use teacher="copy", or record_calls(pipe, prompts).'
                )
            if self.data.target(0) is None:
                targets = []
                with torch.no_grad():
                    for index in range(len(self.data)):
                        batch = self.data.draw(index, draw_generator(0, 0)).to(self._device)
                        targets.append(self._predict(self.model, batch).cpu())
                self.data = self.data.with_targets(targets)
            return None
        return copy.deepcopy(self.model).requires_grad_(False).eval()

    def _shard(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Shard the model's own weights; returns the groups with what stands for them."""
        assert self.prepared is not None
        names = {id(p): name for name, p in self.model.named_parameters()}
        layers = self.prepared.layers
        whole = [
            p for x in layers.values() for n, p in x.named_parameters(recurse=False) if n not in ("weight", "bias")
        ]
        places = calibration_blocks(self.model, list(layers))
        self._team.shard(self.model, [self.model.get_submodule(n) for n in places if n not in layers], whole)
        now = dict(self.model.named_parameters())
        groups = [{**group, "params": [now[names[id(p)]] for p in group["params"]]} for group in groups]
        self._parameters = [p for group in groups for p in group["params"]]
        return groups

    def _averaged(self) -> Average | None:
        """Of what is left at the end: the factors of a branch that leaves turn with every phase."""
        if self.config.ema_decay is None:
            return None
        chosen = {id(p) for p in self._parameters}
        named = {name: p for name, p in self.model.named_parameters() if id(p) in chosen}
        if self.config.decay:
            named = {name: p for name, p in named.items() if not name.rpartition(".")[2].startswith("phi_")}
        return Average(named, self.config.ema_decay)

    def _described(self) -> dict[str, Any]:
        return {
            "weights": digest_of_weights(self.model),
            "training": self.config.to_dict(),
            "data": {**self.data.describe(), "content": self.data.fingerprint()},
            "held_out": self.options.held_out,
            "processes": self._team.count,
            "loss": self.options.loss if self._loss is None else "given",
            "precision": str(self._precision),
            "adam": "8 bits" if self.options.optimizer_8bit else "32 bits",
            "torch": installed_versions().get("torch"),
        }

    # --- the loop -------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        total = self.config.max_train_steps
        with bar(_STAGE, total, self.target, self.callback) as advance:
            advance(len(self._losses), {}) if self._losses else None
            for step in range(len(self._losses), total):
                metrics = self._step(step)
                self._losses.append(metrics["loss"])
                self._norms.append(metrics["grad_norm"])
                done = step + 1
                every = self.options.validation_steps
                if every is not None and done % every == 0 and done < total:
                    metrics |= self._validate(done)
                if self._notes_spectrum(done):
                    metrics |= self._note_spectrum(done)
                if self._accelerator is not None and (done % self.options.log_every == 0 or done == total):
                    self._accelerator.log(metrics, step=done)
                saves = self.options.checkpointing_steps
                if saves is not None and (done % saves == 0 or done == total):
                    self._save(done)
                advance(done, metrics)

    def _step(self, step: int) -> dict[str, float]:
        """One step of the optimizer."""
        config, prepared = self.config, self.prepared
        assert prepared is not None
        factor = learning_rate_factor(
            step, config.max_train_steps, config.warmup_fraction, self.options.lr_scheduler, self.options.lr_num_cycles
        )
        set_learning_rates(self.optimizer, factor)
        prepared.before_step(step, self.optimizer)
        passes, losses = config.gradient_accumulation_steps, []
        for number in range(step * passes, (step + 1) * passes):
            batch = self._batch(number)
            torch.manual_seed(config.seed + number * self._team.count + self._team.index)  # of models that draw
            loss = self._loss_of(batch)
            if not bool(torch.isfinite(loss)) and self._scaler is None:
                found = float(loss.detach())
                raise ModelStateError(
                    f"training: the loss of step {step} is {found}. Lower the learning_rate, or train in "
                    'mixed_precision="bf16".'
                )
            scaled = loss / passes
            (scaled if self._scaler is None else self._scaler.scale(scaled)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        self._team.average_gradients(self._parameters)
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        norm = clip_gradients(self._parameters, config.max_grad_norm)
        with uncompiled_on_cpu(self._device):
            self.optimizer.step() if self._scaler is None else self._scaler.step(self.optimizer)
        if self._scaler is not None:
            self._scaler.update()
            if self._scaler.get_scale() < _LEAST_SCALE:
                raise ModelStateError(
                    f"training: gradients of step {step} overflow in float16 whatever they are scaled by. Lower the "
                    'learning_rate, or train in mixed_precision="bf16".'
                )
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        found = self._team.mean(torch.stack(losses).mean().double())
        return {
            "loss": float(found),
            "grad_norm": float(norm),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "rank": _rank(prepared),
            "gate": _gate(prepared),
        }

    def _notes_spectrum(self, done: int) -> bool:
        every = self.options.spectrum_steps
        return every is not None and (done == 1 or done % every == 0)

    def _note_spectrum(self, done: int) -> dict[str, float]:
        """Keep the singular values of all branches; of them for trackers the mean largest, and the share of small ones
        (at least 14 times below their layer's largest, as figure 4 of the paper counts)."""
        assert self.prepared is not None
        found = {name: values.cpu() for name, values in self.prepared.spectrum().items() if len(values)}
        if not found:
            return {}
        self._spectra[done] = found
        small = torch.cat([values < values[0] / _SMALL for values in found.values()])
        largest = torch.stack([values[0] for values in found.values()])
        return {"sigma_largest": float(largest.mean()), "sigma_small_share": float(small.float().mean())}

    def _batch(self, number: int) -> Batch:
        """This process's share of the ``number``-th batch."""
        size, index = self.config.train_batch_size, self._team.index
        chosen = self._order(number)[index * size : (index + 1) * size]
        first = number * self._order.size + index * size
        drawn = [
            self.data.draw(self._items[place], draw_generator(self.config.seed, first + slot))
            for slot, place in enumerate(chosen)
        ]
        return collated(drawn).to(self._device)

    def _loss_of(self, batch: Batch) -> torch.Tensor:
        if self.config.method is TrainingMethod.LSQ:
            with self._autocast():
                student = self._predict(self.model, batch)
            return task_loss(student, batch) if self._loss is None else self._loss(student, batch.truth, batch)
        target = batch.target
        if self.teacher is not None:
            with torch.no_grad():
                target = self._predict(self.teacher, batch)
        assert target is not None
        with self._autocast():
            student = self._predict(self.model, batch)
        if self._loss is not None:
            return self._loss(student, target, batch)
        return distance(student, target, batch, self.options.loss)

    def _predict(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        if self._forward_given is not None:
            return output_of(self._forward_given(model, batch))
        return predicted(batch.call.run(model), batch)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._precision)

    def _finish(self) -> None:
        assert self.prepared is not None
        self.prepared.before_step(self.config.max_train_steps, self.optimizer)
        if self.average is not None:
            self.average.copy_to()
        if self._team.shards:
            unshard(self.model)
        found = self._validate(self.config.max_train_steps)
        if self._accelerator is not None and found:
            self._accelerator.log(found, step=self.config.max_train_steps)

    # --- validation -----------------------------------------------------------------------------------------------

    def _validate(self, step: int) -> dict[str, float]:
        """Losses and clips with the branch and without it."""
        assert self.prepared is not None
        found: dict[str, float] = {}
        kind = "task" if self.config.method is TrainingMethod.LSQ else "kd"
        average = self.average if step < self.config.max_train_steps else None
        if average is not None:
            average.exchange()
        try:
            for name, enabled in (("with_phi", True), ("without_phi", False)):
                with self.prepared.phi(enabled):
                    if self._held_out:
                        with torch.no_grad():
                            value = held_out_loss(
                                lambda batch: self._loss_of(batch.to(self._device)),
                                self.data,
                                self._held_out,
                                self.config.seed,
                            )
                        found[f"{kind}_{name}"] = float(value)
                    if self._references is not None:
                        clips = self._generate(self.model, name, step)
                        values = [psnr(clip, ref) for clip, ref in zip(clips, self._references, strict=True)]
                        found[f"psnr_{name}"] = sum(values) / len(values)
        finally:
            if average is not None:
                average.exchange()
        if found:
            self._validation.append({"step": step, **found})
        return found

    def _generate(self, model: nn.Module | None = None, name: str = "teacher", step: int = 0) -> list[torch.Tensor]:
        options, pipe, seed = self.options, self.target, self.config.seed
        places: list[Path] | None = None
        if options.output_dir is not None and self._team.is_first and getattr(pipe, "vae", None) is not None:
            folder = Path(options.output_dir) / "validation" / f"step-{step}"
            places = [folder / f"{index}-{name}" for index in range(len(options.validation_prompts))]
        with student_in(pipe, self.component, model or self.model), self._autocast_if(model):
            return generated(pipe, options.validation_prompts, options.validation_arguments, seed, places)

    def _autocast_if(self, model: nn.Module | None) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if model is None else self._autocast()

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self, step: int) -> None:
        assert self.prepared is not None
        assert self.options.output_dir is not None
        state = self.optimizer.state
        content: dict[str, Any] = {
            "model": gathered(self.model.state_dict()),
            "layers": self.prepared.state_dict(),
            "optimizer": [stored_state(gathered(dict(state.get(p, {})))) for p in self._in_groups()],
            "losses": self._losses,
            "gradient_norms": self._norms,
            "validation": self._validation,
            "spectra": {str(step): values for step, values in self._spectra.items()},
            "average": None if self.average is None else gathered(self.average.values),
            "average_steps": 0 if self.average is None else self.average.steps,
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }
        if self._team.is_first:
            checkpoint = Checkpoint(step, self._fingerprint, content)
            save_checkpoint(Path(self.options.output_dir), checkpoint, self.options.checkpoints_total_limit)
        self._team.wait()

    def _in_groups(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _resume(self) -> None:
        asked = self.options.resume_from_checkpoint
        if asked is None or self.options.output_dir is None:
            return
        path = find_checkpoint(Path(self.options.output_dir), asked)
        if path is None:
            _logger.info("%s holds no checkpoint yet: training from the start", self.options.output_dir)
            return
        found = load_checkpoint(path, self._fingerprint)
        content = found.content
        assert self.prepared is not None
        self.prepared.load_state_dict(content["layers"])
        self.model.load_state_dict(placed(content["model"], self.model.state_dict()))
        for parameter, values in zip(self._in_groups(), content["optimizer"], strict=True):
            if values:
                self.optimizer.state[parameter] = restored_state(values, parameter)
        if self.average is not None:
            self.average.values = placed(content["average"], self.average.values)
            self.average.steps = int(content["average_steps"])
        if self._scaler is not None:
            self._scaler.load_state_dict(content["scaler"])
        self._losses, self._norms = list(content["losses"]), list(content["gradient_norms"])
        self._validation = list(content["validation"])
        self._spectra = {int(step): dict(values) for step, values in content["spectra"].items()}
        _logger.info("Training goes on from %s", path)


def _rank(prepared: Prepared) -> int:
    return max((layer.rank for layer in prepared.layers.values()), default=0)


def _gate(prepared: Prepared) -> float:
    """Factor of the components that are leaving; 1 where none is, 0 without a branch."""
    values = [
        float(layer.gate[layer.rank - 1]) for layer in prepared.layers.values() if layer.rank and layer.gate is not None
    ]
    return values[0] if values else 0.0
