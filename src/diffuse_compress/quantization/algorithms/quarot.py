"""QuaRot: rotate what is quantized, so that no channel is larger than the others.

Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456. A product does not
change when input and weight are rotated alike, ``(x R) (W R)^T = x W^T``, but its rounding does: Hadamard matrices
share every outlier out over all channels. A layer rotates its input at run time, as the paper does in front of down
projections, whatever stands before it: adaptive norms and activations, through which no rotation can be moved. In
decoders whose norms have weights alone, most rotations can be moved into the weights (``residual.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.rtn import quantize as round_to_nearest
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.rotation import MIN_ROTATION, is_rotation_size, rotation_size
from diffuse_compress.quantization.scheme import Scheme, WeightScheme

__all__ = ["QuaRotConfig"]


@dataclass(frozen=True)
class QuaRotConfig(AlgorithmConfig):
    """Hadamard rotations of the inputs that are quantized, and of the weights they meet. Data-free.

    Layers whose inputs stay as they are keep their format. Codes are rounded to nearest, or chosen by what follows in a
    sequence; smoothing scales (SmoothQuant, AWQ, SVDQuant) multiply the input before it is rotated.

    Args:
        residual: rotate the residual stream and the value heads inside the weights, so that down projections alone
            rotate their input at run time. For language models with a head (Llama, Qwen2, Qwen3, Mistral, Gemma),
            compressed alone. The logits stay what they are, but not ``hidden_states`` that are asked for; embeddings of
            one's own (``inputs_embeds``) and adapters trained before no longer fit; a head that is tied to the
            embedding gets a weight of its own.
        block_size: channels that are rotated together; None takes as many as can be, all of them for most sizes.
    """

    residual: bool = False
    block_size: int | None = None
    kind: ClassVar[str] = "quarot"
    chooses_codes: ClassVar[bool] = False
    rounds_input_groups: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        options = ["residual stream in the weights"] if self.residual else []
        options += [f"blocks of {self.block_size}"] if self.block_size is not None else []
        return f"QuaRot ({', '.join(options)})" if options else "QuaRot"

    @property
    def rotates_residual(self) -> bool:
        return self.residual

    @property
    def needs_quantized_inputs(self) -> bool:  # type: ignore[override]
        return not self.residual

    @property
    def is_random(self) -> bool:  # type: ignore[override]
        return self.residual

    def __post_init__(self) -> None:
        if self.block_size is not None and not (self.block_size >= MIN_ROTATION and is_rotation_size(self.block_size)):
            raise ConfigError(
                f"QuaRotConfig: block_size must be the order of a Hadamard matrix, at least {MIN_ROTATION}, got "
                f"{self.block_size}. Use a power of two, or leave it out."
            )

    def idle_after(self, earlier: AlgorithmConfig) -> str | None:
        return "it has rotated the inputs" if earlier.rotates_residual else None

    def unsupported(self, layer: nn.Module, scheme: Scheme) -> str | None:
        if scheme.activation is None:
            return None
        if not isinstance(layer, nn.Linear):
            return "QuaRot rotates inputs of linear layers"
        if self._size(layer.in_features) is None:
            wanted = f"runs of {self.block_size}" if self.block_size else f"a rotation of {MIN_ROTATION} or more"
            return f"QuaRot: its in_features, {layer.in_features}, cannot be cut into {wanted}"
        return None

    def format_of(self, layer: nn.Module, scheme: Scheme, arrives_rotated: bool = False, name: str = "") -> Scheme:
        """``scheme`` with a rotation, if it quantizes inputs, names none itself and needs one."""
        if arrives_rotated or scheme.activation is None or not isinstance(layer, nn.Linear):
            return scheme
        if scheme.input_rotation is not None:
            return scheme
        return replace(scheme, input_rotation=self._size(layer.in_features))

    def _size(self, channels: int) -> int | None:
        if self.block_size is None:
            return rotation_size(channels)
        return None if channels % self.block_size else self.block_size


@register_block
def calibrate(work: BlockWork, config: QuaRotConfig) -> None:
    """Nothing is left to do for a block: layers know their rotation from their format."""


@register
def quantize(
    weight: torch.Tensor, scheme: WeightScheme, config: QuaRotConfig, generator: torch.Generator | None = None
) -> QuantizedWeight:
    """Round a weight [N, K], rotated already as its layer's format says, to nearest."""
    return round_to_nearest(weight, scheme, RTNConfig(), generator)
