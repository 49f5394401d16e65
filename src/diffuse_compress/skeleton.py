"""A pipeline or model folder as models on the meta device, from its JSON files and safetensors headers alone.

Enough to plan a compression or to look at one, without reading a weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.components import GROUPS
from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.integrations.component import (
    ComponentState,
    install_placeholders,
    layer_entries,
    layers_of_checkpoint,
    read_metadata,
)
from diffuse_compress.integrations.doors import marks_of
from diffuse_compress.integrations.methods import read_methods
from diffuse_compress.integrations.peft import restore_merge_errors
from diffuse_compress.integrations.quantization_config import QUANT_METHOD, QuantizationConfig

__all__ = ["MODEL_FILES", "default_dtype", "load", "local_folder", "model_class", "read_skeleton", "stored_dtype"]

_PIPELINE_INDEX = "model_index.json"
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""What is fetched of a repository that holds a model, not a pipeline."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def local_folder(name: str, *, weights: bool, revision: str | None = None) -> Path:
    """The folder of a pipeline or model: a path, or a Hub repository that is fetched into the cache.

    Args:
        name: path or ``owner/name``.
        weights: False fetches the JSON files only.
        revision: of a repository: branch, tag or commit; None means its main branch.

    Raises:
        ConfigError: neither a folder nor a repository that can be reached.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"{name}: not a folder. Give the folder of a pipeline or model, or a Hub id (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*/*.json"]))
        if not weights:
            return found
        if (found / _PIPELINE_INDEX).is_file():
            # Knows which of a repository's weight files the pipeline needs.
            from diffusers import DiffusionPipeline

            return Path(DiffusionPipeline.download(name, revision=revision))
        return Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES))
    except Exception as error:  # offline, not found, gated: the Hub client has a class for each
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{name}: no such folder here, and the Hub gave: {reason}") from error


def load(folder: Path, dtype: torch.dtype | Mapping[str, torch.dtype] | None, device: str | None) -> Any:
    """The pipeline or model of ``folder`` with its weights, through the stock ``from_pretrained``.

    ``dtype`` may be ``{component or "default": dtype}`` for a pipeline.
    """
    options = {} if dtype is None else {"dtype": dtype}
    if (folder / _PIPELINE_INDEX).is_file():
        from diffusers import DiffusionPipeline

        target = DiffusionPipeline.from_pretrained(folder, **options)
    else:
        target = model_class(folder).from_pretrained(folder, **options).eval()
    return target if device is None else target.to(device)


def read_skeleton(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A stand-in of the pipeline's name that lists its components, or a bare model; all on the meta device.

    Args:
        folder: written by ``save_pretrained``.
        dtype: that the weights would be loaded in; None takes what is stored, else bfloat16.

    Raises:
        ConfigError: no pipeline or model in the folder, or of a class that is not installed.
        CheckpointError: a compressed component whose stored layers do not fit its class.
    """
    index = folder / _PIPELINE_INDEX
    if not index.is_file():
        return _meta_model(folder, model_class(folder), dtype)
    entries = _read_json(index)
    components: dict[str, Any] = {}
    for name, value in entries.items():
        if name.startswith("_") or not isinstance(value, list) or not (folder / name / "config.json").is_file():
            continue
        cls = _class_named(str(value[0]), str(value[1]))
        if cls is not None and issubclass(cls, nn.Module):
            components[name] = _meta_model(folder / name, cls, dtype)
    if not components:
        raise ConfigError(f"{folder}: {_PIPELINE_INDEX} names no model whose class is installed.")
    return type(str(entries.get("_class_name", "Pipeline")), (), {"components": components})()


def model_class(folder: Path) -> type[Any]:
    """Class of the single model in ``folder``.

    Raises:
        ConfigError: there is none.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"{folder}: neither {_PIPELINE_INDEX} nor config.json: not a pipeline or model.")
    data = _read_json(config)
    for library, name in (
        ("diffusers", data.get("_class_name")),
        *(("transformers", n) for n in data.get("architectures") or ()),
    ):
        found = _class_named(library, str(name)) if name else None
        if found is not None:
            return found
    raise ConfigError(f"{config}: names no class of diffusers (_class_name) or transformers (architectures).")


def stored_dtype(folder: Path) -> torch.dtype | None:
    """What the denoiser (or the model itself) is stored in, from a safetensors header; None if there is none.

    Of a compressed component: its compute dtype.
    """
    folders = [folder]
    if (folder / _PIPELINE_INDEX).is_file():
        parts = sorted(path.parent for path in folder.glob("*/config.json"))
        folders = [path for path in parts if GROUPS["denoisers"].match(path.name)] or parts
    for part in folders:
        quantization = _read_json(part / "config.json").get("quantization_config") if part.exists() else None
        if isinstance(quantization, dict) and isinstance(
            getattr(torch, str(quantization.get("compute_dtype")), None), torch.dtype
        ):
            return getattr(torch, quantization["compute_dtype"])
        counts: dict[str, int] = {}
        for dtype, size in _header_dtypes(part):
            counts[dtype] = counts.get(dtype, 0) + size
        if counts:
            return _DTYPES[max(counts, key=counts.__getitem__)]
    return None


def default_dtype(name: str, folder: Path, device: str | torch.device | None) -> torch.dtype | None:
    """The dtype to load in: one of torch's by name, or for "auto" what is stored, but float32 for float16 on a CPU."""
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    stored = stored_dtype(folder)
    on_cpu = device is None or torch.device(device).type == "cpu"
    return torch.float32 if stored is torch.float16 and on_cpu else stored


def _meta_model(folder: Path, cls: Any, dtype: torch.dtype | None) -> nn.Module:
    data = _read_json(folder / "config.json")
    quantization = data.pop("quantization_config", None)
    dtype = dtype or stored_dtype(folder) or torch.bfloat16
    with torch.device("meta"):
        model = cls.from_config(data) if hasattr(cls, "load_config") else cls(cls.config_class.from_dict(data))
    _cast(model.eval(), dtype)
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        config = QuantizationConfig.from_dict(quantization)
        files = [str(file) for file in sorted(folder.glob("*.safetensors"))]
        metadata = read_metadata(files)
        install_placeholders(model, layers_of_checkpoint(model, config.spec, metadata, dtype))
        mark, _ = marks_of(model)
        stored = read_methods(files, (metadata or {}).get("methods", {}))
        mark(model, ComponentState(config, layer_entries(model), (metadata or {}).get("report"), stored=stored))
        restore_merge_errors(model, (metadata or {}).get("merge_errors", {}))
    return model


def _cast(model: Any, dtype: torch.dtype) -> None:
    """To ``dtype``, but for what the library's own loading keeps in float32."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not hasattr(model, "load_config") and dtype is not torch.float16:
        kept = set()  # transformers means float16 only
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)


def _header_dtypes(folder: Path) -> Iterator[tuple[str, int]]:
    """(dtype, elements) of every floating point tensor stored in a folder."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as handle:
                for key in handle.keys():
                    tensor = handle.get_slice(key)
                    if tensor.get_dtype() in _DTYPES:
                        yield tensor.get_dtype(), torch.Size(tensor.get_shape()).numel()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error}). Download it again.") from error


def _class_named(library: str, name: str) -> type[Any] | None:
    """A class of diffusers or transformers, or of a module inside diffusers.pipelines."""
    for module in (library, f"diffusers.pipelines.{library}"):
        try:
            found = getattr(import_module(module), name, None)
        except ImportError:
            continue
        if isinstance(found, type):
            return found
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}).") from error
    return data if isinstance(data, dict) else {}
