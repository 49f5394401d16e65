"""float8 per tensor, per channel and per block: one layer, a whole model, and the files of other libraries."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.quantization.algorithms.gptq import round_columns
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.numerics import (
    dequantize,
    dequantize_activation,
    fake_quantize,
    quantize_activation,
    quantize_weight,
)
from diffuse_compress.quantization.presets import resolve_preset
from diffuse_compress.quantization.scheme import PerBlock, PerGroup, PerTensor, PerToken, Scheme
from diffuse_compress_kernels import quantize_groups_fp8

FP8 = dc.NumberFormat.FLOAT8_E4M3
BLOCK, TENSOR = resolve_preset("fp8_block").scheme, resolve_preset("fp8_tensor").scheme
PER_TENSOR_ROWS = Scheme(dc.WeightScheme(FP8, PerTensor()), dc.ActivationScheme(FP8))
STATIC = Scheme(dc.WeightScheme(FP8, PerTensor()), dc.ActivationScheme(FP8, PerTensor(), dynamic=False))
BLOCK_STATIC = Scheme(BLOCK.weight, STATIC.activation)
CT, HF = "compressed-tensors", "fp8"


def build(scheme: Scheme, **sizes: Any) -> Any:
    """A small Llama; static input scales are made up, each its own."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, **sizes}
    model = tiny.build("llama", **sizes)
    static = scheme.has_static_inputs
    model.compress(dc.QuantizationConfig(Scheme(scheme.weight) if static else scheme), measure=False)
    for i, (name, layer) in enumerate(quantized_layers(model).items() if static else ()):
        scale = torch.tensor([0.01 + 0.001 * i])
        made = QuantizedLinear.from_dense(layer, layer.quantized_weight(), scheme, input_scale=scale)
        model.set_submodule(name, made)
    return model


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.inputs_for(model)).logits


def stored(model: Any) -> dict[str, list[Any]]:
    return {
        name: [layer.scheme, layer.qweight.view(torch.uint8), layer.scale, layer.input_scale]
        for name, layer in quantized_layers(model).items()
    }


def assert_same(first: Any, second: Any) -> None:
    ours, theirs = stored(first), stored(second)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        for mine, other in zip(values, theirs[name], strict=True):
            same = torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other
            assert same, name


