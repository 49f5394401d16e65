"""SmoothQuant, AWQ and sequences on a block whose inputs have outlier channels."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from calibrated_block import Block, calibrated, error, inputs, work_of
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.quantization.algorithms.adaround import AdaRoundConfig
from diffuse_compress.quantization.algorithms.awq import AWQConfig, RowCollector, clip_weight
from diffuse_compress.quantization.algorithms.base import (
    AlgorithmConfig,
    SequenceConfig,
    algorithm_from_dict,
    algorithm_to_dict,
)
from diffuse_compress.quantization.algorithms.block import BlockWork, LayerWork, as_rows
from diffuse_compress.quantization.algorithms.brecq import BRECQConfig
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig, collected
from diffuse_compress.quantization.algorithms.hqq import HQQConfig
from diffuse_compress.quantization.algorithms.quarot import QuaRotConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.smoothquant import SmoothQuantConfig, smoothing_scale
from diffuse_compress.quantization.algorithms.svdquant import SVDQuantConfig
from diffuse_compress.quantization.algorithms.twin import unchanged_twin
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.numerics import choose_qparams, dequantize, quantize_weight
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.scheme import NumberFormat, PerGroup, Scheme, WeightScheme

W4 = Scheme(WeightScheme(NumberFormat.INT4, PerGroup(64), symmetric=False))
W3 = Scheme(WeightScheme(NumberFormat.INT3, PerGroup(64), symmetric=False))
HQQ = HQQConfig()
SEQUENCE = SequenceConfig((AWQConfig(), GPTQConfig()))


@pytest.mark.parametrize(
    ("algorithm", "scheme", "factor"),
    [
        (SmoothQuantConfig(), PRESETS["w8a8"].scheme, 0.7),
        (SequenceConfig((SmoothQuantConfig(), GPTQConfig())), PRESETS["w8a8"].scheme, 0.7),
        (AWQConfig(), W4, 0.8),
        (AWQConfig(clip=False), W4, 0.9),
        (GPTQConfig(), W4, 0.92),
        (SEQUENCE, W4, 0.8),
        (AWQConfig(), W3, 0.8),
        (SEQUENCE, W3, 0.8),
        (GPTQConfig(), PRESETS["w4a8"].scheme, 0.9),
    ],
    ids=lambda value: getattr(value, "summary", None) or getattr(value, "name", None),
)
def test_beats_rounding_on_inputs_that_were_not_seen(algorithm: AlgorithmConfig, scheme: Scheme, factor: float) -> None:
    torch.manual_seed(3)
    dense = Block()
    ours, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    calibrated(ours, scheme, algorithm, inputs(8))
    calibrated(plain, scheme, RTNConfig(), inputs(1))
    fresh = inputs(4, seed=0)[2:] + inputs(2, seed=1)
    mine, theirs = error(ours, dense, fresh), error(plain, dense, fresh)
    assert mine < factor * theirs, (mine, theirs)


@pytest.mark.parametrize("algorithm", [SmoothQuantConfig(), AWQConfig(), GPTQConfig()], ids=lambda c: c.kind)
def test_dense_weights_are_not_changed(algorithm: AlgorithmConfig) -> None:
    dense = Block()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    layers = dict(dense.named_modules())
    calibrated(dense, PRESETS["w4a8"].scheme, algorithm, inputs(2))
    for name, tensor in before.items():
        module, _, leaf = name.rpartition(".")
        assert torch.equal(getattr(layers[module], leaf), tensor), name
        assert not layers[module]._forward_pre_hooks


def test_smoothing_preserves_the_product() -> None:
    """x diag(p) (W diag(1/p))^T = x W^T, for linears and convolutions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1, stride=2), nn.Flatten(2), nn.Linear(16, 4))
    x = torch.randn(2, 16, 8, 8) * torch.logspace(-1, 1, 16).reshape(-1, 1, 1)
    work = calibrated(copy.deepcopy(model), PRESETS["w8a8"].scheme, SmoothQuantConfig(), [Call((x,))])
    for name, value in (("0", x), ("2", model[:2](x))):
        layer = work.layers[name]
        assert layer.act_pre_scale is not None
        rows = as_rows(layer.dense, value)
        smoothed = (rows * layer.column_scale) @ layer.target().t()
        exact = rows @ layer.dense.weight.flatten(1).t()
        assert torch.allclose(smoothed, exact, atol=1e-4)
        assert layer.act_pre_scale.std() > 0.01


