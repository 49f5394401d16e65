"""The outlier transform keeps the function and makes the inputs of the layers it names hard to quantize."""

from __future__ import annotations

import pytest
import torch

import tiny
from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.outliers import FACTORS, add_outlier_channels
from tolerance import KERNEL, assert_close


def inputs_of(model: torch.nn.Module, names: set[str]) -> dict[str, torch.Tensor]:
    """{layer: its input [rows, K]} of one forward."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).clone())
        )
        for name in names
    ]
    with torch.no_grad():
        model(**tiny.inputs_for(model))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("seed", [0, 1])
def test_add_outlier_channels_keeps_the_function(seed: int) -> None:
    model = tiny.build("pixart")
    inputs = tiny.inputs_for(model)
    with torch.no_grad():
        before = model(**inputs).sample
        pairs = add_outlier_channels(model, fraction=1 / 16, seed=seed)
        after = model(**inputs).sample
    assert len(pairs) == 2 * 2 + 2 + 1
    assert_close(after, before, KERNEL[torch.float32])
    # The same in float64: what is left above is float32 rounding, not a wrong equation.
    wide = tiny.build("pixart").double()
    inputs = {key: value.double() if _is_float(value) else value for key, value in inputs.items()}
    with torch.no_grad():
        exact = wide(**inputs).sample
        add_outlier_channels(wide, fraction=1 / 16, seed=seed)
        assert_close(wide(**inputs).sample, exact, KERNEL[torch.float64])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_add_outlier_channels_keeps_a_decoders_function(name: str) -> None:
    model = tiny.build(name)
    probe, inputs = tiny.build(name), tiny.inputs_for(model)
    with torch.no_grad():
        before = model(**inputs).logits
        pairs = add_outlier_channels(model, fraction=1 / 16, seed=1)
        assert_close(model(**inputs).logits, before, KERNEL[torch.float32])
    # Two norms and the down projection of each of two layers, and the output projection where heads are not grouped.
    assert {pair.producer.rpartition(".")[2] for pair in pairs} >= {"input_layernorm", "up_proj"}
    consumers = {consumer for pair in pairs for consumer in pair.consumers}
    plain, grown = inputs_of(probe, consumers), inputs_of(model, consumers)
    for pair in pairs:
        for consumer in pair.consumers:
            factors = torch.tensor(pair.factors)
            channels = list(pair.channels)
            assert_close(
                grown[consumer][:, channels], plain[consumer][:, channels] * factors, KERNEL[torch.float32] * 4
            )


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def test_add_outlier_channels_grows_the_consumers_inputs_by_the_factors() -> None:
    model = tiny.build("pixart")
    probe = tiny.build("pixart")
    pairs = add_outlier_channels(probe, fraction=1 / 16)
    names = {consumer for pair in pairs for consumer in pair.consumers}
    dense, outliers = inputs_of(model, names), inputs_of(probe, names)
    for pair in pairs:
        assert set(pair.factors) <= set(FACTORS)
        assert all(10 <= factor <= 100 for factor in pair.factors)
        channels, factors = list(pair.channels), torch.tensor(pair.factors)
        for consumer in pair.consumers:
            assert_close(outliers[consumer][:, channels], dense[consumer][:, channels] * factors, torch.float32)
            others = [c for c in range(dense[consumer].shape[1]) if c not in channels]
            assert_close(outliers[consumer][:, others], dense[consumer][:, others], torch.float32)


def test_add_outlier_channels_is_seeded_and_leaves_global_state(untouched_rng: None) -> None:
    first, second, third = (
        add_outlier_channels(tiny.build("pixart"), fraction=1 / 16, seed=seed) for seed in (5, 5, 6)
    )
    assert first == second
    assert first != third
    assert [len(pair.channels) for pair in add_outlier_channels(tiny.build("pixart"))] == [2] * 7


def test_add_outlier_channels_refuses_other_models() -> None:
    with pytest.raises(ConfigError, match="FluxTransformer2DModel"):
        add_outlier_channels(tiny.build("flux"))
    model = tiny.build("pixart")
    model.transformer_blocks[0].attn1.to_v = torch.nn.Identity()
    with pytest.raises(ConfigError, match="need a dense model, got Identity"):
        add_outlier_channels(model)
