"""The timestep path as a module of its own, its errors, and codes that are learned on timesteps."""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import diffuse_compress as dc
import tiny
from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.evaluation.denoiser_inputs import timestep_as_given
from diffuse_compress.families.base import Dependence
from diffuse_compress.quantization.convert import replace_module
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.numerics import dequantize
from diffuse_compress.runtime import run, steps
from diffuse_compress.temporal import index
from diffuse_compress.temporal.block import TemporalBlock, edges_of, feature_layers, given_of
from diffuse_compress.temporal.build import Call
from diffuse_compress.temporal.config import TableConfig, TableFormat
from diffuse_compress.temporal.features import mismatched, observe, relative_error
from diffuse_compress.temporal.layout import layout_of
from diffuse_compress.temporal.lookup import CONSUMER
from diffuse_compress.temporal.maintenance import PathErrors, choose_tables, rounded_outputs
from diffuse_compress.temporal.persist import load_table_state, table_state
from diffuse_compress.temporal.prepare import LoopCalls
from diffuse_compress.temporal.storage import store
from diffuse_compress.temporal.table import attach_table
from diffuse_compress.temporal.tiar import Path, grid_of, observe_loop, path_of, reconstruct
from temporal.loops import inputs_for, loop, scheduler_for

W4 = dc.Scheme(dc.WeightScheme("int4", dc.PerChannel(), symmetric=False))
CLASSES = ["unet", "unet_sdxl", "dit", "pixart", "sd35", "flux", "wan", "cogvideox", "hunyuan_video"]


def seen(name: str, model: torch.nn.Module, seed: int) -> Any:
    scheduler = scheduler_for(name, 5)
    call = Call(model, inputs_for(model, seed=seed), "timestep", 2, torch.device("cpu"))
    return observe(layout_of(model, TableConfig()), call, [timestep_as_given(model, t, 2) for t in scheduler.timesteps])


def loop_of(model: torch.nn.Module, seed: int = 0) -> LoopCalls:
    """Ten steps of a loop in which all samples have one timestep, a whole number."""
    timesteps = [float(t) for t in range(900, -1, -100)]
    return LoopCalls({**inputs_for(model, seed=seed), "timestep": torch.full((2,), 900)}, timesteps)


@functools.cache
def unet_path() -> Path:
    """For those that only look at it."""
    return path_for("unet")[1]


def path_for(name: str) -> tuple[torch.nn.Module, Path]:
    model = tiny.build(name).eval()
    calls = [loop_of(model, seed) for seed in range(1 if name == "unet" else 9)]
    return model, path_of(layout_of(model, TableConfig()), model, calls, 1000)


@pytest.mark.parametrize("name", CLASSES)
def test_the_block_gives_what_the_layers_of_the_model_give(name):
    """Of conditions and timesteps that its edges were not found with, too."""
    model = tiny.build(name).eval()
    first, other = seen(name, model, 0), seen(name, model, 7)
    block = TemporalBlock({layer: model.get_submodule(layer) for layer in first.outputs}, edges_of([first]))
    layout = layout_of(model, TableConfig())
    path = [n for n, kind in layout.layers.items() if kind is not Dependence.CONDITION]
    assert sorted(block.names) == sorted(path)
    roots = set(block.names) - block.edges.keys()
    assert all(layer.endswith("linear_1") for layer in roots)
    with torch.no_grad():
        found = block.outputs(given_of(block, other))
    for layer in path:
        assert float(relative_error(other.outputs[layer].flatten(), found[layer].flatten())) < 1e-6, layer
    read = {edge.source for edge in block.edges.values()}
    assert set(block(given_of(block, other))) == set(block.names) - read


def test_what_reads_a_label_is_told_from_what_does_not():
    model = tiny.build("dit").eval()
    features = seen("dit", model, 0)
    edges = edges_of([features])
    for number in range(len(model.transformer_blocks)):
        norm = f"transformer_blocks.{number}.norm1"
        assert edges[f"{norm}.linear"].source == f"{norm}.emb.timestep_embedder.linear_2"
        assert edges[f"{norm}.linear"].beside.startswith(norm)
        assert not edges[f"{norm}.emb.timestep_embedder.linear_2"].beside
    block = TemporalBlock({layer: model.get_submodule(layer) for layer in features.outputs}, edges)
    names = feature_layers(block, layout_of(model, TableConfig()).layers)
    assert sorted(names) == sorted(n for n in block.names if not n.endswith("linear_1"))