def test_smoothing_scale_is_equation_4() -> None:
    scale = smoothing_scale(torch.tensor([16.0, 1.0, 0.0]), torch.tensor([4.0, 1.0, 3.0]), 0.5)
    assert torch.allclose(scale, torch.tensor([2.0, 1.0, 1.0]))
    assert torch.allclose(smoothing_scale(torch.tensor([16.0]), torch.tensor([4.0]), 1.0), torch.tensor([16.0]))


def test_subsets_are_layers_that_share_a_tensor_in_running_order() -> None:
    block = Block()
    work = calibrated(block, W4, RTNConfig(), inputs(1))
    assert work.subsets == [("to_q", "to_k", "to_v"), ("to_out",), ("up",), ("down",)]


def test_as_rows_is_what_a_convolution_multiplies() -> None:
    for conv in (
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Conv2d(6, 4, (3, 1), stride=(2, 1), padding="valid", dilation=2),
        nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(6, 4, 1, stride=2),
    ):
        x = torch.randn(2, 6, 9, 7)
        rows = as_rows(conv, x) @ conv.weight.flatten(1).t() + conv.bias
        expected = conv(x).flatten(2).transpose(1, 2).reshape(-1, 4)
        assert torch.allclose(rows, expected, atol=1e-5)


def test_rows_count_as_their_weights_say() -> None:
    """A number for a call, one for each token, and the mean of those where a layer has other rows."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"tokens": nn.Linear(8, 4), "text": nn.Linear(8, 4)})
    model.forward = lambda x, text: (model["tokens"](x), model["text"](text))
    calls = [Call((torch.randn(2, 6, 8), torch.randn(2, 3, 8))) for _ in range(3)]
    weights: list[float | torch.Tensor] = [2.0, torch.rand(2, 6), 0.0]
    layers = {name: LayerWork(name, layer, W4) for name, layer in model.items()}
    work = BlockWork("block", model, calls, layers, lambda name: torch.Generator(), lambda layer: layer.dense,
                     weights=weights)  # fmt: skip
    found = collected(work, ["tokens", "text"], pairs=False)
    for name, position in (("tokens", 0), ("text", 1)):
        expected = torch.zeros(8, 8)
        for call, weight in zip(calls, weights, strict=True):
            rows = call.args[position].reshape(-1, 8)
            each = torch.as_tensor(weight).flatten()
            each = each if each.numel() == len(rows) else each.mean()
            expected += (rows * each.reshape(-1, 1)).t() @ rows
        assert torch.allclose(found[name].sum, expected, atol=1e-4), name


def test_pairs_are_the_inputs_of_both_models() -> None:
    torch.manual_seed(5)
    block = Block()
    twin, calls, references = copy.deepcopy(block), inputs(3), inputs(3, seed=1)
    work = BlockWork("block", block, calls, {"down": LayerWork("down", block.down, W4)}, lambda name: torch.Generator(),
                     lambda layer: layer.dense, unchanged=unchanged_twin(block), references=references)  # fmt: skip
    block.up = nn.Linear(128, 256)  # what an algorithm did before
    collector = collected(work, ["down"], pairs=True)["down"]
    seen: dict[nn.Module, list[torch.Tensor]] = {block: [], twin: []}
    for model, given in ((block, calls), (twin, references)):
        model.down.register_forward_pre_hook(lambda _, args, model=model: seen[model].append(args[0].reshape(-1, 256)))
        for call in given:
            call.run(model)
    x, reference = (torch.cat(rows).detach() for rows in seen.values())
    assert torch.allclose(collector.sum, x.t() @ x, rtol=1e-4, atol=1e-2)
    assert torch.allclose(collector.difference, (reference - x).t() @ x, rtol=1e-4, atol=1e-2)
    assert not work.unchanged.down._forward_pre_hooks


@pytest.fixture
def half_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


LEARNED = [AdaRoundConfig(iterations=2), BRECQConfig(iterations=2)]


@pytest.mark.parametrize(
    "algorithm", [SEQUENCE, SmoothQuantConfig(), SVDQuantConfig(rank=4), QuaRotConfig(), *LEARNED], ids=lambda c: c.kind
)
def test_the_default_dtype_does_not_matter(algorithm: AlgorithmConfig, half_by_default: None) -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        block, calls = Block(), inputs(2)
        torch.set_default_dtype(dtype)
        calibrated(block, PRESETS["w8a8"].scheme, algorithm, calls)
        found.append(block.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize(
    ("algorithm", "scheme", "rotation", "factor"),
    [
        (AWQConfig(clip=False), W4, None, 0.9),
        (SVDQuantConfig(rank=8), PRESETS["w4a4"].scheme, None, 0.8),
        (GPTQConfig(), PRESETS["w4a4"].scheme, 128, 0.8),
        (AdaRoundConfig(iterations=2), W3, None, 0.8),
        (BRECQConfig(iterations=2), W3, None, 0.8),
    ],
    ids=["awq", "svdquant", "rotated-gptq", "adaround", "brecq"],
)
def test_autocast_is_the_models_and_not_the_algorithms(
    algorithm: AlgorithmConfig, scheme: Scheme, rotation: int | None, factor: float
) -> None:
    """A float32 model that is run in autocast: only its own products are of half precision, and none of them stale."""
    torch.manual_seed(3)
    dense = Block()
    found, calls = [], inputs(8)
    for config, size in ((algorithm, rotation), (RTNConfig(), None)):
        block = copy.deepcopy(dense)
        with torch.autocast("cpu", torch.bfloat16):
            calibrated(block, dataclasses.replace(scheme, input_rotation=size), config, calls)
        found.append(error(block, dense, calls))
    assert found[0] < factor * found[1], found


def test_weights_are_rotated_outside_of_autocast() -> None:
    torch.manual_seed(0)
    dense, scheme = nn.Linear(128, 32), dataclasses.replace(PRESETS["w8a8"].scheme, input_rotation=128)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantize_module(dense, scheme, RTNConfig())
    assert torch.equal(found.qweight, quantize_module(dense, scheme, RTNConfig()).qweight)


class Kernels(nn.Module):
    """Convolutions that differ in all that decides which rows they multiply, of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.point = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.circular = nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(x) + self.point(x) + self.depthwise(x) + self.circular(x)


