"""Cases of the Triton convolution for its interpreter: ``test_triton_conv2d.py`` runs them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffuse_compress_kernels import int8_conv2d
from diffuse_compress_kernels.int8_linear import cpu
from diffuse_compress_kernels.triton_kernels.conv2d import conv2d
from diffuse_compress_kernels.triton_kernels.conv_geometry import ConvConfig, ConvShape
from diffuse_compress_kernels.triton_kernels.conv_quantize import quantize_pictures
from diffuse_compress_kernels.triton_kernels.launch import Unsuitable

# kernel, stride, padding (left, right, top, bottom), dilation
GEOMETRIES = {
    "3x3": ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "3x3 stride 2": ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    "3x3 stride 2, padded on two sides": ((3, 3), (2, 2), (0, 1, 0, 1), (1, 1)),
    "3x3 no padding, strides differ": ((3, 3), (1, 2), (0, 0, 0, 0), (1, 1)),
    "3x3 dilated": ((3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    "1x1": ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    "1x1 padded": ((1, 1), (1, 1), (1, 1, 1, 1), (1, 1)),
    "2x4 uneven padding": ((2, 4), (1, 1), (1, 2, 0, 1), (1, 1)),
}
MODES = ("gather", "shift", "box")


def pictures(channels: int, dtype: torch.dtype, last: bool) -> torch.Tensor:
    x = torch.randn(2, channels, 7, 6)
    x[1] *= 40
    x[:, 2] *= 10
    return x.to(dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def taps_last(weight: torch.Tensor, shape: ConvShape) -> torch.Tensor:
    unfolded = weight.view(weight.shape[0], shape.channels, *shape.kernel).permute(0, 2, 3, 1)
    return F.pad(unfolded, (0, shape.stored_channels - shape.channels)).flatten(1).contiguous()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_conv2d_equals_the_cpu_bit_for_bit(geometry, mode) -> None:
    kernel, stride, padding, dilation = geometry
    ran = 0
    for channels, dtype, last, weight_left, split_k, asymmetric in (
        (4, torch.float32, True, True, 1, False),
        (40, torch.float16, False, False, 2, False),
        (12, torch.float32, False, True, 3, True),
    ):
        x = pictures(channels, dtype, last)
        weight = torch.randint(-128, 128, (21, channels * kernel[0] * kernel[1]), dtype=torch.int8)
        w_scale, bias, pre = torch.rand(21, 1) * 1e-2, torch.randn(21), torch.rand(channels) + 0.1
        shape = ConvShape(2, 7, 6, channels, kernel, stride, padding, dilation)
        config = ConvConfig(mode, 32, 32, 32, 4, 3, 2, split_k, weight_left)
        scale = torch.tensor([0.05]) if asymmetric else None
        zero = torch.tensor([-17], dtype=torch.int8) if asymmetric else None
        qmin = -128 if asymmetric else -127
        expected = int8_conv2d(
            x, weight, w_scale, bias, kernel=kernel, stride=stride, padding=padding, dilation=dilation, qmin=qmin,
            input_scale=scale, input_zero_point=zero, pre_scale=pre,
        )  # fmt: skip
        codes, measured = quantize_pictures(x, shape, qmin, 127, scale, zero, pre)
        offset = None if zero is None else weight.sum(1, dtype=torch.int32) * int(zero)
        out = torch.full_like(expected, float("nan"))
        stored = taps_last(weight, shape)
        if not shape.fits(mode) or (mode == "box" and asymmetric and any(padding)):
            with pytest.raises(Unsuitable, match="cannot load"):
                conv2d(codes, measured, stored, w_scale, shape, config, offset=offset, bias=bias, out=out)
            continue
        conv2d(codes, measured, stored, w_scale, shape, config, offset=offset, bias=bias, out=out)
        assert torch.equal(out, expected), config.name
        ran += 1
    assert ran or mode != "gather"


@pytest.mark.parametrize("mode", MODES)
def test_conv2d_sums_are_exact_and_nothing_else_is_written(mode) -> None:
    shape = ConvShape(2, 6, 5, 20, (3, 3), padding=(1, 1, 1, 1))
    weight = torch.randint(-128, 128, (19, 180), dtype=torch.int8)
    codes, _ = quantize_pictures(torch.randn(2, 20, 6, 5), shape, -127, 127)
    plain = codes[shape.lead :].view(2, *shape.pitch, -1)[:, :6, :5, :20].permute(0, 3, 1, 2)
    expected = F.conv2d(plain.double(), weight.view(19, 20, 3, 3).double(), padding=1)
    for layout in ("first", "last"):
        buffer = torch.full((2 * 19 * 30 + 128,), 7777777, dtype=torch.int32)
        sizes = (2, 19, 6, 5) if layout == "first" else (2, 6, 5, 19)
        out = buffer[64:-64].view(sizes)
        out = out if layout == "first" else out.permute(0, 3, 1, 2)
        config = ConvConfig(mode, 16, 16, 32, 4, 2, 8, 2, True)
        conv2d(codes, None, taps_last(weight, shape), None, shape, config, out=out)
        assert torch.equal(out.double(), expected)
        assert (torch.cat([buffer[:64], buffer[-64:]]) == 7777777).all()


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("channels", [3, 64])
def test_quantize_pictures_equals_the_cpu_and_fills_gaps(last, gaps, given, channels) -> None:
    x, pre = pictures(channels, torch.float16, last), torch.rand(channels) + 0.5
    shape = ConvShape(2, 7, 6, channels, (3, 5), padding=(2, 1, 0, 1), gaps=gaps)
    scale = torch.tensor([0.3]) if given else None
    zero = torch.tensor([-9], dtype=torch.int8) if given else None
    codes, measured = quantize_pictures(x, shape, -128 if given else -127, 127, scale, zero, pre)
    flat = (x.float() * pre.view(-1, 1, 1)).flatten(1)
    expected, expected_scale = cpu.quantize_rows(flat, -128 if given else -127, 127, scale, zero)
    stored = codes[shape.lead :].view(2, *shape.pitch, -1)
    assert torch.equal(measured, expected_scale.flatten())
    assert torch.equal(stored[:, :7, :6, :channels].permute(0, 3, 1, 2), expected.view(x.shape))
    for part in (codes[: shape.lead], stored[:, 7:], stored[:, :, 6:]):
        assert (part == (-9 if given else 0)).all()


def test_quantize_pictures_strided_input_and_nan() -> None:
    x = torch.randn(2, 10, 6, 8)[:, ::2, :, ::2]
    shape = ConvShape(2, 6, 4, 5, (1, 1))
    codes, scale = quantize_pictures(x, shape, -127, 127)
    again, again_scale = quantize_pictures(x.contiguous(), shape, -127, 127)
    assert torch.equal(codes, again)
    assert torch.equal(scale, again_scale)
    x[1, 2, 3, 0] = float("nan")
    _, scale = quantize_pictures(x, shape, -127, 127)
    assert scale.isnan().tolist() == [False, True]
