"""SinkKV and ShadowKV: what they keep is what their definitions say, in layers and in models that generate."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

import diffuse_compress as dc
import tiny
import tiny_vlm
from diffuse_compress.integrations.kv_shadow import ShadowKVLayer
from diffuse_compress.integrations.kv_sink import SinkKVLayer
from diffuse_compress.integrations.rotary import Rotary
from diffuse_compress.quantization.kv_config import kv_config_from_dict
from diffuse_compress.quantization.kv_low_rank import LowRankKeys

SINK = dc.SinkKVConfig(num_sink_tokens=2, window_length=8)
SHADOW = dc.ShadowKVConfig(
    rank=8, chunk_size=4, sparse_budget=8, num_outlier_chunks=1, num_local_chunks=1, segment_length=8
)
ALL = dc.ShadowKVConfig(
    rank=1024, chunk_size=4, sparse_budget=4096, num_outlier_chunks=2, num_local_chunks=1, segment_length=8
)
NEW_TOKENS = 12


def build(name: str = "llama", **config: Any) -> Any:
    model = tiny.build(name, **{"num_hidden_layers": 2, "initializer_range": 0.2, **config})
    model.generation_config.eos_token_id = None
    return model


def ids(length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(5, 120, (1, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    longest = max(row.shape[1] for row in rows)
    found = [torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=1) for row in rows]
    mask = [torch.nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows]
    return {"input_ids": torch.cat(found), "attention_mask": torch.cat(mask)}


def generate(model: Any, **how: Any) -> Any:
    with torch.no_grad():
        return model.generate(**{"max_new_tokens": NEW_TOKENS, "do_sample": False, **how})


def logits_one_by_one(model: Any, tokens: torch.Tensor, cache: Any, prompt: int = 1) -> torch.Tensor:
    """fp32 [B, T, V] of a prompt and then one token at a time."""
    with torch.no_grad():
        found = [model(tokens[:, :prompt], past_key_values=cache).logits]
        for i in range(prompt, tokens.shape[1]):
            found.append(model(tokens[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(found, dim=1)


def turned(states: torch.Tensor, positions: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """[B, H, T, D] turned by positions [T], each pair of channels by hand."""
    size = states.shape[-1]
    found = states.clone()
    for i in range(size // 2):
        angle = positions.float() * theta ** (-2 * i / size)
        one, other = states[..., i], states[..., i + size // 2]
        found[..., i] = one * angle.cos() - other * angle.sin()
        found[..., i + size // 2] = other * angle.cos() + one * angle.sin()
    return found


class NaiveSink(DynamicLayer):
    """Every key before rotation; for each token those that it sees, turned to their places in the cache."""

    def __init__(self, config: dc.SinkKVConfig) -> None:
        super().__init__()
        self.config = config

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert key_states.shape[-2] == 1
        place = self.get_seq_length()
        keys, values = super().update(turned(key_states, torch.tensor([-place])), value_states)
        first, window = self.config.num_sink_tokens, self.config.window_length
        seen = [i for i in range(place + 1) if i < first or i > place - window]
        # The model turns its query by its place in the text, not by that in the cache.
        places = torch.arange(len(seen)) + place - (len(seen) - 1)
        return turned(keys[:, :, seen], places), values[:, :, seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen = min(self.get_seq_length() + 1, self.config.num_sink_tokens + self.config.window_length)
        return seen, self.get_seq_length() + 1 - seen


# --- SinkKV ----------------------------------------------------------------------------------------------------------


def test_attention_is_that_of_places_in_the_cache() -> None:
    """The query too at its place in the cache, as the paper has it: 10,000 tokens into a text."""
    config = tiny.build("llama").config
    layer = SinkKVLayer(SINK, Rotary("here", config))
    generator = torch.Generator().manual_seed(0)
    size, total = Rotary("here", config).dim, 40
    keys, values = torch.randn(2, 1, 2, total, size, generator=generator)
    query = torch.randn(1, 2, 1, size, generator=generator)
    for i in range(total):
        at = torch.tensor([i])
        found = layer.update(
            turned(keys[:, :, i : i + 1], at), values[:, :, i : i + 1], kwargs={"position_ids": at[None]}
        )
    seen = [0, 1, *range(total - 8, total)]
    logits = turned(query, torch.tensor([total - 1])) @ found[0].transpose(-1, -2)
    expected = turned(query, torch.tensor([9])) @ turned(keys[:, :, seen], torch.arange(10)).transpose(-1, -2)
    assert torch.allclose(logits, expected, atol=1e-4)
    assert torch.equal(found[1], values[:, :, seen])
    assert layer.get_seq_length() == total
    assert layer.window[0].shape[-2] == 9
    assert layer.nbytes == 2 * 2 * 9 * size * 4


@pytest.mark.parametrize(
    ("config", "implementation"),
    [(SINK, "eager"), (dc.SinkKVConfig(0, 5), "sdpa"), (dc.SinkKVConfig(4, 1), "sdpa")],
    ids=["2+8", "0+5", "4+1"],
)
def test_tokens_see_the_first_and_the_newest(config: dc.SinkKVConfig, implementation: str) -> None:
    model, tokens = build(), ids(24)
    model.set_attn_implementation(implementation)
    naive = DynamicCache(config=model.config)
    naive.layers = [NaiveSink(config) for _ in naive.layers]
    expected = logits_one_by_one(model, tokens, naive)
    found = logits_one_by_one(model, tokens, dc.SinkKVCache(model.config, config))
    assert torch.allclose(found, expected, atol=2e-4)
    dense = logits_one_by_one(model, tokens, DynamicCache(config=model.config))
    reach = config.num_sink_tokens + config.window_length
    assert torch.equal(found[:, :reach], dense[:, :reach])
    assert not torch.allclose(found[:, reach + 1 :], dense[:, reach + 1 :], atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "qwen3", "glm", "cohere"])
def test_padded_batches_are_their_sequences_alone(name: str) -> None:
    """Rows whose padding ends before, in and behind the first tokens that stay, prompts longer than the window."""
    model = _causal(name)
    rows = [ids(n, seed=n) for n in (3, 15, 17, 26)]
    batch = generate(model, **padded(rows), past_key_values=dc.SinkKVCache(model.config, SINK))
    for i, row in enumerate(rows):
        alone = generate(model, input_ids=row, past_key_values=dc.SinkKVCache(model.config, SINK))
        assert torch.equal(batch[i, -NEW_TOKENS:], alone[0, -NEW_TOKENS:]), row.shape
        assert not torch.equal(alone, generate(model, input_ids=row))


def _causal(name: str) -> Any:
    """A small model of another class with random weights, whose layers are all of full attention."""
    if name in tiny.MODELS:
        return build(name, **({"sliding_window": None} if name == "mistral" else {}))
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    config = AutoConfig.for_model(
        name, **sizes, **heads, initializer_range=0.2, **({"head_dim": 16} if name == "glm" else {})
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def test_several_turns_and_long_texts_stay_in_bounds() -> None:
    model, config = build(), dc.SinkKVConfig(4, 28)
    cache = dc.SinkKVCache(model.config, config)
    first = generate(model, input_ids=ids(20), past_key_values=cache)
    more = torch.cat([first, ids(9, seed=5)], dim=1)
    second = generate(model, input_ids=more, past_key_values=cache, max_new_tokens=60)
    assert second.shape[1] == 20 + NEW_TOKENS + 9 + 60
    layer = cache.kept_layers[0]
    assert layer.get_seq_length() == second.shape[1] - 1
    assert layer.window[0].shape[-2] == 31
    assert cache.nbytes == sum(2 * part.window[0].nbytes for part in cache.kept_layers)
    # The same text read anew, the turns as they came: a prompt sees itself, then one token after the other.
    again = dc.SinkKVCache(model.config, config)
    with torch.no_grad():
        model(first[:, :20], past_key_values=again)
        for i in range(20, first.shape[1] - 1):
            model(first[:, i : i + 1], past_key_values=again)
        logits = model(second[:, first.shape[1] - 1 : more.shape[1]], past_key_values=again).logits
    assert int(logits[0, -1].argmax()) == int(second[0, more.shape[1]])


def test_beams_and_assistants() -> None:
    model = build()
    row = ids(12)
    wide = generate(
        model, input_ids=row, num_beams=3, past_key_values=dc.SinkKVCache(model.config, dc.SinkKVConfig(2, 500))
    )
    assert torch.equal(wide, generate(model, input_ids=row, num_beams=3))
    model.compress(SINK, measure=False)
    one = generate(model, input_ids=row)
    assert torch.equal(generate(model, input_ids=row, prompt_lookup_num_tokens=3)[:, :14], one[:, :14])
    beams = generate(model, input_ids=row, num_beams=3, num_return_sequences=2)
    assert beams.shape[0] == 2


def test_rolling_back() -> None:
    layer = SinkKVLayer(SINK, Rotary("here", tiny.build("llama").config))
    states = torch.randn(1, 2, 40, Rotary("here", tiny.build("llama").config).dim)

    def feed(begin: int, end: int) -> Any:
        return layer.update(states[:, :, begin:end], states[:, :, begin:end])

    feed(0, 20)
    with pytest.raises(dc.ModelStateError, match="0 newest tokens are kept in full precision, cannot take back 1"):
        layer.crop(-1)
    layer.activate_past_recording()
    feed(20, 26)
    layer.crop(-4)
    assert layer.get_seq_length() == 22
    assert torch.equal(layer.values[0, 0], states[0, 0, [0, 1, *range(15, 22)]])
    layer.crop(-22)
    assert layer.get_seq_length() == layer.num_forgotten == 0


# --- ShadowKV --------------------------------------------------------------------------------------------------------


def test_keys_of_low_rank_grow_as_if_made_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(2, 1, 50, 5, generator=generator) @ torch.randn(2, 1, 5, 24, generator=generator)
    keys = exact.unflatten(-1, (3, 8)).squeeze(1).transpose(1, 2)  # [2, 3, 50, 8] of rank 5
    low = LowRankKeys.of(keys[:, :, :20], 5).append(keys[:, :, 20:31], 5).append(keys[:, :, 31:], 5)
    assert torch.allclose(low.all(), keys, atol=1e-4)
    places = torch.tensor([[[3, 40], [0, 1], [49, 49]]]).expand(2, -1, -1)
    assert torch.allclose(low.rows(places), keys.gather(2, places.unsqueeze(-1).expand(-1, -1, -1, 8)), atol=1e-4)
    assert low.nbytes == (2 * 50 * 5 + 2 * 5 * 24) * 4
    noisy = keys + 0.3 * torch.randn(keys.shape, generator=generator)
    found = LowRankKeys.of(noisy, 5).all()
    matrix = noisy.transpose(1, 2).flatten(2)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    best = (u[..., :5] * s[:, None, :5]) @ v[:, :5]
    assert torch.allclose(found.transpose(1, 2).flatten(2), best, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "phi3", "glm", "cohere"])
def test_everything_chosen_at_full_rank_is_the_dense_cache(name: str) -> None:
    model, tokens = _causal(name), ids(60)
    cache = dc.ShadowKVCache(model.config, ALL)
    found = logits_one_by_one(model, tokens, cache, prompt=21)
    expected = logits_one_by_one(model, tokens, DynamicCache(config=model.config), prompt=21)
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    layer = cache.kept_layers[0]
    assert layer.num_stored >= 40
    assert layer.get_seq_length() == 60
    rows = [ids(n, seed=n) for n in (5, 14, 33)]
    batch = generate(model, **padded(rows), past_key_values=dc.ShadowKVCache(model.config, ALL))
    assert torch.equal(batch, generate(model, **padded(rows)))


def naive_attention(
    layer: ShadowKVLayer, query: torch.Tensor, scaling: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """Of one token, head by head: chunks by the share of their landmark, each token's key from the factors."""
    config, size = layer.config, layer.config.chunk_size
    heads = layer.means.shape[1]
    group = query.shape[1] // heads
    keys, values, stored = layer.keys, layer.values, layer.num_stored
    found = torch.empty(query.shape[0], 1, query.shape[1], values.shape[-1])
    for b in range(query.shape[0]):
        for head in range(heads):
            kept = layer.outlier_chunks[b, head].tolist()
            shares = torch.stack(
                [(query[b, head * group + g, 0] @ layer.means[b, head].T * scaling).softmax(-1) for g in range(group)]
            ).amax(0)
            order = [c for c in shares.argsort(descending=True).tolist() if c not in kept]
            order = sorted(order, key=lambda c: (c + 1) * size - 1 < int(layer.start[b]))  # of padding alone: last
            chosen = order[: config.sparse_budget // size] + kept
            tokens = [c * size + i for c in chosen for i in range(size)] + list(range(stored, keys.shape[2]))
            for g in range(group):
                logits = keys[b, head, tokens] @ query[b, head * group + g, 0] * scaling
                if mask is not None:
                    logits = logits.masked_fill(~mask[b, 0, 0, tokens], -math.inf)
                found[b, 0, head * group + g] = logits.softmax(-1) @ values[b, head, tokens]
    return found


@pytest.mark.parametrize("start", [0, 6, 13])
def test_a_token_sees_the_chunks_that_it_asks_for(start: int) -> None:
    config = tiny.build("llama").config
    layer = ShadowKVLayer(SHADOW, Rotary("here", config))
    size = Rotary("here", config).dim
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 2, 2, 50, size, generator=generator)
    at = torch.arange(50).expand(2, -1).clone()
    at[0] = (at[0] - start).clamp_min(0)
    layer.update(keys[:, :, :37], values[:, :, :37], kwargs={"position_ids": at[:, :37]})
    assert layer.num_stored == 32
    assert layer.stored_values.device.type == "cpu"
    assert torch.equal(layer.values, values[:, :, :37])
    mask = torch.arange(50) >= torch.tensor([[start], [0]])
    mask = None if not start else mask[:, None, None]
    for i in range(37, 50):
        layer.update(keys[:, :, i : i + 1], values[:, :, i : i + 1], kwargs={"position_ids": at[:, i : i + 1]})
        query = 3 * torch.randn(2, 4, 1, size, generator=generator)
        part = None if mask is None else mask[..., : i + 1]
        assert torch.allclose(layer.attend(query, part, 0.4), naive_attention(layer, query, 0.4, part), atol=1e-4), i
    assert layer.num_stored == 40
    outside = layer.outlier_chunks
    first = outside[1, 0, 0] * 4 + torch.arange(4)
    assert torch.equal(layer.keys[1, 0, first], keys[1, 0, first])  # an outlier chunk stays as it is
    assert not torch.equal(layer.keys[1, 0, :32], keys[1, 0, :32])


