"""One record for one evaluated pipeline: what ran, on what, at which cost, with which scores; JSON with a schema."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffuse_compress.errors import CheckpointError
from diffuse_compress.evaluation.samples import RECORD, write_atomically
from diffuse_compress.evaluation.statistics import Interval

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["NO_ACCESS", "Metric", "Record", "eval_results", "load_record", "record_schema", "validate"]

NO_ACCESS = "no access"
"""What a reason in ``Record.not_measured`` begins with where the weights or data could not be had."""
SCHEMA_VERSION = 1
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_TASKS = {
    "prompts": "text-to-image",
    "unknown": "text-to-image",
    "texts": "text-generation",
    "tasks": "text-generation",
    "questions": "visual-question-answering",
}


@dataclass(frozen=True)
class Metric:
    """One score.

    Attributes:
        name: as it is shown; names what it is measured against where that is not plain.
        value: the estimate; infinite and undefined ones are null in JSON.
        low: lower end of its 95 % interval, or None.
        high: upper end.
        count: samples, or pairs.
        implementation: which formula, weights and preprocessing: equal names under other ones do not compare.
        higher_is_better: direction.
        unit: "dB", "%" or "".
        reference: ``{"name", "count", "statistics_sha256"}`` of what it is measured against, or None.
        statistics_sha256: of mean and covariance of the samples' features, or None.
        details: anything else.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    count: int
    implementation: str
    higher_is_better: bool
    unit: str = ""
    reference: Mapping[str, Any] | None = None
    statistics_sha256: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_interval(
        cls, name: str, interval: Interval, implementation: str, *, higher_is_better: bool, **more: Any
    ) -> Metric:
        """A score that comes with its interval; ends that are not finite are left out."""
        ends = [end if math.isfinite(end) else None for end in (interval.low, interval.high)]
        return cls(name, interval.value, ends[0], ends[1], interval.count, implementation, higher_is_better, **more)

    @property
    def key(self) -> tuple[Any, ...]:
        """Scores of one key replace one another in a record."""
        reference = self.reference or {}
        return self.name, self.implementation, reference.get("name")

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.name}: {self.value:.4f}{interval}{unit}, N={self.count}"


@dataclass(frozen=True)
class Record:
    """What the schema file says, field by field: :func:`record_schema`."""

    name: str
    model: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str
    command: str
    data: Mapping[str, Any]
    seeds: Mapping[str, Any]
    samples: int
    settings: Mapping[str, Any]
    cost: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()
    not_measured: Mapping[str, str] = field(default_factory=dict)

    def with_metrics(self, metrics: Iterable[Metric], not_measured: Mapping[str, str] | None = None) -> Record:
        """A copy with these scores; they replace those of the same name, implementation and reference.

        Args:
            metrics: scores.
            not_measured: {name: reason} of scores that were wanted and could not be taken.
        """
        merged = {metric.key: metric for metric in (*self.metrics, *metrics)}
        names = {metric.name for metric in merged.values()}
        reasons = {**self.not_measured, **(not_measured or {})}
        absent = {name: reason for name, reason in reasons.items() if name not in names}
        return dataclasses.replace(self, metrics=tuple(merged.values()), not_measured=absent)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; inverse of :meth:`from_dict`. Numbers that are not finite become null."""
        plain: dict[str, Any] = _finite({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)})
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "record") -> Record:
        """Read :meth:`to_dict`'s output. Raises CheckpointError where it does not follow the schema."""
        validate(data, where)
        fields = {key: value for key, value in data.items() if key != "schema_version"}
        metrics = [
            {**entry, "value": math.nan if entry["value"] is None else entry["value"]} for entry in data["metrics"]
        ]
        return cls(**{**fields, "metrics": tuple(Metric(**entry) for entry in metrics)})

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        data = self.to_dict()
        validate(data, str(path))
        write_atomically(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def load_record(path: str | Path) -> Record:
    """Read a record's file, or that of a run's folder.

    Raises:
        CheckpointError: not there, not JSON, or not after the schema; the message names the place.
    """
    path = Path(path)
    path = path / RECORD if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable record ({error}).") from error
    return Record.from_dict(data, str(path))


@cache
def record_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) that comes with the package."""
    text = resources.files("diffuse_compress.evaluation").joinpath("record.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def validate(data: Any, where: str = "record", schema: Mapping[str, Any] | None = None) -> None:
    """Hold ``data`` to a schema; None is that of a record.

    Covers the words that the schema uses: type, enum, required, properties, additionalProperties, items, minimum.

    Raises:
        CheckpointError: the first place that differs.
    """
    _validate(data, record_schema() if schema is None else schema, where)


def _validate(value: Any, schema: Mapping[str, Any], where: str) -> None:
    if "enum" in schema and value not in schema["enum"]:
        raise CheckpointError(f"{where}: must be one of {schema['enum']}, got {value!r}.")
    if "type" in schema:
        names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(isinstance(value, _TYPES[n]) and (n == "boolean" or not isinstance(value, bool)) for n in names):
            raise CheckpointError(f"{where}: must be {' or '.join(names)}, got {type(value).__name__} {value!r}.")
    if "minimum" in schema and isinstance(value, int | float) and value < schema["minimum"]:
        raise CheckpointError(f"{where}: must be at least {schema['minimum']}, got {value}.")
    if isinstance(value, dict):
        known = schema.get("properties", {})
        missing = [key for key in schema.get("required", ()) if key not in value]
        extra = [key for key in value if key not in known] if schema.get("additionalProperties") is False else []
        if missing or extra:
            what = f"needs {', '.join(missing)}" if missing else f"does not know {', '.join(extra)}"
            raise CheckpointError(
                f"{where}: a record {what}. Its schema comes with the package, diffuse_compress/**/*.schema.json."
            )
        for key, entry in value.items():
            if key in known:
                _validate(entry, known[key], f"{where}.{key}")
    if isinstance(value, list) and "items" in schema:
        for index, entry in enumerate(value):
            _validate(entry, schema["items"], f"{where}[{index}]")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def eval_results(records: Sequence[Record | str | Path]) -> list[EvalResult]:
    """The scores as huggingface_hub's ``EvalResult``, for ``ModelCardData(eval_results=...)``.

    Args:
        records: records, or paths of their files or runs.

    Returns:
        One result for each defined score. Its dataset is the record's prompts or classes; implementation, N, interval
        and reference are its ``metric_config`` and ``metric_args``. None is marked as verified.
    """
    from huggingface_hub import EvalResult

    found = []
    for entry in records:
        record = entry if isinstance(entry, Record) else load_record(entry)
        kind, clips = record.data["kind"], bool(record.settings.get("frames"))
        # The Hub has no task of class-conditional generation.
        task = "text-to-video" if clips else _TASKS.get(kind, "unconditional-image-generation")
        for metric in record.metrics:
            if not math.isfinite(metric.value):
                continue
            found.append(
                EvalResult(
                    task_type=task,
                    dataset_type=_slug(record.data["name"]),
                    dataset_name=f"{record.data['name']}, {record.samples} samples",
                    metric_type=_slug(metric.name.partition(",")[0]),
                    metric_name=f"{metric.name} ({record.name})",
                    metric_value=round(metric.value, 6),
                    metric_config=metric.implementation,
                    metric_args={
                        "count": metric.count,
                        "interval_95": [metric.low, metric.high],
                        "unit": metric.unit or None,
                        "reference": dict(metric.reference) if metric.reference else None,
                        "model_revision": record.model.get("revision"),
                        "device": record.device["name"],
                        "date": record.date,
                    },
                )
            )
    return found


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split()) or "unknown"