def naive_cosine(a: list[float], b: list[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def test_errors_are_those_of_their_definition():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(7, 9, generator=generator)
    found = dense + 0.7 * torch.randn(7, 9, generator=generator)
    found[3] = 2 * dense[5]  # a mismatch, whatever its length
    error, wrong = relative_error(dense, found), mismatched(dense, found)
    rows, others = dense.double().tolist(), found.double().tolist()
    for t in range(7):
        square = math.fsum((x - y) ** 2 for x, y in zip(rows[t], others[t], strict=True))
        assert float(error[t]) == pytest.approx(math.sqrt(square / math.fsum(x * x for x in rows[t])), rel=1e-12)
        best = max(range(7), key=lambda s: naive_cosine(others[t], rows[s]))
        assert bool(wrong[t]) == (best != t)
    assert bool(wrong[3])
    assert not mismatched(dense, 3 * dense).any()
    assert not mismatched(dense[[0, 0, 1]], dense[[0, 0, 1]]).any()  # equal timesteps are no mismatch


@pytest.mark.parametrize(
    ("timestep", "values", "low", "high", "count"),
    [
        (torch.tensor([981]), [981.0, 1.0], 0, 999, 1000),
        (torch.tensor([0.981]), [0.981, 0.02], 0, 1, 1000),
        (torch.tensor([981.0]), [981.0, 20.5], 0, 1000, 1000),
        (torch.tensor([1.6]), [1.6, -0.5], -0.5, 1.6, 1000),
        (torch.tensor([40]), [40.0, 3.0], 0, 49, 50),
    ],
)
def test_the_grid_is_of_the_form_that_the_model_is_given(timestep, values, low, high, count):
    grid = grid_of(LoopCalls({}, values), timestep, 50 if count == 50 else 1000)
    assert (min(grid), max(grid), len(grid)) == (pytest.approx(low), pytest.approx(high), count)


def features_in_float64(model: Any, weights: dict[str, torch.Tensor], timesteps: list[int]) -> dict[str, torch.Tensor]:
    """What a UNet's projections give with these weights, written out: sinusoid, linear, SiLU, linear, SiLU, linear."""
    half = model.time_proj.num_channels // 2
    angle = torch.tensor(timesteps).double()[:, None] * torch.exp(
        -math.log(10000) * torch.arange(half).double() / (half - model.time_proj.downscale_freq_shift)
    )
    x = torch.cat([angle.cos(), angle.sin()] if model.time_proj.flip_sin_to_cos else [angle.sin(), angle.cos()], dim=1)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[name].double().t() + model.get_submodule(name).bias.double()

    x = F.silu(linear("time_embedding.linear_2", F.silu(linear("time_embedding.linear_1", x))))
    return {name: linear(name, x) for name in weights if name.endswith("time_emb_proj")}


def test_learned_codes_keep_the_features_at_every_timestep():
    """Of a model with all of the path in 4 bits, at timesteps of no schedule: at least twice as near as to nearest."""
    model, path = path_for("unet")
    dense_model = copy.deepcopy(model)
    schemes = dict.fromkeys(path.kinds, W4)
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in schemes}
    nearest = {
        name: dequantize(
            dc.quantization.convert.quantize_module(model.get_submodule(name), W4, dc.RTNConfig()).quantized_weight(),
            torch.float32,
        )
        for name in schemes
    }

    def replace(name: str, convert: Any) -> Any:
        layer = convert(model.get_submodule(name))
        replace_module(model, name, layer)
        return layer

    generator = torch.Generator().manual_seed(0)
    reconstruct(path, schemes, 200, replace, generator=lambda name: generator)
    assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in schemes)
    learned = {name: model.get_submodule(name).weight for name in schemes}
    timesteps = list(range(3, 1000, 17))
    reference = features_in_float64(dense_model, dense, timesteps)
    error = {}
    for way, weights in (("nearest", nearest), ("learned", learned)):
        found = features_in_float64(dense_model, weights, timesteps)
        error[way] = torch.stack([relative_error(reference[name], found[name]).mean() for name in found]).mean()
    assert error["learned"] < error["nearest"] / 2, error
    # What is measured of the block is what the model gives.
    seen_now = observe_loop(layout_of(model, TableConfig()), model, loop_of(model))
    for name, value in path.block.outputs(path.given).items():
        assert float(relative_error(value.flatten(), seen_now.outputs[name][::2].flatten())) < 1e-5, name


