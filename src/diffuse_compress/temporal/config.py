"""How the timestep path is kept: tables of its features, or codes learned on the timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch

from diffuse_compress.errors import ConfigError, known_fields, nearest

__all__ = ["TEMPORAL_KIND", "Maintenance", "Scope", "TFMQConfig", "TableConfig", "TableFormat", "WeightPlace"]

TEMPORAL_KIND = "temporal"


class TableFormat(str, Enum):
    """How the entries of a table are stored.

    LIVE keeps the dtype that the layer computes in, and with it every bit. INT8 and INT4 keep one scale and one zero
    point for each entry (one timestep of one layer).
    """

    LIVE = "live"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the entries; None for LIVE and for codes."""
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.value)


class WeightPlace(str, Enum):
    """Where the weights of tabulated layers stand while the table serves the loop.

    CPU and DISK take them off the device, bit for bit, and bring them back for the next table. INT8 and INT4 round them
    once, when the table is attached (symmetric, per channel; per group of 128 for int4): tables are made of the rounded
    weights from then on, and a layer that runs live computes with them.
    """

    DEVICE = "device"
    CPU = "cpu"
    DISK = "disk"
    INT8 = "int8"
    INT4 = "int4"


class Maintenance(str, Enum):
    """How the features that follow from the timestep are kept where weights are quantized.

    CACHE looks them up. TIB computes them with codes that were learned on the timesteps alone. AUTO takes for each
    layer the one with the smaller error, as far as a budget allows.
    """

    CACHE = "cache"
    TIB = "tib"
    AUTO = "auto"


class Scope(str, Enum):
    """Which layers have an input scale for every step of a schedule (finite-set calibration).

    TIB: those of the timestep path, whose ranges follow from the timesteps. ALL: every layer whose format has static
    inputs; the other ranges are seen in trajectories.
    """

    TIB = "tib"
    ALL = "all"


