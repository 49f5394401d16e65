"""SpinQuant: learn the rotations of the residual stream and of the value heads, by the model's own loss.

Liu et al. 2025, "SpinQuant: LLM Quantization with Learned Rotations", arXiv 2405.16406, section 3.2. A random Hadamard
matrix is one rotation of many, and what is lost depends on which: R1 of the stream and R2 of each attention's heads are
moved on the Stiefel manifold, down the slope of the loss of the model with quantized weights and inputs, by Cayley
transforms (Li et al. 2020, arXiv 2002.01113, eq. 4). Then they are folded as QuaRot's are (``residual.py``), and down
projections rotate their input at run time (the paper's R4).

Where it starts is what ``QuaRotConfig(residual=True)`` takes with the same seed. In the loop weights have the ranges
that rounding to nearest chooses at the start, relative to their largest values, and inputs are dynamic.

Deviations: the Cayley transform is solved exactly, in float64, not by fixed-point iteration; a step is as long as the
rate or as leaves the matrices near enough for their gradients to hold, whichever is less, as in Li et al.; nothing is
folded that does worse than the start on all samples. The paper learns with weights left as they are where GPTQ follows:
``quantize_weights=False``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block
from diffuse_compress.quantization.algorithms.block import BlockWork
from diffuse_compress.quantization.algorithms.quarot import QuaRotConfig
from diffuse_compress.quantization.numerics import choose_qparams, fake_quantize, fake_quantize_activation
from diffuse_compress.quantization.observers import weight_qparams
from diffuse_compress.quantization.residual import ResidualStream, Rotations, by_heads
from diffuse_compress.quantization.rotation import rotate
from diffuse_compress.quantization.scheme import Scheme

__all__ = ["RotationLearner", "SpinQuantConfig", "cayley_step"]

_OBJECTIVES = ("language", "output")
# A step's skew matrix is at most this large (Frobenius norm), for the gradient to hold along it.
_LONGEST_STEP = 1.0


@dataclass(frozen=True)
class SpinQuantConfig(AlgorithmConfig):
    """Learned rotations of the residual stream and the value heads, inside the weights. Needs calibration data.

    For the models that ``QuaRotConfig(residual=True)`` takes, and with what is said there of ``hidden_states``,
    ``inputs_embeds``, adapters and tied heads. Codes are rounded to nearest, or chosen by what follows in a sequence.

    Args:
        iterations: steps; 0 folds the random Hadamard matrices.
        learning_rate: at the first step; falls to 0 as a cosine.
        batch_size: samples that are looked at in a step.
        objective: "language", the cross-entropy of the next token; "output", the squared error of the logits against
            the dense model's, which needs no token ids.
        quantize_weights: round the weights in the loop, too, where the format does.
    """

    iterations: int = 100
    learning_rate: float = 1.5
    batch_size: int = 1
    objective: str = "language"
    quantize_weights: bool = True
    kind: ClassVar[str] = "spinquant"
    is_random: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    chooses_codes: ClassVar[bool] = False
    rounds_input_groups: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        return f"SpinQuant ({self.iterations} steps)"

    @property
    def rotates_residual(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.learning_rate <= 0 or self.batch_size < 1:
            raise ConfigError(
                "SpinQuantConfig: need iterations >= 0, learning_rate > 0 and batch_size >= 1, got "
                f"iterations={self.iterations}, learning_rate={self.learning_rate}, batch_size={self.batch_size}."
            )
        if self.objective not in _OBJECTIVES:
            raise ConfigError(f"SpinQuantConfig: objective must be one of {_OBJECTIVES}, got {self.objective!r}.")

    def idle_after(self, earlier: AlgorithmConfig) -> str | None:
        return "it has rotated the inputs" if isinstance(earlier, QuaRotConfig) else None

    def unsupported(self, layer: nn.Module, scheme: Scheme) -> str | None:
        found = QuaRotConfig(residual=True).unsupported(layer, scheme)
        return None if found is None else found.replace("QuaRot", "SpinQuant")

    def format_of(self, layer: nn.Module, scheme: Scheme, arrives_rotated: bool = False, name: str = "") -> Scheme:
        """As QuaRot's: an input that does not arrive rotated is rotated at run time."""
        return QuaRotConfig(residual=True).format_of(layer, scheme, arrives_rotated, name)

    def for_search(self) -> QuaRotConfig:
        """The rotations it starts with."""
        return QuaRotConfig(residual=True)


