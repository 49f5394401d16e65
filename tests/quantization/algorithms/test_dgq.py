"""DGQ: two levels of scales inside int8, never worse than rounding, and channels that stick out are brought down."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from calibrated_block import Block, calibrated, error, inputs, work_of
from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.quantization.algorithms.base import algorithm_from_dict, algorithm_to_dict
from diffuse_compress.quantization.algorithms.dgq import (
    DGQConfig,
    clipping_scale,
    group_scales,
    two_level_qparams,
)
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.smoothquant import SmoothQuantConfig
from diffuse_compress.quantization.numerics import choose_qparams, dequantize, integer_weight, quantize_weight
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.quantization.presets import PRESETS

W4A8 = PRESETS["w4a8"].scheme
WEIGHT = W4A8.weight


def problem(columns: int = 320, rows: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, the last of whose groups is not full, and inputs of very different sizes."""
    torch.manual_seed(0)
    x = torch.randn(400, columns) * torch.logspace(-1, 1, columns)
    weight = torch.randn(rows, columns) * torch.rand(rows, 1) + torch.randn(rows, columns).pow(3) / 5
    return weight, x.t() @ x


def errors(weight: torch.Tensor, hessian: torch.Tensor, qparams: Any) -> torch.Tensor:
    missed = dequantize(quantize_weight(weight, WEIGHT, qparams)) - weight
    return ((missed @ hessian) * missed).sum(dim=1)


def test_rows_never_cost_more_than_rounded_to_nearest_and_fit_int8() -> None:
    weight, hessian = problem()
    found = two_level_qparams(weight, hessian, WEIGHT, 20, 40)
    ours, nearest = errors(weight, hessian, found), errors(weight, hessian, weight_qparams(weight, WEIGHT, "mse"))
    assert (ours <= nearest * (1 + 1e-5)).all()
    assert ours.sum() < 0.92 * nearest.sum(), (ours.sum(), nearest.sum())
    assert found.group_scale is not None
    assert found.group_scale.dtype == torch.int8
    assert 1 <= int(found.group_scale.min()) <= int(found.group_scale.max()) <= 16
    codes = integer_weight(quantize_weight(weight, WEIGHT, found))
    assert codes.dtype == torch.int8
    assert 64 < int(codes.int().abs().max()) <= 112
    assert torch.equal(dequantize(quantize_weight(weight, WEIGHT, found)), codes.float() * found.scale)


def test_scales_of_groups_are_the_best_of_the_grid() -> None:
    """Against a loop over groups and candidates."""
    weight, hessian = problem(rows=5)
    found = group_scales(weight, hessian, WEIGHT, 7)
    for row in range(5):
        for group, part in enumerate(weight[row].split(128)):
            block = hessian[group * 128 :, group * 128 :][: len(part), : len(part)]
            trials = [float(part.abs().max()) / 7 * float(r) for r in torch.linspace(1.0, 0.7, 7)]
            costs = []
            for trial in trials:
                missed = (part / trial).round().clamp(-7, 7) * trial - part
                costs.append(float(missed @ block @ missed))
            assert float(found[row, group]) == pytest.approx(trials[costs.index(min(costs))], rel=1e-5)


def test_no_input_gives_finite_scales() -> None:
    weight = problem()[0]
    weight[3] = 0
    found = two_level_qparams(weight, torch.zeros(320, 320), WEIGHT, 3, 3)
    assert torch.equal(found.scale, weight_qparams(weight, WEIGHT, "mse").scale)
    assert torch.isfinite(dequantize(quantize_weight(weight, WEIGHT, found))).all()
    assert choose_qparams(weight, WEIGHT).scale.shape == found.scale.shape


def test_only_the_largest_channels_are_brought_down() -> None:
    largest = torch.tensor([1.0, 2.0, 0.5, 60.0, 4.0, 3.0, 0.0, 1.0])
    assert clipping_scale(largest, 0.01).tolist() == [1, 1, 1, 15, 1, 1, 1, 1]
    assert clipping_scale(largest, 0.25).tolist() == [1, 1, 1, 20, pytest.approx(4 / 3), 1, 1, 1]
    assert clipping_scale(torch.zeros(4), 0.1).tolist() == [1, 1, 1, 1]
    assert clipping_scale(torch.tensor([5.0]), 0.5).tolist() == [1]