@pytest.mark.parametrize(
    "algorithm",
    [AWQConfig(), GPTQConfig(), AdaRoundConfig(iterations=2), SVDQuantConfig(rank=4)],
    ids=lambda c: c.kind,
)
def test_convolutions_of_one_input_may_differ_in_everything_else(algorithm: AlgorithmConfig) -> None:
    torch.manual_seed(7)
    dense = Kernels()
    ours, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    x = torch.randn(4, 32, 6, 6)
    x[:, ::9] *= 10
    scheme = Scheme(WeightScheme(NumberFormat.INT4, PerGroup(32, pad=True)), PRESETS["w8a8"].scheme.activation)
    calibrated(ours, scheme, algorithm, [Call((x,))])
    calibrated(plain, scheme, RTNConfig(), [Call((x,))])
    assert error(ours, dense, [Call((x,))]) < error(plain, dense, [Call((x,))])


def test_layers_share_a_hessian_only_of_equal_rows() -> None:
    block, x = Kernels(), torch.randn(2, 32, 6, 6)
    work = work_of(block, W4, [Call((x,))])
    found = collected(work, list(work.layers), pairs=False)
    assert len({id(collector) for collector in found.values()}) == 4
    for name, collector in found.items():
        rows = as_rows(work.layers[name].dense, x)
        assert torch.allclose(collector.sum, rows.t() @ rows, rtol=1e-4, atol=1e-3), name


@pytest.mark.parametrize("algorithm", [AWQConfig(), SmoothQuantConfig()], ids=lambda c: c.kind)
def test_channels_that_were_never_seen_keep_their_weights(algorithm: AlgorithmConfig) -> None:
    block, calls = Block(), inputs(4)
    for call in calls:
        call.args[0][..., 5] = 0
        call.args[0].mul_(1e-3)
    weight = block.to_v.weight.detach().clone()
    calibrated(block, Scheme(W4.weight, PRESETS["w8a8"].scheme.activation), algorithm, calls)
    missed = (block.to_v.weight - weight)[:, [5, 6]].norm(dim=0) / weight[:, [5, 6]].norm(dim=0)
    assert missed[0] < 0.3
    scale = block.to_v.act_pre_scale
    assert scale is not None
    # Nor is the range of their weights that of all others.
    others = torch.cat([scale[:5], scale[6:]])
    assert others.min() <= scale[5] <= others.max()


