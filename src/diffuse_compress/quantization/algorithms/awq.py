"""AWQ: scale up the weights of the channels whose inputs are large, and clip what then sticks out.

Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration", arXiv
2306.00978, equations 4 and 5. Deviations: the error of a candidate is summed over all calibration calls before the best
is chosen, never call by call; both ends of an asymmetric range are clipped on their own; the inverse scale is folded
into what precedes the layers (``folding.py``) in language models only, unless ``fold`` says otherwise. Elsewhere it
stays with the layers (``act_pre_scale``), so those behind an adaptive norm or an activation are treated alike.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from diffuse_compress.calls import Call
from diffuse_compress.errors import ConfigError
from diffuse_compress.quantization.algorithms.base import AlgorithmConfig, register_block, takes_scale
from diffuse_compress.quantization.algorithms.block import (
    BlockWork,
    LayerWork,
    observed_qparams,
    per_channel,
    prepared,
    shifted,
)
from diffuse_compress.quantization.algorithms.folding import check_fold, set_scale
from diffuse_compress.quantization.algorithms.rtn import RTNConfig, quantize
from diffuse_compress.quantization.algorithms.simulation import seen_as_quantized
from diffuse_compress.quantization.numerics import choose_qparams, dequantize, fake_quantize, split_groups
from diffuse_compress.quantization.observers import ObserverConfig
from diffuse_compress.quantization.qparams import QParams
from diffuse_compress.quantization.scheme import PerBlock, PerTensor, Scheme, TwoLevel, WeightScheme

__all__ = [
    "AWQConfig",
    "AbsMeanCollector",
    "Candidates",
    "RowCollector",
    "clip_weight",
    "output_distance",
]

_SMALLEST_SCALE = 1e-4
_CHUNK_ELEMENTS = 1 << 24
# Attention scores are a product of two of these: clipping them costs more than it gains (section 4.1 of the paper's
# code release).
_NOT_CLIPPED = re.compile(
    r"(?:^|[._])(?:to_)?(?:add_)?(?:q|k|query|key|wq|wk|q_proj|k_proj|qkv|q_norm|k_norm)(?:_proj)?$"
)


@dataclass(frozen=True)
class AWQConfig(AlgorithmConfig):
    """Per-channel scales that lower the output error of quantized weights, and clipping. Needs calibration data.

    It chooses scales and ranges; codes are then rounded to nearest, or chosen by what follows in a sequence.

    Args:
        num_ratios: exponents that are tried, evenly spaced in [0, 1).
        duo_scaling: divide by the weights' own magnitude as well.
        clip: search ranges narrower than the weights'.
        clip_steps: ranges that are tried, from the whole one down to half of it.
        clip_rows: input rows that the search of ranges looks at.
        fold: as in :class:`SmoothQuantConfig`.
    """

    num_ratios: int = 20
    duo_scaling: bool = True
    clip: bool = True
    clip_steps: int = 10
    clip_rows: int = 512
    fold: bool | None = None
    kind: ClassVar[str] = "awq"
    needs_calibration: ClassVar[bool] = True
    chooses_codes: ClassVar[bool] = False
    chooses_scales: ClassVar[bool] = True

    @property
    def summary(self) -> str:
        return "AWQ" if self.clip else "AWQ (scales only)"

    def __post_init__(self) -> None:
        if self.num_ratios < 2 or self.clip_steps < 2 or self.clip_rows < 1:
            raise ConfigError(
                "AWQConfig: need num_ratios >= 2, clip_steps >= 2 and clip_rows >= 1, got "
                f"num_ratios={self.num_ratios}, clip_steps={self.clip_steps}, clip_rows={self.clip_rows}."
            )
        check_fold("AWQConfig", self.fold)

    def scales_input(self, layer: nn.Module, scheme: Scheme) -> bool:
        return takes_scale(layer)


class AbsMeanCollector:
    """Mean magnitude of each input channel, fp32 [C]."""

    def __init__(self, layer: LayerWork) -> None:
        self.layer = layer.dense
        self._sum: torch.Tensor | None = None
        self._rows = 0

    def update(self, rows: torch.Tensor) -> None:
        found = per_channel(self.layer, rows.abs().sum(dim=0, dtype=torch.float32), torch.mean)
        self._sum = found if self._sum is None else self._sum + found
        self._rows += rows.shape[0]

    def mean(self) -> torch.Tensor | None:
        return None if self._sum is None else self._sum / max(1, self._rows)


class RowCollector:
    """Evenly spaced input rows of every call, at most ``limit`` of them, fp32 [M, K]."""

    def __init__(self, limit: int, calls: int) -> None:
        self._per_call = max(1, -(-limit // max(1, calls)))
        self._limit = limit
        self._parts: list[torch.Tensor] = []

    def update(self, rows: torch.Tensor) -> None:
        # A copy: a view would hold all rows, and change with them.
        self._parts.append(_evenly(rows, self._per_call).to(torch.float32, copy=True))

    def rows(self) -> torch.Tensor | None:
        return _evenly(torch.cat(self._parts), self._limit) if self._parts else None


def _evenly(rows: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` of the rows, or all of them if there are no more."""
    total = rows.shape[0]
    if total <= count:
        return rows
    middles = torch.arange(1, 2 * count, 2, device=rows.device) * total // (2 * count)
    return rows[middles]


