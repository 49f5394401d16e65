"""AdaRound and BRECQ: their mathematics against autograd and brute force, and that they beat rounding and GPTQ."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn

from calibrated_block import Block, calibrated, error, inputs, work_of
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms import brecq
from diffuse_compress.quantization.algorithms.adaround import (
    AdaRoundConfig,
    Aim,
    Annealing,
    SoftRounding,
    aim_of,
    first_rounding,
    round_adaptively,
)
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, SequenceConfig
from diffuse_compress.quantization.algorithms.block import LayerWork
from diffuse_compress.quantization.algorithms.brecq import BRECQConfig
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig, HessianCollector, round_columns
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.smoothquant import SmoothQuantConfig
from diffuse_compress.quantization.algorithms.twin import unchanged_twin
from diffuse_compress.quantization.numerics import choose_qparams, dequantize, quantize_weight
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.scheme import NumberFormat, PerChannel, PerGroup, PerTensor, Scheme, WeightScheme

INT4 = NumberFormat.INT4
SCHEMES = {
    "channel": WeightScheme(INT4, PerChannel()),
    "tensor": WeightScheme(INT4, PerTensor(), symmetric=False),
    "group": WeightScheme(NumberFormat.INT3, PerGroup(64, pad=True), symmetric=False),
    "float-zero": WeightScheme(INT4, PerGroup(32), symmetric=False, float_zero_point=True),
    "additive": WeightScheme(INT4, PerGroup(32), symmetric=False, additive_zero_point=True),
    "two-level": PRESETS["w4a8"].scheme.weight,
}
W4 = Scheme(WeightScheme(INT4, PerGroup(64), symmetric=False))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_soft_rounding_starts_at_the_weight_and_ends_on_the_grid(scheme: WeightScheme) -> None:
    weight = torch.randn(12, 160 if scheme is SCHEMES["group"] else 128)
    qparams = choose_qparams(weight, scheme)
    rounding = SoftRounding(weight, scheme, qparams)
    inside = (rounding.soft() - weight).abs() < 1e-5
    # The range of a symmetric scheme, or one whose zero point was rounded, may end before the weight does.
    assert inside.float().mean() > 0.97
    nearest = quantize_weight(weight, scheme, qparams)
    same = (rounding.hard() - dequantize(nearest)).abs() < 1e-6
    assert same.float().mean() > 0.999  # but for ties
    assert torch.equal(rounding.quantized().qweight, quantize_weight(rounding.hard(), scheme, qparams).qweight)
    rounding.v = -rounding.v
    assert torch.allclose(dequantize(rounding.quantized()), rounding.hard(), atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_begins_at_codes_with_the_neighbour_downhill(scheme: WeightScheme) -> None:
    weight, downhill = torch.randn(12, 128), torch.randn(12, 128)
    qparams = choose_qparams(weight, scheme)
    rounding = SoftRounding(weight, scheme, qparams)
    codes = dequantize(quantize_weight(weight + 0.3 * torch.randn(12, 128), scheme, qparams))
    rounding.begin_at(codes, downhill)
    assert torch.allclose(rounding.hard(), codes, atol=1e-6)
    step = (rounding.soft() - codes) / rounding._scale
    assert torch.allclose(step.abs(), torch.tensor(0.1), atol=1e-4)  # inside the range, so that it can be learned
    rounding.v = -rounding.v
    other = (rounding.hard() - codes) / rounding._scale
    assert torch.allclose(other.abs(), torch.tensor(1.0), atol=1e-4)
    low, high = (SoftRounding(weight, scheme, qparams)._decode(torch.full((12, 128), float(n))) for n in scheme.range)
    inside = (codes > low + 1e-6) & (codes < high - 1e-6)
    assert torch.equal(other[inside] > 0, downhill[inside] > 0)


def moments(x: torch.Tensor, reference: torch.Tensor) -> HessianCollector:
    collector = HessianCollector(x.shape[1], x.device)
    for start in range(0, len(x), 50):
        collector.update(x[start : start + 50], reference[start : start + 50])
    return collector


def test_cost_is_the_squared_error_of_the_output_and_the_ridge_but_for_a_constant() -> None:
    """In float64, of weights that have nothing to do with each other; the first channel is an outlier."""
    x = torch.randn(200, 24) @ torch.randn(24, 24) / 5
    x[:, 0] *= 50
    reference, layer = x + 0.1 * torch.randn(200, 24), LayerWork("", nn.Linear(24, 16), W4)
    found = aim_of(layer, moments(x, reference), AdaRoundConfig(ridge=2.0))
    median = (x.double().square().sum(dim=0) * 2 / 200).sort().values[11]
    weight, differences = layer.target().double(), []
    for _ in range(8):
        trial = torch.randn(16, 24)
        error = (x.double() @ trial.double().t() - reference.double() @ weight.t()).square().sum(dim=0) * 2 / 200
        ridge = 2.0 * 24 / 200 * median * (trial.double() - weight).square().sum(dim=1)
        differences.append((error + ridge - found.cost(trial)) / error)
    assert torch.stack(differences).std(dim=0).max() < 1e-4
    diagonal = x[:20].square().sum(dim=0) * 2 / 20
    for ridge, share in ((0.0, 0.01), (100.0, 1.0)):
        limited = aim_of(layer, moments(x[:20], x[:20]), AdaRoundConfig(ridge=ridge))
        assert torch.allclose(torch.diagonal(limited.hessian), diagonal + share * diagonal.median())
        assert torch.equal(limited.weight, layer.target())  # nothing to make up for


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_starts_at_the_codes_of_gptq_and_no_row_gets_worse(scheme: WeightScheme) -> None:
    x = torch.randn(300, 32) @ torch.randn(32, 128) + 0.2 * torch.randn(300, 128)
    layer = LayerWork("", nn.Linear(128, 24), Scheme(scheme))
    config = AdaRoundConfig(iterations=60)
    found = aim_of(layer, moments(x, x + 0.1 * torch.randn(300, 128)), config)
    rounding = first_rounding(layer, found, config)
    gptq = GPTQConfig(damping=1e-6)
    codes, qparams = round_columns(found.weight.clone(), found.hessian.clone(), scheme, gptq)
    assert torch.equal(rounding.quantized().qweight, quantize_weight(codes, scheme, qparams).qweight)
    before = found.cost(rounding.hard())
    round_adaptively(rounding, found, config)
    after = found.cost(rounding.hard())
    assert (after <= before).all()
    assert after.sum() < before.sum()
    nearest = first_rounding(layer, found, AdaRoundConfig(start="nearest"))
    assert found.cost(nearest.hard()).sum() > before.sum()
    layer.ranges = 0.7 * layer.target()  # as AWQ chooses some
    for start in ("gptq", "nearest"):
        clipped = first_rounding(layer, found, AdaRoundConfig(start=start))
        assert torch.equal(clipped.qparams.scale, choose_qparams(layer.ranges, scheme).scale)


def test_no_input_gives_plain_rounding() -> None:
    layer = LayerWork("", nn.Linear(128, 24), W4)
    found = aim_of(layer, moments(torch.zeros(10, 128), torch.zeros(10, 128)), AdaRoundConfig())
    rounding = first_rounding(layer, found, AdaRoundConfig(observer="minmax"))
    round_adaptively(rounding, found, AdaRoundConfig())
    plain = quantize_weight(layer.target(), W4.weight)
    assert torch.equal(rounding.quantized().qweight, plain.qweight)


@pytest.mark.parametrize("exponent", [None, 20.0, 2.0])
def test_gradient_is_that_of_autograd(exponent: float | None) -> None:
    scheme, weight = SCHEMES["group"], torch.randn(6, 128)
    qparams = choose_qparams(weight, scheme, 0.8)  # some codes are clamped
    rounding, of_weight = SoftRounding(weight, scheme, qparams), torch.randn(6, 128)
    v = rounding.v.double().requires_grad_()
    h = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
    scale = qparams.scale.repeat_interleave(64, dim=1).double()
    zero = qparams.zero_point.repeat_interleave(64, dim=1).double()
    codes = ((weight / scale.float() + zero.float()).floor().double() + h).clamp(*scheme.range)
    loss = (scale * (codes - zero) * of_weight).sum()
    if exponent is not None:
        loss = loss + 0.3 * (1 - (2 * h - 1).abs() ** exponent).sum()
    (expected,) = torch.autograd.grad(loss, v)
    found = rounding.gradient(of_weight.clone(), 0.3, exponent)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert (found == 0).any() == (exponent is None)  # where codes are clamped, the regulariser alone has a say


def test_exponent_waits_and_then_falls() -> None:
    annealing = Annealing(iterations=100, warmup=0.2)
    assert annealing(19) is None
    assert annealing(20) == 20.0
    assert annealing(60) == pytest.approx(11.0)
    assert annealing(99) == pytest.approx(2.0, abs=0.3)


def test_few_weights_are_rounded_as_brute_force_does() -> None:
    """All 2^8 ways to round each row of eight weights, on correlated inputs that differ from the reference's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
    x = x + 0.1 * torch.randn(64, 8, generator=generator)
    reference = x + 0.1 * torch.randn(64, 8, generator=generator)
    weight = torch.randn(16, 8, generator=generator)
    scheme = WeightScheme(NumberFormat.INT3, PerChannel())
    rounding = SoftRounding(weight, scheme, choose_qparams(weight, scheme))

    def loss(value: torch.Tensor) -> torch.Tensor:
        return (x @ value.t() - reference @ weight.t()).square().sum(dim=0)

    hessian = x.t() @ x
    aim = Aim(weight + weight @ (reference - x).t() @ x @ torch.linalg.inv(hessian), hessian)
    start, best = loss(rounding.hard()), torch.full((16,), float("inf"))
    trial = copy.copy(rounding)
    for choice in itertools.product((-1.0, 1.0), repeat=8):
        trial.v = torch.tensor(choice).expand(16, 8)
        best = torch.minimum(best, loss(trial.hard()))
    round_adaptively(rounding, aim, AdaRoundConfig(iterations=1000, learning_rate=0.03))
    found = loss(rounding.hard())
    assert (found <= start).all()
    assert (found - best).sum() < 0.3 * (start - best).sum(), (start, found, best)


