"""AdaDim, and the groups of rows that it may choose: what is stored, computed, counted, saved and refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from calibrated_block import Block, calibrated, error, inputs, work_of
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.quantization.algorithms.adadim import AdaDimConfig
from diffuse_compress.quantization.algorithms.awq import AWQConfig
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, SequenceConfig
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.algorithms.hqq import HQQConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.dispatch import compute_path
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.scheme import (
    NumberFormat,
    PerGroup,
    PerInputGroup,
    Scheme,
    WeightScheme,
)
from tolerance import relative_rms

INT4 = NumberFormat.INT4
W4 = Scheme(WeightScheme(INT4, PerGroup(32), symmetric=False))
ROWS = Scheme(WeightScheme(INT4, PerInputGroup(32), symmetric=False))


class Plain(nn.Module):
    """One layer."""

    def __init__(self, outlier_columns: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(128, 96)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(96, 128))
            if outlier_columns:
                self.layer.weight[:, ::31] *= 30

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("outliers", [True, False])
def test_outlier_columns_get_scales_of_their_own_and_nothing_else_does(outliers: bool) -> None:
    torch.manual_seed(0)
    dense = Plain(outliers)
    if not outliers:  # rows of different size, which groups of rows would mix
        dense.layer.weight.data *= torch.logspace(-1, 1, 96).unsqueeze(1)
    ours, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    calls = [Call((torch.randn(64, 128),)) for _ in range(2)]
    calibrated(ours, W4, AdaDimConfig(), calls)
    calibrated(plain, W4, RTNConfig(), calls)
    assert isinstance(ours.layer.scheme.weight.granularity, PerInputGroup if outliers else PerGroup)
    if outliers:
        assert ours.layer.scale.shape == (128, 3)
        assert error(ours, dense, calls) < 0.9 * error(plain, dense, calls)
        forced = quantize_module(dense.layer, ROWS, RTNConfig())
        assert torch.equal(ours.layer.qweight, forced.qweight)
    else:
        assert torch.equal(ours.layer.qweight, plain.layer.qweight)
        assert torch.equal(ours.layer.scale, plain.layer.scale)


def test_block_error_decides_not_the_layers_own() -> None:
    """Rows that the next layer makes small again count as little as their neighbours."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        dense[0].weight[::16] *= 64
        dense[1].weight[:, ::16] /= 64
    x = torch.randn(50, 64)
    x[:, ::20] *= 8
    work = calibrated(dense, W4, AdaDimConfig(), [Call((x,))])
    assert isinstance(work.layers["0"].scheme.weight.granularity, PerGroup)


@pytest.mark.parametrize("algorithm", [GPTQConfig(), GPTQConfig(act_order=False), dc.AdaRoundConfig(iterations=20)])
def test_what_follows_rounds_groups_of_rows(algorithm: AlgorithmConfig) -> None:
    torch.manual_seed(3)
    dense = Block()
    with torch.no_grad():
        for layer in dense.children():
            layer.weight[:, ::17] *= 8
    ours, alone, before = (copy.deepcopy(dense) for _ in range(3))
    fresh = inputs(2, seed=1)
    work = calibrated(ours, W4, SequenceConfig((AdaDimConfig(), algorithm)), inputs(8))
    calibrated(alone, W4, AdaDimConfig(), inputs(8))
    calibrated(before, W4, RTNConfig(), inputs(1))
    assert any(isinstance(layer.scheme.weight.granularity, PerInputGroup) for layer in work.layers.values())
    assert error(ours, dense, fresh) < error(alone, dense, fresh) < error(before, dense, fresh)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_groups_of_rows(bits: int, asymmetric: bool, dtype: torch.dtype) -> None:
    """80 rows: the last group is not full."""
    torch.manual_seed(0)
    scheme = Scheme(WeightScheme(NumberFormat(f"int{bits}"), PerInputGroup(32), symmetric=not asymmetric))
    dense = nn.Linear(48, 80).to(dtype)
    with torch.no_grad():
        dense.weight[:, 7] *= 50
    layer = quantize_module(dense, scheme, RTNConfig())
    assert layer.scale.shape == (48, 3)
    x = torch.randn(5, 48, dtype=dtype)
    weight = dense.weight.float()
    step = layer.scale.repeat_interleave(32, dim=1)[:, :80].t()
    # Every weight inside its range is at most half a step off; the least squares clip some.
    close = ((layer.weight.float() - weight).abs() <= step * 0.51 + 0.01 * weight.abs()).float().mean()
    assert close > (0.8 if bits == 2 else 0.9)
    with torch.no_grad():
        product = nn.functional.linear(x, layer.weight, dense.bias)
        assert relative_rms(product, layer(x)) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert layer.compute_path().name == "dequantize"
    assert sum(p.numel() * p.element_size() for n, p in layer.named_parameters() if n != "bias") == scheme.weight_bytes(
        (80, 48)
    )
    assert Scheme.from_dict(scheme.to_dict()) == scheme


