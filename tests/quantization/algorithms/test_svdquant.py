"""SVDQuant: the branch against the decomposition, exactness at full rank, and what it gains at four bits."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffuse_compress as dc
import tiny
from calibrated_block import Block, calibrated, error, inputs, work_of
from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError, ModelStateError
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.quantization.algorithms import svdquant
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, SequenceConfig, calibrate_with
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.algorithms.quarot import QuaRotConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.algorithms.smoothquant import SmoothQuantConfig
from diffuse_compress.quantization.algorithms.svdquant import SVDQuantConfig, coarse_to_fine, truncated_svd
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


def test_refinement_ends_at_the_first_that_loses_and_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def error(trial: Any, branch: Any, rounded: torch.Tensor) -> torch.Tensor:
        seen.append(branch)
        return torch.tensor([5.0, 3.0, 4.0, 1.0][len(seen) - 1])

    monkeypatch.setattr(svdquant._Trial, "error", error)
    work = work_of(nn.Sequential(nn.Linear(128, 64)), W4A4, inputs(1))
    calibrate_with(replace(QUICK, num_alphas=0, iterations=9), work)
    assert len(seen) == 3
    assert work.layers["0"].low_rank is seen[1]


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


def test_near_and_rough_decompositions_and_degenerate_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(700, 600, generator=generator) @ torch.diag(torch.logspace(0, -2, 600))
    other = weight + 0.01 * weight.std() * torch.randn(700, 600, generator=generator)
    values = torch.linalg.svdvals(other.double())
    least = float(values[16:].square().sum().sqrt())

    def left_over(matrix: torch.Tensor, **given: Any) -> float:
        down, up = truncated_svd(matrix, 16, **given)
        return float(torch.linalg.norm(matrix - up @ down))

    near = truncated_svd(weight, 16)[1]
    assert left_over(other, near=near) < 1.001 * least
    assert 1.01 * least < left_over(other, power_iterations=1) < 1.03 * least
    # A single step from anywhere is not enough: what is near is made use of.
    assert left_over(other, near=torch.randn(700, 16, generator=generator)) > 1.01 * least
    # Of full rank 8 nothing is left, of all zeros there is nothing; equal singular values are found in spite of scale.
    exact = torch.randn(400, 8, generator=generator) @ torch.randn(8, 500, generator=generator)
    for scale in (1e-12, 1.0, 1e12):
        assert left_over(scale * exact) < 1e-5 * torch.linalg.norm(scale * exact)
        assert left_over(scale * exact, near=truncated_svd(scale * exact, 16)[1]) < 1e-5 * scale * exact.norm()
    assert left_over(torch.zeros(400, 500)) == 0


@pytest.mark.parametrize(("last", "tried"), [(2, 4), (7, 9), (8, 8), (20, 11), (32, 12)])
@pytest.mark.parametrize("least", [-3.0, 0.0, 4.4, 6.6, 20.0, 40.0])
def test_strengths_are_found_without_trying_all(least: float, last: int, tried: int) -> None:
    asked: list[int] = []

    def error(strength: int) -> torch.Tensor:
        asked.append(strength)
        return torch.tensor(1e6 if strength < 0 else (strength - least) ** 2)

    assert coarse_to_fine(error, last) == min(range(last + 1), key=lambda strength: (strength - least) ** 2)
    assert len(asked) <= tried
    assert len(asked) == len(set(asked))
    # No smoothing at all is among them.
    assert coarse_to_fine(lambda strength: torch.tensor(float(strength >= 0)), last) == -1


def test_the_block_is_run_once_for_all_layers() -> None:
    block, calls = Block(), inputs(3)
    runs: list[Any] = []
    block.register_forward_pre_hook(lambda module, args: runs.append(args))
    work = work_of(block, W4A4, calls)
    calibrate_with(QUICK, work)
    assert len(runs) == len(calls) + 1  # and one that tells which layers share an input
    assert all(layer.low_rank is not None for layer in work.layers.values())


def test_weights_that_are_not_finite_are_an_error() -> None:
    block = Block()
    with torch.no_grad():
        block.down.weight[3, 4] = torch.nan
    with pytest.raises(ModelStateError, match=r"block\.down: quantization needs finite weights"):
        calibrated(block, W4A4, QUICK, inputs(1))


def test_what_cannot_be_rotated_gets_the_branch_alone() -> None:
    both = SequenceConfig((QuaRotConfig(block_size=128), QUICK))
    conv, odd = nn.Conv2d(64, 64, 3), nn.Linear(192, 64)
    assert both.unsupported(conv, W4A4) is both.unsupported(odd, W4A4) is None
    assert both.format_of(conv, W4A4) == both.format_of(odd, W4A4) == W4A4
    assert both.format_of(nn.Linear(128, 64), W4A4).input_rotation == 128
    # Nothing else makes four bits usable without a rotation.
    assert "QuaRot rotates" in str(both.unsupported(nn.Conv2d(64, 64, 3, groups=2), W4A4))
    assert "QuaRot rotates" in str(SequenceConfig((QuaRotConfig(), GPTQConfig())).unsupported(conv, W4A4))
    assert "QuaRot rotates" in str(SequenceConfig((QuaRotConfig(), SmoothQuantConfig())).unsupported(conv, W4A4))


def test_w4a4_with_calibration_takes_a_unet_and_keeps_what_would_grow() -> None:
    unet = tiny.build("unet_sd1")
    plan = unet.compression_plan("w4a4", calibration=[tiny.inputs_for(unet)])
    layers = plan.components[""].layers
    rotated = {name: scheme.input_rotation for name, scheme in layers.items() if scheme.activation}
    assert rotated["mid_block.resnets.0.conv1"] is None
    assert rotated["mid_block.attentions.0.transformer_blocks.0.ff.net.2"] == 256
    kept = {row.layer: row.reason for row in plan.rows if row.scheme is None}
    small = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert kept[small] == "with its low-rank branch it would be larger"
    for row in plan.rows:
        assert row.bytes_after <= row.bytes_before, row
    # Named, it is taken.
    named = unet.compression_plan("w4a4", calibration=[tiny.inputs_for(unet)], overrides={small: "w4a4"})
    assert named.components[""].layers[small].input_rotation == 32


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
    assert not path.faster_than_dense  # unmeasured, or known not to be on a CPU without VNNI
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
