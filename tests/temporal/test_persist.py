"""Tables of a schedule go into a state dict and come back; those of other weights are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import tiny
from diffuse_compress.errors import CheckpointError, ModelStateError
from diffuse_compress.temporal.config import TableConfig
from diffuse_compress.temporal.lookup import LayerLookup
from diffuse_compress.temporal.persist import load_table_state, table_state
from diffuse_compress.temporal.table import attach_table
from temporal.loops import inputs_for, loop, scheduler_for, stats


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("form", ["live", "int8", "int4", "bfloat16"])
def test_round_trip(form, monkeypatch):
    model = tiny.build("unet")
    table = attach_table(model, TableConfig(table=form))
    inputs = inputs_for(model)
    expected = loop("unet", model, inputs)
    loop("unet", model, inputs, scheduler=scheduler_for("unet", 5))
    tensors, meta = table_state(table)
    meta = json.loads(json.dumps(meta))
    assert all(type(tensor) is torch.Tensor for tensor in tensors.values())
    assert [schedule["scheduler"] for schedule in meta["schedules"]] == ["DDIMScheduler"] * 2
    fresh = tiny.build("unet")
    load_table_state(attach_table(fresh), tensors, meta)
    monkeypatch.setattr(LayerLookup, "live", lambda self, x: pytest.fail("a layer was computed"))
    assert equal(loop("unet", fresh, inputs), expected)
    assert stats(fresh).hits == 3 * 10


def test_tables_of_dense_weights_serve_rounded_ones():
    """A row is exact, whatever has become of the weights since."""
    model = tiny.build("unet")
    inputs = inputs_for(model)
    expected = loop("unet", model, inputs)
    table = attach_table(model)
    given = {**inputs, "timestep": torch.tensor([0, 0])}
    schedule = table.prepare(given, scheduler_for("unet").timesteps, "DDIMScheduler")
    assert schedule.nbytes == table.nbytes()["schedules"] == sum(part.nbytes for part in schedule.rows)
    tensors, meta = table_state(table)
    rounded = tiny.build("unet")
    other = attach_table(rounded, TableConfig(weights="int4"))
    with pytest.raises(CheckpointError, match=r"made from other weights than the model has.*adopt=True"):
        load_table_state(other, tensors, meta)
    assert other.schedules == []
    load_table_state(other, tensors, meta, adopt=True)
    assert equal(loop("unet", rounded, inputs), expected)
    # Without them, the rounded weights show.
    other.clear()
    assert not equal(loop("unet", rounded, inputs), expected)


def _without(key: str) -> Any:
    return lambda tensors, meta: tensors.pop(key)


@pytest.mark.parametrize(
    ("harm", "match"),
    [
        (lambda tensors, meta: meta.update(schema_version=3), "schema_version must be at most 2, got 3"),
        (_without("0.timesteps"), "'0.timesteps' is missing"),
        (_without("0.0.values"), "'0.0.values' is missing"),
        (_without("weights"), "'weights' is missing"),
        (lambda tensors, meta: tensors.update({"0.0.values": tensors["0.0.values"][:1]}), "does not fit"),
        (lambda tensors, meta: meta["schedules"][0]["parts"][0]["columns"].update(nonsense=[0, 4]), "nonsense"),
        (lambda tensors, meta: meta["schedules"][0]["parts"][0].update(dtype="nonsense"), "does not fit"),
    ],
)
def test_damaged_tables_are_refused(harm, match):
    table = attach_table(tiny.build("unet"))
    given = {**inputs_for(table.model), "timestep": torch.tensor([0, 0])}
    table.prepare(given, scheduler_for("unet").timesteps)
    tensors, meta = table_state(table)
    meta = json.loads(json.dumps(meta))
    harm(tensors, meta)
    fresh = attach_table(tiny.build("unet"))
    with pytest.raises(CheckpointError, match=match):
        load_table_state(fresh, tensors, meta)
    assert fresh.schedules == []


def test_a_schedule_that_cannot_be_prepared():
    table = attach_table(tiny.build("unet_sdxl"))
    inputs = {**inputs_for(table.model), "timestep": torch.tensor(0)}
    inputs.pop("added_cond_kwargs")
    with pytest.raises(ModelStateError, match=r"the table could not be built.*NoneType"):
        table.prepare(inputs, scheduler_for("unet_sdxl").timesteps)