def test_gradients_and_rows_dequantized_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = quantize_module(nn.Linear(64, 100), ROWS, RTNConfig())
    x = torch.randn(3, 64, requires_grad=True)
    whole = layer(x)
    whole.square().sum().backward()
    assert torch.allclose(x.grad, 2 * whole.detach() @ layer.weight, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("diffuse_compress.quantization.dispatch.BLOCK_BYTES", 64 * 4 * 20)
    monkeypatch.setattr("diffuse_compress.quantization.numerics._CHUNK_CPU", 64 * 7)
    again = quantize_module(nn.Linear(64, 100), ROWS, RTNConfig())
    torch.manual_seed(0)
    again = quantize_module(nn.Linear(64, 100), ROWS, RTNConfig())
    assert torch.equal(again.qweight, layer.qweight)
    with torch.no_grad():
        assert torch.allclose(again(x), whole, atol=1e-5)


def test_kernels_are_not_asked_and_rows_cannot_be_scaled() -> None:
    for bits in (4, 8):
        scheme = Scheme(WeightScheme(NumberFormat(f"int{bits}"), PerInputGroup(128)))
        for device in ("cpu", "cuda"):
            assert compute_path(scheme, device).name == "dequantize"
    layer = quantize_module(nn.Linear(128, 128), Scheme(WeightScheme(INT4, PerInputGroup(128))), RTNConfig())
    assert isinstance(layer, QuantizedLinear)
    with pytest.raises(ModelStateError, match="scale_outputs: needs a scale for each of 128 rows"):
        layer.scale_outputs(torch.ones(128))


@pytest.mark.parametrize("name", ["llama", "pixart"])
def test_models_are_compressed_resumed_saved_and_reloaded(name: str, tmp_path: Path) -> None:
    scheme = dc.Scheme(dc.WeightScheme(INT4, dc.PerGroup(32, pad=True), symmetric=False))
    config = dc.QuantizationConfig(scheme, algorithm=[dc.AdaDimConfig(), dc.GPTQConfig()])

    def dense() -> Any:
        model = tiny.build(name)
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight[:, ::29] *= 20
        return model

    items = [tiny.inputs_for(dense(), seed=seed) for seed in range(2)]
    plan = dense().compression_plan(config, calibration=items)
    model = dense().compress(config, calibration=items, work_dir=tmp_path / "work")
    layers = quantized_layers(model)
    assert {type(layer.scheme.weight.granularity) for layer in layers.values()} == {PerGroup, PerInputGroup}
    assert plan.bytes_after >= sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    resumed = dense().compress(config, calibration=items, work_dir=tmp_path / "work")
    again = type(model).from_pretrained(tmp_path / "saved")
    for other in (resumed, again):
        assert {n: q.scheme for n, q in quantized_layers(other).items()} == {n: q.scheme for n, q in layers.items()}
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[key]), key
    # Told the formats, rounding alone makes these layers, too.
    plain = dense().compress(dc.QuantizationConfig(ROWS, algorithm="rtn"))
    assert {type(q.scheme.weight.granularity) for q in quantized_layers(plain).values()} == {PerInputGroup}
    again.decompress()
    assert not quantized_layers(again)


def test_layers_that_take_a_scale_in_their_rows_keep_their_groups() -> None:
    config = dc.QuantizationConfig(W4, algorithm=[dc.AWQConfig(num_ratios=4, fold=True), dc.AdaDimConfig()])
    model = tiny.build("llama", num_key_value_heads=4)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[:, ::9] *= 30
    texts = [torch.randint(0, 64, (1, 24)) for _ in range(2)]
    layers = quantized_layers(model.compress(config, calibration=texts))
    folded = [name for name, layer in layers.items() if layer.folded]
    assert any(name.endswith("up_proj") for name in folded)
    for name, layer in layers.items():
        if name.endswith(("up_proj", "v_proj")) and layer.folded:
            assert isinstance(layer.scheme.weight.granularity, PerGroup), name


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PerInputGroup: rows must be one of"):
        PerInputGroup(48)
    with pytest.raises(ConfigError, match="AdaDimConfig: rows must be one of"):
        AdaDimConfig(rows=1)
    with pytest.raises(ConfigError, match="float8 weights are symmetric"):
        WeightScheme(NumberFormat.FLOAT8_E4M3, PerInputGroup())
    with pytest.raises(ConfigError, match="AWQConfig cannot follow AdaDimConfig"):
        SequenceConfig((AdaDimConfig(), AWQConfig()))
    with pytest.raises(ConfigError, match="HQQConfig cannot follow AdaDimConfig"):
        SequenceConfig((AdaDimConfig(), HQQConfig()))
    with pytest.raises(ConfigError, match=r'AdaDimConfig is for weights in groups, got none \(w8a8\).*"w4a16"'):
        tiny.build("llama").compression_plan(dc.QuantizationConfig("w8a8", algorithm=AdaDimConfig()))
    with pytest.raises(ConfigError, match="HQQConfig: looks at weights row by row"):
        tiny.build("llama").compression_plan(dc.QuantizationConfig(ROWS, algorithm=HQQConfig()))
    with pytest.raises(ConfigError, match="needs scales that rows do not share"):
        dc.QVGenConfig(scheme=ROWS)
    model = tiny.build("llama").compress(dc.QuantizationConfig(ROWS, algorithm="rtn"))
    with pytest.raises(ConfigError, match="w4a16 with groups of rows, which compressed-tensors does not have"):
        model.save_pretrained(tmp_path / "export", format="compressed-tensors")
    wide = Scheme(WeightScheme(NumberFormat.INT8, PerInputGroup(32)))
    model = tiny.build("llama").compress(dc.QuantizationConfig(wide, algorithm="rtn"))
    with pytest.raises(ConfigError, match="w8a16 with groups of rows, which torchao does not have"):
        model.save_pretrained(tmp_path / "export", format="torchao")


def test_work_of_other_formats_is_left_alone() -> None:
    work = work_of(Block(), PRESETS["w8a8"].scheme, inputs(1))
    dc.quantization.algorithms.base.calibrate_with(AdaDimConfig(), work)
    assert {layer.scheme for layer in work.layers.values()} == {PRESETS["w8a8"].scheme}
