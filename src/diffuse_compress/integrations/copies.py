"""Models that copy another's weights: ``ControlNetModel.from_unet`` and its like, from a compressed model.

They read ``unet.down_blocks.state_dict()`` into dense layers of the same names, strictly (packed tensors: an error of
torch's) or not (packed tensors: silently passed over, and random weights stay). While such a function runs, the state
dict of a packed layer here is that of its dense equal.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from diffuse_compress.components import unwrap
from diffuse_compress.errors import DiffuseCompressWarning
from diffuse_compress.integrations.compat import remove_from_diffusers_config
from diffuse_compress.integrations.component import get_state, quantized_layers
from diffuse_compress.integrations.wrapping import is_wrapped, mark_wrapped, wrapping

__all__ = ["wrap_builders"]

_BUILDERS = ("from_unet", "from_unet2d", "from_transformer")


def wrap_builders(base: Any) -> None:
    """Wrap these class methods of every subclass of ``base``: of those there are, and of those still to be imported."""
    prior = base.__dict__.get("__init_subclass__")
    if prior is not None and is_wrapped(prior.__func__):
        return

    def __init_subclass__(cls: type, **kwargs: Any) -> None:
        if prior is None:
            super(base, cls).__init_subclass__(**kwargs)
        else:
            prior.__func__(cls, **kwargs)
        _wrap(cls)

    mark_wrapped(__init_subclass__)
    base.__init_subclass__ = classmethod(__init_subclass__)
    for cls in _subclasses(base):
        _wrap(cls)


def _subclasses(base: Any) -> Iterator[type]:
    cls: type
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _wrap(cls: Any) -> None:
    for name in _BUILDERS:
        method = cls.__dict__.get(name)
        if isinstance(method, classmethod) and not is_wrapped(method.__func__):
            setattr(cls, name, classmethod(_copying_dense(method.__func__)))


def _copying_dense(stock: Any) -> Any:
    @wrapping(stock)
    def build(cls: type, *args: Any, **kwargs: Any) -> Any:
        given = [unwrap(value) for value in (*args, *kwargs.values()) if isinstance(value, nn.Module)]
        sources = [model for model in given if quantized_layers(model)]
        if not sources:
            return stock(cls, *args, **kwargs)
        with _dense_state_dicts(sources) as copied:
            made = stock(cls, *args, **kwargs)
        if get_state(made) is None and "quantization_config" in getattr(made, "_internal_dict", ()):
            remove_from_diffusers_config(made, "quantization_config")  # copied with the rest of the configuration
        if copied:
            warnings.warn(
                f"{cls.__name__}.{stock.__name__}: {type(sources[0]).__name__} is compressed; the copy is dense, its "
                f"weights as rounded to {', '.join(sorted(copied))}. Call compress() on it to use it; to train it from "
                "the exact weights, make it from the dense model.",
                DiffuseCompressWarning,
                stacklevel=2,
            )
        return made

    return build


@contextmanager
def _dense_state_dicts(models: Iterable[nn.Module]) -> Iterator[set[str]]:
    """State dicts have ``weight`` for packed tensors; yields the names of the formats that were asked for it."""
    copied: set[str] = set()

    def hook(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if f"{prefix}qweight" not in state:  # a call within a call has done it
            return
        for name in layer._parameters.keys() - {"bias"}:
            state.pop(f"{prefix}{name}", None)
        state[f"{prefix}weight"] = layer.weight.detach()
        copied.add(layer.scheme.name)

    handles = [
        layer.register_state_dict_post_hook(hook) for model in models for layer in quantized_layers(model).values()
    ]
    try:
        yield copied
    finally:
        for handle in handles:
            handle.remove()
