"""Plans of the methods beside quantized weights: what each would do to a component, checked before anything is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffuse_compress.caching.config import CACHE_KIND, CacheConfig, LoopCacheConfig
from diffuse_compress.caching.units import units_of
from diffuse_compress.components import is_pipeline
from diffuse_compress.errors import CompressionConflictError, ConfigError
from diffuse_compress.integrations.doors import library_of
from diffuse_compress.integrations.kv_cache import kv_cache_extent
from diffuse_compress.integrations.methods import KINDS
from diffuse_compress.quantization.algorithms.adaround import AdaRoundConfig
from diffuse_compress.quantization.kv_config import KVCacheConfig
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.temporal.config import Scope, TFMQConfig
from diffuse_compress.temporal.features import PATH_KINDS
from diffuse_compress.temporal.layout import Layout, layout_of
from diffuse_compress.temporal.step_scales import static_layers

__all__ = ["MethodPlan", "plan_methods"]


@dataclass(frozen=True)
class MethodPlan:
    """One method on one component.

    Attributes:
        component: its name, "" for a bare model.
        config: of the method.
        extent: what of the component it is about, in words.
        layers: of the timestep path, for methods that take care of it.
    """

    component: str
    config: TFMQConfig | CacheConfig | KVCacheConfig
    extent: str
    layers: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        """Of the method."""
        return self.config.kind

    @property
    def title(self) -> str:
        """Of its kind."""
        return KINDS[self.kind].title

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"component": self.component, "kind": self.kind, "config": self.config.to_dict(), "extent": self.extent}

    def __str__(self) -> str:
        return f"{self.config.summary}: {self.extent}"


def plan_methods(
    target: Any,
    models: Mapping[str, nn.Module],
    wanted: Mapping[str, Iterable[TFMQConfig | CacheConfig | KVCacheConfig]],
    formats: Mapping[str, Mapping[str, Scheme]],
) -> tuple[list[MethodPlan], list[str]]:
    """(plans in the order in which they are carried out, what is there already, in words).

    Args:
        target: the pipeline or model.
        models: its models, by component name.
        wanted: configurations by component name.
        formats: {layer: format} that this call gives to the weights, by component name.

    Raises:
        ConfigError: a method that the model or target does not allow, or two of one kind.
        CompressionConflictError: the component carries another of the kind.
    """
    plans, present = [], []
    for name, configs in wanted.items():
        where = name or type(models[name]).__name__
        kinds = [config.kind for config in configs]
        twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if twice is not None:
            raise ConfigError(f"{where}: two configurations of kind {twice!r}; a component takes one.")
        for config in configs:
            if _is_present(where, models[name], config):
                present.append(f"{where}: {KINDS[config.kind].title}")
            else:
                plans.append(_planned(where, name, target, models[name], config, formats.get(name, {})))
    order = list(KINDS)
    return sorted(plans, key=lambda plan: order.index(plan.kind)), present


def _is_present(where: str, model: nn.Module, config: TFMQConfig | CacheConfig | KVCacheConfig) -> bool:
    there = KINDS[config.kind].config_of(model)
    if there is None:
        return False
    if there == config:
        return True
    remedy = "decompress() takes it off, or load the model without it"
    if config.kind == CACHE_KIND:
        remedy = "disable_cache(remove=True) takes it off"
    raise CompressionConflictError(
        f"{where}: has a method of kind {config.kind!r} already ({there!r}); asked for another ({config!r}). {remedy}."
    )


def _planned(
    where: str,
    name: str,
    target: Any,
    model: nn.Module,
    config: TFMQConfig | CacheConfig | KVCacheConfig,
    formats: Mapping[str, Scheme],
) -> MethodPlan:
    title = KINDS[config.kind].title
    if isinstance(config, KVCacheConfig):
        return MethodPlan(name, config, kv_cache_extent(where, model, config))
    if library_of(model) != "diffusers":
        raise ConfigError(f"{where}: {title} are for denoisers of diffusers, got a {type(model).__name__}.")
    if not isinstance(config, TFMQConfig):
        return MethodPlan(name, config, _units(where, title, target, model, config))
    layout = layout_of(model, config.table)
    path = frozenset(layer for layer, kind in layout.layers.items() if kind in PATH_KINDS)
    stepped = _stepped(where, target, model, config, formats, layout)
    if not config.learns:
        left = f", {len(layout.left)} run live" if layout.left else ""
        return MethodPlan(name, config, f"{len(layout.layers)} layers{left}{stepped}", path)
    learned = [layer for layer in formats if layer in path]
    _require_learnable(where, target, model, config, {layer: formats[layer] for layer in learned}, bool(formats))
    return MethodPlan(name, config, f"{len(learned)} of {len(path)} layers learned{stepped}", path)


def _stepped(
    where: str, target: Any, model: nn.Module, config: TFMQConfig, formats: Mapping[str, Scheme], layout: Layout
) -> str:
    """How many layers get an input scale for every step, in words; "" where none is to.

    Raises:
        ConfigError: none of them has static inputs, now or by this call, or there is no loop to look at.
    """
    if config.scope is None:
        return ""
    asked, all_layers = f'TFMQConfig(scope="{config.scope.value}")', config.scope is Scope.ALL
    if not is_pipeline(target):
        raise ConfigError(
            f"{where}: {asked} keeps input scales for the steps of a pipeline's loop, got a bare model. Compress the "
            "pipeline."
        )
    static = {layer for layer, scheme in formats.items() if scheme.has_static_inputs} | set(static_layers(model))
    found = [layer for layer in static if all_layers or layout.layers.get(layer) in PATH_KINDS]
    if not found:
        which = "no layer" if all_layers else "no layer of the timestep path"
        raise ConfigError(
            f"{where}: {asked} keeps static input scales for every step, and {which} has static inputs. Give them a "
            'Scheme whose inputs are ActivationScheme("int8", PerTensor(), dynamic=False), or leave scope= out.'
        )
    return f", input scales of {len(found)} at each step"


def _require_learnable(
    where: str, target: Any, model: nn.Module, config: TFMQConfig, learned: Mapping[str, Scheme], planned: bool
) -> None:
    """Raise ConfigError unless this call gives integer formats to layers of the timestep path."""
    asked = f'TFMQConfig(maintenance="{config.maintenance.value}")'
    if not is_pipeline(target):
        raise ConfigError(
            f"{where}: {asked} learns codes at the timesteps of a pipeline's loop, got a bare model. Compress the "
            "pipeline."
        )
    if not planned:
        compressed = any(isinstance(module, QuantizedLinear) for module in model.modules())
        found, remedy = (
            ("they have codes already", "Load the dense checkpoint, and pass both in one call")
            if compressed
            else ("this call quantizes none", "Pass both in one call")
        )
        raise ConfigError(
            f"{where}: {asked} learns the codes of layers that a preset quantizes, from their dense weights; {found}. "
            f'{remedy}: compress("w4a8", {asked}).'
        )
    if not learned:
        raise ConfigError(
            f"{where}: {asked} learns the codes of layers of the timestep path, and this call keeps all of them dense. "
            "Name some with overrides=, or leave maintenance= out."
        )
    for layer, scheme in learned.items():
        try:
            AdaRoundConfig().check(scheme.weight)
        except ConfigError as error:
            raise ConfigError(f"{where}: {asked}: {layer}: {error}") from error


def _units(where: str, title: str, target: Any, model: nn.Module, config: CacheConfig) -> str:
    if not isinstance(config, LoopCacheConfig):
        raise ConfigError(
            f"{where}: a {title} needs a schedule: FeatureCacheConfig(target_speedup=...), or load_cache()."
        )
    if not is_pipeline(target):
        raise ConfigError(
            f"{where}: a {title} is calibrated in a pipeline's sampling loop, got a bare model. Compress the pipeline; "
            "its denoiser alone can be given a schedule: load_cache(path)."
        )
    return f"{len(units_of(model, config.granularity))} units"
