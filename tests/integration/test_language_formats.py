"""compressed-tensors, GPTQ and AWQ, out and in: codes and scales as they were, or nothing is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AwqConfig, CompressedTensorsConfig, GPTQConfig, LlamaForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module

import diffuse_compress as dc
import tiny
from diffuse_compress.cli import main
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.quantization.convert import quantize_module, replace_module
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.numerics import dequantize
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    Bilevel,
    NumberFormat,
    PerChannel,
    PerGroup,
    PerTensor,
    ScaleRule,
    Scheme,
    TwoLevel,
    WeightScheme,
)

INT8, INT4, INT3, INT2 = NumberFormat.INT8, NumberFormat.INT4, NumberFormat.INT3, NumberFormat.INT2
FP8 = NumberFormat.FLOAT8_E4M3
BF16, FP32 = torch.bfloat16, torch.float32
CT, GPTQ, AWQ = "compressed-tensors", "gptq", "awq"
STATIC = ActivationScheme(INT8, PerTensor(), dynamic=False)
FULL = ScaleRule.AMAX_OVER_HALF_RANGE
needs_compressed_tensors = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="needs compressed-tensors"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A scheme, the name of its compressed-tensors format, and the largest relative difference of the logits there."""

    scheme: Scheme
    form: str
    tolerance: float = 0.0
    dtype: torch.dtype = FP32


def asymmetric(fmt: NumberFormat, granularity: Any) -> WeightScheme:
    return WeightScheme(fmt, granularity, symmetric=False)


# Measured: 0 in float32 with inputs left alone. Dynamic int8 inputs, which compressed-tensors divides by amax / 127.5:
# 1.5 % to 2.3 %; static ones 2e-7 in one layer, until a code flips. float8 inputs, which we leave alone on a CPU: 4 %
# to 5 %. In bfloat16, to which the reader rounds our scales, 0.9 %.
CASES = {
    "w4a16-group": Case(Scheme(WeightScheme(INT4, PerGroup(32))), "pack-quantized"),
    "w4a16-group-asymmetric": Case(Scheme(asymmetric(INT4, PerGroup(64))), "pack-quantized"),
    "w4a16-channel": Case(Scheme(WeightScheme(INT4, PerChannel(), scale_rule=FULL)), "pack-quantized"),
    "w4a16-channel-asymmetric": Case(Scheme(asymmetric(INT4, PerChannel())), "pack-quantized"),
    "w4a16-bf16": Case(Scheme(WeightScheme(INT4, PerGroup(128))), "pack-quantized", 0.05, BF16),
    "w2a16": Case(Scheme(asymmetric(INT2, PerGroup(32))), "pack-quantized"),
    "w8a16": Case(Scheme(WeightScheme(INT8)), "pack-quantized"),
    "w8a8": Case(Scheme(WeightScheme(INT8), ActivationScheme(INT8)), "int-quantized", 0.1),
    "w8a8-tensor": Case(
        Scheme(WeightScheme(INT8, PerTensor()), ActivationScheme(INT8, PerTensor())), "int-quantized", 0.1
    ),
    "w8a8-static": Case(Scheme(WeightScheme(INT8), STATIC), "int-quantized", 0.05),
    "w8a8-static-asymmetric": Case(
        Scheme(WeightScheme(INT8), dataclasses.replace(STATIC, symmetric=False)), "int-quantized", 0.05
    ),
    "fp8": Case(Scheme(WeightScheme(FP8), ActivationScheme(FP8)), "float-quantized", 0.2),
    "fp8-static": Case(
        Scheme(WeightScheme(FP8, PerTensor()), ActivationScheme(FP8, PerTensor(), dynamic=False)),
        "float-quantized",
        0.2,
    ),
    "fp8-weight-only": Case(Scheme(WeightScheme(FP8)), "naive-quantized"),
}
# compressed-tensors 0.20 lays zero points out unpacked where transformers loads packed ones: read dense there.
DENSE = ("w4a16-group-asymmetric", "w4a16-channel-asymmetric", "w2a16")


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**tiny.inputs_for(model), return_dict=False)))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).float().norm() / ours.float().norm())


