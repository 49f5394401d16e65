"""What compression did, what it saved and what it cost.

The part that was measured is stored with the component (safetensors metadata) and so survives save and reload. How a
component is computed is looked up when the report is asked for, on the device where it is then.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.components import SELF, model_components
from diffuse_compress.errors import ConfigError
from diffuse_compress.integrations.component import ComponentState, get_state, quantized_layers
from diffuse_compress.integrations.methods import live_methods
from diffuse_compress.integrations.peft import merge_errors
from diffuse_compress.measurement import LayerMeasurement, PipelineProbe, PreviewPair
from diffuse_compress.plan import ComponentPlan, PlanRow, stored_bytes, tensor_rows
from diffuse_compress.plan_text import group_rows, shrink_hint
from diffuse_compress.quantization.spec import QuantizationSpec
from diffuse_compress.report_html import render_fragment, render_page
from diffuse_compress.report_text import render_markdown, render_text
from diffuse_compress.versions import installed_versions

__all__ = [
    "CompressionReport",
    "component_report",
    "imported_report",
    "report_kind",
    "report_of",
]

SCHEMA_VERSION = 1
MOST_SENSITIVE = 10
_MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


class CompressionReport:
    """Made by :func:`report_of` (``pipe.compression_report()``); ``str()``, notebook HTML, markdown, JSON.

    Attributes:
        target_class: class of the pipeline or model.
        components: {name: dict} of the compressed components, as in :meth:`to_dict`; a bare model's name is "".
        untouched: {name: bytes} of models that are not compressed.
        preview: pairs of pictures; only in the process that compressed.
    """

    def __init__(
        self,
        target_class: str,
        components: dict[str, dict[str, Any]],
        untouched: dict[str, int],
        preview: list[PreviewPair],
    ) -> None:
        self.target_class, self.components, self.untouched, self.preview = target_class, components, untouched, preview

    @property
    def bytes_before(self) -> int:
        """Bytes on disk of the compressed components, before."""
        return sum(part["disk_bytes"]["before"] for part in self.components.values())

    @property
    def bytes_after(self) -> int:
        """Bytes on disk of the compressed components, now."""
        return sum(part["disk_bytes"]["after"] for part in self.components.values())

    @property
    def hint(self) -> str:
        """The call that would shrink the largest untouched component, if it is over a quarter of what is left."""
        return shrink_hint(self.untouched, self.bytes_after)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form. Two runs on one machine differ under the keys ``volatile`` only.

        ::

            {"schema_version": 1, "target": class name, "hint": text or "",
             "bytes": {"before", "after", "untouched": {component: bytes}},     # on disk; untouched not in the sums
             "preview": [{"prompt", "psnr_db"}],                                 # null dB: equal pictures
             "components": {name: {
                "schema_version": 1, "class", "preset": name or null, "scheme", "algorithm": text,
                "measured": true if written by compress, false if only what the layers tell is known,
                "imported": {source: layers},            # only of models that import_quantized made
                "search": text,                          # only after a search for formats: what was asked, looked at
                "calibration": what it was calibrated on,  # only of calibrated ones: Calibration.settings_of
                "made_dynamic": [name],                  # only where no sample reached layers of static inputs
                "methods": {kind: {"title", "summary", ...}},  # beside weights, only where there are some
                "parameters": count of the dense component,
                "disk_bytes": {"before", "after"},       # exact tensor bytes of a checkpoint, headers excluded
                "memory_bytes": {"before", "after"},     # parameters and all buffers
                "formats": [{"format", "layers", "parameters", "parameter_share", "macs", "mac_share"}],
                                                         # macs of the probe run; null where not measured
                "kept": [{"pattern", "tensors", "parameters", "bytes", "reason"}],
                "output_error": {"timesteps": [t or null], "relative_error": [||y - yhat|| / ||y||],
                                 "setting": text, "note": text},
                "layers": [[name, relative weight error, relative output error or null], ...],
                "sensitive_layers": [[name, weight error, output error or null], ...],   # ten, largest error first
                "compute": [{"scheme", "kind", "layers", "device", "dtype", "path", "description", "is_integer",
                             "faster_than_dense": true, false or null for unmeasured}],  # of where it is now
                "volatile": {"seconds", "call_seconds": {"before", "after"} or null,  # one recorded call, measured then
                             "peak_memory_bytes", "device", "date", "versions"}}}}

        Errors that are not finite are null.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "target": self.target_class,
            "hint": self.hint,
            "bytes": {"before": self.bytes_before, "after": self.bytes_after, "untouched": dict(self.untouched)},
            "preview": [{"prompt": pair.prompt, "psnr_db": _finite(pair.psnr_db)} for pair in self.preview],
            "components": self.components,
        }

    def to_markdown(self) -> str:
        """Headline and tables, e.g. for a model card."""
        return render_markdown(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write to ``.html`` (self-contained, with the pictures), ``.json`` or ``.md``.

        Raises:
            ConfigError: another suffix.
        """
        kind = report_kind(path)
        if kind == "html":
            text = render_page(self.to_dict(), self.preview)
        elif kind == "json":
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        else:
            text = self.to_markdown()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        return render_text(self.to_dict())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return render_fragment(self.to_dict(), self.preview)