def test_layers_that_read_a_label_gain_for_labels_that_were_not_seen_too():
    """Measured on this model, whose labels' embeddings are random: 0.58 of the error of rounding to nearest."""
    model, path = path_for("dit")
    schemes = {name: W4 for name in path.kinds if path.kinds[name] is Dependence.TIMESTEP_AND_CONDITION}
    seen_labels = loop_of(model, seed=8).inputs["class_labels"]
    assert not set(seen_labels.tolist()) <= set(loop_of(model, seed=0).inputs["class_labels"].tolist())
    errors = PathErrors.none(path)
    errors.add("rtn", path.dense, rounded_outputs(path, schemes))
    layers = dict(zip(path.block.names, path.block.layers, strict=True))
    generator = torch.Generator().manual_seed(0)
    reconstruct(path, schemes, 200, lambda name, convert: convert(layers[name]), generator=lambda name: generator)
    errors.add("tib", path.dense, path.block.outputs(path.given))
    rows = [errors.layers.index(name) for name in schemes]
    assert float(errors.error["tib"][rows].mean()) < 0.7 * float(errors.error["rtn"][rows].mean())


def test_tables_go_to_the_layers_that_gain_most_for_a_byte():
    path = unet_path()
    names = path.features
    errors = PathErrors(path.timesteps, tuple(names), {}, {})
    gain = torch.linspace(0.1, 0.5, len(names))
    gain[1] = -0.01  # a table would be worse
    errors.error["cache"] = torch.full((len(names), 10), 0.02)
    errors.error["tib"] = errors.error["cache"] + gain[:, None]
    size = {name: 2 * 10 * 4 * path.dense[name].shape[1] for name in names}
    everything = choose_tables(path, errors, TableFormat.LIVE, None, 2).ways
    assert [way for way, _ in everything.values()] == ["cache", "tib", *["cache"] * (len(names) - 2)]
    budget = sum(size.values()) // 2
    choice = choose_tables(path, errors, TableFormat.LIVE, budget, 2)
    ways = choice.ways
    assert choice.rows == {}, "of two schedules, a layer's rows come or go together"
    left, expected = budget, set()
    for name in sorted(names, key=lambda n: -float(gain[names.index(n)]) / size[n]):
        if gain[names.index(name)] > 0 and size[name] <= left:
            left -= size[name]
            expected.add(name)
    assert {name for name, (way, _) in ways.items() if way == "cache"} == expected
    assert 0 < len(expected) < len(names) - 1
    assert all("over the budget" in why for name, (way, why) in ways.items() if way == "tib" and name != names[1])
    assert not any(way == "cache" for way, _ in choose_tables(path, errors, TableFormat.LIVE, 0, 2).ways.values())


