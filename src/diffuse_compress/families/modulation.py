"""Adaptive layer norm as its parts, so that one branch can be computed without another, and branches made of them."""

from __future__ import annotations

from typing import Any

import torch

from diffuse_compress.families.base import Branch, BranchRole, Conditioning, Smoothing, Streams

__all__ = [
    "FF",
    "FF_CONTEXT",
    "adaln_zero",
    "gated",
    "joint_attention_gate",
    "joint_smoothing",
    "modulate",
    "single_smoothing",
]


def adaln_zero(
    block: Any, conditioning: Conditioning, norm: str, chunks: int, embedding: str = "temb"
) -> tuple[torch.Tensor, ...]:
    """Chunks [batch, width] of ``norm.linear(silu(temb))``: shift, scale, gate of attention, then of feed-forward.

    ``embedding`` names another argument of the block to be read instead of ``temb``.
    """

    def compute() -> tuple[torch.Tensor, ...]:
        module = getattr(block, norm)
        return tuple(module.linear(module.silu(getattr(conditioning, embedding))).chunk(chunks, dim=1))

    name = norm if embedding == "temb" else f"{norm} of {embedding}"
    values: tuple[torch.Tensor, ...] = conditioning.once(name, compute)
    return values


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [batch, tokens, width] * (1 + scale) + shift, both [batch, width]."""
    return x * (1 + scale[:, None]) + shift[:, None]


def gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x [batch, tokens, width] * gate [batch, width]."""
    return gate.unsqueeze(1) * x


def _feed_forward(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    shift, scale = adaln_zero(block, conditioning, "norm1", 6)[3:5]
    return {"hidden_states": block.ff(modulate(block.norm2(streams["hidden_states"]), shift, scale))}


def _feed_forward_gate(block: Any, outputs: Streams, conditioning: Conditioning) -> Streams:
    gate = adaln_zero(block, conditioning, "norm1", 6)[5]
    return {"hidden_states": gated(outputs["hidden_states"], gate)}


def _text_feed_forward(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    shift, scale = adaln_zero(block, conditioning, "norm1_context", 6)[3:5]
    text = modulate(block.norm2_context(streams["encoder_hidden_states"]), shift, scale)
    return {"encoder_hidden_states": block.ff_context(text)}


def _text_feed_forward_gate(block: Any, outputs: Streams, conditioning: Conditioning) -> Streams:
    gate = adaln_zero(block, conditioning, "norm1_context", 6)[5]
    return {"encoder_hidden_states": gated(outputs["encoder_hidden_states"], gate)}


def joint_attention_gate(block: Any, outputs: Streams, conditioning: Conditioning) -> Streams:
    """``Branch.gate`` of joint attention with AdaLN-Zero on both token kinds."""
    gate = adaln_zero(block, conditioning, "norm1", 6)[2]
    text_gate = adaln_zero(block, conditioning, "norm1_context", 6)[2]
    return {
        "hidden_states": gated(outputs["hidden_states"], gate),
        "encoder_hidden_states": gated(outputs["encoder_hidden_states"], text_gate),
    }


FF = Branch("ff", BranchRole.FEED_FORWARD, _feed_forward, ("ff",), gate=_feed_forward_gate)
"""Of the picture's tokens in a joint block with AdaLN-Zero ``norm1``."""
FF_CONTEXT = Branch(
    "ff_context", BranchRole.FEED_FORWARD, _text_feed_forward, ("ff_context",), gate=_text_feed_forward_gate
)
"""Of its text tokens, modulated by ``norm1_context``."""


def joint_smoothing(block: Any) -> tuple[Smoothing, ...]:
    """Of a joint block with AdaLN-Zero on both token kinds."""
    text = "norm1_context.linear"
    return (
        Smoothing(("attn.to_q", "attn.to_k", "attn.to_v"), modulation="norm1.linear"),
        Smoothing(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), modulation=text),
        Smoothing(("ff.net.0.proj",), modulation="norm1.linear", shift=3, scale=4),
        Smoothing(("ff_context.net.0.proj",), modulation=text, shift=3, scale=4),
        Smoothing(("ff.net.2",)),
        Smoothing(("ff_context.net.2",)),
    )


def single_smoothing(block: Any) -> tuple[Smoothing, ...]:
    """Of a block that runs attention and feed-forward side by side."""
    return (
        Smoothing(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), modulation="norm.linear", chunks=3),
        Smoothing(("proj_out",)),
    )
