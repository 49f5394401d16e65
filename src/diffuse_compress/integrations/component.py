"""What a compressed component carries, whichever library it comes from, and how it is written to a checkpoint.

The exact layer map and the report travel in the safetensors metadata (one JSON string), because the Hub's download
filter drops sidecar files; ``config.json`` holds the patterns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.assignment import split_layers
from diffuse_compress.errors import CheckpointError, DiffuseCompressError
from diffuse_compress.integrations.methods import KINDS, Stored
from diffuse_compress.integrations.quantization_config import QUANT_METHOD, QuantizationConfig
from diffuse_compress.patterns import first_match
from diffuse_compress.quantization.convert import placeholder_for, replace_module
from diffuse_compress.quantization.layers import QuantizedConv2d, QuantizedLinear
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.quantization.spec import SCHEMA_VERSION, QuantizationSpec
from diffuse_compress.quantization.split import HIDDEN, SKIP, SplitConv2d, split_conv

__all__ = [
    "ASK_THE_MODEL",
    "FP32_PARAMETER_NAMES",
    "METADATA_KEY",
    "ComponentState",
    "LayerEntry",
    "align_tensors",
    "describe_methods",
    "foreign_quantization",
    "get_state",
    "install_placeholders",
    "layer_entries",
    "layers_of_checkpoint",
    "metadata_of",
    "quantized_layers",
    "read_metadata",
    "require_keys",
]

METADATA_KEY = QUANT_METHOD
ASK_THE_MODEL = ""
# What torch's own CPU allocations are aligned to, and what vectorised products expect.
_ALIGNMENT = 64
# Kept in fp32 whatever the model's dtype: rounding them to bf16 would cost 0.4 % of every weight.
FP32_PARAMETER_NAMES = ("scale", "input_scale", "zero_point", "act_pre_shift", "act_pre_scale")


@dataclass(frozen=True)
class LayerEntry:
    """What must be known of a converted layer before its tensors are loaded.

    Attributes:
        scheme: its format.
        compute_dtype: dtype of its inputs and bias.
        act_pre_scale: it has a per-input-channel smoothing scale.
        low_rank: rank of its low-rank branch, 0 for none.
        dense_columns: number of its input columns that are dense beside the codes.
        sparse_outliers: number of single weights that are added to what its codes stand for.
        folded: a smoothing scale of its input or output is inside other weights.
        part_channels: input channels of a part of a convolution that is split (``split.py``); 0 for a whole layer.
        act_pre_shift: it has a shift of its input.
        gained_bias: it has a bias, which the dense layer has not.
    """

    scheme: Scheme
    compute_dtype: torch.dtype
    act_pre_scale: bool = False
    low_rank: int = 0
    folded: bool = False
    part_channels: int = 0
    act_pre_shift: bool = False
    gained_bias: bool = False
    dense_columns: int = 0
    sparse_outliers: int = 0


@dataclass
class ComponentState:
    """Everything known of a compressed component beyond its tensors.

    Attributes:
        config: the resolved configuration, as in config.json.
        layers: {qualified name: entry}; exact.
        report: the component's part of the report (see ``report.py``), or None if never measured.
        preview: pictures before and after, for the live report; never written.
        base_model: Hub id of the dense model, None where it is not known. ``ASK_THE_MODEL`` where weights were
            quantized on their way in: both libraries tell the model its name after that.
        results: evaluation records for the card (see ``card_results.py``); not written with the weights.
        merge_errors: {layer: error} of adapters fused into packed layers, as of the last save (see ``peft.py``).
        stored: {kind: method} as it is being written, during a save, or of a model without weights (``skeleton.py``) as
            its checkpoint holds it.
    """

    config: QuantizationConfig
    layers: dict[str, LayerEntry]
    report: dict[str, Any] | None = field(default=None)
    preview: list[Any] = field(default_factory=list, repr=False, compare=False)
    base_model: str | None = None
    results: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    merge_errors: dict[str, float] = field(default_factory=dict, compare=False)
    stored: Mapping[str, Stored] = field(default_factory=dict, repr=False, compare=False)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear | QuantizedConv2d]:
    """Converted layers by qualified name, in registration order."""
    return {name: mod for name, mod in model.named_modules() if isinstance(mod, QuantizedLinear | QuantizedConv2d)}


def weight_elements(layer: Any) -> int:
    """Elements of a linear's or convolution's dense weight, also where it is packed."""
    if isinstance(layer, QuantizedLinear | QuantizedConv2d):
        return int(layer.qweight.shape[0]) * layer.quantized_weight().in_features
    return int(layer.weight.numel())


def describe_methods(state: ComponentState | None) -> dict[str, str]:
    """{title: what it is, in one line} of what a component carries beside weights, as its checkpoint says."""
    if state is None:
        return {}
    configs = state.config.methods
    return {KINDS[kind].title: KINDS[kind].describe(config, state.stored.get(kind)) for kind, config in configs.items()}


def layer_entries(model: nn.Module) -> dict[str, LayerEntry]:
    """The layer map of a live model."""
    entries = {}
    for name, layer in quantized_layers(model).items():
        low_rank = getattr(layer, "low_rank_down", None)
        columns, sparse = getattr(layer, "dense_columns", None), getattr(layer, "outlier_values", None)
        entries[name] = LayerEntry(
            layer.scheme,
            layer.compute_dtype,
            getattr(layer, "act_pre_scale", None) is not None,
            0 if low_rank is None else low_rank.shape[0],
            layer.folded,
            _part_channels(model, name),
            layer.act_pre_shift is not None,
            layer.gained_bias,
            0 if columns is None else columns.shape[0],
            0 if sparse is None else sparse.shape[0],
        )
    return entries


def _part_channels(model: nn.Module, name: str) -> int:
    parent, _, leaf = name.rpartition(".")
    conv = model.get_submodule(parent)
    if not isinstance(conv, SplitConv2d):
        return 0
    return conv.hidden.in_channels if leaf == HIDDEN else conv.skip.in_channels


def get_state(component: Any) -> ComponentState | None:
    """State of a component compressed by this package, else None."""
    state = getattr(getattr(component, "hf_quantizer", None), "state", None)
    return state if isinstance(state, ComponentState) else None


def foreign_quantization(component: Any) -> str | None:
    """Name of another library's quantization on this component, or None."""
    quantizer = getattr(component, "hf_quantizer", None)
    if quantizer is not None and get_state(component) is None:
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
        return str(getattr(method, "value", method) or type(quantizer).__name__)
    for module in component.modules():
        origin = type(module).__module__.partition(".")[0]
        if origin in {
            "bitsandbytes",
            "optimum",
            "sdnq",
            "nunchaku",
            "auto_gptq",
            "gptqmodel",
            "awq",
            "hqq",
            "modelopt",
        }:
            return origin
        weight = module._parameters.get("weight")
        if weight is not None and type(weight.data) is not torch.Tensor and "torchao" in type(weight.data).__module__:
            return "torchao"
    return None


