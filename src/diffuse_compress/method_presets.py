"""Names for several methods that belong together: TFMQ as a whole, weights and timestep path.

Source: Huang et al. 2023, arXiv 2311.16503 (TFMQ-DM): blocks reconstructed without the temporal projections, these
learned on the timesteps. Formats are those of this package's presets, for which there are kernels: int8 inputs have a
scale for each token, where the authors' have one for each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.quantization.algorithms.brecq import BRECQConfig
from diffuse_compress.temporal.config import Maintenance, TFMQConfig

__all__ = ["METHOD_PRESETS", "MethodPreset"]

# The authors' numbers, the same in every script of their code. Their regulariser's weight is of another unit.
_PAPER = BRECQConfig(iterations=20_000, learning_rate=1e-3, batch_size=32, start="nearest", ridge=0.0)


@dataclass(frozen=True)
class MethodPreset:
    """What ``compress(name, calibration=...)`` stands for.

    Attributes:
        scheme: preset of the formats.
        algorithm: of the blocks, without the layers of the timestep path.
        path: what becomes of these.
        summary: one line for ``diffuse-compress info``.
    """

    scheme: str
    algorithm: BRECQConfig
    path: TFMQConfig
    summary: str

    def configs(self, options: Mapping[str, Any]) -> tuple[QuantizationConfig, TFMQConfig]:
        """The methods, with arguments of QuantizationConfig that were given beside the name."""
        return QuantizationConfig(
            self.scheme, **{"algorithm": self.algorithm, "split_skips": True, **options}
        ), self.path


def _pair(name: str, scheme: str, formats: str) -> dict[str, MethodPreset]:
    def preset(algorithm: BRECQConfig, path: TFMQConfig) -> MethodPreset:
        return MethodPreset(scheme, algorithm, path, f"{formats}: {algorithm.summary} by block, {path.summary}")

    fast, paper = TFMQConfig(maintenance=Maintenance.TIB), TFMQConfig(maintenance=Maintenance.TIB, iterations=20_000)
    return {name: preset(BRECQConfig(), fast), f"{name}-paper": preset(_PAPER, paper)}


METHOD_PRESETS: dict[str, MethodPreset] = {
    **_pair("tfmq-w4a32", "w4a16", "TFMQ, int4 weights"),
    **_pair("tfmq-w8a8", "w8a8", "TFMQ, int8 weights and inputs"),
    **_pair("tfmq-w4a8", "w4a8", "TFMQ, int4 weights, int8 inputs"),
}
"""By name. First and last layers stay dense, as in the authors' code; ``-paper`` takes their 20,000 steps."""
