"""Quantized layers: stock to the outside, exact inside, moved and cast without harm, differentiable."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffuse_compress.errors import ConfigError, IncompatibleShapeError, ModelStateError
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.convert import quantize_module
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear, supports
from diffuse_compress.quantization.numerics import fake_quantize_activation, quantize_weight
from diffuse_compress.quantization.presets import resolve_preset
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    NumberFormat,
    PerChannel,
    PerGroup,
    PerTensor,
    Scheme,
    TwoLevel,
    WeightScheme,
)
from tolerance import GRADIENT, assert_close

FMT = NumberFormat
INT8 = ActivationScheme(FMT.INT8)
STATIC = ActivationScheme(FMT.INT8, PerTensor(), dynamic=False, symmetric=False)
SCHEMES = {
    "w8a8": Scheme(WeightScheme(FMT.INT8), INT8),
    "w8a8 static": Scheme(WeightScheme(FMT.INT8, PerTensor()), STATIC),
    "w8a16": Scheme(WeightScheme(FMT.INT8), None),
    "w4a8 two-level": Scheme(WeightScheme(FMT.INT4, TwoLevel()), INT8),
    "w4a16 asym": Scheme(WeightScheme(FMT.INT4, PerGroup(32), symmetric=False), None),
    "w3a8 grouped": Scheme(WeightScheme(FMT.INT3, PerGroup(32)), INT8),
    "w4a4": Scheme(WeightScheme(FMT.INT4), ActivationScheme(FMT.INT4)),
    "hqq": Scheme(WeightScheme(FMT.INT4, PerGroup(64, pad=True), symmetric=False, float_zero_point=True), None),
    "additive": Scheme(WeightScheme(FMT.INT4, PerGroup(32), symmetric=False, additive_zero_point=True), None),
    "fp8": Scheme(WeightScheme(FMT.FLOAT8_E4M3), ActivationScheme(FMT.FLOAT8_E4M3)),
}
K, N, RANK = 192, 40, 5
all_schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


def static_arguments(scheme: Scheme) -> dict[str, torch.Tensor]:
    if scheme.activation is None or scheme.activation.dynamic:
        return {}
    return {"input_scale": torch.tensor([0.06]), "input_zero_point": torch.tensor(-20)}


def make_linear(
    scheme: Scheme, *, bias: bool = True, full: bool = False, dtype: torch.dtype = torch.float32
) -> QuantizedLinear:
    """A layer of random values; ``full`` adds smoothing and a low-rank branch."""
    dense = nn.Linear(K, N, bias=bias, dtype=dtype)
    extra = {}
    if full:
        extra = {"act_pre_scale": torch.rand(K) + 0.5, "low_rank": (torch.randn(RANK, K) / K, torch.randn(N, RANK))}
    quantized = quantize_weight(dense.weight.detach(), scheme.weight)
    return QuantizedLinear.from_dense(dense, quantized, scheme, **static_arguments(scheme), **extra)


def make_conv(scheme: Scheme, *, full: bool = False, **options) -> QuantizedConv2d:
    dense = nn.Conv2d(32, 24, 3, **{"padding": 1, **options})
    weight = dense.weight.detach().flatten(1)
    extra = {}
    if full:
        low_rank = (torch.randn(RANK, weight.shape[1]) / 100, torch.randn(24, RANK))
        extra = {"act_pre_scale": torch.rand(32) + 0.5, "low_rank": low_rank}
    quantized = quantize_weight(weight, scheme.weight)
    return QuantizedConv2d.from_dense(dense, quantized, scheme, **static_arguments(scheme), **extra)


def quantized_input(layer: QuantizedLinear | QuantizedConv2d, x: torch.Tensor) -> torch.Tensor:
    """The float32 input after smoothing and quantization, divided by the smoothing again."""
    conv = isinstance(layer, nn.Conv2d)
    smooth = torch.ones(1) if layer.act_pre_scale is None else layer.act_pre_scale.view(-1, *(1,) * (2 * conv))
    act = layer.scheme.activation
    if act is None or not act.format.is_integer:
        return x.float()
    values = fake_quantize_activation(
        x.float() * smooth, act, layer.input_scale, layer.input_zero_point, feature_dims=3 if conv else 1
    )
    return values / smooth


# --- values -----------------------------------------------------------------------------------------------------


@all_schemes
@pytest.mark.parametrize("full", [False, True])
def test_forward_is_quantized_input_times_weight(scheme: Scheme, full: bool) -> None:
    layer = make_linear(scheme, full=full)
    x = torch.randn(3, 4, K)
    expected = F.linear(quantized_input(layer, x), layer.weight, layer.bias)
    if full:
        # The low-rank branch sees the input as it is.
        difference = x - quantized_input(layer, x)
        expected = expected + F.linear(F.linear(difference, layer.low_rank_down), layer.low_rank_up)
    assert_close(layer(x), expected)


@all_schemes
@pytest.mark.parametrize("full", [False, True])
def test_conv_forward_is_quantized_input_times_weight(scheme: Scheme, full: bool) -> None:
    layer = make_conv(scheme, full=full, stride=2)
    x = torch.randn(2, 32, 9, 8)
    values = quantized_input(layer, x)
    expected = F.conv2d(values, layer.weight, layer.bias, 2, 1)
    if full:
        down = layer.low_rank_down.view(RANK, 32, 3, 3)
        expected = expected + F.conv2d(F.conv2d(x - values, down, None, 2, 1), layer.low_rank_up[:, :, None, None])
    assert_close(layer(x), expected)
    single = layer(x[0])
    assert_close(single, layer(x)[0])
    if layer.compute_path().is_integer and not full:
        assert torch.equal(single, layer(x)[0]), "an integer path does not depend on the batch"


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same", "kernel": 4},
        {"padding": "valid"},
        {"padding": (2, 0), "dilation": 2},
        {"padding_mode": "reflect"},
        {"padding_mode": "replicate", "padding": (1, 2)},
        {"padding_mode": "circular"},
        {"groups": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["w8a8", "w8a8 static", "w8a16"])
def test_conv_padding_and_groups(name: str, options: dict[str, object]) -> None:
    scheme, options = SCHEMES[name], dict(options)
    dense = nn.Conv2d(32, 24, options.pop("kernel", 3), **{"padding": 1, **options})
    quantized = quantize_weight(dense.weight.detach().flatten(1), scheme.weight)
    layer = QuantizedConv2d.from_dense(dense, quantized, scheme, **static_arguments(scheme))
    x = torch.randn(2, 32, 9, 8)
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
    assert_close(layer(x), dense(quantized_input(layer, x)))
    assert_close(layer.to_dense()(x), dense(x))


@all_schemes
def test_without_bias(scheme: Scheme) -> None:
    layer = make_linear(scheme, bias=False)
    assert layer.bias is None
    assert_close(layer(torch.zeros(2, K)), torch.zeros(2, N))


def test_w8a8_beats_a_naive_quality_floor() -> None:
    """Measured 36.9 dB for a Gaussian layer of this size with per-channel int8 and per-token int8."""
    from tolerance import assert_snr

    dense = nn.Linear(1152, 256)
    x = torch.randn(64, 1152)
    layer = quantize_module(dense, SCHEMES["w8a8"], RTNConfig(observer="minmax"))
    assert_snr(dense(x), layer(x), 36.9)


# --- stock to the outside ---------------------------------------------------------------------------------------


@all_schemes
def test_looks_like_a_stock_layer(scheme: Scheme) -> None:
    layer, conv = make_linear(scheme, dtype=torch.bfloat16), make_conv(scheme)
    assert isinstance(layer, nn.Linear)
    assert isinstance(conv, nn.Conv2d)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((N, K), torch.bfloat16, "cpu")
    assert layer.weight.data.is_contiguous()
    assert conv.weight.shape == (24, 32, 3, 3)
    for module in (layer, conv):
        names = [name for name, _ in module.named_parameters()]
        assert names[:3] == ["bias", "qweight", "scale"]
        assert "weight" not in names
        assert all(type(p) is nn.Parameter and not p.requires_grad for p in module.parameters())
        assert module._is_hf_initialized
        assert all(parameter._is_hf_initialized for parameter in module.parameters())
        assert not list(module.buffers())
        expected = scheme.weight_bytes((module._flat_weight().shape[0], module._columns))
        others = [module.bias, module.input_scale, module.input_zero_point]
        assert module.num_bytes == expected + sum(t.nbytes for t in others if t is not None)
        assert scheme.name in repr(module)


def test_weight_cannot_be_assigned() -> None:
    layer = make_linear(SCHEMES["w8a8"])
    with pytest.raises(ModelStateError, match=r"weight is read-only.*dequantize\(\)"):
        layer.weight = nn.Parameter(torch.zeros(N, K))
    with pytest.raises(AttributeError, match="weight"):
        layer.weight = torch.zeros(N, K)
    before = layer.weight
    layer.reset_parameters()
    assert torch.equal(layer.weight, before)


@all_schemes
def test_to_dense_is_the_grid(scheme: Scheme) -> None:
    layer = make_linear(scheme, full=True).eval()
    dense = layer.to_dense()
    assert type(dense) is nn.Linear
    assert not dense.training
    assert torch.equal(dense.weight, layer.weight)
    assert torch.equal(dense.bias, layer.bias)
    assert dense.bias.data_ptr() != layer.bias.data_ptr()


@all_schemes
def test_placeholder_loads_a_state_dict(scheme: Scheme) -> None:
    for source in (make_linear(scheme, full=True), make_conv(scheme, full=True)):
        if isinstance(source, QuantizedLinear):
            empty = QuantizedLinear.placeholder(
                K, N, True, scheme, compute_dtype=torch.float32, act_pre_scale=True, low_rank=RANK
            )
            x = torch.randn(2, K)
        else:
            empty = QuantizedConv2d.placeholder_like(
                source, scheme, compute_dtype=torch.float32, act_pre_scale=True, low_rank=RANK
            )
            x = torch.randn(2, 32, 6, 6)
        assert all(parameter.is_meta for parameter in empty.parameters())
        assert empty(x.to("meta")).shape == source(x).shape
        assert {name: t.dtype for name, t in empty.named_parameters()} == {
            name: t.dtype for name, t in source.named_parameters()
        }
        materialised = copy.deepcopy(empty).to_empty(device="cpu")
        assert materialised.load_state_dict(source.state_dict()) == ([], [])
        assert empty.load_state_dict(source.state_dict(), assign=True) == ([], [])
        for loaded in (empty, materialised):
            assert torch.equal(loaded(x), source(x))
            assert loaded.scheme == source.scheme


def test_placeholder_ignores_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float16)
    try:
        layer = QuantizedLinear.placeholder(K, N, True, SCHEMES["w8a8"], compute_dtype=torch.bfloat16, device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.scale.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16


def _saved_and_loaded(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@all_schemes
def test_copies_are_equal_and_independent(scheme: Scheme) -> None:
    layer, x = make_linear(scheme, full=True), torch.randn(2, K)
    y = layer(x)
    copies = [copy.deepcopy(layer), _saved_and_loaded(layer)]
    if layer.qweight.dtype == torch.int8:
        # Plain pickle of any float8 tensor fails in torch 2.13; torch.save works.
        copies.append(pickle.loads(pickle.dumps(layer)))
    for other in copies:
        assert torch.equal(other(x), y)
        other.qweight.data.view(torch.int8).zero_()
    assert torch.equal(layer(x), y)


# --- moving and casting -----------------------------------------------------------------------------------------


@all_schemes
@pytest.mark.parametrize("cast", ["bfloat16", "half", "to"])
def test_casting_keeps_scales_and_codes(scheme: Scheme, cast: str) -> None:
    layer = make_linear(scheme, full=True)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    dtype = {"bfloat16": torch.bfloat16, "half": torch.float16, "to": torch.bfloat16}[cast]
    returned = layer.to(dtype) if cast == "to" else getattr(layer, cast)()
    assert returned is layer
    assert layer.compute_dtype == dtype
    assert layer.weight.dtype == dtype
    for name, parameter in layer.named_parameters():
        if name in ("bias", "low_rank_down", "low_rank_up"):
            assert parameter.dtype == dtype
        else:
            assert parameter.dtype == before[name].dtype
            assert torch.equal(parameter.view(torch.uint8), before[name].view(torch.uint8))
    x = torch.randn(2, K).to(dtype)
    assert layer(x).dtype == dtype
    assert layer.float().compute_dtype == torch.float32


@all_schemes
def test_moving_reaches_every_tensor(scheme: Scheme) -> None:
    for layer in (make_linear(scheme, full=True), make_conv(scheme, full=True)):
        moved = copy.deepcopy(layer).to("meta", torch.bfloat16)
        assert all(parameter.is_meta for parameter in moved.parameters())
        assert moved.scale.dtype == torch.float32
        assert moved.compute_dtype == torch.bfloat16
        assert moved.compute_path("cpu") == layer.compute_path("cpu", torch.bfloat16)
        inside = nn.Sequential(nn.Linear(2, 2), layer).to(torch.float16)
        assert inside[0].weight.dtype == torch.float16
        assert layer.scale.dtype == torch.float32


def test_accelerate_can_place_tensors_one_by_one() -> None:
    accelerate = pytest.importorskip("accelerate.utils")
    layer, x = make_linear(SCHEMES["w4a8 two-level"], full=True), torch.randn(2, K)
    y, state = layer(x), {name: t.clone() for name, t in layer.state_dict().items()}
    layer.to("meta")
    for name, value in state.items():
        accelerate.set_module_tensor_to_device(layer, name, "cpu", value=value)
    assert torch.equal(layer(x), y)


# --- gradients --------------------------------------------------------------------------------------------------


def gradients(run, x: torch.Tensor, grad: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(run(leaf), (leaf, *parameters), grad)


@all_schemes
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_that_of_the_dense_layer(scheme: Scheme, full: bool, dtype: torch.dtype) -> None:
    layer = make_linear(scheme, full=full, dtype=dtype)
    layer.bias.requires_grad_()
    x, grad = torch.randn(3, 4, K).to(dtype), torch.randn(3, 4, N).to(dtype)
    dense = layer.to_dense().float()
    expected = gradients(dense, x.float(), grad.float(), dense.bias)
    for run in (layer, lambda leaf: checkpoint(layer, leaf, use_reentrant=False)):
        for actual, reference in zip(gradients(run, x, grad, layer.bias), expected, strict=True):
            assert actual.dtype == dtype
            assert_close(actual, reference, GRADIENT[dtype])
    assert layer.qweight.grad is None


@all_schemes
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding_mode": "circular"}, {"dilation": 2}], ids=str)
def test_conv_gradient_is_that_of_the_dense_layer(scheme: Scheme, options: dict[str, object]) -> None:
    layer = make_conv(scheme, full=True, **options)
    layer.bias.requires_grad_()
    x = torch.randn(2, 32, 9, 8)
    dense = layer.to_dense()
    grad = torch.randn_like(layer(x))
    expected = gradients(dense, x, grad, dense.bias)
    for actual, reference in zip(gradients(layer, x, grad, layer.bias), expected, strict=True):
        assert_close(actual, reference, GRADIENT[torch.float32])


def test_low_rank_branch_trains() -> None:
    layer = make_linear(SCHEMES["w4a4"], full=True)
    layer.low_rank_down.requires_grad_()
    layer.low_rank_up.requires_grad_()
    x = torch.randn(6, K)
    layer(x).sum().backward()
    assert_close(layer.low_rank_up.grad, (x @ layer.low_rank_down.t()).sum(0).expand(N, -1))
    assert layer.low_rank_down.grad.abs().sum() > 0


def test_no_graph_is_made_without_need() -> None:
    layer = make_linear(SCHEMES["w8a8"])
    assert layer(torch.randn(2, K)).grad_fn is None
    with torch.no_grad():
        assert not layer(torch.randn(2, K, requires_grad=True)).requires_grad
    with torch.inference_mode():
        assert layer(torch.randn(2, K)).is_inference()


@all_schemes
def test_autocast_behaves_as_for_a_dense_layer(scheme: Scheme) -> None:
    layer, x = make_linear(scheme, full=True), torch.randn(3, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == layer.to_dense()(x.bfloat16().float()).bfloat16().dtype
    assert_close(y, layer(x.bfloat16().float()), torch.bfloat16)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@all_schemes
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_compiles_without_graph_breaks(scheme: Scheme, kind: str) -> None:
    torch._dynamo.reset()
    layer = make_linear(scheme, full=True) if kind == "linear" else make_conv(scheme, full=True)
    x = torch.randn(3, K) if kind == "linear" else torch.randn(2, 32, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(x), layer(x))
    grad = torch.randn_like(layer(x))
    for actual, expected in zip(gradients(compiled, x, grad), gradients(layer, x, grad), strict=True):
        assert_close(actual, expected, GRADIENT[torch.float32])


# --- refusals ---------------------------------------------------------------------------------------------------


def test_supports_says_why() -> None:
    scheme = SCHEMES["w8a8"]
    assert supports(nn.Linear(4, 4), scheme) is None
    assert supports(nn.Linear(4, 4, device="meta", dtype=torch.float16), scheme) is None
    assert supports(nn.Conv2d(4, 4, 3, groups=4, padding_mode="reflect"), scheme) is None
    assert supports(nn.Linear(5, 4), SCHEMES["w4a16 asym"]) is None, "group sizes are check_shape's to refuse"
    assert supports(make_linear(scheme), scheme) == "already w8a8"
    assert "ConvTranspose2d" in supports(nn.ConvTranspose2d(4, 4, 3), scheme)
    assert "NonDynamicallyQuantizableLinear" in supports(nn.MultiheadAttention(4, 2).out_proj, scheme)
    assert supports(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), scheme) is not None
    assert supports(nn.Linear(0, 4), scheme) == "its weight is empty"
    assert "int32" in supports(nn.Linear(200_000, 1, device="meta"), scheme)
    assert supports(nn.Linear(200_000, 1, device="meta"), SCHEMES["w8a16"]) is None


def test_from_dense_refuses_what_does_not_fit() -> None:
    dense, scheme = nn.Linear(K, N), SCHEMES["w8a8"]
    quantized = quantize_weight(dense.weight.detach(), scheme.weight)
    with pytest.raises(ConfigError, match="only static activations take input_scale"):
        QuantizedLinear.from_dense(dense, quantized, scheme, input_scale=torch.ones(1))
    with pytest.raises(IncompatibleShapeError, match=r"act_pre_scale must have shape \[192\], got \[7\]"):
        QuantizedLinear.from_dense(dense, quantized, scheme, act_pre_scale=torch.ones(7))
    with pytest.raises(IncompatibleShapeError, match=r"qweight must have shape"):
        QuantizedLinear.from_dense(nn.Linear(K, N + 1), quantized, scheme)
    static = SCHEMES["w8a8 static"]
    quantized = quantize_weight(dense.weight.detach(), static.weight)
    with pytest.raises(ConfigError, match="static activations need input_scale"):
        QuantizedLinear.from_dense(dense, quantized, static)
    with pytest.raises(ConfigError, match="asymmetric activations need input_zero_point"):
        QuantizedLinear.from_dense(dense, quantized, static, input_scale=torch.ones(1))


def test_placeholder_refuses_a_group_size_that_does_not_divide() -> None:
    with pytest.raises(IncompatibleShapeError, match="group_size=32 need in_features divisible by 32, got in_feat"):
        QuantizedLinear.placeholder(100, 4, True, SCHEMES["w4a16 asym"], compute_dtype=torch.float32)
    with pytest.raises(ConfigError, match="grouped convolutions take no low-rank branch, got groups=4"):
        QuantizedConv2d.placeholder_like(
            nn.Conv2d(8, 8, 3, groups=4), SCHEMES["w8a8"], compute_dtype=torch.float32, low_rank=2
        )


@pytest.mark.parametrize("preset", ["w8a8", "fp8", "w8a16", "w4a16", "w4a8", "w4a4"])
def test_presets_make_layers(preset: str) -> None:
    scheme = resolve_preset(preset).scheme
    layer = quantize_module(nn.Linear(256, 64), scheme, RTNConfig(observer="minmax"))
    assert layer.scheme == scheme
    assert layer(torch.randn(3, 256)).isfinite().all()
    assert isinstance(scheme.weight.granularity, PerChannel | PerGroup | TwoLevel)


@all_schemes
def test_scales_of_input_and_output_move_into_the_layer(scheme: Scheme) -> None:
    """Weight, bias and branch against a naive product in float64; codes stay."""
    torch.manual_seed(7)
    layer = make_linear(scheme, full=True)
    before, factors = copy.deepcopy(layer), torch.rand(N) + 0.5
    if isinstance(scheme.weight.granularity, PerTensor):
        with pytest.raises(ModelStateError, match=r"needs a scale for each of 40 rows, found .* with 1\."):
            layer.scale_outputs(factors)
    else:
        shared = layer.bias.data
        layer.scale_outputs(factors)
        assert_close(layer.weight, before.weight.double() * factors.double().reshape(-1, 1), torch.float32)
        assert_close(layer.bias, before.bias.double() * factors.double(), torch.float32)
        assert torch.equal(shared, before.bias), "a dense layer may hold it too"
        before = copy.deepcopy(layer)
    layer.fold_pre_scale()
    assert layer.act_pre_scale is None
    assert_close(layer.weight, before.weight.double() / before.act_pre_scale.double(), torch.float32)
    assert torch.equal(layer.qweight.view(torch.uint8), before.qweight.view(torch.uint8))
    assert layer.folded
    assert "folded=True" in repr(layer)
