"""What a step of quantization-aware training costs on the Wan 2.1 1.3B shape: seconds and peak memory.

    python eval/qat_cost.py --out bench/qat.jsonl                       # on a GPU, under 9 minutes
    python eval/qat_cost.py --parts model --weights float32 --out bench/qat.jsonl
    python eval/qat_cost.py --tiny --device cpu                         # a rehearsal without a GPU

Weights are random: speed and memory, no quality. One clip of 49 frames of 480x832 (20,280 tokens), 512 tokens of text;
blocks are computed again in the backward pass (gradient checkpointing) in every arm. A step is: the teacher's forward,
the student's, backward, norm of the gradient, AdamW. Arms:

    dense      fine-tuning; no layer rounds
    released   the design of QVGen's released code, written anew: asymmetric quantizers by plain autograd in the dtype
               of the model, one checkpoint around each layer and one around each of its quantizers, and the branch as
               an [N, K] product that is added to the weight (rank 32)
    ours       this package's layers with the branch, rank 32: one autograd function per layer, the branch in two
               thin products
    kd         ours without the branch

The quantized layers are those of ``QVGenConfig(scheme)``, the same in all arms. Weights are in bfloat16, which is what
the released code trains, or in float32 under bfloat16 autocast, which is what this package's trainer does. Every result
is a JSON line, written as soon as it is known; nothing is started after ``--minutes``. Lines by ``what``:

    step      median seconds of a step and of its parts; ``before_bytes`` (weights, moments, teacher, inputs, between
              two steps), ``peak_bytes`` in a step, ``activation_bytes``: the peak of forward and backward over
              before_bytes and the gradients, which last as long as both
    layer     one layer at the shape's sizes: milliseconds of forward and backward, ``kept_bytes`` between both
    boundary  seconds in which a phase of the branch ends, all layers: ``ours`` decomposes r x r cores, ``released``
              decomposes the [N, K] products in full (one for each size, times their number)
    ratio     of the steps of released and ours; goal of the project: 1.5 times faster, or half of the activation bytes

Memory is that of a GPU, as torch allocates it; null without one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffuse_compress  # noqa: F401  (attaches compress)
from diffuse_compress.evaluation.cost_lines import CostLines
from diffuse_compress.evaluation.true_shapes import random_denoiser
from diffuse_compress.quantization.convert import replace_module
from diffuse_compress.training.config import QVGenConfig
from diffuse_compress.training.layers import TrainedLinear
from diffuse_compress.training.optimization import clip_gradients
from diffuse_compress.training.prepare import Prepared, prepare
from diffuse_compress.training.setup import checkpoint_blocks

SHAPE = "wan21_t2v_1_3b"
PARTS = ("model", "boundary", "layer")
ARMS = ("dense", "released", "ours", "kd")
RANK, STEPS, CLIP_GROUPS = 32, 2000, 50
# Of the latents: 8 times smaller on each side, 4 times shorter.
LATENTS, TEXT = (16, 13, 60, 104), 512
TINY_LATENTS, TINY_TEXT = (16, 2, 8, 8), 16


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--schemes", nargs="+", default=["w4a4"], help="of ours; the released design has its bits")
    parser.add_argument("--weights", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed, after two that are not")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no measurement after that time")
    parser.add_argument("--tiny", action="store_true", help="a small model and clip, to see that everything runs")
    parser.add_argument("--out", type=Path, help="append JSON lines here as well")
    return parser.parse_args(arguments)


# --- the released design ------------------------------------------------------------------------------------------


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rounded, with the gradient of what was not."""
    return (x.round() - x).detach() + x


