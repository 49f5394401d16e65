"""Input scales of every step: the layers hold those of the call's timestep, and between calls what they held before."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import diffuse_compress as dc
import tiny
from diffuse_compress.errors import CheckpointError, ModelStateError
from diffuse_compress.quantization.convert import replace_module
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear
from diffuse_compress.quantization.numerics import qparams_from_range, quantize_weight
from diffuse_compress.runtime import steps
from diffuse_compress.runtime.stats import MethodStats
from diffuse_compress.temporal.config import Scope, TableConfig
from diffuse_compress.temporal.finite_set import StepRanges
from diffuse_compress.temporal.step_scales import (
    CONSUMER,
    StepQParams,
    StepScales,
    _bounds,
    _row_there,
    attach_step_scales,
    detach_step_scales,
    static_layers,
    step_scales_of,
)
from diffuse_compress.temporal.table import attach_table
from temporal.loops import inputs_for, loop, scheduler_for

SYMMETRIC = dc.ActivationScheme("int8", dc.PerTensor(), dynamic=False)
ASYMMETRIC = dc.ActivationScheme("int8", dc.PerTensor(), dynamic=False, symmetric=False)
TIMESTEPS = (1.0, 251.0, 501.0, 751.0)

pytestmark = pytest.mark.usefixtures("fresh_thread")


def static(name: str, seed: int = 0) -> Any:
    """A model with static inputs in every layer that takes them, every third of them with zero points."""
    model = tiny.build(name).eval()
    generator = torch.Generator().manual_seed(seed)
    dense = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    for number, (layer, module) in enumerate(dense.items()):
        act = ASYMMETRIC if number % 3 == 0 else SYMMETRIC
        scheme = dc.Scheme(dc.WeightScheme("int8"), act)
        given: dict[str, Any] = {"input_scale": 0.02 + 0.02 * torch.rand(1, generator=generator)}
        if act is ASYMMETRIC:
            given["input_zero_point"] = torch.randint(-40, 40, (1,), generator=generator, dtype=torch.int8)
        kind: Any = QuantizedLinear if isinstance(module, nn.Linear) else QuantizedConv2d
        codes = quantize_weight(module.weight.detach().flatten(1), scheme.weight)
        replace_module(model, layer, kind.from_dense(module, codes, scheme, **given))
    return model


def random_qparams(model: Any, timesteps: tuple[float, ...] = TIMESTEPS, seed: int = 1) -> StepQParams:
    generator = torch.Generator().manual_seed(seed)
    layers = static_layers(model)
    asymmetric = tuple(name for name, layer in layers.items() if layer.input_zero_point is not None)
    scale = 0.01 + 0.04 * torch.rand(len(layers), len(timesteps), generator=generator)
    zero_point = torch.randint(-60, 60, (len(asymmetric), len(timesteps)), generator=generator, dtype=torch.int8)
    return StepQParams(Scope.ALL, timesteps, tuple(layers), asymmetric, scale, zero_point)


def by_hand(model: Any, qparams: StepQParams, timestep: float | None) -> Any:
    """A model whose layers hold a timestep's row, written in one by one."""
    other = copy.deepcopy(model)
    if timestep is not None:
        column = min(range(len(qparams.timesteps)), key=lambda i: abs(qparams.timesteps[i] - timestep))
        layers = static_layers(other)
        for row, name in enumerate(qparams.layers):
            layers[name].input_scale.data.fill_(float(qparams.scale[row, column]))
        for row, name in enumerate(qparams.asymmetric):
            layers[name].input_zero_point.data.fill_(int(qparams.zero_point[row, column]))
    return other