@pytest.mark.parametrize(
    ("algorithm", "scheme", "factor"),
    [
        (AdaRoundConfig(iterations=100), W4, 0.9),
        (BRECQConfig(iterations=100, batch_size=2), W4, 0.9),
        (BRECQConfig(iterations=100, batch_size=2), PRESETS["w4a8"].scheme, 0.95),
    ],
    ids=["adaround-w4", "brecq-w4", "brecq-w4a8"],
)
def test_beats_gptq_on_inputs_that_were_not_seen(algorithm: AlgorithmConfig, scheme: Scheme, factor: float) -> None:
    torch.manual_seed(3)
    dense = Block()
    ours, gptq, plain = (copy.deepcopy(dense) for _ in range(3))
    fresh = inputs(4, seed=0)[2:] + inputs(2, seed=1)
    calibrated(ours, scheme, algorithm, inputs(8))
    calibrated(gptq, scheme, GPTQConfig(), inputs(8))
    calibrated(plain, scheme, RTNConfig(), inputs(1))
    mine, theirs, rounded = (error(block, dense, fresh) for block in (ours, gptq, plain))
    assert mine < factor * theirs, (mine, theirs)
    assert mine < 0.9 * rounded, (mine, rounded)


class Louder(Block):
    """The block, all of its outputs 1024 times as large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1024 * super().forward(x)


@pytest.mark.parametrize("algorithm", [AdaRoundConfig(iterations=30), BRECQConfig(iterations=30, batch_size=2)])
def test_size_of_outputs_does_not_matter(algorithm: AlgorithmConfig) -> None:
    """A power of two, so that nothing is rounded otherwise: the same codes to the bit."""
    torch.manual_seed(3)
    quiet, calls = Block(), inputs(4)
    loud = Louder()
    loud.load_state_dict(quiet.state_dict())
    calibrated(quiet, W4, algorithm, calls)
    calibrated(loud, W4, algorithm, calls)
    for ours, theirs in zip(quiet.children(), loud.children(), strict=True):
        assert torch.equal(ours.qweight, theirs.qweight)
    if isinstance(algorithm, AdaRoundConfig):  # and of the inputs of a layer
        layer, x = LayerWork("", nn.Linear(64, 24), W4), torch.randn(200, 64)
        codes = []
        for factor in (1.0, 1024.0):
            aim = aim_of(layer, moments(factor * x, factor * (x + 0.1)), algorithm)
            codes.append(first_rounding(layer, aim, algorithm))
            round_adaptively(codes[-1], aim, algorithm)
        assert torch.equal(*(rounding.quantized().qweight for rounding in codes))


def test_block_is_never_further_from_the_unchanged_one_than_adaround_leaves_it() -> None:
    torch.manual_seed(5)
    dense, calls = Block(), inputs(4)
    ours, layers = copy.deepcopy(dense), copy.deepcopy(dense)
    calibrated(layers, W4, AdaRoundConfig(iterations=40), calls)
    calibrated(ours, W4, BRECQConfig(iterations=40, batch_size=2), calls)
    assert error(ours, dense, calls) < 0.98 * error(layers, dense, calls)
    # A rate that leads astray: what was there before is kept.
    wild = {"iterations": 2, "learning_rate": 9.0, "regularization": 0.0}
    calibrated(start := copy.deepcopy(dense), W4, AdaRoundConfig(**wild), calls)
    calibrated(kept := copy.deepcopy(dense), W4, BRECQConfig(**wild), calls)
    for one, other in zip(start.children(), kept.children(), strict=True):
        assert (one.qweight == other.qweight).float().mean() > 0.999  # but for ties


def test_block_begins_with_layers_that_have_learned() -> None:
    torch.manual_seed(5)
    block, config = Block(), BRECQConfig(iterations=40)
    work = work_of(block, W4, inputs(4), unchanged=unchanged_twin(block))
    with contextlib.ExitStack() as stack:
        name, collector = next(brecq.inputs_of(work))
        found = brecq._begin(work, name, collector, config, stack)
    assert found.cost < float(found.aim.cost(first_rounding(found.layer, found.aim, config).hard()).sum())


class Failing(Block):
    """Stops at a call."""

    left = 10**9

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("stopped")
        return super().forward(x)


@pytest.mark.parametrize("left", [3, 20, 40])
def test_stopped_block_is_as_it_was(left: int) -> None:
    """While layers are looked at one after the other, and while they learn."""
    torch.manual_seed(3)
    block, calls = Failing(), inputs(2)
    before, expected = copy.deepcopy(block.state_dict()), calls[0].run(block)
    block.left = left
    with pytest.raises((RuntimeError, ConfigError), match="stopped"):
        calibrated(block, W4, BRECQConfig(iterations=50), calls, unchanged=Block())
    block.left = 1
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert torch.equal(calls[0].run(block), expected)


class Convolutions(nn.Module):
    """Two convolutions, one grouped, and a layer behind them; returns a tuple with something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.last = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, flag: bool = True) -> tuple[torch.Tensor, bool]:
        hidden = torch.nn.functional.silu(self.grouped(torch.nn.functional.silu(self.first(x))))
        return self.last(hidden.flatten(2).transpose(1, 2)), flag