def test_clipping_lowers_the_output_error_and_is_asymmetric() -> None:
    torch.manual_seed(1)
    weight = torch.randn(32, 128)
    weight[:, ::17] = weight[:, ::17].abs() * 4  # a long tail on one side
    rows = torch.randn(256, 128)
    rows[:, ::17] *= 0.02

    def loss(ranges: torch.Tensor) -> float:
        rounded = dequantize(quantize_weight(weight, W3.weight, choose_qparams(ranges, W3.weight)))
        return float(((rounded - weight) @ rows.t()).square().sum())

    clipped = clip_weight(weight.clone(), rows, W3.weight, steps=10)
    assert loss(clipped) < 0.8 * loss(weight)
    assert clipped.max() < weight.max()


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_finds_the_range_of_least_error_of_those_it_tries(symmetric: bool) -> None:
    """By trying each on the whole weight, as codes will be rounded: both ends together, or one and then the other."""
    torch.manual_seed(2)
    scheme = WeightScheme(NumberFormat.INT4, PerGroup(32, pad=True), symmetric=symmetric)
    weight, rows = torch.randn(12, 80) + 0.3, torch.randn(64, 80) @ torch.randn(80, 80)
    found = choose_qparams(clip_weight(weight.clone(), rows, scheme, steps=10), scheme)
    ratios = [1 - step / 20 for step in range(10)]

    def error(part: torch.Tensor, x: torch.Tensor, low: float, high: float) -> float:
        ends = torch.tensor([[low, high]]).expand(1, 2)
        qparams = choose_qparams(ends, WeightScheme(NumberFormat.INT4, symmetric=symmetric))
        rounded = dequantize(quantize_weight(part, WeightScheme(NumberFormat.INT4, symmetric=symmetric), qparams))
        return float(((rounded - part).double() @ x.t().double()).square().sum())

    for row in range(12):
        for group, columns in enumerate((slice(0, 32), slice(32, 64), slice(64, 80))):
            part, x = weight[row : row + 1, columns], rows[:, columns]
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            if symmetric:
                low, high = min(((low * r, high * r) for r in ratios), key=lambda ends: error(part, x, *ends))
            else:
                high = min((high * r for r in ratios), key=lambda end: error(part, x, low, end))
                low = min((low * r for r in ratios), key=lambda end: error(part, x, end, high))
            expected = choose_qparams(torch.tensor([[low, high]]), WeightScheme(NumberFormat.INT4, symmetric=symmetric))
            assert torch.allclose(found.scale[row, group], expected.scale.squeeze(), rtol=1e-5), (row, group)


@pytest.mark.parametrize(("calls", "count"), [(1, 1000), (3, 256), (5, 200), (700, 3), (2, 4)])
def test_rows_to_judge_by_are_spread_over_calls_and_rows(calls: int, count: int) -> None:
    collector = RowCollector(512, calls)
    for call in range(calls):
        rows = torch.arange(count, dtype=torch.float32)
        collector.update(torch.stack([torch.full_like(rows, call), rows], dim=1))
    found = collector.rows()
    assert found is not None
    assert len(found) == min(512, calls * count)
    for column, total in ((0, calls), (1, count)):
        values = found[:, column]
        assert abs(float(values.mean()) - (total - 1) / 2) <= 0.01 * total + 0.5, column


def test_inputs_that_are_not_finite_are_named() -> None:
    calls = inputs(3)
    calls[1].args[0][0, 0, 0] = float("inf")
    with pytest.raises(ModelStateError, match=r"block\.to_q: calibration needs finite inputs, .* sample 1"):
        calibrated(Block(), W4, GPTQConfig(), calls)


def test_sequences_are_written_and_read_and_refused() -> None:
    data = algorithm_to_dict(SEQUENCE)
    assert [step["kind"] for step in data["algorithms"]] == ["awq", "gptq"]
    assert algorithm_from_dict(data) == SEQUENCE
    assert SEQUENCE.needs_calibration
    assert not SequenceConfig((QuaRotConfig(), HQQ)).needs_calibration


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((GPTQConfig(), GPTQConfig()), "two or more different algorithms"),
        ((GPTQConfig(), AWQConfig()), "AWQConfig prepares layers for the choice of codes, and must come before it"),
        ((GPTQConfig(), RTNConfig()), "RTNConfig has nothing to do after GPTQConfig: both choose the codes"),
        (
            (AWQConfig(), SmoothQuantConfig(), GPTQConfig()),
            "SmoothQuantConfig has nothing to do after AWQConfig",
        ),
    ],
)
def test_sequences_in_which_one_has_nothing_to_do_are_refused(steps: tuple[AlgorithmConfig, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SequenceConfig(steps)


@pytest.mark.parametrize(
    ("config", "fields"),
    [(AWQConfig, {"num_ratios": 1}), (AWQConfig, {"clip_rows": 0}), (SmoothQuantConfig, {"alpha": 1.5})],
)
def test_configs_refuse(config: type[AlgorithmConfig], fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=config.__name__):
        config(**fields)
