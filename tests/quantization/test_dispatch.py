"""Dispatch: every scheme of a product against float64, on every path this machine can take or imitate."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from diffuse_compress.quantization import dispatch, measured
from diffuse_compress.quantization.dispatch import (
    DEQUANTIZE_TOLERANCE,
    Geometry,
    InputQuantization,
    compute_path,
    conv2d,
    dense_weight,
    linear,
)
from diffuse_compress.quantization.numerics import (
    dequantize,
    dequantize_activation,
    integer_weight,
    quantize_activation,
    quantize_weight,
)
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.scheme import (
    ActivationScheme,
    NumberFormat,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    TwoLevel,
    WeightScheme,
)
from diffuse_compress_kernels import int_matmul
from tolerance import Tolerance, assert_close

FMT = NumberFormat
WEIGHTS = {
    **{
        f"int{bits} {type(gran).__name__} {'sym' if symmetric else 'asym'}": WeightScheme(
            FMT(f"int{bits}"), gran, symmetric
        )
        for bits, gran, symmetric in itertools.product(
            (8, 4, 3, 2), (PerTensor(), PerChannel(), PerGroup(32)), (True, False)
        )
    },
    "int4 two-level": WeightScheme(FMT.INT4, TwoLevel()),
    "int4 additive": WeightScheme(FMT.INT4, PerGroup(32, pad=True), symmetric=False, additive_zero_point=True),
    "int4 hqq": WeightScheme(FMT.INT4, PerGroup(64, pad=True), symmetric=False, float_zero_point=True),
    "fp8 channel": WeightScheme(FMT.FLOAT8_E4M3),
    "fp8 tensor": WeightScheme(FMT.FLOAT8_E4M3, PerTensor()),
}
ACTIVATIONS = {
    "none": None,
    "int8 token": ActivationScheme(FMT.INT8),
    "int8 tensor dynamic": ActivationScheme(FMT.INT8, PerTensor()),
    "int8 static": ActivationScheme(FMT.INT8, PerTensor(), dynamic=False),
    "int8 static asym": ActivationScheme(FMT.INT8, PerTensor(), dynamic=False, symmetric=False),
    "int4 token": ActivationScheme(FMT.INT4, PerToken()),
    "fp8 token": ActivationScheme(FMT.FLOAT8_E4M3),
}
PRODUCT = [
    pytest.param(weight, act, id=f"{name} x {act_name}")
    for (name, weight), (act_name, act) in itertools.product(WEIGHTS.items(), ACTIVATIONS.items())
    if act is None or weight.format.is_integer == act.format.is_integer
]
INPUT_RANGE = 12.0


def make_weight(scheme: WeightScheme, outputs: int = 24, columns: int = 160) -> QuantizedWeight:
    weight = torch.randn(outputs, columns)
    weight[:, 3] *= 10
    return quantize_weight(weight, scheme)


def make_input(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., 5] *= 15
    return x.to(dtype)


def make_inputs(act: ActivationScheme | None, channels: int | None = None) -> InputQuantization:
    pre_scale = None if channels is None else torch.rand(channels) + 0.5
    if act is None or act.dynamic:
        return InputQuantization(pre_scale=pre_scale)
    scale = torch.tensor([INPUT_RANGE / act.format.qmax])
    return InputQuantization(scale, None if act.symmetric else torch.tensor([-37], dtype=torch.int8), pre_scale)


def reference_input(x: torch.Tensor, scheme: Scheme, inputs: InputQuantization) -> torch.Tensor:
    """float64 of what the layer multiplies with its weight; activations of fp8 are left alone on the CPU."""
    values = x.float()
    if inputs.pre_scale is not None:
        values = values * inputs.pre_scale.view(-1, *(1,) * (2 if x.dim() == 4 else 0))
    act = scheme.activation
    if act is None or not act.format.is_integer:
        return values.double()
    codes, scale, zero_point = quantize_activation(
        values, act, inputs.scale, inputs.zero_point, feature_dims=3 if x.dim() == 4 else 1
    )
    return dequantize_activation(codes, scale, zero_point).double()


def tolerance(scheme: Scheme, dtype: torch.dtype) -> Tolerance:
    rms = DEQUANTIZE_TOLERANCE[dtype]
    return Tolerance(rms=rms, maximum=10 * rms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(("weight_scheme", "act"), PRODUCT)
def test_linear_matches_float64(
    weight_scheme: WeightScheme, act: ActivationScheme | None, smooth: bool, dtype: torch.dtype
) -> None:
    scheme = Scheme(weight_scheme, act)
    weight, inputs = make_weight(weight_scheme), make_inputs(act, 160 if smooth else None)
    x, bias = make_input(2, 5, 160, dtype=dtype), torch.randn(24)
    y = linear(x, weight, scheme, bias, inputs)
    expected = F.linear(reference_input(x, scheme, inputs), dequantize(weight).double(), bias.double())
    assert (y.shape, y.dtype) == ((2, 5, 24), dtype)
    assert_close(y, expected, tolerance(scheme, dtype))


@pytest.mark.parametrize(("weight_scheme", "act"), PRODUCT)
def test_conv2d_matches_float64(weight_scheme: WeightScheme, act: ActivationScheme | None) -> None:
    scheme = Scheme(weight_scheme, act)
    weight, inputs = make_weight(weight_scheme, columns=32 * 9), make_inputs(act, 32)
    x, bias = torch.randn(2, 32, 7, 6), torch.randn(24)
    x[1] *= 5
    y = conv2d(x, weight, scheme, Geometry((3, 3), (2, 1), (1, 1)), bias, inputs)
    kernel = dequantize(weight).double().view(24, 32, 3, 3)
    expected = F.conv2d(reference_input(x, scheme, inputs), kernel, bias.double(), (2, 1), (1, 1))
    assert_close(y, expected, tolerance(scheme, torch.float32))


@pytest.mark.parametrize("act", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_grouped_conv2d_dequantizes(act: ActivationScheme | None) -> None:
    fmt = FMT.FLOAT8_E4M3 if act is not None and not act.format.is_integer else FMT.INT8
    scheme = Scheme(WeightScheme(fmt), act)
    weight, inputs = make_weight(scheme.weight, columns=8 * 9), make_inputs(act, 32)
    x = torch.randn(2, 32, 7, 6)
    assert not compute_path(scheme, "cpu", kind="conv2d", groups=4).is_integer
    y = conv2d(x, weight, scheme, Geometry((3, 3), padding=(1, 1), groups=4), None, inputs)
    kernel = dequantize(weight).double().view(24, 8, 3, 3)
    expected = F.conv2d(reference_input(x, scheme, inputs), kernel, None, 1, 1, 1, 4)
    assert_close(y, expected, tolerance(scheme, torch.float32))


@pytest.mark.parametrize("weight_scheme", [w for w in WEIGHTS.values() if Scheme(w, None) and w.format.is_integer])
def test_integer_paths_sum_exactly(weight_scheme: WeightScheme) -> None:
    """With unit scales the output *is* the int32 accumulator, equal to int64."""
    scheme = Scheme(weight_scheme, ACTIVATIONS["int8 static"])
    if not scheme.has_integer_path:
        assert not compute_path(scheme, "cpu").is_integer
        return
    weight = make_weight(weight_scheme)
    weight.scale = torch.ones_like(weight.scale)
    x = torch.randint(-127, 128, (7, 160)).float()
    y = linear(x, weight, scheme, None, InputQuantization(scale=torch.ones(1)))
    expected = x.long() @ integer_weight(weight).long().t()
    assert torch.equal(y.long(), expected)
    assert torch.equal(int_matmul(x.to(torch.int8), integer_weight(weight)).long(), expected)


@pytest.mark.parametrize("name", ["int4 two-level", "int4 PerGroup asym", "int8 PerChannel sym", "int3 PerTensor sym"])
@pytest.mark.parametrize("act", [None, ACTIVATIONS["int8 token"], ACTIVATIONS["int8 static asym"]])
def test_blocks_of_rows_equal_the_whole(
    name: str, act: ActivationScheme | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = Scheme(WEIGHTS[name], act)
    weight, inputs, x, bias = make_weight(scheme.weight), make_inputs(act), make_input(9, 160), torch.randn(24)
    whole = linear(x, weight, scheme, bias, inputs)
    monkeypatch.setattr(dispatch, "BLOCK_BYTES", 4 * 160 * 7)
    parts = linear(x, weight, scheme, bias, inputs)
    if compute_path(scheme, "cpu").is_integer:
        assert torch.equal(parts, whole)
    else:
        assert_close(parts, whole)


def test_shapes_of_input() -> None:
    scheme = Scheme(WEIGHTS["int8 PerChannel sym"], ACTIVATIONS["int8 token"])
    weight, x = make_weight(scheme.weight), make_input(4, 6, 160)
    whole = linear(x, weight, scheme)
    assert torch.equal(linear(x[1, 2], weight, scheme), whole[1, 2])
    assert torch.equal(linear(x.transpose(0, 1), weight, scheme), whole.transpose(0, 1))
    assert torch.equal(linear(x[:, ::2], weight, scheme), whole[:, ::2])
    for path in (scheme, Scheme(scheme.weight, None)):
        assert linear(x[:0], weight, path).shape == (0, 6, 24)


def test_dense_weight_folds_everything() -> None:
    weight = make_weight(WEIGHTS["int4 PerGroup asym"])
    pre_scale, down, up = torch.rand(160), torch.randn(4, 160), torch.randn(24, 4)
    expected = dequantize(weight).double() * pre_scale.double() + up.double() @ down.double()
    assert_close(dense_weight(weight, torch.bfloat16, pre_scale, (down, up)), expected)


@pytest.mark.parametrize(
    ("scheme", "device", "name"),
    [
        (Scheme(WEIGHTS["int8 PerChannel sym"], ACTIVATIONS["int8 token"]), "cuda", "int8-cuda"),
        (Scheme(WEIGHTS["int4 two-level"], ACTIVATIONS["int4 token"]), "cuda", "int8-cuda"),
        (Scheme(WEIGHTS["int8 PerChannel sym"], ACTIVATIONS["int8 token"]), "meta", "int8-cpu"),
        (Scheme(WEIGHTS["int4 PerGroup sym"], ACTIVATIONS["int8 token"]), "cpu", "dequantize"),
        (Scheme(WEIGHTS["fp8 channel"], None), "cpu", "dequantize"),
        (Scheme(WEIGHTS["fp8 channel"], ACTIVATIONS["fp8 token"]), "cpu", "dequantize-weight-only"),
    ],
)
def test_compute_path_names(scheme: Scheme, device: str, name: str) -> None:
    path = compute_path(scheme, device, torch.bfloat16)
    assert path.name == name
    assert path.is_integer == name.startswith("int8")
    assert path.description
    if device == "meta" or not torch.cuda.is_available():
        assert device == "cpu" or path.faster_than_dense is None


@pytest.mark.parametrize(
    ("weight", "dtype", "has_kernels", "has_fp8", "name"),
    [
        ("int8 PerChannel sym", torch.bfloat16, True, False, "w8a16-cuda"),
        ("int8 PerChannel sym", torch.bfloat16, False, True, "dequantize"),
        ("int8 PerChannel sym", torch.float32, True, True, "dequantize"),
        ("fp8 channel", torch.float16, True, True, "w8a16-cuda"),
        ("fp8 channel", torch.float16, True, False, "dequantize"),
    ],
)
def test_compute_path_of_8_bit_weight_only_layers(
    weight: str, dtype: torch.dtype, has_kernels: bool, has_fp8: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_has_fast_int4", lambda device: has_kernels)
    monkeypatch.setattr(dispatch, "_has_fp8_matmul", lambda device: has_fp8)
    assert compute_path(Scheme(WEIGHTS[weight], None), "cuda", dtype).name == name


@pytest.mark.parametrize("fast", [True, False])
def test_compute_path_follows_the_cpu(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_fast_int8", lambda: fast)
    scheme = Scheme(WEIGHTS["int8 PerChannel sym"], ACTIVATIONS["int8 token"])
    assert compute_path(scheme, "cpu").name == ("int8-vnni" if fast else "int8-cpu")


def test_speed_is_told_only_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme(WEIGHTS["int8 PerChannel sym"], ACTIVATIONS["int8 token"])
    monkeypatch.setattr(measured.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for fast, dtype, faster in (
        (True, torch.float32, True),
        (True, torch.bfloat16, None),
        (False, torch.float32, False),
        (False, torch.bfloat16, True),
        (False, torch.float16, None),
    ):
        monkeypatch.setattr(measured, "has_fast_int8", lambda fast=fast: fast)
        monkeypatch.setattr(dispatch, "has_fast_int8", lambda fast=fast: fast)
        assert compute_path(scheme, "cpu", dtype).faster_than_dense is faster
    assert compute_path(scheme, "cpu", kind="conv2d").faster_than_dense is None
    monkeypatch.setattr(measured.platform, "machine", lambda: "aarch64")
    assert compute_path(scheme, "cpu").faster_than_dense is None


def test_speed_on_a_gpu_is_told_only_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measured, "has_fast_int4", lambda device: True)
    monkeypatch.setattr(dispatch, "_has_fast_int4", lambda device: True)
    w8a8 = Scheme(WEIGHTS["int8 PerChannel sym"], ACTIVATIONS["int8 token"])
    w4a16 = Scheme(WEIGHTS["int4 PerGroup asym"], None)
    for name, scheme, dtype, faster in (
        ("NVIDIA H200", w8a8, torch.bfloat16, True),
        ("NVIDIA H200", w8a8, torch.float32, None),
        ("NVIDIA H200", w4a16, torch.bfloat16, False),
        ("NVIDIA A100-SXM4-80GB", w8a8, torch.bfloat16, None),
    ):
        monkeypatch.setattr(dispatch.torch.cuda, "get_device_name", lambda device, name=name: name)
        assert compute_path(scheme, "cuda", dtype).faster_than_dense is faster
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert [compute_path(w8a8, "cuda", outputs=outputs).faster_than_dense for outputs in (1280, 1536)] == [False, True]
    assert compute_path(w4a16, "cuda", torch.float16).name == "int4-cuda"
    assert compute_path(w4a16, "cuda", torch.float32).name == "dequantize"
    assert compute_path(w8a8, "cuda", kind="conv2d").faster_than_dense is None


def test_speed_of_convolutions_is_told_by_their_window(monkeypatch: pytest.MonkeyPatch) -> None:
    w8a8 = Scheme(WEIGHTS["int8 PerChannel sym"], ACTIVATIONS["int8 token"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measured, "has_fast_int4", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")

    def faster(geometry: Geometry | None, dtype: torch.dtype = torch.bfloat16) -> bool | None:
        return compute_path(w8a8, "cuda", dtype, kind="conv2d", geometry=geometry).faster_than_dense

    assert faster(Geometry((3, 3))) is True
    assert faster(Geometry((3, 3), (2, 2))) is False
    assert faster(Geometry((1, 1))) is False
    assert faster(None) is None
    assert faster(Geometry((3, 3)), torch.float16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert faster(Geometry((3, 3))) is None


@pytest.mark.parametrize("native", [True, False])
def test_dequantizing_product_avoids_emulated_dtypes(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bf16 instructions multiplies in float32, which is faster there, and rounds the result."""
    monkeypatch.setattr("diffuse_compress.quantization.product_dtype._multiplies_natively", lambda dtype: native)
    scheme = Scheme(WEIGHTS["int4 PerGroup asym"], None)
    weight, x = make_weight(scheme.weight), make_input(9, 160, dtype=torch.bfloat16)
    y = linear(x, weight, scheme)
    assert_close(y, x.double() @ dequantize(weight).double().t(), tolerance(scheme, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weight_scheme", "act"), PRODUCT)
def test_cuda_matches_cpu(weight_scheme: WeightScheme, act: ActivationScheme | None, dtype: torch.dtype) -> None:
    scheme = Scheme(weight_scheme, act)
    weight, inputs = make_weight(weight_scheme), make_inputs(act, 160)
    x, bias = make_input(33, 160, dtype=dtype), torch.randn(24)
    parts = {
        name: getattr(weight, name).cuda()
        for name in ("qweight", "scale", "zero_point", "group_scale")
        if getattr(weight, name) is not None
    }
    on_gpu = QuantizedWeight(
        **{"zero_point": None, "group_scale": None, **parts}, in_features=160, scheme=weight_scheme
    )
    moved = InputQuantization(
        *(None if t is None else t.cuda() for t in (inputs.scale, inputs.zero_point, inputs.pre_scale))
    )
    y = linear(x.cuda(), on_gpu, scheme, bias.cuda(), moved)
    if compute_path(scheme, "cuda", dtype).name == "fp8-cuda":
        codes, scale, _ = quantize_activation(x.float() * inputs.pre_scale, act)
        expected = (codes.double() * scale) @ dequantize(weight).double().t() + bias
        assert_close(y, expected, Tolerance(rms=1e-2, maximum=1e-1))
    else:
        expected = F.linear(reference_input(x, scheme, inputs), dequantize(weight).double(), bias.double())
        assert_close(y, expected, tolerance(scheme, torch.bfloat16))