@pytest.mark.parametrize("algorithm", [AdaRoundConfig(iterations=100), BRECQConfig(iterations=60)])
def test_convolutions(algorithm: AlgorithmConfig) -> None:
    torch.manual_seed(0)
    dense = Convolutions()
    basis = torch.randn(4, 16)
    calls = [Call((torch.einsum("bchw,cd->bdhw", torch.randn(2, 4, 8, 8), basis),), {"flag": True}) for _ in range(4)]
    scheme = Scheme(WeightScheme(INT4, PerGroup(32, pad=True), symmetric=False))
    ours, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    calibrated(ours, scheme, algorithm, calls)
    calibrated(plain, scheme, RTNConfig(), calls)

    def lost(block: nn.Module) -> float:
        with torch.no_grad():
            return float(sum((call.run(block)[0] - call.run(dense)[0]).square().sum() for call in calls))

    assert lost(ours) < 0.8 * lost(plain)


def test_block_aims_at_the_unchanged_model_and_draws_from_its_generator() -> None:
    torch.manual_seed(3)
    dense, calls = Block(), inputs(4)
    shifted = [Call((call.args[0] * 1.05,)) for call in calls]  # what the quantized blocks before made of it
    config = BRECQConfig(iterations=20, batch_size=2)

    def codes(**given: object) -> torch.Tensor:
        block = copy.deepcopy(dense)
        calibrated(block, W4, config, shifted, **given)
        return torch.cat([layer.qweight.flatten() for layer in block.children()])

    first = codes(references=calls)
    assert torch.equal(first, codes(references=calls))
    assert not torch.equal(first, codes())
    assert not torch.equal(first, codes(references=calls, weights=[1.0, 1.0, 1.0, 0.0]))


