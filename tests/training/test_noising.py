"""Noise levels: the schedulers' own noising, shifts, clean samples and weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffuse_compress.errors import ConfigError
from diffuse_compress.pipeline_call import seeded
from diffuse_compress.training.noising import Noising

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = [
    DDPMScheduler(),
    DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True),
    DPMSolverMultistepScheduler(),
    DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
    UniPCMultistepScheduler(),
    UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
    EulerDiscreteScheduler(),
    CogVideoXDDIMScheduler(prediction_type="v_prediction", snr_shift_scale=3.0),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
]
IDS = [f"{type(s).__name__}-{s.config.get('prediction_type', 'flow')}" for s in SCHEDULERS]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=IDS)
def test_noisy_latents_are_those_of_the_scheduler(scheduler):
    stock, noising = copy.deepcopy(scheduler), Noising(scheduler)
    stock.set_timesteps(20)
    clean, noise = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    timesteps = stock.timesteps[[2, 9, 18]]
    if hasattr(stock, "scale_noise"):
        expected = stock.scale_noise(clean, timesteps, noise)
    else:
        expected = stock.add_noise(clean, noise, timesteps)
    if isinstance(stock, EulerDiscreteScheduler):  # what its denoiser gets
        sigmas = torch.stack([stock.sigmas[stock.index_for_timestep(t)] for t in timesteps])
        expected = expected / (sigmas**2 + 1).sqrt().reshape(-1, 1, 1, 1)
    levels = noising.at(timesteps)
    # UniPC and DPM-Solver keep whole timesteps of sigmas that lie between two.
    tolerance = 6e-3 if noising.is_flow and not isinstance(stock, FlowMatchEulerDiscreteScheduler) else 2e-4
    torch.testing.assert_close(levels.noisy(clean, noise), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_the_clean_sample_comes_back_from_a_perfect_prediction(prediction):
    scheduler = FlowMatchEulerDiscreteScheduler() if "flow" in prediction else DDPMScheduler(prediction_type=prediction)
    noising = Noising(scheduler)
    levels = noising.at(torch.tensor([20.0, 500.0, 800.0]))
    clean, noise = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    alpha, sigma = levels.alpha[:, None, None], levels.sigma[:, None, None]
    output = {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * clean,
        "sample": clean,
        "flow_prediction": noise - clean,
    }[prediction]
    noisy = levels.noisy(clean, noise)
    assert torch.equal(noising.truth(clean, noise, levels), output)
    torch.testing.assert_close(noising.x0(output, noisy, levels), clean, atol=1e-4, rtol=1e-4)
    # A squared distance of two outputs, times the weight, is that of what they stand for over sigma**2.
    other = output + 0.1 * torch.randn_like(output)
    outputs = (other - output).square().mean((1, 2)) * noising.weights(levels, "x0")
    distance = (noising.x0(other, noisy, levels) - noising.x0(output, noisy, levels)).square().mean((1, 2))
    torch.testing.assert_close(outputs, distance / levels.sigma.square(), rtol=2e-3, atol=1e-5)
    assert torch.equal(noising.weights(levels, "output"), torch.ones(3))


def test_levels_of_a_size_are_drawn_with_its_own_shift():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    found = Noising(scheduler, mu=0.5).draw(64, seeded(0), 1.2).timesteps
    assert torch.equal(found, Noising(scheduler, mu=1.2).draw(64, seeded(0)).timesteps)
    assert not torch.equal(found, Noising(scheduler, mu=0.5).draw(64, seeded(0)).timesteps)
    fixed = Noising(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert torch.equal(fixed.draw(8, seeded(0), 1.2).timesteps, fixed.draw(8, seeded(0)).timesteps)


def test_levels_are_drawn_with_the_shift_of_the_pipeline():
    steps = FlowMatchEulerDiscreteScheduler(shift=3.0)
    steps.set_timesteps(500)
    drawn = Noising(steps).draw(20_000, seeded(0)).timesteps
    # The median of an even choice among the schedule's steps.
    assert float(drawn.median()) == pytest.approx(float(steps.timesteps.median()), rel=0.02)
    assert float(Noising(FlowMatchEulerDiscreteScheduler()).draw(20_000, seeded(0)).timesteps.median()) < 520
    assert torch.equal(drawn, Noising(steps).draw(20_000, seeded(0)).timesteps)


def test_dynamic_shifting_needs_what_the_pipeline_tells():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ConfigError, match="mu="):
        Noising(scheduler)
    assert Noising(scheduler, mu=1.0).shift == pytest.approx(2.71828, rel=1e-4)


def test_an_expert_is_trained_at_its_own_timesteps():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    high = Noising(scheduler, low=0.875).draw(1000, seeded(0)).timesteps
    low = Noising(scheduler, high=0.875).draw(1000, seeded(0)).timesteps
    assert float(high.min()) >= 874.9
    assert float(low.max()) <= 875.1
    assert float(high.max()) > 990


def test_another_family_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match="list of prompts"):
        Noising(EDMEulerScheduler())
    with pytest.raises(ConfigError, match="density"):
        Noising(DDPMScheduler(), density="uniforn")
    odd = SimpleNamespace(config={"prediction_type": "other"}, alphas_cumprod=DDPMScheduler().alphas_cumprod)
    noising = Noising(odd)
    levels = noising.at(torch.tensor([1.0]))
    with pytest.raises(ConfigError, match="x0 is not known"):
        noising.x0(torch.ones(1), torch.ones(1), levels)
