"""How the branch leaves."""

from __future__ import annotations

import math

import pytest
import torch

from diffuse_compress.errors import ConfigError
from diffuse_compress.training.config import QVGenConfig
from diffuse_compress.training.rank_decay import RankDecay, core_svd, rank_path, singular_values


@pytest.mark.parametrize(
    ("rank", "ratio", "last", "path"),
    [
        (32, 0.5, 1, [32, 16, 8, 4, 2, 1, 0]),
        (32, 0.5, 2, [32, 16, 8, 4, 2, 0]),
        (32, 1.0, 1, [32, 0]),
        (8, 0.25, 1, [8, 6, 4, 3, 2, 1, 0]),
        (10, 0.3, 1, [10, 7, 4, 2, 1, 0]),
        (1, 0.5, 1, [1, 0]),
    ],
)
def test_rank_path(rank: int, ratio: float, last: int, path: list[int]) -> None:
    assert rank_path(rank, ratio, last) == path


def test_last_rank_by_name_is_the_papers() -> None:
    assert RankDecay(QVGenConfig(last_rank="1/ratio"), 100).path == [32, 16, 8, 4, 2, 0]


def test_gate_at_the_edges_of_phases() -> None:
    config = QVGenConfig(phi_rank=4, decay_fraction=0.5)
    decay = RankDecay(config, 60)  # 4, 2, 1, 0 within 30 steps
    assert decay.starts == [0, 10, 20, 30]
    assert decay.at(0)[2].tolist() == [1, 1, 1, 1]
    phase, rank, gate = decay.at(5)
    assert (phase, rank) == (0, 4)
    assert gate[:2].tolist() == [1, 1]
    assert gate[2:].tolist() == pytest.approx([0.5, 0.5])
    assert decay.at(9)[2][3].item() == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.9)))
    assert decay.at(10)[:2] == (1, 2)
    assert decay.at(10)[2].tolist() == [1, 1, 0, 0]
    assert decay.at(25)[2].tolist() == pytest.approx([0.5, 0, 0, 0])
    for step in (30, 59, 1000):
        assert decay.at(step)[:2] == (3, 0)
        assert not decay.at(step)[2].any()
    linear = RankDecay(QVGenConfig(phi_rank=4, decay_fraction=0.5, gate="linear"), 60)
    assert linear.at(9)[2][3].item() == pytest.approx(0.1)


def test_kept_branch_has_one_phase() -> None:
    decay = RankDecay(QVGenConfig(decay=False), 1)
    assert decay.at(10**6)[:2] == (0, 32)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="leaves in 6 phases"):
        RankDecay(QVGenConfig(), 5)


def test_core_decomposition_is_the_full_one() -> None:
    up, down = torch.randn(40, 6), torch.randn(6, 30) * torch.logspace(0, -2, 6).unsqueeze(1)
    product = up @ down
    left, right, values = core_svd(up, down)
    assert torch.allclose(left @ right, product, atol=1e-5)
    full_left, full_values, _ = torch.linalg.svd(product)
    assert torch.allclose(values, full_values[:6], rtol=1e-5, atol=1e-5)
    assert torch.allclose((left.t() @ full_left[:, :6]).abs().diagonal(), values.sqrt(), rtol=1e-4)
    assert torch.allclose(singular_values(up, down), values, rtol=1e-5)
    assert (left.gather(0, left.abs().argmax(dim=0, keepdim=True)) > 0).all()
    # The same product in other factors: nothing that is found depends on them.
    turn = torch.linalg.qr(torch.randn(6, 6))[0]
    again, _, _ = core_svd(up @ turn, turn.t() @ down)
    assert torch.allclose(again, left, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": "fp8"}, "needs integer weights"),
        ({"weight_zero": "float"}, "weight_zero='float' needs a format that leaves inputs alone"),
        ({"gate": "cosinus"}, "did you mean 'cosine'"),
        ({"phi_rank": 0}, "phi_rank must be an integer of at least 1"),
        ({"last_rank": "1/2"}, "last_rank must be at least 1"),
        ({"clip_init": 1.0}, "clip_init must be between 0 and 1"),
        ({"betas": (0.9,)}, "betas are two numbers"),
        ({"scheme": "w5a5"}, "Unknown preset"),
    ],
)
def test_config_refuses(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QVGenConfig(**given)  # type: ignore[arg-type]


def test_config_survives_json() -> None:
    config = QVGenConfig(
        "w4a16", weight_zero="float", modules_to_not_convert=["proj"], betas=[0.8, 0.9], last_rank="1/ratio"
    )  # type: ignore[arg-type]
    assert QVGenConfig.from_dict(config.to_dict()) == config
    assert config.layer_scheme.weight.float_zero_point
    with pytest.raises(ConfigError, match="unknown field 'phi_ranks'"):
        QVGenConfig.from_dict({"phi_ranks": 3})
