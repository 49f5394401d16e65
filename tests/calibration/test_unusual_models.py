"""Models of a user's own whose code does what none of the libraries' does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

import diffuse_compress as dc
import tiny
from diffuse_compress.calibration.work_folder import digest_of_weights
from diffuse_compress.integrations.component import quantized_layers

W4 = dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT4, dc.PerGroup(32)))
WIDTH = 64


class Block(nn.Module):
    """Residual branches, added in place or not: the same function."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("calls", torch.zeros(()))
        self.mix = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if not self.in_place:
            x = x + self.mix(x)
            return x + self.down(torch.relu(self.up(x)))
        x += self.mix(x)
        x += self.down(self.up(x).relu_())
        return x


class Model(ModelMixin, ConfigMixin):
    config_name = "config.json"

    @register_to_config
    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(in_place) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.config.in_place:
            x.sub_(x.mean())
        else:
            x = x - x.mean()
        for block in self.blocks:
            x = block(x)
        return x


def model(**config: Any) -> Model:
    torch.manual_seed(0)
    return Model(**config).eval()


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(2, 20, WIDTH, generator=generator) + 0.5} for _ in range(4)]


IN_PLACE: dict[str, tuple[Any, Any]] = {
    "gptq": (W4, dc.GPTQConfig()),
    "gptaq": (W4, dc.GPTQConfig(asymmetric=True)),
    "awq": (W4, dc.AWQConfig(num_ratios=4, clip_steps=2)),
    "awq, static": (
        dc.Scheme(dc.WeightScheme("int8"), dc.ActivationScheme("int8", dc.PerTensor(), dynamic=False)),
        dc.AWQConfig(num_ratios=4, clip_steps=2),
    ),
    "smoothquant": ("w8a8", dc.SmoothQuantConfig(fold=True)),
    "svdquant": ("w4a4", dc.SVDQuantConfig(rank=4, num_alphas=2, iterations=1)),
    "adaround": (W4, dc.AdaRoundConfig(iterations=10)),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_what_is_changed_in_place_makes_no_difference(case: str) -> None:
    """A block is run many times on inputs that its forward adds to; nor is what the user gave changed."""
    scheme, algorithm = IN_PLACE[case]
    config = dc.QuantizationConfig(scheme, algorithm=algorithm)
    given = batches()
    expected = model().compress(config, calibration=batches(), measure=False)
    found = model(in_place=True).compress(config, calibration=given, measure=False)
    assert digest_of_weights(found) == digest_of_weights(expected)
    assert all(torch.equal(mine["x"], theirs["x"]) for mine, theirs in zip(given, batches(), strict=True))


def test_a_calibration_is_not_changed_by_what_it_is_used_for() -> None:
    target = model(in_place=True)
    found = dc.Calibration.record(target, batches())
    before = found.fingerprint
    dc.sensitivity(target, W4, algorithm=dc.GPTQConfig(), calibration=found)
    target.compress(dc.QuantizationConfig(W4, algorithm=dc.GPTQConfig(asymmetric=True)), calibration=found)
    assert found.fingerprint == before


@pytest.mark.parametrize("interrupted", [False, True])
def test_what_a_model_counts_is_as_before(interrupted: bool) -> None:
    target, config = model(), dc.QuantizationConfig(W4, algorithm=dc.GPTQConfig())
    target(**batches()[0])
    before = digest_of_weights(target)

    def callback(stage: str, done: int, total: int, metrics: dict[str, Any]) -> None:
        if interrupted and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
        target.compress(config, calibration=batches(), callback=callback, measure=False)
    assert [float(block.calls) for block in target.blocks] == [1.0] * 3
    assert not interrupted or digest_of_weights(target) == before


def test_gradients_that_in_place_work_has_lost_are_told() -> None:
    config = dc.QuantizationConfig(W4, algorithm=dc.BRECQConfig(iterations=2))
    with pytest.raises(dc.ConfigError, match=r"blocks\.0: BRECQ needs gradients .* AdaRoundConfig\(\) needs none"):
        model(in_place=True).compress(config, calibration=batches(), measure=False)


def test_a_loader_may_fill_the_same_tensor_again() -> None:
    def refilled() -> Iterator[dict[str, torch.Tensor]]:
        x = torch.empty(1, 4, WIDTH)
        for value in (1.0, 2.0):
            yield {"x": x.fill_(value)}

    found = dc.Calibration.record(model(), refilled()).of("")
    assert [float(sample.call.kwargs["x"].mean()) for sample in found] == [1.0, 2.0]


@pytest.mark.parametrize("what", ["model", "blocks"])
def test_compiled_models_are_calibrated_eagerly(what: str, fresh_compiler: None) -> None:
    """A compiled forward that was suspended would leave its tracer on: it would trace what the thread does next."""
    config = dc.QuantizationConfig(W4, algorithm=dc.GPTQConfig())
    expected, target = model(), model()
    expected(**batches()[0])
    expected.compress(config, calibration=batches(), measure=False)
    for module in [target] if what == "model" else target.blocks:
        module.compile(backend="eager")
    target(**batches()[0])
    target.compress(config, calibration=batches(), measure=False)
    assert digest_of_weights(target) == digest_of_weights(expected)
    assert quantized_layers(tiny.build("llama")) == {}  # traced, its constructor would raise
    torch.testing.assert_close(target(**batches()[0]), expected(**batches()[0]))