@register_block
def calibrate(work: BlockWork, config: AWQConfig) -> None:
    """Choose scales for every group of layers that share an input, then ranges for every layer."""
    for names in work.subsets:
        layers = [work.layers[name] for name in names]
        # Beside a low-rank branch the error of the codes alone says nothing.
        chosen = [layer for layer in layers if layer.act_pre_scale is None and layer.low_rank is None]
        chosen = [layer for layer in chosen if _is_plain(layer) and layer.act_pre_shift is None]
        if chosen:
            _search_scale(work, chosen, config)
    if config.clip:
        layers = [layer for layer in work.layers.values() if _is_plain(layer) and not _NOT_CLIPPED.search(layer.name)]
        collectors = {layer.name: RowCollector(config.clip_rows, len(work.calls)) for layer in layers}
        work.observe_inputs()
        work.collect(collectors, quantized_inputs=True)
        for layer in layers:
            rows = collectors[layer.name].rows()
            if rows is not None and not isinstance(layer.scheme.weight.granularity, PerTensor | PerBlock | TwoLevel):
                layer.ranges = clip_weight(layer.target(), rows, layer.scheme.weight, config.clip_steps)


def _is_plain(layer: LayerWork) -> bool:
    return layer.quantized is None and takes_scale(layer.dense)


# --- scales -----------------------------------------------------------------------------------------------------


def _search_scale(work: BlockWork, layers: list[LayerWork], config: AWQConfig) -> None:
    collector = AbsMeanCollector(layers[0])
    work.collect({layers[0].name: collector})
    inputs = collector.mean()
    if inputs is None or not inputs.any():
        return
    reached = inputs > 0
    judged = Candidates(work, layers)
    magnitude = _relative_magnitude(layers, judged.weights)

    def scales() -> Iterator[torch.Tensor]:
        yield torch.ones_like(inputs)  # the candidate that changes nothing is always among them
        for step in range(1, config.num_ratios):
            ratio = step / config.num_ratios
            scale = inputs**ratio / (magnitude ** (1 - ratio) if config.duo_scaling else 1.0)
            scale = scale.clamp(min=_SMALLEST_SCALE)
            # A channel that was never seen keeps its weights: as small as its inputs they would all be rounded to 0.
            yield torch.where(reached, scale / (scale[reached].max() * scale[reached].min()).sqrt(), 1.0)

    best = judged.best(scales())
    if not torch.equal(best, torch.ones_like(best)):
        set_scale(work, layers, 1.0 / best, config.fold)
        for layer in layers:
            # A least-squares range would clip the very channels that were scaled up because they matter. Two-level
            # scales are searched together, and tried so.
            layer.ranges = None if _is_two_level(layer.scheme.weight) else layer.target()


