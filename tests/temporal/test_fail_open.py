"""Whatever changes under a table is computed, counted with its reason, and never looked up wrongly."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import nn

import tiny
from diffuse_compress.errors import ConfigError, DiffuseCompressWarning, ModelStateError
from diffuse_compress.evaluation.denoiser_inputs import timestep_as_given
from diffuse_compress.runtime import run, steps
from diffuse_compress.runtime.stats import PlanMissedError
from diffuse_compress.temporal import index, reasons, table
from diffuse_compress.temporal.config import TableConfig
from diffuse_compress.temporal.request import Conditions
from diffuse_compress.temporal.table import attach_table, detach_table, table_of
from temporal.loops import inputs_for, loop, scheduler_for, stats
from temporal.loops import reasons as missed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*temporal table saved:diffuse_compress.errors.DiffuseCompressWarning"),
    pytest.mark.usefixtures("fresh_thread"),
]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def attached(name: str, **config: Any) -> Any:
    model = tiny.build(name)
    attach_table(model, TableConfig(exact=True, **config))
    return model


@pytest.fixture
def hidden(monkeypatch):
    """Timesteps as on a device: their values cannot be read in the loop."""
    monkeypatch.setattr(run, "_readable", lambda timestep: None)
    monkeypatch.setattr(index, "host_value", lambda timestep: None)


@torch.no_grad()
def test_samples_at_different_timesteps_are_computed():
    model, plain = attached("dit"), tiny.build("dit")
    inputs = {**inputs_for(model), "return_dict": False}
    scheduler = scheduler_for("dit")
    for t in scheduler.timesteps:
        given = {**inputs, "timestep": torch.stack([t, t // 2 + 1])}
        output = model(**given)[0]
        assert torch.equal(output, plain(**given)[0])
        scheduler.step(output, t, output)
    assert missed(model) == {run.SEVERAL_ROWS.what: 3 * 7}
    assert stats(model).hits == 0


def _begun(count: int) -> EulerDiscreteScheduler:
    """A scheduler that says where the loop starts."""
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(count)
    scheduler.set_begin_index(0)
    return scheduler


@torch.no_grad()
def test_samples_at_different_timesteps_on_a_device_have_rows_of_their_own(hidden):
    """What the host cannot read is looked for on the device, sample by sample."""
    model, plain = attached("dit"), tiny.build("dit")
    inputs = {**inputs_for(model), "return_dict": False}
    scheduler = _begun(3)
    first, second, third = scheduler.timesteps.tolist()
    for t, given in ((first, [first, first]), (second, [second, third]), (third, [third, third])):
        inputs["timestep"] = torch.tensor(given)
        output = model(**inputs)[0]
        reference = plain(**inputs)[0]
        assert ((output - reference).abs().max() / reference.std()) < 1e-5
        scheduler.step(output, t, output)
    assert stats(model).hits == 3 * 7


@torch.no_grad()
def test_a_timestep_on_a_device_that_is_not_the_schedules_is_found_out(hidden, caplog):
    model, plain = attached("dit"), tiny.build("dit")
    inputs = {**inputs_for(model), "return_dict": False}
    scheduler = _begun(5)
    for number, t in enumerate(scheduler.timesteps):
        inputs["timestep"] = t.expand(2).clone() + (7 if number == 2 else 0)
        output = model(**inputs)[0]
        # The device answers when the call is on its way; from the next one on, everything is computed.
        if number > 2:
            assert torch.equal(output, plain(**inputs)[0])
        scheduler.step(output, t, output)
    assert missed(model) == {reasons.DOUBTED.what: 2 * 7}


def test_another_timestep_than_the_schedules():
    model, plain = attached("unet"), tiny.build("unet")
    inputs = {**inputs_for(model), "return_dict": False}
    scheduler = scheduler_for("unet", 4)
    outputs = []
    with torch.no_grad():
        for number, t in enumerate(scheduler.timesteps):
            # Within what the step protocol takes for rounding of whole numbers, and another value all the same.
            inputs["timestep"] = t.float() + (3e-5 if number == 2 else 0)
            outputs.append((model(**inputs)[0], plain(**inputs)[0]))
            scheduler.step(outputs[-1][0], t, outputs[-1][0])
    assert equal(*map(list, zip(*outputs, strict=True)))
    assert missed(model) == {reasons.UNKNOWN_FORM.what: 10}


@pytest.mark.parametrize("change", ["object", "write", "batch"])
@torch.no_grad()
def test_changed_conditions_get_tables_of_their_own(change):
    model, plain = attached("sd3"), tiny.build("sd3")
    inputs = {**inputs_for(model), "return_dict": False}
    scheduler = scheduler_for("sd3")
    for number, t in enumerate(scheduler.timesteps):
        if number == 1 and change == "object":
            inputs["pooled_projections"] = inputs["pooled_projections"] + 1
        elif number == 1 and change == "write":
            inputs["pooled_projections"].add_(1)
        elif number == 1:
            inputs = {**inputs_for(model, batch=1), "return_dict": False}
        inputs["timestep"] = t.expand(len(inputs["pooled_projections"]))
        output = model(**inputs)[0]
        assert torch.equal(output, plain(**inputs)[0])
        scheduler.step(torch.zeros(1), t, torch.zeros(1))
    assert missed(model) == {}


def test_conditions_are_told_by_identity_and_writes():
    text, other = torch.ones(2, 3), torch.ones(2, 3)
    values = {"text": text, "sizes": {"a": [text, 1.5], "b": None}, "scale": 2}
    known = Conditions(values)
    assert known.match({"text": text, "sizes": {"a": [text, 1.5], "b": None}, "scale": 2})
    for changed in (
        {**values, "text": other},
        {**values, "text": None},
        {**values, "scale": 3},
        {**values, "scale": 2.0},
        {**values, "sizes": {"a": [text, 1.5]}},
        {**values, "more": 1},
        {name: value for name, value in values.items() if name != "scale"},
    ):
        assert not known.match(changed)
    both = torch.cat([text, text])
    assert Conditions([both[:2]]).match([both[:2]])
    assert not Conditions([both[:2]]).match([both[2:]])
    assert not Conditions([both[:2]]).match([both[:2].clone()])
    text.add_(0)
    assert not known.match(values)


@torch.no_grad()
def test_a_view_of_the_same_tensor_is_the_same_condition():
    model = attached("sd3")
    inputs = {**inputs_for(model), "return_dict": False}
    both, scheduler = torch.cat([inputs["pooled_projections"]] * 2), scheduler_for("sd3")
    kept = []
    for t in scheduler.timesteps:
        model(**{**inputs, "pooled_projections": both[2:], "timestep": t.expand(2)})
        (current,) = steps._thread.scopes[0].runs
        kept.append(current.storage(steps.tracker_of(model))[table_of(model)])
        scheduler.step(torch.zeros(1), t, torch.zeros(1))
    assert [len(progress.requests) for progress in kept] == [1, 1, 1]


@torch.no_grad()
def test_conditions_of_every_step_are_computed():
    """New tables for all timesteps, for one call each, would cost more than the call."""
    model, plain = attached("unet_sd1"), tiny.build("unet_sd1")
    inputs = {**inputs_for(model), "return_dict": False}
    scheduler = scheduler_for("unet_sd1", 6)
    for t in scheduler.timesteps:
        inputs = {**inputs, "timestep": t, "encoder_hidden_states": inputs["encoder_hidden_states"] * 1.01}
        output = model(**inputs)[0]
        assert torch.equal(output, plain(**inputs)[0])
        scheduler.step(output, t, output)
    assert missed(model) == {reasons.CHANGING.what: 3 * 8}
    assert stats(model).hits == 6 * 10 + 3 * 8


def test_gradients_training_and_an_unknown_place():
    model, plain = attached("unet"), tiny.build("unet")
    inputs = {**inputs_for(model), "return_dict": False, "timestep": torch.tensor(999)}
    scheduler = scheduler_for("unet", 1)
    output = model(**{**inputs, "timestep": scheduler.timesteps[0]})[0]
    assert output.requires_grad
    assert missed(model) == {steps.GRADIENT.what: 10}
    model.train()
    scheduler = scheduler_for("unet", 1)
    with torch.no_grad():
        model(**{**inputs, "timestep": scheduler.timesteps[0]})
        assert missed(model) == {reasons.TRAINING.what: 10}
        model.eval()
        steps._thread.scopes[0].runs.clear()
        assert torch.equal(model(**inputs)[0], plain(**inputs)[0])
    assert missed(model)[steps.NO_SCHEDULE.what] == 10


@torch.no_grad()
def test_per_token_timesteps_are_computed():
    """Wan 2.2 hands every token its timestep, 0 for the given frame."""
    model, plain = attached("wan"), tiny.build("wan")
    inputs = {**inputs_for(model), "return_dict": False}
    scheduler = scheduler_for("wan", 2)
    for t in scheduler.timesteps:
        inputs["timestep"] = torch.cat([torch.zeros(2, 16), t.expand(2, 16)], dim=1)
        output = model(**inputs)[0]
        assert torch.equal(output, plain(**inputs)[0])
        scheduler.step(output, t, output)
    assert missed(model) == {reasons.PER_TOKEN.what: 2 * 9}


@torch.no_grad()
def test_a_layer_that_is_called_with_other_rows(monkeypatch):
    model, plain = attached("unet"), tiny.build("unet")
    for each in (model, plain):
        stock = each.get_class_embed if hasattr(each, "get_class_embed") else None
        assert stock is None  # else a simpler way to widen the embedding
        block = each.mid_block.resnets[0]
        forward = type(block).forward
        monkeypatch.setattr(
            block, "forward", lambda x, temb, block=block, forward=forward: forward(block, x, temb[:1]), raising=False
        )
    inputs = inputs_for(model)
    assert equal(loop("unet", model, inputs), loop("unet", plain, inputs))
    loop("unet", model, inputs)
    assert missed(model) == {reasons.OTHER_SHAPE.what: 3}
    assert stats(model).hits == 3 * 9


def _lora(model: Any, targets: list[str], seed: int = 0) -> None:
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name="a")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.requires_grad_(False)


@pytest.mark.parametrize(
    ("targets", "live"),
    [
        (["to_k"], 4),  # of eight layers that read the text, half; and those of self-attention, which have no table
        (["time_emb_proj"], 8),
        (["linear_1"], 18),  # what feeds all others
    ],
)
def test_adapters(targets, live):
    model, plain = tiny.build("unet_sd1"), tiny.build("unet_sd1")
    attach_table(model, TableConfig(exact=True))
    inputs = inputs_for(model)
    bare = loop("unet_sd1", model, inputs)
    for each in (model, plain):
        _lora(each, targets)
    expected = loop("unet_sd1", plain, inputs)
    assert equal(loop("unet_sd1", model, inputs), expected)
    assert not equal(expected, bare)
    assert missed(model) == {reasons.ADAPTED.what: 3 * live}
    # Merged and taken off, the layers have other weights, which torch does not count as a write.
    for each in (model, plain):
        each.fuse_lora()
        each.unload_lora() if hasattr(each, "unload_lora") else _unload(each)
    assert table_of(model) is not None
    assert equal(loop("unet_sd1", model, inputs), loop("unet_sd1", plain, inputs))
    assert missed(model) == {}


def _unload(model: nn.Module) -> None:
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)


def test_weights_that_are_written_to():
    model, plain = attached("unet"), tiny.build("unet")
    inputs = inputs_for(model)
    loop("unet", model, inputs)
    for each in (model, plain):
        with torch.no_grad():
            each.time_embedding.linear_2.weight.mul_(1.5)
    assert equal(loop("unet", model, inputs), loop("unet", plain, inputs))
    assert missed(model) == {}
    assert len(table_of(model).schedules) == 1


@torch.no_grad()
def test_weights_that_are_written_to_within_a_run():
    model, plain = attached("unet_sdxl"), tiny.build("unet_sdxl")
    inputs = {**inputs_for(model), "return_dict": False}
    scheduler = scheduler_for("unet_sdxl", 2)
    for t in scheduler.timesteps:
        output = model(**{**inputs, "timestep": t})[0]
        assert torch.equal(output, plain(**{**inputs, "timestep": t})[0])
        for each in (model, plain):
            each.add_embedding.linear_1.weight.mul_(1.5)
        scheduler.step(output, t, output)


def test_a_cast_to_another_dtype_and_back():
    model, plain = attached("pixart"), tiny.build("pixart")
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for each in (model, plain):
            each.to(dtype)
        inputs = inputs_for(model)
        assert equal(loop("pixart", model, inputs), loop("pixart", plain, inputs))
        assert missed(model) == {}


@torch.no_grad()
def test_autocast_has_tables_of_its_own():
    model, plain = attached("pixart"), tiny.build("pixart")
    inputs = inputs_for(model)
    loop("pixart", model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(loop("pixart", model, inputs), loop("pixart", plain, inputs))
    assert len(table_of(model).schedules) == 2


def test_inference_mode():
    model, plain = attached("sd3"), tiny.build("sd3")
    with torch.inference_mode():
        inputs = inputs_for(model)
        assert equal(loop("sd3", model, inputs), loop("sd3", plain, inputs))
    assert missed(model) == {}
    assert equal(loop("sd3", model, inputs_for(model)), loop("sd3", plain, inputs_for(model)))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_tables_of_their_own(how):
    model, plain = attached("sd3"), tiny.build("sd3")
    inputs = inputs_for(model)
    expected = loop("sd3", model, inputs)
    copied = how(model)
    assert table_of(copied) is not table_of(model)
    assert all(lookup.layer is copied.get_submodule(name) for name, lookup in table_of(copied).lookups.items())
    with torch.no_grad():
        for each in (copied, plain):
            each.norm_out.linear.weight.mul_(2)
    assert equal(loop("sd3", copied, inputs), loop("sd3", plain, inputs))
    assert missed(copied) == {}
    assert equal(loop("sd3", model, inputs), expected)
    detach_table(copied)
    assert table_of(model) is not None


def test_an_interrupt_leaves_nothing_behind():
    model, plain = attached("dit"), tiny.build("dit")
    inputs = inputs_for(model)

    def explode(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.transformer_blocks[1].register_forward_pre_hook(explode)
    with pytest.raises(KeyboardInterrupt):
        loop("dit", model, inputs)
    handle.remove()
    assert equal(loop("dit", model, inputs), loop("dit", plain, inputs))
    assert missed(model) == {}
    assert all(lookup.value is None for lookup in table_of(model).lookups.values())
    assert steps.current() is None


def test_a_build_that_fails_is_no_failure_of_the_call(monkeypatch, caplog):
    model, plain = attached("dit"), tiny.build("dit")
    inputs = inputs_for(model)
    monkeypatch.setattr(table, "build", lambda *args: 1 / 0)
    assert equal(loop("dit", model, inputs), loop("dit", plain, inputs))
    assert missed(model) == {reasons.FAILED.what: 3 * 7}
    assert caplog.text.count("ZeroDivisionError") == 1
    monkeypatch.undo()
    loop("dit", model, inputs)
    assert missed(model) == {}


@torch.no_grad()
def test_two_threads_compute():
    model, plain = attached("unet"), tiny.build("unet")
    inputs = {**inputs_for(model), "return_dict": False}
    scheduler = scheduler_for("unet", 2)
    found: dict[str, Any] = {}

    def other() -> None:
        with torch.no_grad():
            mine = scheduler_for("unet", 2)
            found["output"] = model(**{**inputs, "timestep": mine.timesteps[1]})[0]
            found["reasons"] = missed(model)

    def meanwhile(*_: Any) -> None:
        if not found:
            found["began"] = True
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    handle = model.down_blocks[0].register_forward_pre_hook(meanwhile)
    output = model(**{**inputs, "timestep": scheduler.timesteps[0]})[0]
    handle.remove()
    assert torch.equal(output, plain(**{**inputs, "timestep": scheduler.timesteps[0]})[0])
    assert torch.equal(found["output"], plain(**{**inputs, "timestep": scheduler.timesteps[1]})[0])
    assert found["reasons"] == {reasons.TWO_THREADS.what: 10}


def test_a_warning_says_what_was_not_looked_up():
    model = tiny.build("unet")
    attach_table(model)
    model.train()
    with pytest.warns(DiffuseCompressWarning, match=r"temporal table saved 0 of 30 .*training mode.*model\.eval"):
        loop("unet", model, inputs_for(model))
    detach_table(model)
    attach_table(model, TableConfig(strict=True))
    with pytest.raises(PlanMissedError, match="training mode"):
        loop("unet", model, inputs_for(model))


def test_no_value_is_read_back(monkeypatch):
    """No `.item()` once the tables are built: it would make the host wait for the device."""
    model = tiny.build("flux")
    attach_table(model)
    forbidden: list[str] = []
    active = [False]
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
            if active[0] and "temporal" in inspect.currentframe().f_back.f_code.co_filename:
                forbidden.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    monkeypatch.setattr(run, "_readable", lambda timestep: None)
    monkeypatch.setattr(index, "host_value", lambda timestep: None)
    # The answer to a doubt is read when the device has given it; here it always has.
    monkeypatch.setattr(index.Index, "doubted", lambda self: False)
    prompts = inputs_for(model), inputs_for(model, seed=1)
    scheduler = scheduler_for("flux", 4)
    with torch.no_grad():
        for number, t in enumerate(scheduler.timesteps):
            active[0] = number > 0
            for prompt in prompts:
                output = model(**{**prompt, "timestep": timestep_as_given(model, t, 2), "return_dict": False})[0]
            active[0] = False
            scheduler.step(output, t, output)
    # Nothing tells the first step's second call from a restarted loop (step protocol).
    assert stats(model).hits == (4 * 2 - 1) * 11
    assert forbidden == []


def test_what_cannot_have_a_table():
    with pytest.raises(ConfigError, match=r"Linear: temporal tables need.*known: UNet2DModel.*generic_family"):
        attach_table(nn.Linear(2, 2))
    model = tiny.build("unet")
    with pytest.raises(ConfigError, match=r"TableConfig\.skip: pattern 'nonsense' matches no layer"):
        attach_table(model, TableConfig(skip=("nonsense",)))
    assert not model._forward_pre_hooks
    attach_table(model)
    with pytest.raises(ModelStateError, match="has a temporal table; call detach_table"):
        attach_table(model)
    with torch.device("meta"):
        empty = tiny.MODELS["unet"]()
    with pytest.raises(ModelStateError, match="loaded weights"):
        attach_table(empty)
    for wrong, match in (
        ({"table": "int3"}, "table='int3' is unknown.*int4"),
        ({"weights": "gpu"}, "weights='gpu' is unknown"),
        ({"exact": "yes"}, "exact must be True, False or None"),
        ({"max_schedules": 0}, "max_schedules must be a positive"),
    ):
        with pytest.raises(ConfigError, match=match):
            TableConfig(**wrong)


def test_layers_left_out_as_asked():
    model, plain = attached("unet_sd1", conditions=False, skip=("mid_block",)), tiny.build("unet_sd1")
    found = table_of(model)
    assert {"conditions=False", "skipped as asked"} == set(found.left.values())
    inputs = inputs_for(model)
    assert equal(loop("unet_sd1", model, inputs), loop("unet_sd1", plain, inputs))
    assert missed(model) == {}
    assert stats(model).hits == stats(model).planned == 3 * 8


def test_an_attention_processor_that_nothing_is_known_of():
    model, plain = attached("unet_sd1"), tiny.build("unet_sd1")

    class Mine(type(model.mid_block.attentions[0].transformer_blocks[0].attn2.processor)):  # type: ignore[misc]
        def __call__(self, attn: Any, x: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
            if encoder_hidden_states is not None:
                encoder_hidden_states = encoder_hidden_states * 0.5
            return super().__call__(attn, x, encoder_hidden_states, **kwargs)

    inputs = inputs_for(model)
    for each in (model, plain):
        each.mid_block.attentions[0].transformer_blocks[0].attn2.processor = Mine()
    assert equal(loop("unet_sd1", model, inputs), loop("unet_sd1", plain, inputs))
    assert missed(model) == {reasons.OTHER_PROCESSOR.what: 3 * 2}


def test_the_scheduler_is_left_alone():
    model = attached("unet")
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    names = set(vars(scheduler))
    loop("unet", model, inputs_for(model), scheduler=scheduler)
    assert set(vars(scheduler)) <= names | {"_step_index"}
