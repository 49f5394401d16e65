"""What the layers of the timestep path are given and give, at timesteps of one's choice, and how far it is off.

The model runs up to its first block once for each timestep, and the layers behind it are computed from what the block
was given (``build.py`` makes tables in the same way); here the layers are watched, whatever has become of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.families.base import Dependence
from diffuse_compress.families.embedding import Entry
from diffuse_compress.temporal.build import Call, run_to_block
from diffuse_compress.temporal.layout import Layout

__all__ = ["PATH_KINDS", "Features", "mismatched", "observe", "relative_error"]

PATH_KINDS = (Dependence.TIMESTEP, Dependence.TIMESTEP_AND_CONDITION)
"""What the layers of the timestep path depend on."""


@dataclass(frozen=True)
class Features:
    """What was seen. Rows are those of a batch for each timestep, one timestep after the other.

    Attributes:
        batch: rows for each timestep.
        inputs: [rows, in] of every layer that ran once for each timestep.
        outputs: [rows, out] of the same.
        activations: [rows, width], what activation modules beside them were given, by qualified name.
    """

    batch: int
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    activations: dict[str, torch.Tensor]


@torch.no_grad()
def observe(layout: Layout, call: Call, timesteps: Sequence[Any]) -> Features:
    """Inputs and outputs of the layers of the timestep path.

    Args:
        layout: of ``call.model``, whose layers may have been quantized since.
        call: whose conditions and sample are taken.
        timesteps: as a pipeline would pass them.

    Returns:
        Without layers that do not run once a timestep with one row for each sample, and without those whose input
        nobody knows how to make.
    """
    model, temporal = call.model, layout.temporal
    names = [name for name, kind in layout.layers.items() if kind in PATH_KINDS]
    sources = {source for reader in temporal.readers for source in reader.sources}
    beside = [name for name, module in model.named_modules() if isinstance(module, nn.SiLU | nn.GELU | nn.ReLU)]
    with torch.inference_mode(False), _watched(model, [*names, *beside]) as seen:
        entries = [run_to_block(call, layout.entry, timestep, sources) for timestep in timesteps]
        joined = _joined(entries, call.batch)
        before = {name for name in names if seen[name]}
        for name in names:
            reader = temporal.reader_of(name)
            if (
                name not in before
                and reader is not None
                and all(source in joined.arguments for source in reader.sources)
            ):
                model.get_submodule(name)(reader.input(joined, name))
    rows = len(timesteps) * call.batch
    found = {name: _rows(pairs, rows, call.batch) for name, pairs in seen.items()}
    whole = {name: pair for name, pair in found.items() if pair is not None}
    return Features(
        call.batch,
        {name: whole[name][0] for name in names if name in whole},
        {name: whole[name][1] for name in names if name in whole},
        {name: whole[name][0] for name in beside if name in whole},
    )


@contextmanager
def _watched(model: nn.Module, names: Sequence[str]) -> Iterator[Mapping[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Inputs and outputs of these modules, by name, in the order of their calls."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in names}

    def note(name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if args[0].ndim == 2:
                # In place activations, and whoever scales an embedding in place, would change what was seen.
                seen[name].append((args[0].clone(), output.clone()))

        return leave

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _joined(entries: Sequence[Entry], batch: int) -> Entry:
    """What the first block was called with at all timesteps, one after the other."""
    first = entries[0]
    found = {}
    for name, value in first.arguments.items():
        if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == batch:
            found[name] = torch.cat([entry[name] for entry in entries])
    return Entry(first.model, found, first.dtype)


def _rows(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: int, batch: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Inputs and outputs of all rows; None if there are others."""
    if not pairs:
        return None
    x, y = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    if x.shape[0] * batch == rows:  # the timestep is embedded once for all samples
        x, y = x.repeat_interleave(batch, dim=0), y.repeat_interleave(batch, dim=0)
    return (x, y) if x.shape[0] == rows else None


def relative_error(dense: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """float64 [...]: RMS of the difference over the RMS of ``dense``, of vectors [..., width]."""
    reference = dense.double()
    difference = (found.double() - reference).square().mean(dim=-1).sqrt()
    return difference / reference.square().mean(dim=-1).sqrt().clamp(min=torch.finfo(torch.float64).tiny)


def mismatched(dense: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """bool [T]: is a feature nearer to that of another timestep than to its own?

    Source: Huang et al. 2023, arXiv 2311.16503 (temporal information mismatch): near is a large cosine. Of timesteps
    whose dense features are alike to the last bit of the cosine, none is another.

    Args:
        dense: [T, width], the unchanged model's feature at each timestep.
        found: [T, width], that of the model in question.
    """
    unit, other = (nn.functional.normalize(x.double(), dim=-1) for x in (dense, found))
    cosine = other @ unit.t()
    return cosine.amax(dim=1) > torch.diagonal(cosine) + 4 * torch.finfo(torch.float64).eps
