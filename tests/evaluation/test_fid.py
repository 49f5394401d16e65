"""Sets of pictures against each other: reading, features, scores, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffuse_compress.cli import main
from diffuse_compress.errors import CheckpointError, ConfigError, DiffuseCompressWarning
from diffuse_compress.evaluation.features import ClassifierExtractor, ClipExtractor, extract_features
from diffuse_compress.evaluation.fid import METRICS, SetScorer, save_statistics
from diffuse_compress.evaluation.frechet import feature_statistics, frechet_distance, load_statistics
from diffuse_compress.evaluation.samples import MANIFEST, Sample, open_pictures, sample_hash

CLASSIFIER = """
import torch
class ColourClassifier:
    captions = ["dark", "light"]
    def embeddings(self, pictures):
        return torch.nn.functional.adaptive_avg_pool2d(pictures, 2).flatten(1) * 10
    def classify(self, pictures):
        level = pictures.mean(dim=(1, 2, 3))
        return torch.stack([1 - level, level], 1)
def load_classifier(folder):
    return ColourClassifier()
"""


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    (tmp_path / "classifier.py").write_text(CLASSIFIER)
    return tmp_path / "classifier.py"


def write_pictures(folder: Path, count: int, seed: int, shift: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        values = generator.integers(0, 200, (size[1], size[0], 3)) + shift
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def make_run(folder: Path, prompts: list[str], seed: int, base: int = 0) -> Path:
    """A finished run's folder, as far as metrics read it."""
    write_pictures(folder / "samples", len(prompts), seed)
    lines = []
    for i, prompt in enumerate(prompts):
        file = f"samples/{i:03d}.png"
        lines.append(Sample(i, file, base + i, prompt, None, sample_hash(folder / file)).to_json())
    (folder / MANIFEST).write_text("\n".join(lines) + "\n")
    return folder


def test_features_keep_the_order_of_the_files_whatever_the_batch(tmp_path: Path, classifier: Path) -> None:
    pictures = open_pictures(write_pictures(tmp_path / "a", 7, 0))
    extractor = ClassifierExtractor(classifier)
    found = extract_features(pictures, extractor, batch_size=3)
    assert extractor.label == "colour classifier features"
    for i, path in enumerate(sorted((tmp_path / "a").iterdir())):
        values = torch.from_numpy(np.asarray(Image.open(path)) / 255).float().permute(2, 0, 1)
        expected = torch.nn.functional.adaptive_avg_pool2d(values, 2).flatten() * 10
        assert torch.allclose(found["features"][i], expected, atol=1e-5)
    again = extract_features(pictures, extractor, batch_size=3, workers=2)
    assert torch.equal(found["features"], again["features"])
    enlarged = ClassifierExtractor(tmp_path, size=16)
    assert enlarged.name.endswith("resized to 16")
    assert not torch.equal(extract_features(pictures, enlarged)["features"], found["features"])


def test_scores_name_their_features_reference_and_count(tmp_path: Path, classifier: Path) -> None:
    one, two = (open_pictures(write_pictures(tmp_path / n, 40, s, 20 * s)) for s, n in enumerate(("real", "fake")))
    metrics = [name for name in METRICS if name not in ("sfid", "fid_infinity")]
    scorer = SetScorer(one, ClassifierExtractor(classifier), [*metrics, "fid_infinity"], resamples=30)
    found = {metric.name: metric for metric in scorer.score(two)}
    assert list(found) == [
        "Fréchet distance, colour classifier features",
        "Kernel distance, colour classifier features",
        "Kernel distance, colour classifier features, mean over subsets",
        "Mean discrepancy, colour classifier features",
        "Precision, colour classifier features",
        "Recall, colour classifier features",
        "Exponentiated class divergence, colour classifier features",
        "Fréchet distance extrapolated to N = ∞, colour classifier features",
    ]
    assert not any("FID" in name or "KID" in name or "CMMD" in name or "Inception" in name for name in found)
    features = [extract_features(side, ClassifierExtractor(classifier))["features"] for side in (one, two)]
    expected = frechet_distance(*map(feature_statistics, features))
    frechet = found["Fréchet distance, colour classifier features"]
    assert frechet.value == pytest.approx(expected, rel=1e-12)
    assert frechet.low is not None
    assert frechet.high is not None
    assert 0 <= frechet.low < frechet.value < frechet.high
    assert frechet.count == 40
    assert frechet.reference == {
        "name": "real",
        "count": 40,
        "statistics_sha256": feature_statistics(features[0]).sha256,
    }
    assert frechet.statistics_sha256 == feature_statistics(features[1]).sha256
    assert found["Precision, colour classifier features"].higher_is_better
    same = SetScorer(one, ClassifierExtractor(classifier), ["fid", "kid"], resamples=0).score(one)
    assert [metric.value for metric in same] == pytest.approx([0, same[1].value], abs=1e-9)
    assert same[0].low is None


