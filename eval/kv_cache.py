"""Perplexity and bytes of a KV cache of ours, token by token as a model writes; see docs/language_models.md.

    python eval/kv_cache.py --model examples/reference_models/python_llama --out kv.json
    python eval/kv_cache.py --model examples/reference_models/python_llama --outliers --out kv_outliers.json
    python eval/kv_cache.py --model examples/reference_models/python_llama --selection --out kv_selection.json
    python eval/kv_cache.py --model examples/reference_models/python_llama --long --windows 2 --window 4096 --out l.json

Each window of held-out text is fed one token at a time, so every prediction sees what ``generate`` would see: old
tokens from codes, the newest as they are. Scored are all tokens but the first. ``--outliers`` makes two channels of
every key head 16 times as large and the queries' as much smaller, which leaves the model's function as it is: keys of
large models have such channels, those of the small one hardly. ``--selection`` takes the arms that keep or fetch some
tokens, ``--long`` those of a text longer than the model was trained on. Results are written after each arm.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from diffuse_compress import KIVIConfig, QuantizedKVCache, ShadowKVCache, ShadowKVConfig, SinkKVCache, SinkKVConfig
from diffuse_compress.evaluation.environment import command_line, device_name
from diffuse_compress.evaluation.perplexity import TextScore, perplexity_ratio

SMALL: dict[str, Any] = {"group_size": 32, "scale_dtype": "float8", "residual_length": 32}
Config = KIVIConfig | SinkKVConfig | ShadowKVConfig
CACHES: dict[type, Any] = {
    KIVIConfig: QuantizedKVCache,
    SinkKVConfig: SinkKVCache,
    ShadowKVConfig: ShadowKVCache,
}
SHADOW: dict[str, Any] = {"num_outlier_chunks": 2, "num_local_chunks": 4, "segment_length": 32}
ARMS: dict[str, Config | None] = {
    "dense": None,
    "KIVI, 8 bits": KIVIConfig(bits=8, **SMALL),
    "KIVI, 4 bits": KIVIConfig(bits=4, **SMALL),
    "KIVI, 2 bits": KIVIConfig(**SMALL),
    "KIVI, 2 bits, fp16 scales": KIVIConfig(**{**SMALL, "scale_dtype": "float16"}),
    "KIVI, 2 bits, 4 sink tokens": KIVIConfig(**SMALL, num_sink_tokens=4),
    "KIVI, 2 bits, 128 newest tokens": KIVIConfig(**{**SMALL, "residual_length": 128}),
    "naive, 4 bits": KIVIConfig(bits=4, method="naive", **SMALL),
    "naive, 2 bits": KIVIConfig(method="naive", **SMALL),
}
SELECTION: dict[str, Config | None] = {
    "dense": None,
    **{f"window of {n}": SinkKVConfig(0, n) for n in (64, 128, 256)},
    **{f"SinkKV, 4 and {n - 4}": SinkKVConfig(4, n - 4) for n in (64, 128, 256)},
    **{
        f"ShadowKV, rank {rank}, {n} fetched": ShadowKVConfig(rank=rank, sparse_budget=n, **SHADOW)
        for rank, n in ((64, 512), (32, 512), (16, 512), (32, 64), (32, 128))
    },
}
LONG: dict[str, Config | None] = {
    "dense": None,
    "window of 256": SinkKVConfig(0, 256),
    "SinkKV, 4 and 252": SinkKVConfig(4, 252),
    "SinkKV, 4 and 508": SinkKVConfig(4, 508),
}
FACTOR = 16.0


def add_key_outliers(model: Any) -> None:
    """Scale one rotary pair of every key head up, and of the queries that read it down; the products stay."""
    size, shared = model.config.head_dim, model.config.num_attention_heads // model.config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            keys, queries = layer.self_attn.k_proj.weight, layer.self_attn.q_proj.weight
            for head in range(model.config.num_key_value_heads):
                for channel in (size // 4, size // 4 + size // 2):
                    keys[head * size + channel] *= FACTOR
                    for query in range(head * shared, (head + 1) * shared):
                        queries[query * size + channel] /= FACTOR


@torch.no_grad()
def score(model: Any, rows: torch.Tensor, kv: Config | None) -> tuple[TextScore, float | None]:
    """(score of the windows [b, t], bytes over those of a dense cache: of quantized tokens over bf16, or of all)."""
    cache = DynamicCache(config=model.config) if kv is None else CACHES[type(kv)](model.config, kv)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # renamed in 5.24
    nats = np.zeros(len(rows))
    for position in range(rows.shape[1] - 1):
        logits = model(rows[:, position : position + 1], **{name: cache}).logits[:, -1].float()
        nats += (logits.logsumexp(-1) - logits.gather(1, rows[:, position + 1, None])[:, 0]).double().numpy()
    found = TextScore(nats, np.full(len(rows), rows.shape[1] - 1), rows.shape[1])
    if kv is None:
        return found, None
    if not isinstance(kv, KIVIConfig):
        size = 2 * rows.shape[0] * (rows.shape[1] - 1) * model.config.num_key_value_heads * model.config.head_dim * 4
        return found, cache.kept_layers[0].nbytes / size
    layer = cache.quantized_layers[0]
    batch, heads, _, size = layer.keys.shape
    return found, layer.quantized_nbytes / (2 * batch * heads * layer.num_quantized * size * 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with heldout.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--selection", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--arms", nargs="+")
    args = parser.parse_args()
    arms = LONG if args.long else SELECTION if args.selection else ARMS
    unknown = sorted(set(args.arms or ()) - set(arms))
    if unknown:
        parser.error(f"--arms: no {unknown[0]!r} among {', '.join(arms)}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenizer((args.model / "heldout.txt").read_text(encoding="utf-8"), verbose=False).input_ids
    rows = torch.tensor(tokens[: args.windows * args.window]).view(args.windows, args.window)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    if args.outliers:
        add_key_outliers(model)
    results: dict[str, Any] = {
        "command": command_line("python eval/kv_cache.py", sys.argv[1:]),
        "device": device_name("cpu"),
        "arms": {},
    }
    dense = None
    for name in dict.fromkeys(["dense", *(args.arms or arms)]):
        start = time.perf_counter()
        found, size = score(model, rows, arms[name])
        dense = dense or found
        ratio = perplexity_ratio(dense, found)
        results["arms"][name] = {
            "perplexity": found.perplexity,
            "ratio": [ratio.value, ratio.low, ratio.high],
            "of_bf16": size,
            "seconds": time.perf_counter() - start,
        }
        args.out.write_text(json.dumps(results, indent=2) + "\n")
        shown = "" if size is None else f", {size:.4f} of the dense bytes"
        print(f"{name}: {found.perplexity:.3f}, {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]{shown}")


if __name__ == "__main__":
    main()
