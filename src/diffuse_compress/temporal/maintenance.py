"""How the timestep path of a quantized model is kept, layer by layer, and how far its features are off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from diffuse_compress.components import unwrap
from diffuse_compress.errors import CheckpointError
from diffuse_compress.families.base import Dependence
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.temporal.config import Maintenance, TableConfig, TableFormat, TFMQConfig
from diffuse_compress.temporal.features import mismatched, relative_error
from diffuse_compress.temporal.layout import layout_of
from diffuse_compress.temporal.storage import store
from diffuse_compress.temporal.tiar import Path

__all__ = [
    "Maintained",
    "PathErrors",
    "choose_tables",
    "maintained_of",
    "rounded_outputs",
    "set_maintained",
    "table_config",
]

_ATTRIBUTE = "_diffuse_compress_maintained"
_KEYS = ("timesteps", "error", "mismatch")


@dataclass
class PathErrors:
    """Errors of temporal features against the dense model's.

    Attributes:
        timesteps: as the model is given them.
        layers: whose outputs the features are.
        error: fp32 [layers, timesteps] by way of keeping them: RMS of the difference over RMS, mean over samples.
        mismatch: likewise, the share of samples whose feature is nearer to that of another timestep than to its own.
    """

    timesteps: tuple[float, ...]
    layers: tuple[str, ...]
    error: dict[str, torch.Tensor]
    mismatch: dict[str, torch.Tensor]

    @classmethod
    def none(cls, path: Path) -> PathErrors:
        """Of the features of a path; to be added to."""
        return cls(path.timesteps, tuple(path.features), {}, {})

    def add(self, way: str, dense: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
        """Measure outputs [timesteps * samples, out] by layer."""
        errors, mismatches = [], []
        for name in self.layers:
            pair = (x[name].unflatten(0, (len(self.timesteps), -1)) for x in (dense, found))
            unchanged, other = (x.detach().cpu().transpose(0, 1) for x in pair)
            errors.append(relative_error(unchanged, other).mean(dim=0).float())
            shares = [mismatched(one, two).float() for one, two in zip(unchanged, other, strict=True)]
            mismatches.append(torch.stack(shares).mean(dim=0))
        self.error[way], self.mismatch[way] = torch.stack(errors), torch.stack(mismatches)

    def summary(self) -> str:
        """Means over layers and timesteps."""
        parts = [
            f"{way} {float(error.mean()):.2g} ({100 * float(self.mismatch[way].mean()):.1f} % mismatched)"
            for way, error in self.error.items()
        ]
        return f"relative feature error {', '.join(parts)}"

    def facts(self) -> dict[str, Any]:
        """JSON-able: means over layers for each timestep, and over timesteps for each layer."""
        return {
            "timesteps": list(self.timesteps),
            "error": {way: error.mean(dim=0).tolist() for way, error in self.error.items()},
            "mismatch": {way: share.mean(dim=0).tolist() for way, share in self.mismatch.items()},
            "layers": {
                name: {way: float(error[number].mean()) for way, error in self.error.items()}
                for number, name in enumerate(self.layers)
            },
        }


@dataclass
class Maintained:
    """What became of a model's timestep path.

    Attributes:
        config: as asked for.
        learned: layers whose codes were learned on the timesteps.
        ways: "cache" or "tib" of each layer with a temporal feature, and why.
        errors: measured when it was compressed: "rtn" (the same formats, rounded to nearest), "tib", "cache", and of
            "auto" what was chosen.
    """

    config: TFMQConfig
    learned: tuple[str, ...]
    ways: dict[str, tuple[str, str]]
    errors: PathErrors

    @property
    def cached(self) -> list[str]:
        """Layers of the timestep alone that have tables."""
        return [name for name, (way, _) in self.ways.items() if way == Maintenance.CACHE.value]

    @property
    def live(self) -> dict[str, str]:
        """Layers of the timestep path that are computed, and why."""
        return {name: why for name, (way, why) in self.ways.items() if way != Maintenance.CACHE.value}

    def describe(self) -> str:
        """In one line."""
        chosen = f", {len(self.cached)} of {len(self.ways)} features from tables" if self.cached else ""
        return f"{len(self.learned)} layers learned on the timesteps{chosen}; {self.errors.summary()}"

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        ways = {name: {"way": way, "why": why} for name, (way, why) in self.ways.items()}
        return {"learned": list(self.learned), "ways": ways, **self.errors.facts()}

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors by name, what they are, JSON-able), for :meth:`from_tensors`."""
        errors = self.errors
        tensors = {
            "timesteps": torch.tensor(errors.timesteps, dtype=torch.float64),
            "error": torch.stack(list(errors.error.values())),
            "mismatch": torch.stack(list(errors.mismatch.values())),
        }
        ways = {name: list(way) for name, way in self.ways.items()}
        meta = {
            "learned": list(self.learned),
            "ways": ways,
            "layers": list(errors.layers),
            "measured": list(errors.error),
        }
        return tensors, meta

    @classmethod
    def from_tensors(
        cls, config: TFMQConfig, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]
    ) -> Maintained:
        """Read :meth:`to_tensors`. Raises CheckpointError if a tensor is missing."""
        missing = [key for key in _KEYS if key not in tensors]
        if missing:
            raise CheckpointError(
                f"timestep path: the tensor {missing[0]!r} is missing. The checkpoint was changed; compress the dense "
                "model again."
            )
        by_way = ({way: tensors[key][i] for i, way in enumerate(meta["measured"])} for key in _KEYS[1:])
        timesteps = tuple(tensors["timesteps"].tolist())
        errors = PathErrors(timesteps, tuple(meta["layers"]), *by_way)
        return cls(
            config, tuple(meta["learned"]), {name: (way, why) for name, (way, why) in meta["ways"].items()}, errors
        )


