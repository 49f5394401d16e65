"""A cache schedule: which unit is computed and which is reused in which step of the sampling loop.

The table and what is needed to use it elsewhere: the units by name, the steps by their noise level, what each unit
costs, coefficients of a forecast. It is a value: nothing in it belongs to a model or a run. A file of a few kilobytes
holds it (``artefact.py``).
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch

from diffuse_compress.caching.units import MODEL_KIND, Unit
from diffuse_compress.errors import CheckpointError, ConfigError, DiffuseCompressWarning

__all__ = ["CachePoint", "Guidance", "Schedule", "noise_levels"]

_SCHEMA_VERSION = 1


class CachePoint(str, Enum):
    """What is kept of a unit.

    POST_GATE is what it adds to the streams: reusing it needs nothing of its block. PRE_GATE is a branch before its
    gates, as HarmoniCa (Huang et al. 2024, arXiv 2410.01723) has it: the gates of the current step are computed for it.
    """

    POST_GATE = "post_gate"
    PRE_GATE = "pre_gate"


class Guidance(str, Enum):
    """How a pipeline guides: both halves in one call, one call after the other, or a single call."""

    BATCHED = "batched"
    SEQUENTIAL = "sequential"
    NONE = "none or embedded"


@dataclass(frozen=True, eq=False)
class Schedule:
    """What to compute in each step.

    Attributes:
        units: K units in the order they run in.
        mask: uint8 [T, K] on the CPU, in the order of the sampling loop: 1 computes, 0 reuses. The first row is all 1.
        timesteps: float32 [T], as the scheduler had them.
        levels: float32 [T], noise levels in [0, 1] (:func:`noise_levels`), by which rows are mapped to other schedules.
        model: class name of the denoiser.
        scheduler: class name of the scheduler, "" if not known.
        guidance: how the pipeline guides, None if not known.
        cache_point: what is kept.
        cost_ms: float32 [K], time of a unit in one step, or None.
        other_ms: time of all else in one step.
        flops: float64 [K] of a unit in one step, or None.
        coefficients: float32 [T, K, H] or None: a unit that is reused in step t adds
            ``sum_h coefficients[t, k, h] * delta_h``, delta_0 being the latest that was computed; without them delta_0.
        input_coefficients: float32 [T, 1 + H] or None, where the one unit is the model: its output in a step that is
            left out has, beside that sum, ``input_coefficients[t, 0]`` times the sample of that step, and
            ``input_coefficients[t, 1 + h]`` times the sample that output h was computed from.
        details: anything else worth keeping; JSON-able.
    """

    units: tuple[Unit, ...]
    mask: torch.Tensor
    timesteps: torch.Tensor
    levels: torch.Tensor
    model: str
    scheduler: str = ""
    guidance: Guidance | None = None
    cache_point: CachePoint = CachePoint.POST_GATE
    cost_ms: torch.Tensor | None = None
    other_ms: float = 0.0
    flops: torch.Tensor | None = None
    coefficients: torch.Tensor | None = None
    input_coefficients: torch.Tensor | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache_point", CachePoint(self.cache_point))
        shape = (len(self.timesteps), len(self.units))
        if not self.units or self.mask.shape != shape or self.mask.dtype != torch.uint8:
            raise ConfigError(
                f"cache schedule: mask must be uint8 [steps, units] = {list(shape)} with at least one unit, got "
                f"{self.mask.dtype} {list(self.mask.shape)}."
            )
        if not bool((self.mask <= 1).all()) or not bool(self.mask[0].all()):
            raise ConfigError("cache schedule: mask holds 0 and 1, and its first row 1 only: nothing is cached yet.")
        if self.levels.shape != self.timesteps.shape:
            raise ConfigError(
                f"cache schedule: one noise level for each of {shape[0]} steps, got {list(self.levels.shape)}."
            )
        for name, values in (("cost_ms", self.cost_ms), ("flops", self.flops)):
            if values is not None and (values.shape != shape[1:] or not bool((values >= 0).all())):
                raise ConfigError(f"cache schedule: {name} must be [{shape[1]}] and not negative, got {values}.")
        if self.coefficients is not None and self.coefficients.shape[:2] != shape:
            raise ConfigError(
                f"cache schedule: coefficients must be [{shape[0]}, {shape[1]}, history], got "
                f"{list(self.coefficients.shape)}."
            )
        if self.input_coefficients is not None:
            self._check_inputs(self.input_coefficients)

    def _check_inputs(self, table: torch.Tensor) -> None:
        history = 0 if self.coefficients is None else self.coefficients.shape[2]
        if [unit.kind for unit in self.units] != [MODEL_KIND] or table.shape != (self.num_steps, 1 + history):
            raise ConfigError(
                "cache schedule: input_coefficients are of a schedule by model with coefficients [steps, 1, history], "
                f"and must be [{self.num_steps}, 1 + {history}], got {list(table.shape)}."
            )

    @classmethod
    def full(cls, units: Sequence[Unit], num_steps: int, model: str, **fields: Any) -> Schedule:
        """All units in all steps; timesteps and levels fall evenly unless given."""
        even = torch.linspace(1, 1 / num_steps, num_steps)
        given = {"timesteps": even * 1000, "levels": even, **fields}
        return cls(tuple(units), torch.ones(num_steps, len(units), dtype=torch.uint8), model=model, **given)

    @property
    def num_steps(self) -> int:
        """Rows of the table."""
        return int(self.mask.shape[0])

    @property
    def reused(self) -> float:
        """Share of all unit evaluations that are reused (the paper's CUR)."""
        return 1.0 - float(self.mask.float().mean())

    @property
    def total_flops(self) -> tuple[float, float] | None:
        """(of the units with all computed, with this schedule) over the loop."""
        if self.flops is None:
            return None
        return float(self.flops.sum()) * self.num_steps, float((self.mask.double() @ self.flops.double()).sum())

    @property
    def predicted_speedup(self) -> float | None:
        """T_full / (T_full - time of what is reused), of the denoiser's part of the loop; None without a profile."""
        if self.cost_ms is None:
            return None
        full = self.num_steps * (float(self.cost_ms.double().sum()) + self.other_ms)
        saved = float(((1 - self.mask.double()) @ self.cost_ms.double()).sum())
        return full / max(full - saved, 1e-9)

    @property
    def units_hash(self) -> str:
        """Of the units' names and kinds in their order."""
        listed = [[unit.block, unit.branch, unit.kind] for unit in self.units]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]

    def with_mask(
        self,
        mask: torch.Tensor,
        coefficients: torch.Tensor | None = None,
        input_coefficients: torch.Tensor | None = None,
    ) -> Schedule:
        """Another table for the same units; coefficients of the old one are not kept."""
        mask = mask.to("cpu", torch.uint8).contiguous()
        return replace(self, mask=mask, coefficients=coefficients, input_coefficients=input_coefficients)

    def check(
        self,
        model: str,
        units: Sequence[Unit],
        *,
        scheduler: str | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        """Compare with where it is to be used; another scheduler or kind of guidance is a warning.

        Raises:
            ConfigError: made for another class of models, or for other units.
        """
        if model != self.model:
            raise ConfigError(f"cache schedule: made for {self.model}, got a {model}. Calibrate one for it.")
        other = Schedule.full(units, 1, model)
        if other.units_hash != self.units_hash:
            have, want = [unit.name for unit in units], [unit.name for unit in self.units]
            differs = next((pair for pair in zip(want, have, strict=False) if pair[0] != pair[1]), None)
            what = f"{differs[0]} there, {differs[1]} here" if differs else f"{len(want)} there, {len(have)} here"
            raise ConfigError(
                f"cache schedule: its units are not those of this {model} ({what}). It belongs to a model of another "
                "size or version: calibrate one for this."
            )
        if scheduler and self.scheduler and scheduler != self.scheduler:
            warnings.warn(
                f"cache schedule: calibrated with {self.scheduler}, used with {scheduler}; steps are matched by their "
                "noise level. Calibrate again for best quality.",
                DiffuseCompressWarning,
                stacklevel=3,
            )
        if guidance and self.guidance and guidance is not self.guidance:
            warnings.warn(
                f"cache schedule: calibrated with guidance {self.guidance.value}, used with {guidance.value}: every "
                "call of a step follows the same row.",
                DiffuseCompressWarning,
                stacklevel=3,
            )

    def resampled(self, timesteps: torch.Tensor, levels: torch.Tensor) -> Schedule:
        """For a loop of other steps: each takes the row of the nearest noise level, the first one computes all.

        Coefficients are given up, since they hold for the distances between the old steps.
        """
        distance = (levels.double()[:, None] - self.levels.double()[None]).abs()
        mask = self.mask[distance.argmin(dim=1)].clone()
        mask[0] = 1
        return replace(
            self,
            mask=mask,
            timesteps=timesteps.float(),
            levels=levels.float(),
            coefficients=None,
            input_coefficients=None,
        )

    # --- as tensors ----------------------------------------------------------------------------------------------

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, JSON-able metadata), of which :meth:`from_tensors` makes it again."""
        names = ("mask", "timesteps", "levels", "cost_ms", "flops", "coefficients", "input_coefficients")
        tensors = {name: value for name in names if (value := getattr(self, name)) is not None}
        metadata = {
            "schema_version": _SCHEMA_VERSION,
            "model": self.model,
            "scheduler": self.scheduler,
            "guidance": None if self.guidance is None else self.guidance.value,
            "cache_point": self.cache_point.value,
            "other_ms": self.other_ms,
            "units": [[unit.block, unit.branch, unit.kind] for unit in self.units],
            "units_hash": self.units_hash,
            "details": dict(self.details),
        }
        return tensors, metadata

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> Schedule:
        """Raises CheckpointError for what :meth:`to_tensors` did not make."""
        try:
            if metadata["schema_version"] > _SCHEMA_VERSION:
                raise CheckpointError("cache schedule: written by a newer release: pip install -U diffuse-compress.")
            schedule = cls(
                units=tuple(Unit(*unit) for unit in metadata["units"]),
                model=metadata["model"],
                scheduler=metadata["scheduler"],
                guidance=None if metadata["guidance"] is None else Guidance(metadata["guidance"]),
                cache_point=CachePoint(metadata["cache_point"]),
                other_ms=float(metadata["other_ms"]),
                details=metadata["details"],
                **{name: value.cpu() for name, value in tensors.items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"cache schedule: incomplete or damaged ({error}).") from error
        if schedule.units_hash != metadata["units_hash"]:
            raise CheckpointError("cache schedule: its units do not have the hash that is written beside them.")
        return schedule

    # --- for reading ----------------------------------------------------------------------------------------------

    def picture(self, width: int = 100) -> str:
        """The table as text, a line for each step: ``#`` computes, ``.`` reuses; wide ones show what share of
        neighbouring units is computed, in tenths."""
        cells = self.mask.float()
        group = max(1, math.ceil(cells.shape[1] / width))
        columns = [cells[:, i : i + group].mean(dim=1) for i in range(0, cells.shape[1], group)]
        names = dict.fromkeys((self.units[0].name, self.units[-1].name))
        lines = [f"step   {' ... '.join(names)}"]
        for step in range(self.num_steps):
            row = "".join(_cell(float(column[step])) for column in columns)
            share = 100 * (1 - float(cells[step].mean()))
            lines.append(f"{step:>4}   {row}  {share:3.0f} % reused")
        return "\n".join(lines)

    def summary(self) -> str:
        """What it reuses and saves, and the picture."""
        parts = [f"{self.model}: {len(self.units)} units, {self.num_steps} steps, {100 * self.reused:.1f} % reused"]
        if (flops := self.total_flops) is not None:
            parts.append(f"{flops[1] / 1e12:.4g} of {flops[0] / 1e12:.4g} TFLOP")
        if (speedup := self.predicted_speedup) is not None:
            parts.append(f"predicted speed-up {speedup:.2f}x")
        if (noise := self.details.get("noise_amplification")) is not None:
            parts.append(f"{noise:.2g} times the noise of activations where reused")
        return ", ".join(parts) + "\n" + self.picture()

    def __str__(self) -> str:
        return self.summary()


def _cell(share: float) -> str:
    return "#" if share == 1 else "." if share == 0 else str(min(9, int(10 * share)))


def noise_levels(scheduler: Any, timesteps: torch.Tensor) -> torch.Tensor:
    """How much of the sample is noise at each of a scheduler's timesteps, in [0, 1]: [T] float32 on the CPU.

    Of flow matching this is sigma itself; of other schedulers with sigmas sigma / sqrt(1 + sigma^2), and with
    ``alphas_cumprod`` sqrt(1 - alpha): the same in another form. With neither it is the share of the training steps.
    """
    train = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000
    times = timesteps.detach().double().cpu()
    sigmas = getattr(scheduler, "sigmas", None)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(sigmas, torch.Tensor) and len(sigmas) in (len(times), len(times) + 1):
        sigma = sigmas.detach().double().cpu()[: len(times)]
        flow = alphas is None and float(sigma.max()) <= 1.0
        levels = sigma if flow else sigma / (1 + sigma**2).sqrt()
    elif isinstance(alphas, torch.Tensor) and len(alphas) == train:
        levels = (1 - alphas.detach().double().cpu()[times.round().long().clamp(0, train - 1)]).sqrt()
    else:
        levels = times / train
    return levels.clamp(0, 1).float()
