"""The Inception network: shapes, folding, weight files, preprocessing; against pytorch-fid where that is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import random_inception
from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.evaluation.features import (
    PREPROCESSING,
    InceptionExtractor,
    extract_features,
    inception_input,
)
from diffuse_compress.evaluation.fid import SetScorer, save_statistics
from diffuse_compress.evaluation.inception import WEIGHTS_FILE, find_weights, load_inception
from diffuse_compress.evaluation.samples import open_pictures

has_pytorch_fid = all(importlib.util.find_spec(name) for name in ("torchvision", "pytorch_fid"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_inception.write(tmp_path_factory.mktemp("hub") / "checkpoints" / WEIGHTS_FILE)


def test_network_has_the_published_parameters_and_features(weights: Path) -> None:
    network, digest = load_inception(weights)
    assert sum(p.numel() for p in random_inception.state_dict().values() if p.dim() == 4) == 21_751_136
    assert len(digest) == 8
    x = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = network(x, spatial=True)
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "features": (2, 2048),
        "logits": (2, 1008),
        "spatial": (2, 2023),
    }
    assert (found["features"].std(0) > 0).float().mean() > 0.5
    for dims in (64, 192, 768):
        assert network(x, dims)["features"].shape == (2, dims)


def test_batch_norms_are_folded_exactly(weights: Path) -> None:
    network, _ = load_inception(weights)
    state = random_inception.state_dict()
    x = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    name = "Conv2d_1a_3x3"
    norm = [state[f"{name}.bn.{key}"].double() for key in ("running_mean", "running_var", "weight", "bias")]
    y = torch.nn.functional.conv2d(x.double(), state[f"{name}.conv.weight"].double(), stride=2)
    expected = torch.relu(torch.nn.functional.batch_norm(y, *norm, eps=1e-3))
    assert torch.allclose(network.get_submodule(name)(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_weights_are_found_or_the_message_says_how_to_get_them(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(weights.parents[1]))
    assert find_weights() == weights
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match=rf"needs the Inception weights {WEIGHTS_FILE}.*Download https://github.com"):
        find_weights()
    with pytest.raises(ConfigError, match="no such file"):
        find_weights(tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(CheckpointError, match="not a readable weight file"):
        load_inception(tmp_path / "text.pth")
    torch.save({"some.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="not the weights of the Inception network"):
        load_inception(tmp_path / "other.pth")
    torch.save({**random_inception.state_dict(), "AuxLogits.fc.weight": torch.zeros(3)}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match="1 tensors that the Inception network of FID does not have"):
        load_inception(tmp_path / "more.pth")


def test_other_weights_are_never_called_fid(weights: Path) -> None:
    extractor = InceptionExtractor(weights=weights)
    assert not extractor.is_published
    assert "other weights than FID's" in extractor.name
    names = {InceptionExtractor(kind, weights=weights).name for kind in PREPROCESSING}
    assert len(names) == len(PREPROCESSING)
    with pytest.raises(ConfigError, match="preprocessing of pytorch-fid, torch-fidelity, clean-fid"):
        InceptionExtractor("tf2", weights=weights)


@pytest.mark.parametrize("shape", [(41, 64), (350, 320)])
def test_preprocessing_follows_the_three_implementations(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8, generator=generator)
    plain = torch.nn.functional.interpolate(pictures / 255, (299, 299), mode="bilinear", align_corners=False)
    assert torch.equal(inception_input(pictures, "pytorch-fid"), plain * 2 - 1)

    # TensorFlow 1: pixel i of the output lies at i * size / 299 of the input, whatever the corners.
    found = inception_input(pictures, "torch-fidelity")
    for row, column in ((0, 0), (150, 7), (298, 298), (298, 0)):
        y, x = row * shape[0] / 299, column * shape[1] / 299
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, shape[0] - 1), min(x0 + 1, shape[1] - 1)
        p = pictures[0, 1].double()
        top = p[y0, x0] * (1 - (x - x0)) + p[y0, x1] * (x - x0)
        bottom = p[y1, x0] * (1 - (x - x0)) + p[y1, x1] * (x - x0)
        expected = (top * (1 - (y - y0)) + bottom * (y - y0) - 128) / 128
        assert found[0, 1, row, column].item() == pytest.approx(expected.item(), abs=1e-4)

    channels = [Image.fromarray(p.numpy().astype(np.float32)) for p in pictures[1]]
    # torch's weights are float32, PIL's float64: 3e-5 apart at most, four thousandths of a grey level.
    resized = [np.asarray(c.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for c in channels]
    expected = (torch.from_numpy(np.stack(resized)) - 128) / 128
    assert torch.allclose(inception_input(pictures, "clean-fid")[1], expected, atol=1e-4)


def write_noise(folder: Path, count: int, seed: int, size: tuple[int, int] = (48, 40)) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for i in range(count):
        smooth = generator.random((6, 5, 3)) * 255
        Image.fromarray(smooth.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


@pytest.mark.slow  # eigenvalues of 2048 x 2048, four times
def test_inception_scores_sets_and_their_statistics_files(weights: Path, tmp_path: Path) -> None:
    one, two = (open_pictures(write_noise(tmp_path / name, 4, seed)) for seed, name in enumerate(("a", "b")))
    extractor = InceptionExtractor(weights=weights, spatial=True)
    metrics = SetScorer(one, extractor, ["fid", "sfid", "is"], resamples=0).score(two)
    label = "2048 Inception features, other weights than FID's"
    assert [metric.name for metric in metrics] == [
        f"Fréchet distance, {label}",
        f"Fréchet distance of spatial features, {label}",
        f"Exponentiated class divergence, {label}",
    ]
    assert metrics[0].value > 0
    assert metrics[0].statistics_sha256 != metrics[1].statistics_sha256
    save_statistics(one, extractor, tmp_path / "a.npz")
    through = SetScorer(tmp_path / "a.npz", extractor, ["fid", "sfid"], resamples=0).score(two)
    assert [metric.value for metric in through] == pytest.approx([metric.value for metric in metrics[:2]], rel=1e-9)


@pytest.mark.skipif(not has_pytorch_fid, reason="torchvision and pytorch-fid are not installed")
def test_parity_with_pytorch_fid_on_random_weights(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formula and preprocessing parity on random Inception weights."""
    import scipy.linalg
    from pytorch_fid import fid_score

    root = scipy.linalg.sqrtm  # from SciPy 1.18 on it takes no disp=, which pytorch-fid 0.3.0 gives
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda a, disp=True: root(a) if disp else (root(a), 0.0))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(weights.parents[1]))
    one, two = (write_noise(tmp_path / name, 96, seed) for seed, name in enumerate(("a", "b")))
    expected = fid_score.calculate_fid_given_paths([str(one), str(two)], 8, "cpu", 64, num_workers=0)
    scorer = SetScorer(open_pictures(one), InceptionExtractor(dims=64), ["fid"], resamples=0)
    (metric,) = scorer.score(open_pictures(two))
    assert metric.value == pytest.approx(expected, rel=1e-3, abs=1e-3)

    from pytorch_fid.inception import InceptionV3

    files = sorted(one.iterdir())[:4]
    theirs = fid_score.get_activations(files, InceptionV3([3]).eval(), 4, 2048, "cpu", num_workers=0)
    ours = extract_features(open_pictures(one, limit=4), InceptionExtractor())["features"]
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-3, atol=1e-4)
