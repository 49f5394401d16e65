"""Every kind of item and container, for pipelines and for models, and what is said of those that do not fit."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import DataCollatorWithPadding

import diffuse_compress as dc
import tiny
import tiny_vlm
from diffuse_compress.calibration.recording import Calibration

record = Calibration.record


@functools.cache
def llama() -> Any:
    return tiny.build("llama", num_hidden_layers=1, vocab_size=tiny_vlm.VOCABULARY)


@functools.cache
def tokenizer() -> Any:
    made = tiny_vlm.llava_processor()
    made.tokenizer.chat_template = made.chat_template
    return made.tokenizer


def rows(columns: dict[str, Any]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def lengths(found: Calibration) -> list[tuple[int, ...]]:
    return [tuple(sample.call.kwargs["input_ids"].shape) for sample in found.of("")]


# --- models ---------------------------------------------------------------------------------------------------------

ROWS = {"text": ["red cat", "sun"], "id": [7, 8]}
TOKENIZED = {"input_ids": [[5, 6, 7], [5, 6]], "attention_mask": [[1, 1, 1], [1, 1]], **ROWS}
CHAT = [{"role": "user", "content": [{"type": "text", "text": "red cat"}]}]


class MapStyle(Dataset):
    """What torch calls a dataset: neither iterable nor a sequence."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.arange(3 + index)}


def padded(batch: list[dict[str, Any]]) -> Any:
    prepared = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in batch]
    tokenizer().pad_token = "<|endoftext|>"
    return DataCollatorWithPadding(tokenizer())(prepared)