class Transposed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


def test_low_rank_branch_and_smoothing_are_in_the_loop() -> None:
    """What the block computes while it learns is what its quantized layers compute afterwards."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(2), Transposed(), nn.Linear(8, 32))
    calls = [Call((torch.randn(2, 8, 6, 6),))]
    work = work_of(model, PRESETS["w8a8"].scheme, calls, unchanged=unchanged_twin(model))
    for layer in work.layers.values():
        columns = layer.dense.weight.flatten(1).shape[1]
        layer.low_rank = (torch.randn(2, columns) / 10, torch.randn(layer.dense.weight.shape[0], 2) / 10)
        layer.act_pre_scale = torch.rand(8) + 0.5
    with contextlib.ExitStack() as stack, torch.no_grad():
        learned = [
            brecq._begin(work, name, collector, BRECQConfig(iterations=2), stack)
            for name, collector in brecq.inputs_of(work)
        ]
        weights = brecq.weights_of(learned, [one.rounding.hard() for one in learned])
        expected = torch.func.functional_call(model, weights, calls[0].args)
        assert torch.equal(calls[0].run(model), expected)
    for one in learned:
        one.layer.quantized = one.rounding.quantized()
        work.install(one.layer)
    with torch.no_grad():
        assert torch.allclose(calls[0].run(model), expected, atol=2e-3 * float(expected.abs().max()))


def test_goes_on_from_what_an_algorithm_before_decided() -> None:
    torch.manual_seed(3)
    dense = Block()
    ours, alone = copy.deepcopy(dense), copy.deepcopy(dense)
    steps = AdaRoundConfig(iterations=50)
    work = calibrated(ours, PRESETS["w8a8"].scheme, SequenceConfig((SmoothQuantConfig(), steps)), inputs(4))
    calibrated(alone, PRESETS["w8a8"].scheme, steps, inputs(4))
    assert all(layer.act_pre_scale is not None for layer in work.layers.values())
    fresh = inputs(2, seed=1)
    assert error(ours, dense, fresh) < error(alone, dense, fresh)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": 0}, "iterations >= 1"),
        ({"learning_rate": 0.0}, "learning_rate > 0"),
        ({"regularization": -1.0}, "regularization >= 0"),
        ({"warmup": 1.0}, "warmup < 1"),
        ({"observer": "hqq"}, "observer must be"),
        ({"start": "awq"}, "start must be"),
        ({"ridge": -1.0}, "ridge >= 0"),
    ],
)
@pytest.mark.parametrize("config", [AdaRoundConfig, BRECQConfig])
def test_configs_refuse(config: type, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"{config.__name__}: .*{message}"):
        config(**fields)
    with pytest.raises(ConfigError, match=rf"{config.__name__}: rounds up or down to integer codes, got float8"):
        config().check(PRESETS["fp8"].scheme.weight)
    with pytest.raises(ConfigError, match="batch_size >= 1"):
        BRECQConfig(batch_size=0)
