"""How a report reads on a terminal and in markdown. Input is ``CompressionReport.to_dict()``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffuse_compress.plan_text import align, format_bytes
from diffuse_compress.runtime.sampling import SamplingSettings

__all__ = [
    "SPEED",
    "basis_notes",
    "call_times",
    "component_title",
    "error_range",
    "format_count",
    "format_error",
    "format_share",
    "headline",
    "path_errors",
    "path_ways",
    "render_markdown",
    "render_text",
    "schedule_picture",
    "timestep_errors",
]

# Columns of timesteps on a terminal; the page has them all.
_FEW_TIMESTEPS = 6
_WAYS = {"rtn": "rounded to nearest", "tib": "learned codes", "cache": "tables", "auto": "as chosen"}

SPEED = {None: "speed unmeasured here", True: "faster than dense", False: "slower than dense"}


def render_text(report: dict[str, Any]) -> str:
    """The whole report as plain text; the first line says what was done and gained."""
    lines = [headline(report)]
    for name, part in report["components"].items():
        lines += ["", f"{component_title(name, part)}: {_sizes(part)}"]
        for heading, table in _tables(part):
            lines += [f" {heading}", *align(table)]
        lines += [f" {line}" for line in _notes(part)]
        lines += [f"  {line}" for line in schedule_picture(part)]
    worst = worst_preview(report["preview"])
    if worst is not None:
        lines += ["", f"preview: worst of {len(report['preview'])} prompts is {worst['prompt']!r}, {_decibel(worst)}"]
    lines += ["", _total(report)]
    return "\n".join([*lines, report["hint"]] if report["hint"] else lines)


def render_markdown(report: dict[str, Any]) -> str:
    """The whole report as GitHub markdown."""
    blocks = [f"**{headline(report)}**"]
    for name, part in report["components"].items():
        blocks.append(f"### {component_title(name, part)}\n\n{_sizes(part)}.")
        for heading, table in _tables(part):
            blocks.append(f"{heading[0].upper()}{heading[1:]}:\n\n{_markdown_table(table)}")
        blocks += _notes(part)
        if schedule_picture(part):
            blocks.append("\n".join(["```text", *schedule_picture(part), "```"]))
    if report["preview"]:
        rows = [("prompt", "PSNR against dense"), *((item["prompt"], _decibel(item)) for item in report["preview"])]
        blocks.append(f"### Preview\n\n{_markdown_table(rows)}")
    blocks.append(_total(report))
    if report["hint"]:
        blocks.append(report["hint"])
    return "\n\n".join(blocks) + "\n"


def headline(report: dict[str, Any]) -> str:
    """One line: class, algorithm and format of each component, bytes saved, error range."""
    parts = []
    for name, part in report["components"].items():
        before, after = part["disk_bytes"]["before"], part["disk_bytes"]["after"]
        gain = f"{format_bytes(before)} -> {format_bytes(after)} ({_ratio(after, before)} of before)"
        error = error_range(part)
        where = f" on {name}" if name else ""
        label = part["preset"] or part["scheme"]
        label = f"formats mixed around {label}" if part.get("search") else label
        label += f" by {part['algorithm']}" if part["algorithm"] else ""
        methods = "".join(f", {method['title']}" for method in part.get("methods", {}).values())
        found = f"{label}{methods}{where}: {gain}"
        parts.append(f"{found}, output error {error}" if error else found)
    return f"{report['target']} compressed: " + "; ".join(parts)


def component_title(name: str, part: dict[str, Any]) -> str:
    """``transformer (PixArtTransformer2DModel)``."""
    return f"{name} ({part['class']})" if name else part["class"]


def error_range(part: dict[str, Any]) -> str:
    """``1.2 % to 3.4 %`` over the measured timesteps, or ""."""
    errors = part["output_error"]["relative_error"]
    if not errors:
        return ""
    finite = [error for error in errors if error is not None]
    if len(finite) < len(errors):
        return "not finite"
    low, high = format_error(min(finite)), format_error(max(finite))
    return low if low == high else f"{low} to {high}"


def format_error(value: float | None) -> str:
    """A relative error in percent; None is one that is not finite or was not measured."""
    if value is None:
        return "-"
    percent = 100 * value
    return f"{percent:.0f} %" if percent >= 100 else f"{percent:.3g} %"


def format_share(value: float | None) -> str:
    """A share in percent; None was not measured."""
    return "unmeasured" if value is None else f"{value:.2%}".replace("%", " %")


def format_count(count: float) -> str:
    """``1.23 M``."""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f}"


def call_times(part: dict[str, Any]) -> str:
    """``one call took 41 ms dense and 20 ms compressed on cpu``, or "" if not measured."""
    found = part["volatile"].get("call_seconds")
    if not found:
        return ""
    before, after = (f"{1000 * found[key]:.3g} ms" for key in ("before", "after"))
    return f"one call took {before} dense and {after} compressed, measured on {part['volatile']['device']}"


def basis_notes(part: dict[str, Any]) -> list[str]:
    """How its formats were found, what it was calibrated on, and what that did not reach."""
    settings, unreached = part.get("calibration"), part.get("made_dynamic")
    notes = [part["search"]] if part.get("search") else []
    if settings:
        text = f"calibrated on {settings['samples']} calls"
        text += f" of {settings['items']} items" if "items" in settings else ""
        sampling = str(SamplingSettings.from_dict(settings.get("sampling", {})))
        text += f", run with {sampling}" if sampling else ""
        notes.append(text + (f", guidance scale {settings['guidance_scale']}" if "guidance_scale" in settings else ""))
    if unreached:
        notes.append(
            f"no sample reached {len(unreached)} layers that were to have static inputs, e.g. {unreached[0]}: their "
            "inputs are quantized dynamically"
        )
    return notes


def timestep_errors(part: dict[str, Any]) -> list[tuple[str, float | None]]:
    """(label, relative error) at each measured timestep."""
    found = part["output_error"]
    labels = [f"call {i}" if t is None else f"t={t:g}" for i, t in enumerate(found["timesteps"], start=1)]
    return list(zip(labels, found["relative_error"], strict=True))


def path_errors(part: dict[str, Any]) -> dict[str, Any] | None:
    """Facts of the temporal features of a component with a measured timestep path (``PathErrors.facts``), or None."""
    path: dict[str, Any] | None = part.get("methods", {}).get("temporal", {}).get("path")
    return path


def path_ways(path: dict[str, Any]) -> dict[str, str]:
    """{way of keeping temporal features: what it is called}, in the order in which they were measured."""
    return {way: _WAYS.get(way, way) for way in path["error"]}


def _path_table(path: dict[str, Any]) -> list[Sequence[str]]:
    """Error and mismatch rate by way, at a few timesteps from the first to the last, and their means."""
    count = len(path["timesteps"])
    shown = sorted({round(i * (count - 1) / (_FEW_TIMESTEPS - 1)) for i in range(_FEW_TIMESTEPS)})
    rows: list[Sequence[str]] = [("kept by", "", "mean", *(f"t={path['timesteps'][i]:g}" for i in shown))]
    for way, title in path_ways(path).items():
        for measure, label in (("error", "error"), ("mismatch", "mismatched")):
            values = path[measure][way]
            cells = [format_error(sum(values) / count), *(format_error(values[i]) for i in shown)]
            rows.append((title, label, *cells))
    return rows


def worst_preview(preview: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The pair with the lowest PSNR; None if there is none or all are equal (their PSNR is null)."""
    return min(
        (item for item in preview if item["psnr_db"] is not None), key=lambda item: item["psnr_db"], default=None
    )