class NestedLinear(nn.Module):
    """A layer as QVGen's released code computes it.

    Args:
        linear: with the weight; shares its parameters.
        bits: of weight and input.
        rank: of the branch.
    """

    def __init__(self, linear: nn.Linear, bits: tuple[int, int], rank: int = RANK) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.levels = [2**count - 1 for count in bits]
        made = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        low, high = linear.weight.detach().float().aminmax(dim=1, keepdim=True)
        step = ((high - low) / self.levels[0]).clamp_min(1e-9)
        self.scale, self.zero_point = nn.Parameter(step), nn.Parameter((-low / step).to(linear.weight.dtype))
        self.up = nn.Parameter(0.01 * torch.randn(linear.out_features, rank, **made))
        self.down = nn.Parameter(0.01 * torch.randn(rank, linear.in_features, **made))
        self.register_buffer("gate", torch.ones(rank, **made))
        # Logits of 0.95; the group of one timestep is read, as of the first sample.
        self.upper = nn.Parameter(torch.full((CLIP_GROUPS,), 2.944, device=linear.weight.device))
        self.lower = nn.Parameter(torch.full((CLIP_GROUPS,), 2.944, device=linear.weight.device))

    def _weight(self, weight: torch.Tensor) -> torch.Tensor:
        codes = rounded(weight / self.scale + self.zero_point).clamp(0, self.levels[0])
        return (self.scale * (codes - self.zero_point)).to(weight.dtype)

    def _input(self, x: torch.Tensor) -> torch.Tensor:
        high = torch.sigmoid(self.upper[7]) * 0.95 * x.amax(-1, keepdim=True)
        low = torch.sigmoid(self.lower[7]) * 0.95 * x.amin(-1, keepdim=True)
        step = ((high - low) / self.levels[1]).clamp_min(1e-9)
        zero = (-rounded(low / step)).clamp(0, self.levels[1])
        codes = (rounded(x / step) + zero).clamp(0, self.levels[1])
        return (step * (codes - zero)).to(x.dtype)

    def _layer(self, x: torch.Tensor) -> torch.Tensor:
        weight = checkpoint(self._weight, self.weight, use_reentrant=False)
        weight = weight + (self.up * self.gate) @ self.down
        return F.linear(checkpoint(self._input, x, use_reentrant=False), weight, self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., N] of [..., K]."""
        found: torch.Tensor = checkpoint(self._layer, x, use_reentrant=False)
        return found


def bits_of(config: QVGenConfig) -> tuple[int, int]:
    """Of weight and input; inputs that are left alone are not what the released code knows."""
    scheme = config.layer_scheme
    assert scheme.activation is not None
    return scheme.weight.format.bits, scheme.activation.format.bits


def config_of(arm: str, scheme: str) -> QVGenConfig:
    """Starts that take no search and no decomposition: they change nothing of a step."""
    method = "qvgen" if arm == "ours" else "kd"
    return QVGenConfig(
        scheme, method=method, phi_rank=RANK, phi_init="zero", range_init="minmax", max_train_steps=STEPS
    )


# --- measurements -------------------------------------------------------------------------------------------------


class Bench:
    """Runs what was asked for and writes the lines."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.lines = CostLines(partial(print, flush=True), self.device, options.out, options.minutes, tiny=options.tiny)
        self.steps: dict[tuple[str, str, str], dict[str, Any]] = {}

    @property
    def on_gpu(self) -> bool:
        """Memory is counted."""
        return self.device.type == "cuda"

    def now(self) -> float:
        """Seconds, when everything before is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def held(self) -> int:
        """Bytes that torch has allocated."""
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else 0

    def peak(self) -> int:
        """The most of them since the last time, which is forgotten."""
        if not self.on_gpu:
            return 0
        found = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return found

    def run(self, part: str) -> None:
        """One of ``PARTS``."""
        measure = {"model": self._model, "boundary": self._boundary, "layer": self._layer}[part]
        for scheme in self.options.schemes:
            for weights in self.options.weights if part == "model" else self.options.weights[:1]:
                for arm in self.options.arms:
                    if self.lines.over or (part == "boundary" and arm != "ours"):
                        continue
                    named = {"scheme": scheme, "weights": weights, "arm": arm}
                    with self.lines.reported(what={"model": "step"}.get(part, part), **named):
                        measure(named)
                if part == "model":
                    self._ratio(scheme, weights)

    # --- steps

    def student(self, named: dict[str, str]) -> tuple[nn.Module, Prepared | None]:
        """The model in training, with gradients and without those of the teacher."""
        dtype, arm = getattr(torch, named["weights"]), named["arm"]
        model = random_denoiser(SHAPE, self.device, dtype, tiny=self.options.tiny).requires_grad_(True)
        prepared = None
        if arm != "dense":
            config = config_of(arm, named["scheme"])
            prepared = prepare(model, config, total_steps=STEPS)
            if arm == "released":
                for name, layer in prepared.layers.items():
                    replace_module(model, name, NestedLinear(layer, bits_of(config)))
                prepared = None
        checkpoint_blocks(model.train())
        return model, prepared

    def inputs(self, model: Any) -> dict[str, Any]:
        """Arguments of a forward, in bfloat16 as autocast and the models would have them."""
        latents, text = (TINY_LATENTS, TINY_TEXT) if self.options.tiny else (LATENTS, TEXT)
        rows, generator = self.options.batch_size, torch.Generator().manual_seed(0)
        made = {
            "hidden_states": torch.randn(rows, *latents, generator=generator),
            "encoder_hidden_states": torch.randn(rows, text, model.config.text_dim, generator=generator),
        }
        placed: dict[str, Any] = {name: value.to(self.device, torch.bfloat16) for name, value in made.items()}
        return {**placed, "timestep": torch.full((rows,), 400.0, device=self.device), "return_dict": False}

    @contextlib.contextmanager
    def precision(self, weights: str) -> Iterator[None]:
        """Autocast where weights are not in bfloat16."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=weights != "bfloat16"):
            yield

    def _model(self, named: dict[str, str]) -> None:
        began = self.now()
        model, prepared = self.student(named)
        teacher = random_denoiser(SHAPE, self.device, torch.bfloat16, tiny=self.options.tiny)
        config = config_of(named["arm"], named["scheme"])
        groups: Any = prepared.parameter_groups() if prepared else [{"params": list(model.parameters())}]
        parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)
        inputs, setup = self.inputs(model), self.now() - began
        found: list[dict[str, float]] = []
        for step in range(2 + self.options.repeats):
            if prepared is not None:
                prepared.before_step(step, optimizer)
            line = self._step(model, teacher, parameters, optimizer, inputs, named["weights"])
            found = [*found, line] if step >= 2 else []
            if self.lines.over and found:
                break
        times = {key: statistics.median(one[key] for one in found) for key in found[0] if key.endswith("seconds")}
        memory = {key: max(one[key] for one in found) if self.on_gpu else None for key in found[0] if "bytes" in key}
        rows, layers = self.options.batch_size, len(prepared.layers) if prepared else None
        line = {**named, **times, **memory, "batch": rows, "layers": layers, "setup_seconds": setup}
        self.steps[named["scheme"], named["weights"], named["arm"]] = line
        self.lines.write(what="step", shape=SHAPE, repeats=len(found), **line)

    def _step(
        self,
        model: nn.Module,
        teacher: nn.Module,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        inputs: dict[str, Any],
        weights: str,
    ) -> dict[str, float]:
        self.peak()
        before, marks = self.held(), [self.now()]
        with torch.no_grad():
            target = teacher(**inputs)[0].float()
        marks.append(self.now())
        of_teacher = self.peak()
        with self.precision(weights):
            loss = (model(**inputs)[0].float() - target).square().mean()
        marks.append(self.now())
        loss.backward()
        marks.append(self.now())
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None)
        of_passes = self.peak()
        clip_gradients(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(self.now())
        spans = [after - earlier for earlier, after in itertools.pairwise(marks)]
        names = ("teacher_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds")
        return {
            "seconds": marks[-1] - marks[0],
            **dict(zip(names, spans, strict=True)),
            "before_bytes": before,
            "gradient_bytes": gradients,
            "activation_bytes": of_passes - before - gradients,
            "peak_bytes": max(of_teacher, of_passes, self.peak()),
        }

    def _ratio(self, scheme: str, weights: str) -> None:
        both = [self.steps.get((scheme, weights, arm)) for arm in ("released", "ours")]
        if both[0] is None or both[1] is None:
            return
        keys = ["seconds", "forward_seconds", "backward_seconds"]
        keys += ["activation_bytes", "peak_bytes"] if self.on_gpu else []
        ratios = {key: both[0][key] / both[1][key] for key in keys}
        self.lines.write(what="ratio", of="released over ours", scheme=scheme, weights=weights, **ratios)

    # --- ends of phases, single layers

    def _boundary(self, named: dict[str, str]) -> None:
        _, prepared = self.student(named)
        assert prepared is not None
        for layer in prepared.layers.values():  # a branch that has learned something
            assert layer.phi_up is not None
            nn.init.normal_(layer.phi_up, std=0.01)
        prepared.before_step(0)
        start, began = prepared.decay.starts[1], self.now()
        prepared.before_step(start)
        ours = self.now() - began
        sizes = Counter(tuple(layer.weight.shape) for layer in prepared.layers.values())
        theirs = 0.0
        for (rows, columns), count in sizes.items():
            up, down = torch.randn(rows, RANK, device=self.device), torch.randn(RANK, columns, device=self.device)
            began = self.now()
            torch.linalg.svd(up @ down, full_matrices=False)
            theirs += count * (self.now() - began)
        counts = {f"{rows}x{columns}": count for (rows, columns), count in sizes.items()}
        self.lines.write(
            what="boundary", shape=SHAPE, scheme=named["scheme"], ours=ours, released=theirs, layers=counts
        )

    def _layer(self, named: dict[str, str]) -> None:
        tokens, width, inner = (64, 128, 256) if self.options.tiny else (20_280, 1536, 8960)
        config = config_of(named["arm"], named["scheme"])
        for columns, rows in ((width, width), (width, inner), (inner, width)):
            if self.lines.over:
                return
            linear = nn.Linear(columns, rows, device=self.device, dtype=torch.bfloat16)
            layer: nn.Module = linear
            if named["arm"] == "released":
                layer = NestedLinear(linear, bits_of(config))
            elif named["arm"] != "dense":
                layer = TrainedLinear.from_dense(linear, config.layer_scheme, config)
            x = torch.randn(1, tokens, columns, device=self.device, dtype=torch.bfloat16, requires_grad=True)
            gradient = torch.randn(1, tokens, rows, device=self.device, dtype=torch.bfloat16)
            times: list[tuple[float, float]] = []
            for _ in range(2 + self.options.repeats):
                layer.zero_grad()
                x.grad = None
                held, began = self.held(), self.now()
                y = layer(x)
                middle, kept = self.now(), self.held() - held
                y.backward(gradient)
                times.append((middle - began, self.now() - middle))
            forward, backward = (1e3 * statistics.median(one) for one in zip(*times[2:], strict=True))
            sizes = {"tokens": tokens, "in_features": columns, "out_features": rows}
            memory = kept - y.numel() * y.element_size() if self.on_gpu else None
            spans = {"forward_ms": forward, "backward_ms": backward, "kept_bytes": memory}
            self.lines.write(what="layer", scheme=named["scheme"], arm=named["arm"], **sizes, **spans)


def main(arguments: list[str] | None = None) -> int:
    """Measure everything that was asked for."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    bench = Bench(options)
    for part in PARTS:
        if part in options.parts and not bench.lines.over:
            with bench.lines.reported(what=part):
                bench.run(part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