def report_of(target: Any) -> CompressionReport:
    """The report of a pipeline or model as it is now.

    Raises:
        ConfigError: nothing is compressed.
    """
    components: dict[str, dict[str, Any]] = {}
    untouched: dict[str, int] = {}
    preview: list[PreviewPair] = []
    for name, model in model_components(target).items():
        state = get_state(model)
        if state is None and not live_methods(model):
            untouched[name] = stored_bytes(model)
        else:
            components[name] = _view(model, state)
            preview = preview or (state.preview if state is not None else [])
    if not components:
        raise ConfigError(f'{type(target).__name__} is not compressed; call compress("w8a8") first.')
    components = dict(sorted(components.items(), key=lambda item: -item[1]["disk_bytes"]["before"]))
    title = type(target).__name__ if components.keys() != {SELF} else components[SELF]["class"]
    return CompressionReport(title, components, untouched, preview)


def component_report(
    model: nn.Module,
    part: ComponentPlan,
    layers: Mapping[str, LayerMeasurement],
    probe: PipelineProbe,
    seconds: float,
    search: str = "",
) -> dict[str, Any]:
    """What is stored with a component that was just compressed; see :meth:`CompressionReport.to_dict`.

    Args:
        model: the component, converted.
        part: its plan.
        layers: errors of each converted layer, in order.
        probe: what was measured of the pipeline.
        seconds: that the conversion took.
        search: how the layers' formats were found; "" where they are the preset's.
    """
    report = _facts(model, part.spec.preset, part.spec.scheme_name, part.spec.algorithm.summary, probe.macs(part.name))
    output_error = probe.output_error(part.name)
    output_error["relative_error"] = [_rounded(error) for error in output_error["relative_error"]]
    fixed = report["memory_bytes"]["after"] - report["disk_bytes"]["after"]
    return report | {
        "measured": True,
        "disk_bytes": {"before": part.bytes_before, "after": report["disk_bytes"]["after"]},
        "memory_bytes": {"before": part.bytes_before + fixed, "after": report["memory_bytes"]["after"]},
        **({"search": search} if search else {}),
        "kept": _kept(row for row in part.rows if row.scheme is None),
        **({"made_dynamic": part.made_dynamic} if part.made_dynamic else {}),
        "output_error": output_error,
        "layers": [[name, _rounded(m.weight_error), _rounded(m.output_error)] for name, m in layers.items()],
        "volatile": {
            "seconds": round(seconds, 3),
            "call_seconds": probe.call_seconds(part.name),
            "peak_memory_bytes": _peak_memory(model),
            "device": _device_name(_device_of(model)),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": installed_versions(),
        },
    }


def imported_report(model: nn.Module, spec: QuantizationSpec, sources: Mapping[str, int]) -> dict[str, Any]:
    """What is stored with a component whose layers were imported.

    Args:
        model: the component.
        spec: its formats.
        sources: {what the layers were before: how many}.
    """
    origin = ", ".join(f"{count} layers of {source}" for source, count in sources.items())
    report = _facts(model, None, spec.scheme_name, f"import of {origin}", {})
    report["output_error"]["note"] = (
        "not measured: codes and scales are those of the source; bytes before are those of the compute dtype"
    )
    return report | {"imported": dict(sources)}


