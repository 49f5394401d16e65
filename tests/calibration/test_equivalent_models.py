"""OS+, OmniQuant and norm tweaking on whole models: planned, saved and reloaded, resumed, undone, decompressed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffuse_compress as dc
import tiny
from diffuse_compress.calibration.work_folder import digest_of_weights
from diffuse_compress.errors import DiffuseCompressWarning
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.quantization.algorithms.base import algorithm_from_dict, algorithm_to_dict
from tolerance import relative_rms

W4 = dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT4, dc.PerGroup(32, pad=True), symmetric=False))
OSPLUS = dc.OSPlusConfig(num_thresholds=2)
OMNI = dc.OmniQuantConfig(epochs=2, shift=True)
NORMS = [dc.GPTQConfig(), dc.NormTweakingConfig(epochs=2, learning_rate=1e-4)]
CASES: dict[str, tuple[Any, Any]] = {"osplus": ("w8a8", OSPLUS), "omniquant": ("w4a8", OMNI), "norms": (W4, NORMS)}
CASES["norms alone"] = (W4, NORMS[1])


def items(name: str) -> list[dict[str, Any]]:
    return [tiny.inputs_for(tiny.build(name), seed=seed) for seed in range(2)]


def compressed(name: str, case: str, model: Any = None, **given: Any) -> Any:
    scheme, algorithm = CASES[case]
    config = dc.QuantizationConfig(scheme, algorithm=algorithm)
    model = tiny.build(name) if model is None else model
    return model.compress(config, calibration=items(name), measure=False, **given)


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**tiny.inputs_for(model, seed=9), return_dict=False)))


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("llama", "osplus"),
        ("llama", "omniquant"),
        ("llama", "norms"),
        ("pixart", "osplus"),
        ("pixart", "omniquant"),
        pytest.param("unet_sd1", "norms alone", marks=pytest.mark.slow),
    ],
)
def test_models_are_saved_reloaded_and_resumed_bit_for_bit(name: str, case: str, tmp_path: Path) -> None:
    folder, work = tmp_path / "model", tmp_path / "work"
    model = compressed(name, case, work_dir=work)
    layers = quantized_layers(model)
    if not case.startswith("norms"):
        assert any(layer.act_pre_shift is not None for layer in layers.values())
        assert any(layer.gained_bias for layer in layers.values()) == (name == "llama")
    else:
        dense = dict(tiny.build(name).named_parameters())
        norms = {key for key, value in model.named_parameters() if key in dense and not torch.equal(value, dense[key])}
        assert norms
        assert all("norm" in key for key in norms)
    again = compressed(name, case, work_dir=work)  # all blocks from the folder
    assert digest_of_weights(again) == digest_of_weights(model)
    assert torch.equal(outputs(again), outputs(model))
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    assert torch.equal(outputs(loaded), outputs(model))
    assert digest_of_weights(loaded) == digest_of_weights(model)
    (file,) = folder.glob("*.safetensors")
    written = sum(tensor.numel() * tensor.element_size() for tensor in load_file(file).values())
    assert model.compression_report().bytes_after == loaded.compression_report().bytes_after == written
    half = type(model).from_pretrained(folder, **{"torch_dtype" if name != "llama" else "dtype": torch.bfloat16})
    assert all(
        layer.act_pre_shift is None or layer.act_pre_shift.dtype == torch.float32
        for layer in quantized_layers(half).values()
    )


@pytest.mark.parametrize("case", ["osplus", "omniquant"])
def test_plans_count_shifts_and_the_biases_they_need(case: str) -> None:
    scheme, algorithm = CASES[case]
    config = dc.QuantizationConfig(scheme, algorithm=algorithm)
    model = tiny.build("pixart")
    plan = model.compression_plan(config, calibration=items("pixart"))
    model.compress(plan, measure=False)
    layers = quantized_layers(model).values()
    linears = [layer for layer in layers if isinstance(layer, torch.nn.Linear) and layer.scheme.activation is not None]
    left = sum(4 * layer.in_features for layer in linears if layer.act_pre_shift is None)
    left += sum(4 * layer.in_features for layer in linears if layer.act_pre_scale is None)
    left += sum(4 * layer.out_features for layer in linears if layer.bias is None)
    left += sum(
        4 * layer.in_channels
        for layer in layers
        if isinstance(layer, torch.nn.Conv2d) and layer.scheme.activation is not None and layer.act_pre_scale is None
    )
    assert model.compression_report().bytes_after == plan.bytes_after - left


@pytest.mark.parametrize("case", ["osplus", "norms"])
def test_an_interrupt_leaves_the_model_as_it_was_and_goes_on(case: str, tmp_path: Path) -> None:
    expected, model = compressed("llama", case), tiny.build("llama")
    before = {key: (tensor, tensor.clone()) for key, tensor in model.named_parameters()}

    def callback(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        if stage.startswith("Calibrating") and done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressed("llama", case, model, callback=callback, work_dir=tmp_path)
    for key, parameter in model.named_parameters():
        assert parameter is before[key][0]
        assert torch.equal(parameter, before[key][1]), key
    assert digest_of_weights(compressed("llama", case, work_dir=tmp_path)) == digest_of_weights(expected)


def test_decompressed_keeps_the_function_and_says_what_a_class_cannot_hold() -> None:
    config = dc.QuantizationConfig("w8a8", algorithm=OSPLUS)
    dense = tiny.build("llama")
    model = tiny.build("llama").compress(config, calibration=items("llama"), measure=False)
    expected = outputs(model)
    with pytest.warns(DiffuseCompressWarning, match=r"layers, e\.g\. model\.layers\.0.*, have a bias now"):
        model.decompress()
    # But for the rounding of inputs.
    assert relative_rms(expected, outputs(model)) < 2 * relative_rms(outputs(dense), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiffuseCompressWarning)
        compressed("llama", "norms").decompress()


def test_pipelines_are_calibrated_and_reloaded(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart")
    given = {**tiny.call_kwargs(pipe, steps=2), "prompt": "a cat"}
    given.pop("generator")
    config = dc.QuantizationConfig("w8a8", algorithm=[OSPLUS, dc.GPTQConfig()])
    pipe.compress(config, calibration=[given], measure=False)
    picture = tiny.sample(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.sample(again), picture)


def test_what_cannot_be_is_refused_before_any_work() -> None:
    with pytest.raises(dc.ConfigError, match=r"PixArt.*NormTweakingConfig has nothing to do: no block has a norm"):
        tiny.build("pixart").compression_plan(dc.QuantizationConfig(W4, algorithm=NORMS), calibration=items("pixart"))
    with pytest.raises(dc.ConfigError, match=r"OSPlusConfig is for quantized inputs, got none \(w4a16\)"):
        tiny.build("llama").compression_plan(dc.QuantizationConfig("w4a16", OSPLUS), calibration=items("llama"))


def test_exports_without_a_place_for_a_shift_are_refused(tmp_path: Path) -> None:
    model = compressed("llama", "osplus")
    for form in ("compressed-tensors", "torchao"):
        with pytest.raises(dc.ConfigError, match="with a shift of its inputs"):
            model.save_pretrained(tmp_path / form, format=form)


@pytest.mark.parametrize("config", [dc.OSPlusConfig(7, False, True), OMNI, dc.NormTweakingConfig(1e-5, 0.5, 3, 2)])
def test_configs_round_trip_through_json(config: Any) -> None:
    data = json.loads(json.dumps(algorithm_to_dict(config)))
    assert algorithm_from_dict(data) == config
    assert algorithm_from_dict({"kind": config.kind}) == type(config)()
    spec = dc.QuantizationConfig("w8a8", algorithm=config)
    assert dc.QuantizationConfig.from_dict(json.loads(json.dumps(spec.to_dict()))).spec == spec.spec