def by_hand(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the codes of 128 by 128 blocks stand for, scales), block by block."""
    values = torch.empty_like(weight)
    starts = [range(0, side, 128) for side in weight.shape]
    scale = torch.empty(*map(len, starts))
    for i, top in enumerate(starts[0]):
        for j, left in enumerate(starts[1]):
            block = weight[top : top + 128, left : left + 128]
            scale[i, j] = block.abs().max() / 448
            values[top : top + 128, left : left + 128] = (block / scale[i, j]).to(torch.float8_e4m3fn).float() * scale[
                i, j
            ]
    return values, scale


def weight_of(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


# --- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 128), (300, 272), (1, 130), (130, 1), (64, 64), (384, 256)], ids=str)
def test_blocks_are_those_of_the_definition(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffuse_compress.quantization.numerics._CHUNK_CPU", 50 * shape[1])  # rows cut inside a block
    weight = weight_of(*shape)
    found = quantize_weight(weight, BLOCK.weight)
    values, scale = by_hand(weight)
    assert torch.equal(found.scale, scale)
    assert torch.equal(dequantize(found), values)
    assert torch.equal(fake_quantize(weight, BLOCK.weight), values)
    part = slice(shape[0] // 3, shape[0] - shape[0] // 4)
    assert torch.equal(dequantize(found, rows=part), values[part])
    assert BLOCK.weight_bytes(shape) == found.qweight.nbytes + found.scale.nbytes


@pytest.mark.parametrize("columns", [96, 128, 272])
def test_inputs_have_a_scale_per_row_and_128_columns(columns: int) -> None:
    x = weight_of(7, columns)
    x[2] = 0
    codes, scale, _ = quantize_activation(x, BLOCK.activation)
    assert scale.shape == (7, -(-columns // 128))
    for start in range(0, columns, 128):
        part = x[:, start : start + 128]
        own = (part.abs().amax(1, keepdim=True) / 448).clamp_min(torch.finfo(torch.float32).tiny)
        assert torch.equal(scale[:, start // 128, None], own)
        rounded = (part / own).to(torch.float8_e4m3fn).float() * own
        assert torch.equal(dequantize_activation(codes, scale)[:, start : start + 128], rounded)
    kernel = quantize_groups_fp8(x)
    assert torch.equal(kernel[0].float(), codes.float())
    assert torch.equal(kernel[1], scale)
    assert quantize_activation(x.view(1, 7, columns), BLOCK.activation)[1].shape == (1, 7, scale.shape[1])
    assert quantize_groups_fp8(x[:0])[1].shape == (0, scale.shape[1])


def test_a_layer_computes_with_its_blocks_forward_and_back() -> None:
    dense = torch.nn.Linear(272, 300)
    layer = quantize_module(dense, BLOCK, dc.RTNConfig())
    values, _ = by_hand(dense.weight.detach())
    assert torch.equal(layer.weight, values)
    x = torch.randn(3, 272, requires_grad=True)
    y = layer(x)
    assert torch.allclose(y, torch.nn.functional.linear(x, values, dense.bias), atol=1e-5)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(grad, values.sum(0).expand(3, -1), atol=1e-4)
    assert layer.compute_path("cpu").name == "dequantize-weight-only"  # no float8 product on a CPU
    with pytest.raises(dc.ModelStateError, match="a scale for each of 300 rows"):
        layer.scale_outputs(torch.ones(300))


def test_gptq_keeps_the_blocks_scales_and_lowers_the_error() -> None:
    weight = weight_of(200, 160)
    values, scale = by_hand(weight)
    inputs = torch.randn(400, 160, generator=torch.Generator().manual_seed(1)) @ weight_of(160, 160)
    hessian = inputs.T @ inputs
    for config in (dc.GPTQConfig(), dc.GPTQConfig(act_order=True, block_size=32)):
        rounded, qparams = round_columns(weight.clone(), hessian.clone(), BLOCK.weight, config)
        assert torch.equal(qparams.scale, scale)
        found = quantize_weight(rounded, BLOCK.weight, qparams)
        assert torch.equal(dequantize(found), rounded)
        error, plain = ((inputs @ (other - weight).T).norm() for other in (rounded, values))
        assert error < 0.8 * plain


def test_what_the_schemes_refuse() -> None:
    for make, message in [
        (lambda: dc.WeightScheme("int8", PerBlock()), "PerBlock is for float8 weights, got int8"),
        (lambda: PerBlock(64), "block_size must be 128"),
        (lambda: dc.ActivationScheme("int8", PerGroup(128)), "groups of inputs are float8, of 128 columns, got int8"),
        (lambda: dc.ActivationScheme(FP8, PerGroup(64)), "in groups of 64"),
        (lambda: Scheme(dc.WeightScheme(FP8), dc.ActivationScheme(FP8, PerGroup(128))), "go with weights in blocks"),
        (lambda: Scheme.from_dict({"weights": {**BLOCK.to_dict()["weights"], "block_structure": [64, 64]}}), "must be"),
    ]:
        with pytest.raises(dc.ConfigError, match=message):
            make()
    for scheme, name in [(BLOCK, "fp8-block"), (TENSOR, "fp8-tensor"), (Scheme(BLOCK.weight), "fp8-block-weight-only")]:
        assert scheme.name == name
        assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert resolve_preset("FP8-Block") is resolve_preset("finegrained_fp8")
    assert resolve_preset("fp8_per_tensor").scheme == TENSOR


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["fp8", "fp8_tensor", "fp8_block"])
def test_save_and_reload_and_bytes(preset: str, tmp_path: Path) -> None:
    model = tiny.build("llama", hidden_size=256, intermediate_size=320)  # 320 is two and a half blocks
    dense = output(model)
    plan = model.compression_plan(preset)
    model.compress(preset, measure=False)
    assert plan.bytes_after == sum(p.nbytes for p in model.state_dict().values())
    assert 0 < float((output(model) - dense).norm() / dense.norm()) < 0.1
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, again)
    assert torch.equal(output(again), output(model))


def test_convolutions_stay_dense_under_blocks() -> None:
    text = str(tiny.build("unet_sd1").compression_plan("fp8_block"))
    assert "scales of 128 by 128 blocks are for linear layers" in text


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="needs compressed-tensors")
@pytest.mark.parametrize("scheme", [BLOCK, TENSOR, BLOCK_STATIC], ids=["block", "tensor", "block-static"])
def test_compressed_tensors(scheme: Scheme, tmp_path: Path) -> None:
    # 448 rows are three and a half blocks; columns must be whole ones.
    model = build(scheme, vocab_size=448)
    model.save_pretrained(tmp_path, format=CT)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized"
    stock = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(stock.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    # They quantize the inputs, which we leave alone on a CPU.
    assert 0 < float((output(stock) - output(model)).norm() / output(model).norm()) < 0.2
    for name, layer in quantized_layers(model).items():
        assert torch.equal(dequantize(layer.quantized_weight()), stock.get_submodule(name).weight), name
    again = dc.import_quantized(tmp_path)
    assert_same(model, again)
    assert torch.equal(output(again), output(model))


@pytest.mark.parametrize(
    "scheme", [BLOCK, BLOCK_STATIC, PER_TENSOR_ROWS, STATIC], ids=["block", "block-static", "tensor", "static"]
)
def test_transformers_fp8(scheme: Scheme, tmp_path: Path) -> None:
    model = build(scheme, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "first", format=HF)
    config = json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8"
    assert config["weight_block_size"] == ([128, 128] if scheme.weight == BLOCK.weight else None)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    theirs = {name for name in names if should_convert_module(name, config["modules_to_not_convert"])}
    assert theirs == quantized_layers(model).keys()
    # Without a GPU transformers dequantizes, and then computes in the model's dtype.
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32)
    for name, layer in quantized_layers(model).items():
        assert torch.equal(dequantize(layer.quantized_weight()), stock.get_submodule(name).weight), name
    again = dc.import_quantized(tmp_path / "first")
    assert again.dtype == torch.bfloat16
    assert_same(model, again)
    assert torch.equal(output(again), output(model))
    assert float((output(again.float()) - output(stock)).norm() / output(stock).norm()) < 1e-6
    again.bfloat16().save_pretrained(tmp_path / "second", format=HF)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype
        assert torch.equal(value.float(), second[key].float()), key


def test_deepseek_shaped_edges_are_read_and_not_written(tmp_path: Path) -> None:
    """320 rows: two and a half blocks, as in DeepSeek-V3's kv_a_proj; transformers on a CPU takes them for 107 rows."""
    model = build(BLOCK, intermediate_size=320)
    with pytest.raises(dc.ConfigError, match=r"mlp\.down_proj.*sides \[256, 320\].*blocks to be of equal size"):
        model.save_pretrained(tmp_path / "no", format=HF)
    assert not (tmp_path / "no").exists()
    with pytest.raises(dc.ConfigError, match="a last block of columns that is not full"):
        model.save_pretrained(tmp_path / "no", format=CT)
    whole = build(BLOCK)
    whole.save_pretrained(tmp_path / "fp8", format=HF)
    file = tmp_path / "fp8" / "model.safetensors"
    tensors = load_file(file)
    for name, layer in quantized_layers(model).items():
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"] = layer.qweight.data, layer.scale.data
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["intermediate_size"] = 320
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    assert_same(model, dc.import_quantized(tmp_path / "fp8"))


