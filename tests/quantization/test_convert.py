"""Conversion of dense layers: equal to the algorithm on the whole weight, non-destructive, errors with names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diffuse_compress.errors import ConfigError, IncompatibleShapeError, ModelStateError
from diffuse_compress.quantization import convert
from diffuse_compress.quantization.algorithms.base import quantize_with
from diffuse_compress.quantization.algorithms.hqq import HQQConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import placeholder_for, quantize_module, replace_module
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    NumberFormat,
    PerGroup,
    PerTensor,
    Scheme,
    TwoLevel,
    WeightScheme,
)

INT8, INT4 = NumberFormat.INT8, NumberFormat.INT4
W8A8 = Scheme(WeightScheme(INT8), ActivationScheme(INT8))
CASES = {
    "per channel": (W8A8, RTNConfig()),
    "per tensor": (Scheme(WeightScheme(INT8, PerTensor()), None), RTNConfig()),
    "two-level": (Scheme(WeightScheme(INT4, TwoLevel()), ActivationScheme(INT8)), RTNConfig()),
    "hqq": (Scheme(WeightScheme(INT4, PerGroup(64), symmetric=False), None), HQQConfig(iterations=3)),
}


def dense_layer(kind: str, dtype: torch.dtype) -> nn.Linear | nn.Conv2d:
    layer = nn.Linear(256, 48) if kind == "linear" else nn.Conv2d(64, 48, 2)
    return layer.to(dtype)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_quantize_module_equals_the_algorithm_on_the_whole_weight(case, dtype, kind, monkeypatch) -> None:
    scheme, algorithm = case
    module = dense_layer(kind, dtype).eval()
    before = copy.deepcopy(module.state_dict())
    monkeypatch.setattr(convert, "ROW_BLOCK_BYTES", 4 * 256 * 7)
    layer = quantize_module(module, scheme, algorithm)
    whole = quantize_with(algorithm, module.weight.detach().flatten(1), scheme.weight)
    stored = layer.quantized_weight()
    for name in ("qweight", "scale", "zero_point", "group_scale"):
        expected, actual = getattr(whole, name), getattr(stored, name)
        assert (expected is None) == (actual is None), name
        assert expected is None or torch.equal(actual, expected), name
    assert type(layer) is (QuantizedLinear if kind == "linear" else QuantizedConv2d)
    assert layer.compute_dtype == dtype
    assert not layer.training
    assert torch.equal(layer.bias, module.bias)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()), "module is untouched"


def test_quantize_module_options() -> None:
    module = dense_layer("linear", torch.float32)
    state = torch.get_rng_state()
    layer = quantize_module(module, W8A8, RTNConfig(), compute_dtype=torch.bfloat16, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.compute_dtype == layer.bias.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32
    assert layer.qweight.device == module.weight.device


def test_quantize_module_keeps_a_bias_that_is_not_loaded_yet() -> None:
    module = dense_layer("linear", torch.float32)
    module.bias = nn.Parameter(torch.empty(48, device="meta"))
    layer = quantize_module(module, W8A8, RTNConfig())
    assert layer.bias.is_meta
    assert not layer.qweight.is_meta


def test_quantize_module_peak_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The algorithm never sees more than a block of rows."""
    seen: list[int] = []

    def spy(config, weight, scheme, generator=None):
        seen.append(weight.numel() * 4)
        return quantize_with(config, weight, scheme, generator)

    monkeypatch.setattr(convert, "quantize_with", spy)
    monkeypatch.setattr(convert, "ROW_BLOCK_BYTES", 4 * 256 * 10)
    quantize_module(dense_layer("linear", torch.bfloat16), W8A8, RTNConfig(observer="minmax"))
    assert len(seen) == 5
    assert max(seen) <= convert.ROW_BLOCK_BYTES


def test_quantize_module_errors_name_the_layer() -> None:
    with pytest.raises(ConfigError, match=r"blocks.0.norm: cannot be quantized, no quantized layer for LayerNorm"):
        quantize_module(nn.LayerNorm(4), W8A8, RTNConfig(), name="blocks.0.norm")
    with pytest.raises(ModelStateError, match=r"blocks.0.fc: quantization needs the weight, which is on the meta"):
        quantize_module(nn.Linear(4, 4, device="meta"), W8A8, RTNConfig(), name="blocks.0.fc")
    with pytest.raises(IncompatibleShapeError, match=r"blocks.0.fc: int4 weights with group_size=128"):
        quantize_module(
            nn.Linear(100, 4), Scheme(WeightScheme(INT4, PerGroup()), None), RTNConfig(), name="blocks.0.fc"
        )
    with pytest.raises(ConfigError, match=r"blocks.0.fc: HQQ: needs asymmetric"):
        quantize_module(nn.Linear(128, 4), W8A8, HQQConfig(), name="blocks.0.fc")
    broken = nn.Linear(128, 4)
    broken.weight.data[1, 2] = float("nan")
    with pytest.raises(ModelStateError, match=r"blocks.0.fc: .*inf or nan"):
        quantize_module(broken, W8A8, RTNConfig(), name="blocks.0.fc")


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_placeholder_for_matches_quantize_module(kind: str) -> None:
    module = dense_layer(kind, torch.float32)
    layer = quantize_module(module, W8A8, RTNConfig())
    empty = placeholder_for(module.to("meta"), W8A8, compute_dtype=torch.float32)
    assert type(empty) is type(layer)
    described = [{n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (empty, layer)]
    assert described[0] == described[1]
    with pytest.raises(ConfigError, match="LayerNorm: cannot be quantized"):
        placeholder_for(nn.LayerNorm(4), W8A8, compute_dtype=torch.float32)


def test_replace_module_in_containers_and_attributes() -> None:
    root = nn.Module()
    root.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU())])
    root.head = nn.Linear(2, 2)
    first, second = nn.Identity(), nn.Identity()
    replace_module(root, "blocks.0.0", first)
    replace_module(root, "head", second)
    assert root.blocks[0][0] is first
    assert root.head is second
    assert list(root.blocks[0]._modules) == ["0", "1"]
    with pytest.raises(ModelStateError, match=r"blocks.7.0: no such submodule in Module"):
        replace_module(root, "blocks.7.0", first)
    with pytest.raises(ModelStateError, match=r"has no submodule 'tail'"):
        replace_module(root, "tail", first)
