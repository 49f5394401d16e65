"""Which layer of a model gets which format under a QuantizationSpec, and why the others keep theirs.

Needs only the module tree, so it gives the same answer for a loaded model and for one on the meta device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from diffuse_compress.calibration.engine import calibration_blocks
from diffuse_compress.errors import ConfigError
from diffuse_compress.families.registry import family_of, residual_stream_of
from diffuse_compress.families.roles import LayerRole, layer_roles
from diffuse_compress.patterns import first_match, generalize, matches, require_match
from diffuse_compress.quantization.algorithms.base import steps_of
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear, supports
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.quantization.spec import QuantizationSpec, Rules
from diffuse_compress.quantization.split import HIDDEN, SKIP, part_on_meta

__all__ = [
    "LayerAssignment",
    "assign_layers",
    "require_patterns_match",
    "resolve_rules",
    "split_layers",
    "stock_name",
    "unsupported_bytes",
    "unsupported_kind",
]

_MIN_MATRIX = 32
# What load_ip_adapter adds: layers in attention processors, and the projection of the image's embedding; and peft's.
_ADAPTER_PARTS = {"processor", "image_projection_layers", "lora_A", "lora_B"}
# peft puts an adapted layer one level down, under this name.
_WRAPPED = ".base_layer"
_KEPT_ROLE = {
    LayerRole.EMBEDDER: "embedder: few parameters and sensitive",
    LayerRole.OUTPUT: "last layer: few parameters and sensitive",
    LayerRole.OTHER_MODALITY: "vision or audio part: the language model is converted",
}


@dataclass(frozen=True)
class LayerAssignment:
    """Decision for one linear or convolution.

    Attributes:
        name: qualified module name.
        role: its part in the model.
        shape: (out_features, in_features); a convolution's in_features is C / groups * kh * kw.
        scheme: the format it gets, or None.
        reason: why it is kept (``scheme`` is None), else "".
        extra_bytes: stored with it beside the codes and scales of its weight, at most: by the algorithm, static scales.
    """

    name: str
    role: LayerRole
    shape: tuple[int, int]
    scheme: Scheme | None
    reason: str = ""
    extra_bytes: int = 0


def assign_layers(model: nn.Module, spec: QuantizationSpec) -> dict[str, LayerAssignment]:
    """Decision for every linear and convolution of ``model``, in registration order.

    A user's pattern may match nothing here: see :func:`require_patterns_match`.

    Raises:
        ConfigError: resolved rules match no layer, or the algorithm cannot reach a layer's format or this model.
        IncompatibleShapeError: a layer named explicitly cannot take its scheme.
    """
    layers = _layers_of(model, split_layers(model) if spec.split_skips else {})
    if spec.rules is not None:
        unmatched = [
            pattern for pattern, _ in spec.rules if not any(matches(pattern, stock_name(name)) for name in layers)
        ]
        if unmatched:
            raise ConfigError(
                f"{type(model).__name__}: {len(unmatched)} of the recipe's {len(spec.rules)} patterns match no layer, "
                f"e.g. {unmatched[0]!r}. It was resolved on another architecture: start from its preset, "
                f"{spec.label!r}."
            )
    roles, tied = layer_roles(cast(nn.Module, _WithoutAdapters(model))), _tied_layers(model)
    rotated = residual_stream_of(model).rotated_inputs if spec.algorithm.rotates_residual else ()
    decided = {name: _decide(name, module, spec, roles, tied, rotated) for name, module in layers.items()}
    if not any(item.scheme is not None for item in decided.values()):
        kinds = sorted({type(module).__name__ for module in layers.values()}) or ["none"]
        reasons = sorted({item.reason for item in decided.values()})
        others = unsupported_bytes(model)
        advice = (
            f"Its other weights are in {', '.join(others)}, for which there is no quantized layer."
            if others
            else "Name layers with overrides=."
        )
        raise ConfigError(
            f"{type(model).__name__}: no layer would be converted, of {len(layers)} ({', '.join(kinds)}). "
            f"Reasons: {'; '.join(reasons) or 'it has no linear or convolution'}. {advice}"
        )
    for item in decided.values():
        if item.scheme is not None:
            try:
                spec.algorithm.check_granularity(item.scheme.weight)
                spec.algorithm.check(item.scheme.weight)
            except ConfigError as error:
                raise ConfigError(f"{item.name}: {item.scheme.name}: {error}") from error
    if spec.rules is None:
        _require_work(model, decided, spec)
    return decided


def split_layers(model: nn.Module) -> dict[str, int]:
    """{convolution: input channels of its first part} of those in ``model`` that ``split_skips`` takes apart."""
    family = family_of(model)
    found = {} if family is None else family.concatenated(model)
    return {name: channels for name, channels in found.items() if type(model.get_submodule(name)) is nn.Conv2d}


def _layers_of(model: nn.Module, splits: Mapping[str, int]) -> dict[str, nn.Module]:
    """Linears and convolutions by name; those that will be split, as their parts."""
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name in splits:
            assert isinstance(module, nn.Conv2d)
            channels, bias = splits[name], module.bias is not None
            layers[f"{name}.{HIDDEN}"] = part_on_meta(module, channels, bias=bias)
            layers[f"{name}.{SKIP}"] = part_on_meta(module, module.in_channels - channels, bias=False)
        elif _is_layer(module):
            layers[name] = module
    return layers


def _require_work(model: nn.Module, decided: Mapping[str, LayerAssignment], spec: QuantizationSpec) -> None:
    """Raise ConfigError if one of the algorithms is for formats that no layer has, or finds nothing to do in the
    blocks that hold the layers."""
    schemes = [item.scheme for item in decided.values() if item.scheme is not None]
    for step in steps_of(spec.algorithm):
        idle = step.idle_with(schemes)
        if idle is not None:
            purpose, preset = idle
            found = ", ".join(sorted({scheme.name for scheme in schemes}))
            raise ConfigError(
                f"{type(model).__name__}: {type(step).__name__} is for {purpose}, got none ({found}). Leave it out, or "
                f'take a format that has such, like "{preset}".'
            )
    names = [name for name, item in decided.items() if item.scheme is not None]
    blocks = [name for name in calibration_blocks(model, names) if name not in decided]
    for step in steps_of(spec.algorithm):
        reason = step.idle_in([model.get_submodule(name) for name in blocks])
        if reason is not None:
            raise ConfigError(
                f"{type(model).__name__}: {type(step).__name__} has nothing to do: {reason}. Leave it out, or use it "
                "where there are such."
            )


def unsupported_kind(module: nn.Module, parameter: torch.Tensor) -> str | None:
    """Class name of ``module`` if ``parameter``, its own, is a weight matrix for which there is no quantized layer.

    transformers' ``Conv1D`` (GPT-2) and fused experts have such. Scales of norms, biases and small tables are none.
    """
    kind = type(module).__name__
    known = _is_layer(module) or isinstance(module, QuantizedLinear | QuantizedConv2d | nn.Embedding)
    is_matrix = parameter.ndim >= 2 and min(parameter.shape[-2:]) >= _MIN_MATRIX
    return kind if is_matrix and not known and "norm" not in kind.lower() else None


def unsupported_bytes(model: nn.Module) -> dict[str, int]:
    """{class name: bytes} of the weights that :func:`unsupported_kind` names, most bytes first."""
    found: dict[str, int] = {}
    for key, parameter in model.named_parameters():
        kind = unsupported_kind(model.get_submodule(key.rpartition(".")[0]), parameter)
        if kind is not None:
            found[kind] = found.get(kind, 0) + parameter.numel() * parameter.element_size()
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def require_patterns_match(models: Mapping[str, nn.Module], spec: QuantizationSpec) -> None:
    """Raise ConfigError for a pattern of ``spec`` that matches nothing in any of ``models`` {component: model}."""
    modules = [(name, module) for model in models.values() for name, module in model.named_modules() if name]
    layers = [stock_name(name) for name, module in modules if _is_layer(module)]
    where = ", ".join(name or type(model).__name__ for name, model in models.items())
    require_match(spec.modules_to_not_convert, [name for name, _ in modules], f"{where}: modules_to_not_convert")
    require_match([pattern for pattern, _ in spec.overrides], layers, f"{where}: overrides")


def resolve_rules(assigned: dict[str, LayerAssignment]) -> Rules:
    """The decision as patterns: what config.json keeps, so that no later release decides otherwise."""
    own = {stock_name(name): item.scheme for name, item in assigned.items() if not _is_adapter(name)}
    return tuple(generalize(own))


def stock_name(name: str) -> str:
    """A layer's name in the model as its class builds it, without the level that peft puts in."""
    return name.removesuffix(_WRAPPED)


