"""What keeps outliers beside the codes, through plan, compress, save, load, decompress, adapters and compile."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from calibrated_block import Block, calibrated, inputs
from diffuse_compress.evaluation.fake_quantize import FakeQuantizedLayer
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, algorithm_from_dict, algorithm_to_dict
from diffuse_compress.quantization.convert import requantize
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.presets import PRESETS
from tolerance import KERNEL, assert_close, relative_rms

CASES: dict[str, tuple[str, AlgorithmConfig]] = {
    "llm_int8": ("w8a8", dc.LLMInt8Config(1.5)),
    "owq": ("w4a16", dc.OWQConfig(0.5)),
    "quik": ("w4a4", dc.QUIKConfig()),
    "spqr": ("w4a16", dc.SpQRConfig(threshold=0.01)),
}
cases = pytest.mark.parametrize("case", CASES)


def stored_bytes(model: nn.Module) -> int:
    state = model.state_dict()
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_language_model_plan_reload_and_decompress(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    preset, algorithm = CASES[case]
    model = tiny.build("llama", dtype=dtype)
    given: dict[str, Any] = {"calibration": [tiny.inputs_for(model)]} if algorithm.needs_calibration else {}
    config = dc.QuantizationConfig(preset, algorithm=algorithm)
    plan = model.compression_plan(config, **given)
    assert algorithm.summary in str(plan)
    assert "input columns" in str(plan) or "sparse outliers" in str(plan)
    model.compress(plan, **given)
    layers = quantized_layers(model)
    assert layers
    # Of outliers a plan knows how many there are at most.
    assert stored_bytes(model) == plan.bytes_after if case != "spqr" else stored_bytes(model) <= plan.bytes_after
    if case == "spqr":
        assert any(layer.outlier_values is not None for layer in layers.values())
        entries = sum(layer.outlier_values.numel() for layer in layers.values() if layer.outlier_values is not None)
        most = sum(int(0.01 * layer.weight.numel()) for layer in layers.values())
        rows = sum(4 * (layer.out_features + 1) for layer in layers.values() if layer.outlier_values is None)
        assert plan.bytes_after - stored_bytes(model) == (most - entries) * (2 + dtype.itemsize) + rows
    assert dc.compression_report(model).bytes_after == stored_bytes(model)
    batch = tiny.inputs_for(model)
    with torch.no_grad():
        expected = model(**batch).logits
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, dtype=dtype)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
            assert again.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(again(**batch).logits, expected)
        weights = {name: layer.weight for name, layer in layers.items()}
        again.decompress()
    for name, weight in weights.items():
        assert type(again.get_submodule(name)) is nn.Linear
        assert torch.equal(again.get_submodule(name).weight, weight)


@pytest.mark.parametrize("case", ["llm_int8", "quik", pytest.param("owq", marks=pytest.mark.slow), "spqr"])
def test_denoiser_through_its_pipeline(case: str, tmp_path: Path) -> None:
    preset, algorithm = CASES[case]
    pipe = tiny.build_pipeline("pixart", dtype=torch.bfloat16)
    given = tiny.call_kwargs(pipe, steps=2)
    given.pop("generator")
    calibration = {"calibration": [{**given, "prompt": "a cat"}]} if algorithm.needs_calibration else {}
    pipe.compress(dc.QuantizationConfig(preset, algorithm=algorithm), measure=False, **calibration)
    picture = tiny.sample(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], tensor), name
        assert again.transformer.state_dict()[name].dtype == tensor.dtype, name
    assert torch.equal(tiny.sample(again), picture)


@pytest.mark.parametrize("case", ["llm_int8", "owq", "quik"])
def test_convolutions_are_refused_by_name(case: str) -> None:
    preset, algorithm = CASES[case]
    unet = tiny.build("unet_sd1")
    given: dict[str, Any] = {"calibration": [tiny.inputs_for(unet)]} if algorithm.needs_calibration else {}
    plan = unet.compression_plan(dc.QuantizationConfig(preset, algorithm=algorithm), **given)
    kept = {row.layer: row.reason for row in plan.rows if row.parameter.endswith(".weight")}
    name = "mid_block.resnets.0.conv1"
    assert "not of convolutions" in kept[name]
    config = dc.QuantizationConfig(preset, algorithm=algorithm, overrides={name: preset})
    with pytest.raises(dc.ConfigError, match=rf"{name}: .* not of convolutions"):
        unet.compression_plan(config, **given)


@cases
def test_configs_survive_json_and_every_field_counts(case: str) -> None:
    algorithm = CASES[case][1]
    data = json.loads(json.dumps(algorithm_to_dict(algorithm), allow_nan=False))
    assert algorithm_from_dict(data) == algorithm
    assert hash(algorithm_from_dict(data)) == hash(algorithm)
    with pytest.raises(dc.ConfigError, match="unknown field 'bogus'"):
        algorithm_from_dict({**data, "bogus": 1})
    assert set(data) == {"kind", *(field.name for field in dataclasses.fields(algorithm))}


def layers_of(case: str) -> tuple[Block, Block]:
    torch.manual_seed(0)
    preset, algorithm = CASES[case]
    dense = Block()
    with torch.no_grad():
        for layer in (dense.to_q, dense.down):
            layer.weight[::7, ::11] *= 12
    block = copy.deepcopy(dense)
    calibrated(block, algorithm.format_of(dense.to_q, PRESETS[preset].scheme), algorithm, inputs(2))
    return dense, block


@cases
def test_simulated_layers_are_the_real_ones(case: str) -> None:
    _, block = layers_of(case)
    x = inputs(1, seed=4)[0].args[0]
    with torch.no_grad():
        assert_close(FakeQuantizedLayer(block.to_q)(x), block.to_q(x), KERNEL[torch.float32])


@cases
def test_one_graph_and_the_same_numbers(case: str) -> None:
    _, block = layers_of(case)
    x = inputs(1, seed=4)[0].args[0]
    torch._dynamo.reset()
    compiled = torch.compile(block.to_q, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(x), block.to_q(x), KERNEL[torch.float32])
    torch._dynamo.reset()


@cases
def test_another_weight_in_the_same_format(case: str) -> None:
    """What fusing an adapter does."""
    dense, block = layers_of(case)
    other = copy.deepcopy(dense.to_q)
    with torch.no_grad():
        other.weight += 0.02 * torch.randn(other.weight.shape)
    layer = requantize(block.to_q, other)
    assert isinstance(layer, QuantizedLinear)
    assert set(layer.state_dict()) == set(block.to_q.state_dict())
    # Four bits in rows of 128 err by a tenth, and single large weights would make it more.
    assert relative_rms(other.weight, layer.weight) < (0.02 if case == "llm_int8" else 0.2)
    if layer.dense_columns is not None:
        columns = layer.dense_columns.long()
        assert torch.equal(layer.weight[:, columns], other.weight[:, columns])


@cases
def test_layers_without_memory_have_the_same_tensors(case: str) -> None:
    _, block = layers_of(case)
    for layer in (block.to_q, block.down):
        assert isinstance(layer, QuantizedLinear)
        columns, sparse = layer.dense_columns, layer.outlier_values
        empty = QuantizedLinear.placeholder(
            layer.in_features,
            layer.out_features,
            True,
            layer.scheme,
            compute_dtype=torch.float32,
            dense_columns=0 if columns is None else columns.shape[0],
            sparse_outliers=0 if sparse is None else sparse.shape[0],
        )
        assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items()} == {
            name: (t.shape, t.dtype) for name, t in layer.state_dict().items()
        }
        assert empty(torch.empty(3, layer.in_features, device="meta")).shape == (3, layer.out_features)


@pytest.mark.gpu
@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_cuda_static_parts_never_wait_and_graphs_hold_all(case: str, dtype: torch.dtype) -> None:
    _, block = layers_of(case)
    x = inputs(1, seed=4)[0].args[0].to(dtype)
    layer = copy.deepcopy(block.to_q).to(dtype)
    with torch.no_grad():
        expected, layer, x = layer(x), layer.cuda(), x.cuda()
        assert_close(layer(x).cpu(), expected, KERNEL[dtype])
        torch.cuda.synchronize()
        if case != "llm_int8":
            torch.cuda.set_sync_debug_mode("error")
            try:
                layer(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        assert_close(y.cpu(), expected, KERNEL[dtype])
