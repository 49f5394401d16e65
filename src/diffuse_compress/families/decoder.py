"""Decoder-only language models: Llama, Qwen2 and 3, Mistral, Gemma 1 to 3."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.families.base import (
    BlockKind,
    Branch,
    BranchRole,
    Conditioning,
    Family,
    Smoothing,
    Streams,
    single_stream,
)
from diffuse_compress.quantization.residual import ResidualStream

__all__ = ["DECODERS"]


@cache
def _parameters(cls: type) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of a layer's arguments after ``hidden_states``, and the defaults it passes on to its attention."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[2:]  # type: ignore[attr-defined]
    named = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    defaults = {parameter.name: parameter.default for parameter in named}
    return tuple(parameter.name for parameter in named), defaults


def _begin(
    block: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[Streams, Conditioning] | None:
    names, defaults = _parameters(type(block))  # type: ignore[arg-type]
    if len(args) > len(names):
        return None
    streams = {"hidden_states": hidden_states}
    return streams, Conditioning(streams, attention={**defaults, **dict(zip(names, args, strict=False)), **kwargs})


def _self_attention(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    normed = block.input_layernorm(streams["hidden_states"])
    return {"hidden_states": block.self_attn(hidden_states=normed, **conditioning.attention)[0]}


def _mlp(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    return {"hidden_states": block.mlp(block.post_attention_layernorm(streams["hidden_states"]))}


def _self_attention_normed_after(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    output = _self_attention(block, streams, conditioning)["hidden_states"]
    return {"hidden_states": block.post_attention_layernorm(output)}


def _mlp_normed_after(block: Any, streams: Streams, conditioning: Conditioning) -> Streams:
    output = block.mlp(block.pre_feedforward_layernorm(streams["hidden_states"]))
    return {"hidden_states": block.post_feedforward_layernorm(output)}


_PRE_NORM = (
    Branch("self_attn", BranchRole.ATTENTION, _self_attention, ("self_attn",)),
    Branch("mlp", BranchRole.FEED_FORWARD, _mlp, ("mlp",)),
)
# Gemma 2 and 3 norm what a branch returns, too.
_SANDWICH = (
    Branch("self_attn", BranchRole.ATTENTION, _self_attention_normed_after, ("self_attn",)),
    Branch("mlp", BranchRole.FEED_FORWARD, _mlp_normed_after, ("mlp",)),
)


def _smoothing(block: Any) -> tuple[Smoothing, ...]:
    gemma = type(block).__name__.startswith("Gemma")
    before_mlp = "pre_feedforward_layernorm" if hasattr(block, "pre_feedforward_layernorm") else _AFTER_ATTENTION
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    entries = [
        Smoothing(qkv, producer="input_layernorm", unit_offset=gemma),
        Smoothing(("mlp.gate_proj", "mlp.up_proj"), producer=before_mlp, unit_offset=gemma),
        Smoothing(("mlp.down_proj",), producer="mlp.up_proj"),
    ]
    value, output = block.self_attn.v_proj, block.self_attn.o_proj
    # With grouped queries several heads read one value channel: their scales cannot differ.
    same = value.out_features == output.in_features
    entries.append(Smoothing(("self_attn.o_proj",), producer="self_attn.v_proj" if same else None))
    return tuple(entries)


_AFTER_ATTENTION = "post_attention_layernorm"


# transformers 5.17 passes past_key_values, 5.24 cache.
_PRE_NORM_FORWARDS = frozenset({"1a8125909341e389", "625e5c2cd738f124"})
_SANDWICH_FORWARDS = frozenset({"eb03c623c021985a", "9e2d281758608b92"})


def _kind(class_name: str, branches: tuple[Branch, ...]) -> BlockKind:
    return BlockKind(
        class_name=class_name,
        fingerprints=_PRE_NORM_FORWARDS if branches is _PRE_NORM else _SANDWICH_FORWARDS,
        begin=_begin,
        branches=lambda block: branches,
        end=single_stream,
        smoothing=_smoothing,
    )


def _residual(model: Any, blocks: list[str], gemma: bool) -> ResidualStream:
    where = type(model).__name__
    if not where.endswith("ForCausalLM"):
        raise ConfigError(f"{where}: returns hidden states, which a rotated residual stream would change.")
    norms, writers, values = {}, [], []
    for block in blocks:
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        norms[f"{block}.input_layernorm"] = tuple(f"{attention}.{part}_proj" for part in "qkv")
        norms[f"{block}.{_AFTER_ATTENTION}"] = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
        writers += [f"{attention}.o_proj", f"{mlp}.down_proj"]
        values.append((f"{attention}.v_proj", f"{attention}.o_proj"))
    norms["model.norm"] = ("lm_head",)
    for name in [*writers, *(reader for readers in norms.values() for reader in readers)]:
        layer = model.get_submodule(name)
        if type(layer) is not nn.Linear:
            raise ConfigError(f"{where}: a residual stream is rotated in linears, {name} is {type(layer).__name__}.")
    embedding = model.get_submodule("model.embed_tokens")
    head_dim = model.get_submodule(blocks[0]).self_attn.head_dim
    return ResidualStream(
        width=embedding.embedding_dim,
        head_dim=head_dim,
        embedding="model.embed_tokens",
        norms=norms,
        writers=tuple(writers),
        values=tuple(values),
        head="lm_head",
        unit_offset=gemma,
    )


def _sandwiched(model: nn.Module) -> ResidualStream:
    raise ConfigError(
        f"{type(model).__name__}: the residual stream cannot be rotated in the weights: what branches return is normed "
        "before it is added. QuaRotConfig() without residual=True rotates any linear's input."
    )


def _family(name: str, prefix: str, branches: tuple[Branch, ...]) -> Family:
    layer = f"{prefix}DecoderLayer"

    def blocks(model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if type(module).__name__ == layer]

    def residual(model: nn.Module) -> ResidualStream:
        return _residual(model, blocks(model), prefix == "Gemma")

    heads = ("ForCausalLM", "Model", "TextModel", "ForConditionalGeneration", "ForSequenceClassification")
    return Family(
        name=name,
        classes=tuple(f"{prefix}{head}" for head in heads),
        blocks=blocks,
        kinds={layer: _kind(layer, branches)},
        sensitive=("lm_head", "embed_tokens", "mlp.down_proj"),
        residual=residual if branches is _PRE_NORM else _sandwiched,
    )


DECODERS = (
    _family("llama", "Llama", _PRE_NORM),
    _family("qwen2", "Qwen2", _PRE_NORM),
    _family("qwen3", "Qwen3", _PRE_NORM),
    _family("mistral", "Mistral", _PRE_NORM),
    _family("gemma", "Gemma", _PRE_NORM),
    _family("gemma2", "Gemma2", _SANDWICH),
    _family("gemma3", "Gemma3", _SANDWICH),
)
