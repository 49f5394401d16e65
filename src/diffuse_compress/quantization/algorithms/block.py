"""What a calibrated algorithm works on: one block, its layers, and the inputs it is run on.

An algorithm looks at the inputs of the layers (:meth:`BlockWork.collect`), decides, and writes its decisions into the
layers' :class:`LayerWork`: a smoothing scale, a low-rank branch, clipped weights, codes. What an earlier algorithm of
the same sequence decided is in there already. Ranges of static inputs are chosen between the two
(:meth:`BlockWork.observe_inputs`). Nothing here knows a class of diffusers or transformers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from diffuse_compress.calls import Autocast, Call, autocast_as, autocast_now
from diffuse_compress.errors import ModelStateError
from diffuse_compress.failures import failures_explained
from diffuse_compress.quantization.layer_base import LowRank
from diffuse_compress.quantization.numerics import fake_quantize_activation
from diffuse_compress.quantization.observers import Observer, ObserverConfig
from diffuse_compress.quantization.outlier_columns import outlier_columns
from diffuse_compress.quantization.packed import QuantizedWeight
from diffuse_compress.quantization.qparams import QParams
from diffuse_compress.quantization.rotation import rotate
from diffuse_compress.quantization.scheme import ActivationScheme, Scheme

__all__ = [
    "BlockWork",
    "Collector",
    "LayerWork",
    "PairCollector",
    "as_rows",
    "as_the_layer_sees_it",
    "mean_weight",
    "observed_qparams",
    "per_channel",
    "prepared",
    "row_weights",
    "shifted",
]

Dense = nn.Linear | nn.Conv2d


class Collector(Protocol):
    """Reduces a layer's inputs as they stream by."""

    def update(self, rows: torch.Tensor) -> None:
        """Take the input rows [M, K] of one call, in the layer's dtype."""


class PairCollector(Protocol):
    """Reduces a layer's inputs together with those that it has in the unchanged model."""

    def update(self, rows: torch.Tensor, references: torch.Tensor) -> None:
        """Take the input rows [M, K] of one call, as the layer sees them, and [M, K] of the unchanged model."""


