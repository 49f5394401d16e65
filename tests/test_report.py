"""The report: true numbers, one schema, every output form, and the same after save and reload."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import diffuse_compress as dc
import tiny
from diffuse_compress.integrations.component import get_state, quantized_layers
from diffuse_compress.report_html import error_plot, render_page
from diffuse_compress.report_text import format_error, headline

COMPONENT_KEYS = {
    "schema_version", "class", "preset", "scheme", "algorithm", "measured", "parameters", "disk_bytes", "memory_bytes",
    "formats", "kept", "output_error", "layers", "sensitive_layers", "compute", "volatile",
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dc.CompressionReport, Path]:
    """A compressed pipeline with a preview, its report, and the folder it was saved in."""
    folder = tmp_path_factory.mktemp("compressed")
    pipe = tiny.build_pipeline("pixart")
    calls = [
        {**tiny.call_kwargs(pipe, seed=seed, output_type="pil"), "prompt": f"a <b>{seed}</b> cat"} for seed in (0, 1)
    ]
    pipe.compress({"transformer": "w4a8", "text_encoder": "w8a16"}, preview=calls)
    pipe.save_pretrained(folder)
    return pipe, pipe.compression_report(), folder


def stable(report: dc.CompressionReport) -> dict[str, Any]:
    """The report without what may differ between runs or processes."""
    data = json.loads(json.dumps(report.to_dict()))
    data.pop("preview")
    for part in data["components"].values():
        part.pop("volatile")
    return data


def test_schema_and_types(saved: Any) -> None:
    data = saved[1].to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert set(data) == {"schema_version", "target", "hint", "bytes", "preview", "components"}
    for part in data["components"].values():
        assert set(part) == COMPONENT_KEYS
    documented = dc.CompressionReport.to_dict.__doc__ or ""
    assert all(f'"{key}"' in documented for key in COMPONENT_KEYS | set(data))


def test_bytes_are_those_of_the_files(saved: Any) -> None:
    _, report, folder = saved
    files = {
        "transformer": "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder": "text_encoder/model.safetensors",
    }
    for name, file in files.items():
        path = folder / file
        header = int.from_bytes(path.read_bytes()[:8], "little")
        part = report.components[name]
        assert part["disk_bytes"]["after"] == path.stat().st_size - 8 - header
    dense = tiny.build_pipeline("pixart")
    for name in files:
        part, model = report.components[name], dense.components[name]
        assert part["parameters"] == sum(p.numel() for p in model.parameters())
        assert part["disk_bytes"]["before"] == 4 * part["parameters"]  # fp32, no persistent buffers
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        assert part["memory_bytes"]["before"] == 4 * part["parameters"] + buffers
    total = sum(p.numel() * p.element_size() for p in dense.vae.parameters())
    assert report.untouched == {"vae": total}


def test_shares_add_up_and_kept_layers_have_reasons(saved: Any) -> None:
    pipe, report, _ = saved
    part = report.components["transformer"]
    for share in ("parameter_share", "mac_share"):
        assert sum(entry[share] for entry in part["formats"]) == pytest.approx(1, abs=1e-4)
    layers = quantized_layers(pipe.transformer)
    formats = {entry["format"]: entry for entry in part["formats"]}
    assert formats["w4a8"]["layers"] + formats["w4a16"]["layers"] == len(layers) == len(part["layers"])
    assert formats["w4a16"]["mac_share"] < 0.05 < formats["w4a16"]["parameter_share"]  # one row per sample
    assert [name for name, *_ in part["layers"]] == list(layers)
    kept = {entry["pattern"]: entry["reason"] for entry in part["kept"]}
    assert kept["proj_out.weight"].startswith("last layer")
    assert all(entry["reason"] for entry in part["kept"])
    converted = sum(t.numel() for layer in layers.values() for t in [layer.weight])
    assert sum(entry["parameters"] for entry in part["kept"]) + converted == part["parameters"]


def test_output_errors_are_those_of_the_denoiser(saved: Any) -> None:
    part = saved[1].components["transformer"]
    errors = part["output_error"]["relative_error"]
    assert len(errors) == 4
    assert 0.005 < max(errors) < 1
    # The worse format must give the larger errors.
    better = tiny.build_pipeline("pixart").compress("w8a8").compression_report().components["transformer"]
    finer = better["output_error"]["relative_error"]
    assert all(0 < small < large / 3 for small, large in zip(finer, errors, strict=True))
    assert max(weight for _, weight, _ in better["layers"]) < min(weight for _, weight, _ in part["layers"])


def test_sensitive_layers_are_the_ten_worst(saved: Any) -> None:
    part = saved[1].components["transformer"]
    outputs = sorted((row[2] for row in part["layers"]), reverse=True)
    assert [row[2] for row in part["sensitive_layers"]] == outputs[:10]


def test_report_survives_save_and_reload(saved: Any) -> None:
    pipe, report, folder = saved
    again = type(pipe).from_pretrained(folder)
    reloaded = again.compression_report()
    assert stable(reloaded) == stable(report)
    assert reloaded.components["transformer"]["volatile"] == report.components["transformer"]["volatile"]
    assert report.preview
    assert reloaded.preview == []
    alone = type(pipe.transformer).from_pretrained(folder / "transformer").compression_report()
    assert alone.components[""] == reloaded.components["transformer"]


def test_checkpoint_holds_no_prompt_and_no_path(saved: Any) -> None:
    folder = saved[2]
    with safe_open(str(folder / "transformer/diffusion_pytorch_model.safetensors"), framework="pt") as handle:
        text = json.dumps(handle.metadata()) + (folder / "transformer/config.json").read_text()
    assert "cat" not in text.replace("concat", "")
    assert str(Path.cwd()) not in text
    assert str(folder) not in text


def test_two_runs_differ_only_under_volatile() -> None:
    first, second = (tiny.build_pipeline("pixart").compress("w4a8").compression_report() for _ in range(2))
    assert stable(first) == stable(second)
    volatile = first.components["transformer"]["volatile"]
    assert set(volatile) == {"seconds", "call_seconds", "peak_memory_bytes", "device", "date", "versions"}


def test_stored_report_stays_small() -> None:
    model = tiny.build("pixart", num_layers=40)  # about 500 linears
    model.compress("w8a8")
    report = get_state(model).report
    layers = len(report["layers"])
    assert layers > 380
    # Output errors, which a bare model has none of, are at most nine characters more each.
    assert len(json.dumps(report, separators=(",", ":"))) + 9 * layers < 100_000 * layers / 500


def test_text_begins_with_algorithm_and_gain_and_ends_with_the_hint(saved: Any) -> None:
    report = saved[1]
    lines = str(report).splitlines()
    assert re.match(
        r"PixArtAlphaPipeline compressed: w4a8 by round-to-nearest \(mse ranges\) on transformer: ", lines[0]
    )
    assert re.search(r"\d MiB -> [\d.]+ [KM]iB \(0\.\d+ of before\), output error [\d.]+ % to [\d.]+ %", lines[0])
    assert re.search(r"worst of 2 prompts is 'a <b>\d</b> cat', \d+\.\d dB", str(report))
    assert any(text in str(report) for text in ("faster than dense", "slower than dense", "speed unmeasured here"))
    assert re.search(r"speed: one call took [\d.e+]+ ms dense and [\d.e+]+ ms compressed, measured on cpu", str(report))
    pipe = tiny.build_pipeline("pixart").compress({"vae": "w8a8"})
    last = str(pipe.compression_report()).splitlines()[-1]
    (call,) = re.findall(r"pipe\.(compress\(.*\)) would shrink it", last)
    assert last.startswith("transformer is ")
    eval(f"pipe.{call}", {"pipe": pipe})
    assert get_state(pipe.transformer) is not None
    assert pipe.compression_report().components.keys() == {"transformer", "vae"}


class _Checker(HTMLParser):
    """Collects tags, and that each is closed."""

    void = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, list[dict[str, str | None]]] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.setdefault(tag, []).append(dict(attrs))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.setdefault(tag, []).append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_one_self_contained_well_formed_page(saved: Any, tmp_path: Path) -> None:
    report = saved[1]
    report.save(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = _Checker()
    page.feed(text)
    assert page.open == []
    assert "script" not in page.seen
    assert "link" not in page.seen
    sources = [image["src"] or "" for image in page.seen["img"]]
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|https?://", text)
    # Prompts are text, never markup.
    assert "a <b>0</b> cat" in page.text
    assert "b" not in page.seen or len(page.seen["b"]) == 8  # the tiles only
    assert len([figure for figure in page.seen["figure"] if figure.get("class") == "worst"]) == 1
    points = [circle for circle in page.seen["circle"] if "cx" in circle]
    layers = sum(len(part["layers"]) for part in report.components.values())
    assert len(points) >= 2 * layers
    for name, *_ in report.components["transformer"]["layers"]:
        assert f"{name}: weight error" in text
    assert "prefers-color-scheme: dark" in text


def test_notebook_html_is_a_fragment(saved: Any) -> None:
    fragment = saved[1]._repr_html_()
    assert fragment.startswith('<div class="dcr">')
    assert "<html" not in fragment
    checker = _Checker()
    checker.feed(fragment)
    assert checker.open == []


def test_json_and_markdown_files(saved: Any, tmp_path: Path) -> None:
    report = saved[1]
    report.save(tmp_path / "deeper" / "r.json")
    assert json.loads((tmp_path / "deeper" / "r.json").read_text()) == report.to_dict()
    report.save(tmp_path / "r.MD")
    text = (tmp_path / "r.MD").read_text()
    assert text.startswith(f"**{headline(report.to_dict())}**")
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.replace(r"\|", "").count("|") for line in block.splitlines()}) == 1, block
    assert "### transformer (PixArtTransformer2DModel)" in text
    with pytest.raises(dc.ConfigError, match=r"ending in \.html, \.json or \.md, got 'r\.pdf'"):
        report.save(tmp_path / "r.pdf")


def test_nothing_compressed_raises() -> None:
    with pytest.raises(dc.ConfigError, match=r'PixArtAlphaPipeline is not compressed; call compress\("w8a8"\)'):
        tiny.build_pipeline("pixart").compression_report()
    pipe = tiny.build_pipeline("pixart").compress("w8a8", measure=False)
    pipe.decompress()
    with pytest.raises(dc.ConfigError, match="is not compressed"):
        pipe.compression_report()


def test_component_quantized_while_loading_reports_what_its_layers_tell(tmp_path: Path) -> None:
    model = tiny.build("pixart")
    model.save_pretrained(tmp_path)
    fly = type(model).from_pretrained(tmp_path, quantization_config=dc.QuantizationConfig("w8a8"))
    part = fly.compression_report().components[""]
    expected = model.compress("w8a8").compression_report().components[""]
    assert not part["measured"]
    assert expected["measured"]
    assert part["disk_bytes"] == expected["disk_bytes"]
    assert part["memory_bytes"] == expected["memory_bytes"]
    assert part["formats"] == expected["formats"]
    assert part["compute"] == expected["compute"]
    assert sum(entry["bytes"] for entry in part["kept"]) == sum(entry["bytes"] for entry in expected["kept"])
    assert "quantized while loading" in str(fly.compression_report())
    assert part["sensitive_layers"] == []
    render_page(fly.compression_report().to_dict())


def test_compute_lines_follow_the_component_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("pixart").compress("w8a8")
    assert {entry["device"] for entry in model.compression_report().components[""]["compute"]} == {"cpu"}
    stored = json.dumps(get_state(model).report)
    assert "faster_than_dense" not in stored
    names = {entry["dtype"] for entry in model.to(torch.bfloat16).compression_report().components[""]["compute"]}
    assert names == {"bfloat16"}


def test_errors_that_are_not_finite_are_null_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffuse_compress.measurement import PipelineProbe

    broken = {"timesteps": [1.0, 2.0], "relative_error": [float("nan"), 0.5], "setting": "", "note": ""}
    monkeypatch.setattr(PipelineProbe, "output_error", lambda self, component: dict(broken))
    report = tiny.build("pixart").compress("w8a8").compression_report()
    assert report.components[""]["output_error"]["relative_error"] == [None, 0.5]
    assert "output error not finite" in str(report).splitlines()[0]
    json.dumps(report.to_dict(), allow_nan=False)
    report._repr_html_()


def test_error_plot_places_points_on_a_log_scale() -> None:
    layers = [["blocks.0.a", 0.01, 0.1], ["blocks.0.b", 0.001, None], ["blocks.1.a", 0.0, 0.01]]
    plot = error_plot(layers)
    assert plot is not None
    height = {(point["title"].split(":")[0], point["kind"]): point["y"] for point in plot["points"]}
    assert len(height) == 4  # no point for None and for zero
    first = height["blocks.0.b", "weight"] - height["blocks.0.a", "weight"]
    second = height["blocks.0.a", "weight"] - height["blocks.0.a", "output"]
    assert first == pytest.approx(second, abs=0.2)
    assert first > 20
    assert height["blocks.1.a", "output"] == height["blocks.0.a", "weight"]
    assert [tick["label"] for tick in plot["x_ticks"]] == ["blocks.0", "blocks.1"]
    assert {"1 %", "10 %", "0.1 %"} <= {tick["label"] for tick in plot["y_ticks"]}
    inside = [point for point in plot["points"] if plot["top"] <= point["y"] <= plot["bottom"]]
    assert len(inside) == 4
    assert error_plot([["a", 0.0, None]]) is None
    assert format_error(None) == "-"


def test_labels_of_many_blocks_do_not_overlap() -> None:
    plot = error_plot([[f"transformer_blocks.{i}.{leaf}", 0.01, 0.02] for i in range(40) for leaf in "abcde"])
    assert plot is not None
    labelled = [tick for tick in plot["x_ticks"] if tick["label"]]
    assert len(plot["x_ticks"]) == 40
    assert 3 <= len(labelled) < 12
    for left, right in itertools.pairwise(labelled):
        if right["anchor"] == "start":
            assert right["x"] - left["x"] > 6 * len(left["label"])
