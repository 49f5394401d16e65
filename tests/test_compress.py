"""compress: in place, adds up, refuses, and restores every byte when anything fails."""

from __future__ import annotations

import hashlib
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress import progress
from diffuse_compress.integrations.component import get_state, quantized_layers
from diffuse_compress.quantization.layers import QuantizedLinear

PRESETS = ["w8a8", "fp8", "w8a16", "w4a16", "w4a8"]


def fingerprint(model: nn.Module) -> dict[str, tuple[str, str, str]]:
    """{key: (hash of bytes, dtype, device)} and the module tree."""
    prints = {}
    for key, tensor in model.state_dict().items():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        prints[key] = (hashlib.blake2b(data).hexdigest(), str(tensor.dtype), str(tensor.device))
    prints["tree"] = (str([(n, type(m).__name__) for n, m in model.named_modules()]), "", "")
    return prints


@pytest.mark.parametrize("preset", [*PRESETS, "W4A8", "int8"])
def test_compress_converts_in_place_and_returns_self(preset: str) -> None:
    model = tiny.build("pixart")
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    assert model.compress(preset) is model
    assert type(model).__name__ == "PixArtTransformer2DModel"
    assert len(quantized_layers(model)) > 10
    after = sum(p.numel() * p.element_size() for p in model.parameters())
    assert after < before
    out = model(**tiny.inputs_for(model))[0]
    assert torch.isfinite(out).all()


def test_compress_pipeline_preset_means_denoisers() -> None:
    pipe = tiny.build_pipeline("pixart")
    pipe.compress("w8a8")
    assert get_state(pipe.transformer) is not None
    assert get_state(pipe.text_encoder) is None


def test_compress_components_dict_groups_and_none() -> None:
    pipe = tiny.build_pipeline("pixart")
    pipe.compress({"denoisers": "w4a8", "text_encoder": "w8a16", "vae": None})
    assert get_state(pipe.transformer).config.spec.preset == "w4a8"
    assert get_state(pipe.text_encoder).config.spec.preset == "w8a16"
    assert get_state(pipe.vae) is None