def report_kind(path: str | Path) -> str:
    """ "html", "json" or "md", by the suffix of a file name. Raises ConfigError for another one."""
    kinds = {".html": "html", ".htm": "html", ".json": "json", ".md": "md", ".markdown": "md"}
    kind = kinds.get(Path(path).suffix.lower())
    if kind is None:
        raise ConfigError(f"A report needs a path ending in .html, .json or .md, got {Path(path).name!r}.")
    return kind


# --- one component ----------------------------------------------------------------------------------------------


def _view(model: nn.Module, state: ComponentState | None) -> dict[str, Any]:
    """The stored part, or what the layers tell, and how the component is computed where it is now."""
    spec = QuantizationSpec.dense() if state is None else state.config.spec
    stored = None if state is None else state.report
    if stored is None and spec.is_dense:
        stored = _facts(model, None, spec.scheme_name, "", {})
        stored["output_error"]["note"] = ""
    elif stored is None:
        stored = _facts(model, spec.preset, spec.scheme_name, spec.algorithm.summary, {})
    ranked = sorted(stored["layers"], key=_sensitivity, reverse=True)
    view = {**stored, "sensitive_layers": ranked[:MOST_SENSITIVE], "compute": _compute_paths(model)}
    methods = {kind: {"title": m.title, **m.facts(model)} for kind, m in live_methods(model).items()}
    if methods:
        view["methods"] = methods
    if state is not None and state.config.calibration is not None:
        view["calibration"] = state.config.calibration
    fused = merge_errors(model)
    if fused:
        worst = max(fused, key=lambda name: fused[name])
        view["fused_adapters"] = {"layers": len(fused), "worst_layer": worst, "worst_error": _rounded(fused[worst])}
    return view


def _facts(
    model: nn.Module, preset: str | None, scheme: str, algorithm: str, macs: Mapping[str, int]
) -> dict[str, Any]:
    """Everything that a compressed component tells without having been measured."""
    layers = quantized_layers(model)
    on_disk = stored_bytes(model)
    in_memory = on_disk + sum(b.numel() * b.element_size() for b in _volatile_buffers(model))
    saved = 0
    for layer in layers.values():
        rows, columns = _matrix_shape(layer)
        bias = 0 if layer.bias is None else layer.bias.numel() * layer.bias.element_size()
        saved += rows * columns * layer.compute_dtype.itemsize - (layer.num_bytes - bias)
    formats = _formats(model, macs)
    kept = [_with_reason(row, model, layers.keys()) for row in tensor_rows(model, {})]
    return {
        "schema_version": SCHEMA_VERSION,
        "class": type(model).__name__,
        "preset": preset,
        "scheme": scheme,
        "algorithm": algorithm,
        "measured": False,
        "parameters": sum(entry["parameters"] for entry in formats),
        "disk_bytes": {"before": on_disk + saved, "after": on_disk},
        "memory_bytes": {"before": in_memory + saved, "after": in_memory},
        "formats": formats,
        "kept": _kept(row for row in kept if row is not None),
        "output_error": {
            "timesteps": [],
            "relative_error": [],
            "setting": "",
            "note": "not measured: quantized while loading; bytes before are those of the compute dtype",
        },
        "layers": [],
        "volatile": {},
    }


def _sensitivity(row: list[Any]) -> float:
    """Output error where inputs were sampled, else weight error; what is not finite comes first."""
    error = row[1] if row[2] is None else row[2]
    return float("inf") if error is None else error


def _formats(model: nn.Module, macs: Mapping[str, int]) -> list[dict[str, Any]]:
    """Parameters, layers and MACs at each format, the largest first; a dense format is called by its dtype."""
    counts: dict[str, dict[str, int]] = {}

    def add(name: str, **amounts: int) -> None:
        entry = counts.setdefault(name, {"layers": 0, "parameters": 0, "macs": 0})
        for key, amount in amounts.items():
            entry[key] += amount

    quantized = quantized_layers(model)
    for name, layer in quantized.items():
        rows, columns = _matrix_shape(layer)
        add(layer.scheme.name, layers=1, parameters=rows * columns, macs=macs.get(name, 0))
    for key, parameter in model.named_parameters():
        owner, _, leaf = key.rpartition(".")
        if owner not in quantized or leaf == "bias":
            matrix = leaf == "weight" and isinstance(model.get_submodule(owner), _MATRIX_LAYERS)
            layer_macs = macs.get(owner, 0) if matrix else 0
            dtype = str(parameter.dtype).removeprefix("torch.")
            add(dtype, layers=int(matrix), parameters=parameter.numel(), macs=layer_macs)
    parameters = sum(entry["parameters"] for entry in counts.values()) or 1
    all_macs = sum(entry["macs"] for entry in counts.values())
    return [
        {
            "format": name,
            "layers": entry["layers"],
            "parameters": entry["parameters"],
            "parameter_share": round(entry["parameters"] / parameters, 5),
            "macs": entry["macs"] if all_macs else None,
            "mac_share": round(entry["macs"] / all_macs, 5) if all_macs else None,
        }
        for name, entry in sorted(counts.items(), key=lambda item: (-item[1]["parameters"], item[0]))
    ]