def test_beats_rounding_on_inputs_that_were_not_seen_and_smooths_outliers_alone() -> None:
    torch.manual_seed(3)
    dense = Block()
    with torch.no_grad():  # a large input meets small weights, as in large models
        for layer in (dense.to_q, dense.to_k, dense.to_v, dense.up):
            layer.weight[:, 5] /= 60
    ours, plain, unsmoothed = (copy.deepcopy(dense) for _ in range(3))
    calls = inputs(4)
    for call in calls:
        call.args[0][..., 5] *= 60
    fresh = inputs(2, seed=1)
    for call in fresh:
        call.args[0][..., 5] *= 60
    work = calibrated(ours, W4A8, DGQConfig(row_steps=20), calls)
    calibrated(unsmoothed, W4A8, DGQConfig((), row_steps=20), calls)
    calibrated(plain, W4A8, RTNConfig(), calls)
    mine, without, theirs = (error(block, dense, fresh) for block in (ours, unsmoothed, plain))
    assert mine < 0.85 * theirs, (mine, theirs)
    assert mine < without < theirs, (mine, without, theirs)
    scale = work.layers["to_q"].act_pre_scale
    assert scale is not None
    assert scale[5] < 0.6
    assert (scale == 1).float().mean() > 0.9
    bare = calibrated(plain_copy(), W4A8, DGQConfig(()), calls)
    assert all(layer.act_pre_scale is None for layer in bare.layers.values())


def plain_copy() -> Block:
    torch.manual_seed(3)
    return Block()


def test_keeps_scales_that_an_algorithm_before_it_chose() -> None:
    torch.manual_seed(3)
    block = Block()
    smooth = SmoothQuantConfig()
    sequence = dc.QuantizationConfig("w4a8", algorithm=[smooth, DGQConfig(row_steps=3)]).spec.algorithm
    work = calibrated(block, W4A8, sequence, inputs(2))
    other = work_of(plain_copy(), W4A8, inputs(2))
    calibrated(other.block, W4A8, smooth, inputs(2))
    assert work.layers["to_q"].act_pre_scale is not None
    assert not (work.layers["to_q"].act_pre_scale == 1).any()


@pytest.mark.parametrize("name", ["llama", "pixart"])
def test_models_are_compressed_resumed_saved_and_reloaded(name: str, tmp_path: Path) -> None:
    config = dc.QuantizationConfig("w4a8", algorithm=dc.DGQConfig(group_steps=3, row_steps=3))
    items = [tiny.inputs_for(tiny.build(name), seed=seed) for seed in range(2)]

    def compressed(**given: Any) -> Any:
        return tiny.build(name).compress(config, calibration=items, measure=False, **given)

    plan = tiny.build(name).compression_plan(config, calibration=items)
    model = compressed(work_dir=tmp_path / "work")
    assert plan.bytes_after >= sum(p.numel() * p.element_size() for p in model.parameters())
    assert any(layer.group_scale is not None for layer in quantized_layers(model).values())
    model.save_pretrained(tmp_path / "saved")
    for other in (compressed(work_dir=tmp_path / "work"), type(model).from_pretrained(tmp_path / "saved")):
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[key]), key
    again = type(model).from_pretrained(tmp_path / "saved")
    assert dc.compression_recipe(again).to_dict() == dc.compression_recipe(model).to_dict()
    again.decompress()
    assert not quantized_layers(again)


def test_config_is_json_and_refuses() -> None:
    config = DGQConfig(outlier_shares=[0.1, 0.2])  # type: ignore[arg-type]
    assert hash(config) == hash(DGQConfig((0.1, 0.2)))
    assert algorithm_from_dict(algorithm_to_dict(config)) == config
    with pytest.raises(ConfigError, match=r"DGQConfig: outlier_shares must be in \(0, 1\), got \[0.0\]"):
        DGQConfig((0.0,))
    with pytest.raises(ConfigError, match=r"DGQConfig: need group_steps >= 1 and row_steps >= 1, got .*row_steps=0"):
        DGQConfig(row_steps=0)
    with pytest.raises(ConfigError, match="DGQConfig: fold is True, False or None"):
        DGQConfig(fold=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r'DGQConfig is for weights with two levels of scales, got none .*"w4a8"'):
        tiny.build("llama").compression_plan(dc.QuantizationConfig("w4a16", algorithm=DGQConfig()))
    with pytest.raises(ConfigError, match="GPTQConfig has nothing to do after DGQConfig"):
        dc.QuantizationConfig("w4a8", algorithm=[DGQConfig(), GPTQConfig()])
    assert DGQConfig().scales_input(nn.Linear(128, 8), W4A8)
    assert not DGQConfig(()).scales_input(nn.Linear(128, 8), W4A8)
    assert not DGQConfig().scales_input(nn.Linear(128, 8), PRESETS["w8a8"].scheme)