def _is_adapter(name: str) -> bool:
    return not _ADAPTER_PARTS.isdisjoint(name.split("."))


class _WithoutAdapters:
    """A model's modules by their stock names, as :func:`layer_roles` reads them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.config = getattr(model, "config", None)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self._model.named_modules():
            # A peft layer gives its name to the layer that it wraps.
            if not _is_adapter(name) and "base_layer" not in module._modules:
                yield stock_name(name), module


def _decide(
    name: str,
    module: nn.Module,
    spec: QuantizationSpec,
    roles: dict[str, LayerRole],
    tied: dict[str, str],
    rotated: Collection[str],
) -> LayerAssignment:
    shape, own_name = _matrix_shape(module), name
    name = stock_name(name)
    role = roles.get(name, LayerRole.BLOCK)

    def keep(reason: str) -> LayerAssignment:
        return LayerAssignment(own_name, role, shape, None, reason)

    def converted(scheme: Scheme) -> LayerAssignment:
        return assigned(spec.algorithm.format_of(module, scheme, own_name in rotated, name))

    def assigned(scheme: Scheme) -> LayerAssignment:
        extra_bytes = spec.algorithm.extra_bytes(module, scheme, name) + scheme.input_bytes
        return LayerAssignment(own_name, role, shape, scheme, extra_bytes=extra_bytes)

    if isinstance(module, QuantizedLinear | QuantizedConv2d):
        return keep(f"already {module.scheme.name}")
    if _is_adapter(name):
        return keep("belongs to an adapter, which no checkpoint of the model holds")
    if spec.rules is not None:
        scheme = first_match(spec.rules, name)
        if scheme is None:
            listed = any(matches(pattern, name) for pattern in spec.modules_to_not_convert)
            return keep("modules_to_not_convert" if listed else _KEPT_ROLE.get(role, "not part of the recipe"))
        return assigned(_checked(name, module, shape, scheme, "It is not the recipe's model", spec))
    overridden = [(pattern, scheme) for pattern, scheme in spec.overrides if matches(pattern, name)]
    if any(matches(pattern, name) for pattern in spec.modules_to_not_convert):
        return keep("modules_to_not_convert")
    if own_name in tied:
        return keep(f"shares its weight with {tied[own_name]}")
    if overridden:
        scheme = overridden[-1][1]
        if scheme is None:
            return keep("overrides")
        fix = "Take it out of overrides=, or give it another scheme"
        return converted(_checked(name, module, shape, scheme, fix, spec))
    at_end = role in (LayerRole.EMBEDDER, LayerRole.OUTPUT)
    if role in _KEPT_ROLE and not (at_end and spec.end_scheme is not None):
        return keep(_KEPT_ROLE[role])
    scheme = spec.modulation_scheme if role is LayerRole.MODULATION else spec.scheme
    scheme = spec.end_scheme if at_end else scheme
    assert scheme is not None  # of a dense spec, which has rules
    unfit = supports(module, scheme) or spec.algorithm.unsupported(module, scheme)
    if unfit:
        return keep(unfit)
    scheme.weight.check_shape(name, shape[1])
    found = converted(scheme)
    # Asked for by name, or in a recipe that was made in a wider dtype, it is taken all the same.
    if found.extra_bytes and scheme.weight_bytes(shape) + found.extra_bytes > _bytes_of(module):
        return keep(f"with {_beside(spec)} it would be larger")
    return found


def _beside(spec: QuantizationSpec) -> str:
    """What the algorithm stores beside the codes, in words."""
    kept = [step.kept_dense for step in steps_of(spec.algorithm) if step.kept_dense]
    return f"its {kept[0]}" if kept and not spec.algorithm.adds_branch else "its low-rank branch"


def _bytes_of(module: nn.Module) -> int:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.numel() * weight.element_size()


def _checked(
    name: str, module: nn.Module, shape: tuple[int, int], scheme: Scheme, fix: str, spec: QuantizationSpec
) -> Scheme:
    """``scheme``, or an error: this layer was named, so it cannot be skipped."""
    unfit = supports(module, scheme) or spec.algorithm.unsupported(module, scheme)
    if unfit:
        raise ConfigError(f"{name}: {scheme.name} cannot be applied: {unfit}. {fix}.")
    scheme.weight.check_shape(name, shape[1])
    return scheme


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d)


def _matrix_shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d)
    per_output = module.in_channels // module.groups
    for size in module.kernel_size:
        per_output *= size
    return module.out_channels, per_output


def _tied_layers(model: nn.Module) -> dict[str, str]:
    """Layers whose weight is also another module's parameter (a language model's head), with that parameter."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    modules = {id(module): name for name, module in model.named_modules()}
    tied = {}
    for names in owners.values():
        parents = {id(model.get_submodule(name.rpartition(".")[0])): name for name in names}
        if len(parents) > 1:
            for parent, name in parents.items():
                others = [other for key, other in parents.items() if key != parent]
                if name.endswith(".weight"):
                    tied[modules[parent]] = others[0]
    return tied
