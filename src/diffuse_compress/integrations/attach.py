"""What ``import diffuse_compress`` adds to the classes of diffusers and transformers."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from diffuse_compress.integrations.attention import register_diffusers_backends, register_transformers_backends
from diffuse_compress.integrations.casting import wrap_casts, wrap_from_pipe
from diffuse_compress.integrations.compat import NO_PATCH_VARIABLE, may_patch, usable
from diffuse_compress.integrations.component import get_state
from diffuse_compress.integrations.copies import wrap_builders
from diffuse_compress.integrations.doors import door
from diffuse_compress.integrations.hub import Prepare, wrap_upload
from diffuse_compress.integrations.loading import wrap_from_single_file, wrap_model_loading, wrap_register_modules
from diffuse_compress.integrations.refresh import up_to_date
from diffuse_compress.integrations.refusals import wrap_layerwise_casting
from diffuse_compress.integrations.saving import wrap_push_to_hub, wrap_save_pretrained
from diffuse_compress.integrations.stock_caches import wrap_cache_mixin
from diffuse_compress.integrations.wrapping import is_wrapped, mark_wrapped

__all__ = ["NO_PATCH_VARIABLE", "attach", "register_quantizers"]


_BACKENDS = {"diffusers": register_diffusers_backends, "transformers": register_transformers_backends}


def register_quantizers() -> None:
    """Make both libraries' ``from_pretrained`` know our method. Idempotent."""
    for library in ("diffusers", "transformers"):
        if usable(library):
            door(library).register()


def attach(
    methods: dict[str, Callable[..., Any]],
    cache_methods: dict[str, Callable[..., Any]],
    complete_save: Callable[[Any, Path, Path], None],
    complete_upload: Prepare,
) -> None:
    """Add ``methods`` to the pipeline and model classes, and wrap what must know of compressed objects.

    ``cache_methods`` are for those of diffusers alone.

    ``complete_save`` and ``complete_upload`` add what stands beside the weights (see ``companions.py``).

    Nothing is replaced that another package put there, a second call changes nothing, and with
    ``DIFFUSE_COMPRESS_NO_PATCH=1`` classes stay as they are.
    """
    if not may_patch():
        return
    for library, register in _BACKENDS.items():
        if usable(library):
            register()
    for cls in _classes():
        own = methods if cls.__name__ == "PreTrainedModel" else {**methods, **cache_methods}
        for name, function in own.items():
            if not hasattr(cls, name):
                setattr(cls, name, function)
        wrap_save_pretrained(cls, up_to_date, complete_save)
        wrap_push_to_hub(cls)
        wrap_upload(cls, complete_upload)
        if cls.__name__ == "DiffusionPipeline":
            wrap_register_modules(cls)
            wrap_from_pipe(cls)
        if cls.__name__ == "ModelMixin":
            wrap_cache_mixin(cache_methods)
            wrap_model_loading(cls)
            wrap_builders(cls)
            for mixin in ("FromOriginalModelMixin", "FromSingleFileMixin"):
                # Pipelines' own is there only beside transformers.
                found = getattr(import_module("diffusers.loaders"), mixin, None)
                if found is not None:
                    wrap_from_single_file(found)
        if cls.__name__ in ("ModelMixin", "PreTrainedModel"):
            wrap_casts(cls)
        wrap_layerwise_casting(cls)
        if isinstance(cls.__dict__.get("dtype"), property):
            _wrap_dtype(cls)


def _classes() -> list[type]:
    names = {"diffusers": ("DiffusionPipeline", "ModelMixin", "ModularPipeline"), "transformers": ("PreTrainedModel",)}
    classes: list[type] = []
    for library, wanted in names.items():
        for name in wanted if usable(library) else ():
            try:
                classes.append(getattr(import_module(library), name))
            except (AttributeError, ImportError, RuntimeError):  # absent in this version, or a part of it is missing
                continue
    return classes


def _wrap_dtype(cls: type) -> None:
    """``component.dtype`` is the compute dtype even where a layer's fp32 scale is the first floating parameter."""
    stock = cls.__dict__["dtype"]
    if is_wrapped(stock.fget):
        return
    # diffusers' property passes over what a class keeps in float32 (Wan's modulation table), transformers' does not.
    kept = "_keep_in_fp32_modules" if cls.__name__ == "ModelMixin" else ""

    def dtype(self: Any) -> Any:
        state = get_state(self)
        return stock.fget(self) if state is None else compute_dtype(self, stock.fget, kept)

    cls.dtype = property(mark_wrapped(dtype), doc=stock.__doc__)  # type: ignore[attr-defined]


def compute_dtype(model: Any, stock: Callable[[Any], Any], kept: str = "") -> Any:
    """dtype of a compressed model's first layer that computes: its own, or a quantized layer's ``compute_dtype``.

    ``kept`` is the attribute with the parts of names that stay in float32 whatever the model's dtype.
    """
    passed_over = getattr(model, kept, None) or () if kept else ()
    for name, module in model.named_modules():
        own = getattr(module, "compute_dtype", None)
        parameters = module.named_parameters(recurse=False)
        found = {leaf: parameter.dtype for leaf, parameter in parameters} if own is None else {"qweight": own}
        for leaf, dtype in found.items():
            here = f"{name}.{leaf}"
            if dtype.is_floating_point and not any(part in here for part in passed_over):
                return dtype
    return stock(model)
