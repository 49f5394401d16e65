"""What temporal tables cost and save at true shapes: memory, steps, and the time, bytes and error of the tables.

    python eval/temporal_cost.py --out bench/temporal.jsonl                      # on a GPU
    python eval/temporal_cost.py --parts sdxl tables --out bench/temporal.jsonl
    python eval/temporal_cost.py --tiny --device cpu                             # a rehearsal without a GPU

Weights are random: speed, memory and rounding, no quality. Every result is a JSON line, written as soon as it is known;
nothing is started after ``--minutes``. Parts, and their lines by ``what``:

    flux, flux-w8a8   FLUX.1-dev, 1024x1024, 512 tokens of text, bfloat16 and "w8a8"
    sdxl              the UNet of SDXL, 1024x1024, guidance in one batch of two: float32, float16, bfloat16, "w8a8"
        step          milliseconds of the denoiser in a step of the custom pipeline (``step_ms``, a median; the hooks of
                      the table included), of the host to start it (``host_ms``: where they are equal, the host is what
                      takes so long) and of that in hooks before the forward (``hooks_ms``; a graph's copies and launch
                      are no hooks), seconds of the whole loop (``loop_seconds``: what is built for a request, and
                      weights that come and go for it, too), and what stands on the device within the loop: bytes of
                      weights and tables (``resident_bytes``) and what torch has allocated between two steps
                      (``allocated_bytes``). ``table`` is "none", or where the weights of the layers with tables stand
                      meanwhile: "device" or "cpu". Eager "none" is measured before the others and, with
                      ``again``, after them: what differs there is the machine. ``log``: warnings of the package, such
                      as why a call was not recorded. ``new_descriptors``: of the timed loop, matrices of quantized
                      products that were at new addresses, which the host describes before it starts a kernel
    tables            every published denoiser in bfloat16, 16x16 latents, rows of ``--rows`` timesteps
        table         seconds that the first call takes longer than others, for a schedule and a request, and for a
                      further request; bytes by schedule and request; weights behind the tables
        error         of what layers give in the first calls, against the layers computed: RMS of the difference over
                      RMS, and largest difference over the row's RMS, of the worst layer, and how many layers give other
                      bits. ``exact``: null is the default; true computes every row by itself, false all in one product

Modes: eager; "graph", CUDA graphs of the custom pipelines; "blocks", each compiled (fullgraph; of the UNet residual and
transformer blocks); "blocks-graph". float32 is torch's default: TF32 in convolutions, none in matrix products.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

import diffuse_compress  # noqa: F401  (attaches compress)
from diffuse_compress.evaluation.cost_lines import CostLines
from diffuse_compress.evaluation.denoiser_inputs import denoiser_inputs, timestep_as_given
from diffuse_compress.evaluation.true_shapes import ShapePipeline, StepTimes, random_denoiser
from diffuse_compress.families.published import list_published, published_config
from diffuse_compress.logging import get_logger
from diffuse_compress.pipelines.mixin import CompressedPipelineMixin
from diffuse_compress.temporal.config import TableConfig
from diffuse_compress.temporal.table import TemporalTable, attach_table, detach_table, table_of

PARTS = ("flux", "sdxl", "tables", "flux-w8a8")
MODES = ("eager", "graph", "blocks", "blocks-graph")
TABLES = ("none", "device", "cpu")
# Where batched guidance is the pipeline's only way, or its usual one.
BATCH_OF_TWO = ("UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel")
BATCH_OF_TWO += ("SD3Transformer2DModel", "CogVideoXTransformer3DModel")
FLOW = ("SD3", "Flux", "Wan", "QwenImage", "HunyuanVideo")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "bfloat16", "float16", "float32"], help="of the UNet")
    parser.add_argument("--shapes", nargs="+", default=list_published(), choices=list_published(), help="of tables")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=8, help="of the loops that are timed")
    parser.add_argument("--rows", type=int, default=50, help="timesteps of the tables")
    parser.add_argument("--calls", type=int, default=3, help="of which the tables' error is taken")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no measurement after that time")
    parser.add_argument("--tiny", action="store_true", help="small models and inputs, to see that everything runs")
    parser.add_argument("--out", type=Path, help="append JSON lines here as well")
    return parser.parse_args(arguments)


class Bench:
    """Runs what was asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.lines = CostLines(partial(print, flush=True), self.device, options.out, options.minutes, tiny=options.tiny)

    def run(self, part: str) -> None:
        """One of ``PARTS``."""
        if part == "tables":
            self.tables()
        elif part == "sdxl":
            for scheme in self.options.schemes:
                self.steps("sdxl_base", scheme)
        else:
            self.steps("flux1_dev", "w8a8" if part == "flux-w8a8" else "bfloat16")

    # --- steps ------------------------------------------------------------------------------------------------------

    def steps(self, shape: str, scheme: str) -> None:
        """Every mode of a denoiser with every place of its tables; compiled ones last, since blocks stay compiled."""
        if self.lines.over:
            return
        named = {"what": "step", "shape": shape, "scheme": scheme}
        with self.lines.reported(**named):
            dtype = getattr(torch, scheme, torch.bfloat16)
            subject = ShapePipeline(
                shape, self.device, tiny=self.options.tiny, dtype=dtype, mixin=CompressedPipelineMixin
            )
            if not hasattr(torch, scheme):
                subject.model.compress(scheme, measure=False)
            for mode in (mode for mode in MODES if mode in self.options.modes):
                if mode == "blocks" or (mode == "blocks-graph" and "blocks" not in self.options.modes):
                    subject.compile_blocks()
                places = [place for place in TABLES if place in self.options.tables]
                turns = [{"table": place} for place in places]
                if mode == "eager" and len(places) > 1 and "none" in places:
                    turns.append({"table": "none", "again": True})
                for turn in turns:
                    if self.lines.over:
                        return
                    line = {**named, "mode": mode, **turn}
                    with self.lines.reported(**line), _logged() as messages:
                        self._step(subject, line, messages)

    def _step(self, subject: ShapePipeline, named: Mapping[str, Any], messages: list[str]) -> None:
        """One line, of what is named; ``messages`` are what was logged so far."""
        model, graph, steps, place = subject.model, named["mode"].endswith("graph"), self.options.steps, named["table"]
        if place != "none":
            attach_table(model, TableConfig(weights=place))
        try:
            started = time.perf_counter()
            # Two calls of a kind are computed and the third is recorded; the blocks are compiled in the first.
            subject.run(4, cuda_graph=graph)
            self._wait()
            warm_up = time.perf_counter() - started
            clock, allocated = StepTimes(model, self.device), _Allocated(model, self.device)
            described = _descriptors()
            self._reset_peak()
            with allocated.on(), clock.on():
                started = time.perf_counter()
                subject.run(steps, cuda_graph=graph)
                self._wait()
                seconds = time.perf_counter() - started
            table = table_of(model)
            host, hooks = zip(*clock.host_milliseconds()[1:], strict=True)
            self.lines.write(
                **named,
                steps=steps,
                step_ms=statistics.median(clock.milliseconds()[1:]),
                host_ms=statistics.median(host),
                hooks_ms=statistics.median(hooks),
                new_descriptors=_descriptors() - described,
                loop_seconds=seconds,
                warm_up_seconds=warm_up,
                resident_bytes=_bytes_on(model, self.device) + (0 if table is None else _table_bytes(table)),
                table_bytes=None if table is None else table.nbytes(),
                allocated_bytes=allocated.most,
                peak_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
                served={
                    name: {"hits": found.hits, "misses": {str(why.what): n for why, n in found.misses.items()}}
                    for call in subject.pipe.compression_stats().components.values()
                    for name, found in call.methods.items()
                },
                log=list(dict.fromkeys(messages)),
            )
        finally:
            detach_table(model)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    # --- tables -----------------------------------------------------------------------------------------------------

    def tables(self) -> None:
        """Every denoiser that has been published, one for each configuration."""
        seen: list[Any] = []
        for shape in self.options.shapes:
            pipeline = published_config(shape)
            part = pipeline.components[pipeline.denoisers[0]]
            if (part.class_name, part.config) in seen or self.lines.over:
                continue
            seen.append((part.class_name, part.config))
            with self.lines.reported(what="table", shape=shape):
                model = random_denoiser(shape, self.device, torch.bfloat16, tiny=self.options.tiny)
                self._table(TableSubject(model, self.device, self.options), shape)
                model = None

    def _table(self, subject: TableSubject, shape: str) -> None:
        table = attach_table(subject.model)
        first, again = subject.extra_ms(), subject.extra_ms(seed=1)
        kinds = [lookup.dependence.value for name, lookup in table.lookups.items() if name not in table.left]
        total = _bytes_on(subject.model, self.device)
        sizes = table.nbytes()
        self.lines.write(
            what="table",
            shape=shape,
            kind=type(subject.model).__name__,
            batch=subject.batch,
            rows=self.options.rows,
            layers={kind: kinds.count(kind) for kind in sorted(set(kinds))},
            left=len(table.left),
            seconds=first / 1000,
            request_seconds=again / 1000,
            schedule_bytes=sizes["schedules"],
            request_bytes=sizes["request"],
            weight_bytes=sizes["weights"],
            weight_share=sizes["weights"] / total,
        )
        detach_table(subject.model)
        names = list(table.lookups)
        reference = subject.outputs(names)
        for exact in (None, True, False):
            table = attach_table(subject.model, TableConfig(exact=exact))
            found = subject.outputs([name for name in names if name not in table.left])
            left = set(table.left)
            detach_table(subject.model)
            self._error(shape, exact, {name: reference[name] for name in names if name not in left}, found)

    def _error(self, shape: str, exact: bool | None, reference: Any, found: Any) -> None:
        rms, maximum = dict[str, float](), dict[str, float]()
        for name, live in reference.items():
            # Calls of the build come first.
            pairs = [_difference(a, b) for a, b in zip(found.get(name, [])[-len(live) :], live, strict=True)]
            rms[name], maximum[name] = torch.stack(pairs).amax(dim=0).tolist()
        worst = max(rms, key=lambda name: rms[name])
        self.lines.write(
            what="error",
            shape=shape,
            exact=exact,
            rms=rms[worst],
            maximum=max(maximum.values()),
            worst=worst,
            layers=len(rms),
            other_bits=sum(value > 0 for value in maximum.values()),
            goal="rms <= 4e-3, maximum <= 2e-2; exact=true: 0",
        )


