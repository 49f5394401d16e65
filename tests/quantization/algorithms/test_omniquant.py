"""OmniQuant: gradients against finite differences, values against what is stored, and that blocks come nearer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from calibrated_block import Block, calibrated, error, inputs, work_of
from diffuse_compress.calibration.engine import calibrate_block
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms import omniquant
from diffuse_compress.quantization.algorithms.adaround import per_column
from diffuse_compress.quantization.algorithms.awq import AWQConfig
from diffuse_compress.quantization.algorithms.base import (
    AlgorithmConfig,
    SequenceConfig,
    algorithm_from_dict,
    algorithm_to_dict,
)
from diffuse_compress.quantization.algorithms.block import LayerWork
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.algorithms.omniquant import OmniQuantConfig, clipped_range, soft_input, soft_weight
from diffuse_compress.quantization.algorithms.quarot import QuaRotConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.smoothquant import SmoothQuantConfig
from diffuse_compress.quantization.numerics import (
    choose_qparams,
    dequantize,
    fake_quantize_activation,
    quantize_weight,
)
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    NumberFormat,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    WeightScheme,
)
from normed_block import NormedBlock, setter

INT4, INT2 = NumberFormat.INT4, NumberFormat.INT2
WEIGHTS = {
    "channel": WeightScheme(INT4, PerChannel()),
    "tensor": WeightScheme(INT4, PerTensor(), symmetric=False),
    "group": WeightScheme(NumberFormat.INT3, PerGroup(64, pad=True), symmetric=False),
    "float-zero": WeightScheme(INT4, PerGroup(32), symmetric=False, float_zero_point=True),
    "additive": WeightScheme(INT4, PerGroup(32), symmetric=False, additive_zero_point=True),
    "two-level": PRESETS["w4a8"].scheme.weight,
    "float8": WeightScheme(NumberFormat.FLOAT8_E4M3, PerChannel()),
}
W2 = Scheme(WeightScheme(INT2, PerGroup(32), symmetric=False))
W3 = Scheme(WeightScheme(NumberFormat.INT3, PerGroup(64), symmetric=False))
W4A4 = PRESETS["w4a4"].scheme
CALLS = inputs(6, 64)


def shares_of(weight: torch.Tensor, scheme: WeightScheme, value: float) -> torch.Tensor:
    return torch.full_like(clipped_range(weight, scheme, None, None)[0], value)


@pytest.mark.parametrize("scheme", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("share", [None, 0.7])
def test_soft_weights_are_what_the_codes_of_their_ranges_stand_for(scheme: WeightScheme, share: float | None) -> None:
    torch.manual_seed(0)
    layer = LayerWork("", nn.Linear(128, 12), Scheme(scheme))
    weight = layer.target()
    shares = None if share is None else shares_of(weight, scheme, share)
    found = soft_weight(weight, scheme, shares, shares)
    low, high = clipped_range(weight, scheme, shares, shares)
    if share is None:
        ranges = weight
    else:
        ends = [per_column(end, weight.shape, scheme) for end in (low, high)]
        ranges = weight.clamp(*ends)
        assert not torch.equal(ranges, weight)
    expected = dequantize(quantize_weight(weight, scheme, choose_qparams(ranges, scheme)))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["channel", "group", "additive"])
def test_gradients_of_clips_are_those_of_finite_differences(name: str) -> None:
    """In what rounding leaves alone: codes and zero points stay for a small step, but the weights' part goes straight.

    With code ``q`` the value is ``step * q``; straight through, ``d value / d step`` is ``q - w / step`` inside.
    """
    scheme, weight = WEIGHTS[name], torch.randn(6, 160, generator=torch.Generator().manual_seed(1))
    of_value = torch.randn(6, 160, generator=torch.Generator().manual_seed(2))
    logits = torch.full_like(clipped_range(weight, scheme, None, None)[0], 0.5).requires_grad_()

    def step_and_zero(logit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        ends = clipped_range(weight, scheme, torch.sigmoid(logit), torch.sigmoid(logit))
        qparams = omniquant.qparams_from_range(*(end.clone() for end in ends), scheme)
        zero = None if qparams.zero_point is None else per_column(qparams.zero_point.float(), weight.shape, scheme)
        return per_column(qparams.scale, weight.shape, scheme), zero

    with torch.no_grad():
        step, zero = step_and_zero(logits)
        offset = zero if scheme.additive_zero_point else torch.zeros(())
        low, high = (float(end) for end in scheme.range)
        shift = torch.zeros(()) if zero is None or scheme.additive_zero_point else zero
        codes = ((weight - offset) / step).round().add(shift).clamp(low, high) - shift
        clamped = (((weight - offset) / step) + shift <= low) | (((weight - offset) / step) + shift >= high)
        rounding = torch.where(clamped, torch.zeros(()), codes - (weight - offset) / step)

    def value(logit: torch.Tensor) -> torch.Tensor:
        """Inside, ``round(v) = v + const``; outside the code is an end of the range."""
        now, zero = step_and_zero(logit)
        offset = zero if scheme.additive_zero_point else torch.zeros(())
        return (of_value * (torch.where(clamped, now * codes + offset, weight + rounding * now))).sum()

    loss = (soft_weight(weight, scheme, torch.sigmoid(logits), torch.sigmoid(logits)) * of_value).sum()
    (found,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        for place in ((0, 0), (3, -1), (5, 0)):
            delta = torch.zeros_like(logits)
            delta[place] = 2e-3
            expected = (value(logits + delta) - value(logits - delta)) / 4e-3
            assert float(found[place]) == pytest.approx(float(expected), rel=0.02, abs=2e-3), place


@pytest.mark.parametrize("granularity", [PerToken(), PerTensor()], ids=["token", "tensor"])
@pytest.mark.parametrize("number", [NumberFormat.INT8, INT4, NumberFormat.FLOAT8_E4M3], ids=lambda number: number.value)
def test_soft_inputs_are_the_rounded_ones_and_reach_the_step(granularity: Any, number: NumberFormat) -> None:
    scheme, x = ActivationScheme(number, granularity), torch.randn(2, 5, 32)
    assert torch.allclose(soft_input(x, scheme), fake_quantize_activation(x, scheme), atol=1e-6)
    x = x.requires_grad_()
    soft_input(x, scheme).sum().backward()
    largest = x.detach().abs().argmax(dim=-1)
    assert x.grad is not None
    rest = torch.ones_like(x).scatter_(-1, largest.unsqueeze(-1), 0).bool()
    assert torch.allclose(x.grad[rest], torch.ones(()), atol=1e-5)
    assert (x.grad.gather(-1, largest.unsqueeze(-1)) != 1).any()


def quantized_by(dense: nn.Module, algorithm: AlgorithmConfig, scheme: Scheme, **given: Any) -> nn.Module:
    block = copy.deepcopy(dense)
    change = setter(block) if given.pop("fold", False) else None
    calibrated(block, scheme, algorithm, CALLS[:4], change=change, **given)
    return block


@pytest.mark.parametrize(
    ("first", "config", "scheme"),
    [
        (RTNConfig(), OmniQuantConfig(epochs=0), W3),
        (SmoothQuantConfig(alpha=0.75), OmniQuantConfig(epochs=0), W4A4),
        (AWQConfig(num_ratios=4), SequenceConfig((AWQConfig(num_ratios=4), OmniQuantConfig(epochs=0))), W3),
    ],
    ids=["rtn", "smoothquant", "awq"],
)
def test_without_steps_it_is_where_it_starts(first: AlgorithmConfig, config: AlgorithmConfig, scheme: Scheme) -> None:
    torch.manual_seed(3)
    dense = NormedBlock(offset=1.0)
    ours, plain = (dict(quantized_by(dense, one, scheme).named_parameters()) for one in (config, first))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("start", "scheme", "factor", "epochs"),
    [((), W2, 0.95, 10), ((), W4A4, 0.8, 10), ((AWQConfig(num_ratios=4),), W2, 0.97, 40)],
    ids=["w2", "w4a4", "awq-w2"],
)
def test_the_block_comes_nearer_than_where_it_starts(start: Any, scheme: Scheme, factor: float, epochs: int) -> None:
    torch.manual_seed(3)
    dense = NormedBlock(offset=1.0)
    steps = [*start, OmniQuantConfig(epochs=epochs)]
    ours = quantized_by(dense, SequenceConfig(tuple(steps)) if start else steps[0], scheme)
    first = start[0] if start else RTNConfig()
    plain = quantized_by(dense, first, scheme)
    seen, fresh = CALLS[:4], CALLS[4:]
    assert error(ours, dense, seen) < factor * error(plain, dense, seen)
    assert error(ours, dense, fresh) < error(plain, dense, fresh)


def test_what_is_worse_is_not_kept_and_what_was_learned_is_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    dense = NormedBlock(offset=1.0)
    plain = quantized_by(dense, RTNConfig(), W3)
    wild = quantized_by(dense, OmniQuantConfig(epochs=1, clip_rate=50.0), W3)
    assert all(torch.equal(a, b) for a, b in zip(wild.parameters(), plain.parameters(), strict=True))
    learned: dict[str, torch.Tensor] = {}
    write = omniquant._write

    def noting(work: Any, soft: Any, config: Any) -> None:
        with torch.no_grad():
            learned.update({one.layer.name: one.weight() for one in soft})
        write(work, soft, config)

    monkeypatch.setattr(omniquant, "_write", noting)
    ours = quantized_by(dense, OmniQuantConfig(epochs=2), W4A4)
    assert learned.keys() == {"to_q", "to_k", "to_v", "to_out", "up", "down"}
    for name, value in learned.items():
        layer: Any = ours.get_submodule(name)
        assert torch.allclose(dequantize(layer.quantized_weight()), value, atol=1e-6), name


def test_shifts_go_where_a_bias_takes_them() -> None:
    torch.manual_seed(3)
    dense = NormedBlock()
    folded = quantized_by(dense, OmniQuantConfig(epochs=3, fold=True), W4A4, fold=True)
    kept = quantized_by(dense, OmniQuantConfig(epochs=3, shift=True), W4A4)
    for block, at_run_time in ((folded, False), (kept, True)):
        layer: Any = block.get_submodule("to_q")
        assert (layer.act_pre_shift is not None) == at_run_time
    assert not torch.equal(folded.norm1.bias, dense.norm1.bias / dense.norm1.weight * folded.norm1.weight)
    assert error(folded, dense, CALLS) < error(quantized_by(dense, SmoothQuantConfig(0.75), W4A4), dense, CALLS)


def test_codes_of_others_build_on_it_and_it_on_rotations_and_static_inputs() -> None:
    torch.manual_seed(3)
    dense = NormedBlock(offset=1.0)
    static = Scheme(
        WeightScheme(NumberFormat.INT8),
        ActivationScheme(NumberFormat.INT8, PerTensor(), dynamic=False, symmetric=False),
    )
    short = OmniQuantConfig(epochs=1)
    for config, scheme in (
        (SequenceConfig((short, GPTQConfig())), W3),
        (SequenceConfig((QuaRotConfig(), short)), W4A4),
        (short, static),
        (OmniQuantConfig(epochs=1, clip=False, aug_loss=True, batch_size=2), W4A4),
    ):
        formats = config.format_of(dense.to_q, scheme)
        assert error(quantized_by(dense, config, formats), dense, CALLS) < 0.5


def test_convolutions_learn_too() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3))
    calls = [Call((torch.randn(2, 8, 6, 6),)) for _ in range(3)]
    errors = []
    for algorithm in (OmniQuantConfig(epochs=4), SmoothQuantConfig(0.75)):
        block = copy.deepcopy(dense)
        calibrate_block(work_of(block, PRESETS["w4a8"].scheme, calls), algorithm)
        errors.append(error(block, dense, calls))
    assert errors[0] < errors[1]


class InPlace(Block):
    """A block that changes what gradients are computed from."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.to_q(x)
        y = torch.exp(h)
        h = self.to_out(y)
        y.mul_(2)
        return h + y


def test_blocks_without_gradients_and_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^block: OmniQuant needs gradients of the block.*AWQConfig\(\) needs none"):
        calibrated(InPlace(64), W3, OmniQuantConfig(epochs=1), CALLS[:2])
    for given, message in (
        ({"clip": False, "transform": False}, "nothing is learned"),
        ({"shift": True, "transform": False}, "shifts are learned with scales"),
        ({"epochs": -1}, "epochs >= 0"),
        ({"clip_rate": 0.0}, "positive rates"),
        ({"alpha": 2.0}, r"alpha must be in \[0, 1\]"),
        ({"fold": 1}, "fold is True, False or None"),
        ({"transform": "yes"}, "transform is True, False or None"),
    ):
        with pytest.raises(ConfigError, match=message):
            OmniQuantConfig(**given)
    config = OmniQuantConfig(epochs=3, shift=True, aug_loss=True)
    assert algorithm_from_dict(algorithm_to_dict(config)) == config
    with pytest.raises(ConfigError, match="SmoothQuantConfig has nothing to do after OmniQuantConfig"):
        SequenceConfig((OmniQuantConfig(), SmoothQuantConfig()))
