"""The plot of ``bench quality``: for each model its algorithms down, its first score across, a colour for a format."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from diffuse_compress.arms import DENSE
from diffuse_compress.report_html import render_template

__all__ = ["plot"]

_COLOURS = (
    "#2f6fb2",
    "#d1722b",
    "#3c8c52",
    "#b0417c",
    "#7a5cc0",
    "#8a7a1f",
    "#4a9aa0",
    "#a33b34",
    "#66707a",
    "#5b8c1f",
)
_WIDTH, _LABELS, _ROW, _HEAD, _FOOT, _GAP = 760.0, 190.0, 19.0, 44.0, 34.0, 18.0
_WIDE = 3.0


def plot(data: Mapping[str, Any]) -> str:
    """An SVG picture of the rows, on white; a scale is logarithmic where values differ by more than a factor of 3."""
    schemes = [s for s in dict.fromkeys(row["scheme"] for row in data["rows"]) if s != DENSE]
    panels, top = [], _ROW + 12.0
    for key in dict.fromkeys((row["model"], row["outliers"]) for row in data["rows"]):
        rows = [row for row in data["rows"] if (row["model"], row["outliers"]) == key]
        panel = _panel(rows, schemes, data["metrics"], top)
        if panel is not None:
            panels.append(panel)
            top += panel["height"] + _GAP
    legend = [
        {"x": round(_LABELS + 100.0 * i, 1) % (_WIDTH - 60), "colour": _colour(i), "name": name}
        for i, name in enumerate(schemes)
    ]
    return render_template("quality.svg.j2", width=_WIDTH, height=round(top, 1), panels=panels, legend=legend)


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _panel(
    rows: Sequence[Mapping[str, Any]], schemes: Sequence[str], metrics: Mapping[str, Any], top: float
) -> dict[str, Any] | None:
    """Geometry of one model's panel; None without anything to show."""
    measured = [row for row in rows if row["metrics"] and row["scheme"] != DENSE]
    if not measured:
        return None
    name = next(iter(measured[0]["metrics"]))
    labels = list(dict.fromkeys(_label(row) for row in rows if row["scheme"] != DENSE))
    points = [(row, statistics.fmean(known)) for row in measured if (known := _known(row, name))]
    dense = next((known[0] for row in rows if row["scheme"] == DENSE and (known := _known(row, name))), None)
    values = [value for _, value in points] + ([] if dense is None else [dense])
    if not values:
        return None
    place, ticks = _axis(values)
    line = {label: top + _HEAD + _ROW * (i + 0.5) for i, label in enumerate(labels)}
    title = f"{rows[0]['model']}, outliers" if rows[0]["outliers"] else rows[0]["model"]
    unit = metrics[name]["unit"]
    better = "right" if metrics[name]["higher_is_better"] else "left"
    bottom = top + _HEAD + _ROW * len(labels)
    return {
        "title": f"{title}: {name}{', ' + unit if unit else ''} (better is {better})",
        "top": top,
        "head": top + _HEAD,
        "bottom": bottom,
        "height": _HEAD + _ROW * len(labels) + _FOOT,
        "labels": [{"y": round(y, 1), "name": label} for label, y in line.items()],
        "ticks": [{"x": place(tick), "label": f"{tick:.4g}"} for tick in ticks],
        "dense": None if dense is None else place(dense),
        "points": [
            {
                "x": place(value),
                "y": round(line[_label(row)] + 2.0 * (schemes.index(row["scheme"]) % 3 - 1), 1),
                "colour": _colour(schemes.index(row["scheme"])),
                "title": f"{row['scheme']}, {_label(row)}: {value:.4g}",
            }
            for row, value in points
        ],
    }


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['algorithm']}, {row['calibration']}" if row["calibration"] else str(row["algorithm"])


def _known(row: Mapping[str, Any], name: str) -> list[float]:
    return [value for value in row["metrics"].get(name, ()) if value is not None]


def _axis(values: Sequence[float]) -> tuple[Any, list[float]]:
    """Where a value stands, and the values that are marked."""
    low, high = min(values), max(values)
    is_log = low > 0 and high > _WIDE * low
    if is_log:
        first, last = math.log10(low), math.log10(high)
        marks = [m * 10.0**e for e in range(math.floor(first), math.ceil(last) + 1) for m in (1, 2, 5)]
    else:
        first, last = low, high if high > low else low + max(1e-6, abs(low))
        step = 10.0 ** math.floor(math.log10((last - first) / 2))
        step *= 5 if (last - first) / step > 10 else 2 if (last - first) / step > 5 else 1
        marks = [step * i for i in range(math.floor(first / step), math.ceil(last / step) + 1)]
    margin = 0.04 * (last - first)
    first, last = first - margin, last + margin

    def place(value: float) -> float:
        where = math.log10(value) if is_log else value
        return round(_LABELS + (where - first) / (last - first) * (_WIDTH - _LABELS - 24), 1)

    return place, [mark for mark in marks if _LABELS <= place(mark) <= _WIDTH - 20]
