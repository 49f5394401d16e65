"""The timestep path learned on timesteps, through compress, save_pretrained and from_pretrained."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

import diffuse_compress as dc
import tiny
from diffuse_compress.cli import main
from diffuse_compress.errors import CompressionConflictError, ConfigError
from diffuse_compress.families.base import Dependence
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.quantization.algorithms.brecq import BRECQConfig
from diffuse_compress.temporal.config import TableConfig
from diffuse_compress.temporal.layout import layout_of
from diffuse_compress.temporal.maintenance import maintained_of
from diffuse_compress.temporal.table import table_of
from tiny import denoiser, reloaded

STEPS, ITERATIONS = 4, 20
GIVEN = {"measure": False, "algorithm": dc.RTNConfig()}

pytestmark = pytest.mark.usefixtures("fewer_timesteps")


def config(way: str, **given: Any) -> dc.TFMQConfig:
    return dc.TFMQConfig(maintenance=way, num_inference_steps=STEPS, iterations=ITERATIONS, **given)


def picture(pipe: Any) -> torch.Tensor:
    return tiny.sample(pipe, num_inference_steps=STEPS)


def path_of(model: Any) -> set[str]:
    layers = layout_of(model, TableConfig()).layers
    return {name for name, kind in layers.items() if kind is not Dependence.CONDITION}


@pytest.fixture(scope="module")
def everything_tabled() -> Any:
    """To be looked at, or copied."""
    pipe = tiny.build_pipeline("stable_diffusion")
    pipe.compress("w4a8", config("auto"), **GIVEN)
    return pipe


@pytest.mark.parametrize("name", ["stable_diffusion", "flux"])
def test_codes_of_the_path_are_learned_and_all_else_is_as_without(name, tmp_path):
    """The formats are the preset's, the other layers are the algorithm's, and the checkpoint needs nothing of ours."""
    pipe, plain = tiny.build_pipeline(name), tiny.build_pipeline(name)
    path = path_of(denoiser(pipe))
    plain.compress("w4a8", **GIVEN)
    plan = pipe.compression_plan("w4a8", config("tib"), algorithm=dc.RTNConfig())
    assert f"{len(path & denoiser_layers(plain))} of {len(path)} layers learned" in str(plan)
    pipe.compress(plan, measure=False)
    mine, theirs = quantized_layers(denoiser(pipe)), quantized_layers(denoiser(plain))
    assert {n: layer.scheme for n, layer in mine.items()} == {n: layer.scheme for n, layer in theirs.items()}
    changed = {n for n in mine if not torch.equal(mine[n].qweight, theirs[n].qweight)}
    assert changed == path & set(mine)
    expected, found = picture(pipe), maintained_of(denoiser(pipe))
    assert table_of(denoiser(pipe)) is None
    assert set(found.learned) == changed
    assert found.errors.error["tib"].shape == (len(found.errors.layers), STEPS)
    assert float(found.errors.error["tib"].mean()) < float(found.errors.error["rtn"].mean())
    again = reloaded(pipe, tmp_path / "one")
    assert torch.equal(picture(again), expected)
    kept = maintained_of(denoiser(again))
    assert (kept.config, kept.learned, kept.ways) == (found.config, found.learned, found.ways)
    assert all(torch.equal(kept.errors.error[way], error) for way, error in found.errors.error.items())
    assert all(torch.equal(kept.errors.mismatch[way], share) for way, share in found.errors.mismatch.items())
    assert again.compression_plan("w4a8", config("tib"), algorithm=dc.RTNConfig()).methods == []
    again.decompress()
    assert maintained_of(denoiser(again)) is None


def denoiser_layers(pipe: Any) -> set[str]:
    return set(quantized_layers(denoiser(pipe)))


def test_a_budget_decides_which_layers_get_tables(everything_tabled, tmp_path, capsys):
    everything = table_of(everything_tabled.unet).nbytes()["schedules"]
    pipe = tiny.build_pipeline("stable_diffusion")
    pipe.compress("w4a8", config("auto", table_budget=everything // 2), **GIVEN)
    found, table = maintained_of(pipe.unet), table_of(pipe.unet)
    assert 0 < table.nbytes()["schedules"] <= everything // 2
    assert 0 < len(found.cached) < len(found.ways)
    alone = {n for n, lookup in table.lookups.items() if lookup.dependence is Dependence.TIMESTEP}
    assert alone == set(found.cached)
    assert set().union(*(part.columns for part in table.schedules[0].rows)) == alone
    assert found.rows, "the budget ends within a layer's rows"
    assert table.partly == set(found.rows)
    means = {way: float(error.mean()) for way, error in found.errors.error.items()}
    assert means["cache"] < means["auto"] < means["tib"] < means["rtn"]
    expected = picture(pipe)
    dc.compression_stats(pipe, strict=True)
    again = reloaded(pipe, tmp_path)
    assert torch.equal(picture(again), expected)
    dc.compression_stats(again, strict=True)
    facts = dc.compression_report(again).components["unet"]["methods"]["temporal"]
    assert facts["path"]["ways"] == {n: {"way": way, "why": why} for n, (way, why) in found.ways.items()}
    assert facts["path"]["rows"] == {n: list(there) for n, there in found.rows.items()}
    assert maintained_of(again.unet).rows == found.rows
    dc.compression_report(again).save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for name, there in found.rows.items():
        at = ", ".join(f"{t:g}" for t, here in zip(found.errors.timesteps, there, strict=True) if here)
        row = f"<code>{name}</code>.*tables at t={at}, else learned codes.*rows of {sum(there)} of {STEPS} timesteps"
        assert re.search(row, page), name
    assert len(facts["path"]["error"]["tib"]) == len(facts["path"]["mismatch"]["auto"]) == STEPS
    main(["info", str(tmp_path)])
    out = capsys.readouterr().out
    some = f" ({len(found.rows)} at some timesteps only)"
    assert f"{len(found.cached)} of {len(found.ways)} features from tables{some}" in out
    size = table.nbytes()["schedules"] / 1024
    assert f"rows of {len(alone)} layers for {STEPS} timesteps of DDIMScheduler, {size:.1f} KiB" in out
    assert "depend on timestep alone: time_embedding.linear_1, time_embedding.linear_2, 2 x down_blocks.*" in out
    assert dc.compression_recipe(again).components["unet"][1] == config("auto", table_budget=everything // 2)


def test_the_report_draws_errors_and_mismatches_by_timestep(everything_tabled, tmp_path):
    pipe = copy.deepcopy(everything_tabled)
    errors = maintained_of(pipe.unet).errors
    # One that is wrong at one timestep, and rows that are not exact at all: a line must show where.
    errors.mismatch["rtn"][:, 1] = 1.0
    errors.error["cache"][:, 0] = 0.5
    report = dc.compression_report(pipe)
    (row,) = re.findall(r"rounded to nearest  +mismatched  +(.*)", str(report))
    assert re.split("  +", row) == ["25 %", "0 %", "100 %", "0 %", "0 %"]
    report.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    drawn = [
        [tuple(map(float, point.split(","))) for point in line.split()]
        for line in re.findall(r'<polyline class="trend c\d" points="([^"]*)"/>', page)
    ]
    ways, (left, right) = list(errors.error), (62, 948)
    assert [len(line) for line in drawn] == [STEPS] * 2 * len(ways)
    assert all(left < x < right and 14 <= y <= 254 for line in drawn for x, y in line)
    for plot, values in ((drawn[: len(ways)], errors.error), (drawn[len(ways) :], errors.mismatch)):
        for step in range(STEPS):
            heights = [line[step][1] for line in plot]
            means = [float(values[way].mean(dim=0)[step]) for way in ways]
            assert sorted(heights, reverse=True) == [
                heights[i] for i in sorted(range(len(ways)), key=means.__getitem__)
            ]
    assert {y for _, y in drawn[-len(ways) :][1]} == {254.0}, "nothing is mismatched"
    assert "<title>rounded to nearest, t=" in page
    for name, (_, why) in maintained_of(pipe.unet).ways.items():
        assert f"<code>{name}</code>" in page
        assert why.replace("<", "&lt;") in page


def test_what_tables_keep_of_rounded_layers_is_measured(tmp_path):
    """Rows of the timestep alone are the dense ones; those of a condition are what the rounded weights give."""
    pipe = tiny.build_pipeline("flux")
    item = {key: value for key, value in tiny.call_kwargs(pipe, steps=STEPS).items() if key != "generator"}
    embedder, modulation = "time_text_embed.timestep_embedder.linear_2", "transformer_blocks.0.norm1.linear"
    weights = dc.QuantizationConfig(
        "w4a8", BRECQConfig(iterations=1), overrides={embedder: "w4a16", modulation: "w4a16"}
    )
    pipe.compress(weights, config("cache"), calibration=[item], measure=False)
    found = maintained_of(pipe.transformer)
    error = {way: dict(zip(found.errors.layers, each, strict=True)) for way, each in found.errors.error.items()}
    assert float(error["rtn"][embedder].min()) > 0.01
    assert float(error["cache"][embedder].max()) == 0
    assert 0.01 < float(error["cache"][modulation].mean()) < float(error["rtn"][modulation].mean())
    again = reloaded(pipe, tmp_path)
    assert torch.equal(picture(again), picture(pipe))
    assert maintained_of(again.transformer).facts() == found.facts()
    assert "tables" in str(dc.compression_report(again))


def test_without_a_budget_to_speak_of_nothing_is_looked_up(tmp_path):
    pipe = tiny.build_pipeline("stable_diffusion")
    pipe.compress("w4a8", config("auto", table=TableConfig(conditions=False), table_budget=0), **GIVEN)
    assert maintained_of(pipe.unet).cached == []
    expected = picture(pipe)
    assert torch.equal(picture(reloaded(pipe, tmp_path)), expected)


def test_the_embedder_is_learned_where_it_is_quantized():
    pipe = tiny.build_pipeline("stable_diffusion")
    everything = dc.QuantizationConfig("w4a8", dc.RTNConfig(), overrides={"time_embedding.*": "w4a16"})
    pipe.compress(everything, config("tib"), measure=False)
    found = maintained_of(pipe.unet)
    assert set(found.learned) == path_of(pipe.unet)
    assert {n for n in found.learned if n.startswith("time_embedding")}.isdisjoint(found.errors.layers)


def test_the_same_call_gives_the_same_codes_beside_calibrated_layers():
    pipes = [tiny.build_pipeline("stable_diffusion") for _ in range(2)]
    for pipe in pipes:
        calibration = dc.Calibration.record(pipe, ["a red cat"], num_samples=1, num_inference_steps=1)
        some = dc.QuantizationConfig("w4a8", dc.GPTQConfig(), modules_to_not_convert=["down_blocks", "up_blocks"])
        pipe.compress(some, config("tib"), calibration=calibration, measure=False)
    one, two = (quantized_layers(pipe.unet) for pipe in pipes)
    assert all(torch.equal(one[name].qweight, two[name].qweight) for name in one)
    learned = set(maintained_of(pipes[0].unet).learned)
    assert learned == path_of(pipes[0].unet) & set(one)
    assert learned < set(one)


def test_what_cannot_be_learned_is_refused_before_anything_is_touched():
    pipe = tiny.build_pipeline("stable_diffusion")
    before = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    with pytest.raises(ConfigError, match="this call quantizes none"):
        pipe.compress(config("tib"))
    with pytest.raises(ConfigError, match=r"time_emb_proj: .*rounds up or down to integer codes"):
        pipe.compress("fp8", config("tib"))
    with pytest.raises(ConfigError, match="keeps all of them dense"):
        pipe.compress("w4a8", config("tib"), modules_to_not_convert=["*.time_emb_proj"])
    with pytest.raises(ConfigError, match="got a bare model"):
        copy.deepcopy(pipe.unet).compress("w4a8", config("tib"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in pipe.unet.state_dict().items())
    pipe.compress("w4a8", **GIVEN)
    with pytest.raises(ConfigError, match="codes already"):
        pipe.compress(config("tib"))
    other = tiny.build_pipeline("stable_diffusion")
    other.compress("w4a8", config("tib"), **GIVEN)
    with pytest.raises(CompressionConflictError, match="temporal"):
        other.compress(config("auto"))


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    pipe = tiny.build_pipeline("stable_diffusion")
    expected = picture(pipe)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("late")

    monkeypatch.setattr("diffuse_compress.apply.component_report", fail)
    with pytest.raises(RuntimeError, match="late"):
        pipe.compress("w4a8", config("auto"), **GIVEN)
    assert maintained_of(pipe.unet) is None
    assert table_of(pipe.unet) is None
    assert torch.equal(picture(pipe), expected)