@register_block
def calibrate(work: BlockWork, config: SpinQuantConfig) -> None:
    """Nothing is left to do for a block: rotations are in its weights, and layers know theirs from their format."""


# --- the manifold -----------------------------------------------------------------------------------------------


def cayley_step(matrix: torch.Tensor, gradient: torch.Tensor, rate: float) -> torch.Tensor:
    """An orthogonal matrix, moved down a gradient on the manifold of orthogonal matrices.

    ``(I + A/2)^-1 (I - A/2) X`` with A the skew part ``t (G X^T - X G^T) / 2``, t the rate or what makes A's norm 1.

    Args:
        matrix: X, float64 [n, n], orthogonal.
        gradient: G, float64 [n, n], of a loss in X.
        rate: at least 0.

    Returns:
        float64 [n, n], orthogonal up to rounding.
    """
    skew = gradient @ matrix.t()
    skew = (skew - skew.t()) / 2
    size = float(skew.norm())
    if not math.isfinite(size) or size == 0:
        return matrix
    half = skew * (min(rate, _LONGEST_STEP / size) / 2)
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    moved: torch.Tensor = torch.linalg.solve(identity + half, (identity - half) @ matrix)
    return moved


# --- learning ---------------------------------------------------------------------------------------------------

Weight = float | torch.Tensor
"""How much a sample counts: a number, or one for each of its tokens."""


