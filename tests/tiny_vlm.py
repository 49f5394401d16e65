"""Tiny vision-language models with their processors: built from configurations and a byte tokenizer, no hub.

The weights are random, so answers mean nothing; but which answer comes depends on the pictures, the question and the
turns before it.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
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


def _text_config(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
        # Logits far apart: bit-level noise of a batch must not change what is greedily chosen.
        "initializer_range": 0.2,
    }


def build_llava(seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA with a Llama of two layers, and its processor."""
    processor = llava_processor()
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        text_config={"model_type": "llama", **_text_config(tokenizer)},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 2 * PATCH,
            "patch_size": PATCH,
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
