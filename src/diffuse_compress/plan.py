"""The plan: what compress would do to every parameter, in bytes, before any weight is touched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffuse_compress.assignment import (
    LayerAssignment,
    assign_layers,
    require_patterns_match,
    resolve_rules,
    split_layers,
    stock_name,
    unsupported_bytes,
    unsupported_kind,
)
from diffuse_compress.components import compute_dtype_of, model_components, resolve_names
from diffuse_compress.errors import CompressionConflictError, ConfigError, ModelStateError
from diffuse_compress.families.registry import residual_stream_of
from diffuse_compress.integrations.attention import require_attention
from diffuse_compress.integrations.component import foreign_quantization, get_state
from diffuse_compress.integrations.placement import require_own_weights
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.method_plan import MethodPlan, plan_methods
from diffuse_compress.patterns import generalize, matches, require_match
from diffuse_compress.plan_text import format_bytes, render_plan
from diffuse_compress.quantization.dispatch import require_device
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear
from diffuse_compress.quantization.residual import ResidualStream
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.quantization.spec import QuantizationSpec, resolve_scheme
from diffuse_compress.quantization.split import HIDDEN, SKIP
from diffuse_compress.recipe import MethodConfig, Recipe, weights_among
from diffuse_compress.temporal.config import TFMQConfig

__all__ = ["ComponentPlan", "CompressionPlan", "PlanRow", "make_plan", "stored_bytes", "tensor_rows"]


@dataclass(frozen=True)
class PlanRow:
    """One tensor of a component's state dict.

    Attributes:
        parameter: its key, e.g. ``transformer_blocks.0.attn1.to_q.weight``.
        layer: the module that owns it.
        shape: as stored in the dense model.
        role: the layer's part in the model, or "" for anything but linears and convolutions.
        scheme: name of the format it gets ("w4a8"), or None if kept.
        bytes_before: now, in its present dtype.
        bytes_after: as written to disk and held in memory afterwards, scales included.
        reason: why it is kept, or "".
    """

    parameter: str
    layer: str
    shape: tuple[int, ...]
    role: str
    scheme: str | None
    bytes_before: int
    bytes_after: int
    reason: str


class ComponentPlan:
    """Plan of one component. ``assigned`` holds the decisions, ``rows`` what they mean for every tensor.

    Where a method takes care of the timestep path, ``path`` holds its layers: those that are to be converted are
    ``path_layers``, what becomes of them follows from ``path_work`` (maintenance, steps of learning), and the
    component's algorithm has the others, ``own_layers``. Once the plan was carried out, ``made_dynamic`` names layers
    that could not get the static input scale planned for them.
    """

    def __init__(self, name: str, model: nn.Module, config: QuantizationConfig) -> None:
        self.name, self.class_name = name, type(model).__name__
        self._model, self.request = model, config
        self.made_dynamic: list[str] = []
        self.path: frozenset[str] = frozenset()
        self.path_work: tuple[str, int] = ("", 0)
        self._found = slice(0, 0)  # of the overrides, those that `assign` added
        self.spec: QuantizationSpec = config.spec
        self._refresh()

    def _refresh(self) -> None:
        self.assigned: dict[str, LayerAssignment] = assign_layers(self._model, self.spec)
        self._splittable = split_layers(self._model) if self.spec.split_skips else {}
        self.rows = list(tensor_rows(self._model, self.assigned))
        self.residual = self._residual_stream() if self.spec.algorithm.rotates_residual else None

    def _residual_stream(self) -> ResidualStream:
        if self.name:
            raise ConfigError(
                f"{self.name}: {self.spec.algorithm.summary} changes hidden states, which a pipeline reads. "
                "QuaRotConfig() without residual=True rotates any linear's input."
            )
        stream = residual_stream_of(self._model)
        head = self._model.get_submodule(stream.head).weight
        if head is self._model.get_submodule(stream.embedding).weight:
            assert isinstance(head, torch.Tensor)
            size = head.numel() * head.element_size()
            reason = "a weight of its own: the rotation differs from the embedding's by the last norm"
            self.rows.append(
                PlanRow(f"{stream.head}.weight", stream.head, tuple(head.shape), "", None, 0, size, reason)
            )
        return stream

    def edit(self, pattern: str, scheme: Scheme | None) -> None:
        """Give every layer matching ``pattern`` this scheme, or None to keep it."""
        if self.spec.rules is not None:
            start = self.spec.label
            raise ConfigError(
                f"{self.name or self.class_name}: this plan follows a resolved recipe, which fixes every layer. To "
                f'edit, plan from the preset: compression_plan("{start}").'
            )
        before = self.spec
        self.spec = dataclasses.replace(before, overrides=(*before.overrides, (pattern, scheme)))
        try:
            self._refresh()
            blocked = [
                name
                for name, item in self.assigned.items()
                if scheme is not None and matches(pattern, name) and item.scheme is None
            ]
            if blocked:
                reason = self.assigned[blocked[0]].reason
                raise ConfigError(f"plan.set({pattern!r}): {blocked[0]} cannot be converted: {reason}.")
        except Exception:
            self.spec = before
            self._refresh()
            raise

    def assign(self, schemes: Mapping[str, Scheme | None]) -> None:
        """Give each of these layers its own format, None for dense: what a search decided, as few exact patterns."""
        chosen: dict[str, Scheme | str | None] = {}
        for name, item in self.assigned.items():
            changed = name in schemes and schemes[name] != item.scheme
            chosen[stock_name(name)] = (schemes[name] or "dense") if changed else None
        rules = [(pattern, None if value == "dense" else value) for pattern, value in generalize(chosen)]
        start = len(self.spec.overrides)
        self._found = slice(start, start + len(rules))
        self.spec = dataclasses.replace(self.spec, overrides=(*self.spec.overrides, *rules))  # type: ignore[arg-type]
        self._refresh()

    def assigned_bytes(self, layer: str) -> int:
        """Bytes of a layer's weight as planned."""
        return sum(row.bytes_after for row in self.rows if row.layer == layer and row.parameter.endswith(".weight"))

    @property
    def bits_per_weight(self) -> float:
        """Average over the layers that are converted, scales included."""
        rows = [row for row in self.rows if row.scheme is not None]
        return 8 * sum(row.bytes_after for row in rows) / sum(math.prod(row.shape) for row in rows)

    @property
    def asked(self) -> QuantizationSpec:
        """Without what a search found: what was asked for, and edits."""
        overrides = list(self.spec.overrides)
        del overrides[self._found]
        return dataclasses.replace(self.spec, overrides=tuple(overrides))

    @property
    def resolved_config(self) -> QuantizationConfig:
        """The config with the layers it came to."""
        return QuantizationConfig.from_spec(self.spec.resolved(resolve_rules(self.assigned)), self.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of what stays dense, and of the layers' inputs."""
        return compute_dtype_of(self._model)

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @property
    def unsupported(self) -> tuple[str, float] | None:
        """(class names, share of ``bytes_after``) of weights for which there is no quantized layer; None below half."""
        found = unsupported_bytes(self._model)
        share = sum(found.values()) / max(1, self.bytes_after)
        return (", ".join(sorted(found)), share) if share > 0.5 else None

    @property
    def needs_calibration(self) -> bool:
        """The algorithm, or a static input scale of some layer, follows from inputs."""
        own = self.own_layers
        static = any(scheme.has_static_inputs for scheme in own.values())
        return static or (self.spec.algorithm.needs_calibration and bool(own))

    def take_over(self, schemes: Mapping[str, Scheme]) -> None:
        """The formats that layers were given by what the data said: no sample reached one that was to have static
        inputs, or an algorithm chose the granularity."""
        for name, scheme in schemes.items():
            item = self.assigned[name]
            if item.scheme is not None and item.scheme.has_static_inputs and not scheme.has_static_inputs:
                self.made_dynamic.append(name)
            self.assigned[name] = dataclasses.replace(item, scheme=scheme)

    @property
    def layers(self) -> dict[str, Scheme]:
        """Layers to convert, in order."""
        return {name: item.scheme for name, item in self.assigned.items() if item.scheme is not None}

    @property
    def path_layers(self) -> dict[str, Scheme]:
        """Those of them that are quantized as parts of the timestep path."""
        return {name: scheme for name, scheme in self.layers.items() if name in self.path}

    @property
    def splits(self) -> dict[str, int]:
        """{convolution: input channels of its first part} of those whose parts are converted."""
        layers, found = self.layers, self._splittable
        return {name: at for name, at in found.items() if f"{name}.{HIDDEN}" in layers or f"{name}.{SKIP}" in layers}

    @property
    def own_layers(self) -> dict[str, Scheme]:
        """Those of them that the component's algorithm quantizes."""
        return {name: scheme for name, scheme in self.layers.items() if name not in self.path}


class CompressionPlan:
    """What ``compress`` would do: editable, printable, and itself an argument of ``compress``.

    Attributes:
        components: {name: ComponentPlan}; a bare model's name is "".
        unchanged: components that already carry this very configuration.
        untouched: {name: bytes} of models that this plan leaves alone.
        methods: plans of the methods beside weights, in the order in which they are carried out.
        calibration: a Calibration, or items to record one from, for the components whose algorithm needs it, and for
            feature caches.
        search: what a search for the layers' formats was asked for and looked at, in words; "" without one.
        search_bytes: ``bytes_after`` that it was to meet, or None.
        edited: whether ``set`` or ``keep`` was called since.
        sensitivity: what it looked at, or None.
    """

    def __init__(
        self,
        target: Any,
        components: dict[str, ComponentPlan],
        unchanged: list[str],
        untouched: dict[str, int],
        device: torch.device,
        methods: Iterable[MethodPlan] = (),
    ) -> None:
        self.methods = list(methods)
        self.target_class = type(target).__name__
        self.components, self.unchanged, self.untouched = components, unchanged, untouched
        self.device = device
        self.calibration: Any = None
        self.search = ""
        self.search_bytes: int | None = None
        self.edited = False
        self.sensitivity: Any = None
        self._target = target

    def set(self, pattern: str, scheme: str | Scheme, component: str | None = None) -> CompressionPlan:
        """Give every layer matching ``pattern`` this preset or Scheme, whatever its role. Returns self.

        Raises:
            ConfigError: the pattern matches nothing, or a matched layer cannot be converted.
            IncompatibleShapeError: the scheme does not fit a layer's shape.
        """
        self._edit(pattern, resolve_scheme(scheme), component)
        return self

    def keep(self, pattern: str, component: str | None = None) -> CompressionPlan:
        """Leave every layer matching ``pattern`` as it is. Returns self."""
        self._edit(pattern, None, component)
        return self

    def _edit(self, pattern: str, scheme: Scheme | None, component: str | None) -> None:
        chosen = [self.components[component]] if component in self.components else list(self.components.values())
        if component is not None and component not in self.components:
            raise ConfigError(f"plan: no component {component!r}; it has {', '.join(self.components) or 'none'}.")
        edits = []
        for part in chosen:
            if part.name and pattern == part.name:
                if scheme is None:
                    raise ConfigError(
                        f'plan.keep({pattern!r}): that is a whole component. Plan without it: {{"{pattern}": None}}.'
                    )
                edits.append((part, "re:.*"))
                continue
            own = pattern.removeprefix(f"{part.name}.") if part.name else pattern
            if any(matches(own, name) for name in part.assigned):
                edits.append((part, own))
        if not edits:
            names = {f"{part.name}.{name}" if part.name else name for part in chosen for name in part.assigned}
            require_match([pattern], names, "plan")
            raise ConfigError(f"plan: pattern {pattern!r} matches no layer; write it without the component's name.")
        for part, own in edits:
            part.edit(own, scheme)
        self.edited = True

    def follow(self, other: CompressionPlan) -> None:
        """This was planned anew by what ``other`` asks for: formats that a search found there are here, too."""
        self.search, self.search_bytes, self.edited = other.search, other.search_bytes, other.edited
        self.sensitivity = other.sensitivity
        for name in self.components.keys() & other.components.keys():
            self.components[name]._found = other.components[name]._found

    @property
    def rows(self) -> list[PlanRow]:
        """Rows of all planned components."""
        return [row for part in self.components.values() for row in part.rows]

    @property
    def bytes_before(self) -> int:
        """Bytes of the planned components now."""
        return sum(part.bytes_before for part in self.components.values())

    @property
    def bytes_after(self) -> int:
        """Bytes of the planned components afterwards."""
        return sum(part.bytes_after for part in self.components.values())

    @property
    def outcome(self) -> str:
        """``search``, and what became of it where the plan was edited afterwards; "" without a search."""
        if not self.search or not self.edited:
            return self.search
        over = self.bytes_after - (self.search_bytes or self.bytes_after)
        return f"{self.search}; edited since" + (f", now {format_bytes(over)} over that" if over > 0 else "")

    def request(self, *, found: bool = True) -> Recipe:
        """What was asked for, edits included, before it was resolved: plans anew on another or changed model.

        ``found=False`` leaves out the formats that a search found, for another one.
        """
        specs = {name: part.spec if found else part.asked for name, part in self.components.items()}
        return self._recipe({name: QuantizationConfig.from_spec(spec) for name, spec in specs.items()})

    def recipe(self) -> Recipe:
        """The resolved recipe of this plan."""
        return self._recipe({name: part.resolved_config for name, part in self.components.items()})

    def _recipe(self, weights: Mapping[str, QuantizationConfig]) -> Recipe:
        names = dict.fromkeys([*weights, *(method.component for method in self.methods)])
        parts: dict[str, tuple[MethodConfig, ...]] = {}
        for name in names:
            own = tuple(method.config for method in self.methods if method.component == name)
            parts[name] = (*((weights[name],) if name in weights else ()), *own)
        return Recipe(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: {"components": {name: {"class", "config", "bytes_before", "bytes_after", "rows"}}, ...}."""
        return {
            "target": self.target_class,
            "device": str(self.device),
            "components": {
                name: {
                    "class": part.class_name,
                    "config": part.resolved_config.to_dict(),
                    "bytes_before": part.bytes_before,
                    "bytes_after": part.bytes_after,
                    "rows": [dataclasses.asdict(row) for row in part.rows],
                }
                for name, part in self.components.items()
            },
            "methods": [method.to_dict() for method in self.methods],
            "unchanged": list(self.unchanged),
            "untouched": dict(self.untouched),
        }

    def __str__(self) -> str:
        return render_plan(self)

    __repr__ = __str__


def make_plan(target: Any, recipe: Recipe, device: torch.device | None = None) -> CompressionPlan:
    """Resolve a recipe on a pipeline or model; works on the meta device.

    Raises:
        ConfigError: unknown component, group or pattern; nothing to convert.
        CompressionConflictError: a component carries another configuration of the same kind.
        ModelStateError: a component was quantized by another library, is cast by hooks, or has fused projections.
        UnsupportedHardwareError: the device cannot hold a scheme's dtype.
    """
    models = model_components(target)
    wanted: dict[str, tuple[MethodConfig, ...]] = {}
    for key, names in resolve_names(recipe.components, target).items():
        for name in names:
            exact = key == name
            if exact or name not in wanted:
                wanted[name] = recipe.components[key]
    given: dict[str, QuantizationConfig] = {}
    others: dict[str, list[Any]] = {}
    for name, configs in wanted.items():
        weights = weights_among(configs)
        if len(weights) > 1:
            raise ConfigError(f"{name}: {len(weights)} configurations of kind 'weights'; a component takes one.")
        if weights:
            given[name] = weights[0]
        others[name] = [config for config in configs if not isinstance(config, QuantizationConfig)]
    unchanged = [name for name, config in given.items() if _is_present(name, models[name], config)]
    todo = {name: config for name, config in given.items() if name not in unchanged}
    _check_patterns(todo, models)
    parts = {name: ComponentPlan(name, models[name], config) for name, config in todo.items()}
    device = device or _device_of(models)
    if device.type == "meta":
        raise ConfigError(
            "compress: device= must hold data, got 'meta'. Name the device that is to compute, e.g. 'cuda'."
        )
    for part in parts.values():
        if part.spec.attention is not None:
            require_attention(models[part.name])
        for scheme in set(part.layers.values()):
            require_device(scheme, device)
    methods, present = plan_methods(target, models, others, {name: part.layers for name, part in parts.items()})
    for method in methods:
        part = parts.get(method.component)
        if part is None or not isinstance(method.config, TFMQConfig):
            continue
        # Tables alone leave the choice of codes to the algorithm, but for one that would fit them to its samples.
        if method.config.learns or part.spec.algorithm.reconstructs_blocks:
            part.path = method.layers
            part.path_work = (method.config.maintenance.value, method.config.iterations)
    rest = {name: stored_bytes(model) for name, model in models.items() if name not in parts and name not in unchanged}
    return CompressionPlan(target, parts, [*unchanged, *present], rest, device, methods)


def tensor_rows(model: nn.Module, assigned: dict[str, LayerAssignment]) -> Iterator[PlanRow]:
    """A row for every tensor that a checkpoint of ``model`` would hold; shared tensors once."""
    modules = dict(model.named_modules())
    persistent = set(model.state_dict(keep_vars=True))
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in persistent}
    for key, tensor in [*model.named_parameters(), *buffers.items()]:
        layer, _, leaf = key.rpartition(".")
        parts = [part for part in (f"{layer}.{HIDDEN}", f"{layer}.{SKIP}") if part in assigned]
        if leaf == "weight" and parts:
            yield from _part_rows(tensor, parts, assigned)
            continue
        item = assigned.get(parts[0] if parts else layer)
        before = tensor.numel() * tensor.element_size()
        role = item.role.value if item is not None else ""
        if item is not None and item.scheme is not None and leaf == "weight":
            after = item.scheme.weight_bytes(item.shape) + item.extra_bytes
            yield PlanRow(key, layer, tuple(tensor.shape), role, item.scheme.name, before, after, "")
            continue
        reason = _kept_reason(leaf, tensor, modules[layer], item, key in buffers)
        yield PlanRow(key, layer, tuple(tensor.shape), role, None, before, before, reason)


def _part_rows(
    tensor: torch.Tensor, parts: Iterable[str], assigned: Mapping[str, LayerAssignment]
) -> Iterator[PlanRow]:
    """Rows of a convolution's weight that will be split, one for each part."""
    for part in parts:
        item = assigned[part]
        columns = item.shape[1] // tensor.shape[2:].numel()
        shape = (tensor.shape[0], columns, *tensor.shape[2:])
        before = math.prod(shape) * tensor.element_size()
        after = before if item.scheme is None else item.scheme.weight_bytes(item.shape) + item.extra_bytes
        name = None if item.scheme is None else item.scheme.name
        yield PlanRow(f"{part}.weight", part, shape, item.role.value, name, before, after, item.reason)


def _kept_reason(
    leaf: str, tensor: torch.Tensor, module: nn.Module, item: LayerAssignment | None, is_buffer: bool
) -> str:
    if is_buffer:
        return "buffer"
    if isinstance(module, QuantizedLinear | QuantizedConv2d):
        return f"already {module.scheme.name}"
    if item is not None:
        return item.reason if leaf == "weight" and item.reason else leaf
    if isinstance(module, nn.Embedding):
        return "embedding table"
    kind = type(module).__name__
    if "norm" in kind.lower():
        return "normalization"
    return f"{kind}: no quantized layer for it" if unsupported_kind(module, tensor) else f"parameter of {kind}"


def _check_patterns(configs: dict[str, QuantizationConfig], models: dict[str, nn.Module]) -> None:
    """A pattern given for several components must match in one of them."""
    alike: dict[Any, dict[str, nn.Module]] = {}
    for name, config in configs.items():
        if config.spec.rules is None:
            alike.setdefault((config.spec.modules_to_not_convert, config.spec.overrides), {})[name] = models[name]
    for group in alike.values():
        require_patterns_match(group, configs[next(iter(group))].spec)


def _is_present(name: str, model: nn.Module, config: QuantizationConfig) -> bool:
    where = name or type(model).__name__
    foreign = foreign_quantization(model)
    if foreign is not None:
        raise ModelStateError(
            f"{where}: its weights are already quantized by {foreign}. Load the dense checkpoint, or compress other "
            "components; import_quantized() takes over layers of torchao, GGUF and BFL with their codes."
        )
    state = get_state(model)
    if state is None or state.config.spec.is_dense:
        require_own_weights(where, model)
        return False
    changes = state.config.spec.differences(config.spec)
    if not changes:
        return True
    raise CompressionConflictError(
        f"{where}: already compressed by a method of kind 'weights' ({state.config!r}); asked for another "
        f"({'; '.join(changes)}). Packed weights are never quantized again: call decompress() first (its weights stay "
        "rounded), or load the dense checkpoint."
    )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of every tensor that a checkpoint of ``model`` holds; shared tensors once."""
    persistent = set(model.state_dict(keep_vars=True))
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in persistent)]
    return sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)


def _device_of(models: dict[str, nn.Module]) -> torch.device:
    for model in models.values():
        for parameter in model.parameters():
            if parameter.device.type != "meta":
                return parameter.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
