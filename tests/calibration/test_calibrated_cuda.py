"""Calibrated algorithms on CUDA: as good as on the CPU, for a model that is there and for one that is not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.quantization.algorithms.svdquant import truncated_svd
from tolerance import SNR_MARGIN_DB, snr_db

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SVDQUANT = dc.SVDQuantConfig(rank=8, num_alphas=8, iterations=4)
QUAROT, RESIDUAL = dc.QuaRotConfig(), dc.QuaRotConfig(residual=True)
CASES: dict[str, tuple[str, Any]] = {
    "awq": ("w4a16", dc.AWQConfig(num_ratios=6, clip_steps=4)),
    "gptq": ("w4a16", dc.GPTQConfig()),
    "gptq, two-level": ("w4a8", dc.GPTQConfig()),
    "gptaq": ("w4a16", dc.GPTQConfig(asymmetric=True)),
    "awq, gptq": ("w8a8", [dc.AWQConfig(num_ratios=6), dc.GPTQConfig()]),
    "smoothquant": ("w8a8", dc.SmoothQuantConfig()),
    "adaround": ("w4a16", dc.AdaRoundConfig(iterations=40)),
    "brecq": ("w4a16", dc.BRECQConfig(iterations=40)),
    "svdquant": ("w4a4", SVDQUANT),
    "svdquant, shared": ("w4a4", dc.SVDQuantConfig(rank=8, num_alphas=2, iterations=2, share=True)),
    "svdquant, gptq": ("w4a4", [SVDQUANT, dc.GPTQConfig()]),
    "quarot, svdquant": ("w4a4", [QUAROT, SVDQUANT]),
    "quarot, gptq": ("w4a4", [QUAROT, dc.GPTQConfig()]),
    "owq": ("w4a16", dc.OWQConfig(columns=4)),
    "quik": ("w4a4", dc.QUIKConfig()),
    "spqr": ("w4a16", dc.SpQRConfig(threshold=0.01)),
    "residual, svdquant": ("w4a4", [RESIDUAL, SVDQUANT]),
    "residual, gptq": ("w4a4", [RESIDUAL, dc.GPTQConfig()]),
}
PAIRS = [(model, case) for case in CASES for model in ("pixart", "llama") if model == "llama" or "residual" not in case]


def outputs(model: Any) -> torch.Tensor:
    """On inputs that were not calibrated on, of the model's own kind."""
    with torch.no_grad():
        return torch.cat([model(**tiny.inputs_for(model, seed=seed))[0].float().cpu() for seed in range(10, 14)])


def compressed(name: str, case: str, *, home: str = "cpu", dtype: torch.dtype = torch.float32, **given: Any) -> Any:
    """A model that lives at ``home``."""
    model = tiny.build(name, dtype=dtype)
    items = [tiny.inputs_for(model, seed=seed) for seed in range(6)]
    preset, algorithm = CASES[case]
    config = dc.QuantizationConfig(preset, algorithm=algorithm)
    return model.to(home).compress(config, calibration=items, measure=False, **given)


@functools.cache
def on_the_cpu(name: str, case: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, float, set[str]]:
    """(outputs of the dense model, signal to noise in dB after calibration on the CPU, names of what was quantized)."""
    dense, model = outputs(tiny.build(name, dtype=dtype)), compressed(name, case, dtype=dtype)
    return dense, snr_db(dense, outputs(model)), set(quantized_layers(model))


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_a_model_on_the_cpu_is_calibrated_on_cuda_and_goes_back(name: str, case: str) -> None:
    dense, reference, layers = on_the_cpu(name, case)
    model = compressed(name, case, device=DEVICE)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert set(quantized_layers(model)) == layers
    assert snr_db(dense, outputs(model)) > reference - SNR_MARGIN_DB


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_a_model_on_cuda_is_calibrated_where_it_is(name: str, case: str) -> None:
    dense, reference, layers = on_the_cpu(name, case)
    model = compressed(name, case, home=DEVICE)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {DEVICE}
    assert set(quantized_layers(model)) == layers
    assert snr_db(dense, outputs(model)) > reference - SNR_MARGIN_DB


@pytest.mark.parametrize("case", ["gptq", "svdquant", "quarot, svdquant", "unet"])
def test_bfloat16_and_convolutions(case: str) -> None:
    name, case = ("unet_sd1", "quarot, svdquant") if case == "unet" else ("pixart", case)
    dense, reference, layers = on_the_cpu(name, case, torch.bfloat16)
    model = compressed(name, case, home=DEVICE, dtype=torch.bfloat16)
    assert set(quantized_layers(model)) == layers
    assert snr_db(dense, outputs(model)) > reference - SNR_MARGIN_DB


def test_a_wide_layer_is_decomposed_on_cuda_as_on_the_cpu() -> None:
    """As well, not alike: the iteration starts from other numbers there, and near values leave it a choice."""
    weight = torch.randn(700, 600, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 600)
    best = torch.linalg.svdvals(weight)[16:].norm()
    for device in ("cpu", DEVICE):
        down, up = truncated_svd(weight.to(device), 16)
        assert down.device.type == up.device.type == device
        assert (weight - (up @ down).cpu()).norm() < 1.01 * best
