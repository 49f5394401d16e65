"""Models that generate with a quantized KV cache: compressed, by hand, saved, in beams and batches, rolled back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import diffuse_compress as dc
import tiny
import tiny_vlm
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.integrations.kv_layers import QuantizedKVLayer
from diffuse_compress.quantization.kv_cache import dequantize_states, quantize_states
from diffuse_compress.training.clips import InputClips, attach_clips, clips_of

SMALL = dc.KIVIConfig(bits=2, group_size=8, residual_length=8, num_sink_tokens=2)
NEW_TOKENS = 24


class Simulated(DynamicLayer):
    """Dense keys and values; old tokens replaced by what their codes stand for when they leave the window."""

    def __init__(self, config: dc.KIVIConfig) -> None:
        super().__init__()
        self.config, self.rounded = config, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        found = keys.clone(), values.clone()
        first, size = self.config.num_sink_tokens, self.config.group_size
        while first + self.rounded + size + self.config.residual_length <= keys.shape[-2]:
            part = slice(first + self.rounded, first + self.rounded + size)
            for states, per_channel in ((self.keys, self.config.method == "kivi"), (self.values, False)):
                made = quantize_states(states[..., part, :], self.config, per_channel=per_channel)
                states[..., part, :] = dequantize_states(made, self.config, states.dtype)
            self.rounded += size
        return found


def simulated(model: Any, config: dc.KIVIConfig) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [Simulated(config) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def build(name: str = "llama", **config: Any) -> Any:
    model = tiny.build(name, **{"num_hidden_layers": 2, "initializer_range": 0.2, **config})
    model.generation_config.eos_token_id = None
    return model


def prompts(batch: int = 2, length: int = 11) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 120, (batch, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4], ids[0, :4] = 0, 1  # one is padded on the left
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, **how: Any) -> torch.Tensor:
    how = {**prompts(), "max_new_tokens": NEW_TOKENS, "do_sample": False, **how}
    with torch.no_grad():
        return model.generate(**how)


def fill(layer: DynamicLayer, lengths: list[int], seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(2, 2, 2, length, 16, generator=generator) for length in lengths]
    return [layer.update(part[0], part[1]) for part in parts]


# --- a layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [SMALL, dc.KIVIConfig(4, 8, 0, "naive", scale_dtype="float8")], ids=["kivi", "naive"]
)
@pytest.mark.parametrize("prompt", [1, 9, 10, 17, 18, 19, 40])
def test_every_length_is_that_of_dense_states_rounded(config: dc.KIVIConfig, prompt: int) -> None:
    lengths = [prompt, *[1] * 30, 21]
    layer, dense = QuantizedKVLayer(config), Simulated(config)
    for found, expected in zip(fill(layer, lengths), fill(dense, lengths), strict=True):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    total = sum(lengths)
    assert layer.get_seq_length() == total
    assert layer.num_quantized == dense.rounded > 0
    left = total - config.num_sink_tokens - layer.num_quantized
    assert config.residual_length <= left < config.residual_length + config.group_size
    assert layer.get_mask_sizes(3) == (total + 3, 0)


def test_window_holds_what_it_should_at_every_length() -> None:
    layer = QuantizedKVLayer(SMALL)
    for length in range(1, 60):
        fill(layer, [1], seed=length)
        assert layer.num_quantized == max(0, length - 2 - 8) // 8 * 8
        assert layer.get_seq_length() == length
        assert layer.window[0].untyped_storage().nbytes() == layer.window[0].nbytes  # no view of more


def test_sequences_are_moved_with_all_that_is_theirs() -> None:
    for config in (SMALL, dc.KIVIConfig(2, 8, 8, scale_dtype="float8")):
        layer = QuantizedKVLayer(config)
        fill(layer, [45])
        keys, values = layer.keys, layer.values
        layer.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(layer.keys, keys[[1, 1]])
        assert torch.equal(layer.values, values[[1, 1]])
        layer.batch_repeat_interleave(3)
        assert torch.equal(layer.keys, keys[[1] * 6])
        layer.batch_select_indices(torch.tensor([4]))
        assert torch.equal(layer.values, values[[1]])
        layer.offload()
        layer.prefetch()
        assert torch.equal(layer.values, values[[1]])
        layer.reset()
        assert layer.get_seq_length() == 0
        assert layer.nbytes == 0
        fill(layer, [45])
        assert torch.equal(layer.keys, keys)


def test_rolling_back() -> None:
    layer, straight = QuantizedKVLayer(SMALL), QuantizedKVLayer(SMALL)
    fill(layer, [20])
    fill(straight, [20])
    layer.activate_past_recording()
    for seed in range(6):
        fill(layer, [9], seed=seed)
        layer.crop(-6)
        first = torch.Generator().manual_seed(seed)
        part = torch.randn(2, 2, 2, 9, 16, generator=first)[:, :, :, :3]
        straight.update(part[0], part[1])
        assert torch.equal(layer.keys, straight.keys)
    assert layer.num_quantized > 8
    before = layer.keys
    with pytest.raises(dc.ModelStateError, match="newest tokens are kept in full precision, cannot take back 30"):
        layer.crop(-30)
    with pytest.raises(ValueError, match="0 or minus"):
        layer.crop(3)
    with pytest.raises(dc.ModelStateError, match="read-only"):
        layer.keys = before
    assert torch.equal(layer.keys, before)
    layer.crop(-layer.get_seq_length())
    assert layer.get_seq_length() == 0


def test_bytes_of_a_long_cache() -> None:
    layer, config = QuantizedKVLayer(dc.KIVIConfig()), dc.KIVIConfig()
    states = torch.randn(1, 2, 1024 + 128, 64).bfloat16()
    layer.update(states, states)
    assert layer.num_quantized == 1024
    assert layer.quantized_nbytes == 2 * 2 * 1024 * 64 * config.bits_per_element(64) / 8
    assert layer.quantized_nbytes <= 0.16 * 2 * 2 * 1024 * 64 * 2
    assert layer.nbytes == layer.quantized_nbytes + 2 * 2 * 128 * 64 * 2


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.bfloat16), ("qwen3", torch.float32)])
def test_generate_is_that_of_a_simulated_cache(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(name, dtype=dtype)
    dense, expected = generate(model), generate(model, past_key_values=simulated(model, SMALL))
    assert not torch.equal(dense, expected)
    assert torch.equal(generate(model, past_key_values=dc.QuantizedKVCache(model.config, SMALL)), expected)
    assert model.compress(SMALL, measure=False) is model
    assert torch.equal(generate(copy.deepcopy(model)), expected)
    # Whoever asks for another cache gets it.
    assert torch.equal(generate(model, past_key_values=DynamicCache(config=model.config)), dense)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert torch.equal(generate(again), expected)
    assert again.compression_recipe().components == {"denoisers": (SMALL,)}
    assert SMALL.summary in str(again.compression_report())
    again.decompress().save_pretrained(tmp_path / "dense")
    assert torch.equal(generate(again), dense)
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    body = AutoModel.from_pretrained(tmp_path)  # has no generate, and still knows
    body.save_pretrained(tmp_path / "body")
    assert '"kv_cache"' in (tmp_path / "body" / "config.json").read_text()


def test_beside_quantized_weights(tmp_path: Path) -> None:
    model = build()
    model.compress("w8a16", SMALL, measure=False)
    expected = generate(model)
    assert not torch.equal(expected, generate(model, past_key_values=DynamicCache(config=model.config)))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(generate(again), expected)
    later = build().compress("w8a16", measure=False).compress(SMALL, measure=False)
    assert torch.equal(generate(later), expected)
    assert later.compress(SMALL) is later  # there already
    with pytest.raises(dc.CompressionConflictError, match="kind 'kv_cache' already"):
        later.compress(dc.KIVIConfig(bits=4))


def test_beams_and_assistants() -> None:
    model = build()
    for how in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        expected = generate(model, past_key_values=simulated(model, SMALL), **how)
        assert not torch.equal(expected, generate(model, **how))
        assert torch.equal(generate(model, past_key_values=dc.QuantizedKVCache(model.config, SMALL), **how), expected)
    # Assisted by prompt lookup: several tokens at a time, and the rejected ones taken back.
    one = {"input_ids": prompts()["input_ids"][1:], "attention_mask": None}
    expected = generate(model, past_key_values=simulated(model, SMALL), **one)
    model.compress(SMALL, measure=False)
    exact = dict(one, prompt_lookup_num_tokens=3)
    assert torch.equal(generate(model, **one), expected)
    assert torch.equal(generate(model, **exact), expected)
    assert torch.equal(generate(model, **one, assistant_model=build(num_hidden_layers=1).compress(SMALL)), expected)


@pytest.mark.parametrize("name", ["llava", "mllama"])
def test_vision_language_models(name: str) -> None:
    """Keys of pictures are quantized as well; those of cross attention are read from the layer, not from update."""
    model, call = tiny_vlm.build(name)
    call = {"attention_mask": torch.ones_like(call["input_ids"]), **call}
    model.generation_config.eos_token_id = None
    expected = generate(model, past_key_values=simulated(model, SMALL), **call)
    assert torch.equal(generate(model.compress(SMALL, measure=False), **call), expected)


def test_sliding_windows_stay_dense() -> None:
    model = build("gemma3", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=16)
    expected = generate(model, past_key_values=simulated(model, SMALL))
    cache = dc.QuantizedKVCache(model.config, SMALL)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, QuantizedKVLayer]
    assert str(model.compression_plan(SMALL)).splitlines()[-1].startswith(f"{SMALL.summary}: 1 of 2 layers")
    assert torch.equal(generate(model.compress(SMALL, measure=False)), expected)
    assert torch.equal(generate(model, past_key_values=cache), expected)
    assert cache.nbytes > sum(layer.nbytes for layer in cache.quantized_layers) > 0


def test_what_does_not_fit_is_refused_before_anything_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = build("mistral", sliding_window=16)
    for model, config, message in [
        (tiny.build("pixart"), SMALL, "needs a model of transformers that generates"),
        (tiny.build("clip_text"), SMALL, "needs a model of transformers that generates"),
        (windows, SMALL, "needs layers of full attention"),
        (build(head_dim=48), dc.KIVIConfig(group_size=32), "does not divide heads of 48 channels; group_size=24"),
    ]:
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(dc.ConfigError, match=message):
            model.compress("w8a16", config)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(dc.ConfigError, match="two configurations of kind 'kv_cache'"):
        build().compress(SMALL, dc.KIVIConfig())
    with pytest.raises(dc.ConfigError, match="needs a KIVIConfig, got str"):
        dc.QuantizedKVCache(windows.config, "kivi")
    with pytest.raises(dc.IncompatibleShapeError, match="heads of 20 channels"):
        QuantizedKVLayer(SMALL).update(torch.zeros(1, 1, 3, 20), torch.zeros(1, 1, 3, 20))
    monkeypatch.setenv("DIFFUSE_COMPRESS_NO_PATCH", "1")
    with pytest.raises(dc.ConfigError, match="DIFFUSE_COMPRESS_NO_PATCH is set"):
        build().compress(SMALL)


def test_tensors_of_another_method_come_back_beside_it(tmp_path: Path) -> None:
    model = build().compress("w8a8", SMALL, measure=False)
    layers = tuple(quantized_layers(model))
    clips = InputClips(layers, torch.full((len(layers), 1), 0.9), 0.0, 1000.0)
    attach_clips(model, clips)
    model.save_pretrained(tmp_path)
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["unexpected_keys"]
    found = clips_of(again)
    assert found is not None
    assert torch.equal(found.values, clips.values)
    assert torch.equal(generate(again), generate(model))
