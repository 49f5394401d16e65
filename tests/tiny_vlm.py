"""Tiny vision-language models: built from configurations, no hub; two with processors around a byte tokenizer.

The weights are random, so answers mean nothing; but which answer comes depends on the pictures, the question and the
turns before it. `build(name)` makes any of `MODELS` with the arguments of a call on one picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VOCABULARY = 272
PATCH = 14


def _template(image: str) -> str:
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _tokenizer(*special: str) -> Qwen2Tokenizer:
    """One token a byte, and the special ones."""
    made = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[])
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def llava_processor() -> LlavaProcessor:
    """Every picture becomes 28 x 28, four patches of 14."""
    side = {"height": 2 * PATCH, "width": 2 * PATCH}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side),
        _tokenizer("<|im_start|>", "<|im_end|>", "<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>\n"),
    )


def qwen_processor() -> Qwen2_5_VLProcessor:
    """Pictures keep their shape. Made without its __init__, which wants a video processor, and that torchvision."""
    processor = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)
    tokenizer = _tokenizer(*QWEN_TOKENS)
    processor.image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 6, patch_size=PATCH)
    processor.tokenizer, processor.video_processor = tokenizer, None
    processor.chat_template = _template("<|vision_start|><|image_pad|><|vision_end|>")
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id, processor.video_token_id = tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS[-2:]))
    return processor


_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Logits far apart: bit-level noise of a batch must not change what is greedily chosen.
    "initializer_range": 0.2,
}


def _text_config(tokenizer: Any) -> dict[str, Any]:
    return {
        **_TEXT,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_llava(seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA with a Llama of two layers, and its processor."""
    processor = llava_processor()
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        text_config={"model_type": "llama", **_text_config(tokenizer)},
        vision_config={
            "model_type": "clip_vision_model",
            **_VISION,
            "projection_dim": 32,
            "initializer_range": 0.5,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return _seeded(LlavaForConditionalGeneration, config, seed), processor


def build_qwen(seed: int = 0) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """A Qwen2.5-VL of two layers with multimodal rotary positions, and its processor."""
    processor = qwen_processor()
    tokenizer = processor.tokenizer
    config = Qwen2_5_VLConfig(
        text_config={
            **_text_config(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": PATCH,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return _seeded(Qwen2_5_VLForConditionalGeneration, config, seed), processor


def _seeded(model_class: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


BUILDERS = {"llava": build_llava, "qwen2_5_vl": build_qwen}


# --- classes without a processor here: the arguments of a call are made by hand ----------------------------------

_IMAGE_TOKEN, _VIDEO_TOKEN, _VISION_START, _VISION_END = 260, 261, 262, 263
_MROPE = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 2 * PATCH,
    "patch_size": PATCH,
}
_SIGLIP = {"model_type": "siglip_vision_model", **_VISION}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH}
_QWEN_TOKENS = {
    "image_token_id": _IMAGE_TOKEN,
    "video_token_id": _VIDEO_TOKEN,
    "vision_start_token_id": _VISION_START,
    "vision_end_token_id": _VISION_END,
}


def _call(image_tokens: int, *picture: int, length: int = 20, before: int | None = None) -> dict[str, Any]:
    """A text of `length` tokens with `image_tokens` in it, and random `pixel_values` of the shape `picture`."""
    generator = torch.Generator().manual_seed(5)
    input_ids = torch.randint(5, 250, (1, length), generator=generator)
    input_ids[:, 2 : 2 + image_tokens] = _IMAGE_TOKEN
    if before is not None:
        input_ids[:, 1] = before
    return {"input_ids": input_ids, "pixel_values": torch.randn(*picture, generator=generator)}


def _qwen_call() -> dict[str, Any]:
    call = _call(1, 4, 3 * 2 * PATCH * PATCH, before=_VISION_START)
    marks = (call["input_ids"] == _IMAGE_TOKEN).int()
    return {**call, "image_grid_thw": torch.tensor([[1, 2, 2]]), "mm_token_type_ids": marks}


def _qwen2_vl(seed: int) -> tuple[Any, dict[str, Any]]:
    vision = {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=_MROPE, vision_config=vision, **_QWEN_TOKENS)
    return _seeded(Qwen2VLForConditionalGeneration, config, seed), _qwen_call()


def _qwen3_vl(seed: int) -> tuple[Any, dict[str, Any]]:
    """Features of the vision tower are added between the first decoder layers, too."""
    vision = {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    config = Qwen3VLConfig(text_config={**_MROPE, "head_dim": 16}, vision_config=vision, **_QWEN_TOKENS)
    return _seeded(Qwen3VLForConditionalGeneration, config, seed), _qwen_call()


def _llava_onevision(seed: int) -> tuple[Any, dict[str, Any]]:
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_TEXT},
        vision_config=_SIGLIP,
        image_token_id=_IMAGE_TOKEN,
        video_token_id=_VIDEO_TOKEN,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[28, 28], [28, 56], [56, 28]],
    )
    call = {**_call(10, 1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])}
    return _seeded(LlavaOnevisionForConditionalGeneration, config, seed), call


