"""How a plan reads on a terminal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from diffuse_compress.components import GROUPS, SELF
from diffuse_compress.quantization.algorithms.base import steps_of
from diffuse_compress.quantization.dispatch import compute_path
from diffuse_compress.quantization.scheme import PerInputGroup

if TYPE_CHECKING:
    from diffuse_compress.plan import ComponentPlan, CompressionPlan, PlanRow
    from diffuse_compress.quantization.scheme import Scheme

__all__ = ["align", "format_bytes", "group_rows", "render_plan", "scheme_labels", "shrink_hint"]

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")
_UNTOUCHED_SHARE = 0.25


def format_bytes(count: float) -> str:
    """``12.3 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def render_plan(plan: CompressionPlan) -> str:
    """The whole plan as text; the first line names algorithm, formats and components."""
    lines = [headline(plan), plan.outcome] if plan.outcome else [headline(plan)]
    for part in plan.components.values():
        lines += ["", *_component_lines(part, plan)]
    for method in plan.methods:
        where = f"{method.component}: " if method.component != SELF else ""
        lines += ["", f"{where}{method}"]
    for name in plan.unchanged:
        lines.append(f"{name or plan.target_class}: already compressed with this configuration; nothing to do")
    if not plan.components:
        return "\n".join(lines)
    total = f"total: {format_bytes(plan.bytes_before)} -> {format_bytes(plan.bytes_after)}"
    if plan.bytes_before:
        total += f" ({plan.bytes_after / plan.bytes_before:.3f} of before)"
    lines += ["", total]
    hint = shrink_hint(plan.untouched, plan.bytes_after)
    return "\n".join([*lines, hint] if hint else lines)


def headline(plan: CompressionPlan) -> str:
    """One line: algorithm, preset and the components it applies to."""
    described = []
    for name, part in plan.components.items():
        spec = part.spec
        label = f"{spec.label} by {spec.algorithm.summary}"
        described.append(f"{label} on {name or part.class_name}")
    methods: dict[str, list[str]] = {method.config.summary: [] for method in plan.methods}
    for method in plan.methods:
        methods[method.config.summary].append(method.component or plan.target_class)
    described += [f"{summary} on {' and '.join(names)}" for summary, names in methods.items()]
    return f"CompressionPlan for {plan.target_class}: " + ("; ".join(described) or "nothing to do")


def _component_lines(part: ComponentPlan, plan: CompressionPlan) -> list[str]:
    title = f"{part.name} ({part.class_name})" if part.name != SELF else part.class_name
    ratio = part.bytes_after / part.bytes_before if part.bytes_before else 1.0
    lines = [f"{title}: {format_bytes(part.bytes_before)} -> {format_bytes(part.bytes_after)} ({ratio:.3f})"]
    if plan.search:
        counts = Counter(scheme_labels(list(dict.fromkeys(part.layers.values())))[s] for s in part.layers.values())
        formats = ", ".join(f"{count} layers {label}" for label, count in counts.most_common())
        lines.append(f"  {part.bits_per_weight:.2f} bits per weight on average: {formats}")
    if part.spec.attention is not None:
        lines.append(f"  attention: {part.spec.attention.value} products of queries, keys, probabilities and values")
    if part.unsupported is not None:
        kinds, share = part.unsupported
        lines.append(f"  {share:.0%} of what is left is in {kinds}, for which there is no quantized layer")
    table = [("tensors", "count", "scheme", "before", "after", "kept because")]
    for pattern, rows in group_rows(part.rows):
        before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
        cells = (rows[0].scheme or "-", format_bytes(before), format_bytes(after), rows[0].reason)
        table.append((pattern, str(len(rows)), *cells))
    lines += align(table)
    paths = []
    for scheme in dict.fromkeys(part.layers.values()):
        path = compute_path(scheme, plan.device, part.compute_dtype)
        if part.spec.algorithm.adds_branch:
            path = path.with_branch()
        for step in steps_of(part.spec.algorithm):
            path = path.with_branch(step.kept_dense) if step.kept_dense else path
        speed = {None: "speed unmeasured here", True: "faster than dense", False: "slower than dense"}
        paths.append(f"  {scheme.name} on {plan.device}: {path.description}; {speed[path.faster_than_dense]}")
    return [*lines, *dict.fromkeys(paths)]


def scheme_labels(schemes: Sequence[Scheme]) -> dict[Scheme, str]:
    """Short names, with group size and rotation where two would be alike."""
    labels = {}
    for scheme in schemes:
        alike = [other for other in schemes if other.name == scheme.name]
        labels[scheme] = scheme.name
        if len({other.weight for other in alike}) > 1:
            granularity = scheme.weight.granularity
            size = f"{granularity.rows} of rows" if isinstance(granularity, PerInputGroup) else scheme.weight.group_size
            labels[scheme] += f" g{size}"
        if len({other.input_rotation for other in alike}) > 1:
            labels[scheme] += f" rotated by {scheme.input_rotation}" if scheme.input_rotation else " not rotated"
    return labels


def group_rows(rows: Iterable[PlanRow]) -> list[tuple[str, list[PlanRow]]]:
    """Rows whose names differ only in indices and that fare alike, converted first."""
    groups: dict[tuple[str, str | None, str], list[PlanRow]] = {}
    for row in rows:
        groups.setdefault((_INDEX.sub("*", row.parameter), row.scheme, row.reason), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: (item[0][1] is None, -sum(r.bytes_before for r in item[1])))
    return [(key[0], members) for key, members in ordered]


def shrink_hint(untouched: Mapping[str, int], planned_bytes: int) -> str:
    """The call that would shrink the largest untouched component, if it is over a quarter of what is left.

    Args:
        untouched: {component: bytes} of what stays as it is.
        planned_bytes: of the compressed components, afterwards.
    """
    if not untouched:
        return ""
    left = planned_bytes + sum(untouched.values())
    name, size = max(untouched.items(), key=lambda item: item[1])
    if not left or size / left <= _UNTOUCHED_SHARE:
        return ""
    preset = "w8a16" if any(GROUPS[group].match(name) for group in ("text_encoders", "vaes")) else "w8a8"
    call = f'pipe.compress({{"{name}": "{preset}"}})'
    return f"{name} is {size / left:.0%} of what is left ({format_bytes(size)}); {call} would shrink it"


def align(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of texts, columns aligned and indented by two spaces."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
    return ["  " + "  ".join(cells).rstrip() for cells in padded]
