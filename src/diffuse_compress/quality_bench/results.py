"""Cells together: rows over seeds, as JSON with a schema, as markdown tables and as a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from diffuse_compress.evaluation.records import Record, validate
from diffuse_compress.evaluation.samples import write_atomically
from diffuse_compress.plan_text import format_bytes
from diffuse_compress.quality_bench.cells import Cell
from diffuse_compress.quality_bench.plot import plot
from diffuse_compress.quality_bench.run import QUALITY

__all__ = ["bench_schema", "markdown", "summarize", "write_results"]

SCHEMA_VERSION = 1
_COSTS = ("compress_seconds", "compress_memory_bytes", "call_seconds", "denoiser_disk_bytes")
_DIGITS = 3


def write_results(cells: Sequence[Cell], records: Sequence[Record], out: Path, command: str) -> dict[str, Path]:
    """Write ``quality.json``, ``quality.md`` and ``quality.svg`` into a folder; {suffix: path}."""
    data = summarize(cells, records, command)
    rows = [json.dumps(row, ensure_ascii=False) for row in data["rows"]]
    # A row a line: small, and a change of one is a change of one line.
    head = json.dumps({**data, "rows": []}, indent=1, ensure_ascii=False)
    text = head.removesuffix("[]\n}") + "[\n" + ",\n".join(rows) + "\n]}\n"
    contents = {"json": text, "md": markdown(data), "svg": plot(data)}
    for suffix, content in contents.items():
        write_atomically(out / f"quality.{suffix}", content)
    return {suffix: out / f"quality.{suffix}" for suffix in contents}


def summarize(cells: Sequence[Cell], records: Sequence[Record], command: str) -> dict[str, Any]:
    """Rows of the cells, a value for each seed, and what they share; JSON-able, after :func:`bench_schema`."""
    groups: dict[tuple[str, ...], list[tuple[Cell, Record]]] = {}
    pairs = list(zip(cells, records, strict=True))
    lost = {cell.subject.title for cell, record in pairs if cell.is_dense and QUALITY in record.not_measured}
    for cell, record in pairs:
        if cell.subject.title in lost and not cell.is_dense:
            continue  # its dense row says why
        groups.setdefault(cell.row, []).append((cell, record))
    dates = sorted({record.date for record in records})
    metrics: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for cell, record in pairs:
        if cell.is_dense and QUALITY not in record.not_measured:
            own = {"outliers", "scheme", "algorithm", "calibration", "quantized_layers", "layers"}
            kept = {key: value for key, value in record.settings.items() if key not in own}
            model = {key: record.model[key] for key in ("dtype", "revision", "weights_sha256")}
            settings[cell.subject.title] = {**model, "judged on": dict(record.data), "samples": record.samples, **kept}
        for metric in record.metrics:
            how = {"unit": metric.unit, "higher_is_better": metric.higher_is_better, "how": metric.implementation}
            metrics.setdefault(metric.name, how)
    data = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "dates": [dates[0], dates[-1]],
        "device": dict(records[0].device),
        "versions": dict(records[0].versions),
        "settings": settings,
        "metrics": metrics,
        "rows": [_row(group) for group in groups.values()],
    }
    validate(data, "bench quality", bench_schema())
    return data


@cache
def bench_schema() -> dict[str, Any]:
    """The JSON schema of ``quality.json``."""
    text = resources.files("diffuse_compress.quality_bench").joinpath("quality.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _row(group: Sequence[tuple[Cell, Record]]) -> dict[str, Any]:
    cell, first = group[0]
    reasons = [record.not_measured[QUALITY] for _, record in group if QUALITY in record.not_measured]
    measured = [record for _, record in group if QUALITY not in record.not_measured]
    names = [metric.name for metric in measured[0].metrics] if measured else []
    values = {
        name: [_short(m.value) for record in measured for m in record.metrics if m.name == name] for name in names
    }
    intervals = {m.name: [_short(m.low), _short(m.high)] for m in first.metrics if m.low is not None}
    costs = {key: [_short(record.cost.get(key)) for record in measured] for key in _COSTS}
    layers = [measured[0].settings[key] for key in ("quantized_layers", "layers")] if measured else None
    return {
        "model": cell.subject.name,
        "outliers": cell.subject.outliers,
        "scheme": cell.scheme,
        "algorithm": cell.algorithm or None,
        "calibration": _set_name(cell.calibration),
        "seeds": [one.seed for one, record in group if QUALITY not in record.not_measured],
        "metrics": values,
        "intervals": intervals,
        "cost": {key: found for key, found in costs.items() if any(value is not None for value in found)},
        "layers": layers,
        "not_measured": None if measured else reasons[0],
    }


def _set_name(calibration: str) -> str | None:
    """Of a calibration set; a file goes by its name."""
    name, separator, count = calibration.partition(":")
    return Path(name).name + separator + count if name else None


def _short(value: Any) -> Any:
    """Six digits are more than any of these numbers repeats in."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