def test_intervals_cover_the_value_of_other_samples(tmp_path: Path, classifier: Path) -> None:
    """The interval is that of the estimate at this N: estimates on fresh samples scatter as wide as it says."""
    extractor = ClassifierExtractor(classifier)
    rng = torch.Generator().manual_seed(0)
    values, widths = [], []
    reference = open_pictures(write_pictures(tmp_path / "real", 4, 0))
    for _ in range(30):
        scorer = SetScorer(reference, extractor, ["fid"], resamples=40)
        x, y = torch.randn(300, 6, generator=rng), torch.randn(300, 6, generator=rng) * 1.3 + 0.5
        value = frechet_distance(feature_statistics(x), feature_statistics(y))
        resampled = scorer._resampled_frechet(x, feature_statistics(x), y, paired=False)
        values.append(value)
        widths.append(np.std(resampled, ddof=1))
    assert 0.7 < np.mean(widths) / np.std(values, ddof=1) < 1.4


def test_statistics_files_stand_for_pictures(tmp_path: Path, classifier: Path) -> None:
    one, two = (open_pictures(write_pictures(tmp_path / n, 20, s, 20 * s)) for s, n in enumerate(("real", "fake")))
    extractor = ClassifierExtractor(classifier)
    path = tmp_path / "stats.npz"
    statistics = save_statistics(one, extractor, path)
    assert statistics is not None
    assert load_statistics(path).sha256 == statistics.sha256
    (direct,) = SetScorer(one, extractor, ["fid"]).score(two)
    (through,) = SetScorer(path, extractor, ["fid"]).score(two)
    assert through.value == pytest.approx(direct.value, rel=1e-12)
    with pytest.raises(ConfigError, match="kid need pictures as reference, got statistics"):
        SetScorer(path, extractor, ["fid", "kid"])
    with pytest.raises(ConfigError, match=r"got 10 pictures against 20 in stats\.npz"):
        SetScorer(path, extractor, ["fid"]).score(open_pictures(tmp_path / "fake", limit=10))


def test_sets_that_do_not_compare_are_refused_before_any_work(tmp_path: Path, classifier: Path) -> None:
    extractor = ClassifierExtractor(classifier)
    one = open_pictures(write_pictures(tmp_path / "a", 6, 0))
    two = open_pictures(write_pictures(tmp_path / "b", 8, 1))
    with pytest.raises(ConfigError, match=r"sets must have the same N, got 8 pictures against 6 in a.*--allow-unequal"):
        SetScorer(one, extractor).score(two)
    (metric,) = SetScorer(one, extractor, ["fid"], allow_unequal=True).score(two)
    assert metric.details == {"unequal_n_allowed": True}
    with pytest.raises(ConfigError, match="did you mean 'fid'"):
        SetScorer(one, extractor, ["fidd"])
    with pytest.raises(ConfigError, match="sfid: colour classifier features has no spatial"):
        SetScorer(one, extractor, ["sfid"]).score(open_pictures(tmp_path / "b", limit=6))

    first = open_pictures(make_run(tmp_path / "dense", ["cat", "dog"], 0))
    other = open_pictures(make_run(tmp_path / "w4a8", ["cat", "fox"], 1))
    with pytest.raises(ConfigError, match=r"sample 1 is 'dog' in dense and 'fox' in w4a8.*--allow-other-prompts"):
        SetScorer(first, extractor, ["fid"]).score(other)
    (metric,) = SetScorer(first, extractor, ["fid"], allow_other_prompts=True).score(other)
    assert metric.name == "Fréchet distance to dense, colour classifier features"


def test_published_names_and_the_warning_need_the_published_weights(tmp_path: Path, classifier: Path) -> None:
    extractor = ClassifierExtractor(classifier)
    extractor.is_published = True
    run = open_pictures(make_run(tmp_path / "dense", ["cat", "dog", "fox"], 0))
    with pytest.warns(DiffuseCompressWarning, match="FID of 3 pictures: under N = 2048 it is mostly bias"):
        found = SetScorer(run, extractor, ["fid", "kid", "cmmd"], resamples=0).score(run)
    assert [metric.name for metric in found] == ["FID-to-dense", "KID-to-dense", "CMMD-to-dense"]
    assert [metric.value for metric in found] == pytest.approx([0, 0, 0], abs=1e-9)
    assert "pairs but those of one prompt and seed" in found[1].implementation


