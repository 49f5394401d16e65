"""``import_quantized``: other libraries' layers on ours, weights equal bit for bit, or refused and left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

import diffuse_compress as dc
import diffuse_compress.importing
import tiny
from diffuse_compress.integrations.component import get_state, quantized_layers
from diffuse_compress.quantization.numerics import dequantize
from diffuse_compress.quantization.scheme import ActivationScheme, NumberFormat

BF16, FP32 = torch.bfloat16, torch.float32
GGML = gguf.GGMLQuantizationType


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**tiny.inputs_for(model), return_dict=False)))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).float().norm() / theirs.float().norm())


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: dequantize(layer.quantized_weight()) for name, layer in quantized_layers(model).items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def assert_reloads(model: Any, folder: Path) -> None:
    """Saved and read by plain from_pretrained: the same bits and the same report; then back to dense layers."""
    expected = output(model)
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    assert torch.equal(output(again), expected)
    tensors = model.state_dict()
    for key, value in again.state_dict().items():
        assert value.dtype == tensors[key].dtype, key
        assert torch.equal(value.view(torch.uint8), tensors[key].view(torch.uint8)), key
    assert get_state(again).config == get_state(model).config
    assert again.compression_report().to_dict()["components"] == model.compression_report().to_dict()["components"]
    dense = again.decompress()
    assert not quantized_layers(dense)
    assert relative(output(dense), expected) < 0.05


def torchao_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.dequantize(FP32)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "torchao" in type(module.weight).__module__
    }


# --- torchao ----------------------------------------------------------------------------------------------------

# Config, and the largest relative difference of the outputs in float32: the weights are equal, torchao divides int8
# inputs by amax / 127.5 and we by amax / 127 (measured: 0.3 % to 1.6 %).
TORCHAO = {
    "int8wo": (Int8WeightOnlyConfig(set_inductor_config=False), 1e-5),
    "int8wo-tensor": (Int8WeightOnlyConfig(granularity=PerTensor(), set_inductor_config=False), 1e-5),
    "int8wo-group": (Int8WeightOnlyConfig(granularity=PerGroup(64), set_inductor_config=False), 1e-5),
    "int8dq": (Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), 0.08),
    "fp8wo": (Float8WeightOnlyConfig(set_inductor_config=False), 1e-5),
}


@pytest.mark.parametrize("case", TORCHAO)
@pytest.mark.parametrize("name", ["wan", "llama"])
def test_torchao_made_by_quantize(name: str, case: str, tmp_path: Path) -> None:
    config, tolerance = TORCHAO[case]
    model = tiny.build(name, seed=3)
    quantize_(model, config, filter_fn=lambda module, _: isinstance(module, nn.Linear) and module.in_features % 64 == 0)
    theirs, expected = torchao_weights(model), output(model)
    assert dc.import_quantized(model) is model
    assert_equal(weights(model), theirs)
    # torchao writes zero points of 0 beside symmetric codes: kept, they would cost the integer path.
    assert all(layer.zero_point is None for layer in quantized_layers(model).values())
    assert relative(output(model), expected) < tolerance
    assert_reloads(model, tmp_path)


def test_torchao_zero_points_static_inputs_and_smoothing(tmp_path: Path) -> None:
    model = tiny.build("llama", seed=8)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    smooth = torch.rand(128) + 0.5
    per_row, per_tensor = QuantizeTensorToInt8Kwargs(PerRow()), QuantizeTensorToInt8Kwargs(PerTensor())
    made = {
        "zero point": (attention.q_proj, {"granularity": PerRow(), "mapping_type": MappingType.ASYMMETRIC}),
        "zero point per group": (
            attention.k_proj,
            {"granularity": PerGroup(32), "mapping_type": MappingType.ASYMMETRIC},
        ),
        "smoothed": (attention.v_proj, {"granularity": PerRow(), "act_pre_scale": smooth, "act_quant_kwargs": per_row}),
        "static": (
            mlp.up_proj,
            {"granularity": PerRow(), "act_quant_kwargs": per_tensor, "act_quant_scale": torch.tensor([[0.03]])},
        ),
        "per tensor": (mlp.gate_proj, {"granularity": PerTensor(), "act_quant_kwargs": per_tensor}),
    }
    for linear, options in made.values():
        with torch.no_grad():
            linear.weight = nn.Parameter(Int8Tensor.from_hp(linear.weight + 0.01, **options), requires_grad=False)
    theirs = torchao_weights(model)
    dc.import_quantized(model)
    assert_equal(weights(model), theirs)
    assert bool(attention.q_proj.zero_point.any())
    assert attention.k_proj.zero_point.shape == (64, 4)
    assert torch.equal(attention.v_proj.act_pre_scale, smooth)
    assert torch.equal(mlp.up_proj.input_scale, torch.tensor([0.03]))
    assert mlp.gate_proj.scheme.activation == ActivationScheme(NumberFormat.INT8, dc.PerTensor())
    # Weight-only layers with zero points are dequantized: torchao's own product would leave the zero points out.
    x = torch.randn(3, 128)
    assert relative(attention.q_proj(x), x @ theirs["model.layers.0.self_attn.q_proj"].T) < 1e-6
    assert_reloads(model, tmp_path)


@pytest.mark.parametrize("name", ["pixart", "t5_encoder"])
def test_torchao_loaded_by_a_stock_config(name: str, tmp_path: Path) -> None:
    tiny.build(name, dtype=BF16, seed=4).save_pretrained(tmp_path / "dense")
    library = diffusers if name == "pixart" else transformers
    config = library.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    cls = type(tiny.build(name))
    model = cls.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=BF16)
    theirs = torchao_weights(model)
    dc.import_quantized(model)
    assert_equal(weights(model), theirs)
    assert isinstance(model.config.quantization_config, dc.QuantizationConfig)
    report = model.compression_report()
    assert f"import of {len(theirs)} layers of torchao Int8Tensor" in str(report)
    assert "codes and scales are those of the source" in str(report)
    assert_reloads(model, tmp_path / "ours")


def test_a_pipeline_is_imported_as_a_whole_and_its_recipe_applies_elsewhere(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart")
    for part in (pipe.transformer, pipe.text_encoder):
        quantize_(part, Int8WeightOnlyConfig(set_inductor_config=False))
    assert dc.import_quantized(pipe) is pipe
    expected = tiny.sample(pipe)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(tiny.sample(diffusers.DiffusionPipeline.from_pretrained(tmp_path)), expected)
    other = tiny.build_pipeline("pixart", seed=9).compress(pipe.compression_recipe(), measure=False)
    assert quantized_layers(other.transformer).keys() == quantized_layers(pipe.transformer).keys()


REFUSED = {
    "asymmetric inputs": (
        Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC, set_inductor_config=False),
        "inputs quantized with MappingType.ASYMMETRIC",
    ),
    "other tensors": (IntxWeightOnlyConfig(torch.int4), "torchao IntxUnpackedToInt8Tensor"),
    "float8_e5m2": (
        Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2, set_inductor_config=False),
        "float8 of dtype torch.float8_e5m2",
    ),
    "group of 16": (
        Int8WeightOnlyConfig(granularity=PerGroup(16), set_inductor_config=False),
        r"scales of blocks \[1, 16\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_torchao_that_we_cannot_hold_is_refused_and_left_alone(case: str) -> None:
    config, reason = REFUSED[case]
    model = tiny.build("llama")
    quantize_(model.model.layers[0], Int8WeightOnlyConfig(set_inductor_config=False))
    quantize_(model.model.layers[1], config)
    before, modules = output(model), dict(model.named_modules())
    with pytest.raises(dc.ConfigError, match=reason) as error:
        dc.import_quantized(model)
    assert "model.layers.1.self_attn.q_proj" in str(error.value)
    assert "layers.0" not in str(error.value)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert torch.equal(output(model), before)


def test_a_failure_half_way_restores_layers_and_marks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart")
    for name in ("transformer", "text_encoder"):
        part = getattr(pipe, name)
        part.save_pretrained(tmp_path / name)
        library = diffusers if name == "transformer" else transformers
        config = library.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
        setattr(pipe, name, type(part).from_pretrained(tmp_path / name, quantization_config=config, dtype=FP32))
    parts = [pipe.transformer, pipe.text_encoder]
    modules = [dict(part.named_modules()) for part in parts]
    marks = [dict(part.__dict__) for part in parts]
    configs = [part.config.quantization_config for part in parts]
    reports = [diffuse_compress.importing.imported_report]

    def second_fails(*args: Any) -> Any:
        return reports.pop()(*args)

    monkeypatch.setattr(diffuse_compress.importing, "imported_report", second_fails)
    with pytest.raises(IndexError):
        dc.import_quantized(pipe)
    for part, found, kept, config in zip(parts, modules, marks, configs, strict=True):
        assert get_state(part) is None
        assert all(module is found[name] for name, module in part.named_modules())
        assert {key: id(value) for key, value in part.__dict__.items()} == {key: id(val) for key, val in kept.items()}
        assert part.config.quantization_config is config


# --- GGUF -------------------------------------------------------------------------------------------------------


def _gguf_file(model: nn.Module, path: Path, type_of: Callable[[str], GGML]) -> dict[str, torch.Tensor]:
    """Write ``model`` as GGUF; returns what the gguf package dequantizes of its 8- and 4-bit weights."""
    writer, theirs = gguf.GGUFWriter(str(path), "tiny"), {}
    for key, value in model.state_dict().items():
        kind = type_of(key) if value.dim() == 2 and value.shape[1] % 32 == 0 else GGML.F32
        data = gguf.quants.quantize(value.numpy(), kind)
        writer.add_tensor(key, data, raw_dtype=kind)
        if kind not in (GGML.F32, GGML.BF16):
            theirs[key.removesuffix(".weight")] = torch.from_numpy(
                gguf.quants.dequantize(data, kind).astype(np.float32)
            )
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return theirs


def _load_gguf(model: Any, path: Path, folder: Path, dtype: torch.dtype = FP32) -> Any:
    model.save_config(folder)
    config = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    return type(model).from_single_file(str(path), quantization_config=config, config=str(folder), dtype=dtype)


@pytest.mark.parametrize("kind", [GGML.Q8_0, GGML.Q4_0, GGML.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_gguf_weights_equal_those_of_the_gguf_package(kind: GGML, dtype: torch.dtype, tmp_path: Path) -> None:
    dense = tiny.build("flux", seed=5)
    theirs = _gguf_file(dense, tmp_path / "m.gguf", lambda key: kind if "blocks." in key else GGML.F32)
    assert len(theirs) > 10
    model = _load_gguf(dense, tmp_path / "m.gguf", tmp_path, dtype)
    expected = output(model)
    dc.import_quantized(model)
    assert_equal(weights(model), theirs)
    # diffusers rounds scale times code to fp16 before it goes on (measured: 2e-4 in fp32, 4e-3 in bf16).
    assert relative(output(model), expected) < (1e-3 if dtype == FP32 else 0.02)
    assert model.dtype == dtype
    assert f"{len(theirs)} layers of GGUF {kind.name}" in str(model.compression_report())
    if kind == GGML.Q4_0:
        assert any(bool((layer.scale < 0).any()) for layer in quantized_layers(model).values())
    assert_reloads(model, tmp_path / "ours")


def test_gguf_bfloat16_layers_become_stock_ones(tmp_path: Path) -> None:
    dense = tiny.build("wan")
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(parameter.bfloat16())
    kinds = {"attn1": GGML.Q8_0, "attn2": GGML.BF16}
    _gguf_file(
        dense,
        tmp_path / "m.gguf",
        lambda key: kinds.get(key.split(".")[-3], GGML.F32) if "blocks." in key else GGML.F32,
    )
    model = _load_gguf(dense, tmp_path / "m.gguf", tmp_path)
    expected = output(model)
    dc.import_quantized(model)
    layer = model.blocks[0].attn2.to_q
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, dense.blocks[0].attn2.to_q.weight)
    assert not [name for name, module in model.named_modules() if type(module).__name__ == "GGUFLinear"]
    assert relative(output(model), expected) < 1e-3
    assert_reloads(model, tmp_path / "ours")


def test_other_gguf_types_are_refused_by_name(tmp_path: Path) -> None:
    dense = tiny.build("wan")
    _gguf_file(dense, tmp_path / "m.gguf", lambda key: GGML.Q5_0 if ".attn1." in key else GGML.Q8_0)
    model = _load_gguf(dense, tmp_path / "m.gguf", tmp_path)
    before, modules = output(model), dict(model.named_modules())
    with pytest.raises(
        dc.ConfigError, match=r"attn1\.to_q.* and 5 more: GGUF Q5_0 \(only Q8_0, Q4_0, Q4_1 can be\): take"
    ):
        dc.import_quantized(model)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert torch.equal(output(model), before)


def test_gguf_k_quants_are_refused_by_name() -> None:
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    model = tiny.build("wan", ffn_dim=256)
    size = 128 * 144  # 128 rows of one block of 256 weights
    layer = GGUFLinear(256, 128, bias=True, compute_dtype=FP32)
    layer.weight = GGUFParameter(torch.zeros(size, dtype=torch.uint8).view(128, 144), quant_type=GGML.Q4_K)
    model.blocks[0].ffn.net[2] = layer
    with pytest.raises(dc.ConfigError, match=r"blocks\.0\.ffn\.net\.2: GGUF Q4_K"):
        dc.import_quantized(model)
    assert model.blocks[0].ffn.net[2] is layer


def test_q4_1_whose_minimum_cannot_be_shifted_exactly_is_refused() -> None:
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    # In units of float32's step at 4096: d = 3/16, and m + 8 * d = m + 1.5 is rounded to m + 2. With q = 7 the source
    # has m + 1.3125, rounded to m + 1, and we would have m + 2 - 0.1875, rounded to m + 2.
    halves = np.array([1.5 * 2.0**-14, 4096.0], dtype=np.float16).view(np.uint8)
    block = torch.from_numpy(np.concatenate([halves, np.full(16, 0x77, dtype=np.uint8)]))
    layer = GGUFLinear(32, 1, bias=False, compute_dtype=FP32)
    layer.weight = GGUFParameter(block[None], quant_type=GGML.Q4_1)
    model = tiny.build("wan")
    model.blocks[0].ffn.net[2] = layer
    with pytest.raises(dc.ConfigError, match=r"its weights would not be equal bit for bit \(up to .* off\)"):
        dc.import_quantized(model)


# --- BFL --------------------------------------------------------------------------------------------------------


def _bfl(dense: Any, folder: Path) -> Any:
    from diffusers.quantizers.bfl.utils import quantize_fp8r

    tensors: dict[str, torch.Tensor] = {}
    for key, value in dense.state_dict().items():
        if value.dim() == 2 and "transformer_blocks" in key:
            tensors[key], tensors[key.replace(".weight", ".weight_scale")] = quantize_fp8r(value)
        else:
            tensors[key] = value
    save_file(tensors, folder / "fp8.safetensors")
    dense.save_config(folder)
    config = diffusers.BFLQuantizationConfig(compute_dtype=FP32)
    return type(dense).from_single_file(
        str(folder / "fp8.safetensors"), quantization_config=config, config=str(folder), dtype=FP32
    )


def test_bfl_row_wise_fp8(tmp_path: Path) -> None:
    model = _bfl(tiny.build("flux", seed=6), tmp_path)
    theirs = {
        name: module.weight.float() * module.weight_scale[:, None]
        for name, module in model.named_modules()
        if type(module).__name__ == "BFLFP8RLinear"
    }
    assert len(theirs) > 10
    expected = output(model)
    dc.import_quantized(model)
    assert_equal(weights(model), theirs)
    # Neither quantizes inputs on a CPU: the products are the same but for the order of their sums.
    assert relative(output(model), expected) < 1e-5
    assert "layers of BFL fp8r" in str(model.compression_report())
    assert {layer.scheme.name for layer in quantized_layers(model).values()} == {"fp8"}
    assert_reloads(model, tmp_path / "ours")


def test_bfl_nvfp4_is_refused() -> None:
    from diffusers.quantizers.bfl.utils import BFLNVFP4Linear

    model = tiny.build("flux")
    model.transformer_blocks[0].attn.to_q = BFLNVFP4Linear(128, 128, compute_dtype=FP32)
    with pytest.raises(dc.ConfigError, match=r"attn\.to_q: BFLNVFP4Linear \(only BFLFP8RLinear can be"):
        dc.import_quantized(model)


# --- nunchaku_lite ----------------------------------------------------------------------------------------------


def _svdq_words(codes: torch.Tensor) -> torch.Tensor:
    """``qweight`` of signed codes [N, K], one element after the other."""
    rows, columns = codes.shape
    words = np.zeros((rows // 128, columns // 64, 8, 8, 4, 2, 2), dtype=np.uint32)
    for n in range(rows):
        for k in range(columns):
            place = (n // 128, k // 64, n // 16 % 8, n % 8, k // 8 % 4, n // 8 % 2, k // 32 % 2)
            words[place] |= np.uint32(int(codes[n, k]) & 0xF) << np.uint32(4 * (k % 8))
    return torch.from_numpy(words.reshape(rows, -1).view(np.int8).copy())


def _packed_channels(values: torch.Tensor) -> torch.Tensor:
    """A vector for each group [G, C] in the order of the kernels, flat."""
    groups, channels = values.shape
    packed = torch.empty(channels // 128, groups, 8, 4, 2, 2, dtype=values.dtype)
    for c in range(channels):
        packed[c // 128, :, c // 16 % 8, c // 2 % 4, c // 8 % 2, c % 2] = values[:, c]
    return packed.reshape(-1)


def _packed_low_rank(matrix: torch.Tensor, down: bool) -> torch.Tensor:
    """``proj_down`` [K, r] of down [r, K], or ``proj_up`` [N, r] of up [N, r]."""
    rank, channels = matrix.shape if down else matrix.shape[::-1]
    packed = torch.empty(channels // 16, rank // 16, 8, 4, 2, 2, 2, dtype=matrix.dtype)
    for n in range(matrix.shape[0]):
        for k in range(matrix.shape[1]):
            tile = (k // 16, n // 16) if down else (n // 16, k // 16)
            packed[(*tile, n % 8, k // 2 % 4, n // 8 % 2, k // 8 % 2, k % 2)] = matrix[n, k]
    return packed.reshape(channels, rank)


def _awq_words(codes: torch.Tensor) -> torch.Tensor:
    """``qweight`` of codes 0..15 [N, K]."""
    rows, columns = codes.shape
    words = np.zeros((rows // 4, columns // 64, 4, 2, 4), dtype=np.uint32)
    for n in range(rows):
        for k in range(columns):
            a, b, c = k % 32 // 8, k % 8 // 2, k % 2
            place = (n // 4, k // 64, n % 4, k // 32 % 2, b)
            words[place] |= np.uint32(int(codes[n, k])) << np.uint32(4 * (a + 4 * c))
    return torch.from_numpy(words.reshape(rows // 4, columns // 2).view(np.int32).copy())


SVDQ_LAYER, AWQ_LAYER = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.norm1.linear"


def _nunchaku_folder(folder: Path, rank: int = 16, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A checkpoint of two layers; returns the dense model of the rest and the parts by name."""
    draw = torch.Generator().manual_seed(11)
    dense = tiny.build("flux", dtype=BF16, seed=7)
    tensors = dict(dense.state_dict())
    rows, columns = tensors.pop(f"{SVDQ_LAYER}.weight").shape
    parts = {
        "codes": torch.randint(-8, 8, (rows, columns), generator=draw),
        "scales": (torch.rand(columns // 64, rows, generator=draw) * 0.01 + 0.001).bfloat16(),
        "smooth": (torch.rand(columns, generator=draw) + 0.5).bfloat16(),
        "down": (torch.randn(rank, columns, generator=draw) * 0.1).bfloat16(),
        "up": (torch.randn(rows, rank, generator=draw) * 0.1).bfloat16(),
        "bias": tensors[f"{SVDQ_LAYER}.bias"],
    }
    tensors |= {
        f"{SVDQ_LAYER}.qweight": _svdq_words(parts["codes"]),
        f"{SVDQ_LAYER}.wscales": _packed_channels(parts["scales"]).reshape(columns // 64, rows),
        f"{SVDQ_LAYER}.smooth_factor": _packed_channels(parts["smooth"][None]),
        f"{SVDQ_LAYER}.proj_down": _packed_low_rank(parts["down"], True),
        f"{SVDQ_LAYER}.proj_up": _packed_low_rank(parts["up"], False),
        f"{SVDQ_LAYER}.bias": _packed_channels(parts["bias"][None]),
    }
    rows, columns = tensors.pop(f"{AWQ_LAYER}.weight").shape
    parts |= {
        "awq codes": torch.randint(0, 16, (rows, columns), generator=draw),
        "awq scales": (torch.rand(columns // 64, rows, generator=draw) * 0.01 + 0.001).bfloat16(),
        "awq zeros": (torch.rand(columns // 64, rows, generator=draw) * -0.1).bfloat16(),
    }
    tensors |= {
        f"{AWQ_LAYER}.qweight": _awq_words(parts["awq codes"]),
        f"{AWQ_LAYER}.wscales": parts["awq scales"],
        f"{AWQ_LAYER}.wzeros": parts["awq zeros"],
    }
    folder.mkdir(exist_ok=True)
    save_file(
        {key: value.contiguous() for key, value in tensors.items() if key not in changes.get("drop", ())},
        folder / "diffusion_pytorch_model.safetensors",
    )
    svdq = {"precision": "int4", "group_size": 64, "rank": rank, "targets": [SVDQ_LAYER]} | changes.get("svdq", {})
    quantization = {
        "quant_method": "nunchaku_lite",
        "compute_dtype": "bfloat16",
        "svdq_w4a4": svdq,
        "awq_w4a16": {"precision": "int4", "group_size": 64, "targets": [AWQ_LAYER]},
    }
    dense.save_config(folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return dense, parts


def test_nunchaku_lite_folder(tmp_path: Path) -> None:
    dense, parts = _nunchaku_folder(tmp_path / "lite")
    model = dc.import_quantized(tmp_path / "lite")
    assert type(model) is type(dense)
    assert model.dtype == BF16
    layer = model.get_submodule(SVDQ_LAYER)
    scales = parts["scales"].float().T.repeat_interleave(64, dim=1)
    assert torch.equal(dequantize(layer.quantized_weight()), parts["codes"] * scales)
    assert torch.equal(layer.act_pre_scale, 1 / parts["smooth"].float())
    assert torch.equal(layer.low_rank_down, parts["down"])
    assert torch.equal(layer.low_rank_up, parts["up"])
    assert torch.equal(layer.bias, parts["bias"])
    x = torch.randn(5, 128, dtype=torch.float64)
    weight = parts["codes"].double() * scales.double() / parts["smooth"].double()
    expected = x @ weight.T + parts["bias"].double() + x @ parts["down"].double().T @ parts["up"].double().T
    assert relative(layer.to(FP32)(x.float()).double(), expected) < 1e-6
    layer.to(BF16)
    awq = model.get_submodule(AWQ_LAYER)
    scale, zeros = (parts[f"awq {name}"].float().T.repeat_interleave(64, dim=1) for name in ("scales", "zeros"))
    assert torch.equal(dequantize(awq.quantized_weight()), parts["awq codes"].float() * scale + zeros)
    for key, value in model.state_dict().items():
        if key.rpartition(".")[0] not in (SVDQ_LAYER, AWQ_LAYER):
            assert torch.equal(value, dense.state_dict()[key]), key
    report = str(model.compression_report())
    assert "nunchaku SVDQ int4, inputs left in 16 bits" in report
    assert "nunchaku AWQ int4" in report
    assert_reloads(model, tmp_path / "ours")


def test_a_nunchaku_model_goes_into_a_pipeline(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("flux", dtype=BF16)
    pipe.save_pretrained(tmp_path / "pipe")
    _nunchaku_folder(tmp_path / "pipe" / "transformer")
    transformer = dc.import_quantized(tmp_path / "pipe" / "transformer")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe", transformer=transformer, dtype=BF16)
    expected = tiny.sample(again)
    again.save_pretrained(tmp_path / "ours")
    assert torch.equal(tiny.sample(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"svdq": {"precision": "nvfp4", "group_size": 16}}, r"to_q: nunchaku svdq_w4a4 in nvfp4, groups of 16"),
        ({"svdq": {"targets": ["transformer_blocks.9.attn"]}}, "the model has no linear layer of this name"),
        ({"drop": (f"{SVDQ_LAYER}.wscales",)}, "the checkpoint lacks its wscales"),
        ({"drop": (f"{SVDQ_LAYER}.bias",)}, "the checkpoint lacks its bias"),
        ({"drop": ("x_embedder.weight",)}, r"1 missing \(x_embedder.weight\)"),
    ],
)
def test_nunchaku_checkpoints_that_cannot_be_read(changes: Any, message: str, tmp_path: Path) -> None:
    _nunchaku_folder(tmp_path, **changes)
    with pytest.raises((dc.ConfigError, dc.CheckpointError), match=message):
        dc.import_quantized(tmp_path)


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(dc.CheckpointError, match="a path must be the folder of a component"):
        dc.import_quantized(str(tmp_path))
    tiny.build("flux").save_pretrained(tmp_path)
    with pytest.raises(dc.CheckpointError, match=r"reads files of quant_method 'nunchaku_lite', .*'awq', got None"):
        dc.import_quantized(str(tmp_path))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "needs a pipeline or model with layers of .* got NoneType"),
        (3, "got int"),
        ([], "got list"),
        ("no/folder", r"a path must be the folder of .* got 'no/folder'.*snapshot_download"),
        (Path(__file__), "which is no folder here"),
        ("", "which is no folder here"),
    ],
)
def test_what_is_neither_a_model_nor_a_folder(target: Any, message: str) -> None:
    with pytest.raises(dc.ConfigError, match=f"^import_quantized: .*{message}"):
        dc.import_quantized(target)


# --- nothing to import ------------------------------------------------------------------------------------------


def test_dense_and_compressed_models_hold_nothing_to_import() -> None:
    for model in (tiny.build("llama"), tiny.build("llama").compress("w8a16", measure=False)):
        with pytest.raises(dc.ConfigError, match=r"found none\. To quantize a dense model, call compress\(\)"):
            dc.import_quantized(model)


def test_adapters_and_hooks_are_in_the_way() -> None:
    model = tiny.build("llama")
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(dc.errors.ModelStateError, match="found adapters around them"):
        dc.import_quantized(model)
    model = tiny.build("wan")
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(dc.errors.ModelStateError, match="import_quantized cannot replace layers under the hook"):
        dc.import_quantized(model)


def test_compress_points_to_import() -> None:
    model = tiny.build("llama")
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    with pytest.raises(dc.errors.ModelStateError, match=r"already quantized by torchao.*import_quantized\(\)"):
        model.compress("w4a16")


def test_other_methods_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    config = type("Config", (), {"quant_method": "bitsandbytes"})()
    model.hf_quantizer = type("Quantizer", (), {"quantization_config": config})()
    with pytest.raises(dc.ConfigError, match="got a model quantized by bitsandbytes"):
        dc.import_quantized(model)
