"""Records side by side: a markdown table, and a page with Pareto plots of quality against bytes and latency."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffuse_compress.errors import ConfigError, nearest
from diffuse_compress.evaluation.records import NO_ACCESS, Metric, Record
from diffuse_compress.evaluation.samples import write_atomically
from diffuse_compress.plan_text import format_bytes
from diffuse_compress.report_html import render_template

__all__ = ["comparison_table", "pareto_front", "pareto_plot", "table_notes", "write_report"]

_WIDTH, _HEIGHT = 620.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 74.0, 20.0, 16.0, 44.0
_COSTS: dict[str, tuple[str, Callable[[Record], float | None]]] = {
    "bytes": ("weights on disk, MiB", lambda record: _scaled(record.cost.get("disk_bytes"), 2**-20)),
    "latency": ("seconds a sample", lambda record: _scaled(record.cost.get("seconds_per_sample"), 1.0)),
}

_COST_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "on disk": ("disk_bytes", format_bytes),
    "s a sample": ("seconds_per_sample", "{:.3g}".format),
    "s until the first token": ("prefill_seconds", "{:.3g}".format),
    "tokens a second": ("decode_tokens_per_second", "{:.3g}".format),
    "peak memory": ("peak_memory_bytes", format_bytes),
}


def write_report(
    records: Sequence[Record], out: str | Path, *, quality: str | None = None, title: str = "Evaluation"
) -> list[Path]:
    """Write ``report.md``, ``report.html`` and ``records.json`` into a folder, and return their paths.

    Args:
        records: in the order of the table; their names must differ.
        out: folder.
        quality: metric of the plots, by its name or the beginning of it; None takes the first that two records share.
        title: of the page.

    Raises:
        ConfigError: no records, two of one name, or no such metric.
    """
    names = [record.name for record in records]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not records or twice:
        raise ConfigError(f"eval report: need records of different names, got {', '.join(twice) or 'none'}.")
    folder, table = Path(out), comparison_table(records)
    notes = "\n".join(f"- {note}" for note in table_notes(records))
    chosen = _quality_column(records, quality)
    plots = [plot for kind in _COSTS if chosen and (plot := pareto_plot(records, chosen, kind)) is not None]
    header, *rows = _cells(records)
    page = render_template(
        "records.html.j2",
        title=title,
        header=header,
        rows=rows,
        plots=plots,
        records=[record.to_dict() for record in records],
        notes=table_notes(records),
    )
    whole = json.dumps([record.to_dict() for record in records], indent=1, ensure_ascii=False) + "\n"
    contents = {"report.md": f"# {title}\n\n{table}\n{notes}\n", "report.html": page, "records.json": whole}
    for name, text in contents.items():
        write_atomically(folder / name, text)
    return [folder / name for name in contents]


def comparison_table(records: Sequence[Record], costs: Sequence[str] = tuple(_COST_COLUMNS)) -> str:
    """A markdown table, a row for each record; :func:`table_notes` say what the scores are.

    Args:
        records: rows.
        costs: which of "on disk", "s a sample", "peak memory" and so on may get a column.
    """
    header, *rows = _cells(records, costs)
    return "\n".join([_row(header), "|" + "---|" * len(header), *map(_row, rows)]) + "\n"


def pareto_front(points: Sequence[tuple[float, float]], *, higher_is_better: bool) -> list[int]:
    """Indices of (cost, quality) points that no other point beats in both, by rising cost; cost is better low."""
    sign = -1.0 if higher_is_better else 1.0
    front: list[int] = []
    best = math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if sign * points[index][1] < best:
            best = sign * points[index][1]
            front.append(index)
    return front


def pareto_plot(records: Sequence[Record], column: tuple[Any, ...], cost: str) -> dict[str, Any] | None:
    """Geometry of a plot of quality over "bytes" or "latency"; None with fewer than two points.

    Args:
        records: those without the metric or the cost are left out.
        column: key of the metric.
        cost: key of the axis.
    """
    label, read = _COSTS[cost]
    found = [(record, read(record), _metric(record, column)) for record in records]
    known = [(r, x, m) for r, x, m in found if x is not None and m is not None and math.isfinite(m.value)]
    if len(known) < 2:
        return None
    metric = known[0][2]
    values = [(x, m.value) for _, x, m in known]
    ends = [end for _, _, m in known for end in (m.low, m.high, m.value) if end is not None]
    x_low, x_high = _limits([x for x, _ in values])
    y_low, y_high = _limits(ends)

    def place_x(value: float) -> float:
        return round(_LEFT + (value - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def place_y(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    front = pareto_front(values, higher_is_better=metric.higher_is_better)
    points = [
        {
            "name": record.name,
            "x": place_x(x),
            "y": place_y(m.value),
            "low": None if m.low is None else place_y(m.low),
            "high": None if m.high is None else place_y(m.high),
            "on_front": index in front,
            "anchor": "end" if place_x(x) > _WIDTH - 110 else "start",
            "title": f"{record.name}: {m}; {x:.4g} {label}",
        }
        for index, (record, x, m) in enumerate(known)
    ]
    return {
        "label": label,
        "metric": metric.name + (f", {metric.unit}" if metric.unit else ""),
        "better": "up" if metric.higher_is_better else "down",
        "points": points,
        "front": " ".join(f"{points[i]['x']},{points[i]['y']}" for i in front),
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "top": _TOP,
        "bottom": _HEIGHT - _BOTTOM,
        "x_ticks": [{"x": place_x(tick), "label": f"{tick:.6g}"} for tick in _ticks(x_low, x_high)],
        "y_ticks": [{"y": place_y(tick), "label": f"{tick:.6g}"} for tick in _ticks(y_low, y_high)],
    }


def _columns(records: Sequence[Record]) -> list[tuple[Any, ...]]:
    """Keys of all metrics, in the order in which they first occur."""
    return list(dict.fromkeys(metric.key for record in records for metric in record.metrics))


def _wanted_columns(records: Sequence[Record]) -> list[tuple[Any, ...]]:
    """Those of :func:`_columns`, and one for every score that was wanted and that no record has."""
    columns = _columns(records)
    costs = {key for key, _ in _COST_COLUMNS.values()}
    absent = dict.fromkeys(name for record in records for name in record.not_measured)
    return columns + [(name,) for name in absent if name not in {*costs, *(column[0] for column in columns)}]


def _quality_column(records: Sequence[Record], quality: str | None) -> tuple[Any, ...] | None:
    columns = _columns(records)
    if quality is not None:
        found = [column for column in columns if column[0] == quality]
        found = found or [column for column in columns if str(column[0]).lower().startswith(quality.lower())]
        if not found:
            raise ConfigError(
                f"--quality: no record has {quality!r}; {nearest(quality, [str(c[0]) for c in columns])}."
            )
        return found[0]
    shared = [c for c in columns if sum(_metric(record, c) is not None for record in records) > 1]
    return shared[0] if shared else None


def _metric(record: Record, column: tuple[Any, ...]) -> Metric | None:
    return next((metric for metric in record.metrics if metric.key == column), None)


def _cells(records: Sequence[Record], costs: Sequence[str] = tuple(_COST_COLUMNS)) -> list[list[str]]:
    columns = _wanted_columns(records)
    headings = _headings(columns)
    units = [next((m.unit for r in records for m in r.metrics if m.key == column), "") for column in columns]
    header = ["", "N", *(f"{h}, {unit}" if unit else h for h, unit in zip(headings, units, strict=True))]
    rows = [[record.name, str(record.samples), *(_cell(record, column) for column in columns)] for record in records]
    for title in costs:
        key, shown = _COST_COLUMNS[title]
        known = [record.cost.get(key) for record in records]
        cells = [_absence(r, key) if v is None else shown(v) for r, v in zip(records, known, strict=True)]
        if any(cell != "–" for cell in cells):
            header.append(title)
            for row, cell in zip(rows, cells, strict=True):
                row.append(cell)
    return [header, *rows]


def _headings(columns: Sequence[tuple[Any, ...]]) -> list[str]:
    """Names of columns; of one name are those that differ in implementation or reference, and they get numbers."""
    names = [str(column[0]) for column in columns]
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def table_notes(records: Sequence[Record], *, commands: bool = True) -> list[str]:
    """What the columns are, and where the rows come from; what rows share is said once.

    Args:
        records: of the table.
        commands: with the commands that were typed, which may name folders of the machine.
    """
    notes = []
    columns = _wanted_columns(records)
    for heading, column in zip(_headings(columns), columns, strict=True):
        metric = next((m for record in records for m in record.metrics if m.key == column), None)
        if metric is None:
            continue
        reference = metric.reference or {}
        other_count = f", N={reference.get('count')}" if reference.get("count") != metric.count else ""
        against = f"; against {reference['name']}{other_count}" if reference else ""
        better = "higher" if metric.higher_is_better else "lower"
        notes.append(f"{heading}: {metric.implementation}{against}; {better} is better.{_counts(records, column)}")
    notes += ["In brackets: 95 % intervals.", *_absence_notes(records)]
    sources: dict[str, list[str]] = {}
    for record in records:
        versions = ", ".join(f"{k} {v}" for k, v in record.versions.items() if k in ("torch", "diffusers"))
        revision = f" at {record.model['revision'][:7]}" if record.model.get("revision") else ""
        model = f"{record.model['id']}{revision}"
        about = f"{model}, {record.data['name']}, {record.device['name']}, {record.date}, {versions}"
        sources.setdefault(f"{about}; `{record.command}`" if commands else about, []).append(record.name)
    if len(sources) == 1:
        return [*notes, f"Made with {next(iter(sources))}"]
    return notes + [f"{', '.join(names)}: {source}" for source, names in sources.items()]


def _counts(records: Sequence[Record], column: tuple[Any, ...]) -> str:
    """What a column's N are where rows differ, which not all scores can be compared over; nothing where they agree."""
    found = {record.name: metric.count for record in records if (metric := _metric(record, column)) is not None}
    if len(set(found.values())) < 2:
        return ""
    return " N differs: " + ", ".join(f"{name} {count}" for name, count in found.items()) + "."