class RotationLearner:
    """Learns the rotations of a model, of which nothing is changed.

    Args:
        model: dense, in eval mode, its output layer not tied to the embedding.
        stream: of the model.
        layers: {linear that will be quantized: its format}.
        config: of the algorithm.
        device: where the model runs: its tensors are copied there if they are elsewhere.

    Cost: a forward and a backward of the whole model for each sample of a step; its weights, in float32 and in their
    dtype, beside the model.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: ResidualStream,
        layers: Mapping[str, Scheme],
        config: SpinQuantConfig,
        device: torch.device,
    ) -> None:
        self.model, self.stream, self.layers, self.config, self.device = model, stream, layers, config, device
        self._fixed = {
            name: tensor.detach().to(device)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if isinstance(tensor, torch.Tensor)
        }
        self._dense = dict(self._fixed)
        self._value_of = {output: value for value, output in stream.values}
        self._read: dict[str, torch.Tensor] = {}
        for norm, readers in stream.norms.items():
            gain = self._fixed[f"{norm}.weight"].float() + (1.0 if stream.unit_offset else 0.0)
            for name in readers:
                self._read[name] = self._fixed[f"{name}.weight"].float() * gain
            unit = 0.0 if stream.unit_offset else 1.0
            self._fixed[f"{norm}.weight"] = torch.full_like(self._fixed[f"{norm}.weight"], unit)
        self._clips: dict[str, torch.Tensor] = {}

    def learn(
        self,
        start: Rotations,
        calls: Sequence[Call],
        weights: Sequence[Weight],
        generator: torch.Generator,
        *,
        load: Callable[[], tuple[int, Rotations] | None] = lambda: None,
        save: Callable[[int, Rotations], None] = lambda step, rotations: None,
        advance: Callable[[int, dict[str, Any]], None] = lambda step, metrics: None,
    ) -> Rotations:
        """The rotations that were learned, or ``start`` where these do worse on all samples.

        Args:
            start: from where.
            calls: of the model.
            weights: of the calls.
            generator: draws the order of the samples; the same one gives the same rotations.
            load: steps that are done already, and the rotations they came to; None if there are none.
            save: is given these after every step.
            advance: called after every step with how many are done and the loss.
        """
        config = self.config
        draws = _draws(len(calls), config.iterations * config.batch_size, generator)
        start = start.to(self.device)
        self._clips = self._ranges(start)
        done, now = load() or (0, start)
        now = now.to(self.device)
        for step in range(done, config.iterations):
            chosen = draws[step * config.batch_size : (step + 1) * config.batch_size]
            loss, gradients = self._slope(now, [calls[i] for i in chosen], [weights[i] for i in chosen])
            rate = config.learning_rate * (1 + math.cos(math.pi * step / config.iterations)) / 2
            pairs = zip(now.matrices, gradients, strict=True)
            now = now.of([cayley_step(matrix, gradient, rate) for matrix, gradient in pairs])
            save(step + 1, now)
            advance(step + 1, {"loss": loss})
        if not config.iterations:
            return start
        return now if self.loss(now, calls, weights) < self.loss(start, calls, weights) else start

    def loss(self, rotations: Rotations, calls: Sequence[Call], weights: Sequence[Weight]) -> float:
        """Mean loss of the quantized model over calls."""
        with torch.no_grad():
            tensors = self._tensors(rotations)
            losses = [self._loss(rotations, tensors, call, w) for call, w in zip(calls, weights, strict=True)]
        return float(sum(losses)) / len(calls)

    def _slope(
        self, rotations: Rotations, calls: Sequence[Call], weights: Sequence[Weight]
    ) -> tuple[float, list[torch.Tensor]]:
        """Mean loss over calls and its gradients in the matrices, float64."""
        total, sums = 0.0, [torch.zeros_like(matrix) for matrix in rotations.matrices]
        for call, weight in zip(calls, weights, strict=True):
            with torch.enable_grad():
                leaves = [matrix.float().requires_grad_() for matrix in rotations.matrices]
                tried = rotations.of(leaves)
                loss = self._loss(tried, self._tensors(tried), call, weight) / len(calls)
                slopes = torch.autograd.grad(loss, leaves)
            total += float(loss.detach())
            for found, slope in zip(sums, slopes, strict=True):
                found.add_(slope)
        return total, sums

    # --- the model as a function of its rotations ---------------------------------------------------------------

    def _turned(self, name: str, rotations: Rotations) -> torch.Tensor:
        """fp32 [N, K]: the weight of a linear, rotated, before it is rounded."""
        weight = self._read[name] if name in self._read else self._fixed[f"{name}.weight"].float()
        stream = rotations.stream.float()
        if name in self._read:
            weight = weight @ stream
        if name in rotations.heads:
            weight = by_heads(weight.t(), rotations.heads[name].float()).t()
        if name in self._value_of:
            weight = by_heads(weight, rotations.heads[self._value_of[name]].float())
        if name in self.stream.writers:
            weight = stream.t() @ weight
        scheme = self.layers.get(name)
        return weight if scheme is None or scheme.input_rotation is None else rotate(weight, scheme.input_rotation)

    def _tensors(self, rotations: Rotations) -> dict[str, torch.Tensor]:
        """All parameters and buffers of the rotated model, its weights rounded."""
        found = dict(self._fixed)
        values = (value for value, _ in self.stream.values)
        for name in dict.fromkeys([*self._read, *self.stream.writers, *values, *self.layers]):
            key, weight, scheme = f"{name}.weight", self._turned(name, rotations), self.layers.get(name)
            if scheme is not None and self.config.quantize_weights:
                qparams = choose_qparams(weight, scheme.weight, self._clips[name])
                weight = fake_quantize(weight, scheme.weight, qparams)
            found[key] = weight.to(self._fixed[key].dtype)
            bias = self._fixed.get(f"{name}.bias")
            if bias is not None:
                found[f"{name}.bias"] = self._bias(name, bias.float(), rotations).to(bias.dtype)
        return found

    def _bias(self, name: str, bias: torch.Tensor, rotations: Rotations) -> torch.Tensor:
        if name in rotations.heads:
            return by_heads(bias, rotations.heads[name].float())
        return bias @ rotations.stream.float() if name in self.stream.writers else bias

    def _ranges(self, rotations: Rotations) -> dict[str, torch.Tensor]:
        """The share of each range that rounding to nearest keeps."""
        found = {}
        for name, scheme in self.layers.items() if self.config.quantize_weights else ():
            weight = self._turned(name, rotations)
            full, best = choose_qparams(weight, scheme.weight), weight_qparams(weight, scheme.weight, "mse")
            found[name] = (best.scale / full.scale).clamp(max=1.0)
        return found

    @contextmanager
    def _hooked(self, rotations: Rotations) -> Iterator[None]:
        """Inside, the embedding returns the rotated stream, and layers round their inputs."""

        def turn(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return (output.float() @ rotations.stream.float()).to(output.dtype)

        handles = [self.model.get_submodule(self.stream.embedding).register_forward_hook(turn)]
        try:
            for name, scheme in self.layers.items():
                handles.append(self.model.get_submodule(name).register_forward_pre_hook(_rounds_input(scheme)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _loss(self, rotations: Rotations, tensors: dict[str, torch.Tensor], call: Call, weight: Weight) -> torch.Tensor:
        """Loss of the quantized model on a call; fp32 scalar."""
        call, target = call.copied(self.device), None
        if self.config.objective == "output":
            with torch.no_grad():
                target = _first_floats(functional_call(self.model, self._dense, call.args, dict(call.kwargs)))
        with self._hooked(rotations):
            output = _first_floats(functional_call(self.model, tensors, call.args, dict(call.kwargs)))
        if target is None:
            return _next_token_loss(output, _token_ids(self.model, call), weight)
        errors = (output.float() - target.float()).square().mean(dim=-1)
        return _weighted_mean(errors, weight) / target.float().square().mean()


def _rounds_input(scheme: Scheme) -> Callable[..., Any]:
    dynamic = scheme.with_dynamic_inputs().activation

    def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        x = args[0] if scheme.input_rotation is None else rotate(args[0], scheme.input_rotation)
        return (x if dynamic is None else fake_quantize_activation(x, dynamic), *args[1:])

    return enter


def _draws(count: int, wanted: int, generator: torch.Generator) -> list[int]:
    """``wanted`` indices below ``count``: shuffled, and shuffled anew when all were drawn."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
    return torch.cat(rounds)[:wanted].tolist() if rounds else []


