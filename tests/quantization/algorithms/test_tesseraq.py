"""TesseraQ: hardened variables are the codes that are stored, learned scales are in them, and it beats GPTQ."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import diffuse_compress as dc
import tiny
from calibrated_block import Block, calibrated, error, inputs, work_of
from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms import tesseraq
from diffuse_compress.quantization.algorithms.adaround import SoftRounding
from diffuse_compress.quantization.algorithms.awq import AWQConfig
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, SequenceConfig
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.tesseraq import ScaledRounding, TesseraQConfig, soft_shares
from diffuse_compress.quantization.algorithms.twin import unchanged_twin
from diffuse_compress.quantization.numerics import choose_qparams, dequantize, quantize_weight
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.scheme import (
    NumberFormat,
    PerChannel,
    PerGroup,
    PerInputGroup,
    PerTensor,
    Scheme,
    WeightScheme,
)

INT3 = NumberFormat.INT3
SCHEMES = {
    "channel": WeightScheme(INT3, PerChannel()),
    "tensor": WeightScheme(INT3, PerTensor(), symmetric=False),
    "group": WeightScheme(INT3, PerGroup(64, pad=True), symmetric=False),
    "rows": WeightScheme(INT3, PerInputGroup(32), symmetric=False),
    "float-zero": WeightScheme(INT3, PerGroup(32), symmetric=False, float_zero_point=True),
    "additive": WeightScheme(INT3, PerGroup(32), symmetric=False, additive_zero_point=True),
    "two-level": PRESETS["w4a8"].scheme.weight,
}
W3 = Scheme(WeightScheme(INT3, PerGroup(64), symmetric=False))
SHORT = TesseraQConfig(iterations=5, stages=8)


def scaled(scheme: WeightScheme) -> ScaledRounding:
    weight = torch.randn(48, 160 if scheme is SCHEMES["group"] else 128)
    return ScaledRounding(SoftRounding(weight, scheme, choose_qparams(weight, scheme)))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_hardened_variables_and_learned_scales_are_what_is_stored(scheme: WeightScheme) -> None:
    found = scaled(scheme)
    assert torch.equal(found.hard(), found.rounding.hard())  # a factor of 1 at first
    found.u = 0.3 * torch.randn_like(found.u)
    found.rounding.v += 2 * torch.randn_like(found.rounding.v)
    before = found.hard()
    for share in soft_shares(5):
        found.harden(share)
        soft = found.rounding.v.isfinite()
        assert int(soft.sum()) == int(share * soft.numel())
        assert torch.equal(found.hard(), before)
    assert torch.equal(found.soft(), before)
    stored = found.quantized()
    assert torch.allclose(dequantize(stored), before, atol=1e-6)
    plain = quantize_weight(found.rounding.hard(), scheme, found.rounding.qparams)
    assert torch.equal(stored.qweight, plain.qweight)
    assert not torch.equal(stored.scale, plain.scale)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_gradients_are_those_of_autograd(scheme: WeightScheme) -> None:
    found = scaled(scheme)
    found.u = 0.3 * torch.randn_like(found.u)
    found.rounding.v += torch.randn_like(found.rounding.v)
    found.harden(0.5)
    of_weight = torch.randn(found.soft().shape)
    found.set_gradients(of_weight.clone())

    def loss(u: torch.Tensor) -> float:
        trial = copy.copy(found)
        trial.u = u
        return float((trial.soft().double() * of_weight).sum())

    direction, step = torch.randn_like(found.u), 1e-2
    slope = (loss(found.u + step * direction) - loss(found.u - step * direction)) / (2 * step)
    assert float((found.u.grad * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=2e-2)
    hard = ~found.rounding.v.isfinite()
    assert hard.any()
    assert (found.rounding.v.grad[hard] == 0).all()
    assert (found.rounding.v.grad[~hard] != 0).any()


def test_share_of_soft_variables_falls_to_none() -> None:
    shares = soft_shares(20)
    assert shares[0] == pytest.approx(0.75)
    assert shares[-2:] == [pytest.approx(0.005), 0.0]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 20
    assert soft_shares(1) == [0.0]
    assert soft_shares(2) == [0.75, 0.0]


@pytest.mark.parametrize("start", ["gptq", "nearest"])
def test_no_iterations_keep_the_start(start: str) -> None:
    torch.manual_seed(3)
    block = Block()
    ours, config = copy.deepcopy(block), TesseraQConfig(iterations=0, start=start)
    work = work_of(block, W3, inputs(2), unchanged=unchanged_twin(block))
    with contextlib.ExitStack() as stack:
        for name, collector in tesseraq.inputs_of(work):
            layer = work.layers[name]
            rounding = tesseraq.first_rounding(layer, tesseraq.aim_of(layer, collector, config), config)
            layer.quantized = rounding.quantized()
            stack.enter_context(tesseraq.seen_as_quantized(layer, rounding.hard()))
    calibrated(ours, W3, config, inputs(2))
    for name, layer in work.layers.items():
        assert layer.quantized is not None
        assert torch.equal(ours.get_submodule(name).qweight, layer.quantized.qweight)
        assert torch.equal(ours.get_submodule(name).scale, layer.quantized.scale)


@pytest.mark.parametrize(
    ("algorithm", "factor"),
    [
        (SHORT, 0.95),
        (SequenceConfig((AWQConfig(num_ratios=5), TesseraQConfig(iterations=5, stages=8, start="nearest"))), 1.0),
    ],
    ids=["gptq", "awq"],
)
def test_beats_rounding_and_its_start_on_inputs_that_were_not_seen(algorithm: AlgorithmConfig, factor: float) -> None:
    torch.manual_seed(3)
    dense = Block()
    ours, gptq, plain = (copy.deepcopy(dense) for _ in range(3))
    fresh = inputs(4, seed=0)[2:] + inputs(2, seed=1)
    calibrated(ours, W3, algorithm, inputs(8))
    calibrated(gptq, W3, GPTQConfig(), inputs(8))
    calibrated(plain, W3, RTNConfig(), inputs(1))
    mine, theirs, rounded = (error(block, dense, fresh) for block in (ours, gptq, plain))
    assert mine < factor * theirs, (mine, theirs)
    assert mine < 0.8 * rounded, (mine, rounded)


def test_a_block_is_never_further_off_than_at_the_start() -> None:
    torch.manual_seed(5)
    dense, calls = Block(), inputs(4)
    start, kept, learned = (copy.deepcopy(dense) for _ in range(3))
    calibrated(start, W3, TesseraQConfig(iterations=0), calls)
    calibrated(kept, W3, TesseraQConfig(iterations=1, stages=1, learning_rate=50.0, scale_learning_rate=3.0), calls)
    calibrated(learned, W3, SHORT, calls)
    assert error(learned, dense, calls) < 0.9 * error(start, dense, calls)
    for one, other in zip(start.children(), kept.children(), strict=True):
        assert torch.equal(one.qweight, other.qweight)
        assert torch.equal(one.scale, other.scale)


def test_scales_are_learned_unless_told_not_to() -> None:
    torch.manual_seed(5)
    dense, calls = Block(), inputs(4)
    start, fixed, free = (copy.deepcopy(dense) for _ in range(3))
    calibrated(start, W3, TesseraQConfig(iterations=0), calls)
    calibrated(fixed, W3, TesseraQConfig(iterations=5, stages=4, scale_learning_rate=0.0), calls)
    calibrated(free, W3, TesseraQConfig(iterations=5, stages=4), calls)
    assert torch.equal(fixed.up.scale, start.up.scale)
    assert not torch.equal(free.up.scale, start.up.scale)


@pytest.mark.parametrize("name", ["llama", "pixart"])
def test_models_are_compressed_resumed_saved_and_reloaded(name: str, tmp_path: Path) -> None:
    algorithm = [dc.AWQConfig(num_ratios=2), dc.TesseraQConfig(iterations=1, stages=1, batch_size=1)]
    scheme = dc.Scheme(dc.WeightScheme(INT3, dc.PerGroup(32, pad=True), symmetric=False))
    config = dc.QuantizationConfig(scheme, algorithm=algorithm)
    items = [tiny.inputs_for(tiny.build(name), seed=seed) for seed in range(2)]

    def compressed(**given: Any) -> Any:
        return tiny.build(name).compress(config, calibration=items, measure=False, **given)

    model = compressed(work_dir=tmp_path / "work")
    model.save_pretrained(tmp_path / "saved")
    for other in (compressed(work_dir=tmp_path / "work"), type(model).from_pretrained(tmp_path / "saved")):
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[key]), key
    again = type(model).from_pretrained(tmp_path / "saved")
    assert dc.compression_recipe(again).to_dict() == dc.compression_recipe(model).to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": -1}, "iterations >= 0"),
        ({"stages": 0}, "stages >= 1"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"scale_learning_rate": -1.0}, "scale_learning_rate >= 0"),
        ({"ridge": -1.0}, "ridge >= 0"),
        ({"observer": "hqq"}, "observer must be"),
        ({"start": "awq"}, "start must be"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"TesseraQConfig: .*{message}"):
        TesseraQConfig(**fields)
    with pytest.raises(ConfigError, match="TesseraQConfig: rounds up or down to integer codes, got float8"):
        TesseraQConfig().check(PRESETS["fp8"].scheme.weight)
