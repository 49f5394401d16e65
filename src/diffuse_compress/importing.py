"""``import_quantized``: models that another library quantized, taken onto our layers with their codes as they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from diffuse_compress.components import is_pipeline, model_components
from diffuse_compress.errors import CheckpointError, ConfigError, ModelStateError
from diffuse_compress.integrations.compat import usable
from diffuse_compress.integrations.component import (
    ComponentState,
    align_tensors,
    foreign_quantization,
    layer_entries,
    quantized_layers,
)
from diffuse_compress.integrations.doors import marks_of
from diffuse_compress.integrations.imports import language, nunchaku
from diffuse_compress.integrations.imports.base import ForeignLayer, NotImportableError, as_linear, config_error
from diffuse_compress.integrations.imports.components import SOURCES, dense_parameters, foreign_layers, marks_aside
from diffuse_compress.integrations.peft import has_adapters
from diffuse_compress.integrations.placement import require_free
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.patterns import generalize
from diffuse_compress.progress import track
from diffuse_compress.quantization.convert import module_aliases, replace_module
from diffuse_compress.quantization.layers import QuantizedLinear
from diffuse_compress.quantization.scheme import Scheme
from diffuse_compress.quantization.spec import QuantizationSpec
from diffuse_compress.report import imported_report

__all__ = ["import_quantized"]

_Target = TypeVar("_Target")
_Converted = tuple[dict[str, QuantizedLinear], Counter[str]]


def import_quantized(target: _Target) -> Any:
    """Take a model that another library quantized onto our layers: same codes, same scales, nothing quantized anew.

    The result saves, reloads, offloads, takes LoRA and runs on the kernels as if ``compress`` had made it; its
    report says where the codes came from. Dequantized weights are checked to be the source's, bit for bit in float32.

    Args:
        target: one of

            * a pipeline or model loaded with ``TorchAoConfig`` (diffusers, transformers) or made by torchao's
              ``quantize_``: Int8Tensor, Float8Tensor;
            * a diffusers model loaded with ``GGUFQuantizationConfig``: Q8_0, Q4_0, Q4_1;
            * a diffusers model loaded with ``BFLQuantizationConfig``: fp8r;
            * the folder of a diffusers component in ``nunchaku_lite`` format (it holds ``config.json``), as a path: the
              files are read here, for diffusers loads them on some GPUs only;
            * the folder of a transformers model in compressed-tensors, fp8 (FineGrainedFP8Config, as DeepSeek-V3's),
              GPTQ or AWQ format, as a path: read here without the packages of these.

    Returns:
        ``target`` itself, compressed; for a folder the model, in the checkpoint's compute dtype on the CPU (a diffusers
        one to be handed to ``from_pretrained(..., transformer=model)``).

    Raises:
        ConfigError: neither of these, nothing here can be imported, or a layer is of a kind that our formats cannot
            hold exactly; the message names the layers, why, and what to do. Nothing was changed.
        CheckpointError: the folder holds no such checkpoint, or an incomplete one.
        ModelStateError: the model is under offload hooks, holds adapters, or is not loaded.

    Cost:
        Old and new layers stand in memory together until all are converted. Those of torchao and BFL share their codes;
        of GGUF the peak is twice the source's size. A transformers folder passes through the folder of temporary files.
    """
    if isinstance(target, str | Path):
        return _from_folder(_component_folder(target))
    models = _models_of(target)
    found = {name: foreign_layers(model) for name, model in models.items()}
    for name, model in models.items():
        _require_known(name, model, bool(found[name]))
    if not any(found.values()):
        raise ConfigError(
            f"{type(target).__name__}: import_quantized needs a model with layers of {SOURCES}, or the folder of a "
            "nunchaku_lite component, found none. To quantize a dense model, call compress()."
        )
    done: list[_Replaced] = []
    try:
        converted = {name: _convert(target, name, models[name], readers) for name, readers in found.items() if readers}
        for name, (layers, sources) in converted.items():
            done.append(_Replaced(models[name]))
            done[-1].commit(layers, sources)
    except BaseException:
        for item in reversed(done):
            item.roll_back()
        raise
    return target


def _component_folder(path: str | Path) -> Path:
    if not str(path) or not Path(path).is_dir():
        raise ConfigError(
            "import_quantized: a path must be the folder of a nunchaku_lite component or of a quantized language "
            f"model, got {str(path)!r}, which is no folder here. A repository of the Hub is fetched with "
            "huggingface_hub.snapshot_download(repo_id)."
        )
    return Path(path)


def _models_of(target: Any) -> dict[str, nn.Module]:
    if not isinstance(target, nn.Module) and not is_pipeline(target):
        raise ConfigError(
            f"import_quantized: needs a pipeline or model with layers of {SOURCES}, or the folder of a nunchaku_lite "
            f"component, got {type(target).__name__}. Load it with from_pretrained first."
        )
    return model_components(target)


def _require_known(name: str, model: nn.Module, has_layers: bool) -> None:
    method = foreign_quantization(model)
    if method in language.METHODS and not has_layers:
        raise ConfigError(
            f"{name or type(model).__name__}: import_quantized reads {method} from the folder of the model, got the "
            "model, of which another library has made layers of its own. Hand over the path."
        )
    if method is not None and not has_layers:
        raise ConfigError(
            f"{name or type(model).__name__}: import_quantized takes {SOURCES}, got a model quantized by {method}. "
            "Import the other components one by one, and load this one dense to compress it."
        )
    if has_layers:
        require_free(name or type(model).__name__, model, "import_quantized")
        if has_adapters(model):
            raise ModelStateError(
                f"{name or type(model).__name__}: import_quantized needs the layers themselves, found adapters around "
                "them. Call unload_lora_weights() first, and load the adapters again afterwards."
            )


def _convert(target: Any, name: str, model: nn.Module, readers: Mapping[str, Any]) -> _Converted:
    """Our layer for each foreign one, not yet in place, and how many there are of each source."""
    layers: dict[str, QuantizedLinear] = {}
    sources: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    label = name or type(model).__name__
    for layer in track(list(readers), f"Importing {label}", target, None, {}):
        module = model.get_submodule(layer)
        try:
            with torch.no_grad():
                foreign: ForeignLayer = readers[layer](module)
                layers[layer] = as_linear(module, foreign)  # type: ignore[arg-type]
        except NotImportableError as error:
            reasons[layer] = str(error)
            continue
        sources[foreign.source] += 1
    if reasons:
        raise config_error(label, reasons)
    return layers, sources


class _Replaced:
    """A component whose layers are replaced, and the way back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: list[tuple[str, nn.Module]] = []
        self._parameters: list[tuple[nn.Module, str, Any]] = []
        self._marks: marks_aside | None = None

    def commit(self, layers: Mapping[str, QuantizedLinear], sources: Counter[str]) -> None:
        """Put ``layers`` in place and mark the model as compressed."""
        model, aliases = self._model, module_aliases(self._model)
        for name, layer in layers.items():
            old = model.get_submodule(name)
            for alias in aliases[id(old)]:
                self._modules.append((alias, old))
                replace_module(model, alias, layer)
        for name, values in dense_parameters(model).items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            self._parameters.append((module, leaf, module._parameters[leaf]))
            dtype = getattr(module, "compute_dtype", None) or values.dtype
            module._parameters[leaf] = nn.Parameter(values.to(dtype), requires_grad=False)
        self._replace_dense_linears(aliases)
        self._marks = marks_aside(model)
        _mark(model, sources)

    def _replace_dense_linears(self, aliases: Mapping[int, list[str]]) -> None:
        """Stock layers for GGUFLinears whose weight was not quantized."""
        for module in list(self._model.modules()):
            if type(module).__name__ == "GGUFLinear":
                stock = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")  # type: ignore[arg-type]
                stock._parameters.update(module._parameters)
                for alias in aliases[id(module)]:
                    self._modules.append((alias, module))
                    replace_module(self._model, alias, stock.train(module.training))

    def roll_back(self) -> None:
        """The model as it was."""
        if self._marks is not None:
            self._marks.restore()
        for module, leaf, parameter in self._parameters:
            module._parameters[leaf] = parameter
        for name, module in reversed(self._modules):
            replace_module(self._model, name, module)


