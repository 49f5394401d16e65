"""Models with folded smoothing scales: saved and reloaded, resumed, undone, counted; adapters are warned of."""

from __future__ import annotations

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
from tolerance import relative_rms

SEQUENCE = [dc.SmoothQuantConfig(), dc.GPTQConfig(asymmetric=True)]
CONFIG = dc.QuantizationConfig("w8a8", algorithm=SEQUENCE)


def items(name: str) -> list[dict[str, Any]]:
    return [tiny.inputs_for(tiny.build(name), seed=seed) for seed in range(2)]


def compressed(name: str, config: Any = CONFIG, **given: Any) -> Any:
    return tiny.build(name).compress(config, calibration=items(name), measure=False, **given)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**tiny.inputs_for(model, seed=9), return_dict=False)))


def smoothed(fold: bool | None) -> dc.QuantizationConfig:
    return dc.QuantizationConfig("w8a8", algorithm=dc.SmoothQuantConfig(fold=fold))


def folded(model: Any) -> set[str]:
    return {name for name, layer in quantized_layers(model).items() if layer.folded}


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_language_models_fold_and_reload(name: str, tmp_path: Path) -> None:
    """With grouped queries the output projection keeps its scale; the file holds what the report counts."""
    model = compressed(name)
    layers = quantized_layers(model)
    kept = {name for name, layer in layers.items() if layer.act_pre_scale is not None}
    assert kept == {f"model.layers.{index}.self_attn.o_proj" for index in range(2)}
    assert folded(model) == layers.keys() - kept
    assert digest_of_weights(model) == digest_of_weights(compressed(name))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert folded(again) == folded(model)
    written = sum(
        tensor.numel() * tensor.element_size() for tensor in load_file(tmp_path / "model.safetensors").values()
    )
    assert again.compression_report().bytes_after == model.compression_report().bytes_after == written


def test_folding_changes_the_rounding_alone() -> None:
    """Codes of the first block are equal, and outputs as near to the dense ones."""
    dense, models = tiny.build("llama"), [compressed("llama", smoothed(fold)) for fold in (True, False)]
    assert folded(models[0])
    assert not folded(models[1])
    for layer in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        first, second = (model.get_submodule(f"model.layers.0.{layer}").qweight for model in models)
        assert torch.equal(first, second), layer
    errors = [relative_rms(logits(dense), logits(model)) for model in models]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    assert relative_rms(logits(models[1]), logits(models[0])) < errors[1] / 2


def test_decompressed_keeps_the_function() -> None:
    config = dc.QuantizationConfig("w8a16", algorithm=dc.AWQConfig(num_ratios=4, clip=False))
    model = compressed("llama", config)
    assert folded(model)
    expected = logits(model)
    assert relative_rms(expected, logits(model.decompress())) < 1e-5


def test_denoisers_keep_their_scales_unless_asked(tmp_path: Path) -> None:
    """As planned to the byte; with fold=True at most that."""
    results = []
    for fold in (None, True):
        model = tiny.build("unet_sd1")
        plan = model.compression_plan(smoothed(fold), calibration=items("unet_sd1")[:1])
        model.compress(plan, measure=False)
        results.append((model, plan.bytes_after, model.compression_report().bytes_after))
    (plain, planned, counted), (model, at_most, less) = results
    assert not folded(plain)
    assert counted == planned == at_most
    layers = quantized_layers(model)
    readers = {name for name in folded(model) if layers[name].act_pre_scale is None}
    assert sum(name.endswith((".attn2.to_q", ".ff.net.0.proj")) for name in readers) == 8
    assert {name.rpartition(".")[2] for name in folded(model) - readers} == {"to_v"}, "written to, not read from"
    assert counted - less == 4 * sum(layers[name].in_features for name in readers)
    assert relative_rms(logits(plain), logits(model)) < 0.05
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert digest_of_weights(again) == digest_of_weights(model)
    assert folded(again) == folded(model)


