"""Static input scales: their ranges, when they are chosen, and what algorithms make of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffuse_compress as dc
from calibrated_block import Block, calibrated, error, inputs, work_of
from diffuse_compress.calls import Call
from diffuse_compress.quantization.algorithms import base
from diffuse_compress.quantization.algorithms.awq import _observed, _tried
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, SequenceConfig
from diffuse_compress.quantization.algorithms.block import BlockWork
from diffuse_compress.quantization.algorithms.rtn import quantize
from diffuse_compress.quantization.algorithms.svdquant import _Trial
from diffuse_compress.quantization.rotation import rotate
from tolerance import KERNEL, assert_close

MINMAX, SYMMETRIC = dc.ObserverConfig("minmax"), dc.ActivationScheme("int8", dc.PerTensor(), dynamic=False)
ASYMMETRIC, FP8 = replace(SYMMETRIC, symmetric=False), replace(SYMMETRIC, format=dc.NumberFormat.FLOAT8_E4M3)
W8 = dc.WeightScheme("int8")
W8A8 = dc.Scheme(W8, ASYMMETRIC)


def given_to(block: nn.Module, calls: list[Call]) -> dict[str, torch.Tensor]:
    """What each layer is given in all calls together, as one flat float64 tensor."""
    found: dict[str, list[torch.Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: found.setdefault(name, []).append(args[0]))
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        for call in calls:
            call.run(block)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.flatten() for x in values]).double() for name, values in found.items()}


def grid(low: float, high: float, act: dc.ActivationScheme) -> tuple[float, int]:
    """(scale, zero point) whose codes span a range around 0."""
    if act.symmetric:
        return max(-low, high) / (127 if act.format.is_integer else 448), 0
    scale = (high - low) / 255
    return scale, round(-128 - low / scale)


def on_grid(x: torch.Tensor, scale: float, zero: int, act: dc.ActivationScheme) -> torch.Tensor:
    if not act.format.is_integer:
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale
    return ((x / scale).round() + zero).clamp(-127 if act.symmetric else -128, 127).sub(zero) * scale


@pytest.mark.parametrize("act", [SYMMETRIC, ASYMMETRIC, FP8], ids=["symmetric", "asymmetric", "fp8"])
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_ranges_are_those_of_all_values_seen(act: dc.ActivationScheme, observer: str) -> None:
    """Against the order statistics themselves, and the best of a dense grid of ranges: no histogram here."""
    dense = Block()
    seen = given_to(dense, inputs(3))
    weight = W8 if act.format.is_integer else dc.WeightScheme(act.format)
    config = dc.ObserverConfig(observer, norm=2.0, percentile=99.5)
    calibrated(dense, dc.Scheme(weight, act), dc.RTNConfig(), inputs(3), observer=config)
    for name, x in seen.items():
        layer = dense.get_submodule(name)
        scale, zero = float(layer.input_scale), int(layer.input_zero_point or 0)
        low, high = float(x.min()), float(x.max())
        if observer == "percentile":
            tail = 0.005 if act.symmetric else 0.0025
            ordered = (x.abs() if act.symmetric else x).sort().values
            high = float(ordered[int((1 - tail) * len(x))])
            low = -high if act.symmetric else float(ordered[int(tail * len(x))])
        if observer != "mse":
            expected = grid(min(low, 0.0), max(high, 0.0), act)
            assert abs(scale / expected[0] - 1) < (1e-6 if observer == "minmax" else 0.01), name
            assert abs(zero - expected[1]) <= (0 if observer == "minmax" else 1), name
            continue
        ratios = torch.linspace(0.2, 1, 60, dtype=torch.float64).tolist()
        ranges = [(a * low, b * high) for a in ratios[::3] for b in ratios[::3]] if not act.symmetric else []
        ranges += [(ratio * low, ratio * high) for ratio in ratios]
        errors = [(on_grid(x, *grid(*ends, act), act) - x).square().mean() for ends in ranges]
        assert (on_grid(x, scale, zero, act) - x).square().mean() < 1.02 * min(errors), name


class _Naive(nn.Module):
    """A quantized layer in float64, from its codes, scale and zero point."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        weight = layer.qweight.double() * layer.scale.double()
        self.layer, self.weight = layer, weight.reshape(layer.weight.shape)
        self.scale, self.zero = float(layer.input_scale), int(layer.input_zero_point or 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, layer = on_grid(x, self.scale, self.zero, layer_act(self.layer)), self.layer
        bias = layer.bias.double()
        if isinstance(layer, nn.Linear):
            return F.linear(x, self.weight, bias)
        return F.conv2d(x, self.weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def layer_act(layer: Any) -> dc.ActivationScheme:
    return layer.scheme.activation


class Pictures(nn.Module):
    """Convolutions, one of them grouped, and a linear that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=4)
        self.unused = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.silu(self.first(x)))


@pytest.mark.parametrize("act", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_the_block_computes_what_its_static_grids_say(act: dc.ActivationScheme) -> None:
    for block, calls in (
        (Block(), inputs(2)),
        (Pictures(), [Call((torch.randn(2, 8, 6, 6) + 0.5,)) for _ in range(2)]),
    ):
        calibrated(block, dc.Scheme(W8, act), dc.RTNConfig(), calls, observer=MINMAX)
        naive = copy.deepcopy(block)
        for name, layer in list(naive.named_children()):
            if layer.scheme.has_static_inputs:
                setattr(naive, name, _Naive(layer))
        with torch.no_grad():
            for call in calls:
                expected = Call((call.args[0].double(),)).run(naive)
                # Codes of a value between two may differ between float32 and float64, by one step of one layer.
                assert_close(call.run(block).double(), expected, KERNEL[torch.float16])


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_a_layer_that_no_call_reaches_measures_its_inputs(algorithm: str) -> None:
    block, config = Pictures(), dc.QuantizationConfig(W8A8, algorithm).spec.algorithm
    calibrated(block, W8A8, config, [Call((torch.randn(2, 8, 6, 6),))])
    assert block.first.scheme == block.second.scheme == W8A8
    assert block.unused.scheme == dc.Scheme(W8, dc.ActivationScheme("int8"))
    assert block.unused.input_scale is None


@dataclass(frozen=True)
class Looks(AlgorithmConfig):
    kind: ClassVar[str] = "looks"
    needs_calibration: ClassVar[bool] = True
    seen: ClassVar[dict[str, torch.Tensor]] = {}


def look(work: BlockWork, config: Looks) -> None:
    """Keep the inputs that whatever chooses codes would see."""

    class Keep:
        def __init__(self, name: str) -> None:
            self.name = name

        def update(self, rows: torch.Tensor) -> None:
            Looks.seen[self.name] = rows

    work.collect({name: Keep(name) for name in work.layers}, quantized_inputs=True)


@pytest.mark.parametrize(
    "before",
    [
        dc.SmoothQuantConfig(),
        dc.AWQConfig(num_ratios=3, clip_rows=32),
        dc.SVDQuantConfig(rank=4, num_alphas=2, iterations=1, num_rows=32),
        dc.QuaRotConfig(),
    ],
    ids=lambda config: config.kind,
)
def test_inputs_are_smoothed_and_rotated_then_ranges_are_chosen_then_codes(
    before: AlgorithmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(base._BLOCK_REGISTRY, Looks, look)
    block, calls = Block(), inputs(2)
    scheme = before.format_of(nn.Linear(128, 128), W8A8)
    seen = given_to(block, calls)
    algorithm = SequenceConfig((before, Looks()))
    calibrated(block, scheme, algorithm, calls, observer=MINMAX)
    moved = 0
    for name, x in seen.items():
        layer = block.get_submodule(name)
        x = x.reshape(-1, layer.in_features).float()
        if layer.act_pre_scale is not None:
            moved += int(not torch.equal(layer.act_pre_scale, torch.ones_like(layer.act_pre_scale)))
            x = x * layer.act_pre_scale
        if layer.scheme.input_rotation is not None:
            moved, x = moved + 1, rotate(x, layer.scheme.input_rotation)
        scale, zero = grid(min(float(x.min()), 0.0), max(float(x.max()), 0.0), ASYMMETRIC)
        assert abs(float(layer.input_scale) / scale - 1) < 1e-5
        assert abs(int(layer.input_zero_point) - zero) <= 1  # a tie may fall either way
        codes = Looks.seen[name] / layer.input_scale + layer.input_zero_point
        assert_close(codes, codes.round(), KERNEL[torch.float32])
        assert codes.min() >= -128.01
        assert codes.max() <= 127.01
    assert moved


ALGORITHMS = [
    "hqq",
    dc.GPTQConfig(),
    dc.GPTQConfig(asymmetric=True, true_sequential=False),
    dc.AdaRoundConfig(iterations=5),
    dc.BRECQConfig(iterations=3, batch_size=1),
    [dc.AWQConfig(num_ratios=4, clip_rows=32), dc.GPTQConfig()],
    [dc.QuaRotConfig(), dc.SVDQuantConfig(rank=4, num_alphas=2, iterations=2, num_rows=32)],
]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a if isinstance(a, str) else repr(a)[:40])
def test_every_algorithm_is_near_to_its_dynamic_self(algorithm: Any) -> None:
    """Ranges of the right values cost little at 8 bits; of wrong ones, a multiple."""
    config = dc.QuantizationConfig(dc.Scheme(replace(W8, symmetric=algorithm != "hqq")), algorithm).spec.algorithm
    dense, errors = Block(), []
    for activation in (ASYMMETRIC, dc.ActivationScheme("int8", dc.PerTensor())):
        scheme = dc.Scheme(replace(W8, symmetric=algorithm != "hqq"), activation)
        block = copy.deepcopy(dense)
        calibrated(block, config.format_of(dense.to_q, scheme), config, inputs(2))
        assert all(layer.scheme.activation == activation for layer in block.children())
        errors.append(error(block, dense, inputs(2)))
    assert errors[0] < 1.5 * errors[1], errors


def test_awq_tries_scales_with_the_static_range_they_will_get() -> None:
    block, calls = Block(), inputs(2)
    work = work_of(block, W8A8, calls, observer=MINMAX)
    layer, scale = work.layers["up"], torch.rand(128) + 0.5
    parent, observed, given, _ = _observed(work, [layer])
    with _tried([layer], [layer.rest()], scale, None, given, MINMAX), torch.no_grad():
        tried = observed[0][1].run(parent)
    assert torch.equal(parent.weight, layer.dense.weight)
    layer.act_pre_scale = 1.0 / scale
    work.layers = {"up": layer}
    work.observe_inputs()
    layer.quantized = quantize(layer.target(), W8, dc.RTNConfig(observer="minmax"))
    done = work.install(layer)
    with torch.no_grad():
        assert_close(done(given[0]), tried, KERNEL[torch.float32])


def test_svdquant_tries_branches_with_static_inputs() -> None:
    block, calls = Block(), inputs(1)
    work = work_of(block, W8A8, calls, observer=MINMAX)
    layer, rows = work.layers["to_q"], calls[0].args[0].reshape(-1, 128)
    trial = _Trial(layer, rows, 4, MINMAX)
    nothing = (torch.zeros(4, 128), torch.zeros(layer.dense.out_features, 4))
    claimed = float(trial.error(nothing, trial.rounded(trial.rest(nothing))))
    work.observe_inputs()
    layer.quantized = quantize(layer.target(), W8, dc.RTNConfig(observer="minmax"))
    expected = layer.dense(rows).detach()
    with torch.no_grad():
        found = (work.install(layer)(rows) - expected).double().square().sum()
    assert abs(claimed / float(found) - 1) < 0.01
