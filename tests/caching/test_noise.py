"""Noise of rounded activations: told from the same arguments, and not amplified by a forecast."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffuse_compress as dc
import tiny
from caching.loops import schedule_for
from diffuse_compress.caching.calibrate import calibrate_cache
from diffuse_compress.caching.config import FeatureCacheConfig
from diffuse_compress.caching.forecast import with_forecast
from diffuse_compress.caching.noise import exact_inputs, noise_amplification, rounds_inputs
from diffuse_compress.caching.recording import Trajectory
from diffuse_compress.caching.rehearsal import Rehearsal, arguments_of_items
from diffuse_compress.caching.units import Site, Unit
from diffuse_compress.quantization.layer_base import QuantizedLayer
from tolerance import KERNEL, assert_close

STEPS, UNITS, WIDTH = 12, 2, 4096
SITES = [Site(f"blocks.{index}", index, 1, True, True, index + 1) for index in range(UNITS)]
CALL: dict[str, Any] = {
    "num_inference_steps": 10,
    "guidance_scale": 2.0,
    "height": 32,
    "width": 32,
    "use_resolution_binning": False,
    "max_sequence_length": tiny.TEXT_LENGTH,
    "output_type": "latent",
}


def noisy(change: tuple[float, float], noise: tuple[float, float], seed: int = 0) -> Trajectory:
    """Two units that walk by ``change`` in a direction of their own, with other noise in every step."""
    generator = torch.Generator().manual_seed(seed)
    start, way, rounding = (
        torch.randn(count, UNITS, WIDTH, generator=generator) / WIDTH**0.5 for count in (1, 1, STEPS)
    )
    clean = start + torch.arange(STEPS)[:, None, None] * torch.tensor(change)[:, None] * way
    rounding = rounding * torch.tensor(noise)[:, None]
    return Trajectory(clean + rounding, torch.ones(STEPS, UNITS), rounding)


def test_a_forecast_does_not_amplify_noise():
    recorded = [noisy(change=(0.02, 0.02), noise=(0.2, 0.2), seed=seed) for seed in range(4)]
    mask = torch.ones(STEPS, UNITS, dtype=torch.uint8)
    mask[2::3] = mask[3::3] = 0
    units = [Unit(site.block) for site in SITES]
    copied = dc.CacheSchedule.full(units, STEPS, "Model").with_mask(mask)
    straight = copied.with_mask(mask, torch.tensor([2.0, -1.0]).expand(STEPS, UNITS, 2).clone())
    assert noise_amplification(copied, recorded) == pytest.approx(1.0, abs=0.1)
    assert noise_amplification(straight, recorded) == pytest.approx(5.0, abs=0.5)
    assert noise_amplification(with_forecast(copied, SITES, recorded), recorded) < 1.0
    # Where there is little of it the forecast follows the line.
    quiet = [noisy(change=(0.2, 0.2), noise=(0.001, 0.001), seed=seed) for seed in range(4)]
    assert noise_amplification(with_forecast(copied, SITES, quiet), quiet) > 2.0
    assert noise_amplification(copied, [Trajectory(t.deltas, t.power) for t in recorded]) is None


@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_exact_inputs_leave_the_weights_quantized(preset):
    model = tiny.build("pixart").compress(preset, measure=False)
    inputs = tiny.inputs_for(model)
    before = {name: layer.scheme for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    assert rounds_inputs(model)
    with torch.no_grad():
        rounded = model(**inputs)[0]
        with exact_inputs(model):
            assert not rounds_inputs(model)
            exact = model(**inputs)[0]
        assert torch.equal(model(**inputs)[0], rounded)
        with pytest.raises(ZeroDivisionError), exact_inputs(model):
            raise ZeroDivisionError
        assert {n: layer.scheme for n, layer in model.named_modules() if isinstance(layer, QuantizedLayer)} == before
        assert not torch.equal(exact, rounded)
        model.decompress()
        assert not rounds_inputs(model)
        assert_close(exact, model(**inputs)[0], KERNEL[torch.float32] * 10)


@pytest.mark.parametrize("preset", ["w8a8", "w4a16"])
def test_noise_is_recorded_of_the_first_run_of_a_model_that_rounds_its_inputs(preset):
    pipe = tiny.build_pipeline("pixart")
    pipe.transformer.compress(preset, measure=False)
    forwards: list[int] = []
    handle = pipe.transformer.proj_out.register_forward_hook(lambda *_: forwards.append(1))
    rehearsal = Rehearsal(pipe, "block", 0)
    rehearsal.record(arguments_of_items(pipe, ["a cat", "a dog"], CALL), None)
    handle.remove()
    first, second = rehearsal.recorders["transformer"].trajectories
    assert second.noise is None
    plain = tiny.build_pipeline("pixart")
    plain.transformer.compress(preset, measure=False)
    again = Rehearsal(plain, "block", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffuse_compress.caching.rehearsal.rounds_inputs", lambda model: False)
        again.record(arguments_of_items(plain, ["a cat", "a dog"], CALL), None)
    # What is recorded, and the pictures, are those of the model as it is.
    assert torch.equal(first.deltas, again.recorders["transformer"].trajectories[0].deltas)
    assert all(torch.equal(a, b) for a, b in zip(rehearsal.references, again.references, strict=True))
    if preset == "w4a16":
        assert (first.noise, len(forwards)) == (None, 20)
        return
    assert len(forwards) == 30
    # The first step has the same sample in a pipeline whose activations are never rounded.
    with exact_inputs(plain.transformer), pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffuse_compress.caching.rehearsal.rounds_inputs", lambda model: False)
        exact = Rehearsal(plain, "block", 0)
        exact.record(arguments_of_items(plain, ["a cat"], CALL), None)
    clean = exact.recorders["transformer"].trajectories[0].deltas
    assert torch.equal(first.noise[0], first.deltas[0] - clean[0])
    assert first.noise.square().sum() > 0


def test_a_calibration_says_by_how_much_noise_grows():
    pipe = tiny.build_pipeline("pixart")
    pipe.transformer.compress("w8a8", measure=False)
    found = calibrate_cache(
        pipe,
        ["a cat", "a dog"],
        FeatureCacheConfig(granularity="block", target_speedup=1.2, num_trajectories=2),
        **CALL,
    )
    schedule = found.schedules["transformer"]
    assert 0.2 < schedule.details["noise_amplification"] < 5.0
    assert "times the noise of activations" in str(schedule)
    assert "times the noise" not in str(schedule_for(pipe.transformer, schedule.mask))