def _sizes(part: dict[str, Any]) -> str:
    disk, memory = part["disk_bytes"], part["memory_bytes"]
    return (
        f"{format_count(part['parameters'])} parameters; on disk {format_bytes(disk['before'])} -> "
        f"{format_bytes(disk['after'])} ({_ratio(disk['after'], disk['before'])}), in memory "
        f"{format_bytes(memory['before'])} -> {format_bytes(memory['after'])}"
    )


def _tables(part: dict[str, Any]) -> list[tuple[str, list[Sequence[str]]]]:
    """(heading, rows) of a component; the first row holds the column names."""
    tables: list[tuple[str, list[Sequence[str]]]] = []
    rows: list[Sequence[str]] = [("format", "layers", "parameters", "of parameters", "of MACs")]
    for entry in part["formats"]:
        share = format_share(entry["mac_share"])
        count = format_count(entry["parameters"])
        rows.append((entry["format"], str(entry["layers"]), count, format_share(entry["parameter_share"]), share))
    tables.append(("formats", rows))
    rows = [("format", "layers", "computed by", "speed")]
    for entry in part["compute"]:
        layers = f"{entry['layers']} {entry['kind']}"
        rows.append((entry["scheme"], layers, entry["description"], SPEED[entry["faster_than_dense"]]))
    where = sorted({f"{entry['device']}, {entry['dtype']}" for entry in part["compute"]})
    if part["compute"]:
        tables.append((f"computation on {'; '.join(where)}", rows))
    errors = timestep_errors(part)
    if errors:
        setting = part["output_error"]["setting"]
        rows = [[label for label, _ in errors], [format_error(error) for _, error in errors]]
        tables.append((f"relative output error, {setting}" if setting else "relative output error", rows))
    path = path_errors(part)
    if path is not None:
        heading = f"temporal features against dense, mean of {len(path['layers'])}, {len(path['timesteps'])} timesteps"
        tables.append((heading, _path_table(path)))
    if part["sensitive_layers"]:
        rows = [("layer", "weight error", "output error")]
        rows += [
            (name, format_error(weight), format_error(output)) for name, weight, output in part["sensitive_layers"]
        ]
        tables.append((f"most sensitive layers, of {len(part['layers'])} converted", rows))
    rows = [("kept", "tensors", "bytes", "because")]
    for entry in part["kept"]:
        rows.append((entry["pattern"], str(entry["tensors"]), format_bytes(entry["bytes"]), entry["reason"]))
    if part["kept"]:
        tables.append(("kept as it was", rows))
    return tables


