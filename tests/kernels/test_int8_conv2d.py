"""Integer convolution against a dense float64 convolution of the same codes and scales."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffuse_compress_kernels import int8_conv2d, quantize_rows
from diffuse_compress_kernels.int8_conv2d import op
from diffuse_compress_kernels.int8_linear import cpu
from tolerance import assert_close

GEOMETRIES = {
    "3x3": {"kernel": (3, 3), "padding": (1, 1, 1, 1)},
    "3x3 stride 2": {"kernel": (3, 3), "padding": (1, 1, 1, 1), "stride": (2, 2)},
    "3x3 no padding, strides differ": {"kernel": (3, 3), "stride": (1, 2)},
    "3x3 dilated": {"kernel": (3, 3), "padding": (2, 2, 2, 2), "dilation": (2, 2)},
    "1x1": {"kernel": (1, 1)},
    "1x1 stride 2": {"kernel": (1, 1), "stride": (2, 2)},
    "1x1 padded": {"kernel": (1, 1), "padding": (1, 1, 1, 1)},
    "2x4 uneven padding": {"kernel": (2, 4), "padding": (1, 2, 0, 1)},
}


@pytest.fixture(params=["int_mm", "float32"])
def gemm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu, "has_fast_int8", lambda: request.param == "int_mm")
    monkeypatch.setitem(op.COLUMN_BLOCK_ELEMENTS, "cpu", 2000)
    return str(request.param)


def reference(x, weight, weight_scale, bias, geometry, qmin=-127, **given):
    flat = x.float() if "pre_scale" not in given else x.float() * given["pre_scale"].view(1, -1, 1, 1)
    codes, scale = quantize_rows(flat.reshape(x.shape[0], -1), qmin, 127, given.get("scale"), given.get("zero_point"))
    values = codes.double() if given.get("zero_point") is None else codes.double() - given["zero_point"].double()
    values = F.pad((values * scale.double()).view(x.shape), geometry.get("padding", (0, 0, 0, 0)))
    kernel = (weight.double() * weight_scale.double()).view(-1, x.shape[1], *geometry["kernel"])
    options = {key: geometry[key] for key in ("stride", "dilation") if key in geometry}
    return F.conv2d(values, kernel, None if bias is None else bias.double(), **options)


def operands(kernel, dtype=torch.float32, channels=12, outputs=10):
    x = torch.randn(3, channels, 11, 9)
    x[1] *= 40
    x[:, 2] *= 10
    weight = torch.randint(-128, 128, (outputs, channels * kernel[0] * kernel[1]), dtype=torch.int8)
    return x.to(dtype), weight, torch.rand(outputs, 1) * 1e-2, torch.randn(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_int8_conv2d_matches_reference(gemm, geometry, dtype) -> None:
    x, weight, weight_scale, bias = operands(geometry["kernel"], dtype)
    y = int8_conv2d(x, weight, weight_scale, bias, **geometry)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_close(y, reference(x, weight, weight_scale, bias, geometry), dtype)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_int8_conv2d_static_asymmetric_pads_with_exact_zeros(gemm, geometry) -> None:
    x, weight, weight_scale, bias = operands(geometry["kernel"])
    given = {"scale": torch.tensor([0.2]), "zero_point": torch.tensor([-31], dtype=torch.int8)}
    y = int8_conv2d(
        x,
        weight,
        weight_scale,
        bias,
        **geometry,
        qmin=-128,
        input_scale=given["scale"],
        input_zero_point=given["zero_point"],
    )
    assert_close(y, reference(x, weight, weight_scale, bias, geometry, qmin=-128, **given))


def test_int8_conv2d_pre_scale_and_no_bias(gemm) -> None:
    geometry = GEOMETRIES["3x3"]
    x, weight, weight_scale, _ = operands(geometry["kernel"], torch.bfloat16)
    pre_scale = torch.rand(12) + 0.1
    y = int8_conv2d(x, weight, weight_scale, **geometry, pre_scale=pre_scale)
    assert_close(y, reference(x, weight, weight_scale, None, geometry, pre_scale=pre_scale), torch.bfloat16)


def test_int8_conv2d_samples_do_not_depend_on_their_batch(gemm) -> None:
    geometry = GEOMETRIES["3x3"]
    x, weight, weight_scale, bias = operands(geometry["kernel"])
    whole = int8_conv2d(x, weight, weight_scale, bias, **geometry)
    for i in range(3):
        assert torch.equal(int8_conv2d(x[i : i + 1], weight, weight_scale, bias, **geometry), whole[i : i + 1])


def test_int8_conv2d_any_strides_and_empty_batch(gemm) -> None:
    geometry = GEOMETRIES["3x3"]
    x, weight, weight_scale, bias = operands(geometry["kernel"])
    y = int8_conv2d(x, weight, weight_scale, bias, **geometry)
    last = int8_conv2d(x.to(memory_format=torch.channels_last), weight, weight_scale, bias, **geometry)
    assert torch.equal(last, y)
    assert last.is_contiguous(memory_format=torch.channels_last)
    four = weight.view(10, 12, 3, 3).contiguous(memory_format=torch.channels_last)
    assert torch.equal(int8_conv2d(x, four, weight_scale, bias, **geometry), y)
    assert int8_conv2d(x[:0], weight, weight_scale, bias, **geometry).shape == (0, 10, 11, 9)


def test_int8_conv2d_refuses_other_operands() -> None:
    x, weight, weight_scale, _ = operands((3, 3))
    with pytest.raises(ValueError, match=r"need x \[B, C, H, W\] and int8 weight \[N, C \* 1 \* 1\]"):
        int8_conv2d(x, weight, weight_scale, kernel=(1, 1))


def test_int8_conv2d_opcheck_compile_and_meta() -> None:
    x, weight, weight_scale, bias = operands((3, 3))
    geometry = ([3, 3], [2, 1], [1, 1, 0, 1], [1, 1])
    arguments = (x, weight, weight_scale, bias, *geometry, -127, 127, None, None, torch.rand(12))
    torch.library.opcheck(torch.ops.diffuse_compress.int8_conv2d.default, arguments)

    def run(x):
        return int8_conv2d(x, weight, weight_scale, bias, kernel=(3, 3), stride=(2, 1), padding=(1, 1, 0, 1))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for form in (x, x.to(memory_format=torch.channels_last)):
        assert torch.equal(compiled(form), run(form))
        assert compiled(form).stride() == run(form).stride()
    meta = int8_conv2d(x.to("meta"), weight.to("meta"), weight_scale.to("meta"), kernel=(3, 3), stride=(2, 1))
    assert meta.shape == (3, 10, 5, 7)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [4, 48, 144])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_cuda_equals_the_cpu_bit_for_bit(geometry, channels) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, weight_scale, bias = operands(geometry["kernel"], dtype, channels, 40)
        static = {"input_scale": torch.tensor([0.2]), "input_zero_point": torch.tensor([-31], dtype=torch.int8)}
        for given in ({}, {"pre_scale": torch.rand(channels) + 0.1}, static | {"qmin": -128}):
            expected = int8_conv2d(x, weight, weight_scale, bias, **geometry, **given)
            there = {key: value.cuda() if torch.is_tensor(value) else value for key, value in given.items()}
            for form in (x.cuda(), x.cuda().to(memory_format=torch.channels_last)):
                y = int8_conv2d(form, weight.cuda(), weight_scale.cuda(), bias.cuda(), **geometry, **there)
                assert torch.equal(y.cpu(), expected)
                assert y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_cuda_graph_replays_and_two_calls_agree() -> None:
    geometry = GEOMETRIES["3x3"]
    x, weight, weight_scale, bias = (part.cuda() for part in operands(geometry["kernel"], torch.bfloat16, 320, 64))
    expected = int8_conv2d(x, weight, weight_scale, bias, **geometry)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = int8_conv2d(x, weight, weight_scale, bias, **geometry)
    for _ in range(2):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)