@pytest.mark.parametrize("form", [TableFormat.LIVE, TableFormat.INT8, TableFormat.INT4])
@pytest.mark.parametrize("share", [None, 0.4, 0.8])
def test_rows_go_to_the_timesteps_that_gain_most_for_a_byte(form, share):
    """Layer by layer and step by step, against a search that is written out; the budget holds for what is stored."""
    path = unet_path()
    names, generator = path.features, torch.Generator().manual_seed(3)
    errors = PathErrors(path.timesteps, tuple(names), {}, {})
    errors.error["cache"] = 0.1 * torch.rand(len(names), 10, generator=generator)
    errors.error["tib"] = errors.error["cache"] + 0.1 * torch.rand(len(names), 10, generator=generator) - 0.02
    errors.error["tib"][0] = errors.error["cache"][0] - 0.01  # nothing to gain
    errors.error["tib"][1] = errors.error["cache"][1] + 0.2  # everything
    whole = sum(part.nbytes for part in store({name: path.dense[name] for name in names}, form))
    budget = None if share is None else int(share * whole)
    choice = choose_tables(path, errors, form, budget, 1)
    kept: dict[str, set[int]] = {name: set() for name in names}
    for _, size, name, number in sorted(naive_rows(path, errors, form), reverse=True):
        others = sum(naive_size(size, len(kept[other]), form) for other, size in row_sizes(path, form) if other != name)
        if budget is None or others + naive_size(size, len(kept[name]) + 1, form) <= budget:
            kept[name].add(number)
    found = {name: {i for i, there in enumerate(rows) if there} for name, rows in choice.rows.items()}
    for name, (way, why) in choice.ways.items():
        numbers = found.get(name, set(range(10)) if way == "cache" else set())
        assert numbers == kept[name], name
        assert ("over the budget" in why) == (way == "tib" and name != names[0])
    assert choice.ways[names[0]][0] == "tib"
    assert choice.ways[names[1]][0] == "cache"
    assert names[1] not in choice.rows
    some = {name: path.dense[name] for name, (way, _) in choice.ways.items() if way == "cache"}
    stored = store(some, form, choice.rows)
    assert budget is None or sum(part.nbytes for part in stored) <= budget
    rows = {name: table for part in stored for name, table in part.rows().items()}
    full = {name: table for part in store(some, form) for name, table in part.rows().items()}
    for name, known in choice.known(full, 1).items():
        assert torch.equal(known.isnan().all(dim=1), rows[name].isnan().all(dim=1))
        assert torch.equal(known.nan_to_num(7.0), rows[name].nan_to_num(7.0)), name