# --- markdown ---------------------------------------------------------------------------------------------------


def markdown(data: Mapping[str, Any]) -> str:
    """A table for each model: its dense row, then the others in the order they were asked for."""
    titles = dict.fromkeys(_title(row) for row in data["rows"])
    parts = ["# Quality bench", _about(data)]
    for title in titles:
        rows = [row for row in data["rows"] if _title(row) == title]
        parts += [f"## {title}", _judged_on(data, title), _table(rows, data["metrics"]), *_refusals(rows)]
    parts += ["## What the columns are", *_notes(data)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['model']}, outliers" if row["outliers"] else str(row["model"])


def _about(data: Mapping[str, Any]) -> str:
    first, last = data["dates"]
    device, versions = data["device"], data["versions"]
    when = first if first == last else f"{first} to {last}"
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "diffusers", "transformers") if name in versions)
    return f"{device['name']}, {device.get('threads', 1)} thread(s), {shown}, {when}.\n\n`{data['command']}`"


def _judged_on(data: Mapping[str, Any], title: str) -> str:
    found = data["settings"].get(title)
    if found is None:
        return ""
    about = {key: found[key] for key in found if key not in ("judged on", "samples", "dtype", "revision")}
    about.pop("weights_sha256", None)
    how = ", ".join(f"{key}={value}" for key, value in about.items())
    kind = "windows" if found["judged on"]["kind"] == "texts" else "samples"
    return f"Judged on {found['samples']} {kind} of {found['judged on']['name']}; dense in {found['dtype']}; {how}."


def _table(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    heads = [f"{name}, {metrics[name]['unit']}" if metrics[name]["unit"] else name for name in names]
    has_sets = any(row["calibration"] for row in rows)
    header = ["scheme", "algorithm", *(["calibration"] if has_sets else []), *heads]
    header += ["compress, s", "peak memory", "bytes", "call, ms", "layers"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [row["scheme"], row["algorithm"] or "", *([row["calibration"] or ""] if has_sets else [])]
        if row["not_measured"] is not None:
            cells += ["refused", *[""] * (len(header) - len(cells) - 1)]
        else:
            cells += [_spread(row["metrics"].get(name)) for name in names] + _cost_cells(row)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float | None] | None) -> str:
    """Mean over seeds and standard deviation, to the digits that count."""
    if not values:
        return "–"
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "not finite"
    mean = statistics.fmean(known)
    if len(known) < 2:
        return _digits(mean)
    return f"{_digits(mean)} ± {statistics.stdev(known):.2g}"


def _digits(value: float) -> str:
    digits = _DIGITS + (abs(value) >= 1)
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.3g}"


def _cost_cells(row: Mapping[str, Any]) -> list[str]:
    def mean(key: str) -> float | None:
        found = [value for value in row["cost"].get(key, ()) if value is not None]
        return statistics.fmean(found) if found else None

    seconds, memory, call, size = (mean(key) for key in _COSTS)
    shown = [
        "–" if seconds is None else f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}",
        "–" if memory is None else format_bytes(round(memory)),
        "–" if size is None else format_bytes(round(size)),
        "–" if call is None else f"{1000 * call:.3g}",
    ]
    done, whole = row["layers"] or (0, 0)
    return [*shown, f"{done} of {whole}"]


def _refusals(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why rows have no result, one line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row["not_measured"] is not None:
            parts = [row["scheme"], row["algorithm"], row["calibration"]]
            by_reason.setdefault(row["not_measured"], []).append(" ".join(part for part in parts if part))
    lines = [f"- {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return ["Refused:\n\n" + "\n".join(lines)] if lines else []


def _notes(data: Mapping[str, Any]) -> list[str]:
    notes = []
    for name, about in data["metrics"].items():
        better = "higher" if about["higher_is_better"] else "lower"
        notes.append(f"- {name}: {about['how']}; {better} is better.")
    kinds = {"cpu": "growth of the process's resident memory", "cuda": "memory that torch allocated on the GPU"}
    memory = kinds.get(data["device"]["type"], "memory")
    notes += [
        "- ±: standard deviation over seeds, which choose calibration samples and what an algorithm draws. What is "
        "judged on is the same in every row. Rows that look at no samples and draw nothing have one seed.",
        "- compress, s: of compressing the loaded model, calibration included; recording its samples not.",
        f"- peak memory: {memory} while compressing, over the loaded model and its samples.",
        "- bytes: of the denoiser, or of the language model, as a checkpoint holds it.",
        "- call, ms: median of a denoiser's call on one recorded input, or of a language model's on one window.",
        "- layers: linears and convolutions that are compressed, of all in the model; the others stay dense.",
    ]
    return ["\n".join(notes)]