def _first_floats(output: Any) -> torch.Tensor:
    """Of what a model returns, the logits: the first floating-point tensor (a loss would stand before it)."""
    found = getattr(output, "logits", None)
    if isinstance(found, torch.Tensor):
        return found
    floats = (leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
    return next(floats)


def _token_ids(model: nn.Module, call: Call) -> torch.Tensor:
    names = inspect.signature(model.forward).parameters
    ids = {**dict(zip(names, call.args, strict=False)), **call.kwargs}.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        raise ConfigError(
            f'{type(model).__name__}: SpinQuantConfig(objective="language") predicts tokens, and calibration gives no '
            'input_ids. Give texts or token ids, or take objective="output".'
        )
    return ids


def _next_token_loss(logits: torch.Tensor, ids: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Weighted mean of the cross-entropy of every token but the first, from those before it."""
    errors = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    if isinstance(weight, torch.Tensor) and weight.numel() == ids.numel():
        weight = weight.reshape(ids.shape)[:, 1:]
    return _weighted_mean(errors, weight)


def _weighted_mean(errors: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Of errors that each have a weight, their weighted mean; else their mean, times the weight of all."""
    if not isinstance(weight, torch.Tensor):
        return errors.mean() * weight
    if weight.numel() != errors.numel():
        return errors.mean() * float(weight.mean())
    own = weight.reshape(errors.shape).to(errors)
    return (errors * own).sum() / own.sum().clamp(min=1e-12)