def equal_states(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def held(model: Any) -> dict[str, torch.Tensor]:
    """What the layers hold now, past the hooks of state dicts."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".input_" in name}


def given(model: Any, timestep: Any, seed: int = 0, batch: int = 2) -> dict[str, Any]:
    return {**inputs_for(model, batch=batch, seed=seed), "timestep": timestep, "return_dict": False}


def stats_of(model: Any) -> MethodStats:
    return steps.tracker_of(model).last.method(CONSUMER)


# --- which row ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [TIMESTEPS, (7.0,), (0.02, 0.5, 0.98), (-1.5, 0.0, 0.3, 1.6)])
def test_a_row_is_that_of_the_nearest_timestep_on_host_and_device(timesteps):
    scales = StepScales.__new__(StepScales)
    scales._bounds = _bounds(timesteps)
    reach = 1e-6 if len(timesteps) == 1 else 0.0
    low, high = timesteps[0], timesteps[-1]
    low -= reach if reach else timesteps[1] - timesteps[0]
    high += reach if reach else timesteps[-1] - timesteps[-2]
    span = max(1.0, high - low)
    values = (low - 0.3 * span + 1.6 * span * torch.rand(200, generator=torch.Generator().manual_seed(0))).tolist()
    bounds = torch.tensor(scales._bounds, dtype=torch.float32)
    for value in [*values, *timesteps]:
        value = float(torch.tensor(value, dtype=torch.float32))
        distances = [abs(value - known) for known in timesteps]
        expected = 0 if value < low or value > high else 1 + distances.index(min(distances))
        assert scales.place(value) == expected, value
        assert scales.place(torch.full((3,), value)) == expected
        assert int(_row_there(torch.full((3,), value), bounds)) == expected
    if len(timesteps) > 1:
        mixed = torch.tensor([timesteps[0], timesteps[-1]])
        assert scales.place(mixed) == 0
        assert int(_row_there(mixed, bounds)) == 0
    assert scales.place(float("nan")) == 0
    assert int(_row_there(torch.tensor([float("nan")]), bounds)) == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["unet", "flux", "wan"])
def test_a_call_computes_with_the_scales_of_its_timestep(name):
    model, timesteps = static(name), TIMESTEPS
    plain = copy.deepcopy(model)
    before = plain.state_dict()
    if name == "flux":
        timesteps = tuple(t / 1000 for t in TIMESTEPS)
    qparams = random_qparams(model, timesteps)
    attach_step_scales(model, qparams)
    unit = timesteps[1] - timesteps[0]
    asked = [*timesteps, timesteps[0] + 0.2 * unit, timesteps[-1] + 0.9 * unit]
    for seed, timestep in enumerate(asked):
        inputs = given(model, torch.full((2,), timestep), seed)
        assert torch.equal(model(**inputs)[0], by_hand(plain, qparams, timestep)(**inputs)[0]), timestep
        assert equal_states(held(model), held(plain))
    outside = given(model, torch.full((2,), timesteps[-1] + 1.1 * unit))
    assert torch.equal(model(**outside)[0], plain(**outside)[0])
    assert not torch.equal(model(**inputs)[0], plain(**inputs)[0])
    assert equal_states(model.state_dict(), before)
    detach_step_scales(model)
    assert step_scales_of(model) is None
    assert not model._forward_pre_hooks
    assert not model._state_dict_pre_hooks
    assert not model._load_state_dict_pre_hooks


@torch.no_grad()
def test_samples_of_several_steps_and_gradients_use_the_ranges_of_all_steps():
    model = static("unet")
    plain = copy.deepcopy(model)
    attach_step_scales(model, random_qparams(model))
    mixed = given(model, torch.tensor([1.0, 751.0]))
    assert torch.equal(model(**mixed)[0], plain(**mixed)[0])
    inputs = given(model, 501)  # a number
    assert not torch.equal(model(**inputs)[0], plain(**inputs)[0])
    with torch.enable_grad():
        sample = inputs["sample"].clone().requires_grad_()
        output = model(**{**inputs, "sample": sample})[0]
        assert torch.equal(output, plain(**inputs)[0])
        output.sum().backward()
    assert sample.grad is not None
    assert stats_of(model).misses[steps.GRADIENT] == len(static_layers(model))


# --- what the layers hold otherwise ---------------------------------------------------------------------------------


class _StopError(BaseException):
    """As KeyboardInterrupt: torch calls no hook after it."""


@torch.no_grad()
def test_an_interrupted_call_leaves_no_row_behind(tmp_path):
    model = static("unet")
    plain = copy.deepcopy(model)
    qparams = random_qparams(model)
    attach_step_scales(model, qparams)
    inputs = given(model, torch.tensor(501))

    def stop(*args: Any) -> None:
        raise _StopError

    for look in ("state", "copy", "load", "detach", "call"):
        handle = model.mid_block.register_forward_hook(stop)
        with pytest.raises(_StopError):
            model(**inputs)
        handle.remove()
        assert not equal_states(held(model), held(plain)), "the call was to be interrupted in between"
        if look == "state":
            assert equal_states(model.state_dict(), plain.state_dict())
        elif look == "copy":
            other = copy.deepcopy(model)
            assert torch.equal(other(**inputs)[0], by_hand(plain, qparams, 501)(**inputs)[0])
            assert equal_states(held(other), held(plain))
        elif look == "load":
            model.load_state_dict(plain.state_dict())
        elif look == "detach":
            detach_step_scales(model)
            assert steps.current() is None
            assert equal_states(held(model), held(plain))
            attach_step_scales(model, qparams)
        if look != "state":
            assert torch.equal(model(**inputs)[0], by_hand(plain, qparams, 501)(**inputs)[0])
        assert equal_states(held(model), held(plain))


@torch.no_grad()
def test_copies_pickles_and_other_weights_have_their_own():
    model = static("unet")
    plain, qparams = copy.deepcopy(model), random_qparams(model)
    attach_step_scales(model, qparams)
    inputs, far = given(model, torch.tensor(251)), given(model, torch.tensor([1, 751]))
    expected = by_hand(plain, qparams, 251)(**inputs)[0]
    assert torch.equal(model(**inputs)[0], expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert step_scales_of(other) is not step_scales_of(model)
        assert torch.equal(other(**inputs)[0], expected)
        detach_step_scales(other)
        assert torch.equal(other(**inputs)[0], plain(**inputs)[0])
    assert torch.equal(model(**inputs)[0], expected)
    replaced = static("unet", seed=5)
    model.load_state_dict(replaced.state_dict())
    assert torch.equal(model(**far)[0], replaced(**far)[0])
    assert torch.equal(model(**inputs)[0], by_hand(replaced, qparams, 251)(**inputs)[0])
    assert equal_states(model.state_dict(), replaced.state_dict())
    model.to(torch.bfloat16)
    half = by_hand(replaced, qparams, 251).to(torch.bfloat16)
    low = {**inputs, "sample": inputs["sample"].bfloat16()}
    assert torch.equal(model(**low)[0], half(**low)[0])


def test_two_threads_use_the_ranges_of_all_steps():
    model = static("unet")
    plain, qparams = copy.deepcopy(model), random_qparams(model)
    attach_step_scales(model, qparams)
    entered, go = threading.Event(), threading.Event()
    outputs: dict[str, torch.Tensor] = {}

    def wait(module: nn.Module, args: Any) -> None:
        if threading.current_thread().name == "first":
            entered.set()
            go.wait(10)

    handle = model.mid_block.register_forward_pre_hook(wait)

    def run(timestep: int) -> None:
        with torch.no_grad():
            outputs[threading.current_thread().name] = model(**given(model, torch.tensor(timestep)))[0]

    first = threading.Thread(target=run, args=(251,), name="first")
    first.start()
    assert entered.wait(10)
    second = threading.Thread(target=run, args=(751,), name="second")
    second.start()
    second.join(10)
    go.set()
    first.join(10)
    handle.remove()
    with torch.no_grad():
        inputs = given(model, torch.tensor(751))
        assert torch.equal(outputs["second"], plain(**inputs)[0])
        assert equal_states(held(model), held(plain))
        assert torch.equal(model(**inputs)[0], by_hand(plain, qparams, 751)(**inputs)[0])


# --- with tables, and compiled --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", "unet"])
@pytest.mark.parametrize("exact", [True, None])
@pytest.mark.parametrize("scales_first", [True, False])
def test_rows_of_tables_are_computed_with_the_scales_of_their_step(name, exact, scales_first):
    """Loops with tables give the bits of loops without, in whatever order both were attached."""
    model = static(name)
    timesteps = tuple(sorted(float(t) for t in scheduler_for(name, 4).timesteps))
    qparams = random_qparams(model, timesteps)
    plain = copy.deepcopy(model)
    attach_step_scales(plain, qparams)
    for first in (scales_first, not scales_first):
        if first:
            attach_step_scales(model, qparams)
        else:
            table = attach_table(model, TableConfig(exact=exact))
    inputs = inputs_for(model, seed=3)
    expected = loop(name, plain, inputs, scheduler=scheduler_for(name, 4))
    for _ in range(2):
        found = loop(name, model, inputs, scheduler=scheduler_for(name, 4))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    counted = steps.tracker_of(model).last.methods
    assert counted["temporal table"].hits == counted["temporal table"].planned > 0
    assert counted[CONSUMER].hits == 4 * len(qparams.layers)
    assert len(table.schedules) == 1, "tables are not made again because scales are written"


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_are_one_graph_for_all_steps():
    model = static("flux")
    timesteps = tuple(sorted(float(t) / 1000 for t in scheduler_for("flux", 3).timesteps))
    attach_step_scales(model, random_qparams(model, timesteps))
    inputs = inputs_for(model)
    expected = loop("flux", model, inputs)
    for block in model.single_transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    found = loop("flux", model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert counters["stats"]["unique_graphs"] == 1


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model = static("unet")
    qparams, hooks = random_qparams(model), dict(model._forward_pre_hooks)
    tensors, meta = qparams.to_tensors()
    back = StepQParams.from_tensors(tensors, meta)
    assert (back.layers, back.asymmetric, back.timesteps) == (qparams.layers, qparams.asymmetric, TIMESTEPS)
    assert torch.equal(back.scale, qparams.scale)
    assert torch.equal(back.zero_point, qparams.zero_point)
    with pytest.raises(CheckpointError, match="'zero_point' must be of"):
        StepQParams.from_tensors({**tensors, "zero_point": tensors["zero_point"][1:]}, meta)
    with pytest.raises(CheckpointError, match=r"'scale' must be of .* found None"):
        StepQParams.from_tensors({"timesteps": tensors["timesteps"]}, meta)
    with pytest.raises(ModelStateError, match="conv_in has no static input"):
        attach_step_scales(tiny.build("unet"), qparams)
    assert dict(model._forward_pre_hooks) == hooks
    attach_step_scales(model, qparams)
    with pytest.raises(ModelStateError, match="has step scales"):
        attach_step_scales(model, qparams)
    with pytest.raises(ModelStateError, match="was reached"):
        StepRanges(static_layers(model)).qparams(Scope.ALL)


def test_ranges_are_those_of_what_was_seen_at_each_timestep():
    model = static("unet")
    layers, generator = static_layers(model), torch.Generator().manual_seed(3)
    names = ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2"]
    ranges = StepRanges({name: layers[name] for name in names})
    values: dict[tuple[str, float], list[torch.Tensor]] = {}
    for name in names:
        for timestep in (5.0, 1.0, 5.0):
            x = torch.randn(2, 3, 4, 4, generator=generator) * (1 + timestep)
            values.setdefault((name, timestep), []).append(x)
            ranges.update(name, timestep, x)
    ranges.update("conv_in", 9.0, torch.ones(1))
    found = ranges.qparams(Scope.ALL)
    assert found.timesteps == (1.0, 5.0, 9.0)
    for row, name in enumerate(found.layers):
        act = layers[name].scheme.activation
        for column, timestep in enumerate((1.0, 5.0)):
            seen = torch.cat(values[name, timestep]).flatten()
            low, high = seen.min().clamp(max=0).reshape(1), seen.max().clamp(min=0).reshape(1)
            expected = qparams_from_range(low, high, act)
            assert float(found.scale[row, column]) == float(expected.scale)
            if name in found.asymmetric:
                zero = found.zero_point[found.asymmetric.index(name), column]
                assert int(zero) == int(expected.zero_point)
    # Of a timestep at which a layer was not seen, it keeps its own.
    row = found.layers.index("time_embedding.linear_1")
    assert float(found.scale[row, 2]) == float(layers["time_embedding.linear_1"].input_scale)