def _kept(rows: Iterable[PlanRow]) -> list[dict[str, Any]]:
    """Kept linears and convolutions by pattern; everything else by its reason alone."""
    named: list[PlanRow] = []
    others: dict[str, list[PlanRow]] = {}
    for row in rows:
        if row.role and row.parameter.endswith(".weight"):
            named.append(row)
        else:
            others.setdefault(row.reason, []).append(row)
    groups = [(pattern, members, members[0].reason) for pattern, members in group_rows(named)]
    for reason, members in others.items():
        patterns = [pattern for pattern, _ in group_rows(members)]
        label = patterns[0] if len(patterns) == 1 else f"{len(patterns)} patterns, e.g. {patterns[0]}"
        groups.append((label, members, reason))
    return [
        {
            "pattern": pattern,
            "tensors": len(members),
            "parameters": sum(torch.Size(row.shape).numel() for row in members),
            "bytes": sum(row.bytes_before for row in members),
            "reason": reason,
        }
        for pattern, members, reason in sorted(groups, key=lambda group: -sum(row.bytes_before for row in group[1]))
    ]


def _with_reason(row: PlanRow, model: nn.Module, converted: Collection[str]) -> PlanRow | None:
    """A row of a component without a plan; None for the tensors of converted layers other than the bias."""
    leaf = row.parameter.rpartition(".")[2]
    if row.layer in converted:
        reason, role = "bias", ""
        if leaf != "bias":
            return None
    elif isinstance(model.get_submodule(row.layer), _MATRIX_LAYERS):
        reason, role = ("kept by the recipe", "block") if leaf == "weight" else (leaf, "")
    else:
        return row
    return PlanRow(row.parameter, row.layer, row.shape, role, None, row.bytes_before, row.bytes_after, reason)


def _compute_paths(model: nn.Module) -> list[dict[str, Any]]:
    """How each format is computed on the component's present device."""
    groups: dict[str, dict[str, Any]] = {}
    for layer in quantized_layers(model).values():
        device = layer.qweight.device
        if device.type == "meta":
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        path = layer.compute_path(device)
        entry = {
            "scheme": layer.scheme.name,
            "kind": "linear" if isinstance(layer, nn.Linear) else "conv2d",
            "layers": 0,
            "device": str(device),
            "dtype": str(layer.compute_dtype).removeprefix("torch."),
            "path": path.name,
            "description": path.description,
            "is_integer": path.is_integer,
            "faster_than_dense": path.faster_than_dense,
        }
        groups.setdefault(json.dumps(entry), entry)["layers"] += 1
    return sorted(groups.values(), key=lambda entry: -entry["layers"])


# --- small facts ------------------------------------------------------------------------------------------------


def _matrix_shape(layer: Any) -> tuple[int, int]:
    return layer.qweight.shape[0], layer.quantized_weight().in_features


def _volatile_buffers(model: nn.Module) -> list[torch.Tensor]:
    """Buffers that a checkpoint does not hold."""
    persistent = set(model.state_dict(keep_vars=True))
    return [buffer for name, buffer in model.named_buffers() if name not in persistent]


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _peak_memory(model: nn.Module) -> int | None:
    """Most memory in use so far: allocated on the component's GPU, or resident in this process."""
    device = _device_of(model)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _rounded(value: float | None) -> float | None:
    return None if value is None or _finite(value) is None else float(f"{value:.4g}")


def _finite(value: float) -> float | None:
    return round(value, 4) if value == value and abs(value) != float("inf") else None
