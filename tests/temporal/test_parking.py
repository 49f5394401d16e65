"""Weights leave their device while a table serves, and come back for the next table, for a state dict, for a copy."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

import tiny
from diffuse_compress.quantization.numerics import dequantize, quantize_weight
from diffuse_compress.quantization.scheme import NumberFormat, PerChannel, PerGroup, WeightScheme
from diffuse_compress.temporal.config import TableConfig, WeightPlace
from diffuse_compress.temporal.table import attach_table, detach_table, table_of
from temporal.loops import inputs_for, loop, reasons, stats

ROUNDED = {
    "int8": WeightScheme(NumberFormat.INT8, PerChannel()),
    "int4": WeightScheme(NumberFormat.INT4, PerGroup(128, pad=True)),
}


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def attached(place: str, tmp_path: Path | None = None) -> Any:
    model = tiny.build("flux")
    attach_table(model, TableConfig(exact=True, weights=place, work_dir=tmp_path and str(tmp_path)))
    return model


@pytest.mark.parametrize("place", ["cpu", "disk", "int8", "int4"])
def test_weights_leave_and_come_back_for_the_next_request(place, tmp_path):
    plain, model = tiny.build("flux"), attached(place, tmp_path)
    if place in ROUNDED:
        for name in table_of(model).lookups:
            weight = plain.get_submodule(name).weight
            weight.data = dequantize(quantize_weight(weight, ROUNDED[place]))
    dense = table_of(model).nbytes()["weights"]
    shapes = {key: tensor.shape for key, tensor in plain.state_dict().items()}
    for seed in (0, 1):
        inputs = inputs_for(model, seed=seed)
        assert equal(loop("flux", model, inputs), loop("flux", plain, inputs))
        assert reasons(model) == {}
        sizes = table_of(model).nbytes()
        biases = sum(lookup.layer.bias.nbytes for lookup in table_of(model).lookups.values())
        assert sizes["weights"] == biases
        expected = {"cpu": 1, "disk": 0, "int8": 1 / 4, "int4": 1 / 8}[place] * (dense - biases)
        assert expected <= sizes["parked"] <= expected * 1.1
    # A state dict has everything, and the next call goes on.
    state = model.state_dict()
    assert {key: tensor.shape for key, tensor in state.items()} == shapes
    assert all(torch.equal(tensor, plain.state_dict()[key]) for key, tensor in state.items())
    assert equal(loop("flux", model, inputs), loop("flux", plain, inputs))
    detach_table(model)
    assert equal(loop("flux", model, inputs), loop("flux", plain, inputs))
    assert not any(module._state_dict_pre_hooks for module in model.modules())
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())


@pytest.mark.parametrize("place", ["cpu", "disk", "int8"])
def test_a_live_call_has_its_weights(place):
    model, plain = attached(place), tiny.build("flux")
    inputs = inputs_for(model)
    if place == "int8":
        plain.load_state_dict(model.state_dict())
    loop("flux", model, inputs)
    given = {**inputs, "return_dict": False}
    assert any(lookup.parking.away for lookup in table_of(model).lookups.values())
    assert torch.equal(model(**given)[0], plain(**given)[0])  # no schedule, and gradients are enabled
    assert not any(lookup.parking.away for lookup in table_of(model).lookups.values())
    layer = model.norm_out.linear
    loop("flux", model, inputs)
    x = torch.randn(3, layer.in_features)
    assert torch.equal(layer(x), plain.norm_out.linear(x))


def test_saved_and_loaded_while_away(tmp_path):
    model, plain = attached("disk", tmp_path / "work"), tiny.build("flux")
    inputs = inputs_for(model)
    loop("flux", model, inputs)
    model.save_pretrained(tmp_path / "saved")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "saved").eval()
    assert equal(loop("flux", loaded, inputs), loop("flux", plain, inputs))
    other = tiny.build("flux", seed=1)
    loop("flux", model, inputs)
    model.load_state_dict(other.state_dict())
    assert equal(loop("flux", model, inputs), loop("flux", other, inputs))
    folder = tmp_path / "work"
    assert any(folder.iterdir())
    del model


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("place", ["cpu", "disk", "int4"])
def test_copies_have_weights_of_their_own(place, how):
    model = attached(place)
    inputs = inputs_for(model)
    expected = loop("flux", model, inputs)
    copied = how(model)
    detach_table(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert equal(loop("flux", copied, inputs), expected)
    assert stats(copied).hits == 3 * 11


@pytest.mark.parametrize("place", ["cpu", "disk", "int8"])
def test_weights_that_change_while_they_are_there(place):
    """What was kept of them is not taken for what they are now."""
    model, plain = attached(place), tiny.build("flux")
    inputs = inputs_for(model)
    loop("flux", model, inputs)
    model.state_dict()
    with torch.no_grad():
        for each in (model, plain):
            # As a merge does it: past the count of writes.
            each.norm_out.linear.weight.data += 0.25
    expected = loop("flux", plain, inputs)
    first = loop("flux", model, inputs)
    # Away and back again: what was kept is what they had become, rounded where that is asked for.
    again = loop("flux", model, inputs)
    if place == "int8":
        assert not equal(again, loop("flux", attached(place), inputs))
        assert max(float((a - b).abs().max() / b.std()) for a, b in zip(again, expected, strict=True)) < 0.05
        return
    assert equal(first, expected)
    assert equal(again, expected)


def test_a_cast_while_they_are_away():
    model, plain = attached("cpu"), tiny.build("flux")
    loop("flux", model, inputs_for(model))
    for each in (model, plain):
        each.to(torch.bfloat16)
    inputs = inputs_for(model)
    assert equal(loop("flux", model, inputs), loop("flux", plain, inputs))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_place_by_its_name():
    assert TableConfig(weights="disk").weights is WeightPlace.DISK