def schedule_picture(part: dict[str, Any]) -> list[str]:
    """Lines of a feature cache's schedule, steps by units; [] without one."""
    return list(part.get("methods", {}).get("cache", {}).get("picture", ()))


def _notes(part: dict[str, Any]) -> list[str]:
    notes = [f"{method['title']}: {method['summary']}" for method in part.get("methods", {}).values()]
    if part["output_error"]["note"]:
        notes.append(f"output error: {part['output_error']['note']}")
    notes += basis_notes(part)
    fused = part.get("fused_adapters")
    if fused:
        notes.append(
            f"adapters are fused into {fused['layers']} layers; quantizing these anew lost up to "
            f"{format_error(fused['worst_error'])} of what they change ({fused['worst_layer']})"
        )
    if call_times(part):
        notes.append(f"speed: {call_times(part)}")
    volatile = part["volatile"]
    if volatile:
        peak = volatile["peak_memory_bytes"]
        memory = "" if peak is None else f", peak memory {format_bytes(peak)}"
        notes.append(f"compressed in {volatile['seconds']:.1f} s on {volatile['device']}{memory}, {volatile['date']}")
    return notes


def _total(report: dict[str, Any]) -> str:
    sizes, rest = report["bytes"], sum(report["bytes"]["untouched"].values())
    before, after = sizes["before"] + rest, sizes["after"] + rest
    text = f"total: {format_bytes(before)} -> {format_bytes(after)} ({_ratio(after, before)} of before)"
    return f"{text}, {format_bytes(rest)} of it in components left alone" if rest else text


def _decibel(item: dict[str, Any]) -> str:
    return "equal" if item["psnr_db"] is None else f"{item['psnr_db']:.1f} dB"


def _ratio(after: int, before: int) -> str:
    return f"{after / before:.3f}" if before else "1.000"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    escaped = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)
