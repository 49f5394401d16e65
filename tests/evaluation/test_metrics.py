"""PSNR and SSIM against naive float64 loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffuse_compress.errors import IncompatibleShapeError
from diffuse_compress.evaluation.metrics import as_pictures, bounding_box, psnr, ssim


def naive_ssim(x: np.ndarray, y: np.ndarray, data_range: float, box: tuple[int, int, int, int]) -> float:
    """Equation 13 of Wang et al. 2004, window by window inside ``box``, averaged over channels; [3, H, W] float64."""
    window = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)])
    window /= window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    top, left, bottom, right = box
    values = []
    for channel, i, j in itertools.product(range(3), range(top, bottom - 10), range(left, right - 10)):
        a, b = x[channel, i : i + 11, j : j + 11], y[channel, i : i + 11, j : j + 11]
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        covariance = (window * (a - mean_a) * (b - mean_b)).sum()
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        values.append(luminance * (2 * covariance + c2) / (var_a + var_b + c2))
    return float(np.mean(values))


def noisy_pair(height: int = 16, width: int = 19, data_range: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    reference = torch.rand(2, 3, height, width)
    noisy = (reference + 0.2 * torch.randn_like(reference)).clamp(0, 1)
    return reference * data_range, noisy * data_range


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_equals_naive_windows(data_range: float) -> None:
    reference, pictures = noisy_pair(data_range=data_range)
    expected = [
        naive_ssim(x.double().numpy(), y.double().numpy(), data_range, (0, 0, 16, 19))
        for x, y in zip(reference, pictures, strict=True)
    ]
    assert ssim(reference, pictures, data_range).tolist() == pytest.approx(expected, abs=1e-10)


def test_ssim_in_box_counts_windows_inside_only() -> None:
    reference, pictures = noisy_pair(20, 24)
    box = (3, 5, 17, 20)
    expected = naive_ssim(reference[0].double().numpy(), pictures[0].double().numpy(), 1.0, box)
    boxes = torch.tensor([box, (0, 0, 20, 24)])
    values = ssim(reference, pictures, boxes=boxes)
    assert values[0].item() == pytest.approx(expected, abs=1e-10)
    assert values[1] == ssim(reference, pictures)[1]


@pytest.mark.parametrize("box", [(0, 0, 4, 4), (16, 20, 20, 24), (9, 9, 10, 10)])
def test_ssim_widens_small_boxes_to_one_window(box: tuple[int, ...]) -> None:
    reference, pictures = noisy_pair(20, 24)
    values = ssim(reference, pictures, boxes=torch.tensor([box, box]))
    assert torch.isfinite(values).all()


def test_ssim_equal_pictures_is_one_and_small_ones_are_refused() -> None:
    reference, _ = noisy_pair()
    assert ssim(reference, reference).tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(IncompatibleShapeError, match="at least 11 pixels"):
        ssim(reference[..., :10, :], reference[..., :10, :])


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_psnr_equals_its_definition(data_range: float) -> None:
    reference, pictures = noisy_pair(data_range=data_range)
    for value, a, b in zip(
        psnr(reference, pictures, data_range).tolist(), reference.numpy(), pictures.numpy(), strict=True
    ):
        error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
        assert value == pytest.approx(10 * math.log10(data_range**2 / error), abs=1e-9)


def test_psnr_in_box_ignores_what_is_outside() -> None:
    reference = torch.zeros(1, 3, 12, 12)
    pictures = reference.clone()
    pictures[..., 0, 0] = 1.0
    pictures[..., 5:7, 5:7] = 0.1
    boxes = torch.tensor([[5, 5, 7, 7]])
    assert psnr(reference, pictures, boxes=boxes).item() == pytest.approx(20.0, abs=1e-5)
    assert psnr(reference, reference).item() == math.inf


def test_metrics_refuse_other_shapes() -> None:
    with pytest.raises(IncompatibleShapeError, match="one shape"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4))


def test_bounding_box_finds_the_glyph_and_falls_back_to_the_frame() -> None:
    pictures = torch.ones(3, 3, 10, 12)
    pictures[0, 1, 2:5, 3:9] = 0.5
    pictures[1, :, 9, 11] = 0.0
    pictures[2, 0, 4, 4] = 0.97  # below the threshold: still background
    assert bounding_box(pictures).tolist() == [[2, 3, 5, 9], [9, 11, 10, 12], [0, 0, 10, 12]]
    colour = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1).expand(1, 3, 6, 6).clone()
    colour[0, 2, 1, 4] = 0.0
    assert bounding_box(colour, background=(0.2, 0.4, 0.6)).tolist() == [[1, 4, 2, 5]]


def test_as_pictures_reads_pil_arrays_and_tensors_alike() -> None:
    codes = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    arrays = [one.permute(1, 2, 0).numpy() for one in codes]
    expected = codes.float() / 255
    assert torch.equal(as_pictures([Image.fromarray(array) for array in arrays]), expected)
    assert torch.equal(as_pictures(arrays), expected)
    assert torch.equal(as_pictures(codes), expected)
    assert torch.equal(as_pictures(expected), expected)
    assert torch.allclose(as_pictures([array / 255.0 for array in arrays]), expected)