def test_bytes_on_the_device_and_beside_it() -> None:
    config = dc.ShadowKVConfig(rank=32, sparse_budget=64, num_outlier_chunks=8)
    model = tiny.build("llama", head_dim=64, hidden_size=128, num_attention_heads=4, num_key_value_heads=4)
    layer = ShadowKVLayer(config, Rotary("here", model.config))
    states = torch.randn(1, 4, 2048 + 32, 64).bfloat16()
    layer.update(states, states)
    assert layer.cpu_nbytes == 4 * 2048 * 64 * 2
    elements = 2048 * 32 + 32 * 256 + 2048 // 8 * 256 + 2 * (64 + 32) * 256  # factors, landmarks, outliers and window
    assert layer.nbytes == 2 * elements + 2080 * 8 + 8 + 4 * 8 * (4 + 8)  # positions, start, outliers' places
    assert layer.nbytes < 0.2 * 2 * states.nbytes


def test_beams_turns_and_assistants_of_shadow() -> None:
    model, row = build(), ids(22)
    for how in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}):
        found = generate(model, input_ids=row, past_key_values=dc.ShadowKVCache(model.config, ALL), **how)
        assert torch.equal(found, generate(model, input_ids=row, **how))
    cache, dense = dc.ShadowKVCache(model.config, ALL), DynamicCache(config=model.config)
    for kept in (cache, dense):
        first = generate(model, input_ids=row, past_key_values=kept)
        turn = generate(model, input_ids=torch.cat([first, ids(7, 9)], dim=1), past_key_values=kept)
        if kept is cache:
            expected = turn
    assert torch.equal(turn, expected)
    assert cache.get_seq_length() == dense.get_seq_length()


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SINK, SHADOW], ids=["sink", "shadow"])
def test_compress_save_reload_and_decompress(config: Any, tmp_path: Path) -> None:
    model, name = build(), {"sink": "SinkKVCache", "shadow": "ShadowKVCache"}[config.cache]
    call = padded([ids(23), ids(9, 4)])
    dense = generate(model, **call)
    expected = generate(model, **call, past_key_values=getattr(dc, name)(model.config, config))
    assert not torch.equal(dense, expected)
    assert str(model.compression_plan(config)).splitlines()[-1].startswith(f"{config.summary}: 2 of 2 layers")
    model.compress("w8a16", config, measure=False)
    ours = generate(model, **call)
    assert not torch.equal(ours, generate(model, **call, past_key_values=DynamicCache(config=model.config)))
    assert torch.equal(generate(copy.deepcopy(model), **call), ours)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(generate(again, **call), ours)
    assert config in again.compression_recipe().components["denoisers"]
    assert config.summary in str(again.compression_report())
    for form in ("torchao", "compressed-tensors"):
        with pytest.raises(dc.ConfigError, match="found KV cache"):
            model.save_pretrained(tmp_path / form, format=form)
    plain = build().compress(config, measure=False)
    assert torch.equal(generate(plain, **call), expected)
    with pytest.raises(dc.CompressionConflictError, match="kind 'kv_cache' already"):
        plain.compress(dc.KIVIConfig())
    assert torch.equal(generate(plain.decompress(), **call), dense)


