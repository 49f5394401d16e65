"""The tolerances of the test suite, in one place: a test picks a rule, it does not invent a number.

1. Bit-exact (`torch.equal`): packing, layouts, save and load, integer accumulators, codes against a reference.
2. A kernel against its reference in float32 from the same codes and scales: `assert_close`, with `KERNEL` by dtype.
3. Quantization quality: `snr_db`, held to a measured value less `SNR_MARGIN_DB`, the measurement beside it in the
   test. `RTN_SNR_DB` holds the values for round-to-nearest on Gaussian weights.
Loosening a number needs a measured reason in the commit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SNR_MARGIN_DB = 1.0


@dataclass(frozen=True)
class Tolerance:
    """Bounds: `rms` on RMS(error) / RMS(reference), `maximum` on |error| / max(RMS(reference), |reference|)."""

    rms: float
    maximum: float

    def __mul__(self, factor: float) -> Tolerance:
        return Tolerance(self.rms * factor, self.maximum * factor)


# Rounding the output once already costs 1.66e-3 (max 3.9e-3) in bf16 and 2.1e-4 (max 4.9e-4) in fp16.
KERNEL = {
    torch.float64: Tolerance(rms=1e-10, maximum=1e-9),
    torch.float32: Tolerance(rms=1e-5, maximum=1e-4),
    torch.float16: Tolerance(rms=1e-3, maximum=1e-2),
    torch.bfloat16: Tolerance(rms=4e-3, maximum=2e-2),
}
GRADIENT = {dtype: tolerance * 2 for dtype, tolerance in KERNEL.items()}

# Signal to noise of round-to-nearest, weights drawn from a Gaussian, [1024, 2048]; measured, and equal for the weight
# and for the output of a product with Gaussian inputs within 0.1 dB.
RTN_SNR_DB = {
    "int8 per_channel symmetric": 41.6,
    "int8 per_channel asymmetric": 42.1,
    "int4 per_group(128) amax_over_qmax": 18.6,
    "int4 per_group(128) amax_over_half_range": 19.1,
    "int4 per_group(128) min_max_no_clip": 19.0,
    "int4 per_group(128) asymmetric": 19.9,
    "int4 per_group(64) amax_over_qmax": 19.4,
    "int4 per_group(64) amax_over_half_range": 19.8,
    "int4 per_group(64) min_max_no_clip": 19.8,
    "int4 per_group(64) asymmetric": 20.8,
    "int4 per_group(32) amax_over_qmax": 20.3,
    "int4 per_group(32) amax_over_half_range": 20.5,
    "int4 per_group(32) min_max_no_clip": 20.7,
    "int4 per_group(32) asymmetric": 21.9,
    "w8a8 per_channel per_token": 38.6,
}


def snr_db(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """20 log10(|reference| / |reference - actual|), in float64: inf when equal, nan when `actual` is not finite."""
    reference, actual = _comparable(reference, actual)
    noise = torch.linalg.vector_norm(reference - actual).item()
    signal = torch.linalg.vector_norm(reference).item()
    if noise == 0:
        return math.inf
    return 20 * math.log10(signal / noise) if signal > 0 else -math.inf


def relative_rms(reference: torch.Tensor, actual: torch.Tensor) -> float:
    """RMS(reference - actual) / RMS(reference), in float64."""
    reference, actual = _comparable(reference, actual)
    return _ratio(_rms(reference - actual), _rms(reference))


def assert_snr(reference: torch.Tensor, actual: torch.Tensor, measured_db: float, label: str = "") -> None:
    """Fail when the signal to noise ratio is more than `SNR_MARGIN_DB` under `measured_db`."""
    value = snr_db(reference, actual)
    bound = measured_db - SNR_MARGIN_DB
    assert value >= bound, f"{label or 'output'}: SNR {value:.2f} dB, at least {bound:.2f} dB required"


def assert_close(
    actual: torch.Tensor,
    reference: torch.Tensor,
    tolerance: Tolerance | torch.dtype | None = None,
    label: str = "",
) -> None:
    """Fail unless `actual` is `reference` within `tolerance`: a rule, a dtype of `KERNEL`, or that of `actual`.

    Places where the reference is inf or nan must hold the same value. Both bounds are relative to the RMS of the
    reference, so that the scale of a test's inputs never decides its outcome.
    """
    label = label or "output"
    rule = tolerance if isinstance(tolerance, Tolerance) else KERNEL[tolerance or actual.dtype]
    reference, actual = _comparable(reference, actual)
    finite = torch.isfinite(reference)
    odd = torch.where(finite, ~torch.isfinite(actual), ~torch.isclose(actual, reference, equal_nan=True))
    if odd.any():
        raise AssertionError(
            f"{label}: not finite where it should be, or the reverse:\n{_worst(odd, actual, reference)}"
        )
    reference, actual = reference.masked_fill(~finite, 0), actual.masked_fill(~finite, 0)
    if reference.numel() == 0:
        return
    difference, scale = (actual - reference).abs(), _rms(reference)
    elementwise = torch.where(difference == 0, 0, difference / reference.abs().clamp_min(scale))
    rms, maximum = _ratio(_rms(difference), scale), elementwise.max().item()
    if not (rms <= rule.rms and maximum <= rule.maximum):
        raise AssertionError(
            f"{label}: relative RMS {rms:.3e} (allowed {rule.rms:.1e}), "
            f"relative maximum {maximum:.3e} (allowed {rule.maximum:.1e}):\n{_worst(elementwise, actual, reference)}"
        )


def _comparable(reference: torch.Tensor, actual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert reference.shape == actual.shape, f"shapes differ: {tuple(reference.shape)} and {tuple(actual.shape)}"
    return reference.detach().cpu().double(), actual.detach().cpu().double()


def _rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else (math.inf if numerator else 0.0)


def _worst(badness: torch.Tensor, actual: torch.Tensor, reference: torch.Tensor, count: int = 5) -> str:
    order = badness.flatten().double().argsort(descending=True)[:count]
    lines = []
    for flat in order.tolist():
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), badness.shape))
        lines.append(
            f"  {list(place)}: {actual.flatten()[flat].item():.6g}, expected {reference.flatten()[flat].item():.6g}"
        )
    return "\n".join(lines)
