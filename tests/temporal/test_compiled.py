"""Lookups in compiled blocks: one graph for a class of blocks, whatever the step, the prompt and the schedule."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import tiny
from diffuse_compress.temporal.config import TableConfig
from diffuse_compress.temporal.table import attach_table
from temporal.loops import inputs_for, loop, reasons, scheduler_for

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize(("name", "form"), [("flux", "live"), ("wan", "int8")])
def test_one_graph_for_all_steps_prompts_and_schedules(name, form):
    model = tiny.build(name)
    blocks = [*getattr(model, "single_transformer_blocks", model.blocks if name == "wan" else ())]
    table = attach_table(model, TableConfig(exact=True, table=form))
    prompts = inputs_for(model), inputs_for(model, seed=1)
    schedules = {count: loop(name, model, *prompts, scheduler=scheduler_for(name, count)) for count in (2, 3)}
    for block in blocks:
        block.compile(fullgraph=True, backend="eager")
    for count, expected in schedules.items():
        found = loop(name, model, *prompts, scheduler=scheduler_for(name, count))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert reasons(model) == {}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # Computed, the block is another graph, with the layers in it.
    table.model.train()
    with pytest.warns(match="training mode"):
        loop(name, model, prompts[0])
    assert counters["stats"]["unique_graphs"] == 2
