"""The untrained model. Every size that was chosen by hand stands in this file.

Budget: at 16 bits the weights must stay below 5 MiB, and every ``nn.Linear`` of the blocks must have
``in_features`` divisible by 128 (one 4-bit group).
"""

from __future__ import annotations

from data import CONTEXT, VOCABULARY
from transformers import LlamaConfig, LlamaForCausalLM


def build_model(end_of_file: int = 0) -> LlamaForCausalLM:
    """Four layers of width 256: eight query heads of 32 over two key-value heads, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end_of_file,
        eos_token_id=end_of_file,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)