@dataclass
class LayerWork:
    """A layer on its way to being quantized.

    Attributes:
        name: relative to the block; "" where the block is the layer itself.
        dense: the module, as it is in the block until it is replaced.
        scheme: the format to reach.
        act_pre_shift: fp32 [K] that is subtracted from the input of a linear, or None. All below, and every collector,
            sees the input after it; what it takes from the output goes into the bias.
        act_pre_scale: fp32 [K] (convolutions [C]) that multiplies the input, or None.
        low_rank: (down [r, K], up [N, r]) that is added, on the input before ``act_pre_scale``, or None.
        dense_columns: int64 [C], ascending, input columns of a linear that are to have no codes; or None.
        dense_weight: fp32 [N, C], their weights on the input before ``act_pre_scale``, once codes are decided.
        weight: fp32 [N, K] that the codes are to stand for; None is that of ``dense`` with the two above taken out,
            rotated where the scheme rotates inputs.
        quantized: codes, once decided.
        ranges: fp32 [N, K] whose smallest and largest values the codes are to span, in each element of the granularity;
            None leaves the choice to what chooses the codes.
        input_qparams: of a static input, scale [1] fp32 and zero point [1] int8 or None; None until they are chosen.
        observed_scale, observed_shift: the ``act_pre_scale`` and ``act_pre_shift`` they were chosen for.
    """

    name: str
    dense: Dense
    scheme: Scheme
    act_pre_scale: torch.Tensor | None = None
    act_pre_shift: torch.Tensor | None = None
    low_rank: LowRank | None = None
    dense_columns: torch.Tensor | None = None
    dense_weight: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    quantized: QuantizedWeight | None = None
    ranges: torch.Tensor | None = None
    input_qparams: QParams | None = None
    observed_scale: torch.Tensor | None = None
    observed_shift: torch.Tensor | None = None

    @property
    def needs_range(self) -> bool:
        """Its input is static, and no range was chosen yet, or for another ``act_pre_scale`` or ``act_pre_shift``."""
        if self.quantized is not None or not self.scheme.has_static_inputs:
            return False
        moved = self.observed_scale is not self.act_pre_scale or self.observed_shift is not self.act_pre_shift
        return self.input_qparams is None or moved

    @property
    def column_scale(self) -> torch.Tensor | None:
        """``act_pre_scale`` for each column of the flattened weight."""
        return None if self.act_pre_scale is None else self.per_column(self.act_pre_scale)

    def per_column(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale of the input's channels, [K] (convolutions [C]), for each column of the flattened weight."""
        if isinstance(self.dense, nn.Linear):
            return scale
        kernel = self.dense.kernel_size[0] * self.dense.kernel_size[1]
        return scale.reshape(self.dense.groups, -1)[0].repeat_interleave(kernel)

    def rest(self) -> torch.Tensor:
        """fp32 [N, K], a copy: the dense weight without the low-rank branch, on the input as it comes."""
        weight = self.dense.weight.detach().flatten(1).float()
        if self.low_rank is None:
            return weight.clone()
        down, up = self.low_rank
        return weight - up.float() @ down.float()

    def target(self) -> torch.Tensor:
        """fp32 [N, K], a copy: the weight that the codes are to stand for."""
        if self.weight is not None:
            return self.weight.clone()
        return self.as_codes_see_it(self.rest())

    def as_codes_see_it(self, weight: torch.Tensor) -> torch.Tensor:
        """fp32 [R, K], a weight on the input as it comes, on the one multiplied by ``act_pre_scale`` and rotated."""
        scale, rotation = self.column_scale, self.scheme.input_rotation
        if scale is not None:
            weight = weight / scale
        return weight if rotation is None else rotate(weight, rotation)


@dataclass
class BlockWork:
    """A block with its layers and inputs.

    Attributes:
        name: qualified name of the block, for messages.
        block: the module, on the device it is calibrated on; layers that are done have been replaced in it.
        calls: arguments it is run with; :meth:`run` and :meth:`collect` move them to ``device`` one by one.
        layers: layers to quantize by name relative to the block, in the order they run in.
        generators: {layer: source of its random numbers}.
        install: puts the layer's quantized form in its place in the block.
        device: of the block; None is where the calls are.
        weights: for each call how much it counts: a number, or one for each row of its hidden states. Rows of weight 0
            are padding: no algorithm looks at them (:meth:`counted`).
        unchanged: the block as it was (``twin.py``), if the algorithm ``needs_reference``.
        references: for each call the arguments that ``unchanged`` has in a model of which nothing was changed; None,
            the same as ``calls``.
        samples: for each call the number of its sample and what else tells it, for messages; None, the calls' numbers.
        observer: chooses the ranges of static inputs.
        change: sets a parameter of the block, by its name, so that a failure undoes it; None, where nothing but the
            layers may change.
        folds: whether scales are folded into what precedes the layers where a config does not say (``folding.py``).
        depth: share of the model's blocks that come before it, in [0, 1).
        shared: ids of the parameters that the model has under several names: they stay.
        autocast: that the model is run in; what algorithms compute themselves is not cast.
        reached, folded: what ``folding.py`` has found, and decided.
    """

    name: str
    block: nn.Module
    calls: Sequence[Call]
    layers: dict[str, LayerWork]
    generators: Callable[[str], torch.Generator]
    install: Callable[[LayerWork], nn.Module]
    device: torch.device | None = None
    weights: Sequence[float | torch.Tensor] | None = None
    unchanged: nn.Module | None = None
    references: Sequence[Call] | None = None
    samples: Sequence[int | str] | None = None
    observer: ObserverConfig = field(default_factory=ObserverConfig)
    change: Callable[[str, torch.Tensor], None] | None = None
    folds: bool = False
    depth: float = 0.0
    shared: frozenset[int] = frozenset()
    autocast: Autocast = field(default_factory=autocast_now)
    reached: dict[str, set[str]] | None = field(default=None, repr=False)
    folded: dict[tuple[str, ...], Any] = field(default_factory=dict, repr=False)

    @property
    def entries(self) -> dict[str, list[tuple[Any, ...]]]:
        """{layer that the first call reaches: which tensor it is given, each time}, in the order they run in."""
        return self._traced[0]

    @property
    def works_in_place(self) -> bool:
        """Whether the block changes what it or a layer was given (``x += ...``): what is kept must be copied."""
        return self._traced[1]

    @functools.cached_property
    def _traced(self) -> tuple[dict[str, list[tuple[Any, ...]]], bool]:
        return self._trace()

    @functools.cached_property
    def subsets(self) -> list[tuple[str, ...]]:
        """Layers that are given the same tensor, together; in the order they run in."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, (first, *_) in self.entries.items():
            groups.setdefault(first, []).append(name)
        return [tuple(names) for names in groups.values()]

    def collect(
        self, collectors: Mapping[str, Collector], *, quantized_inputs: bool = False, weighted: bool = False
    ) -> None:
        """Run the block on every call, and give each layer's input rows to its collector.

        Args:
            collectors: by layer name.
            quantized_inputs: multiply by ``act_pre_scale`` and round as the layer's scheme will; the collectors then
                see what the codes of the weight will be multiplied with.
            weighted: multiply each row by the square root of its weight, for sums of products of rows.

        Raises:
            ModelStateError: an input is not finite; the message names layer and sample.
        """

        def give(name: str, index: int, x: torch.Tensor) -> None:
            layer = self.layers[name]
            rows = as_rows(layer.dense, as_the_layer_sees_it(x, layer) if quantized_inputs else x)
            rows = self._weighted(rows, index) if weighted else self.counted(rows, index)
            if rows.shape[0]:
                collectors[name].update(rows)

        with self._hooked(self.block, collectors, give) as run, torch.no_grad():
            for index, call in enumerate(self.calls):
                run(index, call)

    def observe_inputs(self) -> None:
        """Choose the ranges of static inputs that are due, as the layers will see these: smoothed and rotated.

        The block is run once, as it is now. A layer that no call reaches can have no range; its inputs are to be
        quantized dynamically then.

        Raises:
            ModelStateError: an input is not finite; the message names layer and sample.
        """
        due = [name for name, layer in self.layers.items() if layer.needs_range]
        if not due:
            return
        owner = self._seeing_alike(due)
        observers: dict[str, Observer] = {}

        def give(name: str, index: int, x: torch.Tensor) -> None:
            layer = self.layers[name]
            x = self.counted(x, index) if isinstance(layer.dense, nn.Linear) else x
            x = _without_dense_columns(x, layer)
            if x.numel() and layer.scheme.activation is not None:
                if name not in observers:
                    observers[name] = self.observer.make(layer.scheme.activation)
                observers[name].update(prepared(x, layer))

        with self._hooked(self.block, dict.fromkeys(owner.values()), give) as run, torch.no_grad():
            for index, call in enumerate(self.calls):
                run(index, call)
        found = {name: observer.qparams() for name, observer in observers.items()}
        for name in due:
            layer, qparams = self.layers[name], found.get(owner[name])
            if qparams is None:
                layer.scheme = layer.scheme.with_dynamic_inputs()
            else:
                layer.input_qparams = _copied(qparams, layer.dense.weight.device)
                layer.observed_scale, layer.observed_shift = layer.act_pre_scale, layer.act_pre_shift

    def _seeing_alike(self, names: Iterable[str]) -> dict[str, str]:
        """{layer: the first one that quantizes the very same values}."""
        group_of = {name: index for index, group in enumerate(self.subsets) for name in group}
        first: dict[tuple[Any, ...], str] = {}
        owner = {}
        for name in names:
            layer = self.layers[name]
            moved = [
                None if one is None else tuple(one.tolist())
                for one in (layer.act_pre_scale, layer.act_pre_shift, layer.dense_columns)
            ]
            seen = (group_of.get(name, name), *moved, layer.scheme.input_rotation, layer.scheme.activation)
            owner[name] = first.setdefault(seen, name)
        return owner

    def collect_pairs(self, collectors: Mapping[str, PairCollector]) -> None:
        """As :meth:`collect` with quantized and weighted inputs, and beside them those of the unchanged model.

        These are multiplied by ``act_pre_scale``, so that both stand before the same weight, but not rounded.

        Raises:
            ModelStateError: an input is not finite; the message names layer and sample.
        """
        kept: dict[str, list[torch.Tensor]] = {}

        def keep(name: str, index: int, x: torch.Tensor) -> None:
            layer = self.layers[name]
            rows = as_rows(layer.dense, prepared(x, layer))
            kept.setdefault(name, []).append(rows.clone() if self.works_in_place else rows)

        def give(name: str, index: int, x: torch.Tensor) -> None:
            layer = self.layers[name]
            rows = as_rows(layer.dense, as_the_layer_sees_it(x, layer))
            waiting = kept.get(name)
            reference = waiting.pop(0) if waiting else rows
            # A router may have sent other rows here.
            reference = reference if reference.shape == rows.shape else rows
            if self.counted(rows, index).shape[0]:
                collectors[name].update(self._weighted(rows, index), self._weighted(reference, index))

        with (
            self._hooked(self.block, collectors, give) as run,
            self._hooked(self.reference_block, collectors, keep) as run_reference,
            torch.no_grad(),
        ):
            for index, (call, reference) in enumerate(zip(self.calls, self.reference_calls, strict=True)):
                kept.clear()
                run_reference(index, reference)
                run(index, call)

    @property
    def reference_block(self) -> nn.Module:
        """``unchanged``, which the caller has to have given."""
        assert self.unchanged is not None, "the algorithm's config must say needs_reference"
        return self.unchanged

    @property
    def reference_calls(self) -> Sequence[Call]:
        """``references``, or ``calls``."""
        return self.calls if self.references is None else self.references

    def here(self, call: Call) -> Call:
        """``call`` on the block's device, to be run once."""
        if self.works_in_place:
            return call.copied(self.device)
        return call if self.device is None else call.to(self.device)

    def forward(self, module: nn.Module, call: Call) -> Any:
        """What ``module``, the block or a part of it, returns for ``call``, with the caller's :attr:`autocast`."""
        with autocast_as(self.autocast):
            return self.here(call).run(module)

    def run(self) -> Iterable[Any]:
        """What the block returns for each call, as it is now."""
        with torch.no_grad():
            for index in range(len(self.calls)):
                yield self.run_call(index)

    def run_call(self, index: int) -> Any:
        """What the block returns for one call, as it is now.

        Raises:
            ConfigError: it raises; the message names block and sample.
        """
        with self._failures_explained(index):
            return self.forward(self.block, self.calls[index])

    def _failures_explained(self, index: int) -> contextlib.AbstractContextManager[None]:
        return failures_explained(f"sample {self.sample(index)} cannot be run through {self.name}")

    def sample(self, index: int) -> int | str:
        """The sample that a call is of, for messages."""
        return index if self.samples is None else self.samples[index]

    def full_name(self, layer: str) -> str:
        """Qualified name of a layer, or of what else is in the block."""
        return ".".join(part for part in (self.name, layer) if part)

    def weight(self, index: int) -> float:
        """How much a call counts, the mean of its rows that do."""
        return 1.0 if self.weights is None else mean_weight(self.weights[index])

    def counted(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Rows [M, K] of a tensor [..., K] of a call without those of weight 0; ``x`` if it has other rows."""
        weight = self._row_weights(x, index)
        return x if weight is None or bool((weight > 0).all()) else x.flatten(0, -2)[weight > 0]

    def _row_weights(self, x: torch.Tensor, index: int) -> torch.Tensor | None:
        return None if self.weights is None else row_weights(self.weights[index], x)

    def _weighted(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        """``rows`` times the square root of their weights; rows of another number than the weights count alike."""
        weight = self._row_weights(rows, index)
        if weight is not None:
            return self.counted(rows, index) * weight[weight > 0].reshape(-1, 1).sqrt()
        factor = self.weight(index)
        return rows if factor == 1.0 else rows * factor**0.5

    def _module(self, name: str) -> nn.Module:
        return self.block.get_submodule(name) if name else self.block

    @contextlib.contextmanager
    def _hooked(
        self, block: nn.Module, layers: Iterable[str], give: Callable[[str, int, torch.Tensor], None]
    ) -> Iterator[Callable[[int, Call], None]]:
        """Inside, what is yielded runs ``block`` on a call, and gives ``give(layer, number of the call, input)``, of
        the input what ``act_pre_shift`` leaves.

        A run ends where the last of the layers has its input: nothing behind that is looked at.
        """
        names, now, awaited = list(layers), {"call": 0}, set[str]()
        stops = bool(names) and all(len(self.entries.get(name, ())) == 1 for name in names)

        def hook(name: str) -> Callable[..., None]:
            def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                x = args[0].detach()
                if not torch.isfinite(x).all():
                    raise ModelStateError(
                        f"{self.full_name(name)}: calibration needs finite inputs, got inf or nan in sample "
                        f"{self.sample(now['call'])}. {_why_not_finite(x.dtype)}, or leave the sample out."
                    )
                give(name, now["call"], shifted(x, self.layers[name]))
                awaited.discard(name)
                if stops and not awaited:
                    raise _Enough

            return enter

        def run(index: int, call: Call) -> None:
            now["call"] = index
            awaited.update(names)
            with contextlib.suppress(_Enough), self._failures_explained(index):
                self.forward(block, call)

        handles = []
        try:
            for name in names:
                module = block.get_submodule(name) if name else block
                handles.append(module.register_forward_pre_hook(hook(name)))
            yield run
        finally:
            for handle in handles:
                handle.remove()

    def _trace(self) -> tuple[dict[str, list[tuple[Any, ...]]], bool]:
        """One run that tells who reads what, and whether inputs are changed; they are held meanwhile, so that no
        address is used twice."""
        found: dict[str, list[tuple[Any, ...]]] = {}
        given = self.calls[0].copied(self.device)
        held = [(given, given.versions())]

        def note(name: str) -> Callable[..., None]:
            def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                x, entered = args[0], Call(args)
                held.append((entered, entered.versions()))
                # One that was changed since is another input.
                found.setdefault(name, []).append((x.data_ptr(), *entered.versions(), x.shape, x.stride()))

            return enter

        handles = [self._module(name).register_forward_pre_hook(note(name)) for name in self.layers]
        try:
            with torch.no_grad(), self._failures_explained(0):
                given.run(self.block)
        finally:
            for handle in handles:
                handle.remove()
        return found, any(call.versions() != versions for call, versions in held)


def _why_not_finite(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return "The model overflows on it in float16: load it in bfloat16 or float32"
    return "Check the sample and the checkpoint for inf and nan"


class _Enough(BaseException):
    """Ends a forward of which nothing more is needed. No Exception: a model may catch those."""


def mean_weight(weight: float | torch.Tensor) -> float:
    """How much a call counts: its weight, or the mean of those of its rows that do."""
    if not isinstance(weight, torch.Tensor):
        return weight
    return float(weight.sum() / (weight > 0).sum().clamp(min=1))


def row_weights(weight: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """fp32 [M], on the device of a tensor [..., K] with M rows; None where rows have no weights of their own."""
    if not isinstance(weight, torch.Tensor) or weight.numel() != x.shape[:-1].numel():
        return None
    return weight.to(x.device, torch.float32).reshape(-1)


def as_rows(layer: Dense, x: torch.Tensor) -> torch.Tensor:
    """Input of a linear or convolution as the matrix [M, K] that its flattened weight [N, K] is multiplied with.

    Grouped convolutions have one such matrix for each group; the rows of all groups are stacked.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        pads = layer._reversed_padding_repeated_twice
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = nn.functional.pad(x, pads, mode=mode), (0, 0)
    else:
        padding = layer.padding
    columns = nn.functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    batch, _, places = columns.shape
    depth = columns.shape[1] // layer.groups
    return columns.reshape(batch, layer.groups, depth, places).transpose(2, 3).reshape(-1, depth)


def per_channel(layer: Dense, columns: torch.Tensor, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    """[K] values of a flattened weight's columns as [C] values of the input's channels."""
    if isinstance(layer, nn.Linear):
        return columns
    kernel = layer.kernel_size[0] * layer.kernel_size[1]
    return reduce(columns.reshape(-1, kernel), dim=1)


def shifted(x: torch.Tensor, layer: LayerWork) -> torch.Tensor:
    """Input ``x`` less ``act_pre_shift``, in its dtype."""
    return x if layer.act_pre_shift is None else (x.float() - layer.act_pre_shift).to(x.dtype)


def prepared(x: torch.Tensor, layer: LayerWork) -> torch.Tensor:
    """Input ``x``, shifted already, multiplied by ``act_pre_scale`` and rotated, in its dtype."""
    if layer.act_pre_scale is not None:
        shape = (-1,) if isinstance(layer.dense, nn.Linear) else (-1, 1, 1)
        x = (x.float() * layer.act_pre_scale.reshape(shape)).to(x.dtype)
    return x if layer.scheme.input_rotation is None else rotate(x, layer.scheme.input_rotation)


def as_the_layer_sees_it(x: torch.Tensor, layer: LayerWork) -> torch.Tensor:
    """Input ``x``, shifted already, as its codes stand for it: multiplied by ``act_pre_scale``, rotated and rounded, in
    its dtype.

    Of a static scheme, the grid of ``input_qparams``, which must have been chosen. What codes do not multiply, in dense
    columns and in those over an ``outlier_threshold``, is left as it is.
    """
    scheme, given = layer.scheme.activation, x
    if scheme is None:
        return prepared(x, layer)
    columns = layer.dense_columns
    if scheme.outlier_threshold is not None:
        columns = outlier_columns(x, scheme.outlier_threshold).nonzero().flatten()
    if columns is not None and columns.numel():
        rounded = _rounded(prepared(x.index_fill(-1, columns, 0), layer), layer, scheme)
        return rounded.index_copy(-1, columns, prepared(given, layer).index_select(-1, columns))
    return _rounded(prepared(x, layer), layer, scheme)


def _rounded(x: torch.Tensor, layer: LayerWork, scheme: ActivationScheme) -> torch.Tensor:
    if scheme.dynamic:
        return fake_quantize_activation(x, scheme, feature_dims=1 if isinstance(layer.dense, nn.Linear) else 3)
    assert layer.input_qparams is not None, "BlockWork.observe_inputs() comes first"
    return fake_quantize_activation(x, scheme, layer.input_qparams.scale, layer.input_qparams.zero_point)


def _without_dense_columns(x: torch.Tensor, layer: LayerWork) -> torch.Tensor:
    return x if layer.dense_columns is None else x.index_fill(-1, layer.dense_columns, 0)


def observed_qparams(inputs: Iterable[torch.Tensor], scheme: ActivationScheme, observer: ObserverConfig) -> QParams:
    """What ``observer`` chooses for a static scheme and these inputs, prepared already; on the device of the last.

    Raises:
        ModelStateError: there are no values, or some are not finite.
    """
    found, device = observer.make(scheme), torch.device("cpu")
    for x in inputs:
        found.update(x)
        device = x.device
    return _copied(found.qparams(), device)


def _copied(qparams: QParams, device: torch.device) -> QParams:
    """Layers must not share memory, or they could not be saved."""
    zero_point = None if qparams.zero_point is None else qparams.zero_point.to(device, copy=True)
    return QParams(qparams.scale.to(device, copy=True), zero_point)