def test_unreadable_empty_and_mixed_folders_are_named(tmp_path: Path, classifier: Path) -> None:
    extractor = ClassifierExtractor(classifier)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"need pictures .*got none"):
        open_pictures(tmp_path / "empty")
    with pytest.raises(ConfigError, match="need a folder of pictures, got nothing there"):
        open_pictures(tmp_path / "nowhere")
    write_pictures(tmp_path / "classes" / "cat", 2, 0)
    with pytest.raises(ConfigError, match="There are some in its subfolders"):
        open_pictures(tmp_path / "classes")
    assert len(open_pictures(tmp_path / "classes", recursive=True)) == 2

    mixed = write_pictures(tmp_path / "mixed", 3, 0)
    Image.new("RGB", (20, 10)).save(mixed / "zz.png")
    for batch_size in (2, 3, 64):
        with pytest.raises(ConfigError, match="must have one size, got 20 x 10 after 12 x 10"):
            extract_features(open_pictures(mixed), extractor, batch_size=batch_size)
    broken = write_pictures(tmp_path / "broken", 3, 0)
    data = (broken / "001.png").read_bytes()
    (broken / "001.png").write_bytes(data[: len(data) // 2])
    for workers in (0, 1):
        with pytest.raises(ConfigError, match=r"001\.png: not a readable picture"):
            extract_features(open_pictures(broken), extractor, workers=workers)
    with pytest.raises(ConfigError, match=r"need a classifier\.py whose load_classifier"):
        ClassifierExtractor(tmp_path / "empty")

    run = make_run(tmp_path / "run", ["cat", "dog"], 0)
    (run / "samples" / "001.png").write_bytes((run / "samples" / "000.png").read_bytes())
    with pytest.raises(CheckpointError, match=r"001\.png: is not the sample that the manifest lists"):
        open_pictures(run)
    (run / "samples" / "001.png").unlink()
    with pytest.raises(CheckpointError, match=r"001\.png: the manifest lists it, but it is gone"):
        open_pictures(run)
    (run / MANIFEST).write_text("{}\n")
    with pytest.raises(CheckpointError, match="not a readable manifest"):
        open_pictures(run)


def test_clip_embeddings_come_from_local_files_only(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
    )
    model = CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path / "clip")
    extractor = ClipExtractor(str(tmp_path / "clip"))
    pictures = torch.randint(0, 256, (2, 3, 50, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = extractor(pictures)["features"]
    resized = torch.nn.functional.interpolate(pictures / 255, size=(28, 28), mode="bicubic").clamp(0, 1)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (CLIPImageProcessor().image_mean, CLIPImageProcessor().image_std)
    )
    assert torch.allclose(found, model(pixel_values=(resized - mean) / std).image_embeds, atol=1e-5)
    assert not extractor.is_published
    with pytest.raises(ConfigError, match="no CLIP model of that name on this machine"):
        ClipExtractor(str(tmp_path / "nothing"))


def test_command_scores_folders_and_writes_records(
    tmp_path: Path, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = write_pictures(tmp_path / "real", 8, 0), write_pictures(tmp_path / "fake", 8, 1)
    options = ["--features", str(classifier), "--device", "cpu"]
    assert main(["eval", "fid", str(one), str(two), *options, "--out", str(tmp_path / "records"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"fake": json.loads((tmp_path / "records" / "fake.json").read_text())}
    assert [m["name"].partition(",")[0] for m in printed["fake"]["metrics"]] == ["Fréchet distance", "Kernel distance"]
    stats = tmp_path / "real.npz"
    assert main(["eval", "fid", str(one), "--save-stats", str(stats), *options]) == 0
    assert main(["eval", "fid", str(stats), str(two), *options]) == 0
    assert "Fréchet distance, colour classifier features" in capsys.readouterr().out
    twin = write_pictures(tmp_path / "other" / "fake", 8, 2)
    assert main(["eval", "fid", str(one), str(two), str(twin), *options, "--json"]) == 1
    assert "need sets of different names, got fake twice" in capsys.readouterr().err
    for more, message in ((["--limit", "-1"], "need limit >= 1, got -1"), (["--resamples", "-1"], "need 0 or more")):
        assert main(["eval", "fid", str(one), str(two), *options, *more]) == 1
        assert message in capsys.readouterr().err
    assert main(["eval", "fid", str(one), *options]) == 1
    assert "give REFERENCE and SAMPLES" in capsys.readouterr().err


def test_picture_set_knows_pairs(tmp_path: Path) -> None:
    one = open_pictures(make_run(tmp_path / "a", ["cat", "dog"], 0))
    two = open_pictures(make_run(tmp_path / "b", ["cat", "dog"], 1))
    assert one.is_paired_with(two)
    assert not one.is_paired_with(open_pictures(make_run(tmp_path / "c", ["cat", "dog"], 1, base=5)))
    assert not one.is_paired_with(dataclasses.replace(two, samples=None))