def _internvl(seed: int) -> tuple[Any, dict[str, Any]]:
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_TEXT},
        vision_config={"model_type": "internvl_vision", **_VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=_IMAGE_TOKEN,
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
    )
    return _seeded(InternVLForConditionalGeneration, config, seed), _call(4, 1, 3, 28, 28)


def _gemma3(seed: int) -> tuple[Any, dict[str, Any]]:
    config = Gemma3Config(
        text_config={**_TEXT, "head_dim": 16},
        vision_config=_SIGLIP,
        image_token_index=_IMAGE_TOKEN,
        boi_token_index=_VISION_START,
        eoi_token_index=_VISION_END,
        mm_tokens_per_image=4,
    )
    call = _call(4, 1, 3, 28, 28)
    return _seeded(Gemma3ForConditionalGeneration, config, seed), {
        **call,
        "token_type_ids": (call["input_ids"] == _IMAGE_TOKEN).int(),
    }


def _mllama(seed: int) -> tuple[Any, dict[str, Any]]:
    """Pictures come in by cross-attention."""
    text = {"model_type": "mllama_text_model", **_TEXT, "cross_attention_layers": [1]}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 28,
        "patch_size": PATCH,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 96,
    }
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=_IMAGE_TOKEN)
    call = _call(1, 1, 1, 2, 3, 28, 28)
    return _seeded(MllamaForConditionalGeneration, config, seed), {
        **call,
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, call["input_ids"].shape[1], 1, 2, dtype=torch.long),
    }


def picture(color: int = 200) -> Image.Image:
    """Half of it in a colour."""
    made = Image.new("RGB", (56, 56), (20, 30, 40))
    made.paste((color, 40, 255 - color), (0, 0, 28, 56))
    return made


def chat(image: Image.Image | None, question: str) -> list[dict[str, Any]]:
    """A question, about a picture if there is one, as messages."""
    pictured = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*pictured, {"type": "text", "text": question}]}]


def encoded(processor: Any, messages: Any) -> dict[str, Any]:
    """What a processor makes of a chat."""
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")


def _with_processor(name: str) -> Callable[[int], tuple[Any, dict[str, Any]]]:
    def make(seed: int) -> tuple[Any, dict[str, Any]]:
        model, processor = BUILDERS[name](seed)
        return model, dict(encoded(processor, chat(picture(), "what is it?")))

    return make


MODELS: dict[str, Callable[[int], tuple[Any, dict[str, Any]]]] = {
    "llava": _with_processor("llava"),
    "qwen2_5_vl": _with_processor("qwen2_5_vl"),
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "mllama": _mllama,
}


def build(name: str, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """The tiny model `name` of `MODELS`, and arguments of a call on one picture."""
    return MODELS[name](seed)