@dataclass(frozen=True)
class TableConfig:
    """Tables in place of the layers that do not see the sample.

    Source: Huang et al. 2024, arXiv 2407.19547 (cache-based maintenance); differs: layers that also depend on a
    condition have tables too, built for every request.

    Args:
        table: format of the entries.
        exact: compute every row by itself, with the batch that the model is called with: the live bits. False computes
            all rows in one product, whose sums may differ in the last bits. None is exact for layers of the timestep
            alone, which are computed once for a schedule, and not for those built anew for every request.
        conditions: also keep what depends on the conditions alone (keys and values of the text) for a request.
        weights: where the weights of these layers stand meanwhile.
        skip: patterns of layers that always run live.
        max_schedules: schedules whose rows are kept; the one unused for longest goes.
        work_dir: folder for ``weights="disk"``; the system's temporary folder by default.
        strict: raise, where the tables serve less than 90 % of what they could, instead of warning.
    """

    table: TableFormat = TableFormat.LIVE
    exact: bool | None = None
    conditions: bool = True
    weights: WeightPlace = WeightPlace.DEVICE
    skip: tuple[str, ...] = ()
    max_schedules: int = 4
    work_dir: str | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", _member("table", TableFormat, self.table))
        object.__setattr__(self, "weights", _member("weights", WeightPlace, self.weights))
        object.__setattr__(self, "skip", tuple(self.skip))
        if self.exact not in (None, True, False):
            raise ConfigError(f"TableConfig: exact must be True, False or None, got {self.exact!r}.")
        if not isinstance(self.max_schedules, int) or self.max_schedules < 1:
            raise ConfigError(f"TableConfig: max_schedules must be a positive integer, got {self.max_schedules!r}.")
        if self.work_dir is not None:
            object.__setattr__(self, "work_dir", str(Path(self.work_dir)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, a dict of the arguments; ``work_dir`` is of one machine and left out."""
        return {**asdict(self), "table": self.table.value, "weights": self.weights.value, "skip": list(self.skip)} | {
            "work_dir": None
        }


@dataclass(frozen=True)
class TFMQConfig:
    """The timestep path of a denoiser: what it computes from the timestep and conditions alone.

    Source: Huang et al. 2024, arXiv 2407.19547, which extends TFMQ-DM (arXiv 2311.16503). Tables are made of the dense
    weights, so that quantizing these layers costs nothing in accuracy while a table serves them. What a table does not
    serve is quantized by itself ("tib"), in the formats that the weights' configuration gives these layers: their codes
    are learned on a dense grid of timesteps, and no sample, text or picture is looked at.

    Args:
        table: how tables are kept, a TableConfig or a dict of its arguments.
        num_inference_steps: schedules whose rows of the timestep alone are made by ``compress`` and stored with the
            model, by their numbers of steps; the pipeline's own number by default, () for none. Rows of any other
            schedule are made in its first run.
        maintenance: "cache", "tib" or "auto", see :class:`Maintenance`.
        table_budget: bytes that the stored rows may take in all, for "auto"; None for no limit.
        iterations: steps of Adam in which the codes of a layer are learned, for "tib" and "auto"; the authors take
            20000 for all layers at once.
        scope: "tib" or "all", layers that get an input scale (and zero point) for every step of these schedules, see
            :class:`Scope`; their formats must have static inputs. None leaves them one for all steps.

    Raises:
        ConfigError: a value that is none of these.
    """

    table: TableConfig = field(default_factory=TableConfig)
    num_inference_steps: tuple[int, ...] | None = None
    maintenance: Maintenance = Maintenance.CACHE
    table_budget: int | None = None
    iterations: int = 300
    scope: Scope | None = None

    kind: ClassVar[str] = TEMPORAL_KIND

    def __post_init__(self) -> None:
        if isinstance(self.table, Mapping):
            object.__setattr__(self, "table", TableConfig(**known_fields(TableConfig, self.table)))
        if not isinstance(self.table, TableConfig):
            raise ConfigError(f"TFMQConfig: table is a TableConfig, got {type(self.table).__name__}.")
        steps: Any = self.num_inference_steps
        steps = (steps,) if isinstance(steps, int) else None if steps is None else tuple(steps)
        if steps is not None and any(not isinstance(step, int) or step < 1 for step in steps):
            raise ConfigError(f"TFMQConfig: num_inference_steps are positive integers, got {steps!r}.")
        if steps is not None and len(steps) > self.table.max_schedules:
            raise ConfigError(
                f"TFMQConfig: num_inference_steps are {len(steps)} schedules, and the table keeps "
                f"{self.table.max_schedules}: pass table=TableConfig(max_schedules={len(steps)})."
            )
        object.__setattr__(self, "num_inference_steps", steps)
        object.__setattr__(self, "maintenance", _member("maintenance", Maintenance, self.maintenance, "TFMQConfig"))
        if self.scope is not None:
            object.__setattr__(self, "scope", _member("scope", Scope, self.scope, "TFMQConfig"))
            if self.num_inference_steps == ():
                raise ConfigError(
                    f'TFMQConfig: scope="{self.scope.value}" keeps input scales for the steps of a schedule, got '
                    "num_inference_steps=(). Name one, or leave it out for the pipeline's own."
                )
        self._check_maintenance()

    def _check_maintenance(self) -> None:
        budget, own = self.table_budget, self.maintenance.value
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise ConfigError(f"TFMQConfig: table_budget is a number of bytes or None, got {budget!r}.")
        if budget is not None and self.maintenance is not Maintenance.AUTO:
            raise ConfigError(
                f'TFMQConfig: table_budget= is for maintenance="auto", which chooses the layers that get tables; got '
                f'maintenance="{own}". Leave it out, or ask for "auto".'
            )
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ConfigError(f"TFMQConfig: iterations is a positive integer, got {self.iterations!r}.")
        if self.learns and self.table.weights is not WeightPlace.DEVICE:
            raise ConfigError(
                f'TFMQConfig: maintenance="{own}" computes layers with their quantized weights, which stay on the '
                f'device; got TableConfig(weights="{self.table.weights.value}"). Leave weights= out.'
            )

    @property
    def learns(self) -> bool:
        """Codes of layers are learned."""
        return self.maintenance is not Maintenance.CACHE

    @property
    def summary(self) -> str:
        """In a few words, for plans."""
        return self._kept if self.scope is None else f"{self._kept}, input scales for each step ({self.scope.value})"

    @property
    def _kept(self) -> str:
        if self.maintenance is Maintenance.TIB:
            return f"learned codes (TIAR, {self.iterations} steps)"
        where = self.table.weights
        kept = "" if where is WeightPlace.DEVICE else f", weights {where.value}"
        tables = f"temporal tables ({self.table.table.value}{kept})"
        if self.maintenance is Maintenance.CACHE:
            return tables
        budget = "" if self.table_budget is None else f" within {self.table_budget} bytes"
        return f"{tables}{budget} or learned codes (TIAR, {self.iterations} steps)"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, a dict of the arguments."""
        steps = self.num_inference_steps
        return {
            "table": self.table.to_dict(),
            "num_inference_steps": None if steps is None else list(steps),
            "maintenance": self.maintenance.value,
            "table_budget": self.table_budget,
            "iterations": self.iterations,
            "scope": None if self.scope is None else self.scope.value,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TFMQConfig:
        """Read a :meth:`to_dict`. Raises ConfigError for an unknown field."""
        return cls(**known_fields(cls, data))


def _member(name: str, kind: type[Enum], value: object, where: str = "TableConfig") -> Enum:
    try:
        return kind(value)
    except ValueError:
        known = [str(member.value) for member in kind]
        raise ConfigError(f"{where}: {name}={value!r} is unknown; {nearest(str(value), known)}.") from None