def _mark(model: Any, sources: Counter[str]) -> None:
    layers = quantized_layers(model)
    common = Counter(layer.scheme for layer in layers.values()).most_common(1)[0][0]
    schemes: dict[str, Scheme | None] = {
        name: layers[name].scheme if name in layers else None
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    spec = QuantizationSpec(common, common, rules=tuple(generalize(schemes)))
    state = ComponentState(QuantizationConfig.from_spec(spec, _compute_dtype(model)), layer_entries(model))
    marks_of(model)[0](model, state)
    state.report = imported_report(model, spec, sources)


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """dtype of most quantized layers: what a reload without a dtype gives to the rest."""
    return Counter(layer.compute_dtype for layer in quantized_layers(model).values()).most_common(1)[0][0]


# --- checkpoints that the stock library does not load here ------------------------------------------------------


def _from_folder(folder: Path) -> Any:
    config, quantization = _read_config(folder)
    if quantization["quant_method"] in language.METHODS:
        loaded, origin = language.load(folder, config, _read_tensors(folder))
        _mark(loaded, origin)
        return loaded
    import diffusers
    from accelerate import init_empty_weights

    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: _class_name must be a model class of diffusers, got "
            f"{config.get('_class_name')!r}. pip install -U diffusers, or take a checkpoint in diffusers format."
        )
    with init_empty_weights():
        model = cls.from_config({key: value for key, value in config.items() if key != "quantization_config"})
    tensors = _read_tensors(folder)
    layers, sources = _read_layers(model, quantization, tensors, folder)
    for name, layer in layers.items():
        replace_module(model, name, layer)
    dtype = getattr(torch, str(quantization.get("compute_dtype", "bfloat16")))
    _fill(model, tensors, dtype, folder)
    align_tensors(model)
    _mark(model, sources)
    return model.eval()


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"import_quantized: a path must be the folder of a component, with config.json, got {folder} ({error}). "
            "Of a pipeline give the subfolder, as in 'pipeline/transformer'; a repository of the Hub is fetched with "
            "huggingface_hub.snapshot_download(repo_id)."
        ) from error
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method not in (nunchaku.METHOD, *language.METHODS):
        known = ", ".join(map(repr, (nunchaku.METHOD, *language.METHODS)))
        raise CheckpointError(
            f"{folder / 'config.json'}: import_quantized reads files of quant_method {known}, got {method!r}. Load "
            "other ones with from_pretrained, and hand over the model."
        )
    library = "diffusers" if method == nunchaku.METHOD else "transformers"
    if not usable(library):
        raise ConfigError(f"import_quantized: this folder is read for {library}, which cannot be imported.")
    return config, quantization


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error}). Download it again.") from error
    if not tensors:
        raise CheckpointError(f"{folder}: no safetensors file beside config.json. Download the checkpoint again.")
    return tensors


