"""CUDA graphs of denoiser calls, with a recorder that runs anywhere: what is copied, counted, refused and kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import diffuse_compress as dc
import tiny
from diffuse_compress.pipelines import graphs
from diffuse_compress.pipelines.graphs import CONSUMER, WARMING_UP, graphed_calls_of
from diffuse_compress.temporal.config import TableConfig
from diffuse_compress.temporal.lookup import CONSUMER as TABLE
from diffuse_compress.temporal.table import attach_table
from pipelines.cases import denoiser, sample, stock, with_mixin
from pipelines.tape import Tape

STEPS = 4
ON = {"cuda_graph": True, "steps": STEPS}


def counted(pipe: Any, method: str = CONSUMER) -> tuple[int, dict[str, int]]:
    """Calls that were replayed, and why others were not."""
    found = next(iter(pipe.compression_stats().components.values())).method(method)
    return found.hits, {reason.what: count for reason, count in found.misses.items()}


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "flux", "dit"])
def test_replays_have_the_bits_of_calls(name: str, recorders: list[Tape]) -> None:
    ours = with_mixin(stock(name))
    model = denoiser(ours)
    attach_table(model, TableConfig(exact=True))
    expected = sample(ours, steps=STEPS), sample(ours, steps=STEPS, seed=1)
    calls = STEPS * (2 if name in ("flux", "wan") else 1)
    assert torch.equal(sample(ours, **ON), expected[0])
    assert counted(ours) == (calls - 3, {WARMING_UP.what: 3})
    assert counted(ours, TABLE)[1] == {}
    for seed in (1, 0):
        assert torch.equal(sample(ours, **ON, seed=seed), expected[seed])
        assert counted(ours) == (calls, {})
        assert counted(ours, TABLE)[1] == {}
    assert recorders[0].recorded == 1
    assert "forward" not in model.__dict__
    assert torch.equal(sample(ours, steps=STEPS), expected[0])


def test_quantized_with_tables_and_other_prompts_and_steps(recorders: list[Tape]) -> None:
    ours = with_mixin(stock("pixart_alpha"))
    ours.compress("w8a8", dc.TFMQConfig(num_inference_steps=STEPS), measure=False)
    calls = [{"prompt": "a red cat"}, {"prompt": "a blue dog"}, {"steps": 4}, {"seed": 3}]
    expected = [sample(ours, **{"steps": STEPS, **call}) for call in calls]
    sample(ours, **ON)
    for call, reference in zip(calls, expected, strict=True):
        assert torch.equal(sample(ours, **{**ON, **call}), reference)
        assert counted(ours)[1] == {}
    assert recorders[0].recorded == 1


def test_every_shape_has_a_graph_of_its_own(recorders: list[Tape]) -> None:
    ours = with_mixin(stock("pixart_alpha"))
    expected = {side: sample(ours, steps=STEPS, side=side) for side in (32, 48)}
    for side in (32, 48, 32, 48):
        assert torch.equal(sample(ours, **ON, side=side), expected[side])
    assert counted(ours) == (STEPS, {})
    assert recorders[0].recorded == 2


def test_graphs_go_with_the_weights_that_they_read(recorders: list[Tape]) -> None:
    ours = with_mixin(stock("pixart_alpha"))
    sample(ours, **ON)
    ours.transformer.double()
    ours.transformer.float()
    sample(ours, **ON)
    assert counted(ours) == (STEPS - 3, {WARMING_UP.what: 3})
    ours.transformer.proj_out.weight.data.mul_(2)  # where they are
    expected = sample(ours, steps=STEPS)
    assert torch.equal(sample(ours, **ON), expected)
    assert counted(ours) == (STEPS, {})


def test_no_more_graphs_than_are_worth_their_memory(recorders: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST_KINDS", 1)
    ours = with_mixin(stock("pixart_alpha"))
    for side in (32, 48, 32):
        sample(ours, **ON, side=side)
    assert graphed_calls_of(ours.transformer).num_graphs == 1
    # It is known already, and recorded in its next call.
    assert counted(ours) == (STEPS - 1, {WARMING_UP.what: 1})


def refused(ours: Any, match: str, reference: torch.Tensor | None = None) -> None:
    """The call is computed, says why once, and counts."""
    expected = sample(ours, steps=STEPS) if reference is None else reference
    with pytest.warns(dc.DiffuseCompressWarning, match=match):
        assert torch.equal(sample(ours, **ON), expected)
    hits, misses = counted(ours)
    assert hits == 0
    assert sum(misses.values()) == STEPS
    assert torch.equal(sample(ours, **ON), expected)  # no second warning, which would be an error
    assert "forward" not in denoiser(ours).__dict__


@pytest.fixture
def pixart(recorders: list[Tape]) -> Any:
    return with_mixin(stock("pixart_alpha"))


def test_without_a_gpu_it_says_so() -> None:
    refused(with_mixin(stock("pixart_alpha")), "not on a CUDA device")


def test_hooks_inside_of_the_model_run(pixart: Any) -> None:
    seen = []
    handle = pixart.transformer.transformer_blocks[0].register_forward_hook(lambda *_: seen.append(1))
    refused(pixart, "a hook must run inside")
    assert len(seen) == 3 * STEPS
    handle.remove()
    sample(pixart, **ON)
    assert counted(pixart)[0] == STEPS - 3


def test_a_model_that_another_library_runs(pixart: Any) -> None:
    stock_forward = pixart.transformer.forward
    pixart.transformer.forward = lambda *args, **kwargs: stock_forward(*args, **kwargs)
    expected = sample(pixart, steps=STEPS)
    with pytest.warns(dc.DiffuseCompressWarning, match="replaced by another library"):
        assert torch.equal(sample(pixart, **ON), expected)
    assert "forward" in pixart.transformer.__dict__


def test_what_cannot_be_recorded_is_computed(pixart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, run: Any, device: torch.device) -> Any:
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Tape, "record", fail)
    attach_table(pixart.transformer, TableConfig(exact=True))
    expected = sample(pixart, steps=STEPS)
    with pytest.warns(dc.DiffuseCompressWarning, match="could not be recorded; the log says why"):
        assert torch.equal(sample(pixart, **ON), expected)
    assert counted(pixart, TABLE)[1] == {}


def test_parked_weights_that_come_back(pixart: Any) -> None:
    attach_table(pixart.transformer, TableConfig(exact=True, weights="cpu"))
    expected = sample(pixart, steps=STEPS)
    for _ in range(2):
        assert torch.equal(sample(pixart, **ON), expected)
    assert counted(pixart) == (STEPS, {})
    pixart.transformer.train()
    with (
        pytest.warns(dc.DiffuseCompressWarning, match="brought back first"),
        pytest.warns(dc.DiffuseCompressWarning, match="training mode"),
    ):
        sample(pixart, **ON)


def test_adapters_change(recorders: list[Tape]) -> None:
    peft = pytest.importorskip("peft")
    ours = with_mixin(stock("stable_diffusion"))
    ours.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False), "one")
    expected = {}
    for scale in (1.0, 0.5):
        ours.unet.set_adapters("one", weights=scale)
        expected[scale] = sample(ours, steps=STEPS)
    assert not torch.equal(*expected.values())
    for scale in (1.0, 0.5, 1.0):
        ours.unet.set_adapters("one", weights=scale)
        assert torch.equal(sample(ours, **ON), expected[scale])
    assert counted(ours) == (STEPS, {})
    assert recorders[0].recorded == 2


def test_settings_of_the_model_change(recorders: list[Tape]) -> None:
    ours = with_mixin(stock("stable_diffusion"))
    plain = sample(ours, **ON)
    ours.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    changed = sample(ours, steps=STEPS)
    assert not torch.equal(changed, plain)
    assert torch.equal(sample(ours, **ON), changed)
    assert counted(ours) == (STEPS - 3, {WARMING_UP.what: 3})
    assert torch.equal(sample(ours, **ON), changed)
    assert counted(ours) == (STEPS, {})
    ours.disable_freeu()
    assert torch.equal(sample(ours, **ON), plain)
    assert counted(ours) == (STEPS - 3, {WARMING_UP.what: 3})


def test_two_pipelines_share_graphs_and_threads_do_not_meet(pixart: Any, recorders: list[Tape]) -> None:
    other = with_mixin(stock("pixart_alpha"))
    other.transformer = pixart.transformer
    expected = [sample(pixart, steps=STEPS, seed=seed) for seed in range(2)]
    sample(pixart, **ON)
    assert torch.equal(sample(other, **ON, seed=1), expected[1])
    assert counted(other) == (STEPS, {})
    calls = graphed_calls_of(pixart.transformer)
    with calls._running:  # as if another thread were in it
        with pytest.warns(dc.DiffuseCompressWarning, match="two threads"):
            found = sample(pixart, **ON)
        assert torch.equal(found, expected[0])
    assert torch.equal(sample(pixart, **ON), expected[0])
    assert counted(pixart) == (STEPS, {})
    assert len(recorders) == 1


def test_copies_of_the_pipeline_record_for_themselves(pixart: Any) -> None:
    sample(pixart, **ON)
    twin = copy.deepcopy(pixart)
    expected = sample(twin, steps=STEPS)
    assert torch.equal(sample(twin, **ON), expected)
    assert counted(twin) == (STEPS - 3, {WARMING_UP.what: 3})


def test_one_tensor_at_two_places(recorders: list[Tape]) -> None:
    """What was one tensor when a call was recorded may be two in a later one."""

    class Adding(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return sample + 2 * other + timestep

    model = Adding()
    calls = graphed_calls_of(model)
    one, two = torch.ones(2, 3), torch.full((2, 3), 5.0)
    with torch.no_grad(), calls.used(model):
        for other in (one, one, one, one, two, two, two, two):
            one.add_(1)
            assert torch.equal(model(one, torch.tensor(1.0), other), one + 2 * other + 1)
    assert recorders[0].recorded == calls.num_graphs == 2


def test_a_call_with_gradients_has_them(recorders: list[Tape]) -> None:
    model = tiny.build("pixart")
    inputs = tiny.inputs_for(model)
    with graphed_calls_of(model).used(model), pytest.warns(dc.DiffuseCompressWarning, match="gradients are enabled"):
        assert model(**inputs).sample.requires_grad
