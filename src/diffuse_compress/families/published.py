"""Published pipelines as configurations: what their components are and how large, without their weights.

One JSON file per pipeline in the package folder ``configs`` gives every component's class and the configuration values
under which its publisher released it, with the parameter count and where each value was taken from. Models built from
them live on the meta device: they plan a compression, name layers and give true layer shapes to benchmarks, and need
neither a download nor memory for weights.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module, resources
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import ConfigError, nearest

__all__ = [
    "LayerShape",
    "PublishedComponent",
    "PublishedPipeline",
    "linear_shapes",
    "list_published",
    "meta_components",
    "published_config",
]

_FOLDER = "configs"
_LIBRARIES = ("diffusers", "transformers")
_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}


@dataclass(frozen=True)
class PublishedComponent:
    """One model of a published pipeline.

    ``parameters`` is the count of the model built from ``config``. ``published_parameters`` is what its publisher
    (or a third party, ``source`` says which) states: ``count`` where an exact number was found, else None, and
    ``text``.
    """

    name: str
    library: str
    class_name: str
    config: dict[str, Any]
    parameters: int
    published_parameters: dict[str, Any] | None
    source: str

    def model_class(self) -> type[nn.Module]:
        """The component's class, imported from its library on the first use."""
        return getattr(import_module(self.library), self.class_name)


@dataclass(frozen=True)
class PublishedPipeline:
    """A published pipeline. ``licence`` is that of its weights, of which this package holds none."""

    name: str
    repo: str
    pipeline_class: str
    licence: str
    source: str
    components: dict[str, PublishedComponent]

    @property
    def denoisers(self) -> tuple[str, ...]:
        """Names of the components that run in every sampling step (two for a pipeline of two experts)."""
        return tuple(name for name in self.components if name.startswith(("transformer", "unet")))


@dataclass(frozen=True)
class LayerShape:
    """A shape that ``count`` layers of a model share.

    For a convolution the features are the channels and ``kernel_size`` is not empty; ``name`` is the first such layer.
    """

    in_features: int
    out_features: int
    count: int
    kind: str = "linear"
    kernel_size: tuple[int, ...] = ()
    groups: int = 1
    name: str = ""

    @property
    def weight_elements(self) -> int:
        """Elements of one layer's weight."""
        elements = self.in_features * self.out_features // self.groups
        for size in self.kernel_size:
            elements *= size
        return elements


def list_published() -> list[str]:
    """Names of the bundled pipelines, sorted."""
    folder = resources.files(__package__).joinpath(_FOLDER)
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def published_config(name: str) -> PublishedPipeline:
    """The bundled pipeline ``name``; a name that is none raises `ConfigError` listing those that are."""
    return copy.deepcopy(_read(name))


def meta_components(
    name: str, components: Iterable[str] | None = None, *, dtype: torch.dtype | None = None
) -> dict[str, nn.Module]:
    """Components of pipeline ``name`` at their true size on the meta device, in eval mode, by component name.

    ``components`` selects some (all by default); ``dtype`` is what their weights pretend to be stored in (the
    classes' own default, float32, if not given).
    """
    pipeline = _read(name)
    wanted = list(pipeline.components) if components is None else _selection(pipeline, components)
    return {key: _build(pipeline.components[key], dtype) for key in wanted}


def linear_shapes(name: str, component: str = "transformer") -> list[LayerShape]:
    """Distinct shapes of the linears and convolutions of one component, those with most weights in total first.

    ``"transformer"`` means the denoiser, also in a pipeline whose denoiser is a UNet.
    """
    pipeline = _read(name)
    if component == "transformer" and component not in pipeline.components:
        component = pipeline.denoisers[0]
    (key,) = _selection(pipeline, [component])
    return list(_shapes(name, key))


@cache
def _read(name: str) -> PublishedPipeline:
    known = list_published()
    if name not in known:
        raise ConfigError(f"{name!r} is not a bundled published pipeline: {nearest(str(name), known)}.")
    text = resources.files(__package__).joinpath(_FOLDER).joinpath(f"{name}.json").read_text(encoding="utf-8")
    raw = json.loads(text)
    components = {key: _component(name, key, value) for key, value in raw["components"].items()}
    fields = {key: raw[key] for key in ("name", "repo", "pipeline_class", "licence", "source")}
    return PublishedPipeline(**fields, components=components)


def _component(pipeline: str, name: str, raw: dict[str, Any]) -> PublishedComponent:
    if raw["library"] not in _LIBRARIES:
        raise ConfigError(f"{pipeline}.{name} is of library {raw['library']!r}; only {_LIBRARIES} are built.")
    return PublishedComponent(
        name=name,
        library=raw["library"],
        class_name=raw["class"],
        config=raw["config"],
        parameters=raw["parameters"],
        published_parameters=raw["published_parameters"],
        source=raw["source"],
    )


def _selection(pipeline: PublishedPipeline, components: Iterable[str]) -> list[str]:
    wanted = [components] if isinstance(components, str) else list(components)
    for key in wanted:
        if key not in pipeline.components:
            raise ConfigError(f"{pipeline.name} has no component {key!r}: {nearest(str(key), pipeline.components)}.")
    return wanted


def _build(component: PublishedComponent, dtype: torch.dtype | None) -> nn.Module:
    cls: Any = component.model_class()
    config = copy.deepcopy(component.config)
    with torch.device("meta"):
        model = cls.from_config(config) if component.library == "diffusers" else cls(cls.config_class(**config))
    return model.eval() if dtype is None else model.eval().to(dtype)


@lru_cache(maxsize=64)
def _shapes(name: str, component: str) -> tuple[LayerShape, ...]:
    model = _build(_read(name).components[component], None)
    counts: Counter[tuple[Any, ...]] = Counter()
    first: dict[tuple[Any, ...], str] = {}
    for layer_name, layer in model.named_modules():
        key = _shape_key(layer)
        if key is not None:
            counts[key] += 1
            first.setdefault(key, layer_name)
    shapes = [
        LayerShape(inside, outside, count, kind, kernel, groups, first[kind, inside, outside, kernel, groups])
        for (kind, inside, outside, kernel, groups), count in counts.items()
    ]
    return tuple(sorted(shapes, key=lambda shape: -shape.count * shape.weight_elements))


def _shape_key(layer: nn.Module) -> tuple[str, int, int, tuple[int, ...], int] | None:
    kind = next((label for cls, label in _KINDS.items() if isinstance(layer, cls)), None)
    if kind is None:
        return None
    if isinstance(layer, nn.Linear):
        return kind, layer.in_features, layer.out_features, (), 1
    conv: Any = layer
    return kind, conv.in_channels, conv.out_channels, tuple(conv.kernel_size), conv.groups
