"""How the timestep path of a quantized model is kept, layer by layer, and how far its features are off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
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
    "Choice",
    "Maintained",
    "PathErrors",
    "choose_tables",
    "maintained_of",
    "rounded_outputs",
    "set_maintained",
    "table_config",
    "tables_of_rounded",
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
        errors: measured when it was compressed: "rtn" (the same formats, rounded to nearest), "tib" where codes were
            learned, "cache" where there are tables, and of "auto" what was chosen.
        rows: bool [timesteps] of layers that have rows of the first schedule at some timesteps only: is there one?
    """

    config: TFMQConfig
    learned: tuple[str, ...]
    ways: dict[str, tuple[str, str]]
    errors: PathErrors
    rows: dict[str, tuple[bool, ...]] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, dict[float, bool]]:
        """:attr:`rows` by timestep."""
        return {name: dict(zip(self.errors.timesteps, there, strict=True)) for name, there in self.rows.items()}

    @property
    def cached(self) -> list[str]:
        """Layers of the timestep alone that have tables, of all timesteps or some."""
        return [name for name, (way, _) in self.ways.items() if way == Maintenance.CACHE.value]

    @property
    def live(self) -> dict[str, str]:
        """Layers of the timestep path that are computed, and why."""
        return {name: why for name, (way, why) in self.ways.items() if way != Maintenance.CACHE.value}

    def describe(self) -> str:
        """In one line."""
        chosen = f", {len(self.cached)} of {len(self.ways)} features from tables" if self.cached else ""
        chosen += f" ({len(self.rows)} at some timesteps only)" if self.rows else ""
        learned = f"{len(self.learned)} layers learned on the timesteps" if self.learned else "none learned"
        return f"{learned}{chosen}; {self.errors.summary()}"

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        ways = {name: {"way": way, "why": why} for name, (way, why) in self.ways.items()}
        rows = {name: list(there) for name, there in self.rows.items()}
        return {"learned": list(self.learned), "ways": ways, **({"rows": rows} if rows else {}), **self.errors.facts()}

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
        if self.rows:
            tensors["rows"], meta["rows"] = torch.tensor(list(self.rows.values())), list(self.rows)
        return tensors, meta

    @classmethod
    def from_tensors(
        cls, config: TFMQConfig, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]
    ) -> Maintained:
        """Read :meth:`to_tensors`. Raises CheckpointError if a tensor is missing."""
        some = meta.get("rows", [])
        missing = [key for key in (*_KEYS, *(["rows"] if some else [])) if key not in tensors]
        if missing:
            raise CheckpointError(
                f"timestep path: the tensor {missing[0]!r} is missing. The checkpoint was changed; compress the dense "
                "model again."
            )
        by_way = ({way: tensors[key][i] for i, way in enumerate(meta["measured"])} for key in _KEYS[1:])
        timesteps = tuple(tensors["timesteps"].tolist())
        errors = PathErrors(timesteps, tuple(meta["layers"]), *by_way)
        ways = {name: (way, why) for name, (way, why) in meta["ways"].items()}
        rows = {name: tuple(tensors["rows"][i].tolist()) for i, name in enumerate(some)}
        return cls(config, tuple(meta["learned"]), ways, errors, rows)


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
    dense = dict(zip(path.block.names, path.block.layers, strict=True))
    rounded = {
        name: quantize_module(dense[name], scheme.with_dynamic_inputs(), RTNConfig(), name=name)
        for name, scheme in schemes.items()
    }
    with _replaced(path, rounded):
        return path.block.outputs(path.given)


def tables_of_rounded(path: Path, layers: Mapping[str, nn.Module], config: TFMQConfig) -> Maintained:
    """What tables keep of a path, whose block is still dense, with these layers rounded to nearest.

    A table of the timestep alone holds what dense layers give; rows of a condition are made of the rounded weights.
    """
    own = {name: layer for name, layer in layers.items() if name in path.kinds}
    errors = PathErrors.none(path)
    alone = {name: path.dense[name] for name in errors.layers if path.kinds[name] is Dependence.TIMESTEP}
    rows = {name: row for part in store(alone, config.table.table) for name, row in part.rows().items()}
    with _replaced(path, own):
        errors.add("rtn", path.dense, path.block.outputs(path.given))
        errors.add("cache", path.dense, path.block.outputs(path.given, rows))
    why = {True: "as asked", False: "as asked; it depends on a condition: its rows are made of the quantized weights"}
    ways = {name: (Maintenance.CACHE.value, why[name in alone]) for name in errors.layers}
    return Maintained(config, (), ways, errors)