def metadata_of(state: ComponentState) -> dict[str, str]:
    """Safetensors metadata of a component: one key, one JSON string; equal states give equal strings."""
    labels: dict[Scheme, str] = {}
    layers: dict[str, list[Any]] = {}
    main_dtype = state.config.compute_dtype
    for name, entry in state.layers.items():
        label = labels.setdefault(entry.scheme, str(len(labels)))
        extra: dict[str, Any] = {}
        if entry.compute_dtype != main_dtype:
            extra["compute_dtype"] = _dtype_name(entry.compute_dtype)
        if entry.act_pre_scale:
            extra["act_pre_scale"] = True
        if entry.low_rank:
            extra["low_rank"] = entry.low_rank
        if entry.folded:
            extra["folded"] = True
        if entry.part_channels:
            extra["part_channels"] = entry.part_channels
        if entry.act_pre_shift:
            extra["act_pre_shift"] = True
        if entry.gained_bias:
            extra["gained_bias"] = True
        if entry.dense_columns:
            extra["dense_columns"] = entry.dense_columns
        if entry.sparse_outliers:
            extra["sparse_outliers"] = entry.sparse_outliers
        layers[name] = [label, extra] if extra else [label]
    content = {
        "schema_version": SCHEMA_VERSION,
        "compute_dtype": None if main_dtype is None else _dtype_name(main_dtype),
        "schemes": {label: scheme.to_dict() for scheme, label in labels.items()},
        "layers": layers,
        "report": state.report,
    }
    if state.base_model:
        content["base_model"] = state.base_model
    if state.merge_errors:
        content["merge_errors"] = state.merge_errors
    if state.stored:
        content["methods"] = {kind: {"config": m.config, "meta": m.meta} for kind, m in state.stored.items()}
    return {METADATA_KEY: json.dumps(content, separators=(",", ":"), sort_keys=True)}


