"""SVDQuant: the branch against the decomposition, exactness at full rank, and what it gains at four bits."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from calibrated_block import Block, calibrated, error, inputs
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, SequenceConfig
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.algorithms.quarot import QuaRotConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.smoothquant import SmoothQuantConfig
from diffuse_compress.quantization.algorithms.svdquant import SVDQuantConfig, truncated_svd
from diffuse_compress.quantization.presets import PRESETS
from tolerance import KERNEL, assert_close

W4A4, W4A16 = PRESETS["w4a4"].scheme, PRESETS["w4a16"].scheme
QUICK = SVDQuantConfig(rank=8, num_alphas=2, iterations=2, num_rows=96)


@pytest.mark.parametrize(
    ("algorithm", "rotation", "factor"),
    [
        (replace(QUICK, num_alphas=0), None, 0.95),
        (QUICK, None, 0.5),
        (replace(QUICK, share=True), None, 0.5),
        (SequenceConfig((QUICK, GPTQConfig())), None, 0.5),
        (SequenceConfig((SmoothQuantConfig(), QUICK)), None, 0.5),
        (QUICK, 128, 0.5),
    ],
    ids=lambda value: getattr(value, "summary", None),
)
def test_beats_rounding_on_inputs_that_were_not_seen(
    algorithm: AlgorithmConfig, rotation: int | None, factor: float
) -> None:
    torch.manual_seed(3)
    dense = Block()
    ours, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    calibrated(ours, replace(W4A4, input_rotation=rotation), algorithm, inputs(4))
    calibrated(plain, W4A4, RTNConfig(), inputs(1))
    fresh = inputs(4, seed=0)[2:] + inputs(2, seed=1)
    mine, theirs = error(ours, dense, fresh), error(plain, dense, fresh)
    assert mine < factor * theirs, (mine, theirs)


@pytest.mark.parametrize("rotation", [None, 128])
@pytest.mark.parametrize("scheme", [W4A4, W4A16], ids=["w4a4", "w4a16"])
def test_full_rank_is_exact(scheme: dc.Scheme, rotation: int | None) -> None:
    torch.manual_seed(0)
    dense = Block().double()
    ours = copy.deepcopy(dense)
    calls = [Call((call.args[0].double(),)) for call in inputs(2)]
    full = SVDQuantConfig(rank=256, num_alphas=2)
    work = calibrated(ours, replace(scheme, input_rotation=rotation), full, calls)
    assert work.layers["down"].low_rank[0].shape[0] == 128
    # The branch is decomposed in float32.
    assert error(ours, dense, calls) < 1e-5


def test_the_first_branch_is_the_decomposition_of_the_smoothed_weight() -> None:
    torch.manual_seed(1)
    block = Block()
    work = calibrated(copy.deepcopy(block), W4A4, replace(QUICK, rank=24, iterations=0), inputs(2))
    layer = work.layers["down"]
    scale = layer.act_pre_scale
    assert scale is not None
    assert layer.low_rank is not None
    down, up = layer.low_rank
    smoothed = block.down.weight.detach().double() / scale
    left, values, right = torch.linalg.svd(smoothed)
    expected = left[:, :24] @ torch.diag(values[:24]) @ right[:24]
    assert_close((up.double() @ (down.double() / scale)), expected, KERNEL[torch.float32] * 4)
    # What the codes stand for is the rest.
    assert_close(layer.target(), smoothed - expected, KERNEL[torch.float32] * 4)


def test_refinement_never_loses_and_shared_branches_share_down() -> None:
    torch.manual_seed(2)
    dense, calls = Block(), inputs(4)
    errors = []
    for iterations in (0, 8):
        ours = copy.deepcopy(dense)
        calibrated(ours, W4A4, SVDQuantConfig(rank=8, num_alphas=0, iterations=iterations), calls)
        errors.append(error(ours.to_q, dense.to_q, calls))
    assert errors[1] < errors[0]
    ours = copy.deepcopy(dense)
    calibrated(ours, W4A4, replace(QUICK, share=True), calls)
    assert torch.equal(ours.to_q.low_rank_down, ours.to_v.low_rank_down)
    assert not torch.equal(ours.to_q.low_rank_up, ours.to_v.low_rank_up)


def test_convolutions_get_branches_and_grouped_ones_are_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, stride=2), nn.GELU(), nn.Conv2d(24, 8, 1))
    x = torch.randn(4, 16, 8, 8) * torch.logspace(-1, 1, 16).reshape(-1, 1, 1)
    ours, plain = copy.deepcopy(model), copy.deepcopy(model)
    work = calibrated(ours, W4A4, replace(QUICK, rank=4), [Call((x,))])
    calibrated(plain, W4A4, RTNConfig(), [Call((x,))])
    assert work.layers["0"].low_rank[0].shape == (4, 16 * 9)
    assert error(ours, model, [Call((x,))]) < 0.6 * error(plain, model, [Call((x,))])
    assert "grouped" in str(QUICK.unsupported(nn.Conv2d(8, 8, 3, groups=2), W4A4))


def test_large_matrices_are_decomposed_as_small_ones_are() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(700, 600, generator=generator)).Q
    other = torch.linalg.qr(torch.randn(600, 600, generator=generator)).Q
    weight = basis @ torch.diag(0.9 ** torch.arange(600.0)) @ other
    down, up = truncated_svd(weight, 16)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    best = left[:, :16] @ torch.diag(values[:16]) @ right[:16]
    assert torch.linalg.norm(weight - up @ down) < 1.001 * torch.linalg.norm(weight - best)
    assert torch.equal(truncated_svd(weight, 16)[0], down)


@pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [((QUICK, GPTQConfig()), torch.float32), ((QuaRotConfig(), QUICK), torch.bfloat16)],
    ids=["then gptq", "rotated"],
)
def test_plan_counts_the_bytes_and_reload_is_equal(
    algorithm: tuple[AlgorithmConfig, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    pipe = tiny.build_pipeline("pixart", dtype=dtype)
    given = tiny.call_kwargs(pipe, steps=2)
    given.pop("generator")
    config = dc.QuantizationConfig("w4a4", algorithm=algorithm)
    plan = pipe.compression_plan(config, calibration=[{**given, "prompt": "a cat"}])
    pipe.compress(plan, measure=False)
    model = pipe.transformer
    assert plan.bytes_after == sum(p.numel() * p.element_size() for p in model.parameters()) + sum(
        b.numel() * b.element_size() for n, b in model.named_buffers() if n in model.state_dict()
    )
    layer = quantized_layers(model)["transformer_blocks.0.attn1.to_q"]
    assert layer.low_rank_down.shape == (8, 128)
    path = layer.compute_path()
    assert path.faster_than_dense is None
    assert path.description.endswith("and a low-rank branch")
    assert path.description in str(plan)
    picture = tiny.sample(pipe)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path, torch_dtype=dtype)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.sample(again), picture)


@pytest.mark.parametrize("fields", [{"rank": 0}, {"num_alphas": -1}, {"iterations": -1}, {"num_rows": 0}])
def test_configs_refuse(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="SVDQuantConfig: need rank >= 1"):
        SVDQuantConfig(**fields)
    with pytest.raises(ConfigError, match=r"SVDQuantConfig prepares layers .* must come before it"):
        SequenceConfig((GPTQConfig(), SVDQuantConfig()))