def maintained_of(model: nn.Module) -> Maintained | None:
    """What a model carries, or None."""
    found = vars(unwrap(model)).get(_ATTRIBUTE)
    return found if isinstance(found, Maintained) else None


def set_maintained(model: nn.Module, maintained: Maintained | None) -> None:
    """Let a model carry this, or nothing."""
    own = vars(unwrap(model))
    own.pop(_ATTRIBUTE, None)
    if maintained is not None:
        own[_ATTRIBUTE] = maintained


def rounded_outputs(path: Path, schemes: Mapping[str, Scheme]) -> dict[str, torch.Tensor]:
    """Outputs of the path, whose block is still dense, with these layers rounded to nearest."""
    dense = {name: path.block.get_submodule(path.block.relative(name)) for name in schemes}
    try:
        for name, scheme in schemes.items():
            path.block.put(name, quantize_module(dense[name], scheme.with_dynamic_inputs(), RTNConfig(), name=name))
        return path.block.outputs(path.given)
    finally:
        for name, layer in dense.items():
            path.block.put(name, layer)


def choose_tables(
    path: Path, errors: PathErrors, form: TableFormat, budget: int | None, schedules: int
) -> dict[str, tuple[str, str]]:
    """{layer with a temporal feature: ("cache" or "tib", why)}, by the errors and under a budget.

    Source: Huang et al. 2024, arXiv 2407.19547 (disturbance-aware selection): the way with the smaller error of the
    feature. Differs: what does not fit a budget stays with its learned codes; first come the layers whose error falls
    most for a byte.

    Args:
        path: as it was measured.
        errors: with the ways "tib" and "cache".
        form: of the tables.
        budget: bytes of all rows; None for no limit.
        schedules: whose rows are stored, of as many timesteps as those that were measured.
    """
    gains = (errors.error["tib"] - errors.error["cache"]).mean(dim=1).tolist()
    ways: dict[str, tuple[str, str]] = {}
    wanted: list[tuple[float, int, str]] = []
    for name, gain in zip(errors.layers, gains, strict=True):
        if path.kinds[name] is not Dependence.TIMESTEP:
            ways[name] = ("tib", "it depends on a condition: its rows are made of the quantized weights")
        elif gain <= 0:
            ways[name] = ("tib", f"its learned codes are as near as a table of {form.value}")
        else:
            size = schedules * sum(part.nbytes for part in store({name: path.dense[name]}, form))
            wanted.append((gain / size, size, name))
    taken = 0
    for gain, size, name in sorted(wanted, reverse=True):
        fits = budget is None or taken + size <= budget
        taken += size * fits
        by = f"error lower by {gain * size:.2g}, {size} bytes"
        ways[name] = ("cache", by) if fits else ("tib", f"over the budget: {by}")
    return {name: ways[name] for name in errors.layers}


def table_config(model: nn.Module, config: TFMQConfig, maintained: Maintained | None) -> TableConfig | None:
    """How a model's tables are kept: as asked for, without the layers of the timestep alone that are not to have one;
    None where no layer is left."""
    if maintained is None:
        return config.table
    layers = layout_of(model, config.table).layers
    live = [name for name, kind in layers.items() if kind is Dependence.TIMESTEP and name not in maintained.cached]
    if config.maintenance is Maintenance.TIB or len(live) == len(layers):
        return None
    return replace(config.table, skip=(*config.table.skip, *live))
