"""The product in training: its gradients against plain autograd and differences, its values against the stored form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import diffuse_compress as dc
from diffuse_compress.quantization.clips import TimestepGroups, clip_of_rows
from diffuse_compress.quantization.numerics import choose_activation_qparams, quantize_activation
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.training.config import parse_scheme
from diffuse_compress.training.fake_quantize import gradient_scale, trained_product
from tolerance import GRADIENT, assert_close

N, K, R = 24, 192, 4
SCHEMES: dict[str, Scheme] = {
    "w4a4 two-level": parse_scheme("w4a4"),
    "w4a8 channel": Scheme(dc.WeightScheme("int4"), dc.ActivationScheme("int8")),
    "w3a3 channel": parse_scheme("w3a3"),
    "w4a16 int zero": parse_scheme("w4a16"),
    "w3a16 float zero": Scheme(dc.WeightScheme("int3", dc.PerGroup(64), symmetric=False, float_zero_point=True), None),
    "w4a4 tensor": Scheme(dc.WeightScheme("int4", dc.PerTensor()), dc.ActivationScheme("int4")),
}


class _Round(torch.autograd.Function):
    """Rounding with a gradient of one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def _clamp_ste(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return x.clamp(low, high)


def _spread(values: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    size = scheme.weight.group_size
    return values if size is None else values.repeat_interleave(size, dim=1)[:, :K]


def by_autograd(given: dict[str, Any], scheme: Scheme, rank: int) -> torch.Tensor:
    """The same product in plain operations, straight through the rounding alone."""
    scale = given["scale"].abs()
    if given["group_scale"] is not None:
        scale = scale * given["group_scale"].float()
    scale, (low, high) = _spread(scale, scheme), scheme.weight.range
    steps = given["weight"].float() / scale
    if given["zero_point"] is None:
        weight = scale * _clamp_ste(_Round.apply(steps), low, high)
    else:
        zero = _spread(given["zero_point"], scheme)
        if scheme.weight.float_zero_point:
            weight = scale * (_clamp_ste(_Round.apply(steps + zero), low, high) - zero)
        else:
            zero = _clamp_ste(_Round.apply(zero), scheme.weight.format.qmin, scheme.weight.format.qmax)
            weight = scale * (_clamp_ste(_Round.apply(steps) + zero, low, high) - zero)
    x = given["x"].float()
    if scheme.activation is not None:
        qmax = scheme.activation.format.qmax
        unit = x.abs().amax(dim=1, keepdim=True) / qmax
        of_row = unit if given["clip"] is None else unit * given["clip"]
        x = of_row * _clamp_ste(_Round.apply(x / of_row), -qmax, qmax)
    if rank:
        weight = weight + (given["up"][:, :rank] * given["gate"][:rank]) @ given["down"][:rank]
    return F.linear(x, weight, given["bias"])


def operands(scheme: Scheme, rows: int, *, clipped: bool = True) -> dict[str, Any]:
    weight = torch.randn(N, K)
    weight[:, 3] *= 4
    found = weight_qparams(weight, scheme.weight)
    zero = None if found.zero_point is None else found.zero_point.float() + 0.2
    given: dict[str, Any] = {
        "x": torch.randn(rows, K) + 0.3,
        "weight": weight,
        "bias": torch.randn(N),
        # Smaller than the best, so that some weights are clamped; one negative, whose magnitude counts.
        "scale": found.scale * 0.8,
        "zero_point": zero,
        "clip": None if scheme.activation is None or not clipped else torch.linspace(0.5, 0.95, rows).unsqueeze(1),
        "up": torch.randn(N, R),
        "down": torch.randn(R, K) * 0.1,
    }
    given["scale"][0] *= -1
    given = {name: None if value is None else value.requires_grad_() for name, value in given.items()}
    return given | {"group_scale": found.group_scale, "gate": torch.tensor([1.0, 1.0, 0.3, 0.0])}


@pytest.mark.parametrize("rows", [3, 64], ids=["branch on activations", "branch on weights"])
@pytest.mark.parametrize("clipped", [True, False], ids=["clips", "full range"])
@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_are_those_of_plain_autograd(name: str, clipped: bool, rows: int) -> None:
    scheme = SCHEMES[name]
    given = operands(scheme, rows, clipped=clipped)
    learned = [key for key, value in given.items() if value is not None and value.requires_grad]
    grad = torch.randn(rows, N)
    expected = torch.autograd.grad(by_autograd(given, scheme, 3), [given[key] for key in learned], grad)
    y = trained_product(**given, scheme=scheme, rank=3)
    actual = torch.autograd.grad(y, [given[key] for key in learned], grad)
    factor = gradient_scale(given["weight"].shape, scheme.weight)
    for key, mine, theirs in zip(learned, actual, expected, strict=True):
        if key in ("scale", "zero_point"):
            theirs = theirs * factor
        assert_close(mine, theirs, GRADIENT[torch.float32] * 10, key)  # sums over codes in another order
    assert not actual[learned.index("up")][:, 3].any()


def test_gradient_of_scale_and_zero_point_is_the_difference_of_values() -> None:
    """Where no code changes, moving scale or zero point moves the product by their gradients (LSQ+, equations 4, 5)."""
    scheme = Scheme(dc.WeightScheme("int4", dc.PerChannel(), symmetric=False, float_zero_point=True), None)
    # Every weight far outside: codes are clamped, and the values are scale * (bound - zero).
    weight = torch.where(torch.rand(N, K) < 0.5, -50.0, 50.0)
    scale, zero = (torch.rand(N, 1) + 0.5).requires_grad_(), torch.randn(N, 1).requires_grad_()
    x, grad = torch.randn(7, K), torch.randn(7, N)

    def loss(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return (trained_product(x, weight, None, scale, zero, None, scheme).double() * grad).sum()

    of_scale, of_zero = torch.autograd.grad(loss(scale, zero), [scale, zero])
    factor, step = (K * 15) ** -0.5, 1e-2
    assert gradient_scale(weight.shape, scheme.weight) == pytest.approx(factor)
    for row in (0, 5):
        nudge = torch.zeros(N, 1).index_fill_(0, torch.tensor([row]), step)
        by_scale = (loss(scale + nudge, zero) - loss(scale - nudge, zero)) / (2 * step)
        by_zero = (loss(scale, zero + nudge) - loss(scale, zero - nudge)) / (2 * step)
        assert of_scale[row].item() == pytest.approx(by_scale.item() * factor, rel=1e-3, abs=1e-3)
        assert of_zero[row].item() == pytest.approx(by_zero.item() * factor, rel=1e-3, abs=1e-3)


def test_gradient_scale_counts_elements_of_a_scale() -> None:
    shape = torch.Size((N, K))
    assert gradient_scale(shape, dc.WeightScheme("int4")) == pytest.approx((K * 7) ** -0.5)
    grouped = dc.WeightScheme("int4", dc.PerGroup(64), symmetric=False)
    assert gradient_scale(shape, grouped) == pytest.approx((64 * 15) ** -0.5)
    assert gradient_scale(shape, dc.WeightScheme("int8", dc.PerTensor())) == pytest.approx((N * K * 127) ** -0.5)
    # Of two-level weights the row's scale is learned.
    assert gradient_scale(shape, parse_scheme("w4a4").weight) == pytest.approx((K * 7) ** -0.5)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_branch_that_has_left_changes_no_bit(name: str) -> None:
    scheme = SCHEMES[name]
    given = operands(scheme, 5)
    with_branch = trained_product(**given, scheme=scheme, rank=0)
    without = trained_product(**{**given, "up": None, "down": None, "gate": None}, scheme=scheme)
    assert torch.equal(with_branch, without)
    # Its parameters still get a gradient, which distributed training waits for.
    of_up, of_down = torch.autograd.grad(with_branch.sum(), [given["up"], given["down"]])
    assert not of_up.any()
    assert not of_down.any()


def test_tokens_of_one_sign_keep_their_values() -> None:
    act = dc.ActivationScheme("int4")
    x = torch.stack([torch.linspace(5, 6, 32), torch.linspace(-6, -5, 32), torch.zeros(32)])
    codes, scale, _ = quantize_activation(x, act, clip=torch.full((1, 1), 0.95))
    assert torch.equal(codes[0].sign(), torch.ones(32, dtype=torch.int8))
    # Half a step, and what the clip cuts off.
    assert ((codes * scale - x).abs() <= 0.5 * scale + 0.05 * 6 + 1e-6).all()
    assert not codes[2].any()


def test_clip_multiplies_the_measured_scale() -> None:
    act, x = dc.ActivationScheme("int8"), torch.randn(6, 16)
    clip = torch.rand(6, 1) * 0.5 + 0.4
    full = choose_activation_qparams(x, act).scale
    assert torch.equal(choose_activation_qparams(x, act, clip=clip).scale, full * clip)
    assert quantize_activation(x, act, clip=clip)[0].abs().max() == 127


@pytest.mark.parametrize(
    "timestep",
    [
        torch.tensor([999, 0, 19, 20]),
        torch.tensor([999.0, 0.0, 19.9, 20.0]),
        torch.tensor([[999, 3], [0, 0], [0, 19], [20, 1]]),
    ],
    ids=["int", "float", "per token"],
)
def test_groups_are_neighbouring_timesteps_of_each_sample(timestep: torch.Tensor) -> None:
    groups = TimestepGroups(50)
    groups.see(timestep)
    assert groups.index is not None
    assert groups.index.tolist() == [49, 0, 0, 1]
    values = torch.arange(50.0)
    rows = clip_of_rows(values, groups.index, (4, 3))
    assert rows.squeeze(1).tolist() == [49.0] * 3 + [0.0] * 6 + [1.0] * 3
    # Frames of a sample follow each other in the first dimension.
    assert torch.equal(clip_of_rows(values, groups.index, (8, 3)).squeeze(1), rows.squeeze(1).repeat_interleave(2))


def test_groups_without_a_timestep_take_the_mean() -> None:
    groups = TimestepGroups(4, 0.0, 1.0)
    groups.see(1.0)
    assert groups.index is not None
    assert groups.index.tolist() == [3]
    groups.see(None)
    values = torch.tensor([0.2, 0.4, 0.6, 0.8])
    assert clip_of_rows(values, groups.index, (2, 5)).item() == pytest.approx(0.5)
    assert clip_of_rows(values, torch.tensor([0, 3]), (3,)).item() == pytest.approx(0.5)
