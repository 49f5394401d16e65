"""Tables of the timestep alone as plain tensors, for the state dict of a checkpoint, and back.

What also depends on conditions is of one request and is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffuse_compress.errors import CheckpointError
from diffuse_compress.temporal.state import Schedule
from diffuse_compress.temporal.storage import StoredRows
from diffuse_compress.temporal.table import TemporalTable

__all__ = ["SCHEMA_VERSION", "load_table_state", "table_state"]

SCHEMA_VERSION = 2
"""2 has rows for some timesteps only; without them, what is written is as of 1."""

_BITS = (0, 4, 8)


def table_state(table: TemporalTable) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors by key, what they are, JSON-serialisable) of every schedule that the table holds.

    Keys are ``<schedule>.timesteps`` (float64), ``<schedule>.<part>.values``, ``.scale``, ``.zero_point``, ``.widths``
    and ``.place`` (``StoredRows``), and ``weights``, samples of the weights that the model has now.
    """
    tensors = {"weights": table.weights_signature()}
    schedules = []
    for number, schedule in enumerate(table.schedules):
        tensors[f"{number}.timesteps"] = torch.tensor(schedule.values, dtype=torch.float64)
        parts = []
        for place, part in enumerate(schedule.rows):
            tensors |= {f"{number}.{place}.{name}": tensor for name, tensor in part.tensors().items()}
            columns = {name: list(span) for name, span in part.columns.items()}
            dtype = str(part.dtype).removeprefix("torch.")
            some = {} if part.place is None else {"partial": True}
            parts.append({"columns": columns, "dtype": dtype, "bits": part.bits, **some})
        named = {name: getattr(schedule, name) for name in ("form", "precision", "batch", "scheduler")}
        schedules.append({**named, "parts": parts})
    partial = any(part.place is not None for schedule in table.schedules for part in schedule.rows)
    return tensors, {"schema_version": SCHEMA_VERSION if partial else 1, "schedules": schedules}


def load_table_state(
    table: TemporalTable, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], *, adopt: bool = False
) -> None:
    """Put saved schedules into a table, before those that it holds.

    Args:
        table: of the model whose weights were saved with them, in the same formats.
        tensors: from :func:`table_state`, by key.
        meta: from the same, what they are.
        adopt: take the tables for those of the weights that the model has now, although they were made from others:
            from the dense weights of layers that have been quantized since.

    Raises:
        CheckpointError: another schema, tensors that are missing or do not fit the model, or (without ``adopt``) other
            weights; the table is as it was then.
    """
    if meta.get("schema_version") not in (1, SCHEMA_VERSION):
        raise CheckpointError(
            f"temporal table: schema_version must be at most {SCHEMA_VERSION}, got {meta.get('schema_version')!r}. "
            "Update diffuse-compress, or build the table again."
        )
    signature = table.weights_signature()
    if not adopt and not torch.equal(_tensor(tensors, "weights").cpu(), signature):
        raise CheckpointError(
            "temporal table: it was made from other weights than the model has. Load it with the checkpoint that it "
            "was saved in, or pass adopt=True if the layers have only been quantized since."
        )
    loaded = []
    for number, described in enumerate(meta["schedules"]):
        values = tuple(_tensor(tensors, f"{number}.timesteps").tolist())
        parts = [
            _part(table, tensors, f"{number}.{place}", part, len(values))
            for place, part in enumerate(described["parts"])
        ]
        named = {name: described[name] for name in ("form", "precision", "batch", "scheduler")}
        loaded.append(Schedule(values=values, rows=parts, signature=signature, **named))
    table.add_schedules(loaded)


def _tensor(tensors: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    if key not in tensors:
        raise CheckpointError(f"temporal table: the tensor {key!r} is missing. Build the table again.")
    return tensors[key]


def _part(
    table: TemporalTable, tensors: Mapping[str, torch.Tensor], prefix: str, part: Mapping[str, Any], rows: int
) -> StoredRows:
    columns = {name: (int(first), int(end)) for name, (first, end) in part["columns"].items()}
    bits, dtype = part["bits"], getattr(torch, part["dtype"], None)
    scale, zero_point, widths = (
        _tensor(tensors, f"{prefix}.{name}") if bits else None for name in ("scale", "zero_point", "widths")
    )
    values = _tensor(tensors, f"{prefix}.values")
    width = values.shape[1] * 8 // (bits or 8)
    place = _tensor(tensors, f"{prefix}.place") if part.get("partial") else None
    stored = StoredRows(columns, values, scale, zero_point, widths, width, dtype or torch.float32, bits, place)
    whole = stored.num_rows == rows and (place is None or int(place.max()) == values.shape[0] - 1)
    for name, (first, end) in columns.items():
        lookup = table.lookups.get(name)
        wide = lookup is not None and end - first == lookup.layer.out_features and 0 <= first < end <= stored.width
        if not wide or bits not in _BITS or not isinstance(dtype, torch.dtype) or not whole:
            raise CheckpointError(
                f"temporal table: {prefix} does not fit {name} of {type(table.model).__name__}. It is of another "
                "model, or was changed; build the table again."
            )
    return stored