def test_torchao_is_refused(tmp_path: Path) -> None:
    for scheme in (BLOCK, Scheme(BLOCK.weight)):
        with pytest.raises(dc.ConfigError, match="with scales per block, which are not written so"):
            build(scheme, num_hidden_layers=1).save_pretrained(tmp_path, format="torchao")


def test_what_the_fp8_format_refuses(tmp_path: Path) -> None:
    for scheme, message in [
        (resolve_preset("fp8").scheme, "a scale per row; transformers' fp8 has one per block"),
        (resolve_preset("w8a16").scheme, "transformers' fp8 holds float8 only"),
        (Scheme(BLOCK.weight), "readers quantize the inputs, too"),
        (TENSOR, "whose dynamic inputs have other scales than transformers' fp8's, per row"),
        (Scheme(BLOCK.weight, dc.ActivationScheme(FP8, PerToken())), "per row and 128 columns"),
    ]:
        with pytest.raises(dc.ConfigError, match=message):
            build(scheme, num_hidden_layers=1).save_pretrained(tmp_path, format=HF)
    assert not list(tmp_path.iterdir())
    model = tiny.build("llama").compress(
        dc.QuantizationConfig(BLOCK, overrides={"down_proj": PER_TENSOR_ROWS}), measure=False
    )
    with pytest.raises(dc.ConfigError, match="one form of weights and inputs in a file, found fp8-block, fp8-tensor"):
        model.save_pretrained(tmp_path, format=HF)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_block_size": [64, 64]}, "blocks are of"),
        ({"scale_fmt": "ue8m0"}, "scales are 'ue8m0'"),
        ({"activation_scheme": "odd"}, "activation_scheme is 'odd'"),
        ({"modules_to_convert": ["embed"]}, "embeddings in float8"),
    ],
    ids=str,
)
def test_checkpoints_that_are_not_read(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    build(BLOCK, num_hidden_layers=1).save_pretrained(tmp_path, format=HF)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(dc.ConfigError, match=message):
        dc.import_quantized(tmp_path)
