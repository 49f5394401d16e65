"""One training loop for all reference models: a budget in seconds, averaged weights, recorded steps, resumption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from training.common import MovingAverage, WallClock, load_state, mixed_precision, save_state, set_learning_rate


class Trainer:
    """A model whose forward returns its loss, its optimizer and moving average, and their state on disk.

    The optimizer's moments are not kept: after a resumption they are built anew, under a short
    warm-up of the learning rate.

    Args:
        model: on the training device; ``model(*draw())`` is a scalar loss.
        draw: makes the arguments of one step, on the device, by device random numbers only (a
            recorded step repeats its kernels, and random kernels draw anew).
        name: of the state's files.
        compiled: pass the model through torch.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        draw: Callable[[], tuple],
        *,
        name: str,
        peak_learning_rate: float,
        compiled: bool,
        ema_decay: float = 0.9995,
        weight_decay: float = 0.01,
        warmup_steps: int = 400,
        betas: tuple[float, float] = (0.9, 0.99),
    ):
        self.model, self.draw, self.name = model, draw, name
        self.peak_learning_rate, self.warmup_steps = peak_learning_rate, warmup_steps
        self.named = {key: value for key, value in model.named_parameters() if value.requires_grad}
        self.device = next(iter(self.named.values())).device
        decayed = [value for value in self.named.values() if value.ndim == 2]
        others = [value for value in self.named.values() if value.ndim != 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others}]
        on_gpu = self.device.type == "cuda"
        # The rate is a tensor on the device, so that a recorded step reads the current one.
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=torch.tensor(0.0, device=self.device),
            betas=betas,
            weight_decay=0.0,
            fused=on_gpu,
            capturable=on_gpu,
        )
        self.average = MovingAverage(list(self.named.values()), ema_decay)
        self.progress = {"step": 0, "seconds": 0.0}
        self.loss = torch.compile(model) if compiled else model

    def save(self, folder: Path) -> None:
        """Weights in fp32, their averages in fp16."""
        averages = zip(self.named, self.average.averages, strict=True)
        tensors = {f"ema.{name}": average.half() for name, average in averages}
        tensors |= {f"model.{name}": value.detach() for name, value in self.named.items()}
        save_state(tensors, self.progress, folder, self.name)

    @torch.no_grad()
    def load(self, folder: Path) -> bool:
        """Take up the state in a folder; False if it holds none."""
        stored = load_state(folder, self.name)
        if stored is None:
            return False
        tensors, self.progress = stored
        for (name, value), average in zip(self.named.items(), self.average.averages, strict=True):
            value.copy_(tensors[f"model.{name}"])
            average.copy_(tensors[f"ema.{name}"])
        return True

    def step(self) -> torch.Tensor:
        """One update, of whatever learning rate is set; returns the loss, on the device."""
        with mixed_precision(self.device):
            loss = self.loss(*self.draw())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.named.values()), 1.0)
        self.optimizer.step()
        self.average.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def recorded_step(self) -> Callable[[], torch.Tensor]:
        """`step` as one CUDA graph: kernels of models this small are shorter than their launches."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compiles, tunes and allocates the optimizer's state, none of which may be recorded.
            for _ in range(5):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step()

        def replay() -> torch.Tensor:
            graph.replay()
            return loss.clone()

        return replay

    def run(self, out: Path, budget_s: float, *, decay: bool, record: bool, save_every_s: float = 120.0) -> None:
        """Train within the budget; the state goes to ``out`` every ``save_every_s`` and at the end.

        Args:
            out: folder of the state.
            budget_s: seconds.
            decay: let the learning rate fall linearly to zero over this budget, for the last
                call of a training.
            record: replay the step as a CUDA graph.
            save_every_s: seconds between two saves.
        """
        clock, before = WallClock(budget_s), self.progress["seconds"]
        saved_s, first, losses, advance = 0.0, self.progress["step"], [], self.step
        if record and self.device.type == "cuda":
            advance = self.recorded_step()
            print(f"{self.name} step recorded after {clock.seconds:.0f} s", flush=True)
        while clock.share < 1:
            taken = self.progress["step"] - first
            if first == 0 and taken == self.warmup_steps:
                self.average.restart()
            rate = self.peak_learning_rate * min(1.0, (taken + 1) / self.warmup_steps)
            set_learning_rate(self.optimizer, rate * (1 - clock.share if decay else 1.0))
            losses.append(advance())
            self.progress["step"] += 1
            self.progress["seconds"] = before + clock.seconds
            # Reading a value waits for the device, which also keeps the clock honest.
            if len(losses) % 50 == 0:
                losses[-1].item()
            if len(losses) == 1000:
                mean = torch.stack(losses).mean().item()
                step, seconds = self.progress["step"], self.progress["seconds"]
                print(f"{self.name} step {step} {seconds:.0f} s loss {mean:.5f}", flush=True)
                losses.clear()
            if clock.seconds - saved_s > save_every_s:
                saved_s = clock.seconds
                self.save(out)
        self.save(out)
        step, seconds = self.progress["step"], self.progress["seconds"]
        print(f"{self.name} stopped at step {step} after {seconds:.0f} s in all", flush=True)
