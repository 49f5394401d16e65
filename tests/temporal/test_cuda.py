"""On a GPU: no step waits for the device, and blocks in CUDA graphs look up what the step needs."""

from __future__ import annotations

import pytest
import torch

import tiny
from diffuse_compress.evaluation.denoiser_inputs import timestep_as_given
from diffuse_compress.temporal.config import TableConfig
from diffuse_compress.temporal.table import attach_table
from temporal.loops import inputs_for, loop, reasons, scheduler_for, stats
from tolerance import KERNEL, assert_close

pytestmark = pytest.mark.gpu


@torch.no_grad()
@pytest.mark.parametrize("form", ["live", "int8", "int4"])
@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_no_step_waits_for_the_device(name, form):
    model = tiny.build(name).cuda()
    attach_table(model, TableConfig(table=form))
    inputs = inputs_for(model)
    scheduler = scheduler_for(name, 4)
    scheduler.timesteps = scheduler.timesteps.cuda()
    for number, t in enumerate(scheduler.timesteps):
        given = timestep_as_given(model, t, 2)
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            output = model(**{**inputs, "timestep": given, "return_dict": False})[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scheduler.step(torch.zeros(1), t.cpu(), torch.zeros(1))
    assert output.isfinite().all()
    assert reasons(model) == {}
    assert stats(model).hits > 0


def test_blocks_in_cuda_graphs():
    def scheduler():
        found = scheduler_for("flux")
        found.timesteps = found.timesteps.cuda()
        return found

    model = tiny.build("flux").cuda()
    prompts = inputs_for(model), inputs_for(model, seed=1)
    expected = [loop("flux", model, prompt, scheduler=scheduler()) for prompt in prompts]
    attach_table(model, TableConfig(exact=True))
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        for prompt, outputs in zip(prompts, expected, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            found = loop("flux", model, prompt, scheduler=scheduler())
            for output, reference in zip(found, outputs, strict=True):
                assert_close(output, reference, KERNEL[torch.float32] * 10)
            assert reasons(model) == {}
