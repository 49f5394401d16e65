"""How a report reads in a browser or notebook: one self-contained page, drawn here, without scripts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from diffuse_compress.plan_text import format_bytes
from diffuse_compress.report_text import (
    SPEED,
    basis_notes,
    call_times,
    component_title,
    error_range,
    format_count,
    format_error,
    format_share,
    headline,
    path_errors,
    path_ways,
    timestep_errors,
    worst_preview,
)

__all__ = ["data_uri", "error_plot", "path_plots", "render_fragment", "render_page", "render_template"]

_PNG_UP_TO = 512
_JPEG_QUALITY = 92
# Plot geometry, in the units of its viewBox.
_WIDTH, _HEIGHT = 960.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 12.0, 14.0, 46.0
# Room of a label under the axis.
_LABEL = 70.0


def render_page(report: dict[str, Any], preview: Sequence[Any] = ()) -> str:
    """A whole HTML page.

    Args:
        report: ``CompressionReport.to_dict()``.
        preview: pairs of pictures in the order of ``report["preview"]``.
    """
    return _render("report.html.j2", report, preview)


def render_fragment(report: dict[str, Any], preview: Sequence[Any] = ()) -> str:
    """The same as a ``<div>`` with its own style, for notebooks. Arguments as :func:`render_page`."""
    return _render("report_body.html.j2", report, preview)


def error_plot(layers: Sequence[Sequence[Any]]) -> dict[str, Any] | None:
    """Geometry of the error-per-layer plot: layers in order along x, relative errors on a log scale along y.

    Args:
        layers: [name, weight error, output error or None] of each converted layer.

    Returns:
        Points, ticks and sizes for the template; None if there is no positive error to draw.
    """
    values = [value for _, weight, output in layers for value in (weight, output) if value]
    if not values:
        return None
    low, high = _decades(min(values), max(values))
    step = (_WIDTH - _LEFT - _RIGHT) / len(layers)

    def x(index: float) -> float:
        return round(_LEFT + step * (index + 0.5), 1)

    def y(value: float) -> float:
        share = (math.log10(value) - low) / (high - low)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    points = [
        {"x": x(i), "y": y(value), "kind": kind, "title": f"{name}: {kind} error {format_error(value)}"}
        for i, (name, weight, output) in enumerate(layers)
        for kind, value in (("weight", weight), ("output", output))
        if value
    ]
    return {
        **_frame(),
        "radius": max(1.6, min(4.0, step * 0.4)),
        "points": points,
        "has_output": any(point["kind"] == "output" for point in points),
        "y_ticks": [{"y": y(value), "label": format_error(value)} for value in _ticks(low, high)],
        "x_ticks": _block_ticks([name for name, *_ in layers], step),
    }


def path_plots(path: dict[str, Any]) -> list[dict[str, Any]]:
    """Geometry of two plots over the timesteps of a loop: error of temporal features, and share that is mismatched.

    Args:
        path: ``PathErrors.facts()``: values [timesteps] by way, means over the features.

    Returns:
        For each plot its "title", ticks, sizes and "lines", one for each way: "number" of its colour, "points", "path".
    """
    timesteps, inner = path["timesteps"], _HEIGHT - _TOP - _BOTTOM
    step = (_WIDTH - _LEFT - _RIGHT) / len(timesteps)
    across = [round(_LEFT + step * (index + 0.5), 1) for index in range(len(timesteps))]
    plots = []
    for measure, title in (("error", "relative error, log scale"), ("mismatch", "mismatched with another timestep")):
        values = [value for way in path[measure].values() for value in way]
        height, ticks = _scale(values) if measure == "error" else _shares(values)
        lines = []
        for number, (way, label) in enumerate(path_ways(path).items()):
            points = [
                {
                    "x": x,
                    "y": round(_HEIGHT - _BOTTOM - inner * height(value), 1),
                    "title": f"{label}, t={t:g}: {format_error(value)}",
                }
                for x, t, value in zip(across, timesteps, path[measure][way], strict=True)
            ]
            drawn = " ".join(f"{point['x']},{point['y']}" for point in points)
            mean = format_error(sum(path[measure][way]) / len(timesteps))
            lines.append({"number": number % 4, "label": f"{label}, mean {mean}", "points": points, "path": drawn})
        every = max(1, math.ceil(_LABEL / step))
        plots.append(
            {
                **_frame(),
                "title": title,
                "lines": lines,
                "radius": max(1.6, min(3.5, step * 0.3)),
                "y_ticks": [
                    {"y": round(_HEIGHT - _BOTTOM - inner * height(v), 1), "label": format_error(v)} for v in ticks
                ],
                "x_ticks": [
                    {"x": x, "label": f"t={t:g}"} for x, t in list(zip(across, timesteps, strict=True))[::every]
                ],
            }
        )
    return plots


def _frame() -> dict[str, float]:
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "top": _TOP,
        "bottom": _HEIGHT - _BOTTOM,
    }


def _scale(values: list[float]) -> tuple[Callable[[float], float], list[float]]:
    """(value to height in [0, 1], ticks) on a log scale; what is exact is at the bottom."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = _decades(min(positive), max(positive))
    return lambda value: (math.log10(value) - low) / (high - low) if value > 0 else 0.0, _ticks(low, high)


def _shares(values: list[float]) -> tuple[Callable[[float], float], list[float]]:
    """The same, linear from nothing to a little over the largest, at least a hundredth."""
    top = 1.05 * max(0.01, *values)
    return lambda value: value / top, [top / 1.05 * part for part in (0.0, 0.5, 1.0)]


