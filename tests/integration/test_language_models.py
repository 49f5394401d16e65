"""Language and vision-language models as users have them: calibrated, saved, reloaded, and generating in every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CompileConfig,
    FalconConfig,
    FalconForCausalLM,
)

import diffuse_compress as dc
import tiny
import tiny_vlm
from diffuse_compress.integrations.component import quantized_layers
from tolerance import assert_snr

W4 = dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT4, dc.PerGroup(32)))
W8A8 = dc.QuantizationConfig("w8a8", algorithm=[dc.SmoothQuantConfig(), dc.GPTQConfig()])
NEW_TOKENS = 6


def logits(model: Any, call: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**call).logits


def generate(model: Any, call: dict[str, Any], **how: Any) -> torch.Tensor:
    """The new tokens of a greedy continuation, whatever they are."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        tokens = model.generate(**call, max_new_tokens=NEW_TOKENS, do_sample=False, **how)
    return tokens[:, call["input_ids"].shape[1] :]


# --- the language part of a vision-language model -------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_vlm.MODELS)
def test_calibrated_language_part_of_a_vision_language_model(name: str, tmp_path: Path) -> None:
    model, call = tiny_vlm.build(name)
    text = {"input_ids": torch.randint(5, 250, (1, 9))}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "language_model.layers" not in key}
    model.compress(W8A8, calibration=[call, text], measure=False)
    assert len(quantized_layers(model)) == 14
    assert all("language_model.layers." in layer for layer in quantized_layers(model))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is type(model)
    for given in (call, text):
        assert torch.equal(logits(again, given), logits(model, given))
    assert "SmoothQuant" in str(again.compression_report())


def test_towers_and_projectors_are_kept_unless_they_are_named() -> None:
    model, _ = tiny_vlm.build("llava")
    plan = model.compression_plan(W4)
    kept = [row for row in plan.rows if row.role == "other modality"]
    assert len({row.layer for row in kept}) == 15  # a patch embedding, two blocks of six, and the projector's two
    reasons = {row.reason for row in kept if row.parameter.endswith("weight")}
    assert reasons == {"vision or audio part: the language model is converted"}
    assert {row.role for row in plan.rows if row.layer == "lm_head"} == {"output"}
    named = dc.QuantizationConfig(W4, overrides={"vision_tower.encoder": "w8a16", "linear_1": "w8a16"})
    rows = {row.layer: row for row in model.compression_plan(named).rows if row.scheme is not None}
    assert sum("vision_tower" in layer for layer in rows) == 12
    assert "model.multi_modal_projector.linear_1" in rows
    # On its own a tower is a model like any other.
    assert len(quantized_layers(model.model.vision_tower.compress(W4))) == 12


def test_quantized_while_it_loads(tmp_path: Path) -> None:
    model, call = tiny_vlm.build("qwen2_5_vl")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=dc.QuantizationConfig(W4))
    assert torch.equal(logits(loaded, call), logits(model.compress(W4, measure=False), call))
    with pytest.raises(dc.ConfigError, match=r"GPTQ .* needs calibration data, and .* compress\(\.\.\., calibration="):
        AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=W8A8)


# --- generate -----------------------------------------------------------------------------------------------------


def padded_prompts() -> dict[str, torch.Tensor]:
    """Three of different lengths, padded on the left."""
    input_ids = torch.randint(5, 120, (3, 10))
    mask = torch.ones_like(input_ids)
    for row, length in enumerate((10, 6, 3)):
        mask[row, :-length], input_ids[row, :-length] = 0, 1
    return {"input_ids": input_ids, "attention_mask": mask}


