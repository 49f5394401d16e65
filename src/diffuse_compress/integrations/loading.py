"""``DiffusionPipeline.from_pretrained`` of compressed pipelines: every component as it was saved.

diffusers loads dense models as float32 unless told otherwise, transformers and our quantizer in the dtype that was
saved. A pipeline saved in bfloat16 would come back with a bfloat16 denoiser and a float32 VAE, and stop at the first
convolution.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import CheckpointError
from diffuse_compress.integrations.compat import called_by_pipeline
from diffuse_compress.integrations.component import ASK_THE_MODEL, align_tensors, get_state, read_metadata
from diffuse_compress.integrations.origin import folder_of, repository_of
from diffuse_compress.integrations.variants import variant_of
from diffuse_compress.integrations.wrapping import is_wrapped, wrapping

__all__ = ["restore_stored_dtypes", "wrap_from_single_file", "wrap_model_loading", "wrap_register_modules"]

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
# Of models, and of pipelines.
_SINGLE_FILE_ARGUMENTS = ("pretrained_model_link_or_path_or_dict", "pretrained_model_link_or_path")
# {model: variant}: models that a pipeline loaded and nobody named a dtype for, until it takes them in.
_LOADED_WITHOUT_DTYPE: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def wrap_model_loading(cls: type) -> None:
    """Wrap a model class's ``from_pretrained`` once, to remember what a pipeline loads with no dtype asked for."""
    stock = cls.__dict__["from_pretrained"].__func__
    if is_wrapped(stock):
        return

    @wrapping(stock)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        no_dtype = kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None
        by_pipeline = called_by_pipeline()
        loaded = stock(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a pair with output_loading_info=True
        if no_dtype and by_pipeline:
            _LOADED_WITHOUT_DTYPE[model] = kwargs.get("variant") or ""
        state = get_state(model)
        if state is not None and state.base_model == ASK_THE_MODEL:
            state.base_model = repository_of(model)
        return loaded

    cls.from_pretrained = classmethod(from_pretrained)  # type: ignore[attr-defined]


def wrap_register_modules(cls: type) -> None:
    """Wrap a pipeline class's ``register_modules`` once; it acts only on what was saved with a compressed component.

    Every pipeline is put together through it, also one whose ``from_pretrained`` was under way when this package was
    imported (by its ``pipeline.py``). Components that the user loaded, and may have cast or trained, are left alone.
    """
    stock = cls.__dict__["register_modules"]
    if is_wrapped(stock):
        return

    @wrapping(stock)
    def register_modules(self: Any, **modules: Any) -> Any:
        parts = [part for part in modules.values() if isinstance(part, nn.Module)]
        homes = {_home(part) for part in parts if get_state(part) is not None} - {None}
        for part in parts:
            variant = _LOADED_WITHOUT_DTYPE.pop(part, None)
            if get_state(part) is None and _home(part) in homes:
                if variant is not None:
                    restore_stored_dtypes(part, variant)
                # Half precision stays mapped: copying a large text encoder that only passes by costs memory.
                align_tensors(part, torch.float32)
        return stock(self, **modules)

    cls.register_modules = register_modules  # type: ignore[attr-defined]


def _home(part: nn.Module) -> Any:
    """The pipeline's folder that a component was loaded from."""
    folder = folder_of(part)
    return None if folder is None else folder.resolve().parent


def wrap_from_single_file(cls: type) -> None:
    """Let no file of compressed weights be read as one of an original layout: each fails there in a way of its own."""
    stock = cls.__dict__["from_single_file"].__func__
    if is_wrapped(stock):
        return

    @wrapping(stock)
    def from_single_file(cls: type, *args: Any, **kwargs: Any) -> Any:
        given = (kwargs.get(name) for name in _SINGLE_FILE_ARGUMENTS)
        file = args[0] if args else next((value for value in given if value is not None), None)
        if isinstance(file, str | Path) and os.path.isfile(file) and read_metadata([file]) is not None:
            raise CheckpointError(
                f"{cls.__name__}.from_single_file: needs a dense model's file, got {Path(file).name} of a compressed "
                f"one, which its config.json belongs to. Load the folder: {cls.__name__}.from_pretrained(folder)."
            )
        return stock(cls, *args, **kwargs)

    cls.from_single_file = classmethod(from_single_file)  # type: ignore[attr-defined]


def restore_stored_dtypes(model: nn.Module, variant: str = "") -> None:
    """Cast a dense diffusers model's float32 tensors to the half-precision dtype they were read from; exact.

    The safetensors headers of the folder that the model was loaded from tell; without them nothing changes.
    """
    folder = folder_of(model)
    if folder is None:
        return
    from safetensors import safe_open

    tensors = model.state_dict(keep_vars=True)
    for file in sorted(file for file in folder.glob("*.safetensors") if variant_of(file.name) == variant):
        with safe_open(str(file), framework="pt") as handle:
            for key in handle.keys():
                tensor = tensors.get(key)
                dtype = _DTYPES.get(handle.get_slice(key).get_dtype())
                if tensor is not None and dtype is not None and tensor.dtype == torch.float32 and not tensor.is_meta:
                    tensor.data = tensor.data.to(dtype)