def _decades(low: float, high: float) -> tuple[float, float]:
    """Limits in log10, a little outside the values and at least half a decade apart."""
    bottom, top = math.log10(low) - 0.08, math.log10(high) + 0.08
    middle, half = (bottom + top) / 2, max(0.25, (top - bottom) / 2)
    return middle - half, middle + half


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the limits; only the powers where the limits span three decades."""
    digits = (1,) if high - low > 3 else (1, 2, 5)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    return [digit * 10.0**e for e in exponents for digit in digits if low <= math.log10(digit * 10.0**e) <= high]


def _block_ticks(names: list[str], step: float) -> list[dict[str, Any]]:
    """A tick where each block begins; labels that would overlap are left out."""
    ticks: list[dict[str, Any]] = []
    previous, free_from = None, -math.inf
    for index, name in enumerate(names):
        block = _block_of(name)
        if block == previous:
            continue
        previous, position = block, _LEFT + step * index
        width = 6.4 * len(block) + 12
        # The last labels are written to the left of their tick rather than over the edge.
        at_edge = position + width > _WIDTH
        start = position - width if at_edge else position
        label = block if start >= free_from else ""
        if label:
            free_from = start + width
        ticks.append({"x": round(position, 1), "label": label, "anchor": "end" if at_edge else "start"})
    return ticks


def _block_of(name: str) -> str:
    """``transformer_blocks.3`` of ``transformer_blocks.3.attn1.to_q``; the first part of names without a number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return parts[0] if number is None else ".".join(parts[: number + 1])


def render_template(template: str, **values: Any) -> str:
    """A template of the package, with the filters that reports use."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffuse_compress", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "count": format_count,
        "error": format_error,
        "percent": format_share,
        "speed": SPEED.__getitem__,
    }
    return environment.get_template(template).render(**values)


def _render(template: str, report: dict[str, Any], preview: Sequence[Any]) -> str:
    components = [_component(name, part) for name, part in report["components"].items()]
    return render_template(
        template,
        report=report,
        headline=headline(report),
        components=components,
        pictures=_pictures(report, preview),
    )


def _component(name: str, part: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of one component, besides its own entries."""
    disk = part["disk_bytes"]
    errors = timestep_errors(part)
    largest = max((error for _, error in errors if error), default=0.0)
    quantized = [entry for entry in part["formats"] if entry["format"] in {path["scheme"] for path in part["compute"]}]
    shares = [entry["mac_share"] for entry in quantized if entry["mac_share"] is not None]
    return {
        **part,
        "title": component_title(name, part),
        "ratio": disk["after"] / disk["before"] if disk["before"] else 1.0,
        "saved": 1 - disk["after"] / disk["before"] if disk["before"] else 0.0,
        "error_range": error_range(part),
        "call_times": call_times(part),
        "basis_notes": basis_notes(part),
        "call_word": "timesteps" if None not in part["output_error"]["timesteps"] else "calls",
        "quantized_mac_share": sum(shares) if shares else None,
        "quantized_parameter_share": sum(entry["parameter_share"] for entry in quantized),
        "quantized_formats": [entry["format"] for entry in quantized],
        "timesteps": [
            {"label": label, "error": error, "width": 100 * error / largest if error and largest else 0}
            for label, error in errors
        ],
        "plot": error_plot(part["layers"]),
        "features": _features(part),
    }


def _features(part: dict[str, Any]) -> dict[str, Any] | None:
    """Plots of the temporal features and what became of each; None where none was measured."""
    path = path_errors(part)
    if path is None:
        return None
    ways, some = path_ways(path), path.get("rows", {})
    rows = []
    for name, errors in path["layers"].items():
        kept = path["ways"].get(name, {"way": "", "why": ""})
        way = ways.get(kept["way"], kept["way"])
        if name in some:
            there = [f"{t:g}" for t, here in zip(path["timesteps"], some[name], strict=True) if here]
            way = f"{way} at t={', '.join(there)}, else {ways['tib']}"
        rows.append({"name": name, "errors": list(errors.values()), "way": way, "why": kept["why"]})
    return {"plots": path_plots(path), "ways": list(ways.values()), "rows": rows}


def _pictures(report: dict[str, Any], preview: Sequence[Any]) -> list[dict[str, Any]]:
    worst = worst_preview(report["preview"])
    return [
        {
            "prompt": pair.prompt,
            "psnr_db": item["psnr_db"],
            "is_worst": item is worst and len(preview) > 1,
            "before": data_uri(pair.before),
            "after": data_uri(pair.after),
            "pixelated": max(pair.before.size) <= 128,
        }
        for pair, item in zip(preview, report["preview"], strict=True)
    ]


def data_uri(picture: Any, more_frames: Sequence[Any] = (), milliseconds: int = 125) -> str:
    """A PIL picture as ``data:`` address: PNG of small pictures, JPEG of large ones; of a clip, an animated PNG."""
    buffer = io.BytesIO()
    if more_frames:
        animation = {"save_all": True, "append_images": list(more_frames), "duration": milliseconds, "loop": 0}
        picture.save(buffer, format="PNG", **animation)
        kind = "png"
    elif max(picture.size) <= _PNG_UP_TO:
        picture.save(buffer, format="PNG", optimize=True)
        kind = "png"
    else:
        picture.convert("RGB").save(buffer, format="JPEG", quality=_JPEG_QUALITY)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