def test_configurations_read_back_and_refuse() -> None:
    for config in (SINK, SHADOW, dc.KIVIConfig(bits=4)):
        assert kv_config_from_dict(config.to_dict()) == config
    for wrong, message in [
        ({"cache": "sinc"}, "no 'sinc'; did you mean 'sink'"),
        ({"cache": "sink", "window": 3}, "unknown key 'window'"),
        ({"cache": "sink", "window_length": 0}, "window_length must be a whole number, 1 or more, got 0"),
        ({"cache": "shadow", "sparse_budget": 12}, "sparse_budget must be whole chunks of 8, got 12"),
        ({"cache": "shadow", "rank": 1.5}, "rank must be a whole number"),
    ]:
        with pytest.raises(dc.ConfigError, match=message):
            kv_config_from_dict(wrong)


def test_what_cannot_work_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    hybrid = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    for model, config, message in [
        (build("mistral", sliding_window=16), SINK, "needs layers of full attention"),
        (build("llama", **dynamic), SINK, "'dynamic' change their frequencies"),
        (build("gemma3", **hybrid), SHADOW, "cannot be called by position"),
        (build("llama", no_rope_layers=[1, 0]), SINK, "or layers without"),
        (_causal("gpt2"), SINK, "needs a model with rotary embeddings"),
        (build("qwen3", **hybrid, use_sliding_window=True), SINK, "full attention in every layer"),
        (tiny_vlm.build("mllama")[0], SINK, "has 0 classes of them"),
        (tiny.build("pixart"), SHADOW, "needs a model of transformers that generates"),
    ]:
        with pytest.raises(dc.ConfigError, match=message):
            model.compress(config)
    eager = build()
    eager.set_attn_implementation("eager")
    with pytest.raises(dc.ConfigError, match="needs attention of transformers' 'sdpa'"):
        eager.compress(SHADOW)
    shadow, states = ShadowKVLayer(SHADOW, Rotary("here", eager.config)), torch.zeros(1, 1, 30, 32)
    shadow.update(states, states)
    shadow.update(states[:, :, :1], states[:, :, :1])
    with pytest.raises(dc.ModelStateError, match="did not read what its cache had chosen"):
        shadow.update(states[:, :, :1], states[:, :, :1])
    layer = SinkKVLayer(SINK, Rotary("here", build().config))
    with pytest.raises(dc.ModelStateError, match="does not tell its cache the positions"):
        layer.update(torch.zeros(2, 1, 3, 16), torch.zeros(2, 1, 3, 16))
    with pytest.raises(dc.ModelStateError, match="pictures and videos have several"):
        layer.update(torch.zeros(2, 1, 3, 16), torch.zeros(2, 1, 3, 16), kwargs={"position_ids": torch.zeros(3, 2, 3)})
    static = build().compress(SINK, measure=False)
    assert torch.equal(
        generate(static, input_ids=ids(20), cache_implementation="static"), generate(build(), input_ids=ids(20))
    )
    with pytest.raises(dc.ConfigError, match="needs a SinkKVConfig, got KIVIConfig"):
        dc.SinkKVCache(static.config, dc.KIVIConfig())
    monkeypatch.setenv("DIFFUSE_COMPRESS_NO_PATCH", "1")
    with pytest.raises(dc.ConfigError, match=r"SinkKVCache\(model.config, SinkKVConfig\(\)\)"):
        build().compress(SINK)
