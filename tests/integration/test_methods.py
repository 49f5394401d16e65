"""Temporal tables and feature caches through compress, save_pretrained and from_pretrained, alone and with weights."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from safetensors import safe_open

import diffuse_compress as dc
import tiny
from diffuse_compress.caching.runtime import cache_of
from diffuse_compress.caching.units import units_of
from diffuse_compress.cli import main
from diffuse_compress.temporal.table import table_of
from loopback_hub import TOKEN, LoopbackHub

STEPS = 10
# Low enough for any machine, however busy: what a tiny model's blocks take of a step is little.
CACHE = dc.FeatureCacheConfig(target_speedup=1.02, num_inference_steps=STEPS, num_trajectories=1, history=1)
TABLES = dc.TFMQConfig(num_inference_steps=STEPS)
PLAIN = {"measure": False}


def items_for(pipe: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in tiny.call_kwargs(pipe).items() if k not in ("num_inference_steps", "output_type")}]


def picture(pipe: Any, steps: int = STEPS) -> torch.Tensor:
    return tiny.sample(pipe, num_inference_steps=steps)


def every_other(model: Any) -> dc.CacheSchedule:
    """Whole steps are reused, one after each that is computed."""
    units = units_of(model)
    mask = torch.zeros(STEPS, len(units), dtype=torch.uint8)
    mask[::2] = 1
    return dc.CacheSchedule.full(units, STEPS, type(model).__name__).with_mask(mask)


@pytest.fixture
def pixart() -> Any:
    return tiny.build_pipeline("pixart")


def keys_of(folder: Path) -> list[str]:
    with safe_open(folder / "diffusion_pytorch_model.safetensors", framework="pt") as handle:
        return [key for key in handle.keys() if key.startswith("diffuse_compress.")]


def contents(folder: Path) -> list[Any]:
    """config.json, metadata and bytes of every tensor: safetensors writes its header in any order."""
    file = folder / "diffusion_pytorch_model.safetensors"
    with safe_open(file, framework="pt") as handle:
        tensors = {key: handle.get_tensor(key).flatten().view(torch.uint8).tolist() for key in handle.keys()}
        return [(folder / "config.json").read_text(), handle.metadata(), tensors]


@pytest.mark.parametrize("name", ["pixart", "stable_diffusion", "flux", "wan"])
def test_all_kinds_together_come_back_bit_for_bit(name, tmp_path):
    pipe = tiny.build_pipeline(name)
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    pipe.compress("w4a8", TABLES, CACHE, algorithm=dc.RTNConfig(), calibration=items_for(pipe), **PLAIN)
    model = getattr(pipe, component)
    assert table_of(model).schedules
    assert cache_of(model).schedule.reused > 0
    expected = picture(pipe)
    stats = str(dc.compression_stats(pipe, strict=True))
    assert "feature cache" in stats
    assert "temporal table" in stats
    pipe.save_pretrained(tmp_path / "one")
    again = DiffusionPipeline.from_pretrained(tmp_path / "one")
    again.set_progress_bar_config(disable=True)
    other = getattr(again, component)
    assert torch.equal(cache_of(other).schedule.mask, cache_of(model).schedule.mask)
    assert cache_of(other).config == CACHE
    assert [s.values for s in table_of(other).schedules] == [s.values for s in table_of(model).schedules]
    assert torch.equal(picture(again), expected)
    dc.compression_stats(again, strict=True)
    report = dc.compression_report(again)
    assert set(report.components[component]["methods"]) == {"temporal", "cache"}
    assert "feature cache" in str(report)
    assert "feature cache" in report.to_markdown()
    again.save_pretrained(tmp_path / "two")
    assert contents(tmp_path / "one" / component) == contents(tmp_path / "two" / component)
    assert dc.compression_recipe(again).components[component][1:] == (TABLES, CACHE)


def test_kinds_are_added_by_later_calls(pixart, tmp_path):
    dense = picture(pixart)
    pixart.compress(TABLES, **PLAIN)
    assert torch.equal(picture(pixart), dense)
    pixart.compress("w8a8", **PLAIN)
    table = table_of(pixart.transformer)
    assert len(table.schedules) == 1
    quantized = picture(pixart)
    assert not torch.equal(quantized, dense)
    dc.compression_stats(pixart, strict=True)
    pixart.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    loaded.compress(CACHE, calibration=items_for(loaded), **PLAIN)
    assert not torch.equal(picture(loaded), quantized)
    with loaded.cache_disabled():
        assert torch.equal(picture(loaded), quantized)
    loaded.compress("w8a8", TABLES, **PLAIN)  # what is there already
    assert loaded.compression_plan("w8a8", TABLES).unchanged == ["transformer", "transformer: timestep path"]


def test_tables_are_those_of_the_dense_weights(pixart):
    """Layers that a table serves lose nothing by being quantized; conditions are computed anew for each request."""
    reference = copy.deepcopy(pixart)
    reference.compress(dc.TFMQConfig(dc.TableConfig(conditions=False), STEPS), **PLAIN)
    keep = dc.QuantizationConfig("w4a16", overrides={"adaln_single": None}, modules_to_not_convert="transformer_blocks")
    pixart.compress(keep, **PLAIN)
    with_dense = picture(pixart)
    other = copy.deepcopy(reference)
    everything = dc.QuantizationConfig(
        "w4a16", overrides={"adaln_single": "w4a16"}, modules_to_not_convert="transformer_blocks"
    )
    other.compress(everything, **PLAIN)
    assert torch.equal(picture(other), with_dense)


@pytest.mark.parametrize("weights", ["cpu", "disk", "int8", "int4"])
def test_tables_and_parked_weights_alone(weights, pixart, tmp_path):
    dense = picture(pixart)
    pixart.compress(dc.TFMQConfig(dc.TableConfig(weights=weights), STEPS), **PLAIN)
    found = picture(pixart)
    if weights in ("cpu", "disk"):
        assert torch.equal(found, dense)
    pixart.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "transformer" / "config.json").read_text())["quantization_config"]["scheme"] is None
    assert keys_of(tmp_path / "transformer")
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(again), found)
    dc.compression_stats(again, strict=True)
    again.decompress()
    assert table_of(again.transformer) is None
    again.save_pretrained(tmp_path)
    assert not keys_of(tmp_path / "transformer")
    assert "quantization_config" not in json.loads((tmp_path / "transformer" / "config.json").read_text())


def test_a_load_in_another_dtype_makes_its_tables_anew(pixart, tmp_path):
    pixart.compress("w8a8", TABLES, **PLAIN).save_pretrained(tmp_path)
    with pytest.warns(dc.DiffuseCompressWarning, match="made anew"):
        again = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert table_of(again.transformer).schedules == []


def test_a_dense_pipeline_with_a_cache_is_the_stock_checkpoint_and_a_file(pixart, tmp_path):
    pixart.save_pretrained(tmp_path / "stock")
    pixart.enable_cache(every_other(pixart.transformer))
    cached = picture(pixart)
    pixart.save_pretrained(tmp_path / "cached")
    added = {p.relative_to(tmp_path / "cached") for p in (tmp_path / "cached").rglob("*") if p.is_file()}
    for file in (p for p in (tmp_path / "stock").rglob("*") if p.is_file()):
        name = file.relative_to(tmp_path / "stock")
        # A tokenizer that has been used is written with its last length.
        assert (tmp_path / "cached" / name).read_bytes() == file.read_bytes() or name.parts[0] == "tokenizer"
        added.remove(name)
    assert added == {Path("feature_cache.safetensors")}
    again = DiffusionPipeline.from_pretrained(tmp_path / "cached")
    again.set_progress_bar_config(disable=True)
    assert cache_of(again.transformer) is None
    assert torch.equal(picture(again.load_cache(tmp_path / "cached")), cached)
    again.disable_cache(remove=True)
    again.save_pretrained(tmp_path / "cached")
    assert not (tmp_path / "cached" / "feature_cache.safetensors").exists()


def test_an_embedded_cache_is_in_the_checkpoint(pixart, tmp_path):
    pixart.compress(dataclasses.replace(CACHE, embed=True), calibration=items_for(pixart), **PLAIN)
    expected = picture(pixart)
    pixart.transformer.save_pretrained(tmp_path)
    assert "diffuse_compress.cache.mask" in keys_of(tmp_path)
    pixart.register_modules(transformer=type(pixart.transformer).from_pretrained(tmp_path))
    assert torch.equal(picture(pixart), expected)


def test_the_verbs_of_caches(pixart, tmp_path):
    dense = picture(pixart)
    model = pixart.transformer
    for verb in (pixart.enable_cache, pixart.disable_cache, pixart.cache_summary, lambda: pixart.save_cache(tmp_path)):
        with pytest.raises(dc.ConfigError, match="has no feature cache"):
            verb()
    model.enable_cache(every_other(model), strict=True)
    cached = picture(pixart)
    assert not torch.equal(cached, dense)
    assert "50.0 % reused" in model.cache_summary()
    assert "50.0 % reused" in pixart.cache_summary()
    assert "kept between calls" in pixart.cache_summary()
    file = pixart.save_cache(tmp_path / "folder")
    assert file == tmp_path / "folder" / "feature_cache.safetensors"
    assert file.stat().st_size < 100_000
    assert model.save_cache(tmp_path / "own.safetensors").exists()
    pixart.disable_cache()
    assert torch.equal(picture(pixart), dense)
    assert "(off)" in pixart.cache_summary()
    pixart.enable_cache()
    assert torch.equal(picture(pixart), cached)
    model.disable_cache(remove=True)
    assert torch.equal(picture(pixart), dense)
    for source in (file, tmp_path / "folder", tmp_path / "own.safetensors"):
        assert torch.equal(picture(pixart.load_cache(source, cache_dtype="float32")), cached)
        assert torch.equal(picture(pixart), cached)
        pixart.disable_cache(remove=True)
        model.load_cache(source)
        assert cache_of(model).schedule.reused == 0.5
    with pytest.raises(dc.CheckpointError, match=r"no feature_cache\.safetensors"):
        pixart.load_cache(tmp_path)
    with pytest.raises(dc.CheckpointError, match="cannot be had"):
        pixart.load_cache("no/such-repository")
    with pytest.raises(dc.ConfigError, match="cache-safe"):
        pixart.enable_cache("cash")


def test_a_schedule_of_another_model_leaves_what_is_there(pixart):
    pixart.enable_cache(every_other(pixart.transformer))
    cached = picture(pixart)
    with pytest.raises(dc.ConfigError, match="made for"):
        pixart.enable_cache(every_other(tiny.build("dit")))
    assert torch.equal(picture(pixart), cached)
    schedule = every_other(pixart.transformer)
    with pytest.raises(dc.ConfigError, match="its denoisers are 'transformer'"):
        pixart.enable_cache({"transformer": schedule, "transformer_2": schedule})


def test_two_experts_have_a_schedule_each(tmp_path):
    pipe = tiny.build_pipeline("wan")
    second = copy.deepcopy(pipe.transformer)
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.5)
    pipe.enable_cache({"transformer": every_other(pipe.transformer), "transformer_2": every_other(second)})
    pipe.save_cache(tmp_path)
    pipe.disable_cache(remove=True)
    pipe.load_cache(tmp_path)
    assert [cache_of(model) is not None for model in (pipe.transformer, pipe.transformer_2)] == [True, True]
    assert "transformer_2\n" in pipe.cache_summary()


def test_diffusers_own_caches_go_on_to_diffusers():
    pipe = tiny.build_pipeline("flux")
    model = pipe.transformer
    dense = picture(pipe)
    model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    assert model.is_cache_enabled
    assert not torch.equal(picture(pipe), dense)
    with pytest.raises(dc.ConfigError, match="a cache of diffusers is on"):
        pipe.enable_cache(every_other(model))
    pipe.disable_cache()
    assert not model.is_cache_enabled
    pipe.enable_cache(every_other(model))
    with pytest.raises(dc.ConfigError, match="follows a cache schedule"):
        model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(dc.ConfigError, match="takes no cache configuration of diffusers"):
        tiny.build("pixart").enable_cache(FirstBlockCacheConfig())


def test_a_cache_goes_to_the_hub_and_back_alone(pixart, tmp_path, monkeypatch):
    pixart.enable_cache(every_other(pixart.transformer))
    cached = picture(pixart)
    with LoopbackHub() as hub:
        constants = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        constants["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        pixart.push_cache_to_hub("me/pixart-cache", token=TOKEN)
        assert "feature_cache.safetensors" in hub.files("me/pixart-cache")
        pixart.disable_cache(remove=True)
        pixart.load_cache("me/pixart-cache", token=TOKEN, cache_dir=str(tmp_path / "cache"))
    assert torch.equal(picture(pixart), cached)


def test_presets_and_plans(pixart):
    plan = pixart.compression_plan("w8a8", "cache", TABLES)
    assert [method.kind for method in plan.methods] == ["temporal", "cache"]
    text = str(plan)
    assert "feature cache for 1.6x" in text
    assert "temporal tables (live)" in text
    recipe = plan.recipe()
    assert dc.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))).components == recipe.components
    assert plan.to_dict()["methods"][1]["config"]["target_speedup"] == 1.6
    plan = pixart.compression_plan(plan)
    assert [method.kind for method in plan.methods] == ["temporal", "cache"]


def test_what_cannot_be_planned_is_refused_before_anything_is_touched(pixart):
    state = copy.deepcopy(pixart.transformer.state_dict())
    with pytest.raises(dc.ConfigError, match="two configurations of kind 'cache'"):
        pixart.compress("w8a8", "cache", "cache-safe")
    with pytest.raises(dc.ConfigError, match="got a bare model"):
        pixart.transformer.compress("cache")
    with pytest.raises(dc.ConfigError, match="for denoisers of diffusers"):
        pixart.compress({"text_encoder": "cache"})
    with pytest.raises(dc.ConfigError, match="nothing asks for them"):
        pixart.compress("cache", algorithm=dc.RTNConfig())
    with pytest.raises(dc.ConfigError, match="fewer than 10 steps"):
        pixart.compress(dc.FeatureCacheConfig(num_inference_steps=8))
    recorded = dc.Calibration.record(pixart, items_for(pixart), num_samples=2, num_inference_steps=2)
    with pytest.raises(dc.ConfigError, match="runs the whole sampling loop"):
        pixart.compress("cache", calibration=recorded)
    pixart.enable_cache(every_other(pixart.transformer))
    with pytest.raises(dc.CompressionConflictError, match=r"disable_cache\(remove=True\)"):
        pixart.compress("cache")
    assert all(torch.equal(value, state[key]) for key, value in pixart.transformer.state_dict().items())


def test_a_failure_takes_everything_off_again(pixart):
    dense, state = picture(pixart), copy.deepcopy(pixart.transformer.state_dict())
    parked = dc.TFMQConfig(dc.TableConfig(weights="int4"), STEPS)

    def stop(stage: str, done: int, total: int, metrics: Any) -> None:
        if stage == "Checking schedules" and done == total:
            raise KeyboardInterrupt

    for first in ([], [parked]):
        if first:
            pixart.compress(*first, **PLAIN)
            dense, state = picture(pixart), copy.deepcopy(pixart.transformer.state_dict())
        methods = ["w8a8", CACHE] if first else ["w8a8", parked, CACHE]
        with pytest.raises(KeyboardInterrupt):
            pixart.compress(*methods, calibration=items_for(pixart), algorithm=dc.RTNConfig(), callback=stop, **PLAIN)
        assert cache_of(pixart.transformer) is None
        assert (table_of(pixart.transformer) is not None) == bool(first)
        found = pixart.transformer.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in found.items())
        assert torch.equal(picture(pixart), dense)


def test_another_release_is_named(pixart, tmp_path):
    pixart.compress("w8a8", TABLES, **PLAIN).save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    assert data.count(b'\\"temporal\\":{') >= 1
    file.write_bytes(data.replace(b'\\"temporal\\":{', b'\\"temporul\\":{'))
    with pytest.raises(dc.CheckpointError, match="'temporul', which this release does not know"):
        type(pixart.transformer).from_pretrained(tmp_path / "transformer")


def test_info_shows_what_a_checkpoint_carries(pixart, tmp_path, capsys):
    pixart.compress("w8a8", TABLES, **PLAIN)
    pixart.enable_cache(every_other(pixart.transformer))
    pixart.save_pretrained(tmp_path)
    main(["info", str(tmp_path)])
    out = capsys.readouterr().out
    assert "temporal tables" in out
    assert "feature cache" in out


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pixart", "stable_diffusion", "flux", "wan"])
def test_all_kinds_together_on_cuda(name, tmp_path):
    pipe = tiny.build_pipeline(name, dtype=torch.bfloat16).to("cuda")
    pipe.compress("w8a8", TABLES, CACHE, algorithm=dc.RTNConfig(), calibration=items_for(pipe), **PLAIN)
    expected = picture(pipe)
    assert torch.isfinite(expected).all()
    dc.compression_stats(pipe, strict=True)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path).to("cuda")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(again), expected)
    dc.compression_stats(again, strict=True)
    again.to("cpu")
    again.enable_model_cpu_offload()
    assert torch.equal(picture(again), expected)
    dc.compression_stats(again, strict=True)


@pytest.mark.gpu
def test_compiled_blocks_with_tables_and_a_cache(tmp_path):
    pipe = tiny.build_pipeline("flux", dtype=torch.bfloat16).to("cuda")
    pipe.compress("w8a8", TABLES, **PLAIN)
    pipe.enable_cache(every_other(pipe.transformer))
    expected = picture(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    found = picture(pipe)
    assert (found - expected).norm() < 0.05 * expected.norm()
    dc.compression_stats(pipe, strict=True)
