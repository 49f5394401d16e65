"""What ``bench quality`` measures: formats, algorithms and calibration sets from a command line, and their cells."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffuse_compress.arms import DENSE, json_or_text, weights_fingerprint
from diffuse_compress.demo import CALL, demo_model_path
from diffuse_compress.errors import ConfigError, DiffuseCompressError, nearest
from diffuse_compress.integrations.quantization_config import QuantizationConfig
from diffuse_compress.quantization.algorithms.base import (
    AlgorithmConfig,
    SequenceConfig,
    algorithm_from_dict,
    algorithm_kinds,
)
from diffuse_compress.quantization.presets import PRESETS, resolve_preset
from diffuse_compress.quantization.scheme import GROUP_SIZES, NumberFormat, PerGroup, Scheme, WeightScheme
from diffuse_compress.skeleton import local_folder

__all__ = [
    "ALL",
    "CALIBRATIONS",
    "Cell",
    "Settings",
    "Subject",
    "cross_product",
    "read_algorithms",
    "read_calibrations",
    "read_options",
    "read_schemes",
    "read_subjects",
]

ALL = "all"
CALIBRATIONS = ("matching", "other", "random")
_VERSION = 1  # of what a cell's numbers mean: another one is measured anew
_GROUPED = re.compile(r"w(?P<bits>[2348])g(?P<size>\d+)\Z")
_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
# Written by training, not by an algorithm that could be run on weights.
_NOT_RUN = ("trained",)
# How the reference models' cards ask for samples; a folder whose prompts they draw where they have none of their own.
_REFERENCE_CALLS: dict[str, dict[str, Any]] = {
    "emoji_ddim": {"num_inference_steps": 20},
    "emoji_dit": {"num_inference_steps": 20, "guidance_scale": 2.0},
    "emoji_pixart": dict(CALL),
    "emoji_sd": {"num_inference_steps": 20, "guidance_scale": 3.0},
    "emoji_wan": {
        "num_inference_steps": 20,
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "max_sequence_length": 16,
    },
}
_REFERENCE_PROMPTS = {"emoji_sd": "emoji_pixart"}


@dataclass(frozen=True)
class Settings:
    """What fixes a cell's numbers beside the cell itself.

    Attributes:
        device: where models are compressed and run.
        dtype: of the dense model: "auto" (as stored; float16 becomes float32 on the CPU) or a name.
        prompts: samples that a pipeline draws to be judged by; also calls that its denoiser is judged on.
        windows: of text that a language model is judged on.
        window: tokens of one; None takes the model's limit, at most 2048.
        samples: of a calibration set, where it does not say.
        batch_size: samples or windows at a time.
        call: arguments of pipelines' calls, over those of the models.
        text: file that language models are judged on; None takes ``heldout.txt`` beside the model.
    """

    device: str = "cpu"
    dtype: str = "auto"
    prompts: int = 16
    windows: int = 32
    window: int | None = None
    samples: int = 16
    batch_size: int = 8
    call: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None

    def __post_init__(self) -> None:
        low = {name: getattr(self, name) for name in ("prompts", "windows") if getattr(self, name) < 2}
        low |= {name: getattr(self, name) for name in ("samples", "batch_size") if getattr(self, name) < 1}
        if low:
            name, value = next(iter(low.items()))
            least = 2 if name in ("prompts", "windows") else 1
            raise ConfigError(f"bench quality: --{name.replace('_', '-')} must be at least {least}, got {value}.")


@dataclass(frozen=True)
class Subject:
    """A model, as it is stored or with outlier channels of the same function.

    Attributes:
        name: in tables.
        folder: of the pipeline or model.
        id: name of the folder, or Hub id.
        revision: commit of a Hub repository.
        fingerprint: of its weight files.
        outliers: give it outlier channels before anything else.
        call: arguments that the model's card asks for.
        prompts: folder of its prompts.
    """

    name: str
    folder: Path
    id: str
    revision: str | None
    fingerprint: str
    outliers: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)
    prompts: Path | None = None

    @property
    def title(self) -> str:
        """Of its table."""
        return f"{self.name}, outliers" if self.outliers else self.name

    @property
    def is_pipeline(self) -> bool:
        """Else a language model."""
        return (self.folder / "model_index.json").is_file()


@dataclass(frozen=True)
class Cell:
    """One row's measurement with one seed.

    Attributes:
        subject: the model.
        scheme: as it was typed; "dense" for the model as it is.
        algorithm: likewise; "" for dense.
        calibration: set of samples, as "matching" or "matching:64"; "" where nothing is calibrated.
        seed: of the samples and of algorithms that draw.
        config: what the model is compressed with; None for dense, or where ``refusal`` says why it cannot be.
        refusal: why the cell cannot be, known before anything is loaded.
    """

    subject: Subject
    scheme: str
    algorithm: str = ""
    calibration: str = ""
    seed: int = 0
    config: QuantizationConfig | None = None
    refusal: str | None = None

    @property
    def is_dense(self) -> bool:
        return self.scheme == DENSE

    @property
    def row(self) -> tuple[str, str, str, str]:
        """What the cells of a row share; they differ in the seed."""
        return self.subject.title, self.scheme, self.algorithm, self.calibration

    @property
    def name(self) -> str:
        """Of its record."""
        parts = [self.subject.title.replace(", ", "-"), self.scheme, self.algorithm, self.calibration]
        return "-".join([part for part in parts if part] + ([f"seed{self.seed}"] if not self.is_dense else []))

    def identity(self, settings: Settings) -> dict[str, Any]:
        """Whatever its numbers depend on but versions and the machine."""
        own, digests = dataclasses.asdict(settings), {}
        judged = ("prompts",) if self.subject.is_pipeline else ("windows", "window")
        for key, path in (("text", settings.text), ("calibration", self.calibration.partition(":")[0])):
            if path and Path(path).is_file():
                digests[key] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        count = self.calibration.partition(":")[2] or settings.samples
        return {
            "version": _VERSION,
            "weights": self.subject.fingerprint,
            "outliers": self.subject.outliers,
            "call": {**self.subject.call, **settings.call} if self.subject.is_pipeline else {},
            "config": None if self.config is None else self.config.to_dict(),
            "refusal": self.refusal,
            "calibration": [self.calibration.partition(":")[0], int(count)] if self.calibration else None,
            "seed": self.seed,
            "settings": {key: own[key] for key in ("device", "dtype", "batch_size", *judged)},
            "files": digests,
        }

    def file(self, out: Path, settings: Settings) -> Path:
        """Where its record is kept: of another identity is another file."""
        text = json.dumps(self.identity(settings), sort_keys=True, default=str)
        plain = re.sub(r"[^\w.+-]+", "_", self.name)
        return out / "cells" / f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"


# --- the command line -------------------------------------------------------------------------------------------


def read_subjects(names: Sequence[str], *, outliers: bool = False) -> list[Subject]:
    """Models by name of a reference model, folder or Hub id; with ``outliers`` each a second time with such channels.

    Raises:
        ConfigError: none of these; the message lists the reference models.
    """
    found = []
    references = _reference_models()
    for name in dict.fromkeys(names):
        folder = references.get(name)
        if folder is None and (Path(name).is_dir() or name.count("/") == 1):
            folder = local_folder(name, weights=True)
        if folder is None:
            raise ConfigError(
                f"bench quality: no model {name!r}: not a folder, Hub id (owner/name) or reference model; "
                f"{nearest(name, references)}."
            )
        key = folder.resolve().name
        is_ours = references.get(key) is not None and references[key].resolve() == folder.resolve()
        subject = Subject(
            name=key if Path(name).is_dir() else name,
            folder=folder,
            id=name if folder.parent.name == "snapshots" else key,
            revision=folder.name if folder.parent.name == "snapshots" else None,
            fingerprint=weights_fingerprint(folder),
            call=_REFERENCE_CALLS.get(key, {}) if is_ours else {},
            prompts=folder.parent / _REFERENCE_PROMPTS.get(key, key) if is_ours else folder,
        )
        found += [subject, dataclasses.replace(subject, outliers=True)] if outliers else [subject]
    return found


def _reference_models() -> dict[str, Path]:
    """{name: folder} of the small trained models that are here: one in the wheel, all in a checkout."""
    demo = demo_model_path()
    checkout = Path(__file__).resolve().parents[3] / "examples" / "reference_models"
    folders = [path.parent for name in ("model_index.json", "config.json") for path in checkout.glob(f"*/{name}")]
    return {"emoji_pixart": demo, **{folder.name: folder for folder in sorted(folders)}}


def read_schemes(texts: Sequence[str]) -> dict[str, str | Scheme]:
    """{text: preset or Scheme}. "all" is every preset; ``w3g64`` is an asymmetric weight-only format in groups.

    Raises:
        ConfigError: neither.
    """
    found: dict[str, str | Scheme] = {}
    for text in itertools.chain.from_iterable(PRESETS if text == ALL else [text] for text in texts):
        grouped = _GROUPED.match(text)
        if grouped and int(grouped["size"]) in GROUP_SIZES:
            granularity = PerGroup(int(grouped["size"]), pad=True)
            found[text] = Scheme(WeightScheme(NumberFormat(f"int{grouped['bits']}"), granularity, symmetric=False))
            continue
        try:
            found[text] = resolve_preset(text).name
        except ConfigError as error:
            raise ConfigError(
                f"--schemes: {error} Or weights alone in groups: w2g64, w3g64, w4g128, groups of "
                f"{', '.join(map(str, GROUP_SIZES))}."
            ) from error
    return found


def read_options(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{kind: {field: value}} of ``kind.field=value``, values in JSON or plain text.

    Raises:
        ConfigError: another form, or an unknown kind or field; the message lists what exists.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        place, separator, value = text.partition("=")
        kind, dot, name = place.partition(".")
        if not (separator and dot and name):
            raise ConfigError(f"--option: need KIND.FIELD=VALUE, got {text!r}. For example gptq.damping=0.02.")
        _known_kind(kind, "--option")
        found.setdefault(kind, {})[name] = json_or_text(value)
    for kind, values in found.items():
        algorithm_from_dict({"kind": kind, **values})
    return found


def read_algorithms(
    texts: Sequence[str], options: Mapping[str, Mapping[str, Any]]
) -> dict[str, AlgorithmConfig | ConfigError]:
    """{text: algorithm} of kinds, or of several that build on one another, ``smoothquant+gptq``; "all" is every kind.

    Several that do not go together are kept with the error, which is the reason in their rows.

    Raises:
        ConfigError: an unknown kind, or options of one that is not among the algorithms.
    """
    kinds = [kind for kind in algorithm_kinds() if kind not in _NOT_RUN]
    found: dict[str, AlgorithmConfig | ConfigError] = {}
    for text in itertools.chain.from_iterable(kinds if text == ALL else [text] for text in texts):
        parts = text.split("+")
        for kind in parts:
            _known_kind(kind, "--algorithms")
        configs = [algorithm_from_dict({"kind": kind, **options.get(kind, {})}) for kind in parts]
        try:
            found[text] = configs[0] if len(configs) == 1 else SequenceConfig(tuple(configs))
        except ConfigError as error:
            found[text] = error
    used = {kind for text in found for kind in text.split("+")}
    unused = sorted(set(options) - used)
    if unused:
        raise ConfigError(f"--option: {unused[0]} is not among --algorithms, {', '.join(found)}.")
    return found


def _known_kind(kind: str, option: str) -> None:
    kinds = [one for one in algorithm_kinds() if one not in _NOT_RUN]
    if kind not in kinds:
        raise ConfigError(f"{option}: no algorithm {kind!r}; {nearest(kind, kinds)}. Several in one: smoothquant+gptq.")


def read_calibrations(texts: Sequence[str]) -> list[str]:
    """Sets of samples: "matching", "other", "random" or a file, each also with a number, ``matching:64``.

    Raises:
        ConfigError: none of these, or not a number.
    """
    for text in texts:
        name, separator, count = text.partition(":")
        if separator and not (count.isdecimal() and int(count) > 0):
            raise ConfigError(f"--calibration: NAME:N has the number of samples after the colon, got {text!r}.")
        if name not in CALIBRATIONS and not (Path(name).is_file() and Path(name).suffix.lower() in _SUFFIXES):
            raise ConfigError(
                f"--calibration: {name!r} is no set of samples and no file ({', '.join(_SUFFIXES)}); "
                f"{nearest(name, CALIBRATIONS)}."
            )
    return list(dict.fromkeys(texts))


# --- cells ------------------------------------------------------------------------------------------------------


def cross_product(
    subjects: Sequence[Subject],
    schemes: Mapping[str, str | Scheme],
    algorithms: Mapping[str, AlgorithmConfig | ConfigError],
    calibrations: Sequence[str],
    seeds: Sequence[int],
) -> list[Cell]:
    """The cells in the order of the table, each model's dense one first.

    What looks at no samples has one cell for all calibration sets, and what also draws nothing one for all seeds.
    """
    found = []
    for subject in subjects:
        found.append(Cell(subject, DENSE))
        for (label, scheme), (name, algorithm) in itertools.product(schemes.items(), algorithms.items()):
            first = _cell(subject, label, scheme, name, algorithm, seeds[0])
            if first.config is None:
                found.append(first)
                continue
            spec = first.config.spec
            sets = calibrations if spec.needs_calibration else ("",)
            repeats = seeds if spec.needs_calibration or spec.algorithm.is_random else seeds[:1]
            for calibration, seed in itertools.product(sets, repeats):
                cell = _cell(subject, label, scheme, name, algorithm, seed)
                found.append(dataclasses.replace(cell, calibration=calibration))
    return found


def _cell(
    subject: Subject,
    label: str,
    scheme: str | Scheme,
    name: str,
    algorithm: AlgorithmConfig | ConfigError,
    seed: int,
) -> Cell:
    if isinstance(algorithm, ConfigError):
        return Cell(subject, label, name, seed=seed, refusal=str(algorithm))
    try:
        return Cell(subject, label, name, seed=seed, config=QuantizationConfig(scheme, algorithm, seed=seed))
    except DiffuseCompressError as error:
        return Cell(subject, label, name, seed=seed, refusal=str(error))
