"""Rotary embeddings of transformers' models, by their own code: keys turned to other positions, or back."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import MODEL_MAPPING, PreTrainedConfig

from diffuse_compress.errors import ConfigError

__all__ = ["Rotary"]

# Of these the frequencies depend on the longest text so far: a key once turned does not fit later ones.
_CHANGING = ("dynamic", "longrope")
_TOLERANCE = 1e-4


class Rotary:
    """The rotary embedding of a model, found in the module that defines the model's class.

    Args:
        where: for messages.
        config: the model's.

    Raises:
        ConfigError: the class is unknown, has no rotary embedding, or one that is not a rotation by the position alone:
            frequencies that change with the length, positions in several dimensions, layers without it.
    """

    def __init__(self, where: str, config: PreTrainedConfig) -> None:
        text = config.get_text_config(decoder=True)
        model = MODEL_MAPPING.get(type(text), None)
        name = type(text).__name__
        module = None if model is None else sys.modules[model.__module__]
        self._apply: Any = getattr(module, "apply_rotary_pos_emb", None)
        classes = [
            value
            for key, value in vars(module or object).items()
            if key.endswith("RotaryEmbedding") and "Vision" not in key and isinstance(value, type)
        ]
        if self._apply is None or len(classes) != 1:
            raise ConfigError(
                f"{where}: needs a model with rotary embeddings (Llama, Qwen, Mistral, ...), and transformers' "
                f"module of {name} has {len(classes)} classes of them."
            )
        parameters = getattr(text, "rope_parameters", None) or {}
        kind = parameters.get("rope_type", "default")
        if kind in _CHANGING:
            raise ConfigError(
                f"{where}: rotary embeddings of type {kind!r} change their frequencies with the length of the text, so "
                "that keys cannot be turned to other positions. Use KIVIConfig()."
            )
        without = getattr(text, "no_rope_layers", None)
        special = "mrope_section" in parameters or getattr(text, "kv_lora_rank", None)
        if special or (without and not all(without)) or getattr(text, "cross_attention_layers", None):
            raise ConfigError(
                f"{where}: needs keys that are turned by one position each, in all layers; those of {name} have "
                "several (pictures), a part that is not turned (latent attention), or layers without. Use KIVIConfig()."
            )
        try:
            self._embedding: Any = classes[0](config=text)
            self.dim = self._frequencies(torch.zeros(1, 1, dtype=torch.long))[0].shape[-1]
            fits = self._is_rotation()
        except (TypeError, KeyError, RuntimeError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"{where}: the rotary embedding of {name} cannot be called by position: {error}."
            ) from error
        if not fits:
            raise ConfigError(f"{where}: the rotary embedding of {name} is no rotation by the position.")

    def _frequencies(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 (cos, sin) [B, T, ...] of positions [B, T], of a rotation without scaling."""
        self._embedding.to(positions.device)
        like = torch.zeros(1, dtype=torch.float32, device=positions.device)
        cos, sin = self._embedding(like, positions)
        factor = getattr(self._embedding, "attention_scaling", 1.0)
        return cos / factor, sin / factor

    def turn(self, keys: torch.Tensor, positions: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """Keys [B, H, T, D] turned by ``positions`` [B, T] from where they are; fp32 inside, their dtype outside."""
        cos, sin = self._frequencies(positions)
        turned = keys[..., : self.dim].float()
        turned = self._apply(turned, turned, cos, -sin if back else sin)[1]
        return torch.cat([turned.to(keys.dtype), keys[..., self.dim :]], dim=-1)

    def turn_each(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As :meth:`turn`, with positions [B, H, T] of each head's own."""
        flat = self.turn(keys.flatten(1, 2).unsqueeze(1), positions.flatten(1))
        return flat.squeeze(1).unflatten(1, keys.shape[1:3])

    def _is_rotation(self) -> bool:
        generator = torch.Generator().manual_seed(0)
        keys = torch.randn(1, 1, 3, self.dim, generator=generator)
        places = torch.tensor([[0, 5, 11]])
        once = self.turn(keys, places)
        further = self.turn(once, torch.full_like(places, 7))
        differences = [
            further - self.turn(keys, places + 7),
            self.turn(once, places, back=True) - keys,
            (once - keys)[..., 0, :],
        ]
        turned = not torch.allclose(once[..., 1:, :], keys[..., 1:, :])
        return turned and all(float(part.abs().max()) < _TOLERANCE for part in differences)
