"""`info PATH` tells what a model is made of and how its pipeline steps."""

from __future__ import annotations

import json
import re

import pytest
from diffusers import HeunDiscreteScheduler

import tiny
from diffuse_compress.anatomy import model_anatomy, step_behaviour
from diffuse_compress.cli import main
from diffuse_compress.families import roles
from diffuse_compress.families.published import meta_components
from families import unknown_classes


def test_a_models_blocks_branches_and_shares():
    model = tiny.build("flux", num_single_layers=2)
    facts = model_anatomy(model)
    assert facts["family"] == "flux"
    assert facts["blocks"]["FluxTransformerBlock"] == {
        "count": 1,
        "branches": ["attn (attention)", "ff (feed-forward)", "ff_context (feed-forward)"],
        "unfused": None,
    }
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["temporal_map"]["timestep"] == {
        "time_text_embed.timestep_embedder.linear_1": 1,
        "time_text_embed.timestep_embedder.linear_2": 1,
    }
    assert facts["temporal_map"]["timestep and condition"]["single_transformer_blocks.*.norm.linear"] == 2
    assert facts["temporal_map"]["timestep and condition"]["transformer_blocks.0.norm1.linear"] == 1
    assert facts["temporal_map"]["condition"]["context_embedder"] == 1
    counted = sum(facts["dependence"].values())
    assert facts["dependence"]["timestep"] > 0
    assert counted < facts["parameters"]
    modulation = sum(module.linear.weight.numel() for _, module in model.named_modules() if hasattr(module, "linear"))
    assert facts["modulation_share"] == pytest.approx(modulation / facts["parameters"], rel=1e-6)


def test_packing_changes_no_count():
    model = tiny.build("pixart")
    before = model_anatomy(model)
    after = model_anatomy(model.compress("w4a16", measure=False))
    assert after["dependence"] == before["dependence"]
    assert after["modulation_share"] == before["modulation_share"]


@pytest.mark.parametrize(
    ("name", "share"), [("flux1_dev", 0.273), ("sd3_medium", 0.333), ("dit_xl_2_256", 0.30), ("wan21_t2v_1_3b", 0.010)]
)
def test_published_modulation_shares(name, share):
    """Share of parameters in modulation projections, as counted from the published configurations."""
    model = next(model for part, model in meta_components(name).items() if part.startswith("transformer"))
    facts = model_anatomy(model)
    linears = facts["modulation_share"]
    assert linears == pytest.approx(share, abs=0.11 if name.startswith("dit") else 0.005)


@pytest.mark.parametrize(
    ("name", "calls", "row"),
    [
        ("wan", "one call each for cond and uncond with guidance", "else the scheduler's step_index"),
        ("stable_diffusion", "one call, both halves of guidance in one batch", "else counting the scheduler's steps"),
    ],
)
def test_step_behaviour(name, calls, row, tmp_path):
    tiny.build_pipeline(name).save_pretrained(tmp_path)
    facts = step_behaviour(tmp_path)
    assert (facts["calls"], facts["row"]) == (calls, f"the timestep where it is an element of the schedule, {row}")


def test_info_computes_roles_once(tmp_path, capsys, monkeypatch):
    tiny.build("llama").save_pretrained(tmp_path)
    calls: list[object] = []
    found = roles.block_lists
    monkeypatch.setattr(roles, "block_lists", lambda model: calls.append(model) or found(model))
    assert main(["info", str(tmp_path)]) == 0
    assert len(calls) == 1
    assert "modulation" not in capsys.readouterr().out


@pytest.mark.parametrize("preset", [None, "w4a16"])
def test_tied_weights_count_once(preset):
    model = tiny.build("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = sum(parameter.numel() for parameter in model.parameters())
    if preset:
        model.compress(preset, measure=False)
    facts = model_anatomy(model)
    assert facts["parameters"] == expected
    assert facts["dependence"]["sample"] <= expected
    assert sum(entry["parameters"] for entry in facts["roles"].values()) == facts["dependence"]["sample"]


def test_a_class_that_no_file_describes_is_generic():
    facts = model_anatomy(unknown_classes.build("sana"))
    assert facts["family"] == "generic"
    assert facts["blocks"] == {
        "SanaTransformerBlock": {
            "count": 2,
            "branches": [],
            "unfused": "no family describes the class SanaTransformerBlock",
        }
    }
    assert facts["dependence"] is None
    assert facts["sensitive"] == []
    assert facts["modulation_share"] > 0


def test_info_of_a_class_that_no_file_describes(tmp_path, capsys):
    unknown_classes.build("sana").save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "family: generic (no file describes this class); its blocks keep their stock forwards" in text
    assert "  2 x SanaTransformerBlock\n" in text
    assert "on timestep" not in text


def test_what_step_behaviour_says_it_returns(tmp_path):
    tiny.build_pipeline("wan").save_pretrained(tmp_path)
    documented = re.findall(r"(\w+): ", (step_behaviour.__doc__ or "").partition("Returns:")[2])
    assert list(step_behaviour(tmp_path)) == documented


def test_order_and_experts(tmp_path):
    pipe = tiny.build_pipeline("wan")
    pipe.register_modules(transformer_2=tiny.build("wan", in_channels=16, out_channels=16))
    pipe.register_to_config(boundary_ratio=0.875)
    pipe.scheduler = HeunDiscreteScheduler()
    pipe.save_pretrained(tmp_path)
    facts = step_behaviour(tmp_path)
    assert facts["order"] == 2
    assert facts["boundary_ratio"] == 0.875
    assert facts["denoisers"] == ["transformer", "transformer_2"]


def test_info_prints_it(tmp_path, capsys):
    tiny.build_pipeline("wan").save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "family: wan" in text
    assert "2 x WanTransformerBlock: attn1 (attention), attn2 (cross-attention), ffn (feed-forward)" in text
    assert "modulation (one row per sample): " in text
    assert "on timestep" in text
    assert "steps: FlowMatchEulerDiscreteScheduler (order 1)" in text
    assert "cond and uncond" in text
    assert main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["components"]["transformer"]["anatomy"]["family"] == "wan"


def test_a_bare_model_has_no_steps(tmp_path, capsys):
    tiny.build("llama").save_pretrained(tmp_path)
    assert step_behaviour(tmp_path) is None
    assert main(["info", str(tmp_path)]) == 0
    assert "family: llama" in capsys.readouterr().out