@pytest.mark.parametrize(
    "algorithm",
    [dc.RTNConfig(), dc.SmoothQuantConfig(fold=False), dc.SVDQuantConfig(rank=4, iterations=1, num_alphas=2),
     [dc.SmoothQuantConfig(fold=False), dc.SVDQuantConfig(rank=4, iterations=1)]],
    ids=["rtn", "smoothquant", "svdquant", "both"],
)  # fmt: skip
def test_the_plan_counts_scales_and_branches(algorithm: Any) -> None:
    model, config = tiny.build("llama"), dc.QuantizationConfig("w8a8", algorithm=algorithm)
    given = {} if isinstance(algorithm, dc.RTNConfig) else {"calibration": items("llama")}
    planned = model.compression_plan(config, **given).bytes_after
    model.compress(config, measure=False, **given)
    assert model.compression_report().bytes_after == planned


@pytest.mark.parametrize("device", [None, "cpu:0"])
def test_an_interrupt_restores_norms_and_a_second_call_goes_on(device: str | None, tmp_path: Path) -> None:
    """Blocks visited on "another" device (``cpu:0`` is compared by name), and finished ones taken from a folder."""
    expected, model = compressed("llama"), tiny.build("llama")
    before = {key: (tensor, tensor.clone()) for key, tensor in model.named_parameters()}

    def callback(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        if stage.startswith("Calibrating") and done >= total // 2:
            assert not torch.equal(model.model.layers[0].input_layernorm.weight, before[norm][1])
            raise KeyboardInterrupt

    norm = "model.layers.0.input_layernorm.weight"
    given = {"calibration": items("llama"), "measure": False, "work_dir": tmp_path, "device": device}
    with pytest.raises(KeyboardInterrupt):
        model.compress(CONFIG, callback=callback, **given)
    for key, parameter in model.named_parameters():
        assert parameter is before[key][0]
        assert parameter.device == torch.device("cpu")
        assert torch.equal(parameter, before[key][1]), key
    finished = tmp_path / "model" / "model.layers.0.safetensors"
    written = finished.stat().st_mtime_ns
    for _ in range(2):
        model = tiny.build("llama").compress(CONFIG, **given)
        assert digest_of_weights(model) == digest_of_weights(expected)
        assert folded(model) == folded(expected)
    assert finished.stat().st_mtime_ns == written


def test_a_norm_of_two_blocks_is_not_folded_into() -> None:
    def shared(config: Any) -> Any:
        model = tiny.build("llama")
        model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        return model.compress(config, calibration=items("llama"), measure=False)

    model, plain = shared(smoothed(None)), shared(smoothed(False))
    assert not any(name.endswith(("q_proj", "down_proj")) for name in folded(model))
    assert sum(name.endswith("gate_proj") for name in folded(model)) == 0, "its up_proj is read with it"
    assert relative_rms(logits(plain), logits(model)) < 0.02


def test_adapters_on_folded_layers_are_warned_of_once(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=False)
    compressed("llama", smoothed(None)).save_pretrained(tmp_path / "folded")
    again = tiny.build("llama").from_pretrained(tmp_path / "folded")
    with pytest.warns(DiffuseCompressWarning, match=r"trained\s+on the original does not: .* fold=False") as seen:
        adapted = peft.get_peft_model(again, lora)
    assert len([one for one in seen if issubclass(one.category, DiffuseCompressWarning)]) == 1
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(**tiny.inputs_for(tiny.build("llama"))).logits
    fresh = tiny.build("llama").from_pretrained(tmp_path / "folded")
    with pytest.warns(DiffuseCompressWarning, match="fold=False"):
        adapted = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(adapted(**tiny.inputs_for(tiny.build("llama"))).logits, expected), "one trained after fits"
    with warnings.catch_warnings():
        warnings.simplefilter("error", DiffuseCompressWarning)
        peft.get_peft_model(compressed("llama", smoothed(False)), lora)


def test_adapters_that_are_there_already_keep_what_they_read() -> None:
    """Of the adapted layers nothing is folded: the adapter reads the norm too, and adds to what up_proj returns."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = tiny.build("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft.inject_adapter_in_model(lora, model)
    expected = logits(model)
    model.compress(smoothed(None), calibration=items("llama"), measure=False)
    assert not folded(model)
    assert relative_rms(expected, logits(model)) < 0.03