def compressed(scheme: Scheme, dtype: torch.dtype = FP32) -> Any:
    """A tiny Llama whose layers have the scheme; static input scales are made up, each its own."""
    act = scheme.activation
    if act is None or act.dynamic:
        return tiny.build("llama", dtype=dtype).compress(dc.QuantizationConfig(scheme), measure=False)
    model = tiny.build("llama", dtype=dtype).compress(dc.QuantizationConfig(Scheme(scheme.weight)), measure=False)
    for i, (name, layer) in enumerate(quantized_layers(model).items()):
        scale = torch.tensor([(0.05 if scheme.weight.format.is_integer else 0.01) + 0.001 * i])
        extra = {"input_scale": scale} | ({} if act.symmetric else {"input_zero_point": torch.tensor([i - 7])})
        new = QuantizedLinear.from_dense(layer, layer.quantized_weight(), scheme, compute_dtype=dtype, **extra)
        replace_module(model, name, new)
    return model


def as_stored(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
    return {
        name: (layer.qweight.view(torch.uint8), layer.scale, layer.zero_point, layer.input_scale)
        for name, layer in quantized_layers(model).items()
    }


def assert_same_codes_and_scales(ours: Any, theirs: Any) -> None:
    first, second = as_stored(ours), as_stored(theirs)
    assert first.keys() == second.keys()
    for name, tensors in first.items():
        for mine, other in zip(tensors, second[name], strict=True):
            assert (mine is None) == (other is None), name
            assert mine is None or (mine.dtype == other.dtype and torch.equal(mine, other)), name


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


# --- compressed-tensors -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("compressed_tensors")
    models = {}
    for name, case in CASES.items():
        models[name] = compressed(case.scheme, case.dtype)
        models[name].save_pretrained(folder / name, format=CT)
    return models, folder


@needs_compressed_tensors
@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_same_weights_and_logits(name: str, saved: Any) -> None:
    model, dtype = saved[0][name], CASES[name].dtype
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if name in DENSE else {}
    stock = LlamaForCausalLM.from_pretrained(saved[1] / name, dtype=dtype, **extra)
    if not extra:
        assert type(stock.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    assert relative(output(model), output(stock)) <= CASES[name].tolerance
    if dtype == FP32:  # a reader in bfloat16 rounds the scales first
        for key, layer in quantized_layers(model).items():
            assert torch.equal(dequantize(layer.quantized_weight()), stock.get_submodule(key).weight), key
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight)


@needs_compressed_tensors
@pytest.mark.parametrize("name", ["w4a16-group-asymmetric", "w4a16-channel-asymmetric", "w4a16-group", "w8a8", "fp8"])
def test_their_compressor_writes_the_same_file(name: str, saved: Any) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    group = QuantizationConfig.model_validate(config_of(saved[1] / name)).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(CASES[name].form)
    tensors, layer = load_file(saved[1] / name / "model.safetensors"), "model.layers.1.mlp.down_proj"
    own = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{layer}.")}
    again = compressor.compress(compressor.decompress(own, group), group)
    assert again.keys() == own.keys()
    for leaf, value in own.items():
        assert again[leaf].dtype == value.dtype, leaf
        assert again[leaf].tolist() == value.tolist(), leaf


@pytest.mark.parametrize("name", CASES)
def test_compressed_tensors_comes_back_as_it_was(name: str, saved: Any) -> None:
    model, case = saved[0][name], CASES[name]
    config = config_of(saved[1] / name)
    assert config["format"] == case.form
    assert config["ignore"] == ["lm_head"]
    again = dc.import_quantized(saved[1] / name)
    assert_same_codes_and_scales(model, again)
    assert torch.equal(output(again), output(model))


def test_scales_are_in_the_models_dtype_where_that_is_exact(tmp_path: Path) -> None:
    model = compressed(Scheme(WeightScheme(INT4, PerGroup(32))), BF16)
    coarse = next(iter(quantized_layers(model).values()))
    coarse.scale.data = coarse.scale.bfloat16().float()
    model.save_pretrained(tmp_path, format=CT)
    scales = [value for key, value in load_file(tmp_path / "model.safetensors").items() if key.endswith("weight_scale")]
    assert sorted({str(scale.dtype) for scale in scales}) == ["torch.bfloat16", "torch.float32"]


def test_every_layer_may_have_its_own_scheme(tmp_path: Path) -> None:
    model = tiny.build("llama")
    scheme = Scheme(asymmetric(INT4, PerGroup(64)))
    overrides = {"down_proj": Scheme(WeightScheme(INT8), ActivationScheme(INT8)), "layers.0.self_attn": None}
    model.compress(dc.QuantizationConfig(scheme, overrides=overrides), measure=False)
    model.save_pretrained(tmp_path, format=CT)
    config = config_of(tmp_path)
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {"pack-quantized", "int-quantized"}
    assert "model.layers.0.self_attn.q_proj" in config["ignore"]
    assert "model.layers.1.self_attn.q_proj" in config["config_groups"]["group_0"]["targets"]
    again = dc.import_quantized(tmp_path)
    assert_same_codes_and_scales(model, again)
    assert torch.equal(output(again), output(model))
    with pytest.raises(dc.ConfigError, match="GPTQ's format does not have"):
        model.save_pretrained(tmp_path / "gptq", format=GPTQ)


# --- GPTQ and AWQ -----------------------------------------------------------------------------------------------

PACKED = {
    (GPTQ, "group"): Scheme(WeightScheme(INT4, PerGroup(32))),
    (GPTQ, "group-asymmetric"): Scheme(asymmetric(INT4, PerGroup(64))),
    (GPTQ, "channel"): Scheme(WeightScheme(INT4, PerChannel(), scale_rule=FULL)),
    (GPTQ, "three bits"): Scheme(asymmetric(INT3, PerGroup(64))),
    (GPTQ, "eight bits"): Scheme(WeightScheme(INT8, PerGroup(128))),
    (AWQ, "group"): Scheme(WeightScheme(INT4, PerGroup(32))),
    (AWQ, "group-asymmetric"): Scheme(asymmetric(INT4, PerGroup(128))),
    (AWQ, "channel-asymmetric"): Scheme(asymmetric(INT4, PerChannel())),
}


def bits_of(words: list[int], bits: int, count: int) -> list[int]:
    """Codes of a row of words, one bit after the other."""
    number = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
    return [(number >> bits * i) & ((1 << bits) - 1) for i in range(count)]


def naive_weight(own: dict[str, torch.Tensor], config: dict[str, Any]) -> torch.Tensor:
    """[N, K] from the words of a layer by the definition of its format, one code after the other."""
    bits = config["bits"]
    scales = own["scales"].float()
    groups, rows = scales.shape
    columns = (
        own["qweight"].shape[0]
        * (1 if config["quant_method"] == AWQ else 32)
        // (1 if config["quant_method"] == AWQ else bits)
    )
    size = columns // groups
    if config["quant_method"] == AWQ:
        where = {column: place for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}

        def uninterleaved(words: torch.Tensor) -> torch.Tensor:
            lines = [bits_of(line, 4, rows) for line in words.tolist()]
            return torch.tensor([[line[n // 8 * 8 + where[n % 8]] for n in range(rows)] for line in lines])

        codes, zeros = uninterleaved(own["qweight"]), uninterleaved(own["qzeros"])
    else:
        codes = torch.tensor([bits_of(line, bits, columns) for line in own["qweight"].T.tolist()]).T
        zeros = torch.tensor([bits_of(line, bits, rows) for line in own["qzeros"].tolist()])
        zeros = zeros + 1 if config["checkpoint_format"] == "gptq" else zeros
        assert own["g_idx"].tolist() == [k // size for k in range(columns)]
    group = torch.arange(columns) // size
    return (scales[group] * (codes - zeros[group])).T


@pytest.mark.parametrize(("form", "name"), PACKED)
def test_packed_layers_mean_the_same_weight_and_come_back(form: str, name: str, tmp_path: Path) -> None:
    model = compressed(PACKED[form, name])
    model.save_pretrained(tmp_path, format=form)
    config, tensors = config_of(tmp_path), load_file(tmp_path / "model.safetensors")
    assert config["quant_method"] == form
    for key in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        own = {leaf.rpartition(".")[2]: tensor for leaf, tensor in tensors.items() if leaf.startswith(f"{key}.")}
        ours = dequantize(model.get_submodule(key).quantized_weight())
        assert torch.equal(naive_weight(own, config), ours), key
    again = dc.import_quantized(tmp_path)
    assert_same_codes_and_scales(model, again)
    assert torch.equal(output(again), output(model))


@needs_compressed_tensors
def test_their_reader_of_awq_sees_our_weight(tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert import AutoAWQConverter

    model = compressed(PACKED[AWQ, "group-asymmetric"])
    model.save_pretrained(tmp_path, format=AWQ)
    converter = AutoAWQConverter.from_pretrained(str(tmp_path))
    tensors = converter.process(load_file(tmp_path / "model.safetensors"))
    group = converter.update_config(None).config_groups["config_group_0"]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, layer in quantized_layers(model).items():
        own = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        assert torch.equal(compressor.decompress(own, group)["weight"], dequantize(layer.quantized_weight())), name


def test_symmetric_zero_points_are_the_known_words(tmp_path: Path) -> None:
    model = compressed(PACKED[GPTQ, "group"])
    for form, word in ((GPTQ, 0x77777777), (AWQ, 0x88888888 - (1 << 32))):
        model.save_pretrained(tmp_path / form, format=form)
        tensors = load_file(tmp_path / form / "model.safetensors")
        zeros = [value for key, value in tensors.items() if key.endswith("qzeros")]
        assert len(zeros) == 14
        assert all(bool((value == word).all()) for value in zeros)


@pytest.mark.parametrize("form", [GPTQ, AWQ])
def test_what_an_import_gives_is_written_byte_for_byte(form: str, tmp_path: Path) -> None:
    """Scales of checkpoints are float16: they stay what they are."""
    model = compressed(PACKED[form, "group-asymmetric"], torch.float16)
    for layer in quantized_layers(model).values():
        layer.scale.data = layer.scale.half().float()
    model.save_pretrained(tmp_path / "first", format=form)
    again = dc.import_quantized(tmp_path / "first")
    assert again.dtype == torch.float16
    again.save_pretrained(tmp_path / "second", format=form)
    assert config_of(tmp_path / "first") == config_of(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype, key
        assert torch.equal(value, second[key]), key
    assert first["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16
    report = again.compression_report().to_dict()["components"]
    assert next(iter(report.values()))["imported"]


def test_transformers_configs_take_ours(tmp_path: Path) -> None:
    model = tiny.build("llama")
    scheme = Scheme(asymmetric(INT4, PerGroup(64)))
    model.compress(dc.QuantizationConfig(scheme, overrides={"down_proj": None}), measure=False)
    model.save_pretrained(tmp_path / GPTQ, format=GPTQ)
    content = config_of(tmp_path / GPTQ)
    places = [place for group in content.pop("modules_in_block_to_quantize") for place in group]
    # With that entry transformers asks for optimum, without which it reads no GPTQ at all.
    config = GPTQConfig.from_dict(dict(content))
    assert (config.bits, config.group_size, config.sym, config.desc_act) == (4, 64, False, False)
    assert config.format == "gptq_v2"
    assert config.block_name_to_quantize == "model.layers"
    assert "mlp.up_proj" in places
    assert "mlp.down_proj" not in places
    assert list(content["dynamic"]) == [r"-:model\.layers\.\d+\.mlp\.down_proj$"]
    assert_same_codes_and_scales(model, dc.import_quantized(tmp_path / GPTQ))

    model.save_pretrained(tmp_path / AWQ, format=AWQ)
    content = config_of(tmp_path / AWQ)
    awq = AwqConfig.from_dict(dict(content))
    assert (awq.bits, awq.group_size, awq.zero_point, str(awq.format)) == (4, 64, True, "gemm")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            is_ours = isinstance(module, QuantizedLinear)
            assert should_convert_module(name, awq.modules_to_not_convert) == is_ours, name


# --- refusals ---------------------------------------------------------------------------------------------------

PLAIN = Scheme(WeightScheme(INT4, PerGroup(32)))
REFUSED: dict[str, tuple[str, Scheme, dict[str, Any], str]] = {
    "low rank": (CT, PLAIN, {"low_rank": (torch.ones(4, 128), torch.ones(128, 4))}, "low-rank branch"),
    "dense columns": (
        CT,
        PLAIN,
        {"dense_columns": (torch.tensor([3]), torch.ones(128, 1))},
        "dense input columns beside the codes",
    ),
    "columns at run time": (
        CT,
        Scheme(WeightScheme(INT8), ActivationScheme(INT8, outlier_threshold=6.0)),
        {},
        "columns chosen at run time",
    ),
    "gptq columns at run time": (
        GPTQ,
        Scheme(WeightScheme(INT8), ActivationScheme(INT8, outlier_threshold=6.0)),
        {},
        "columns chosen at run time",
    ),
    "bilevel": (AWQ, Scheme(WeightScheme(INT4, Bilevel(), symmetric=False)), {}, "scales that are codes themselves"),
    "smoothed": (CT, PLAIN, {"act_pre_scale": torch.ones(128)}, "smoothing scale of its inputs"),
    "rotated": (CT, dataclasses.replace(PLAIN, input_rotation=128), {}, "rotated at run time"),
    "two levels": (CT, Scheme(WeightScheme(INT4, TwoLevel())), {}, "two levels of scales"),
    "float zero points": (
        CT,
        Scheme(WeightScheme(INT4, PerGroup(32), False, float_zero_point=True)),
        {},
        "no integers",
    ),
    "short group": (CT, Scheme(WeightScheme(INT4, PerGroup(128, pad=True))), {}, "a last group that is not full"),
    "three bits": (CT, Scheme(WeightScheme(INT3, PerGroup(32))), {}, "packing differs between releases"),
    "int4 inputs": (CT, Scheme(WeightScheme(INT8), ActivationScheme(INT4)), {}, "quantize no inputs to int4"),
    "packed and int8 inputs": (CT, Scheme(WeightScheme(INT4), ActivationScheme(INT8)), {}, "inputs in 16 bits"),
    "packed tensor": (CT, Scheme(WeightScheme(INT8, PerTensor())), {}, "one scale for the tensor"),
    "gptq inputs": (GPTQ, Scheme(WeightScheme(INT8), ActivationScheme(INT8)), {}, "with quantized inputs"),
    "gptq float8": (GPTQ, Scheme(WeightScheme(FP8)), {}, "holds integers only"),
    "gptq words": (GPTQ, PLAIN, {"rows": 100}, "do not fill words"),
    "awq bits": (AWQ, Scheme(WeightScheme(INT8)), {}, "holds int4 only"),
    "awq rows": (AWQ, PLAIN, {"rows": 100}, "packs eight into a word"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    form, scheme, given, reason = REFUSED[case]
    extra = dict(given)
    columns = 160 if case == "short group" else 128
    dense = torch.nn.Linear(columns, extra.pop("rows", 128))
    weight = quantize_module(dense, scheme, dc.RTNConfig()).quantized_weight()
    model = compressed(PLAIN)
    name = next(iter(quantized_layers(model)))
    replace_module(model, name, QuantizedLinear.from_dense(dense, weight, scheme, **extra))
    with pytest.raises(dc.ConfigError, match=reason) as error:
        model.save_pretrained(tmp_path / "out", format=form)
    assert name in str(error.value)
    assert "got 1 of 14" in str(error.value)
    assert not (tmp_path / "out").exists()


WHOLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "kinds": (GPTQ, {"down_proj": Scheme(WeightScheme(INT8))}, "one kind of weight in a file, found 2"),
    "head": (GPTQ, {"lm_head": PLAIN}, "in the blocks of one list, found others: lm_head"),
    "one block": (GPTQ, {"layers.0.mlp.up_proj": None}, r"stay dense: model.layers.0.mlp.up_proj"),
    "awq sizes": (
        AWQ,
        {"down_proj": Scheme(WeightScheme(INT4, PerGroup(64)))},
        "one group size in a file, found 32, 64",
    ),
    "awq head": (AWQ, {"lm_head": PLAIN}, "leave the output layer dense"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_mixtures_that_a_format_cannot_name_are_refused(case: str, tmp_path: Path) -> None:
    form, overrides, reason = WHOLE[case]
    model = tiny.build("llama").compress(dc.QuantizationConfig(PLAIN, overrides=overrides), measure=False)
    with pytest.raises(dc.ConfigError, match=f"cannot describe this model: .*{reason}"):
        model.save_pretrained(tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


def test_models_of_diffusers_adapters_and_dense_models_are_refused(tmp_path: Path) -> None:
    pixart = tiny.build("pixart").compress("w8a16", measure=False)
    with pytest.raises(dc.ConfigError, match=r"needs a transformers model, got PixArt.*of diffusers"):
        pixart.save_pretrained(tmp_path / "out", format=CT)
    model = compressed(PLAIN)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(dc.ConfigError, match="needs a model without adapters"):
        model.save_pretrained(tmp_path / "out", format=CT)
    with pytest.raises(dc.ConfigError, match="got LlamaForCausalLM, which is dense"):
        tiny.build("llama").save_pretrained(tmp_path / "out", format=AWQ)
    assert not (tmp_path / "out").exists()


def test_saving_leaves_the_live_model_as_it_is(tmp_path: Path) -> None:
    model = compressed(PACKED[AWQ, "group-asymmetric"])
    before, marks, config = output(model), dict(model.__dict__), model.config.quantization_config
    for form in (CT, GPTQ, AWQ):
        model.save_pretrained(tmp_path / form, format=form)
        assert model.__dict__.keys() == marks.keys()
        assert all(model.__dict__[key] is value for key, value in marks.items())
        assert model.config.quantization_config is config
    assert torch.equal(output(model), before)
    assert "pip install transformers gptqmodel" in (tmp_path / AWQ / "README.md").read_text()


# --- imports of others ------------------------------------------------------------------------------------------


def _edited(source: Path, folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor | None]) -> Path:
    """A copy of a checkpoint with other entries of its quantization_config, and other tensors (None: taken out)."""
    shutil.copytree(source, folder)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(content))
    found = load_file(folder / "model.safetensors") | tensors
    save_file({key: value for key, value in found.items() if value is not None}, folder / "model.safetensors")
    return folder


UP = "model.layers.0.mlp.up_proj"
UNREADABLE: dict[str, tuple[str, dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "bits": (GPTQ, {"bits": 5}, {}, dc.ConfigError, "have 5 bits"),
    "layers of their own": (GPTQ, {"dynamic": {"+:.*up_proj": {"bits": 8}}}, {}, dc.ConfigError, "of their own"),
    "act order": (
        GPTQ,
        {},
        {f"{UP}.g_idx": torch.arange(128, dtype=torch.int32).flip(0) // 32},
        dc.ConfigError,
        f"{UP}: with columns in another order",
    ),
    "zero points": (
        GPTQ,
        {},
        {f"{UP}.qzeros": torch.full((4, 32), -1, dtype=torch.int32)},
        dc.ConfigError,
        "take for 0 or for 16",
    ),
    "infinite": (GPTQ, {}, {f"{UP}.scales": torch.full((4, 256), torch.inf)}, dc.ConfigError, "a scale is inf or nan"),
    "incomplete layer": (GPTQ, {}, {f"{UP}.qzeros": None}, dc.CheckpointError, f"{UP} lacks 'qzeros'"),
    "incomplete model": (GPTQ, {}, {"model.norm.weight": None}, dc.CheckpointError, "lacks 1 tensors"),
    "awq version": (AWQ, {"version": "gemv"}, {}, dc.ConfigError, "of version 'gemv'"),
    "keys and values": (CT, {"kv_cache_scheme": {"num_bits": 8}}, {}, dc.ConfigError, "keys and values are quantized"),
    "transforms": (CT, {"transform_config": {"x": 1}}, {}, dc.ConfigError, "transforms tensors at run time"),
    "format": (
        CT,
        {"config_groups": {"group_0": {"targets": ["Linear"], "format": "nvfp4-pack-quantized"}}},
        {},
        dc.ConfigError,
        "of format 'nvfp4-pack-quantized'",
    ),
    "blocks": (
        CT,
        {
            "config_groups": {
                "group_0": {"targets": ["re:model.*"], "format": "pack-quantized", "weights": {"strategy": "block"}}
            }
        },
        {},
        dc.ConfigError,
        "scales by 'block'",
    ),
}


@pytest.fixture(scope="module")
def plain_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    model = compressed(PLAIN)
    for form in (CT, GPTQ, AWQ):
        model.save_pretrained(folder / form, format=form)
    return folder


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_imported_is_refused(case: str, plain_checkpoints: Path, tmp_path: Path) -> None:
    form, config, tensors, error, message = UNREADABLE[case]
    folder = _edited(plain_checkpoints / form, tmp_path / "edited", config, tensors)
    with pytest.raises(error, match=message):
        dc.import_quantized(folder)


def test_an_import_saves_and_reloads_as_ours(plain_checkpoints: Path, tmp_path: Path) -> None:
    model = dc.import_quantized(plain_checkpoints / GPTQ)
    expected = output(model)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "ours")), expected)
    assert relative(output(model.decompress()), expected) < 1e-5


# --- the command line -------------------------------------------------------------------------------------------


def test_the_command_line_writes_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "dense")
    command = ["compress", str(tmp_path / "dense"), "--no-measure", "--recipe"]
    assert main([*command, "w4a16", "--format", GPTQ, "--out", str(tmp_path / GPTQ)]) == 0
    assert config_of(tmp_path / GPTQ)["checkpoint_format"] == "gptq_v2"
    assert len(quantized_layers(dc.import_quantized(tmp_path / GPTQ))) == 14
    assert main([*command, "w8a8", "--format", AWQ, "--out", str(tmp_path / AWQ)]) == 1
    assert "w8a8 with quantized inputs, which AWQ's format does not have" in capsys.readouterr().err
    assert not (tmp_path / AWQ).exists()