def one_by_one(model: Any, call: dict[str, Any]) -> torch.Tensor:
    """The same without padding."""
    rows = [row[mask == 1].unsqueeze(0) for row, mask in zip(call["input_ids"], call["attention_mask"], strict=True)]
    return torch.cat([generate(model, {"input_ids": row, "attention_mask": torch.ones_like(row)}) for row in rows])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_generate_after_calibration_in_every_way(name: str, tmp_path: Path) -> None:
    """Caches of both kinds and none, padding, beams; reloaded, and with weights elsewhere: the same tokens."""
    model, call = tiny.build(name, num_hidden_layers=1, initializer_range=0.2), padded_prompts()
    config = dc.QuantizationConfig("w4a16", algorithm=dc.GPTQConfig()) if name == "qwen2" else W8A8
    model.compress(config, calibration=[call], measure=False)
    expected, beams = generate(model, call), generate(model, call, num_beams=3)
    assert len(expected.unique()) > 3
    assert torch.equal(one_by_one(model, call), expected)
    assert torch.equal(generate(model, call, cache_implementation="static"), expected)
    assert torch.equal(generate(model, call, use_cache=False), expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(generate(again, call, num_beams=3), beams)
    accelerate.cpu_offload(again, torch.device("cpu"))
    assert torch.equal(generate(again, call), expected)
    # The embedding stays: transformers loses a tied one when half of it is on disk, a dense model's too.
    parts = {f"model.{part}": "cpu" for part, _ in model.model.named_children()}
    places = {**parts, "lm_head": "cpu", "model.layers": "disk"}
    on_disk = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert any(tensor.is_meta for tensor in on_disk.parameters())
    assert torch.equal(generate(on_disk, call), expected)


def test_linears_of_falcon_are_converted(tmp_path: Path) -> None:
    """Its linears are a class of their own, which writes out the same product; any other subclass is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = dict(vocab_size=128, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, bias=True)
        model = FalconForCausalLM(FalconConfig(**size, initializer_range=0.2)).eval()
    call = padded_prompts()
    dense = logits(model, call)
    model.compress(W8A8, calibration=[call], measure=False)
    assert len(quantized_layers(model)) == 8
    assert_snr(dense, logits(model, call), measured_db=34.5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, call), logits(model, call))
    assert torch.equal(generate(again, call), generate(model, call))


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_generate_compiled(name: str) -> None:
    """``generate`` compiles the decoding step itself with a static cache; on a CPU it has to be told to."""
    if name == "llava":
        (model, call), config = tiny_vlm.build(name), dc.QuantizationConfig(W4, algorithm=dc.GPTQConfig())
    else:
        model, call, config = tiny.build(name, num_hidden_layers=1, initializer_range=0.2), padded_prompts(), W8A8
    model.compress(config, calibration=[call], measure=False)
    expected = generate(model, call)
    torch._dynamo.reset()
    counters.clear()
    compiling = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiling._compile_all_devices = True
    assert torch.equal(generate(model, call, cache_implementation="static", compile_config=compiling), expected)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_generate_of_a_vision_language_model_in_a_batch(tmp_path: Path) -> None:
    """Calibrated on batches of what its processor returns, as a DataLoader gives them."""
    model, processor = tiny_vlm.build_qwen()
    processor.tokenizer.padding_side = "left"
    chats = [tiny_vlm.chat(tiny_vlm.picture(color), text) for color, text in ((10, "a?"), (200, "and what is it?"))]

    def collate(chats: list[Any]) -> Any:
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        pictures = [[chat[0]["content"][0]["image"]] for chat in chats]
        return processor(text=texts, images=pictures, padding=True, return_tensors="pt")

    batches = torch.utils.data.DataLoader(chats, batch_size=2, collate_fn=collate)
    model.compress(dc.QuantizationConfig(W4, algorithm=dc.GPTQConfig()), calibration=batches, measure=False)
    call = collate(chats)
    assert not call["attention_mask"].all()
    expected = generate(model, call)
    assert torch.equal(torch.cat([generate(model, collate([chat])) for chat in chats]), expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    accelerate.cpu_offload(again, torch.device("cpu"))
    assert torch.equal(generate(again, call), expected)