def _absence_notes(records: Sequence[Record]) -> list[str]:
    """Why scores are missing; names of one record that share a reason are together."""
    notes = []
    for record in records:
        by_reason: dict[str, list[str]] = {}
        for name, reason in record.not_measured.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            all_of_it = reason.startswith(NO_ACCESS)
            notes.append(f"{record.name}: {'' if all_of_it else ', '.join(names) + ' '}not measured: {reason}")
    return notes


def _cell(record: Record, column: tuple[Any, ...]) -> str:
    metric = _metric(record, column)
    return _absence(record, str(column[0])) if metric is None else _value(metric)


def _absence(record: Record, name: str) -> str:
    """Text of a cell without a value; a reason other than no access is long, and stands in the notes."""
    reason = record.not_measured.get(name)
    if reason is None:
        return "–"
    return f"not measured: {NO_ACCESS}" if reason.startswith(NO_ACCESS) else "not measured"


def _value(metric: Metric) -> str:
    if not math.isfinite(metric.value):
        return "–"
    digits = _digits(metric)
    interval = (
        "" if metric.low is None or metric.high is None else f" [{metric.low:.{digits}f}, {metric.high:.{digits}f}]"
    )
    return f"{metric.value:.{digits}f}{interval}"


def _digits(metric: Metric) -> int:
    """Decimals so that the interval, or the value, has one or two digits that count."""
    scale = (metric.high - metric.low) if metric.low is not None and metric.high is not None else abs(metric.value) / 10
    return 4 if scale <= 0 else max(0, min(6, 1 - math.floor(math.log10(scale))))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _scaled(value: Any, factor: float) -> float | None:
    return None if value is None else float(value) * factor


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers within the limits."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]
