"""Which tile shape a product gets: a pure function of data, device size and shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffuse_compress_kernels import triton_kernels
from diffuse_compress_kernels.triton_kernels.candidates import KINDS, candidates, gemv_candidates
from diffuse_compress_kernels.triton_kernels.tables import (
    DEFAULT,
    MANY,
    Choice,
    choose,
    load_table,
    save_table,
    table_for,
)
from diffuse_compress_kernels.triton_kernels.tiles import GemvConfig, TileConfig

SMALL, LARGE = TileConfig(128, 128), TileConfig(256, 128, num_warps=8)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 64, 65, 4096, 75600])
def test_choose_serves_every_number_of_tokens(tokens: int, capability: tuple[int, int]) -> None:
    for kind in DEFAULT:
        config = choose(table_for(capability), kind, (tokens, 4096, 4096), 132)
        assert config.block_m >= min(tokens, 64)


def test_choose_takes_the_smallest_fitting_number_of_tokens() -> None:
    table = {"w4a8": (Choice(64, SMALL), Choice(MANY, LARGE))}
    assert choose(table, "w4a8", (64, 4096, 4096), 132) == SMALL
    assert choose(table, "w4a8", (65, 4096, 4096), 132) == LARGE


def test_choose_weighs_speed_against_full_waves() -> None:
    """128 x 33792 is 264 full tiles of 128, two to a multiprocessor, or as many half-empty ones of 256 tokens."""
    table = {"w4a8": (Choice(MANY, LARGE, 1.05), Choice(MANY, SMALL, 1.0))}
    assert choose(table, "w4a8", (8448 * 4, 16896, 4096), 132) == LARGE
    assert choose(table, "w4a8", (128, 33792, 4096), 132) == SMALL


@pytest.mark.parametrize(("depth", "aligned", "tma"), [(384, True, False), (512, True, True), (512, False, False)])
def test_choose_uses_descriptors_where_they_are_right(depth: int, aligned: bool, tma: bool) -> None:
    table = {"w4a8": (Choice(MANY, TileConfig(128, 128, num_stages=3, tma=True, programs_per_sm=2)),)}
    config = choose(table, "w4a8", (4096, 4096, depth), 132, aligned=aligned)
    assert config.tma == tma
    assert (config.programs_per_sm > 0) == tma


def test_choose_obeys_least_outputs() -> None:
    table = {"w4a8": (Choice(64, SMALL, 0.5), Choice(64, LARGE, 1.0, outputs=16384))}
    assert choose(table, "w4a8", (64, 16384, 4096), 132) == LARGE
    assert choose(table, "w4a8", (64, 16383, 4096), 132) == SMALL


def test_choose_splits_k_only_as_far_as_needed() -> None:
    table = {"w4a8": (Choice(MANY, TileConfig(16, 64, split_k=16)),)}
    splits = [choose(table, "w4a8", (16, outputs, 14336), 132).split_k for outputs in (1024, 4096, 6144, 28672)]
    assert splits == [16, 4, 4, 1]
    assert choose(table, "w4a8", (16, 1024, 1024), 132).split_k == 2, "at least four steps of K for each program"
    table = {"w4a16": (Choice(MANY, TileConfig(16, 64, split_k=8), least_steps=8, programs=3.5),)}
    splits = [choose(table, "w4a16", (16, outputs, 4096), 132).split_k for outputs in (1024, 4096, 28672)]
    assert splits == [4, 4, 2]


def test_choose_without_aligned_rows_uses_no_descriptors() -> None:
    config = choose(table_for((9, 0)), "w4a8", (4096, 4096, 4100), 132, aligned=False)
    assert not config.tma
    assert config.programs_per_sm == 0


def test_table_survives_a_file(tmp_path: Path) -> None:
    table = table_for((9, 0))
    save_table(table, tmp_path / "tiles" / "device.json", {"device": "test"})
    assert load_table(tmp_path / "tiles" / "device.json") == table


def test_names_of_candidates_are_unique_and_survive_json() -> None:
    for tokens in (1, 16, 64, 512, 4096):
        for kind in KINDS:
            found = candidates(kind, tokens)
            assert len({config.name for config in found}) == len(found)
            assert [TileConfig(**config.to_dict()) for config in found] == found
    assert [GemvConfig(**config.to_dict()) for config in gemv_candidates()] == gemv_candidates()


def test_kernels_are_not_usable_without_a_cuda_device() -> None:
    for name in ("cpu", "meta", *(() if torch.cuda.is_available() else ("cuda",))):
        assert not triton_kernels.usable(torch.device(name))
