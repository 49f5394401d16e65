"""``format="torchao"``: read by stock libraries without us, codes and scales as they were, or nothing is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.quantization.convert import quantize_module, replace_module
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.numerics import dequantize
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    NumberFormat,
    PerChannel,
    PerGroup,
    PerTensor,
    ScaleRule,
    Scheme,
    WeightScheme,
)

ROOT = Path(__file__).parents[2]
INT8, INT4, FP8 = NumberFormat.INT8, NumberFormat.INT4, NumberFormat.FLOAT8_E4M3
BF16, FP32 = torch.bfloat16, torch.float32
# (model, scheme, dtype, largest relative difference of the output). Measured on a CPU without bf16 instructions:
# 2e-7 to 6e-7 for w8a16 in fp32, where torchao scales after the product; 0.5 % to 0.9 % in bf16, to which it rounds
# its scale; 0.2 % to 2.0 % for w8a8, whose inputs torchao divides by amax / 127.5; 0.9 % for fp8, whose inputs we leave
# alone there. Five times that is far below what a wrong scale or a transposed code would give.
CASES = {
    "pixart-w8a16": ("pixart", "w8a16", FP32, 1e-6),
    "pixart-w8a8": ("pixart", "w8a8", FP32, 0.02),
    "pixart-fp8": ("pixart", "fp8", BF16, 0.05),
    "pixart-group": ("pixart", Scheme(WeightScheme(INT8, PerGroup(32))), FP32, 1e-6),
    "pixart-tensor": ("pixart", Scheme(WeightScheme(INT8, PerTensor())), FP32, 1e-6),
    "t5-w8a16": ("t5_encoder", "w8a16", BF16, 0.05),
    "t5-w8a8": ("t5_encoder", "w8a8", FP32, 0.1),
    "llama-fp8wo": ("llama", Scheme(WeightScheme(FP8, PerChannel())), BF16, 0.01),
    "clip-w8a16": ("clip_text", "w8a16", FP32, 1e-6),
}

READ = """
import importlib, json, sys
import torch, tiny
from diffusers import DiffusionPipeline
folder, cases = sys.argv[1], json.loads(sys.argv[2])
found, inputs = {}, torch.load(f"{folder}/inputs.pt")
for case, (library, cls, dtype) in cases.items():
    cls = getattr(importlib.import_module(library), cls)
    model = cls.from_pretrained(f"{folder}/{case}", dtype=getattr(torch, dtype))
    weights = {
        name: module.weight.dequantize(torch.float32)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "torchao" in type(module.weight).__module__
    }
    dense = {key: value for key, value in model.state_dict().items() if type(value) is torch.Tensor}
    with torch.no_grad():
        output = model(**inputs[case], return_dict=False)[0]
    found[case] = (weights, dense, output)
