"""Noise levels as a pipeline's own scheduler has them: draws of t, noisy latents, and what a prediction says of x0.

Two families cover diffusers' schedulers: flow matching, ``x_t = (1 - sigma) x0 + sigma n``, and variance preserving
diffusion, ``x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) n``. A sampler of the second family that scales its latents
(Euler, Heun, LMS) hands the denoiser just this ``x_t``. Of flow matching t is drawn with the shift that the pipeline
samples with: a training on other levels than those of inference spends its steps where nobody looks (the released QVGen
trains Wan with shift 1 and samples with shift 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from diffuse_compress.errors import ConfigError, nearest
from diffuse_compress.training.config import LossSpace

__all__ = ["Density", "Levels", "Noising"]

_LEAST = 1e-3  # of abar and sigma**2, where a weight divides by them


class Density(str, Enum):
    """How t is drawn before the shift: evenly, or as the sigmoid of a normal variable (SD3, arXiv 2403.03206)."""

    UNIFORM = "uniform"
    LOGIT_NORMAL = "logit_normal"


@dataclass(frozen=True)
class Levels:
    """Noise levels of some samples, float32 [samples] each: ``x_t = alpha x0 + sigma n``.

    Attributes:
        timesteps: as the scheduler counts them.
        alpha: factor of the clean sample.
        sigma: factor of the noise.
    """

    timesteps: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t in float32 of ``clean`` and ``noise`` [samples, ...]."""
        return _over(self.alpha, clean) * clean.float() + _over(self.sigma, clean) * noise.float()