class TableSubject:
    """A denoiser that is called in a loop as its pipeline calls it, on small latents."""

    def __init__(self, model: Any, device: torch.device, options: argparse.Namespace) -> None:
        kind = type(model).__name__
        self.model, self.device, self.options = model, device, options
        self.batch = 2 if kind in BATCH_OF_TWO else 1
        flow = kind.startswith(FLOW)
        self._scheduler = diffusers.FlowMatchEulerDiscreteScheduler if flow else diffusers.DDIMScheduler

    @torch.no_grad()
    def loop(self, seed: int = 0) -> None:
        """The first calls of a loop."""
        inputs = denoiser_inputs(self.model, self.batch, seed, side=16)
        scheduler: Any = self._scheduler()
        scheduler.set_timesteps(self.options.rows)
        # In the sense of a pipeline whose first t / 1000 may be another step's t.
        scheduler.set_begin_index(0) if hasattr(scheduler, "set_begin_index") else None
        for t in scheduler.timesteps[: 1 + self.options.calls]:
            given = timestep_as_given(self.model, t.to(self.device), self.batch)
            self.model(**{**inputs, "timestep": given, "return_dict": False})
            scheduler.step(torch.zeros(1), t, torch.zeros(1))

    def extra_ms(self, seed: int = 0) -> float:
        """Milliseconds by which the first call takes longer than the others."""
        clock = StepTimes(self.model, self.device)
        with clock.on():
            self.loop(seed)
        first, *rest = clock.milliseconds()
        return first - statistics.median(rest)

    def outputs(self, names: list[str]) -> dict[str, list[torch.Tensor]]:
        """What layers give in every call."""
        seen: dict[str, list[torch.Tensor]] = {}

        def keep(name: str, layer: nn.Module, args: Any, output: torch.Tensor) -> None:
            seen.setdefault(name, []).append(output.clone())

        handles = [self.model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
        try:
            self.loop()
        finally:
            for handle in handles:
                handle.remove()
        return seen


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """What the package logs inside, warnings and worse."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    get_logger().addHandler(handler)
    try:
        yield messages
    finally:
        get_logger().removeHandler(handler)


def _descriptors() -> int:
    """Of matrices, that plans of products hold by address."""
    plans = sys.modules.get("diffuse_compress_kernels.triton_kernels.plans")
    return 0 if plans is None else sum(len(plan.descriptors) for plan in plans.PLANS.values())


class _Allocated:
    """The most that torch had allocated when a call began, but for the first two."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device, self._calls = model, device, 0
        self.most: int | None = None

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside, calls are looked at."""
        handle = self._model.register_forward_pre_hook(self._look)
        try:
            yield
        finally:
            handle.remove()

    def _look(self, module: nn.Module, args: Any) -> None:
        self._calls += 1
        if self._device.type == "cuda" and self._calls > 2:
            self.most = max(self.most or 0, torch.cuda.memory_allocated(self._device))


def _difference(found: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """[2] RMS of the difference over RMS, and largest difference over the RMS of its row."""
    difference, live = found.double() - live.double(), live.double()
    rows = live.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-30)
    return torch.stack(
        [difference.square().mean().sqrt() / live.square().mean().sqrt(), (difference / rows).abs().max()]
    )


def _bytes_on(model: nn.Module, device: torch.device) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == device.type)


def _table_bytes(table: TemporalTable) -> int:
    sizes = table.nbytes()
    return sizes["schedules"] + sizes["request"]


def main(arguments: list[str] | None = None) -> int:
    """Measure everything that was asked for."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    # As many shapes of residual blocks as a UNet has.
    torch._dynamo.config.recompile_limit = 64
    bench = Bench(options)
    for part in PARTS:
        if part in options.parts and not bench.lines.over:
            with bench.lines.reported(what=part):
                bench.run(part)
            torch._dynamo.reset()
    return 0


if __name__ == "__main__":
    sys.exit(main())