class Candidates:
    """Scales and shifts of the input that some layers share, judged by the output of what they are in.

    Args:
        work: the block; its layers are dense.
        layers: that were all given one tensor.

    Attributes:
        weights: fp32 [N, K] of the layers, on the input as it comes.
    """

    def __init__(self, work: BlockWork, layers: Sequence[LayerWork]) -> None:
        self._work, self._layers = work, layers
        self.weights = [layer.rest() for layer in layers]
        self._parent, self._observed, self._given, self._changing = _observed(work, layers)

    def error(self, scale: torch.Tensor, shift: torch.Tensor | None = None) -> float:
        """Squared error of the output with rounded weights and inputs, where these are the given ones less ``shift``,
        divided by ``scale``; both fp32 [K] (convolutions [C], without a shift)."""
        work = self._work
        tried = _tried(self._layers, self.weights, scale, shift, self._given, work.observer)
        with tried, torch.no_grad():
            return sum(
                output_distance(
                    work.forward(self._parent, call.copied(None) if self._changing else call),
                    output,
                    functools.partial(work.counted, index=index),
                )
                for index, call, output in self._observed
            )

    def best(self, scales: Iterable[torch.Tensor]) -> torch.Tensor:
        """Of ``scales``, one at least, the first that changes the output least."""
        best, best_error = None, float("inf")
        for scale in scales:
            error = self.error(scale)
            if best is None or error < best_error:
                best, best_error = scale, error
        assert best is not None
        return best