CONTAINERS: dict[str, tuple[Callable[[], Any], list[tuple[int, ...]]]] = {
    "texts": (lambda: ["red cat", "sun"], [(1, 7), (1, 3)]),
    "batches of texts": (lambda: DataLoader(["red cat", "sun", "a"], batch_size=2), [(1, 7), (1, 3), (1, 1)]),
    "rows of texts": (lambda: rows(ROWS), [(1, 7), (1, 3)]),
    "batches of rows": (lambda: DataLoader(rows(ROWS), batch_size=2), [(1, 7), (1, 3)]),
    "generator": (lambda: (text for text in ("red cat", "sun")), [(1, 7), (1, 3)]),
    "ids": (
        lambda: [[1, 2], torch.tensor([3]), np.array([4, 5]), torch.ones(2, 3, dtype=torch.long)],
        [(1, 2), (1, 1), (1, 2), (2, 3)],
    ),
    "uneven ids": (lambda: [[[1, 2], [3]]], [(1, 2), (1, 1)]),
    "prepared rows": (lambda: rows(TOKENIZED), [(1, 3), (1, 2)]),
    "prepared tensors": (lambda: rows(TOKENIZED).with_format("torch"), [(1, 3), (1, 2)]),
    "padded batches": (
        lambda: DataLoader(rows(TOKENIZED), batch_size=2, collate_fn=padded),
        [(2, 3)],
    ),
    "map-style dataset": (MapStyle, [(1, 3), (1, 4)]),
    "chats": (lambda: [CHAT, [CHAT, CHAT]], [(1, 15)] * 3),
    "rows of chats": (lambda: rows({"messages": [CHAT]}), [(1, 15)]),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_language_items(kind: str) -> None:
    make, expected = CONTAINERS[kind]
    found = record(llama(), make(), tokenizer=tokenizer())
    assert lengths(found) == expected
    for sample in found.of(""):
        assert not {"id", "text"} & set(sample.call.kwargs)
        assert sample.call.kwargs["use_cache"] is False
        sample.call.run(llama())


@pytest.mark.parametrize("name", tiny_vlm.BUILDERS)
def test_chats_with_and_without_pictures(name: str, tmp_path: Path) -> None:
    """Through a processor, as what it returns, and as rows of prepared columns: the same calls."""
    model, processor = tiny_vlm.BUILDERS[name]()
    chats = [tiny_vlm.chat(tiny_vlm.picture(), "what is it?"), tiny_vlm.chat(None, "what is it?")]
    found = record(model, chats, tokenizer=processor, max_length=15)
    pictured, plain = (sample.call.kwargs for sample in found.of(""))
    assert "pixel_values" in pictured
    assert "pixel_values" not in plain
    # Cut off, a picture would no longer have all its tokens.
    assert pictured["input_ids"].shape[1] > 15 == plain["input_ids"].shape[1]
    returned = tiny_vlm.encoded(processor, chats[0])
    row = {key: value[0] if value.shape[0] == 1 and value.ndim == 2 else value for key, value in returned.items()}
    if name == "qwen2_5_vl":
        row["image_grid_thw"] = returned["image_grid_thw"]
    for same in (returned, row):
        call = record(model, [same]).of("")[0].call
        assert set(call.kwargs) == set(pictured)
        assert all(torch.equal(call.kwargs[key], pictured[key]) for key in returned)
    if name == "llava":  # the other one's processor wants torchvision
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        own = record(type(model).from_pretrained(tmp_path), ["a text", *chats])
        assert torch.equal(own.of("")[1].call.kwargs["pixel_values"], pictured["pixel_values"])


def test_lists_beside_tensors_are_arguments_as_they_are(tmp_path: Path) -> None:
    model = tiny.build("qwenimage")
    item = tiny.inputs_for(model)
    recorded = dc.Calibration.record(model, [item])
    recorded.save(tmp_path / "samples.safetensors")
    for found in (recorded, dc.Calibration.load(tmp_path / "samples.safetensors")):
        (sample,) = found.of("")
        assert sample.call.kwargs["img_shapes"] == item["img_shapes"] == [[(1, 4, 4)]] * 2
        with torch.no_grad():
            assert torch.equal(sample.call.run(model).sample, model(**item).sample)


def test_tensors_by_position_for_any_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    x = torch.randn(4, 64)
    for items in ([x[:2], x[2:].numpy()], DataLoader(TensorDataset(x), batch_size=2)):
        found = [sample.call.args[0] for sample in record(model, items).of("")]
        assert torch.equal(torch.cat(found), x)


def test_tuples_that_a_forward_takes_stay_what_they_are() -> None:
    model = tiny.build("qwenimage")
    given = tiny.inputs_for(model)
    calibration = dc.Calibration.record(model, [given])
    (sample,) = calibration.of("")
    assert sample.call.kwargs["img_shapes"] == given["img_shapes"]
    with torch.no_grad():
        assert torch.equal(sample.call.run(model)[0], model(**given)[0])


def test_labels_make_the_decoder_inputs_of_an_encoder_decoder() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(2, 99, (1, 6))
    found = record(model, [{"input_ids": ids, "labels": ids}]).of("")[0]
    found.call.run(model)
    assert "labels" in found.call.kwargs
    assert "labels" not in record(llama(), [{"input_ids": ids, "labels": ids}]).of("")[0].call.kwargs


IDS = torch.tensor([[2, 3, 4]])
WRONG: dict[str, tuple[Callable[[], Any], list[Any], str]] = {
    "no items": (llama, 5, "a list of items or a Calibration is needed, got a int"),
    "path": (llama, Path("x"), r"A file is read with Calibration\.load"),
    "picture for a language model": (llama, [tiny_vlm.picture()], "is a text, chat messages, .* got a Image as item 0"),
    "pixels for a language model": (
        llama,
        [IDS, {"input_ids": IDS, "pixel_values": torch.ones(1, 3, 4, 4)}],
        "takes no pixel_values, which item 1 holds",
    ),
    "chat with picture for a language model": (llama, [tiny_vlm.chat(tiny_vlm.picture(), "?")], "takes texts only"),
    "text for a denoiser": (lambda: tiny.build("dit"), ["a cat"], r"takes no texts, .* \(hidden_states, timestep,"),
    "text for a VAE": (tiny.vae, ["a cat"], "AutoencoderKL takes no texts"),
    "ids for a denoiser": (lambda: tiny.build("dit"), [[1, 2]], "is a dict of forward arguments, got a list as item 0"),
    "unknown argument": (
        lambda: tiny.build("dit"),
        [{**tiny.inputs_for(tiny.build("dit")), "prompt": IDS}],
        "does not fit the forward .* 'prompt'",
    ),
    "no tokens": (llama, [IDS, IDS[:, :0]], "item 1 is empty, it holds no tokens"),
    "no rows": (lambda: torch.nn.Linear(4, 4), [torch.ones(0, 4)], "item 0 is empty, it holds tensors without values"),
    "a file": (llama, "x.safetensors", r"Put it in a list; a file is read with Calibration\.load"),
    "generator that was read": (llama, iter(()), "needs at least one item, got none. Of a generator nothing is left"),
    "pixels missing": (
        lambda: tiny_vlm.build("llava")[0],
        [{"input_ids": tiny_vlm.build("llava")[1]["input_ids"]}],
        "item 0 has 4 image tokens and no pixel_values",
    ),
    "tokenizer for pictures": (
        lambda: tiny_vlm.build("llava")[0],
        [tiny_vlm.chat(tiny_vlm.picture(), "?")],
        "hold pictures, which needs the processor of LlavaForConditionalGeneration, got Qwen2Tokenizer",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_items_that_do_not_fit_a_model(case: str) -> None:
    make, items, message = WRONG[case]
    with pytest.raises(dc.ConfigError, match=message):
        record(make(), items, tokenizer=tokenizer())


# --- pipelines ------------------------------------------------------------------------------------------------------


@functools.cache
def pixart() -> Any:
    return tiny.build_pipeline("pixart")


@functools.cache
def dit() -> Any:
    pipe = diffusers.DiTPipeline(
        transformer=tiny.build("dit", num_embeds_ada_norm=1000), vae=tiny.vae(), scheduler=diffusers.DDIMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cheap(pipe: Any, **given: Any) -> dict[str, Any]:
    found = {**tiny.call_kwargs(pipe, steps=4), **given}
    return {key: value for key, value in found.items() if key not in ("generator", "prompt", "output_type")}


PROMPTS: dict[str, Callable[[], Any]] = {
    "without end": lambda: itertools.repeat("a cat"),
    "batches": lambda: DataLoader(["a cat", "a dog"], batch_size=2),
    "rows": lambda: rows({"prompt": ["a cat", "a dog"]}),
    "rows of texts": lambda: rows({"text": ["a cat", "a dog"]}),
    "batches of rows": lambda: DataLoader(rows({"prompt": ["a cat", "a dog"]}), batch_size=2),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts(kind: str) -> None:
    found = record(pixart(), PROMPTS[kind](), num_samples=2, **cheap(pixart())).of("transformer")
    # Both halves of the guidance are in one call.
    assert {sample.call.kwargs["encoder_hidden_states"].shape[0] for sample in found} == {
        4 if kind.startswith("batches") else 2
    }


@pytest.mark.parametrize("kind", ["labels", "batches", "rows"])
def test_class_labels(kind: str) -> None:
    items = {
        "labels": lambda: [3, np.int64(4)],
        "batches": lambda: DataLoader(torch.tensor([3, 4])),
        "rows": lambda: rows({"class_labels": [3, 4]}),
    }[kind]()
    found = record(dit(), items, num_samples=2, num_inference_steps=3)
    labels = [sample.call.kwargs["class_labels"].tolist() for sample in found.of("transformer")]
    assert labels == [[3, 1000], [4, 1000]]
    with pytest.raises(dc.ConfigError, match="DiTPipeline takes no prompt, got 'a cat'"):
        dit().compress(dc.QuantizationConfig("w8a8", algorithm=dc.GPTQConfig()), calibration=["a cat"])


def test_arguments_of_the_call() -> None:
    """Embeddings instead of a prompt, starting noise, guidance of its own, and a generator that goes on."""
    pipe = pixart()
    embeds, mask, negative, negative_mask = pipe.encode_prompt("a cat", max_sequence_length=tiny.TEXT_LENGTH)
    latents = torch.randn(1, 4, 8, 8)
    given = {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
        "latents": latents,
        "guidance_scale": 2.0,
        "generator": torch.Generator().manual_seed(3),
    }
    found = record(pipe, [cheap(pipe, **given)], num_samples=4)
    first = next(sample for sample in found.of("transformer") if sample.step == 0)
    assert torch.equal(first.call.args[0], torch.cat([latents] * 2))
    assert torch.equal(first.call.kwargs["encoder_hidden_states"], torch.cat([negative, embeds]))
    assert found.settings["guidance_scale"] == 2.0


@functools.cache
def conditioned(kind: str) -> Any:
    parts = tiny.build_pipeline("stable_diffusion").components
    if kind == "controlnet":
        net = diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(16, 32, 96))
        pipe = diffusers.StableDiffusionControlNetPipeline(
            **parts, controlnet=net.eval(), requires_safety_checker=False
        )
    else:
        named = {"img2img": "StableDiffusionImg2ImgPipeline", "inpaint": "StableDiffusionInpaintPipeline"}
        pipe = getattr(diffusers, named[kind])(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["img2img", "inpaint", "controlnet"])
def test_pictures_of_conditioned_pipelines(kind: str) -> None:
    pipe, size = conditioned(kind), {"height": 32, "width": 32}
    picture, mask = Image.new("RGB", (32, 32), (200, 30, 30)), Image.new("L", (32, 32), 255)
    more = {"img2img": {"strength": 0.5}, "inpaint": {"mask_image": mask, **size}, "controlnet": size}[kind]
    items = [{"prompt": text, "image": picture, "num_inference_steps": 8, **more} for text in ("a cat", "a dog")]
    parts = ["unet", "controlnet"] if kind == "controlnet" else None
    found = record(pipe, items, num_samples=6, components=parts)
    places = {(sample.item, sample.step) for sample in found.of("unet")}
    assert len(places) == 6
    assert {step for _, step in places} <= set(range(4 if kind == "img2img" else 8))
    if parts is not None:  # which the loop calls in every step as well
        assert {(sample.item, sample.step) for sample in found.of("controlnet")} == places
        times = {sample.timestep for sample in found.of("controlnet")}
        assert times == {sample.timestep for sample in found.of("unet")}
    else:
        with pytest.raises(dc.ConfigError, match=r"item 0 cannot be run: .* called with prompt: "):
            record(pipe, ["a cat"])


def test_two_experts_share_the_steps() -> None:
    one = tiny.build_pipeline("wan")
    second = tiny.build("wan", seed=7, in_channels=16, out_channels=16)
    pipe = diffusers.WanPipeline(**{**one.components, "transformer_2": second, "boundary_ratio": 0.5})
    pipe.set_progress_bar_config(disable=True)
    given = cheap(pipe, num_inference_steps=8)
    found = record(pipe, ["a cat", "a dog"], num_samples=8, **given)
    times = {name: [sample.timestep for sample in found.of(name)] for name in ("transformer", "transformer_2")}
    assert min(times["transformer"]) > 500 >= max(times["transformer_2"])
    for name in times:  # both calls of the guidance
        branches = [sample.branch for sample in found.of(name)]
        assert branches == ["cond", "uncond"] * (len(branches) // 2)
    assert sum(map(len, times.values())) == 16
    with pytest.raises(dc.ConfigError, match=r"got none for transformer_2\. .*an expert of two"):
        record(pipe, ["a cat"], num_samples=1, **given)
    pipe.compress("w8a16", calibration=[{"prompt": "a cat", **given}], measure=False)
    assert math.isfinite(float(tiny.sample(pipe).sum()))