class Noising:
    """Noise levels of a scheduler, which is not changed.

    Args:
        scheduler: of diffusers.
        mu: that the pipeline gives to a scheduler with dynamic shifting.
        density: of t before the shift.
        low, high: share of the scale that is drawn from, of timesteps / num_train_timesteps: of one of two experts.

    Raises:
        ConfigError: a scheduler of neither family, or dynamic shifting without ``mu``.
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        mu: float | None = None,
        density: Density | str = Density.UNIFORM,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        config = scheduler.config
        known = [member.value for member in Density]
        if density not in known:
            raise ConfigError(f"noising: density={density!r}; {nearest(str(density), known)}")
        if not 0 <= low < high <= 1:
            raise ConfigError(f"noising: low and high must be 0 <= low < high <= 1, got {low} and {high}.")
        self.name, self.density, self.low, self.high = type(scheduler).__name__, Density(density), low, high
        self.num_train_timesteps = int(config.get("num_train_timesteps", 1000))
        self.is_flow = _is_flow(scheduler)
        self.prediction = "flow_prediction" if self.is_flow else str(config.get("prediction_type", "epsilon"))
        self._terminal = config.get("shift_terminal")
        self._dynamic = self.is_flow and bool(config.get("use_dynamic_shifting", False))
        self._is_linear = config.get("time_shift_type") == "linear"
        self._alphas: torch.Tensor | None = None
        if self.is_flow:
            self.shift = _shift(scheduler, mu)
            return
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(alphas, torch.Tensor):
            raise ConfigError(
                f"noising: {self.name} is neither of flow matching nor variance preserving, so clean latents cannot be "
                "noised as it would. Train on the pipeline's own trajectories: data= a list of prompts."
            )
        self._alphas = alphas.detach().float().cpu()

    def draw(self, count: int, generator: torch.Generator, mu: float | None = None) -> Levels:
        """Levels of ``count`` samples; ``mu`` is that of their size, where the scheduler shifts by it."""
        shift = self._shift_of(mu)
        if self.density is Density.UNIFORM:
            position = torch.rand(count, generator=generator)
        else:
            position = torch.sigmoid(torch.randn(count, generator=generator))
        low, high = (self._before_shift(value, shift) for value in (self.low, self.high))
        position = low + (high - low) * position
        if self._alphas is None:
            return self.at(self._shifted(position, shift) * self.num_train_timesteps)
        return self.at((position * self.num_train_timesteps).floor().clamp_max(self.num_train_timesteps - 1))

    def at(self, timesteps: torch.Tensor) -> Levels:
        """Levels at ``timesteps`` [samples], between two of a table by interpolation."""
        t = timesteps.detach().float().cpu()
        if self._alphas is None:
            sigma = t / self.num_train_timesteps
            return Levels(t, 1 - sigma, sigma)
        place = t.clamp(0, len(self._alphas) - 1)
        below, share = place.floor().long(), place.frac()
        above = (below + 1).clamp_max(len(self._alphas) - 1)
        alphas = torch.lerp(self._alphas[below], self._alphas[above], share)
        return Levels(t, alphas.sqrt(), (1 - alphas).sqrt())

    def x0(self, output: torch.Tensor, noisy: torch.Tensor, levels: Levels) -> torch.Tensor:
        """The clean sample, float32, that an output of the model stands for.

        Raises:
            ConfigError: a prediction type of another kind.
        """
        alpha, sigma = _over(levels.alpha, output), _over(levels.sigma, output)
        output, noisy = output.float(), noisy.float()
        if self.prediction == "flow_prediction":
            return noisy - sigma * output
        if self.prediction == "epsilon":
            return (noisy - sigma * output) / alpha
        if self.prediction == "v_prediction":
            return alpha * noisy - sigma * output
        if self.prediction == "sample":
            return output
        raise ConfigError(f"noising: {self.name} predicts {self.prediction!r}, of which x0 is not known here.")

    def truth(self, clean: torch.Tensor, noise: torch.Tensor, levels: Levels) -> torch.Tensor:
        """What a perfect model would predict of ``levels.noisy(clean, noise)``, float32.

        Raises:
            ConfigError: a prediction type of another kind.
        """
        clean, noise = clean.float(), noise.float()
        if self.prediction == "flow_prediction":
            return noise - clean
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "v_prediction":
            return _over(levels.alpha, clean) * noise - _over(levels.sigma, clean) * clean
        if self.prediction == "sample":
            return clean
        raise ConfigError(f"noising: {self.name} predicts {self.prediction!r}, which is not known here.")

    def weights(self, levels: Levels, space: LossSpace | str) -> torch.Tensor:
        """Float32 [samples], what a squared distance of two outputs counts.

        In the space of x0 both are the same function of one ``x_t``, so their distance there is that of the outputs
        times a factor of the level; it is weighted by ``1 / sigma**2`` (CogVideoX's 1 / (1 - abar)), with which the
        loss of a velocity is that of its output.
        """
        is_velocity = self.prediction in ("flow_prediction", "v_prediction")
        if LossSpace(space) is LossSpace.OUTPUT or is_velocity:
            return torch.ones_like(levels.sigma)
        divisor = levels.alpha if self.prediction == "epsilon" else levels.sigma
        return 1 / divisor.square().clamp_min(_LEAST)

    def to_dict(self) -> dict[str, Any]:
        """What decides the draws, JSON-able."""
        found = {"scheduler": self.name, "prediction": self.prediction, "density": self.density.value}
        return {
            **found,
            "low": self.low,
            "high": self.high,
            **({"shift": self.shift} if self.is_flow and not self._dynamic else {}),
        }

    def _shift_of(self, mu: float | None) -> float:
        if not self.is_flow:
            return 1.0
        return self.shift if mu is None or not self._dynamic else _of_mu(mu, self._is_linear)

    def _shifted(self, position: torch.Tensor, shift: float) -> torch.Tensor:
        sigma = shift * position / (1 + (shift - 1) * position)
        return sigma if self._terminal is None else 1 - (1 - sigma) * (1 - self._terminal)

    def _before_shift(self, value: float, shift: float) -> float:
        """Inverse of the shift; of a boundary at which the experts take turns."""
        if not self.is_flow:
            return value
        if self._terminal is not None:
            value = max(0.0, 1 - (1 - value) / (1 - self._terminal))
        return value / (shift - (shift - 1) * value)


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    flows = "flow" in str(config.get("prediction_type", "")) or bool(config.get("use_flow_sigmas", False))
    return flows or "FlowMatch" in type(scheduler).__name__


def _shift(scheduler: Any, mu: float | None) -> float:
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return float(getattr(scheduler, "shift", None) or config.get("shift") or config.get("flow_shift") or 1.0)
    if mu is None:
        raise ConfigError(
            f"noising: {type(scheduler).__name__} shifts its levels by the size of the picture, and mu= is not known. "
            "Give the one that the pipeline hands to set_timesteps."
        )
    return _of_mu(mu, config.get("time_shift_type") == "linear")


def _of_mu(mu: float, is_linear: bool) -> float:
    return float(mu if is_linear else math.exp(mu))


def _over(values: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """[samples] on the axes of ``samples``."""
    return values.to(samples.device).reshape(-1, *[1] * (samples.ndim - 1))
