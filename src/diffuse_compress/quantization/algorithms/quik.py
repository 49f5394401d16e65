"""QUIK: input columns with the largest magnitudes stay dense on both sides; the rest is int4 or int8 on both.

Ashkboos et al. 2023, "QUIK: Towards End-to-End 4-Bit Inference on Generative Large Language Models", arXiv 2310.09259,
section 3: outlier columns are those whose inputs are largest on calibration data; GPTQ comes to them last, so that they
take up the errors of the others; layers that are sensitive to their inputs (down projections) get 8 bits and more
columns. Deviations: columns keep their place in the packed weight, where their codes stand for 0, so that packed
layouts and kernels stay what they are; their number is a share of the width (256 of 4096 in the paper); weights are
symmetric or not as the format says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from diffuse_compress.errors import ConfigError
from diffuse_compress.patterns import matches
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork
from diffuse_compress.quantization.algorithms.dense_columns import column_bytes, columns_for, largest, why_no_columns
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig, gptq_of, quantize_block, shared_inputs
from diffuse_compress.quantization.algorithms.quarot import QuaRotConfig
from diffuse_compress.quantization.algorithms.smoothquant import AbsMaxCollector
from diffuse_compress.quantization.scheme import NumberFormat, PerChannel, Scheme, WeightScheme

__all__ = ["QUIKConfig"]


@dataclass(frozen=True)
class QUIKConfig(AlgorithmConfig):
    """GPTQ with the input columns of largest magnitude dense. For ``w4a4``, ``w4a8`` and ``w8a8``; needs data.

    Args:
        share: of a linear layer's input columns that stay dense.
        sensitive: patterns of layers that are treated with more care: what reads a feed-forward's hidden units.
        sensitive_share: the share of these.
        sensitive_bits: 8 gives those among them that were to have 4 bits on both sides int8 codes, per channel; None
            leaves them.
        damping: as :class:`GPTQConfig`.
        act_order: likewise.
        true_sequential: likewise.
        observer: likewise.
    """

    share: float = 0.0625
    sensitive: tuple[str, ...] = ("*.down_proj", "*.fc2", "*.ff.net.2", "*.ff_context.net.2")
    sensitive_share: float = 0.0625
    sensitive_bits: int | None = 8
    damping: float = 0.01
    act_order: bool = True
    true_sequential: bool = True
    observer: str = "mse"
    kind: ClassVar[str] = "quik"
    needs_calibration: ClassVar[bool] = True
    needs_quantized_inputs: ClassVar[bool] = True
    kept_dense: ClassVar[str] = "dense input columns"

    @property
    def summary(self) -> str:
        return f"QUIK ({self.share:.3g} of the input columns)"

    @property
    def rounding(self) -> GPTQConfig:
        """How the other columns are rounded."""
        return gptq_of(self)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sensitive", tuple(self.sensitive))
        if not 0 <= self.share < 1 or not 0 <= self.sensitive_share < 1 or self.sensitive_bits not in (8, None):
            raise ConfigError(
                "QUIKConfig: need 0 <= share < 1, 0 <= sensitive_share < 1 and sensitive_bits 8 or None, got "
                f"share={self.share}, sensitive_share={self.sensitive_share}, sensitive_bits={self.sensitive_bits}."
            )
        _ = self.rounding  # its own checks

    def for_search(self) -> AlgorithmConfig:
        return replace(self, true_sequential=False)

    def idle_after(self, earlier: AlgorithmConfig) -> str | None:
        if isinstance(earlier, QuaRotConfig) and not earlier.residual:
            return "rotated inputs have no columns that stand out"
        return super().idle_after(earlier)

    def unsupported(self, layer: nn.Module, scheme: Scheme) -> str | None:
        return why_no_columns("QUIK", layer, scheme)

    def format_of(self, layer: nn.Module, scheme: Scheme, arrives_rotated: bool = False, name: str = "") -> Scheme:
        """``scheme``, or for sensitive layers of 4 bits on both sides one of 8."""
        act = scheme.activation
        if act is None or act.format is not NumberFormat.INT4 or scheme.weight.format is not NumberFormat.INT4:
            return scheme
        if self.sensitive_bits is None or not self._is_sensitive(name):
            return scheme
        return Scheme(WeightScheme(NumberFormat.INT8, PerChannel()), replace(act, format=NumberFormat.INT8))

    def count(self, layer: nn.Linear, name: str) -> int:
        """Dense columns of a layer with this qualified name."""
        return columns_for(self.sensitive_share if self._is_sensitive(name) else self.share, layer)

    def branch_bytes(self, layer: nn.Module, scheme: Scheme, name: str = "") -> int:
        return column_bytes(self.count(layer, name), layer) if isinstance(layer, nn.Linear) else 0

    def _is_sensitive(self, name: str) -> bool:
        return any(matches(pattern, name) for pattern in self.sensitive)


@register_block
def calibrate(work: BlockWork, config: QUIKConfig) -> None:
    """Choose the outlier columns of every layer of a block, and round the others."""

    def choose(layers: Sequence[LayerWork]) -> None:
        owner = shared_inputs(work, [layer.name for layer in layers if isinstance(layer.dense, nn.Linear)])
        collectors = {name: AbsMaxCollector(work.layers[name]) for name in owner.values()}
        if collectors:
            work.collect(collectors)
        # Layers of one input and one number of columns share the tensor too, and with it what GPTQ collects.
        found: dict[tuple[str, int], object] = {}
        for layer in layers:
            largest_inputs = collectors[owner[layer.name]].value if layer.name in owner else None
            if largest_inputs is None or not isinstance(layer.dense, nn.Linear):
                continue
            key = (owner[layer.name], config.count(layer.dense, work.full_name(layer.name)))
            if key not in found:
                found[key] = largest(largest_inputs, key[1])
            layer.dense_columns = found[key]  # type: ignore[assignment]
            if layer.dense_columns is not None and layer.scheme.has_static_inputs:
                layer.input_qparams = None  # chosen with these columns still in
        work.observe_inputs()

    quantize_block(work, config.rounding, before=choose)
