"""Norm tweaking: which parameters move, that nothing else does, and that the block comes nearer to the dense one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from calibrated_block import Block, calibrated, error, inputs
from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.awq import AWQConfig
from diffuse_compress.quantization.algorithms.base import (
    AlgorithmConfig,
    SequenceConfig,
    algorithm_from_dict,
    algorithm_to_dict,
)
from diffuse_compress.quantization.algorithms.gptq import GPTQConfig
from diffuse_compress.quantization.algorithms.norm_tweaking import NormTweakingConfig
from diffuse_compress.quantization.algorithms.rtn import RTNConfig
from diffuse_compress.quantization.presets import PRESETS
from diffuse_compress.quantization.scheme import NumberFormat, PerGroup, Scheme, WeightScheme
from normed_block import NormedBlock, setter

W3 = Scheme(WeightScheme(NumberFormat.INT3, PerGroup(64), symmetric=False))
W4A8 = PRESETS["w4a8"].scheme
WIDTH = 64
NORMS = {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}


def tweaked(dense: nn.Module, algorithm: AlgorithmConfig, scheme: Scheme = W3, **given: object) -> nn.Module:
    block = copy.deepcopy(dense)
    calibrated(block, scheme, algorithm, inputs(4, WIDTH), change=setter(block), **given)
    return block


def changed(block: nn.Module, other: nn.Module) -> set[str]:
    theirs = dict(other.named_parameters())
    return {name for name, value in block.named_parameters() if not torch.equal(value, theirs[name])}


@pytest.mark.parametrize("scheme", [W3, W4A8], ids=["w3", "w4a8"])
def test_norms_alone_move_and_the_output_comes_nearer(scheme: Scheme) -> None:
    torch.manual_seed(3)
    dense = NormedBlock(offset=1.0)
    plain = tweaked(dense, RTNConfig(), scheme)
    ours = tweaked(dense, SequenceConfig((RTNConfig(), NormTweakingConfig(epochs=10))), scheme)
    assert changed(ours, plain) == NORMS
    assert error(ours, dense, inputs(4, WIDTH)) < 0.95 * error(plain, dense, inputs(4, WIDTH))
    alone = tweaked(dense, NormTweakingConfig(epochs=10), scheme)
    assert not changed(alone, ours), "rounded to nearest, where nothing else chose the codes"


def test_without_a_rate_or_a_way_to_change_parameters_nothing_changes() -> None:
    torch.manual_seed(3)
    dense = NormedBlock()
    plain = tweaked(dense, RTNConfig())
    for config in (NormTweakingConfig(learning_rate=0.0), NormTweakingConfig(epochs=0)):
        assert not changed(tweaked(dense, config), plain)
    block = copy.deepcopy(dense)
    calibrated(block, W3, NormTweakingConfig(), inputs(4, WIDTH))
    assert not changed(block, plain)
    block = copy.deepcopy(dense)
    shared = frozenset(map(id, block.norm1.parameters()))
    calibrated(block, W3, NormTweakingConfig(epochs=2), inputs(4, WIDTH), change=setter(block), shared=shared)
    assert changed(block, plain) == {"norm2.weight", "norm2.bias"}


def test_what_is_worse_is_not_kept() -> None:
    torch.manual_seed(3)
    dense = NormedBlock()
    assert not changed(tweaked(dense, NormTweakingConfig(learning_rate=100.0, epochs=1)), tweaked(dense, RTNConfig()))


def test_the_rate_grows_with_the_depth() -> None:
    """A step of Adam is as long as its rate."""
    torch.manual_seed(3)
    dense = NormedBlock(offset=1.0)
    config = NormTweakingConfig(learning_rate=1e-4, gamma=1.0, epochs=1, batch_size=4)
    first, later = (tweaked(dense, config, depth=depth) for depth in (0.0, 0.5))
    steps = [float((block.norm1.weight - dense.norm1.weight).detach().abs().median()) for block in (first, later)]
    assert steps[0] == pytest.approx(1e-4, rel=0.01)
    assert steps[1] == pytest.approx(1.5e-4, rel=0.01)


def test_it_comes_after_the_codes() -> None:
    for late in (GPTQConfig(), AWQConfig()):
        with pytest.raises(
            ConfigError, match=f"NormTweakingConfig works on layers .* must come after {type(late).__name__}"
        ):
            SequenceConfig((NormTweakingConfig(), late))
    sequence = SequenceConfig((AWQConfig(), GPTQConfig(), NormTweakingConfig(epochs=3)))
    assert algorithm_from_dict(algorithm_to_dict(sequence)) == sequence
    assert sequence.for_search() == SequenceConfig((AWQConfig(), GPTQConfig().for_search()))
    assert SequenceConfig((GPTQConfig(), NormTweakingConfig())).for_search() == GPTQConfig().for_search()
    with pytest.raises(ConfigError, match=r"learning_rate >= 0, .* got learning_rate=-1"):
        NormTweakingConfig(learning_rate=-1)


def test_blocks_without_norms_of_their_own_leave_it_nothing_to_do() -> None:
    config = NormTweakingConfig()
    assert "no block has a norm" in (config.idle_in([Block()]) or "")
    assert "no block has a norm" in (config.idle_in([nn.Sequential(nn.LayerNorm(4, elementwise_affine=False))]) or "")
    assert config.idle_in([Block(), NormedBlock()]) is None