def test_compress_calls_add_up_and_refuse_another_config() -> None:
    pipe = tiny.build_pipeline("pixart")
    pipe.compress("w8a8")
    prints = fingerprint(pipe.transformer)
    pipe.compress("w8a8")  # equal configuration: nothing happens
    assert fingerprint(pipe.transformer) == prints
    pipe.compress({"text_encoder": "w8a16"})
    with pytest.raises(
        dc.CompressionConflictError, match=r"transformer: already compressed.*'weights'.*decompress\(\)"
    ):
        pipe.compress("w4a8")
    assert fingerprint(pipe.transformer) == prints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compress_fails_at_every_layer_restores_identical_bytes(dtype: torch.dtype) -> None:
    model = tiny.build("pixart", dtype=dtype)
    clean = fingerprint(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    total = len(model.compression_plan("w4a8").components[""].layers)
    for stop in range(1, total + 1):

        def fail(stage: str, done: int, total: int, metrics: dict[str, Any], stop: int = stop) -> None:
            if done == stop:
                raise KeyboardInterrupt if stop % 2 else RuntimeError("out of memory, say")

        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            model.compress("w4a8", callback=fail)
        assert fingerprint(model) == clean, f"layer {stop}"
        assert get_state(model) is None
        assert "quantization_config" not in model.config
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    model.compress("w4a8")
    assert get_state(model) is not None


def test_compress_failure_in_second_component_restores_the_first() -> None:
    pipe = tiny.build_pipeline("pixart")
    clean = fingerprint(pipe.transformer), fingerprint(pipe.text_encoder)
    seen = []

    def fail(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        seen.append(metrics.get("component"))
        if metrics.get("component") == "text_encoder":
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pipe.compress({"transformer": "w8a8", "text_encoder": "w8a16"}, callback=fail)
    assert "transformer" in seen
    assert (fingerprint(pipe.transformer), fingerprint(pipe.text_encoder)) == clean


def test_compress_leaves_global_random_state_and_is_deterministic() -> None:
    prints = []
    for _ in range(2):
        model = tiny.build("pixart")
        state = torch.random.get_rng_state()
        model.compress("w4a8", seed=3)
        assert torch.equal(torch.random.get_rng_state(), state)
        prints.append(fingerprint(model))
    assert prints[0] == prints[1]


def test_compress_device_returns_layers_where_they_were() -> None:
    model = tiny.build("pixart").compress("w8a8", device="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_compress_modules_to_not_convert_and_overrides() -> None:
    model = tiny.build("pixart")
    model.compress("w4a8", modules_to_not_convert=["attn2"], overrides={"*.attn1.to_q": "w8a8", "proj_out": "w8a16"})
    layers = quantized_layers(model)
    assert not any(".attn2." in name for name in layers)
    assert {layer.scheme.name for name, layer in layers.items() if name.endswith("attn1.to_q")} == {"w8a8"}
    assert layers["proj_out"].scheme.name == "w8a16"


def test_compress_modulation_is_weight_only_in_four_bit_presets() -> None:
    model = tiny.build("flux").compress("w4a8")
    layers = quantized_layers(model)
    assert layers["transformer_blocks.0.norm1.linear"].scheme.name == "w4a16"
    assert layers["transformer_blocks.0.attn.to_q"].scheme.name == "w4a8"
    assert "x_embedder" not in layers
    assert "proj_out" not in layers


def test_decompress_equals_dequantize_and_leaves_nothing() -> None:
    model = tiny.build("pixart").compress("w8a16")
    weights = {name: layer.weight for name, layer in quantized_layers(model).items()}
    inputs = tiny.inputs_for(model)
    expected = model(**inputs)[0]
    assert model.decompress() is model
    for name, weight in weights.items():
        assert type(model.get_submodule(name)) is nn.Linear
        assert torch.equal(model.get_submodule(name).weight, weight)
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    assert "quantization_config" not in model.config
    assert not hasattr(model, "hf_quantizer")
    model.compress("w4a8")


def test_decompress_transformers_model() -> None:
    model = tiny.build("t5_encoder").compress("w8a16")
    model.dequantize()
    assert not quantized_layers(model)
    assert getattr(model.config, "quantization_config", None) is None
    assert getattr(model, "hf_quantizer", None) is None


def test_compression_recipe_applies_to_another_model(tmp_path: Any) -> None:
    first = tiny.build_pipeline("pixart")
    first.compress("w4a8", modules_to_not_convert="attn2")
    recipe = first.compression_recipe()
    recipe.save(tmp_path / "recipe.json")
    other = tiny.build_pipeline("pixart", seed=1)
    other.compress(dc.Recipe.load(tmp_path / "recipe.json"))
    assert set(quantized_layers(other.transformer)) == set(quantized_layers(first.transformer))
    assert other.compression_recipe() == recipe


def test_compress_shared_module_is_replaced_under_every_name() -> None:
    model = tiny.build("pixart")
    model.transformer_blocks[1].attn1.to_k = model.transformer_blocks[0].attn1.to_k
    model.compress("w8a8")
    assert isinstance(model.transformer_blocks[0].attn1.to_k, QuantizedLinear)
    assert model.transformer_blocks[1].attn1.to_k is model.transformer_blocks[0].attn1.to_k


def test_compress_progress_bar_follows_pipeline_switch(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny.build_pipeline("pixart")
    pipe.set_progress_bar_config(disable=True)
    pipe.compress("w8a8")
    assert "Compressing" not in capsys.readouterr().err
    other = tiny.build_pipeline("pixart")
    other.set_progress_bar_config(disable=False)
    other.compress("w8a8")
    assert "Compressing transformer" in capsys.readouterr().err


def test_a_bar_that_the_library_switched_off_still_tells_the_callback() -> None:
    diffusers.utils.logging.disable_progress_bar()
    seen: list[int] = []
    with progress.bar("Stage", 5, tiny.build_pipeline("pixart"), lambda stage, done, *_: seen.append(done)) as advance:
        advance(2, {})
        advance(5, {})
    assert seen == [2, 5]


# --- errors ---------------------------------------------------------------------------------------------------


def test_compress_unknown_preset_names_nearest() -> None:
    with pytest.raises(dc.ConfigError, match=r"Unknown preset 'w4a9'; did you mean 'w4a"):
        tiny.build("pixart").compress("w4a9")


def test_compress_without_preset_lists_bytes_and_recommends() -> None:
    with pytest.raises(dc.ConfigError, match=r"(?s)needs a preset.*w8a8 .* -> .*w4a8.*On cpu: compress\(\"w8a8\"\)"):
        tiny.build_pipeline("pixart").compress()


def test_compress_w4a4_without_calibration_says_what_it_needs() -> None:
    model = tiny.build("pixart")
    with pytest.raises(dc.ConfigError, match=r"w4a4: .*calibrated algorithm.*RTNConfig\(\)"):
        model.compress("w4a4")
    model.compress(dc.QuantizationConfig("w4a4", algorithm=dc.RTNConfig()))
    assert torch.isfinite(model(**tiny.inputs_for(model))[0]).all()


def test_compress_impossible_group_size_names_layer_shape_and_fix() -> None:
    scheme = dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT4, dc.PerGroup(128)))
    model = tiny.build("pixart", attention_head_dim=24, cross_attention_dim=96)
    clean = fingerprint(model)
    with pytest.raises(
        dc.IncompatibleShapeError, match=r"transformer_blocks\.0\..*group_size=128.*in_features=96.*group_size=32"
    ):
        model.compress(scheme)
    assert fingerprint(model) == clean


def test_compress_missing_component() -> None:
    with pytest.raises(dc.ConfigError, match=r"no component or group 'text_encoder_2'; did you mean 'text_encoder'"):
        tiny.build_pipeline("pixart").compress({"text_encoder_2": "w8a16"})


def test_compress_pipeline_without_denoiser() -> None:
    pipe = tiny.build_pipeline("pixart")
    pipe.transformer = None
    with pytest.raises(dc.ConfigError, match=r"no denoiser found among its models \(.*vae.*\)"):
        pipe.compress("w8a8")


def test_compress_meta_tensors_refused_but_planned() -> None:
    with torch.device("meta"):
        model = tiny.build("pixart", dtype=torch.float32).to("meta")
    assert model.compression_plan("w4a8").bytes_after > 0
    with pytest.raises(dc.ModelStateError, match=r"needs loaded weights, found a meta tensor"):
        model.compress("w4a8")


def test_compress_pattern_without_match() -> None:
    with pytest.raises(dc.ConfigError, match=r"modules_to_not_convert: pattern 'atn2' matches no layer"):
        tiny.build("pixart").compress("w8a8", modules_to_not_convert=["atn2"])


def test_compress_foreign_quantization_refused_by_name() -> None:
    model = tiny.build("pixart")
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model.transformer_blocks[0], torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    with pytest.raises(dc.ModelStateError, match="already quantized by torchao"):
        model.compress("w8a8")


def test_compress_needs_disk_for_the_spill_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    model = tiny.build("pixart")
    clean = fingerprint(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(dc.ModelStateError, match=r"MiB of free disk.*work_dir="):
        model.compress("w8a8", work_dir=tmp_path)
    assert fingerprint(model) == clean


def test_compress_plain_module_refused() -> None:
    with pytest.raises(dc.ConfigError, match="needs a diffusers ModelMixin or a transformers PreTrainedModel"):
        dc.compress(nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 128)), "w8a8")
    with pytest.raises(dc.ConfigError, match="needs a diffusers pipeline or a model, got str"):
        dc.compress("a string", "w8a8")


def test_compress_under_group_offload_names_the_order() -> None:
    model = tiny.build("pixart")
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(dc.ModelStateError, match=r"compress first, then enable_group_offload"):
        model.compress("w8a8")


def test_compress_scheme_the_device_lacks() -> None:
    with pytest.raises(
        dc.UnsupportedHardwareError, match=r"float8_e4m3fn, which the device 'mps' does not have.*w8a16"
    ):
        tiny.build("pixart").compress("fp8", device="mps")


def test_compress_plan_made_on_a_meta_twin() -> None:
    with torch.device("meta"):
        twin = tiny.build("pixart").to("meta")
    plan = twin.compression_plan("w4a8").keep("attn2")
    model = tiny.build("pixart").compress(plan)
    assert set(quantized_layers(model)) == set(plan.components[""].layers)
    model.compress(plan)  # the same again is a no-op
    with pytest.raises(dc.CompressionConflictError, match="already compressed"):
        model.compress("w8a8")


def test_compress_recipe_of_another_model_touches_nothing() -> None:
    recipe = tiny.build("pixart").compress("w4a8").compression_recipe()
    other = tiny.build("flux")
    clean = fingerprint(other)
    with pytest.raises(
        dc.ConfigError, match=r"of the recipe's \d+ patterns match no layer.*another architecture.*'w4a8'"
    ):
        other.compress(recipe)
    assert fingerprint(other) == clean


def test_compress_algorithm_that_cannot_reach_the_format_touches_nothing() -> None:
    model = tiny.build("pixart")
    clean = fingerprint(model)
    with pytest.raises(dc.ConfigError, match=r"transformer_blocks\.0\.\S+: w8a8: HQQ: needs asymmetric .*w4a16"):
        model.compression_plan("w8a8", algorithm=dc.HQQConfig())
    with pytest.raises(dc.ConfigError, match="HQQ: needs asymmetric"):
        model.compress("w4a8", algorithm=dc.HQQConfig())
    assert fingerprint(model) == clean


def test_compress_same_request_with_another_seed_is_a_no_op_without_random_numbers() -> None:
    model = tiny.build("pixart").compress("w8a8", seed=1)
    packed = fingerprint(model)
    model.compress("w8a8", seed=2)
    model.compress("w8a8", generator=torch.Generator().manual_seed(3))
    assert fingerprint(model) == packed
    with pytest.raises(dc.CompressionConflictError, match=r"asked for another \(algorithm: RTNConfig.* -> RTNConfig"):
        model.compress("w8a8", algorithm=dc.RTNConfig(observer="minmax"))
    with pytest.raises(dc.CompressionConflictError, match=r"asked for another \(scheme: w8a8.* -> w8a16"):
        model.compress("w8a16")


def test_compress_seed_or_generator_not_both() -> None:
    with pytest.raises(dc.ConfigError, match="seed= or generator=, not both"):
        tiny.build("pixart").compress("w8a8", seed=1, generator=torch.Generator())


def test_compress_patterns_must_match_in_one_of_the_components() -> None:
    pipe = tiny.build_pipeline("pixart")
    pipe.compress({"transformer": "w8a8", "text_encoder": "w8a16"}, modules_to_not_convert=["attn2", "wo"])
    assert not any("attn2" in name for name in quantized_layers(pipe.transformer))
    assert not any(name.endswith(".wo") for name in quantized_layers(pipe.text_encoder))
    other = tiny.build_pipeline("pixart")
    with pytest.raises(
        dc.ConfigError, match=r"transformer, text_encoder: modules_to_not_convert: pattern 'atn2' matches no layer"
    ):
        other.compress({"transformer": "w8a8", "text_encoder": "w8a16"}, modules_to_not_convert=["attn2", "atn2"])


def test_compress_recipe_of_a_pipeline_on_a_single_model_says_how() -> None:
    recipe = tiny.build_pipeline("pixart").compress("w8a8", measure=False).compression_recipe()
    model = tiny.build("pixart", seed=1)
    with pytest.raises(dc.ConfigError, match=r"single model and has no component 'transformer'.*recipe\.components"):
        model.compress(recipe)
    assert quantized_layers(model.compress(recipe.components["transformer"][0]))
    both = dc.Recipe({**recipe.components, "vae": ()})
    with pytest.raises(dc.ConfigError, match=r"Recipe is for transformer, vae.*recipe\.components\[name\]"):
        tiny.build_pipeline("pixart").compress({"transformer": both})


@pytest.mark.parametrize(
    ("name", "advice"), [("bf16", r"dtype=torch\.bfloat16"), ("NF4", "bitsandbytes.*w4a16"), ("nvfp4", "fp8")]
)
def test_compress_words_from_elsewhere_get_advice(name: str, advice: str) -> None:
    with pytest.raises(dc.ConfigError, match=rf"Unknown preset '{name}': .*{advice}.*Available: w8a8"):
        tiny.build("pixart").compress(name)


def test_compress_bare_model_is_not_called_denoiser() -> None:
    with pytest.raises(dc.ConfigError, match=r"For this model:"):
        tiny.vae().compress()


def test_compress_bad_device_and_work_dir_touch_nothing(tmp_path: Any) -> None:
    model = tiny.build("pixart")
    clean = fingerprint(model)
    with pytest.raises(dc.ConfigError, match="must hold data, got 'meta'"):
        model.compress("w8a8", device="meta")
    (tmp_path / "file").touch()
    with pytest.raises(dc.ModelStateError, match="work_dir must be a folder"):
        model.compress("w8a8", work_dir=tmp_path / "file")
    assert fingerprint(model) == clean


def test_compress_cancelled_after_the_last_layer_restores() -> None:
    pipe = tiny.build_pipeline("pixart")
    clean = fingerprint(pipe.transformer)
    seen = []

    def cancel(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        seen.append(stage)
        if stage == "Measuring the compressed pipeline":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.compress("w8a8", callback=cancel)
    assert seen[0] == "Measuring the dense pipeline"
    assert fingerprint(pipe.transformer) == clean
    assert not quantized_layers(pipe.transformer)


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"seed": "x"}, "seed: an integer, got str 'x'"),
    ({"overrides": ["attn1"]}, r"overrides: a dict .*got list.*modules_to_not_convert="),
    ({"modules_to_not_convert": 5}, "modules_to_not_convert: a list of patterns, got int 5"),
    ({"modules_to_not_convert": ["attn1", 1]}, "a list of patterns, got int 1"),
    ({"algorithm": "hqqq"}, "unknown kind 'hqqq'; did you mean 'hqq'"),
    ({"algorithm": 3}, r"algorithm: a config such as RTNConfig\(\), got int 3"),
    ({"callback": 3}, "callback= is called as .* got 3"),
    ({"device": "banana"}, "device='banana' is no device"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=[str(item[0]) for item in BAD_ARGUMENTS])