def read_metadata(files: Iterable[str | Path] | None) -> dict[str, Any] | None:
    """Our metadata from the first safetensors file that has it, or None.

    Raises:
        CheckpointError: the metadata is not JSON, or its schema is newer than this release.
    """
    from safetensors import SafetensorError, safe_open

    for file in files or ():
        if not str(file).endswith(".safetensors"):
            continue
        try:
            with safe_open(str(file), framework="pt") as handle:
                text = (handle.metadata() or {}).get(METADATA_KEY)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{Path(file).name}: not a readable safetensors file ({error}). It is truncated or corrupted: "
                "download or save the checkpoint again."
            ) from error
        if text is None:
            continue
        try:
            content = json.loads(text)
            version = int(content["schema_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{Path(file).name}: unreadable metadata ({error}). Save the checkpoint anew."
            ) from error
        if version > SCHEMA_VERSION:
            raise CheckpointError(
                f"{Path(file).name}: schema_version must be up to {SCHEMA_VERSION}, got {version}. The checkpoint was "
                "written by a newer release: pip install -U diffuse-compress."
            )
        return dict(content)
    return None


def layers_of_checkpoint(
    model: nn.Module, spec: QuantizationSpec, metadata: Mapping[str, Any] | None, dtype: torch.dtype
) -> dict[str, LayerEntry]:
    """The layer map of a checkpoint: from its metadata, or from the config's patterns where it has none.

    ``dtype`` is what the model is being loaded in; layers stored in another dtype than the model's main one keep it.
    """
    if metadata is not None:
        schemes = {label: Scheme.from_dict(value) for label, value in metadata["schemes"].items()}
        entries = {}
        for name, (label, *rest) in metadata["layers"].items():
            extra = dict(rest[0]) if rest else {}
            own = extra.pop("compute_dtype", None)
            entries[name] = LayerEntry(schemes[label], dtype if own is None else getattr(torch, own), **extra)
        return entries
    rules = spec.rules or ()
    entries = {}
    splits = split_layers(model) if spec.split_skips else {}
    for name, module in model.named_modules():
        parts = {name: 0}
        if name in splits:
            assert isinstance(module, nn.Conv2d)
            parts = {f"{name}.{HIDDEN}": splits[name], f"{name}.{SKIP}": module.in_channels - splits[name]}
        for part, channels in parts.items():
            scheme = first_match(rules, part) if isinstance(module, nn.Linear | nn.Conv2d) else None
            if scheme is not None:
                entries[part] = LayerEntry(scheme, dtype, part_channels=channels)
    return entries


def install_placeholders(model: nn.Module, layers: Mapping[str, LayerEntry]) -> None:
    """Replace the layers of a meta-device model by empty quantized ones, ready for their tensors.

    Raises:
        CheckpointError: a layer is missing from the model or of another type.
    """
    for name, entry in layers.items():
        try:
            if entry.part_channels:
                _split_for(model, name, entry.part_channels)
            module = model.get_submodule(name)
            layer = placeholder_for(
                module,
                entry.scheme,
                compute_dtype=entry.compute_dtype,
                act_pre_scale=entry.act_pre_scale,
                low_rank=entry.low_rank,
                act_pre_shift=entry.act_pre_shift,
                bias=entry.gained_bias,
                dense_columns=entry.dense_columns,
                sparse_outliers=entry.sparse_outliers,
            )
            layer.folded = entry.folded
        except (AttributeError, DiffuseCompressError, TypeError) as error:
            raise CheckpointError(
                f"{type(model).__name__}.{name}: the checkpoint holds a quantized layer here, the model class does "
                f"not ({error}). Load it with the class and library version it was saved with."
            ) from error
        replace_module(model, name, layer)


def _split_for(model: nn.Module, part: str, channels: int) -> None:
    """Take a stock convolution apart that this part belongs to, if it is not yet."""
    name, _, leaf = part.rpartition(".")
    conv = model.get_submodule(name)
    if not isinstance(conv, SplitConv2d):
        total = getattr(conv, "in_channels", 0)
        replace_module(model, name, split_conv(conv, channels if leaf == HIDDEN else total - channels))


def require_keys(model: nn.Module, layers: Iterable[str], present: Iterable[str]) -> None:
    """Raise CheckpointError if a tensor of ``layers`` is not among the ``present`` keys (the model's own names)."""
    have, layers = set(present), list(layers)
    needed = (f"{name}.{leaf}" for name in layers for leaf in model.get_submodule(name).state_dict())
    missing = [key for key in needed if key not in have]
    if layers and not any(f"{name}.scale" in have for name in layers):
        raise CheckpointError(
            f"{type(model).__name__}: needs the compressed weights that config.json tells of, found a file of dense "
            "ones. They are of another variant than the one that was compressed last, and saved over config.json with "
            "it. Load with the variant= that is compressed (or without), or put the dense model's config.json back."
        )
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(
            f"{type(model).__name__}: the checkpoint lacks {len(missing)} tensors of its quantized layers ({shown}). "
            "It is incomplete: download or save it again."
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def align_tensors(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Copy CPU tensors (of ``dtype`` only, if given) that a file's layout left unaligned.

    They point into the mapped checkpoint at any multiple of their element size, and a float product over them may
    differ in the last bit from that of the model that was saved.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and dtype in (None, tensor.dtype) and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