def _read_layers(
    model: nn.Module, quantization: Mapping[str, Any], tensors: dict[str, torch.Tensor], folder: Path
) -> _Converted:
    """Our layers for the checkpoint's targets, whose tensors are taken out of ``tensors``."""
    layers: dict[str, QuantizedLinear] = {}
    sources: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    todo = [(section, name) for section in nunchaku.sections(quantization) for name in section.targets]
    for section, name in track(todo, f"Importing {type(model).__name__}", model, None, {}):
        module = dict(model.named_modules()).get(name)
        if not isinstance(module, nn.Linear):
            reasons[name] = (
                f"the model has no linear layer of this name; load it with the diffusers that {folder} is for"
            )
            continue
        own = {leaf: tensors.pop(f"{name}.{leaf}", None) for leaf in (*nunchaku.TENSORS[section.method], "bias")}
        given = {leaf: tensor for leaf, tensor in own.items() if tensor is not None}
        try:
            foreign = nunchaku.read(section, given, (module.out_features, module.in_features))
        except NotImportableError as error:
            reasons[name] = str(error)
            continue
        if module.bias is not None and foreign.bias is None:
            reasons[name] = "the checkpoint lacks its bias: download it again"
            continue
        layers[name] = as_linear(module, foreign)
        sources[foreign.source] += 1
    if reasons:
        raise config_error(str(folder), reasons)
    if not layers:
        raise CheckpointError(f"{folder / 'config.json'}: quantization_config lists no targets. Download it again.")
    return layers, sources


def _fill(model: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> None:
    """The dense tensors of a checkpoint into a meta-device model, in ``dtype`` but for what its class keeps in fp32."""
    packed = {f"{name}.{leaf}" for name, layer in quantized_layers(model).items() for leaf in layer.state_dict()}
    expected = model.state_dict().keys() - packed
    missing, unexpected = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or unexpected:
        raise CheckpointError(
            f"{folder}: the tensors must be those of {type(model).__name__}, got {len(missing)} missing "
            f"({', '.join(missing[:3])}) and {len(unexpected)} unexpected ({', '.join(unexpected[:3])}). It is "
            "incomplete, or for another version of diffusers."
        )
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    values = {}
    for key, tensor in tensors.items():
        target = torch.float32 if set(kept) & set(key.split(".")) else dtype
        values[key] = tensor.to(target) if tensor.is_floating_point() else tensor
    model.load_state_dict(values, strict=False, assign=True)