@contextlib.contextmanager
def _replaced(path: Path, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, these layers are in the places of the path's own."""
    dense = {name: path.block.get_submodule(path.block.relative(name)) for name in layers}
    try:
        for name, layer in layers.items():
            path.block.put(name, layer)
        yield
    finally:
        for name, layer in dense.items():
            path.block.put(name, layer)


@dataclass
class Choice:
    """What :func:`choose_tables` has chosen.

    Attributes:
        ways: {layer with a temporal feature: ("cache" or "tib", why)}.
        rows: bool [timesteps] of layers that have rows for some timesteps only: is there one?
    """

    ways: dict[str, tuple[str, str]]
    rows: dict[str, tuple[bool, ...]]

    def known(self, tables: Mapping[str, torch.Tensor], samples: int) -> dict[str, torch.Tensor]:
        """Of ``tables`` [timesteps * samples, out] what is looked up; NaN where it is not."""
        found = {name: tables[name] for name, (way, _) in self.ways.items() if way == Maintenance.CACHE.value}
        for name, there in self.rows.items():
            absent = ~torch.tensor(there, device=found[name].device).repeat_interleave(samples)
            found[name] = found[name].masked_fill(absent[:, None], torch.nan)
        return found


def choose_tables(path: Path, errors: PathErrors, form: TableFormat, budget: int | None, schedules: int) -> Choice:
    """What is looked up, by the errors and under a budget: layer by layer and timestep by timestep.

    Source: Huang et al. 2024, arXiv 2407.19547 (disturbance-aware selection): the way with the smaller error of the
    feature. Differs: what does not fit a budget stays with its learned codes; first come the rows by which the error
    falls most for a byte. Where several schedules are stored, a layer's rows come or go together: errors are known at
    the timesteps of the first.

    Args:
        path: as it was measured.
        errors: with the ways "tib" and "cache".
        form: of the tables.
        budget: bytes of all rows; None for no limit.
        schedules: whose rows are stored, of as many timesteps as those that were measured.
    """
    gains = errors.error["tib"] - errors.error["cache"]
    ways: dict[str, tuple[str, str]] = {}
    sizes: dict[str, _Size] = {}
    for name, gain in zip(errors.layers, gains, strict=True):
        together = schedules > 1 or path.kinds[name] is not Dependence.TIMESTEP
        if path.kinds[name] is not Dependence.TIMESTEP:
            ways[name] = ("tib", "it depends on a condition: its rows are made of the quantized weights")
        elif not bool(gain.mean() > 0 if together else (gain > 0).any()):
            ways[name] = ("tib", f"its learned codes are as near as a table of {form.value}")
        else:
            sizes[name] = _Size.of(path.dense[name], form, len(errors.timesteps), schedules)
    steps = {name: gain.tolist() for name, gain in zip(errors.layers, gains, strict=True) if name in sizes}
    chosen = _rows_within(sizes, steps, budget, together=schedules > 1)
    rows = {}
    for name, size in sizes.items():
        there, count = chosen[name], sum(chosen[name])
        lower = sum(gain for gain, here in zip(steps[name], there, strict=True) if here or not count) / len(there)
        by = f"error lower by {lower:.2g}, {size.bytes(count or len(there))} bytes"
        if not count:
            ways[name] = ("tib", f"over the budget: {by}")
        elif count == len(there):
            ways[name] = ("cache", by)
        else:
            ways[name] = ("cache", f"rows of {count} of {len(there)} timesteps: {by}")
            rows[name] = there
    return Choice({name: ways[name] for name in errors.layers}, rows)


@dataclass(frozen=True)
class _Size:
    """Bytes of a layer's table: of each row, of a whole one beside its rows, and of one with gaps beside that."""

    row: int
    whole: int
    gaps: int
    timesteps: int

    @classmethod
    def of(cls, dense: torch.Tensor, form: TableFormat, timesteps: int, schedules: int) -> _Size:
        parts = store({"": dense[:: len(dense) // timesteps]}, form)
        beside = sum(part.widths.nbytes for part in parts if part.widths is not None)
        row = (sum(part.nbytes for part in parts) - beside) // timesteps
        return cls(schedules * row, schedules * beside, 4 * timesteps, timesteps)

    def bytes(self, count: int) -> int:
        """Of ``count`` rows."""
        return count * self.row + (self.whole + (self.gaps if count < self.timesteps else 0) if count else 0)


def _rows_within(
    sizes: Mapping[str, _Size], gains: Mapping[str, list[float]], budget: int | None, together: bool
) -> dict[str, tuple[bool, ...]]:
    """{layer: which of its rows are kept}: those that lower the error, most for a byte first."""
    if together:
        units = [(sum(own) / len(own), name, range(len(own))) for name, own in gains.items()]
    else:
        units = [(g, name, range(k, k + 1)) for name, own in gains.items() for k, g in enumerate(own) if g > 0]
    by_gain = sorted(units, key=lambda unit: (unit[0] / sizes[unit[1]].row, unit[1], -unit[2][0]), reverse=True)
    counts, kept = dict.fromkeys(sizes, 0), {name: [False] * len(own) for name, own in gains.items()}
    taken = 0
    for _, name, numbers in by_gain:
        more = sizes[name].bytes(counts[name] + len(numbers)) - sizes[name].bytes(counts[name])
        if budget is None or taken + more <= budget:
            taken += more
            counts[name] += len(numbers)
            for number in numbers:
                kept[name][number] = True
    return {name: tuple(own) for name, own in kept.items()}


def table_config(model: nn.Module, config: TFMQConfig, maintained: Maintained | None) -> TableConfig | None:
    """How a model's tables are kept: as asked for, without the layers of the timestep alone that are not to have one;
    None where no layer is left."""
    if maintained is None or config.maintenance is Maintenance.CACHE:
        return config.table
    layers = layout_of(model, config.table).layers
    live = [name for name, kind in layers.items() if kind is Dependence.TIMESTEP and name not in maintained.cached]
    if config.maintenance is Maintenance.TIB or len(live) == len(layers):
        return None
    return replace(config.table, skip=(*config.table.skip, *live))
