"""QuaRot: rotations leave the float model's output as it is, help four bits, and survive what layers go through."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from calibrated_block import Block, calibrated, error, inputs
from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.fake_quantize import FakeQuantizedLayer
from diffuse_compress.families.registry import residual_stream_of
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.integrations.doors import untie_head
from diffuse_compress.quantization.algorithms.awq import AWQConfig
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.algorithms.quarot import QuaRotConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.smoothquant import SmoothQuantConfig
from diffuse_compress.quantization.convert import quantize_module, requantize
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.residual import rotate_residual
from tolerance import KERNEL, assert_close, relative_rms

W4A4, W8A8 = PRESETS["w4a4"].scheme, PRESETS["w8a8"].scheme
ROTATED = replace(W4A4, input_rotation=128)
RESIDUAL = dc.QuantizationConfig("w4a4", algorithm=QuaRotConfig(residual=True))


def tokens(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, 20), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), **kwargs).logits


# --- rotation of a layer's input --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_compute_what_their_format_says(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(256, 48).to(dtype)
    x = torch.randn(5, 7, 256, dtype=dtype)
    x[..., 3] *= 30
    layer = quantize_module(dense, replace(W8A8, input_rotation=256), RTNConfig())
    layer.act_pre_scale = nn.Parameter(torch.rand(256) + 0.5, requires_grad=False)
    layer.low_rank_down = nn.Parameter(torch.randn(4, 256, dtype=dtype) / 16, requires_grad=False)
    layer.low_rank_up = nn.Parameter(torch.randn(48, 4, dtype=dtype) / 2, requires_grad=False)
    with torch.no_grad():
        ours, reference = layer(x), FakeQuantizedLayer(layer)(x)
        assert relative_rms(reference, ours) < (1e-5 if dtype == torch.float32 else 1e-2)
        # Without quantization of the input, it is the dense equivalent.
        layer.scheme = replace(layer.scheme, activation=None)
        assert_close(layer(x), layer.to_dense()(x), KERNEL[dtype] * 2)


def test_a_sequence_without_data_ends_with_its_last_algorithm() -> None:
    model = tiny.build("llama").compress(dc.QuantizationConfig("w4a4", algorithm=[QuaRotConfig(), RTNConfig("minmax")]))
    name, dense = "model.layers.0.mlp.up_proj", tiny.build("llama")
    expected = quantize_module(dense.get_submodule(name), ROTATED, RTNConfig("minmax"))
    assert torch.equal(model.get_submodule(name).qweight, expected.qweight)


def test_gradients_pass_the_rotation() -> None:
    torch.manual_seed(0)
    layer = quantize_module(nn.Linear(128, 32), ROTATED, RTNConfig())
    x = torch.randn(6, 128, requires_grad=True)
    layer(x).square().sum().backward()
    (expected,) = torch.autograd.grad((2 * layer(x).detach() * (x @ layer.weight.t())).sum(), x)
    assert_close(x.grad, expected)


def test_rotated_layers_decompress_to_unrotated_weights_and_requantize() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(128, 64)
    layer = quantize_module(dense, replace(W8A8, input_rotation=128), RTNConfig())
    assert relative_rms(dense.weight, layer.to_dense().weight) < 0.01
    other = nn.Linear(128, 64)
    assert relative_rms(other.weight, requantize(layer, other).weight) < 0.01


@pytest.mark.parametrize(
    ("algorithm", "factor"),
    [(RTNConfig(), 0.75), (GPTQConfig(), 0.6), (SmoothQuantConfig(), 0.6), (AWQConfig(num_ratios=6), 0.6)],
    ids=lambda value: getattr(value, "kind", None),
)
def test_beats_rounding_without_rotation(algorithm: AlgorithmConfig, factor: float) -> None:
    torch.manual_seed(3)
    dense = Block()
    ours, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    calibrated(ours, ROTATED, algorithm, inputs(8))
    calibrated(plain, W4A4, RTNConfig(), inputs(1))
    fresh = inputs(4, seed=0)[2:] + inputs(2, seed=1)
    mine, theirs = error(ours, dense, fresh), error(plain, dense, fresh)
    assert mine < factor * theirs, (mine, theirs)


@pytest.mark.parametrize("name", ["pixart", "flux", "stable_diffusion"])
def test_pipelines_are_rotated_saved_reloaded_and_compiled(name: str, tmp_path: Path) -> None:
    pipe = tiny.build_pipeline(name)
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    plan = pipe.compression_plan(dc.QuantizationConfig("w4a4", algorithm=QuaRotConfig()))
    kept = {row.parameter: row.reason for row in plan.rows if row.scheme is None}
    if name == "stable_diffusion":
        assert kept["down_blocks.0.resnets.0.conv1.weight"] == "QuaRot rotates inputs of linear layers"
    pipe.compress(plan, measure=False)
    layers = quantized_layers(getattr(pipe, denoiser))
    assert {bool(layer.scheme.input_rotation) == bool(layer.scheme.activation) for layer in layers.values()} == {True}
    assert plan.bytes_after == sum(row.bytes_after for row in plan.rows)
    picture = tiny.sample(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.sample(again), picture)
    # The request means the same layers on another model.
    recipe = dc.compression_recipe(pipe)
    other = tiny.build_pipeline(name).compress(recipe, measure=False)
    assert torch.equal(tiny.sample(other), picture)
    layer = next(layer for layer in layers.values() if layer.scheme.input_rotation)
    x = torch.randn(4, layer.in_features)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_what_cannot_be_rotated_is_refused_or_kept_before_any_work() -> None:
    unet = tiny.build("unet_sd1")
    named = dc.QuantizationConfig("w4a4", algorithm=QuaRotConfig(), overrides={"mid_block.resnets.0.conv1": "w4a4"})
    with pytest.raises(ConfigError, match=r"resnets\.0\.conv1: w4a4 cannot be applied: QuaRot rotates inputs"):
        unet.compression_plan(named)
    narrow = QuaRotConfig(block_size=128).unsupported(nn.Linear(192, 8), W4A4)
    assert narrow == "QuaRot: its in_features, 192, cannot be cut into runs of 128"
    with pytest.raises(ConfigError, match="block_size must be the order of a Hadamard matrix"):
        QuaRotConfig(block_size=52)
    with pytest.raises(ConfigError, match="QuaRotConfig prepares layers"):
        dc.QuantizationConfig("w4a4", algorithm=[GPTQConfig(), QuaRotConfig()])
    model = tiny.build("pixart").compress(dc.QuantizationConfig("w8a8", algorithm=QuaRotConfig()))
    with pytest.raises(ConfigError, match="rotated inputs, which torchao's tensors do not have"):
        model.save_pretrained("nowhere", format="torchao")


# --- rotation of the residual stream ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_stay_and_hidden_states_do_not(name: str, dtype: torch.dtype) -> None:
    model = tiny.build(name).to(dtype)
    before, hidden = logits(model), model(input_ids=tokens(), output_hidden_states=True).hidden_states[1]
    stream = residual_stream_of(model)
    untie_head(model, stream.head, stream.embedding)
    kept: list[nn.Parameter] = []
    with torch.no_grad():
        rotate_residual(model, stream, torch.Generator().manual_seed(0), kept.append)
    # transformers norms in float32 whatever the dtype.
    assert_close(logits(model), before, torch.float32)
    assert relative_rms(hidden, model(input_ids=tokens(), output_hidden_states=True).hidden_states[1]) > 0.5
    assert len({id(parameter) for parameter in kept}) == len(kept) == stream.num_parameters(model)
    norm = model.model.layers[0].input_layernorm.weight
    assert torch.equal(norm, torch.full_like(norm, 0.0 if name == "gemma" else 1.0))


@pytest.mark.parametrize("tied", [False, True])
def test_compress_rotates_saves_reloads_and_decompresses(tied: bool, tmp_path: Path) -> None:
    model = tiny.build("llama", tie_word_embeddings=tied)
    dense = logits(model)
    rotated = QuaRotConfig(residual=True)
    plan = model.compression_plan(dc.QuantizationConfig("w8a8", algorithm=rotated))
    assert [row.bytes_before == 0 for row in plan.rows if row.layer == "lm_head"] == [tied]
    model.compress(plan)
    assert plan.bytes_after == sum(p.numel() * p.element_size() for p in model.parameters())
    rotations = {name: layer.scheme.input_rotation for name, layer in quantized_layers(model).items()}
    assert {name.rpartition(".")[2] for name, size in rotations.items() if size} == {"down_proj"}
    assert relative_rms(dense, logits(model)) < 0.02
    expected = logits(model)
    other = tiny.build("llama", tie_word_embeddings=tied).compress(dc.compression_recipe(model))
    assert torch.equal(logits(other), expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    again.decompress()
    assert type(again.model.layers[0].mlp.down_proj) is nn.Linear
    assert relative_rms(dense, logits(again)) < 0.02
    again.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "dense")), logits(again))


def test_sequences_calibrate_on_the_rotated_model() -> None:
    dense = tiny.build("llama")
    target = logits(dense)

    def loss(algorithm: Any, **given: Any) -> float:
        return relative_rms(
            target, logits(tiny.build("llama").compress(dc.QuantizationConfig("w4a4", algorithm=algorithm), **given))
        )

    texts = [tokens(1, seed) for seed in range(1, 9)]
    both = loss([QuaRotConfig(residual=True), GPTQConfig()], calibration=texts)
    assert both < loss(QuaRotConfig(residual=True)) < loss("rtn")


@pytest.mark.parametrize(("tied", "at"), [(False, "Compressing"), (True, "Compressing"), (True, "Rotating")])
def test_a_failure_puts_back_what_the_rotation_changed(tied: bool, at: str) -> None:
    model = tiny.build("llama", tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    keys = dict(model.all_tied_weights_keys)

    def callback(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        if stage.startswith(at) and done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.compress(RESIDUAL, callback=callback)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == parameters
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.config.tie_word_embeddings == tied
    assert model.all_tied_weights_keys == keys
    assert not quantized_layers(model)


def test_models_whose_stream_cannot_be_rotated_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Gemma2ForCausalLM: .* normed before it is added"):
        tiny.build("gemma2").compression_plan(RESIDUAL)
    with pytest.raises(ConfigError, match=r"PixArtTransformer2DModel: .* not known to have norms .*llama, qwen2"):
        tiny.build("pixart").compression_plan(RESIDUAL)
    with pytest.raises(ConfigError, match="LlamaModel: returns hidden states"):
        tiny.build("llama").model.compression_plan(RESIDUAL)
    model = tiny.build("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="needs the whole model"):
        type(model).from_pretrained(tmp_path, quantization_config=RESIDUAL)
    assert not quantized_layers(model)