pipe = DiffusionPipeline.from_pretrained(f"{folder}/pipe", dtype=torch.float32)
found["pipe"] = pipe(**tiny.call_kwargs(pipe, output_type="pt")).images
assert "diffuse_compress" not in sys.modules
torch.save(found, f"{folder}/found.pt")
"""


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**tiny.inputs_for(model), return_dict=False)))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).float().norm() / ours.float().norm())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Any, Path]:
    """(our models, what a process without us read of them, our pipeline, the folder)."""
    folder = tmp_path_factory.mktemp("torchao")
    models, arguments = {}, {}
    for case, (name, scheme, dtype, _) in CASES.items():
        model = tiny.build(name, dtype=dtype).compress(dc.QuantizationConfig(scheme), measure=False)
        # Several shards: torchao's reader must find a tensor's parts across them.
        model.save_pretrained(folder / case, format="torchao", max_shard_size="100KB")
        library = "diffusers" if isinstance(model, diffusers.ModelMixin) else "transformers"
        models[case], arguments[case] = model, [library, type(model).__name__, str(dtype).removeprefix("torch.")]
    pipe = tiny.build_pipeline("pixart").compress({"transformer": "w8a16", "text_encoder": "w8a16"}, measure=False)
    pipe.save_pretrained(folder / "pipe", format="torchao")
    torch.save({case: tiny.inputs_for(model) for case, model in models.items()}, folder / "inputs.pt")
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READ, str(folder), json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "Config Deprecation" not in done.stderr, done.stderr
    return models, torch.load(folder / "found.pt"), pipe, folder


@pytest.mark.parametrize("case", CASES)
def test_stock_libraries_read_the_same_weights_without_our_import(case: str, saved: Any) -> None:
    model, (weights, dense, result) = saved[0][case], saved[1][case]
    layers = quantized_layers(model)
    assert weights.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.equal(dequantize(layer.quantized_weight()), weights[name]), name
    ours = model.state_dict()
    for key, value in dense.items():
        assert value.dtype == ours[key].dtype, key
        assert torch.equal(value, ours[key]), key
    assert relative(output(model), result) < CASES[case][3]


def test_a_whole_pipeline_runs_without_our_import(saved: Any) -> None:
    pipe = saved[2]
    ours = pipe(**tiny.call_kwargs(pipe, output_type="pt")).images
    assert relative(ours, saved[1]["pipe"]) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_import_of_what_was_written_gives_our_output_back(case: str, saved: Any) -> None:
    model, dtype = saved[0][case], CASES[case][2]
    again = dc.import_quantized(type(model).from_pretrained(saved[3] / case, dtype=dtype))
    assert torch.equal(output(again), output(model))


def test_saving_leaves_the_live_model_as_it_is(tmp_path: Path) -> None:
    for name in ("pixart", "llama"):
        model = tiny.build(name).compress("w8a16")
        before, marks, config = output(model), dict(model.__dict__), model.config.quantization_config
        model.save_pretrained(tmp_path / name, format="torchao")
        assert model.__dict__.keys() == marks.keys()
        assert all(model.__dict__[key] is value for key, value in marks.items())
        assert model.config.quantization_config is config
        assert torch.equal(output(model), before)
        model.save_pretrained(tmp_path / name)
        assert torch.equal(output(type(model).from_pretrained(tmp_path / name)), before)


def test_config_names_every_format_and_what_stayed_dense(saved: Any) -> None:
    content = json.loads((saved[3] / "pixart-w8a8" / "config.json").read_text())["quantization_config"]
    assert content["quant_method"] == "torchao"
    rules = content["quant_type"]["default"]["_data"]["fqn_to_config"]
    kinds = {rule: config["_type"] for rule, config in rules.items()}
    assert kinds[r"re:adaln_single\.linear"] == "Int8WeightOnlyConfig"
    assert "Int8DynamicActivationInt8WeightConfig" in kinds.values()
    model = saved[0]["pixart-w8a8"]
    dense = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert content["modules_to_not_convert"] == dense


# --- refusals ---------------------------------------------------------------------------------------------------


def _scheme(weight: WeightScheme, activation: ActivationScheme | None = None) -> Scheme:
    return Scheme(weight, activation)


REFUSED = {
    "int4": (_scheme(WeightScheme(INT4, PerGroup(32))), "w4a16; torchao packs int4 codes"),
    "asymmetric": (_scheme(WeightScheme(INT8, symmetric=False)), "zero points, which torchao's int8 products ignore"),
    "groups and int8 inputs": (_scheme(WeightScheme(INT8, PerGroup(32)), ActivationScheme(INT8)), "one per row"),
    "short group": (_scheme(WeightScheme(INT8, PerGroup(64, pad=True))), "a last group that is not full"),
    "int4 inputs": (_scheme(WeightScheme(INT8), ActivationScheme(INT4)), "quantizes no inputs to int4"),
    "mixed rows": (_scheme(WeightScheme(FP8, PerTensor()), ActivationScheme(FP8)), "on one side only"),
    "fp8 in fp32": (_scheme(WeightScheme(FP8), ActivationScheme(FP8)), r"row-wise product is bfloat16"),
}


def _in_place_of_first(model: Any, change: Any) -> str:
    """Let ``change`` make a new layer of the first compressed one; returns its name."""
    name, layer = next(iter(quantized_layers(model).items()))
    replace_module(model, name, change(layer))
    return name


@pytest.mark.parametrize("case", REFUSED)
def test_what_torchao_cannot_hold_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    scheme, reason = REFUSED[case]
    in_features = 96 if case == "short group" else 128
    dense = torch.nn.Linear(in_features, 128)
    model = tiny.build("llama").compress("w8a16", measure=False)
    layer = quantize_module(dense, scheme, dc.RTNConfig())
    name = _in_place_of_first(model, lambda _: layer)
    with pytest.raises(dc.ConfigError, match=reason) as error:
        model.save_pretrained(tmp_path / "out", format="torchao")
    assert name in str(error.value)
    assert "got 1 of 14" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "scheme", "reason"),
    [
        ({"low_rank": (torch.ones(4, 128), torch.ones(128, 4))}, Scheme(WeightScheme(INT8)), "low-rank branch"),
        ({"dense_columns": (torch.tensor([3]), torch.ones(128, 1))}, Scheme(WeightScheme(INT8)), "dense input columns"),
        (
            {},
            Scheme(WeightScheme(INT8), ActivationScheme(INT8, outlier_threshold=6.0)),
            "columns chosen at run time",
        ),
        ({"act_pre_scale": torch.ones(128)}, Scheme(WeightScheme(INT8)), "smooths only inputs that it quantizes"),
        ({"act_pre_scale": torch.ones(128)}, Scheme(WeightScheme(FP8)), "float8 tensors do not have"),
        (
            {"input_scale": torch.ones(1)},
            Scheme(WeightScheme(INT8), ActivationScheme(INT8, PerTensor(), dynamic=False)),
            "static inputs",
        ),
    ],
    ids=["low rank", "dense columns", "llm.int8", "smoothed", "smoothed fp8", "static"],
)
def test_layers_with_more_than_codes_and_scales_are_refused(
    given: dict[str, Any], scheme: Scheme, reason: str, tmp_path: Path
) -> None:
    model = tiny.build("llama", dtype=BF16).compress("w8a16", measure=False)
    dense = torch.nn.Linear(128, 128, dtype=BF16)
    plain = quantize_module(dense, Scheme(scheme.weight), dc.RTNConfig()).quantized_weight()
    _in_place_of_first(model, lambda _: QuantizedLinear.from_dense(dense, plain, scheme, **given))
    with pytest.raises(dc.ConfigError, match=reason):
        model.save_pretrained(tmp_path / "out", format="torchao")
    assert not (tmp_path / "out").exists()


def test_smoothed_int8_inputs_are_written(tmp_path: Path) -> None:
    model = tiny.build("llama").compress("w8a8", measure=False)
    smooth = torch.rand(128) + 0.5

    def change(layer: Any) -> QuantizedLinear:
        return QuantizedLinear.from_dense(
            layer, layer.quantized_weight(), layer.scheme, compute_dtype=FP32, act_pre_scale=smooth
        )

    name = _in_place_of_first(model, change)
    model.save_pretrained(tmp_path, format="torchao")
    stock = type(model).from_pretrained(tmp_path, dtype=FP32)
    assert torch.equal(stock.get_submodule(name).weight.act_pre_scale, smooth)
    assert relative(output(model), output(stock)) < 0.1
    assert torch.equal(output(dc.import_quantized(stock)), output(model))


def test_convolutions_are_refused_and_other_components_are_not(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("stable_diffusion").compress({"unet": "w8a8", "text_encoder": "w8a16"}, measure=False)
    with pytest.raises(
        dc.ConfigError, match=r"unet: format=.*a convolution; torchao's loaders know linear layers only"
    ):
        pipe.save_pretrained(tmp_path / "out", format="torchao")
    assert not (tmp_path / "out").exists()
    pipe.save_pretrained(tmp_path / "out", format={"text_encoder": "torchao"})
    methods = {
        name: json.loads((tmp_path / "out" / name / "config.json").read_text())["quantization_config"]["quant_method"]
        for name in ("unet", "text_encoder")
    }
    assert methods == {"unet": "diffuse_compress", "text_encoder": "torchao"}
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=FP32)
    again = dc.import_quantized(again)
    assert torch.equal(tiny.sample(again), tiny.sample(pipe))


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("gguf", "format='gguf'"),
        ({"text_encoder": "onnx"}, "format='onnx'"),
        ({"vae": "torchao"}, "needs compressed components, got vae, which is dense"),
        ({"textencoder": "torchao"}, "did you mean 'text_encoder"),
    ],
)
def test_unknown_formats_and_components_are_refused(format: Any, message: str, tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart").compress({"text_encoder": "w8a16"}, measure=False)
    with pytest.raises(dc.ConfigError, match=message):
        pipe.save_pretrained(tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_a_dense_object_takes_no_format(tmp_path: Path) -> None:
    with pytest.raises(dc.ConfigError, match="got LlamaForCausalLM, which is dense"):
        tiny.build("llama").save_pretrained(tmp_path / "out", format="torchao")


def test_adapters_are_refused(tmp_path: Path) -> None:
    model = tiny.build("llama").compress("w8a16", measure=False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(dc.ConfigError, match="needs a model without adapters"):
        model.save_pretrained(tmp_path / "out", format="torchao")
    assert not (tmp_path / "out").exists()


def test_a_part_that_was_compressed_alone_is_written_with_the_whole(tmp_path: Path) -> None:
    model = tiny.build("llama")
    model.model.compress("w8a16", measure=False)
    model.save_pretrained(tmp_path, format="torchao")
    stock = type(model).from_pretrained(tmp_path, dtype=FP32)
    assert "torchao" in type(stock.model.layers[0].mlp.up_proj.weight).__module__
    assert relative(output(model), output(stock)) < 1e-6


def test_scale_rules_do_not_matter_to_what_is_written(tmp_path: Path) -> None:
    """Codes down to -128 are torchao's too."""
    scheme = Scheme(WeightScheme(INT8, scale_rule=ScaleRule.AMAX_OVER_HALF_RANGE))
    model = tiny.build("clip_text").compress(dc.QuantizationConfig(scheme), measure=False)
    assert min(int(layer.qweight.min()) for layer in quantized_layers(model).values()) == -128
    model.save_pretrained(tmp_path, format="torchao")
    stock = transformers.CLIPTextModel.from_pretrained(tmp_path, dtype=FP32)
    assert relative(output(model), output(stock)) < 1e-6
