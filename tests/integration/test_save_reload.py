"""Save, then plain from_pretrained: bit-identical, in this process and in a new one; without us, a load stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors import safe_open

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import get_state, quantized_layers
from diffuse_compress.integrations.saving import publish

PRESETS = ["w8a8", "fp8", "w8a16", "w4a16", "w4a8", "w4a4"]
ROOT = Path(__file__).parents[2]


def config_for(preset: str) -> dc.QuantizationConfig:
    return dc.QuantizationConfig(preset, algorithm=dc.RTNConfig() if preset == "w4a4" else None)


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**tiny.inputs_for(model), return_dict=False)))


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter that finds our sources but imports them only if told to."""
    path = [str(ROOT / folder) for folder in ("src", "kernels", "tests")] + [os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["pixart", "unet_sdxl", "t5_encoder", "clip_text", "llama"])
def test_reload_is_bit_identical(name: str, preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.build(name, dtype=dtype).compress(config_for(preset))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", dc.errors.DiffuseCompressWarning)
        # dtype None must give back what was saved, as must naming it.
        for kwargs in ({}, {"dtype": dtype}):
            reloaded = type(model).from_pretrained(tmp_path, **kwargs)
            assert reloaded.dtype == dtype
            expected = model.state_dict()
            for key, tensor in reloaded.state_dict().items():
                assert tensor.dtype == expected[key].dtype, key
                assert torch.equal(tensor.view(torch.uint8), expected[key].view(torch.uint8)), key
            assert torch.equal(output(reloaded), output(model))
    assert get_state(reloaded).config == get_state(model).config


def test_pipeline_reloads_in_a_new_process(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart", dtype=torch.bfloat16)
    pipe.compress({"transformer": "w4a8", "text_encoder": "w8a16"})
    kwargs = tiny.call_kwargs(pipe, output_type="pt")
    pipe.set_progress_bar_config(disable=True)
    torch.save(pipe(**kwargs).images, tmp_path / "expected.pt")
    pipe.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/model_index.json").exists()
    code = (
        "import sys, torch, tiny, diffuse_compress\n"
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "assert pipe.transformer.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.bfloat16\n"
        "out = pipe(**tiny.call_kwargs(pipe, output_type='pt')).images\n"
        "assert torch.equal(out, torch.load(sys.argv[2]))\n"
        "print(type(pipe).__name__, pipe.compression_report())\n"
    )
    done = python(code, str(tmp_path / "saved"), str(tmp_path / "expected.pt"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PixArtAlphaPipeline")
    assert "diffuse_compress" not in done.stderr.replace("import diffuse_compress", "")


def test_load_without_our_import_stops(tmp_path: Path) -> None:
    cases = {}
    for name in ("t5_encoder", "clip_text", "llama", "pixart"):
        for preset in PRESETS:
            model = tiny.build(name).compress(config_for(preset), measure=False)
            model.save_pretrained(tmp_path / f"{name}-{preset}")
            library = "diffusers" if isinstance(model, diffusers.ModelMixin) else "transformers"
            cases[f"{name}-{preset}"] = [library, type(model).__name__]
    code = (
        "import sys, json, importlib\n"
        "for folder, (library, cls) in json.loads(sys.argv[2]).items():\n"
        "    try:\n"
        "        getattr(importlib.import_module(library), cls).from_pretrained(f'{sys.argv[1]}/{folder}')\n"
        "        print(folder, 'LOADED')\n"
        "    except Exception as error:\n"
        "        print(folder, type(error).__name__, ' '.join(str(error).split()))\n"
        "assert 'diffuse_compress' not in sys.modules\n"
    )
    done = python(code, str(tmp_path), json.dumps(cases))
    assert done.returncode == 0, done.stderr
    results = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0] in cases)
    assert set(results) == set(cases)
    for folder, result in results.items():
        expected = "Unknown quantization type" if cases[folder][0] == "diffusers" else "mismatch"
        assert "LOADED" not in result, folder
        assert expected in result, f"{folder}: {result}"


def test_a_cast_between_two_saves_is_written(tmp_path: Path) -> None:
    """Saving turns the entry of a diffusers config into a dict; what is marked afterwards must still be what counts."""
    model = tiny.build("pixart").compress("w8a16", measure=False)
    model.save_pretrained(tmp_path / "fp32")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    content = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert content["quantization_config"]["compute_dtype"] == "bfloat16"


def test_pipeline_reloads_each_component_in_the_dtype_it_was_saved_in(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart", dtype=torch.bfloat16)
    pipe.vae.to(torch.float32)
    pipe.compress("w8a8").save_pretrained(tmp_path)
    assert diffusers.DiffusionPipeline.from_pretrained(tmp_path).vae.dtype == torch.float32
    asked = diffusers.DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert asked.vae.dtype == asked.transformer.dtype == torch.float16
    dense = tiny.build_pipeline("pixart", dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    # What is not compressed loads as diffusers loads it.
    assert diffusers.DiffusionPipeline.from_pretrained(tmp_path / "dense").vae.dtype == torch.float32


def test_component_alone_from_a_pipeline_folder(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart").compress("w4a8")
    pipe.save_pretrained(tmp_path)
    alone = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert torch.equal(output(alone), output(pipe.transformer))


@pytest.mark.parametrize("name", ["pixart", "llama"])
def test_sharded_checkpoint(name: str, tmp_path: Path) -> None:
    model = tiny.build(name).compress("w4a8")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reloaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(output(reloaded), output(model))
    # Saving it whole into the same folder must not leave shards that a loader would prefer.
    reloaded.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert not list(tmp_path.glob("*.index.json"))
    assert torch.equal(output(type(model).from_pretrained(tmp_path)), output(model))


def test_save_into_the_folder_it_was_loaded_from_keeps_other_files(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart").compress("w8a8")
    pipe.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "transformer/notes.txt").write_text("mine too")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "transformer/notes.txt").read_text() == "mine too"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(output(again.transformer), output(pipe.transformer))


def test_saving_an_adapter_keeps_the_other_weight_files(tmp_path: Path) -> None:
    names = ("my_embeddings.safetensors", "pytorch_lora_weights.safetensors", "model.safetensors")
    staging, target = tmp_path / "staging", tmp_path / "target"
    for folder, files in ((staging, ("adapter_model.safetensors",)), (target, names)):
        folder.mkdir()
        for name in files:
            (folder / name).write_bytes(folder.name.encode())
    publish(staging, target)
    assert {path.name for path in target.iterdir()} == {*names, "adapter_model.safetensors"}
    assert {(target / name).read_bytes() for name in names} == {b"target"}


def test_save_uncompressed_is_the_stock_function(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart")
    pipe.save_pretrained(tmp_path)
    with safe_open(tmp_path / "transformer/diffusion_pytorch_model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_config_holds_patterns_only(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart").compress("w4a8")
    pipe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "transformer/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "diffuse_compress"
    assert config["schema_version"] == 1
    assert len(config["rules"]) < 25
    assert str(tmp_path) not in json.dumps(config)
    with safe_open(tmp_path / "transformer/diffusion_pytorch_model.safetensors", framework="pt") as handle:
        metadata = json.loads(handle.metadata()["diffuse_compress"])
    assert set(metadata["layers"]) == set(quantized_layers(pipe.transformer))


def test_checkpoint_without_metadata_loads_from_its_patterns(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny.build("pixart").compress("w4a8")
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    assert torch.equal(output(type(model).from_pretrained(tmp_path)), output(model))


@pytest.mark.parametrize("door", ["quant_mapping", "quant_backend", "component"])
@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_on_the_fly_converts_the_same_layers_as_compress(door: str, preset: str, tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart")
    pipe.save_pretrained(tmp_path)
    pipe.compress({"transformer": preset, "text_encoder": preset})
    if door == "component":
        transformer = diffusers.PixArtTransformer2DModel.from_pretrained(
            tmp_path, subfolder="transformer", quantization_config=dc.QuantizationConfig(preset)
        )
        encoder = transformers.T5EncoderModel.from_pretrained(
            tmp_path, subfolder="text_encoder", quantization_config=dc.QuantizationConfig(preset)
        )
    else:
        arguments: dict[str, Any] = (
            {"quant_mapping": {name: dc.QuantizationConfig(preset) for name in ("transformer", "text_encoder")}}
            if door == "quant_mapping"
            else {
                "quant_backend": "diffuse_compress",
                "quant_kwargs": {"scheme": preset},
                "components_to_quantize": ["transformer", "text_encoder"],
            }
        )
        loaded = diffusers.DiffusionPipeline.from_pretrained(
            tmp_path, quantization_config=diffusers.PipelineQuantizationConfig(**arguments)
        )
        transformer, encoder = loaded.transformer, loaded.text_encoder
    for fresh, live in ((transformer, pipe.transformer), (encoder, pipe.text_encoder)):
        assert list(quantized_layers(fresh)) == list(quantized_layers(live))
        assert torch.equal(output(fresh), output(live))
        assert get_state(fresh).config == get_state(live).config
    transformer.save_pretrained(tmp_path / "again")
    assert torch.equal(output(type(transformer).from_pretrained(tmp_path / "again")), output(transformer))


def test_dtype_is_the_compute_dtype_with_every_layer_quantized() -> None:
    model = tiny.build("pixart", dtype=torch.bfloat16)
    model.compress(dc.QuantizationConfig("w8a16", overrides={"*": "w8a16"}))
    assert model.dtype == torch.bfloat16
    llama = tiny.build("llama", dtype=torch.bfloat16).compress("w8a16")
    assert llama.model.layers[0].dtype if hasattr(llama.model.layers[0], "dtype") else True
    assert llama.dtype == torch.bfloat16


def test_headless_class_loads_a_headed_checkpoint(tmp_path: Path) -> None:
    model = tiny.build("llama").compress("w8a16")
    model.save_pretrained(tmp_path)
    body = transformers.LlamaModel.from_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(body(ids)[0], model.model(ids)[0])


# --- corrupted, newer, interrupted -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pixart", "llama"])
def test_newer_schema_is_refused(name: str, tmp_path: Path) -> None:
    model = tiny.build(name).compress("w8a8")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["schema_version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(dc.CheckpointError, match=r"schema_version must be .* got 99.*pip install -U"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["pixart", "llama"])
def test_missing_tensors_are_refused(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny.build(name).compress("w8a8")
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    victim = next(key for key in tensors if key.endswith(".scale"))
    del tensors[victim]
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(dc.CheckpointError, match=r"lacks 1 tensors.*incomplete"):
        type(model).from_pretrained(tmp_path)


def test_truncated_file_is_an_error(tmp_path: Path) -> None:
    model = tiny.build("pixart").compress("w8a8")
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"(?i)truncated|corrupt|safetensors|Unable to load|metadata"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("stage", ["writing", "publishing"])
def test_disk_full_while_saving_leaves_the_old_checkpoint(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from diffuse_compress.integrations import saving

    old = tiny.build("pixart").compress("w8a8")
    old.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    new = tiny.build("pixart", seed=5).compress("w4a8")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if stage == "writing":
        import safetensors.torch

        monkeypatch.setattr(safetensors.torch, "save_file", full)
    else:
        monkeypatch.setattr(saving, "_sync", full)
    with pytest.raises(dc.CheckpointError, match=r"disk of .* is full.*untouched"):
        new.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_interrupt_while_saving_leaves_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffuse_compress.integrations import saving

    model = tiny.build("pixart").compress("w8a8")

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "_sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_save_to_a_file_path(tmp_path: Path) -> None:
    model = tiny.build("pixart").compress("w8a8")
    (tmp_path / "file").write_text("x")
    with pytest.raises(dc.CheckpointError, match="needs a folder"):
        model.save_pretrained(tmp_path / "file")


# --- what changes between compress and save --------------------------------------------------------------------


def test_clip_folder_with_published_key_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    dense = tiny.build("clip_text")
    dense.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense/model.safetensors"
    names = {key if key.startswith("text_model.") else f"text_model.{key}": v for key, v in load_file(file).items()}
    save_file(names, file, metadata={"format": "pt"})
    model = transformers.CLIPTextModel.from_pretrained(tmp_path / "dense").compress("w4a8")
    model.save_pretrained(tmp_path / "small")
    assert torch.equal(output(transformers.CLIPTextModel.from_pretrained(tmp_path / "small")), output(model))
    loaded = transformers.CLIPTextModel.from_pretrained(
        tmp_path / "dense", quantization_config=dc.QuantizationConfig("w4a8")
    )
    loaded.save_pretrained(tmp_path / "door")
    assert torch.equal(output(transformers.CLIPTextModel.from_pretrained(tmp_path / "door")), output(model))


@pytest.mark.parametrize("name", ["pixart", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_cast_after_compress_then_save(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.build(name, dtype=torch.bfloat16).compress("w8a8", measure=False).to(dtype)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert reloaded.dtype == dtype
    # Outputs are not compared: .to(float16) also rounds buffers that no checkpoint holds (rotary frequencies).
    for key, tensor in reloaded.state_dict().items():
        assert tensor.dtype == model.state_dict()[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), model.state_dict()[key].view(torch.uint8)), key
    assert all(layer.compute_dtype == dtype for layer in quantized_layers(reloaded).values())


def test_part_of_a_model_compressed_on_its_own(tmp_path: Path) -> None:
    model = tiny.build("llama")
    model.model.compress("w8a8", measure=False)
    expected = output(model)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "whole")), expected)
    whole = tiny.build("llama").compress("w8a8", measure=False)
    with pytest.raises(dc.CheckpointError, match="quantized as part of a larger model"):
        whole.model.save_pretrained(tmp_path / "part")


def test_dense_model_sharing_a_config_object_stays_dense(tmp_path: Path) -> None:
    first = tiny.build("llama").compress("w8a8", measure=False)
    with torch.random.fork_rng(devices=[]):
        second = transformers.LlamaForCausalLM(first.config).eval()
    second.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(output(transformers.LlamaForCausalLM.from_pretrained(tmp_path)), output(second))
    first.save_pretrained(tmp_path / "first")
    assert torch.equal(output(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "first")), output(first))


def test_pickled_files_are_refused(tmp_path: Path) -> None:
    model = tiny.build("pixart").compress("w8a8", measure=False)
    with pytest.raises(dc.CheckpointError, match="safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)


@pytest.mark.parametrize(("name", "odd"), [("unet_sd1", {"out_channels": 3}), ("clip_text", {"vocab_size": 129})])
def test_reloaded_tensors_are_aligned(name: str, odd: dict[str, int], tmp_path: Path) -> None:
    # A tensor of odd size shifts those after it in the file: three output biases, or 129 rows of one byte.
    model = tiny.build(name, **odd).compress("w8a8")
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert {tensor.data_ptr() % 64 for tensor in reloaded.state_dict().values()} == {0}
    assert torch.equal(output(reloaded), output(model))


def test_modular_pipeline_compresses_and_reloads(tmp_path: Path) -> None:
    from diffusers.modular_pipelines import FluxAutoBlocks

    parts = {name: part for name, part in tiny.build_pipeline("flux").components.items() if part is not None}
    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(**{name: part for name, part in parts.items() if name in pipe.components})
    assert pipe.compress({"denoisers": "w4a8", "text_encoder_2": "w8a16"}) is pipe
    report = pipe.compression_report().to_dict()
    assert set(report["components"]) == {"transformer", "text_encoder_2"}
    assert report["components"]["transformer"]["output_error"]["relative_error"]

    folder = tmp_path / "saved"
    pipe.save_pretrained(str(folder), overwrite_modular_index=True)
    index = json.loads((folder / "modular_model_index.json").read_text())
    origins = {value[2]["pretrained_model_name_or_path"] for value in index.values() if isinstance(value, list)}
    assert origins == {str(folder)}, "the index must not name the folder in which the save was staged"
    reloaded = diffusers.ModularPipeline.from_pretrained(str(folder))
    reloaded.load_components()

    def picture(one: Any) -> torch.Tensor:
        one.set_progress_bar_config(disable=True)
        arguments = dict(prompt="a red cat", num_inference_steps=2, height=32, width=32, max_sequence_length=16)
        generator = torch.Generator().manual_seed(0)
        return one(**arguments, output_type="latent", generator=generator, output="latents")

    assert quantized_layers(reloaded.transformer).keys() == quantized_layers(pipe.transformer).keys()
    assert torch.equal(picture(reloaded), picture(pipe))


def _vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}


def _qwen2_5_vl() -> Any:
    text = dict(vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    rope = dict(rope_type="default", mrope_section=[4, 6, 6])
    vision = dict(depth=1, hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=128)
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(**text, num_key_value_heads=2, rope_parameters=rope),
        vision_config=dict(**vision, fullatt_block_indexes=[0]),
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    return model, {"input_ids": torch.arange(16).reshape(2, 8) + 2}


@pytest.mark.parametrize("build", [_vit, _qwen2_5_vl])
def test_classes_whose_file_names_tensors_otherwise(build: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = build()
    model.compress("w4a8").save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs).logits, model(**inputs).logits)
    (file,) = tmp_path.glob("*.safetensors")
    assert not set(load_file(file)) <= set(model.state_dict()), "the file must rename, or this shows nothing"
    with safe_open(file, framework="pt") as handle:
        metadata, tensors = handle.metadata(), {key: handle.get_tensor(key) for key in handle.keys()}
    del tensors[next(key for key in tensors if key.endswith(".scale"))]
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(dc.CheckpointError, match=r"lacks 1 tensors.*incomplete"):
        type(model).from_pretrained(tmp_path)
