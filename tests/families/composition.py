"""What the tests of composed blocks share: one model for each family and option, and an option that only watches."""

from __future__ import annotations

import torch

from diffuse_compress.runtime.blocks import BlockOption

# NCSN++: a small picture runs beside the features, and each stage adds it by a residual unit of its own.
SKIPS: dict = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 128),
    "layers_per_block": 2,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
}
# One model for each family; several where a class has options that change its blocks.
CASES: list[tuple[str, dict]] = [
    ("unet", {}),
    ("unet", {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5, "downsample_type": "resnet"}),
    ("unet", {"down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2}),
    ("unet", SKIPS),
    ("unet_sd1", {}),
    ("unet_sd1", {"use_linear_projection": True, "layers_per_block": 2}),
    ("unet_sdxl", {}),
    ("dit", {}),
    ("pixart", {}),
    ("pixart", {"use_additional_conditions": True, "attention_head_dim": 48, "cross_attention_dim": 192}),
    ("sd3", {}),
    ("sd35", {}),
    ("flux", {}),
    ("wan", {}),
    ("wan", {"cross_attn_norm": False, "added_kv_proj_dim": None}),
    ("cogvideox", {}),
    ("cogvideox", {"use_rotary_positional_embeddings": False, "ofs_embed_dim": None}),
    ("hunyuan_video", {}),
    ("hunyuan_video", {"image_condition_type": "token_replace", "guidance_embeds": False}),
    ("qwenimage", {}),
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", {}),
    ("gemma", {}),
    ("gemma2", {}),
    ("gemma3", {}),
]
IDS = [f"{name}-{index}" for index, (name, _) in enumerate(CASES)]


class Watch(BlockOption):
    """Changes nothing, notes what it saw."""

    name = "watch"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def branch(self, block, branch, streams, conditioning, compute):
        self.seen.append(branch.name)
        return compute()


def output_of(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output[0]