def test_compress_arguments_of_the_wrong_type(arguments: dict[str, Any], message: str) -> None:
    model = tiny.build("pixart")
    clean = fingerprint(model)
    with pytest.raises(dc.ConfigError, match=message):
        model.compress("w8a8", **arguments)
    assert fingerprint(model) == clean


def test_compress_algorithm_by_its_kind() -> None:
    model = tiny.build("pixart").compress("w4a16", algorithm="hqq")
    assert get_state(model).config.spec.algorithm == dc.HQQConfig()


def test_configuration_files_of_another_form(tmp_path: Any) -> None:
    with pytest.raises(dc.ConfigError, match="quantization_config: unknown key 'sceme'; did you mean 'scheme'"):
        dc.QuantizationConfig.from_dict({"quant_method": "diffuse_compress", "sceme": "w8a8"})
    with pytest.raises(dc.ConfigError, match='the key "scheme" is missing'):
        dc.QuantizationConfig.from_dict({"quant_method": "diffuse_compress"})
    stored = dc.QuantizationConfig("w8a8").to_dict()
    with pytest.raises(dc.CheckpointError, match="incomplete or corrupted"):
        dc.QuantizationConfig.from_dict({**stored, "seed": "x"})
    path = tmp_path / "recipe.json"
    for components in ("3", '{"transformer": 3}', '{"transformer": [3]}'):
        path.write_text(f'{{"schema_version": 1, "components": {components}}}')
        with pytest.raises(dc.CheckpointError, match=r"recipe\.json: Recipe: components must be"):
            dc.Recipe.load(path)


def test_compress_every_component_none() -> None:
    with pytest.raises(dc.ConfigError, match=r"every component given \(transformer, vae\) is None"):
        tiny.build_pipeline("pixart").compress({"transformer": None, "vae": None})


def test_compress_weights_in_other_modules_are_named() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=128, n_layer=1, n_head=4, n_positions=64))
    with pytest.raises(dc.ConfigError, match="weights are in Conv1D, for which there is no quantized layer"):
        gpt2.compress("w8a8")
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
    mixtral = MixtralForCausalLM(MixtralConfig(vocab_size=128, num_key_value_heads=2, num_local_experts=4, **sizes))
    text = str(mixtral.compression_plan("w8a8"))
    assert "of what is left is in MixtralExperts, for which there is no quantized layer" in text
    assert "MixtralExperts: no quantized layer for it" in text