def row_sizes(path: Path, form: TableFormat) -> list[tuple[str, int]]:
    """Bytes of a row, with its scale (fp32) and zero point (int8)."""
    bits, own = {TableFormat.LIVE: (32, 0), TableFormat.INT8: (8, 5), TableFormat.INT4: (4, 5)}[form]
    packed = {name: path.dense[name].shape[1] for name in path.features}
    if form is TableFormat.INT4:
        packed = {name: -(-width // 128) * 128 for name, width in packed.items()}
    return [(name, width * bits // 8 + own) for name, width in packed.items()]


def naive_size(row: int, count: int, form: TableFormat) -> int:
    """Bytes of ``count`` of ten rows: with gaps, an int32 for each timestep tells where; codes know their width."""
    if count == 0:
        return 0
    return count * row + (0 if form is TableFormat.LIVE else 8) + (0 if count == 10 else 40)


def naive_rows(path: Path, errors: PathErrors, form: TableFormat) -> list[tuple[float, int, str, int]]:
    """(gain for a byte, bytes, layer, timestep) of all rows that lower an error."""
    found = []
    for layer, (name, size) in enumerate(row_sizes(path, form)):
        for number in range(10):
            gain = float(errors.error["tib"][layer, number] - errors.error["cache"][layer, number])
            if gain > 0:
                found.append((gain / size, size, name, number))
    return found


@pytest.mark.parametrize("form", ["live", "int8", "int4"])
def test_layers_are_computed_at_timesteps_whose_rows_are_not_there(form):
    """The bits are those of the rows, where there is one, and of the layers elsewhere; a checkpoint has them too."""
    model = tiny.build("unet")
    plain, rng = copy.deepcopy(model), torch.Generator().manual_seed(0)
    table = attach_table(model, TableConfig(table=form))
    scheduler = scheduler_for("unet", 5)
    values = [float(t) for t in scheduler.timesteps]
    inputs = {**inputs_for(model), "timestep": torch.zeros(2, dtype=torch.int64)}
    names = [name for name in table.lookups if name.endswith("time_emb_proj")]
    kept = {name: dict(zip(values, torch.rand(5, generator=rng) < 0.5, strict=True)) for name in names[1:]}
    kept[names[1]] = dict(zip(values, [True, False] * 3, strict=False))
    kept = {name: {value: bool(there) for value, there in rows.items()} for name, rows in kept.items()}
    schedule = table.prepare(inputs, scheduler.timesteps, "DDIMScheduler", kept)
    partial = {name for name, rows in kept.items() if 0 < sum(rows.values()) < 5}
    assert table.partly >= partial
    assert names[0] not in table.partly
    with torch.no_grad():
        for part in schedule.rows:  # what is looked up shows
            part.values += 1
    rows = {name: found for part in schedule.rows for name, found in part.rows().items()}
    inputs.pop("timestep")
    expected = []
    for number, t in enumerate(scheduler.timesteps):
        handles = [
            plain.get_submodule(name).register_forward_hook(lambda m, a, y, row=found[number]: row.expand_as(y))
            for name, found in rows.items()
            if not bool(found[number].isnan().any())
        ]
        with torch.no_grad():
            expected.append(plain(**{**inputs, "timestep": t.expand(2), "return_dict": False})[0])
        for handle in handles:
            handle.remove()
    found = loop("unet", model, inputs, scheduler=scheduler_for("unet", 5))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    counted = steps.tracker_of(model).last.method(CONSUMER)
    assert counted.hits == sum(int((~found.isnan().any(dim=1)).sum()) for found in rows.values())
    assert not counted.misses
    tensors, meta = table_state(table)
    assert meta["schema_version"] == 2
    other = tiny.build("unet")
    load_table_state(attach_table(other, TableConfig(table=form)), tensors, json.loads(json.dumps(meta)))
    found = loop("unet", other, inputs, scheduler=scheduler_for("unet", 5))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    wrong, fresh = {key: t + 1 if key.endswith("place") else t for key, t in tensors.items()}, tiny.build("unet")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_table_state(attach_table(fresh), wrong, meta)


@pytest.mark.usefixtures("fresh_compiler")
def test_steps_without_rows_need_no_word_from_the_device_and_no_graph_of_their_own(monkeypatch):
    model = tiny.build("unet")
    table, scheduler, inputs = attach_table(model), scheduler_for("unet", 5), inputs_for(model)
    name = "mid_block.resnets.0.time_emb_proj"
    kept = {name: {float(t): number % 2 == 0 for number, t in enumerate(scheduler.timesteps)}}
    schedule = table.prepare({**inputs, "timestep": torch.zeros(2, dtype=torch.int64)}, scheduler.timesteps, "", kept)
    with torch.no_grad():
        next(part for part in schedule.rows if part.place is not None).values.mul_(3)
    expected = loop("unet", model, inputs, scheduler=scheduler_for("unet", 5))
    every = loop("unet", tiny.build("unet"), inputs, scheduler=scheduler_for("unet", 5))
    assert [torch.equal(a, b) for a, b in zip(expected, every, strict=True)] == [False, True, False, True, False]
    model.mid_block.resnets[0].compile(fullgraph=True, backend="eager")
    for _ in range(2):
        found = loop("unet", model, inputs, scheduler=scheduler_for("unet", 5))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        # As on a device: what is there cannot be read in the loop.
        monkeypatch.setattr(run, "_readable", lambda timestep: None)
        monkeypatch.setattr(index, "host_value", lambda timestep: None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"maintenance": "tables"}, "maintenance='tables' is unknown"),
        ({"table_budget": 100}, 'table_budget= is for maintenance="auto"'),
        ({"maintenance": "auto", "table_budget": -1}, "number of bytes"),
        ({"maintenance": "tib", "iterations": 0}, "positive integer"),
        ({"maintenance": "auto", "table": {"weights": "cpu"}}, "Leave weights= out"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        dc.TFMQConfig(**given)


def test_a_configuration_comes_back_from_its_dict():
    config = dc.TFMQConfig(maintenance="auto", table_budget=1000, iterations=7, num_inference_steps=3)
    assert dc.TFMQConfig.from_dict(config.to_dict()) == config
    assert dc.TFMQConfig.from_dict({"table": {}, "num_inference_steps": None}).maintenance.value == "cache"
