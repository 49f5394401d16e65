"""Probing finds what depends on the timestep and the condition, in known and in unknown classes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny
from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.families.base import Dependence
from diffuse_compress.families.generic import generic_family, probe
from diffuse_compress.families.registry import family_of
from families import unknown_classes
from temporal.loops import CASES, IDS


@pytest.mark.parametrize(("name", "config"), CASES, ids=IDS)
def test_the_written_maps_are_what_probing_finds(name, config):
    model = tiny.build(name, **config)
    found = probe(model, tiny.inputs_for(model))
    family = family_of(model)
    temporal = family.temporal(model)
    written = {layer: temporal.of(layer) for layer in found.dependence}
    wrong = {
        layer: (dependence, written[layer])
        for layer, dependence in found.dependence.items()
        if dependence != written[layer]
    }
    assert wrong == {}
    assert {Dependence.TIMESTEP, Dependence.TIMESTEP_AND_CONDITION} & set(found.dependence.values())
    # Blocks may be finer than the elements of the model's lists, but come in their order.
    blocks = family.blocks(model)
    coarse = [next(block for block in found.blocks if f"{name}.".startswith(f"{block}.")) for name in blocks]
    assert list(dict.fromkeys(coarse)) == [block for block in found.blocks if block in coarse]


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_generic_map_says_what_probing_found(name):
    model = tiny.build(name)
    found = probe(model, tiny.inputs_for(model))
    assert Dependence.SAMPLE in found.dependence.values()
    temporal = generic_family(model, found).temporal(model)
    assert {layer: temporal.of(layer) for layer in found.dependence} == found.dependence
    family = family_of(model)
    if family is not None:
        assert {layer: family.temporal(model).of(layer) for layer in found.dependence} == found.dependence


@pytest.mark.parametrize("name", unknown_classes.unknown_classes())
def test_unknown_classes(name):
    model = unknown_classes.build(name).eval()
    assert family_of(model) is None
    inputs = unknown_classes.forward_kwargs(name)
    found = probe(model, inputs)
    kinds = set(found.dependence.values())
    assert Dependence.SAMPLE in kinds
    assert Dependence.TIMESTEP in kinds
    family = generic_family(model, found)
    temporal = family.temporal(model)
    assert {layer: temporal.of(layer) for layer in found.dependence} == found.dependence
    assert family.blocks(model) == found.blocks
    assert found.blocks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Small(nn.Module):
    """One layer of each dependence."""

    def __init__(self) -> None:
        super().__init__()
        self.of_t, self.of_c, self.of_both, self.of_x, self.of_nothing = (nn.Linear(4, 4) for _ in range(5))
        self.register_buffer("table", torch.ones(1, 4))

    def forward(self, sample, timestep, labels, extra):
        t = self.of_t(timestep[:, None].float().expand(-1, 4))
        c = self.of_c(extra["text"] + labels[:, None])
        return self.of_x(sample + self.of_both(t + c)) + self.of_nothing(self.table)


def test_every_dependence_is_told():
    inputs = {
        "sample": torch.randn(2, 4),
        "timestep": torch.tensor([3, 5]),
        "labels": torch.tensor([1, 1]),
        "extra": {"text": torch.randn(2, 4), "mask": torch.ones(2, 4)},
    }
    expected = {
        "of_t": Dependence.TIMESTEP,
        "of_c": Dependence.CONDITION,
        "of_both": Dependence.TIMESTEP_AND_CONDITION,
        "of_x": Dependence.SAMPLE,
        "of_nothing": Dependence.NOTHING,
    }
    model = Small().eval()
    found = probe(model, inputs)
    assert found.dependence == expected
    temporal = generic_family(model, found).temporal(model)
    assert {layer: temporal.of(layer) for layer in expected} == expected


class Renamed(Small):
    """Its inputs have no usual names."""

    def forward(self, noisy, noise_level, labels, extra):
        return super().forward(noisy, noise_level, labels, extra)


def test_inputs_can_be_named():
    given = [torch.randn(2, 4), torch.tensor([3, 5]), torch.tensor([1, 1]), {"text": torch.randn(2, 4)}]
    usual = dict(zip(("sample", "timestep", "labels", "extra"), given, strict=True))
    own = dict(zip(("noisy", "noise_level", "labels", "extra"), given, strict=True))
    model = Renamed().eval()
    assert probe(model, own, sample="noisy", timestep="noise_level") == probe(Small().eval(), usual)
    with pytest.raises(ConfigError, match="sample='nois' is not among the inputs"):
        probe(model, own, sample="nois", timestep="noise_level")
    with pytest.raises(ConfigError, match="timestep='t' is not among the inputs"):
        probe(model, own, sample="noisy", timestep="t")
    with pytest.raises(ConfigError, match=r"no sample among the inputs.*looked for hidden_states, sample"):
        probe(model, own, timestep="noise_level")
    with pytest.raises(ConfigError, match=r"no timestep among the inputs.*looked for timestep, timesteps"):
        probe(model, own, sample="noisy")


def test_a_model_without_a_timestep():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    assert probe(model, {"input": torch.randn(2, 4)}, sample="input", timestep="").dependence == {
        "0": Dependence.SAMPLE
    }


def test_what_cannot_be_probed():
    with pytest.raises(ModelStateError, match="eval mode"):
        probe(Small().train(), {})
    with torch.device("meta"):
        model = Small()
    with pytest.raises(ModelStateError, match="loaded weights"):
        probe(model.eval(), {})


@pytest.mark.parametrize("timestep", [torch.tensor([0.2, 0.2]), torch.tensor([33, 34]), torch.tensor([999, 0])])
def test_every_timestep_is_moved(timestep):
    inputs = {"sample": torch.randn(2, 4), "timestep": timestep, "labels": torch.tensor([1, 1])}
    inputs["extra"] = {"text": torch.randn(2, 4)}
    assert probe(Small().eval(), inputs).dependence["of_t"] is Dependence.TIMESTEP


def test_qwenimage_with_a_label_beside_the_timestep():
    model = tiny.build("qwenimage", use_additional_t_cond=True)
    inputs = tiny.inputs_for(model) | {"additional_t_cond": torch.tensor([0, 1])}
    temporal = family_of(model).temporal(model)
    found = probe(model, inputs).dependence
    assert {layer: temporal.of(layer) for layer in found} == found