def _relative_magnitude(layers: Sequence[LayerWork], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """fp32 [C]: mean over the rows of all layers of |w| relative to the largest of its group."""
    total, rows = torch.zeros(()), 0
    for layer, weight in zip(layers, weights, strict=True):
        groups = split_groups(weight.abs(), layer.scheme.weight)
        relative = groups / groups.amax(dim=-1, keepdim=True).clamp(min=1e-12)
        columns = relative.reshape(weight.shape[0], -1)[:, : weight.shape[1]].sum(dim=0)
        # Convolutions of one input need not have one kernel size.
        total = total.to(columns) + per_channel(layer.dense, columns, torch.mean)
        rows += weight.shape[0]
    return (total / rows).clamp(min=1e-6)


def _observed(
    work: BlockWork, layers: Sequence[LayerWork]
) -> tuple[nn.Module, list[tuple[int, Call, Any]], list[torch.Tensor], bool]:
    """The smallest module that runs all of the layers; the block's call, what it is called with and returns there;
    where a static range must be found for every candidate, what the layers, which share their input, are given; and
    whether some of that is changed in place when the block runs on."""
    path = _common_parent([layer.name for layer in layers])
    while path and not _is_callable(work.block.get_submodule(path)):
        path = path.rpartition(".")[0]
    parent = work.block.get_submodule(path) if path else work.block
    found = _observe(work, layers, parent, copies=False)
    # What is changed in place after it was noted (``out = attention(x); out += x``) must be noted as a copy.
    changing = found is None
    observed, given = found or _observe(work, layers, parent, copies=True) or ([], [])
    return parent, observed, given, changing


def _observe(
    work: BlockWork, layers: Sequence[LayerWork], parent: nn.Module, *, copies: bool
) -> tuple[list[tuple[int, Call, Any]], list[torch.Tensor]] | None:
    """As :func:`_observed` for a ``parent``; None where without ``copies`` something was changed afterwards."""
    observed: list[tuple[int, Call, Any]] = []
    given: list[torch.Tensor] = []
    entered: list[Call] = []
    noted: list[tuple[Call, list[int]]] = []
    done = 0  # calls of the block

    def kept(call: Call) -> Call:
        if copies:
            return call.copied(None)
        noted.append((call, call.versions()))
        return call

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(kept(Call(args, kwargs)))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        observed.append((done, entered.pop(), kept(Call((output,))).args[0]))

    def note_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = kept(Call((args[0],))).args[0]
        given.append(work.counted(x, done) if isinstance(module, nn.Linear) else x)

    handles = [parent.register_forward_pre_hook(enter, with_kwargs=True)]
    handles.append(parent.register_forward_hook(leave, with_kwargs=True))
    if any(layer.scheme.has_static_inputs for layer in layers):
        handles.append(layers[0].dense.register_forward_pre_hook(note_input))
    try:
        for _ in work.run():
            done += 1
            if any(call.versions() != versions for call, versions in noted):
                return None
            noted.clear()
    finally:
        for handle in handles:
            handle.remove()
    return observed, given


def _common_parent(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    split = [name.split(".") for name in names]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _is_callable(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


@contextlib.contextmanager
def _tried(
    layers: Sequence[LayerWork],
    weights: Sequence[torch.Tensor],
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    given: Sequence[torch.Tensor],
    observer: ObserverConfig,
) -> Iterator[None]:
    """Inside, the layers compute as they will with ``shift`` and ``1 / scale`` on their inputs and rounded weights;
    static ranges are those of ``given``."""
    ranges: dict[Scheme, QParams] = {}
    with contextlib.ExitStack() as stack:
        for layer, weight in zip(layers, weights, strict=True):
            trial = LayerWork(layer.name, layer.dense, layer.scheme, act_pre_scale=1.0 / scale, act_pre_shift=shift)
            if layer.scheme.activation is not None and trial.needs_range:
                if layer.scheme not in ranges:
                    inputs = (prepared(shifted(x, trial), trial) for x in given)
                    ranges[layer.scheme] = observed_qparams(inputs, layer.scheme.activation, observer)
                trial.input_qparams = ranges[layer.scheme]
            rounded = _rounded(trial.as_codes_see_it(weight), layer.scheme.weight)
            stack.enter_context(seen_as_quantized(trial, rounded))
        yield


def _rounded(weight: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """fp32 [N, K] as it will be rounded if nothing clips it."""
    if _is_two_level(scheme):
        return dequantize(quantize(weight, scheme, RTNConfig()))
    return fake_quantize(weight, scheme)


def _is_two_level(scheme: WeightScheme) -> bool:
    return isinstance(scheme.granularity, TwoLevel)


def output_distance(a: Any, b: Any, counted: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Summed squared difference of the rows that count in all floating tensors of two outputs."""
    if isinstance(a, torch.Tensor):
        difference = counted(a.float() - b.float()) if a.is_floating_point() else torch.zeros(1)
        return float(difference.square().sum(dtype=torch.float64))
    if isinstance(a, dict):
        return sum(output_distance(a[key], b[key], counted) for key in a)
    if isinstance(a, tuple | list):
        return sum(output_distance(x, y, counted) for x, y in zip(a, b, strict=True))
    return 0.0


# --- ranges -----------------------------------------------------------------------------------------------------


def clip_weight(weight: torch.Tensor, rows: torch.Tensor, scheme: WeightScheme, steps: int) -> torch.Tensor:
    """``weight`` with each element of the granularity clamped to the range that lowers its share of the output error.

    Args:
        weight: fp32 [N, K]; overwritten.
        rows: fp32 [M, K], inputs.
        scheme: the format to reach.
        steps: ranges tried for each end: 1, 1 - 1/(2 steps), ..., about one half.

    Returns:
        fp32 [N, K].
    """
    chunk = max(1, _CHUNK_ELEMENTS // max(1, rows.shape[0] * scheme.num_groups(weight.shape[1])))
    for start in range(0, weight.shape[0], chunk):
        part = slice(start, start + chunk)
        weight[part] = _clip_rows(weight[part], rows, scheme, steps)
    return weight


def _clip_rows(weight: torch.Tensor, rows: torch.Tensor, scheme: WeightScheme, steps: int) -> torch.Tensor:
    groups = split_groups(weight, scheme)  # [n, G, g]
    x = split_groups(rows, scheme)  # [M, G, g]
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    exact = torch.einsum("ngk,mgk->ngm", groups, x)

    def error(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        # The whole weight, on the grid of that range: what lies beyond an end may have a code all the same.
        ranges = groups.clamp(low, high).reshape(weight.shape[0], -1)[:, : weight.shape[1]]
        rounded = split_groups(fake_quantize(weight, scheme, choose_qparams(ranges, scheme)), scheme)
        return (torch.einsum("ngk,mgk->ngm", rounded, x) - exact).square().mean(dim=-1, keepdim=True)

    best_low, best_high = low, high
    best = error(low, high)
    ends = ("both",) if scheme.symmetric else ("high", "low")
    for end in ends:
        base_low, base_high = best_low, best_high
        for step in range(1, steps):
            ratio = 1 - step / (2 * steps)
            trial_low = base_low * ratio if end in ("both", "low") else base_low
            trial_high = base_high * ratio if end in ("both", "high") else base_high
            found = error(trial_low, trial_high)
            better = found < best
            best = torch.where(better, found, best)
            best_low = torch.where(better, trial_low, best_low)
            best_high = torch.where(better, trial_high, best_high)
    return groups.clamp(best_low, best_high).reshape(weight.shape[0], -1)[:, : weight.shape[1]]
