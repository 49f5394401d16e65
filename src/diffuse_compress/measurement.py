"""What compression costs in accuracy: of each layer's weight and output, of the denoiser, of whole pictures.

Everything here reads. Hooks are gone afterwards, and pipeline, schedulers, training flags and random states are as
they were (see ``pipeline_call.untouched``).
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from diffuse_compress.calls import Call
from diffuse_compress.components import GROUPS, is_pipeline, model_components
from diffuse_compress.errors import ConfigError, nearest
from diffuse_compress.evaluation.macs import count_macs
from diffuse_compress.evaluation.metrics import as_pictures, psnr
from diffuse_compress.integrations.component import get_state
from diffuse_compress.pipeline_call import (
    CannotCallError,
    accepted_arguments,
    cheap_arguments,
    picture_of,
    prompt_arguments,
    seeded,
    untouched,
)
from diffuse_compress.plan import CompressionPlan
from diffuse_compress.progress import Callback, track
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear
from diffuse_compress.quantization.numerics import dequantize

__all__ = ["LayerMeasurement", "PipelineProbe", "PreviewPair", "measure_layer", "relative_error"]

STEPS = 4
TIMESTEPS = 4
TIMED_CALLS = 2
TIME_LIMIT_SECONDS = 120.0
"""A probe run that takes longer is stopped at the next call of a denoiser; what it saw until then counts."""
ROWS_PER_LAYER = 64
ROW_MEMORY_BYTES = 32 << 20
_CHUNK_ELEMENTS = 4 << 20
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class LayerMeasurement:
    """Errors of one converted layer.

    Attributes:
        weight_error: ``||W - What|| / ||W||`` (Frobenius), fp32 values, smoothing and low-rank branch included.
        output_error: ``||y - yhat|| / ||y||`` on sampled inputs of the dense pipeline, or None without any.
    """

    weight_error: float
    output_error: float | None = None


@dataclass(frozen=True)
class PreviewPair:
    """One prompt's picture before and after, from the same seed.

    Attributes:
        prompt: what was asked for.
        before: PIL picture (of a video, its middle frame) of the dense pipeline.
        after: PIL picture of the compressed one.
        psnr_db: between the two; inf for equal pictures.
    """

    prompt: str
    before: Any
    after: Any
    psnr_db: float


def relative_error(reference: torch.Tensor, value: torch.Tensor) -> float:
    """``||reference - value|| / ||reference||`` in fp32 with double sums; 0 where both are zero."""
    reference, value = reference.detach().float(), value.detach().to(reference.device).float()
    error = (reference - value).square_().sum(dtype=torch.float64)
    norm = reference.square().sum(dtype=torch.float64)
    return _ratio(float(error), float(norm))


def measure_layer(
    dense: nn.Module, layer: QuantizedLinear | QuantizedConv2d, inputs: torch.Tensor | None
) -> LayerMeasurement:
    """Errors of ``layer`` against the ``dense`` one it replaces.

    Args:
        dense: a linear or convolution, its weight still there.
        layer: its quantized form, on the same device.
        inputs: [M, K] sampled inputs of a linear, any device, or None.

    Cost:
        Rows of the weight in blocks of 16 MiB of fp32; two products of M rows.
    """
    output_error = None
    if inputs is not None and inputs.shape[0]:
        assert isinstance(dense.weight, torch.Tensor)
        x = inputs.to(dense.weight.device, dense.weight.dtype)
        with torch.no_grad():
            output_error = relative_error(dense(x), layer(x))
    return LayerMeasurement(_weight_error(dense, layer), output_error)


def _weight_error(dense: nn.Module, layer: QuantizedLinear | QuantizedConv2d) -> float:
    weight = dense.weight.detach().flatten(1)  # type: ignore[operator,union-attr]
    plain = layer.act_pre_scale is None and layer.low_rank_down is None and layer.scheme.input_rotation is None
    plain = plain and layer.dense_columns is None
    quantized = layer.quantized_weight()
    # Smoothing scales, branches and rotations reach into the whole weight: there the layer says what it amounts to.
    whole = None if plain else layer.weight.detach().flatten(1)
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    error = norm = 0.0
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        exact = weight[rows].float()
        approximate = dequantize(quantized, torch.float32, rows) if whole is None else whole[rows].float()
        error += float((exact - approximate).square_().sum(dtype=torch.float64))
        norm += float(exact.square().sum(dtype=torch.float64))
    return _ratio(error, norm)


def _ratio(error: float, norm: float) -> float:
    if norm == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return float((error / norm) ** 0.5)


class PipelineProbe:
    """Runs a pipeline before and after compression and compares.

    :meth:`record_dense` runs it once with few steps, keeping for every planned component the inputs and outputs of
    four calls spread over the run, the MACs of each layer and some input rows of each planned linear;
    :meth:`record_compressed` repeats those calls. A pipeline that cannot be called blindly is not an error: ``reason``
    then says why nothing was measured.

    Args:
        target: pipeline or bare model.
        plan: what will be converted.
        preview: prompts, or dicts of pipeline arguments, to generate before and after.
        enabled: False measures nothing but the preview.
        callback: of ``compress``; an exception raised in it is passed on.

    Attributes:
        reason: why nothing was measured, or None.
        notes: what was reduced or dropped to stay affordable.
        setting: the run in words, e.g. "4 steps at 256x256".
    """

    def __init__(
        self,
        target: Any,
        plan: CompressionPlan,
        preview: Sequence[Any] | None = None,
        enabled: bool = True,
        callback: Callback | None = None,
    ) -> None:
        self._target, self._callback = target, callback
        self._models = {name: part for name, part in model_components(target).items() if name in plan.components}
        self._planned = {name: list(part.layers) for name, part in plan.components.items()}
        if preview and not is_pipeline(target):
            raise ConfigError(f"preview= needs a pipeline to generate with, got {type(target).__name__}.")
        self._prompts = _as_calls(target, preview)
        self.reason: str | None = None
        if not enabled:
            self.reason = "not measured (measure=False)"
        elif not is_pipeline(target):
            self.reason = "not measured: a model alone comes without the pipeline that calls it"
        self.notes: list[str] = []
        self.setting = ""
        self._calls: dict[str, list[_Call]] = {}
        self._macs: dict[str, dict[str, int]] = {}
        self._rows: dict[tuple[str, str], torch.Tensor] = {}
        self._labels: dict[str, list[float | None]] = {}
        self._errors: dict[str, list[float]] = {}
        self._seconds_before: dict[str, float | None] = {}
        self._seconds_after: dict[str, float | None] = {}
        self._before: list[Any] = []

    # --- before -------------------------------------------------------------------------------------------------

    def record_dense(self) -> None:
        """Run the dense pipeline: once to measure, and once for each preview prompt."""
        if self.reason is None:
            try:
                self._measure()
            except CannotCallError as error:
                self.reason = f"not measured: {error}"
            except Exception as error:  # any failure of a pipeline called blindly means: not measurable this way
                text = " ".join(str(error).split()) or "no message"
                where = type(self._target).__name__
                self.reason = f"not measured: {where} failed ({type(error).__name__}: {text[:300]})"
            if self.reason is not None:
                self._calls, self._macs, self._rows = {}, {}, {}
            elif self._callback is not None:
                self._callback("Measuring the dense pipeline", 1, 1, {})
        self._before = self._generate("Preview, dense")

    def layer_inputs(self, component: str, layer: str) -> torch.Tensor | None:
        """Sampled input rows [M, K] of a planned linear, or None."""
        return self._rows.get((component, layer))

    def macs(self, component: str) -> dict[str, int]:
        """Multiply-accumulates of every linear and convolution in the probe run; empty if not measured."""
        return self._macs.get(component, {})

    def _measure(self) -> None:
        decode = any(GROUPS["vaes"].match(name) for name in self._models)
        recorders = {name: _CallRecorder(_entry(model)) for name, model in self._models.items()}
        arguments = cheap_arguments(self._target, STEPS, seed=0, decode=decode)
        self.setting = _describe(arguments)
        samplers = self._samplers()
        stopped = len(self.notes)
        with untouched(self._target), contextlib.ExitStack() as stack:
            for recorder in recorders.values():
                stack.enter_context(recorder.attached())
            for key, sampler in samplers.items():
                stack.enter_context(sampler.attached(self._models[key[0]].get_submodule(key[1])))
            self._run_counted(lambda: self._run_until_done(arguments, decode))
        calls = {name: recorder.calls.pick(TIMESTEPS) for name, recorder in recorders.items()}
        self._calls = calls
        self._labels = {name: [call.timestep for call in found] for name, found in calls.items()}
        self._rows = {key: rows for key, sampler in samplers.items() if (rows := sampler.rows()) is not None}
        if len(self.notes) == stopped:
            with untouched(self._target):
                for name, found in calls.items():
                    runs = [call.repeat(_entry(self._models[name])) for call in found[-TIMED_CALLS:]]
                    self._seconds_before[name] = _best([seconds for _, seconds in runs])

    def _run_until_done(self, arguments: dict[str, Any], decode: bool) -> None:
        """Call the pipeline, but not past the time limit, nor into denoising if nothing planned comes after it."""
        denoisers = [part for name, part in model_components(self._target).items() if GROUPS["denoisers"].match(name)]
        needed = decode or any(part in denoisers for part in self._models.values())
        limit = time.monotonic() + TIME_LIMIT_SECONDS

        def check(*_: Any) -> None:
            if not needed:
                raise _StopRunError
            if time.monotonic() > limit:
                self.notes.append(f"the run was stopped after {TIME_LIMIT_SECONDS:.0f} s")
                raise _StopRunError

        with contextlib.ExitStack() as stack, contextlib.suppress(_StopRunError):
            for part in denoisers:
                stack.callback(part.register_forward_pre_hook(check).remove)
            self._target(**arguments)

    def _run_counted(self, run: Callable[[], None]) -> None:
        def counted(name: str, model: nn.Module, inner: Callable[[], None]) -> None:
            self._macs[name] = count_macs(model, inner)

        for name, model in self._models.items():
            run = partial(counted, name, model, run)
        run()

    def _samplers(self) -> dict[tuple[str, str], _RowSampler]:
        layers = {
            (name, layer): module
            for name, planned in self._planned.items()
            for layer in planned
            if isinstance(module := self._models[name].get_submodule(layer), nn.Linear)
        }
        one_row = sum(module.in_features * module.weight.element_size() for module in layers.values())
        rows = min(ROWS_PER_LAYER, ROW_MEMORY_BYTES // max(1, one_row))
        if rows < ROWS_PER_LAYER and layers:
            self.notes.append(f"input rows sampled per layer: {max(rows, 1)} of {ROWS_PER_LAYER}, for memory")
        return {key: _RowSampler(max(1, rows // TIMESTEPS)) for key in layers}

    # --- after --------------------------------------------------------------------------------------------------

    def record_compressed(self) -> None:
        """Repeat the recorded calls on the converted components."""
        if self.reason is not None:
            return
        try:
            with untouched(self._target):
                for name, calls in self._calls.items():
                    runs = [call.repeat(_entry(self._models[name])) for call in calls]
                    self._errors[name] = [error for error, _ in runs]
                    self._seconds_after[name] = _best([seconds for _, seconds in runs])
        except torch.OutOfMemoryError:
            self.reason = "not measured: out of memory while running the compressed model"
            self._errors = {}
        self._calls, self._rows = {}, {}
        if self._callback is not None:
            self._callback("Measuring the compressed pipeline", 1, 1, {})

    def output_error(self, component: str) -> dict[str, Any]:
        """{"timesteps", "relative_error", "setting", "note"}; lists are empty and note says why if not measured."""
        if self.reason is not None or not self._errors.get(component):
            note = self.reason or "; ".join(["not measured: the probe run did not call it", *self.notes])
            return {"timesteps": [], "relative_error": [], "setting": "", "note": note}
        return {
            "timesteps": self._labels[component],
            "relative_error": self._errors[component],
            "setting": self.setting,
            "note": "; ".join(self.notes),
        }

    def call_seconds(self, component: str) -> dict[str, float] | None:
        """{"before", "after"}: seconds of one of the recorded calls on this device, or None if not measured."""
        before, after = self._seconds_before.get(component), self._seconds_after.get(component)
        return None if before is None or after is None else {"before": round(before, 6), "after": round(after, 6)}

    def keep_preview(self, target: Any) -> None:
        """Generate the preview with the compressed pipeline and leave both with the live report.

        Pictures are never written into a checkpoint.
        """
        after = self._generate("Preview, compressed")
        if not after:
            return
        pairs = [
            PreviewPair(label, before, picture, _psnr(before, picture))
            for (label, _), before, picture in zip(self._prompts, self._before, after, strict=True)
        ]
        for name, model in model_components(target).items():
            state = get_state(model)
            if state is not None:
                state.preview = pairs if name in self._planned else []

    def _generate(self, stage: str) -> list[Any]:
        pictures: list[Any] = []
        if not self._prompts:
            return pictures
        for label, arguments in track(self._prompts, stage, self._target, self._callback, {}):
            with untouched(self._target), _rewound(arguments.get("generator")):
                output = self._target(**arguments)
            picture = picture_of(output)
            if picture is None:
                raise ConfigError(f"preview: {type(self._target).__name__} returned no picture for {label!r}.")
            pictures.append(picture)
        return pictures


class _StopRunError(Exception):
    """Ends a probe run early on purpose."""


@dataclass
class _Call:
    """A recorded call of a component and what it returned, on the CPU."""

    call: Call
    timestep: float | None
    output: torch.Tensor | None = None

    def repeat(self, module: nn.Module) -> tuple[float, float]:
        """(relative error against the recorded output, seconds) of the same call now."""
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        call = self.call.to(device)
        started = _now(device)
        output = _first_tensor(call.run(module))
        seconds = _now(device) - started
        assert output is not None
        assert self.output is not None
        return relative_error(self.output, output.cpu()), seconds


@dataclass
class _Spread(Generic[_Item]):
    """Keeps items evenly spread over a stream of unknown length, at most ``limit`` of them."""

    limit: int = 2 * TIMESTEPS
    items: list[_Item] = field(default_factory=list)
    stride: int = 1
    seen: int = 0

    @property
    def is_due(self) -> bool:
        return self.seen % self.stride == 0

    def offer(self, item: _Item | None) -> None:
        """Count one item of the stream; ``item`` is None where ``is_due`` was False."""
        if item is not None:
            self.items.append(item)
        self.seen += 1
        if len(self.items) > self.limit:
            self.items, self.stride = self.items[::2], self.stride * 2

    def pick(self, count: int) -> list[_Item]:
        """``count`` of the kept items, first and last among them."""
        last = len(self.items) - 1
        if last < count:
            return list(self.items)
        return [self.items[round(i * last / (count - 1))] for i in range(count)]


class _CallRecorder:
    """Copies inputs and outputs of a module's calls."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls: _Spread[_Call] = _Spread()
        self._pending: _Call | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        before = self.module.register_forward_pre_hook(self._before, with_kwargs=True)
        after = self.module.register_forward_hook(self._after, with_kwargs=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Copied before the call: a forward may write into its inputs.
        if self.calls.is_due:
            self._pending = _Call(Call(args, kwargs).copied(), _timestep(module, args, kwargs))

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call, self._pending = self._pending, None
        tensor = _first_tensor(output)
        if call is not None and tensor is not None:
            call.output = tensor.detach().to("cpu", copy=True)
            self.calls.offer(call)
        else:
            self.calls.offer(None)


class _RowSampler:
    """Copies a few evenly spaced input rows of every call of a linear."""

    def __init__(self, rows_per_call: int) -> None:
        self.rows_per_call = rows_per_call
        self.samples: _Spread[torch.Tensor] = _Spread()

    @contextlib.contextmanager
    def attached(self, layer: nn.Module) -> Iterator[None]:
        handle = layer.register_forward_pre_hook(self._sample)
        try:
            yield
        finally:
            handle.remove()

    def rows(self) -> torch.Tensor | None:
        """[M, K], or None if the layer was never called."""
        picked = self.samples.pick(TIMESTEPS)
        return torch.cat(picked) if picked else None

    def _sample(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].detach().flatten(0, -2) if args and isinstance(args[0], torch.Tensor) else None
        if rows is None or not self.samples.is_due or not rows.shape[0]:
            self.samples.offer(None)
            return
        count = min(self.rows_per_call, rows.shape[0])
        # Midpoints of equal intervals.
        index = ((torch.arange(count, device=rows.device) * 2 + 1) * rows.shape[0]) // (2 * count)
        self.samples.offer(rows.index_select(0, index).cpu())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _best(seconds: list[float]) -> float | None:
    """Least of the last calls: the first ones also pay for warming up."""
    return min(seconds[-TIMED_CALLS:], default=None)


def _entry(model: nn.Module) -> nn.Module:
    """What a pipeline calls of a component: the model itself, of a VAE its decoder."""
    decoder = getattr(model, "decoder", None)
    return decoder if callable(getattr(model, "decode", None)) and isinstance(decoder, nn.Module) else model


def _as_calls(pipe: Any, preview: Sequence[Any] | None) -> list[tuple[str, dict[str, Any]]]:
    """(label, pipeline arguments) of each preview item."""
    if not preview:
        return []
    calls, known = [], accepted_arguments(pipe)
    for seed, item in enumerate([preview] if isinstance(preview, str | dict) else preview):
        if not isinstance(item, str | dict):
            raise ConfigError(f"preview: a prompt or a dict of pipeline arguments, got {type(item).__name__}.")
        arguments = {"prompt": item} if isinstance(item, str) else dict(item)
        if isinstance(arguments.get("prompt"), str):
            arguments = {**prompt_arguments(pipe, arguments["prompt"]), **arguments}
        unknown = [key for key in arguments if known is not None and key not in known]
        if unknown:
            raise ConfigError(
                f"preview: {type(pipe).__name__} takes no argument {unknown[0]!r}; {nearest(unknown[0], known or ())}"
            )
        label = str(arguments.get("prompt", ", ".join(f"{key}={value}" for key, value in arguments.items())))
        calls.append((label, {"generator": seeded(seed), **arguments}))
    return calls


@contextlib.contextmanager
def _rewound(generator: Any) -> Iterator[None]:
    """Generators read the same afterwards, so that the second picture starts from the first one's noise."""
    generators = generator if isinstance(generator, list) else [generator] if generator is not None else []
    states = [(one, one.get_state()) for one in generators]
    try:
        yield
    finally:
        for one, state in states:
            one.set_state(state)


def _psnr(before: Any, after: Any) -> float:
    return float(psnr(as_pictures([before]), as_pictures([after]))[0])


def _describe(arguments: dict[str, Any]) -> str:
    text = f"{arguments.get('num_inference_steps', STEPS)} steps"
    if "height" in arguments:
        text += f" at {arguments['width']}x{arguments['height']}"
    return text + (f", {arguments['num_frames']} frames" if "num_frames" in arguments else "")


def _timestep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    try:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        given = kwargs
    for name in ("timestep", "timesteps", "t", "r", "sigma"):
        value = given.get(name)
        if isinstance(value, torch.Tensor) and value.numel():
            return round(float(value.flatten()[0]), 4)
        if isinstance(value, int | float):
            return round(float(value), 4)
    return None


def _first_tensor(value: Any) -> torch.Tensor | None:
    """The first floating point tensor of a model's output."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() else None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for item in items if (found := _first_tensor(item)) is not None), None)
