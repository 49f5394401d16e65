"""Folders of language models in compressed-tensors, fp8, GPTQ or AWQ format, read without the packages of these."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.errors import CheckpointError, ConfigError
from diffuse_compress.integrations.component import ComponentState, LayerEntry, metadata_of
from diffuse_compress.integrations.imports import compressed_tensors, fp8, gptq
from diffuse_compress.integrations.imports.base import ForeignLayer, NotImportableError, as_linear, config_error
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.progress import track
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.quantization.spec import QuantizationSpec

__all__ = ["METHODS", "load"]

_Tensors = dict[str, torch.Tensor]
_Read = Callable[[str, Mapping[str, torch.Tensor], Mapping[str, Any]], ForeignLayer]
_BESIDE = ("generation_config.json",)
# What from_pretrained is told of the model's dtype in config.json, by release of transformers.
_DTYPE_KEYS = ("dtype", "torch_dtype")

# {quant_method: (names of the layers in a file, reader, leaves, what makes a whole checkpoint unreadable)}
METHODS: dict[str, tuple[Callable[[_Tensors], list[str]], _Read, tuple[str, ...], Callable[..., str | None]]] = {
    compressed_tensors.METHOD: (
        compressed_tensors.names,
        compressed_tensors.read,
        compressed_tensors.TENSORS,
        compressed_tensors.whole_reason,
    ),
    fp8.METHOD: (fp8.names, fp8.read, fp8.TENSORS, fp8.whole_reason),
    gptq.METHOD: (gptq.names, gptq.read, gptq.TENSORS, gptq.whole_reason),
    gptq.AWQ_METHOD: (gptq.names, gptq.read_awq, gptq.TENSORS, gptq.whole_reason_awq),
}


def load(folder: Path, config: dict[str, Any], tensors: _Tensors) -> tuple[Any, Counter[str]]:
    """(model on our layers, {what its layers were: how many}); the model is not marked with where they came from.

    Its tensors are written as our checkpoint into a temporary folder and loaded from there by transformers itself, so
    names, tied weights and dtypes are what a reload of it would make of them.

    Args:
        folder: of the checkpoint.
        config: its config.json.
        tensors: of its files; emptied.

    Raises:
        ConfigError: a layer is of a kind that our formats cannot hold exactly.
        CheckpointError: no quantized layers, an architecture that transformers does not have, or missing tensors.
    """
    quantization = config["quantization_config"]
    find, read, leaves, whole_reason = METHODS[quantization["quant_method"]]
    reason = whole_reason(quantization)
    if reason is not None:
        raise ConfigError(f"{folder}: import_quantized cannot read this checkpoint: {reason}. Load a dense one.")
    cls, dtype = _model_class(folder, config), _dtype(config)
    entries: dict[str, LayerEntry] = {}
    sources: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for name in track(find(tensors), f"Importing {cls.__name__}", None, None, {}):
        own = {leaf: tensors.pop(f"{name}.{leaf}") for leaf in (*leaves, "bias") if f"{name}.{leaf}" in tensors}
        try:
            found = read(name, own, quantization)
            if not bool(found.weight.scale.isfinite().all()):
                raise NotImportableError("a scale is inf or nan; the file is damaged: download it again")
        except NotImportableError as error:
            reasons[name] = str(error)
            continue
        except KeyError as error:
            raise CheckpointError(f"{folder}: {name} lacks {error}. It is incomplete: download it again.") from error
        entries[name] = LayerEntry(found.scheme, dtype)
        sources[found.source] += 1
        tensors |= _ours(name, found, dtype)
    if reasons:
        raise config_error(str(folder), reasons)
    if not entries:
        raise CheckpointError(f"{folder}: its files hold no layer in the format of its config.json. Download it again.")
    return _loaded(folder, cls, config, entries, tensors, dtype), sources


def _model_class(folder: Path, config: Mapping[str, Any]) -> Any:
    import transformers

    name = next(iter(config.get("architectures") or ()), None)
    cls = getattr(transformers, str(name), None)
    if cls is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: architectures must name a model class of transformers, got {name!r}. "
            "pip install -U transformers, or take a checkpoint of a model that it has."
        )
    return cls


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    nested = config.get("text_config") or {}
    named = next((part[key] for part in (config, nested) for key in _DTYPE_KEYS if part.get(key)), "float32")
    dtype = getattr(torch, str(named).removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


def _ours(name: str, found: ForeignLayer, dtype: torch.dtype) -> _Tensors:
    """Its tensors as our checkpoints of transformers models have them."""
    rows, columns = found.weight.qweight.shape[0], found.weight.in_features
    bias = None if found.bias is None else found.bias.to(dtype)
    dense = nn.Linear(columns, rows, bias is not None, device="meta", dtype=dtype)
    if bias is not None:
        dense.bias = nn.Parameter(bias, requires_grad=False)
    layer = as_linear(dense, ForeignLayer(found.weight, found.scheme, dtype, found.source, found.extra))
    tensors = {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in layer.state_dict().items()}
    tensors[f"{name}.weight"] = tensors.pop(f"{name}.qweight").unsqueeze(0)
    return tensors


def _loaded(
    folder: Path,
    cls: Any,
    config: Mapping[str, Any],
    entries: dict[str, LayerEntry],
    tensors: _Tensors,
    dtype: torch.dtype,
) -> Any:
    from safetensors.torch import save_file

    common: Scheme = Counter(entry.scheme for entry in entries.values()).most_common(1)[0][0]
    ours = QuantizationConfig.from_spec(QuantizationSpec(common, common), dtype)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        for file in _BESIDE:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, Path(place) / file)
        written = {**config, "quantization_config": ours.to_dict()}
        (Path(place) / "config.json").write_text(json.dumps(written), encoding="utf-8")
        metadata = {**metadata_of(ComponentState(ours, entries)), "format": "pt"}
        save_file(tensors, Path(place) / "model.safetensors", metadata=metadata)
        tensors.clear()
        model, info = cls.from_pretrained(place, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{folder}: lacks {len(missing)} tensors of {cls.__name__} ({', '.join(missing[:3])}). Download it again."
        )
    model.name_or_path = model.config._name_or_path = str(folder)
    return model
