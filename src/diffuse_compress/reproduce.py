"""``diffuse-compress eval reproduce``: a pinned experiment, for everyone who has access to its weights.

Fetches the weights at their commit, measures the dense model and each recipe at equal prompts and seeds, and writes a
record for each. Weights that cannot be had give records too: what they lack is "not measured: no access".
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import hashlib
import importlib.util
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from diffuse_compress.arms import DENSE, dtype_text, make_arm, read_recipes
from diffuse_compress.components import model_components
from diffuse_compress.errors import ConfigError, MissingDependencyError
from diffuse_compress.evaluation import perplexity, vqa
from diffuse_compress.evaluation.conditions import conditions_digest
from diffuse_compress.evaluation.environment import PeakMemory, describe_device
from diffuse_compress.evaluation.experiments import (
    Experiment,
    NoAccessError,
    Source,
    download_size,
    fetch,
    pinned_revision,
)
from diffuse_compress.evaluation.generation import SEED_RULE, generate
from diffuse_compress.evaluation.paired import score_pairs
from diffuse_compress.evaluation.records import Metric, Record, load_record
from diffuse_compress.evaluation.samples import RECORD, open_pictures
from diffuse_compress.plan import stored_bytes
from diffuse_compress.plan_text import format_bytes
from diffuse_compress.recipe import Recipe, weights_among
from diffuse_compress.versions import installed_versions

__all__ = ["ModelScorer", "describe", "register_scorer", "reproduce", "require_possible"]

_PAIRED: dict[str, tuple[str, ...]] = {
    "pictures": ("PSNR", "SSIM", "LPIPS", "CLIP-I"),
    "clips": ("PSNR", "SSIM", "LPIPS", "CLIP-I", "Flicker change"),
}
_COSTS = ("disk_bytes", "seconds_per_sample", "peak_memory_bytes")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")


class ModelScorer(Protocol):
    """Measures a language model; the dense and the compressed one are scored alike."""

    def __call__(
        self, model: Any, folder: Path, data: Sequence[Path], settings: Mapping[str, Any]
    ) -> tuple[list[Metric], dict[str, str]]:
        """Scores, and {name: reason} of those that could not be taken.

        Args:
            model: on its device, in evaluation mode.
            folder: snapshot of its repository, with its tokenizer and processor.
            data: files of the experiment's data set.
            settings: of the experiment.
        """
        ...


@dataclass(frozen=True)
class _Kind:
    """Experiments on models of one kind.

    Attributes:
        scorer: of the package.
        settings: that it knows, beside ``name``.
        scores: names of the scores, with the experiment's settings filled in.
        data: kind of their data in records.
    """

    scorer: ModelScorer
    settings: tuple[str, ...]
    scores: tuple[str, ...]
    data: str


_MODEL_KINDS = {
    "language": _Kind(
        perplexity.score_experiment, ("window", "stride", "batch_size"), ("perplexity, {name}",), "texts"
    ),
    "vision-language": _Kind(
        vqa.score_experiment, ("count", "max_new_tokens", "batch_size"), ("VQA accuracy, {name}",), "questions"
    ),
}
_registered: dict[str, ModelScorer] = {}


def register_scorer(kind: str, scorer: ModelScorer) -> None:
    """Score experiments of ``kind`` with ``scorer`` in this process, in place of the package's own."""
    _registered[kind] = scorer


def reproduce(
    experiment: Experiment,
    recipes: Sequence[str],
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    command: str = "",
    state: Any = None,
) -> dict[str, Path]:
    """Measure the dense model and each recipe. An interrupted run goes on; what is complete is not made again.

    Args:
        experiment: of :func:`~diffuse_compress.evaluation.experiments.load_experiments`.
        recipes: presets, presets with an algorithm (``w4a4:rtn``), or files; dense is measured in any case.
        out: gets ``<experiment>/dense`` and ``<experiment>/<recipe>``, each with a ``record.json``.
        device: where to run.
        command: for the records.
        state: accelerate's ``PartialState`` of a run on several processes.

    Returns:
        {"dense" or recipe: its folder}.

    Raises:
        NoAccessError: the weights or data could not be had. The records say so; those of an earlier run that measured
            are left as they are.
        ConfigError: an unknown kind or recipe, one that needs calibration, or a folder that holds another run.
    """
    job = _job(experiment, recipes, Path(out) / experiment.name, device, command, state)
    try:
        job, source = _fetched(job)
    except NoAccessError as error:
        if job.is_first:
            _write_unmeasured(job, str(error))
        raise
    for folder in job.folders.values():
        if job.is_first and _is_unmeasured(folder):
            (folder / RECORD).unlink()
    return _measure_models(job, source) if job.scorer is not None else _measure_pictures(job, source)


def require_possible(experiment: Experiment, recipes: Sequence[str], out: str | Path) -> None:
    """Raise what :func:`reproduce` would raise before it fetches anything."""
    _job(experiment, recipes, Path(out) / experiment.name, "cpu", "", None)


def describe(experiment: Experiment, recipes: Sequence[str], out: str | Path) -> str:
    """What :func:`reproduce` would fetch, make and measure, as text. Fetches one small file.

    Raises:
        NoAccessError: the weights cannot be had.
        ConfigError: as :func:`reproduce`.
    """
    job = _job(experiment, recipes, Path(out) / experiment.name, "cpu", "", None)
    pinned = "pinned" if experiment.revision else "main as it is now; the first run pins it"
    revision = pinned_revision(experiment.repo, job.revision or experiment.revision)
    files, total, missing = download_size(experiment.repo, revision)
    lines = [
        f"{experiment.name}: {experiment.repo} at {revision} ({pinned})",
        f"  weights: {files} files, {format_bytes(total)}, to download {format_bytes(missing)}",
        f"  arms: {', '.join(job.recipes)}, in {dtype_text(experiment.dtype)}",
    ]
    if job.scorer is None:
        count = len(experiment.conditions()) * experiment.repetitions
        assert experiment.prompts is not None
        seeds = f"seeds {experiment.seed} to {experiment.seed + count - 1}"
        lines += [f"  samples: {count} for each arm, of {experiment.prompts.name}, {seeds}"]
    elif experiment.data is not None:
        data = experiment.data
        lines += [f"  data: {', '.join(data.files)} of {data.repo} at {data.revision or 'main'}"]
    settings = ", ".join(f"{name}={value}" for name, value in experiment.settings.items())
    scores = ", ".join(_scores(experiment))
    return "\n".join([*lines, f"  settings: {settings}", f"  scores: {scores}", f"  records: {job.folder}"])


# --- before ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    experiment: Experiment
    recipes: dict[str, Recipe | None]
    folder: Path
    device: torch.device
    command: str
    state: Any
    scorer: ModelScorer | None
    revision: str | None
    data_revision: str | None

    @property
    def is_first(self) -> bool:
        return self.state is None or self.state.process_index == 0

    @property
    def folders(self) -> dict[str, Path]:
        return {name: self.folder / name for name in self.recipes}


def _job(experiment: Experiment, recipes: Sequence[str], folder: Path, device: Any, command: str, state: Any) -> _Job:
    chosen = read_recipes(list(dict.fromkeys([DENSE, *recipes])))
    for name, recipe in chosen.items():
        configs = [config for part in (recipe.components.values() if recipe else ()) for config in part]
        if any(config.spec.needs_calibration for config in weights_among(configs)):
            raise ConfigError(
                f"reproduce: {name} needs calibration data, which an experiment does not have. Take a recipe without, "
                "for example w4a8."
            )
    scorer = None
    if experiment.kind not in _PAIRED:
        scorer = _scorer_of(experiment)
    else:
        experiment.conditions()
    revision, data_revision = experiment.revision, experiment.data.revision if experiment.data else None
    # What an unpinned experiment ran on first, it keeps running on.
    for path in sorted(folder.glob(f"*/{RECORD}")):
        record = load_record(path)
        if record.model["id"] == experiment.repo:
            revision = revision or record.model.get("revision")
            found = record.data["name"].rpartition("@")[2]
            data_revision = data_revision or (found if _COMMIT.match(found) else None)
    return _Job(experiment, chosen, folder, torch.device(device), command, state, scorer, revision, data_revision)


def _scorer_of(experiment: Experiment) -> ModelScorer:
    kind = experiment.kind
    if kind in _registered:
        return _registered[kind]
    if kind not in _MODEL_KINDS:
        kinds = ", ".join(sorted({*_PAIRED, *_MODEL_KINDS, *_registered}))
        raise ConfigError(f"{experiment.name}: kind must be one of {kinds}, got {kind!r}.")
    known, files = _MODEL_KINDS[kind], experiment.data.files if experiment.data else ()
    unknown = sorted(set(experiment.settings) - {"name", *known.settings})
    if not files or "name" not in experiment.settings or unknown:
        need = f"settings among name, {', '.join(known.settings)}" if unknown else "data, and settings with a name"
        got = f"the setting {unknown[0]!r}" if unknown else f"{len(files)} files and {dict(experiment.settings)}"
        raise ConfigError(f"{experiment.name}: experiments of kind {kind!r} need {need}, got {got}.")
    if any(file.endswith(".parquet") for file in files) and importlib.util.find_spec("pyarrow") is None:
        raise MissingDependencyError(f"{experiment.name}: its data are parquet files. pip install pyarrow")
    return known.scorer


def _fetched(job: _Job) -> tuple[_Job, Source]:
    experiment = job.experiment
    revision = pinned_revision(experiment.repo, job.revision)
    data_revision = None
    if experiment.data is not None:
        data_revision = pinned_revision(experiment.data.repo, job.data_revision, repo_type="dataset")
    source = fetch(experiment, revision, data_revision)
    return dataclasses.replace(job, revision=revision, data_revision=data_revision), source


# --- pictures and clips ------------------------------------------------------------------------------------------


def _measure_pictures(job: _Job, source: Source) -> dict[str, Path]:
    experiment = job.experiment
    arms = []
    for name, recipe in job.recipes.items():
        arm = make_arm(name, str(source.folder), recipe, dtype=experiment.dtype, device=job.device)
        arms.append(dataclasses.replace(arm, model={**arm.model, "id": experiment.repo}))
    assert experiment.prompts is not None
    folders = generate(
        arms,
        experiment.conditions(),
        job.folder,
        seed=experiment.seed,
        batch_size=experiment.batch_size,
        repetitions=experiment.repetitions,
        options=experiment.settings,
        data_name=experiment.prompts.name,
        command=job.command,
        device=job.device,
        state=job.state,
    )
    if not job.is_first:
        return folders
    reference = open_pictures(folders[DENSE])
    for name, folder in folders.items():
        record = dataclasses.replace(load_record(folder), name=f"{experiment.name} {name}")
        if name != DENSE:
            record = record.with_metrics(*score_pairs(reference, open_pictures(folder)))
        record.save(folder / RECORD)
    return folders


# --- language models --------------------------------------------------------------------------------------------


def _measure_models(job: _Job, source: Source) -> dict[str, Path]:
    """One process scores; the others of a run on several have nothing to do."""
    for name, recipe in job.recipes.items() if job.is_first else ():
        _measure_model(job, source, name, recipe)
    return job.folders


def _measure_model(job: _Job, source: Source, name: str, recipe: Recipe | None) -> None:
    experiment, scorer, path = job.experiment, job.scorer, job.folders[name] / RECORD
    assert scorer is not None
    arm = make_arm(name, str(source.folder), recipe, dtype=experiment.dtype, device=job.device)
    wanted = _bare_record(job, name, {**arm.model, "id": experiment.repo}, source.data)
    if path.exists():
        here, there = _identity(wanted), _identity(load_record(path))
        different = [key for key in here if here[key] != there[key]]
        if different:
            raise ConfigError(
                f"{path.parent}: holds a run of other {', '.join(different)}. Choose another --out, or delete it."
            )
        return
    model = arm.load()
    memory, started = PeakMemory(job.device), time.perf_counter()
    metrics, absent = scorer(model, source.folder, source.data, experiment.settings)
    seconds = time.perf_counter() - started
    count = max((metric.count for metric in metrics), default=0)
    cost = {
        "disk_bytes": sum(map(stored_bytes, model_components(model).values())),
        # A token of a text is no sample: eval perplexity gives no such number either.
        "seconds_per_sample": seconds / count if count and experiment.kind != "language" else None,
        "wall_seconds": seconds,
        "peak_memory_bytes": memory.read() or None,
        "peak_memory_kind": memory.kind,
    }
    facts: dict[str, Any] = {"model": {**wanted.model, "class": type(model).__name__}, "samples": count, "cost": cost}
    dataclasses.replace(wanted, **facts).with_metrics(metrics, absent).save(path)
    del model
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()


def _identity(record: Record) -> dict[str, Any]:
    """What fixes the scores, but for versions and the device's name."""
    whole = record.to_dict()
    found = {key: whole[key] for key in ("recipe", "data", "settings")}
    model = {key: value for key, value in whole["model"].items() if key != "class"}
    return found | {"model": model, "device type": whole["device"]["type"]}


# --- records ----------------------------------------------------------------------------------------------------


def _bare_record(job: _Job, name: str, model: Mapping[str, Any], files: Sequence[Path] = ()) -> Record:
    """Of nothing measured yet; ``files`` are those of the data set, where they could be had."""
    experiment, recipe = job.experiment, job.recipes[name]
    seeds: dict[str, Any] = {"base": None, "rule": "nothing is drawn"}
    if job.scorer is None:
        assert experiment.prompts is not None
        data: dict[str, Any] = {"kind": "prompts", "name": experiment.prompts.name}
        data["sha256"] = conditions_digest(experiment.conditions())
        seeds = {"base": experiment.seed, "rule": SEED_RULE}
    else:
        known, source = _MODEL_KINDS.get(experiment.kind), experiment.data
        named = f"{source.repo}@{job.data_revision or 'main'}" if source is not None else "none"
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16] if files else None
        data = {"kind": known.data if known else "unknown", "name": named, "sha256": digest}
    return Record(
        name=f"{experiment.name} {name}",
        model={"class": None, **model},
        recipe=None if recipe is None else recipe.to_dict(),
        device=describe_device(job.device, 1 if job.state is None else job.state.num_processes),
        versions=installed_versions(),
        date=datetime.date.today().isoformat(),
        command=job.command,
        data=data,
        seeds=seeds,
        samples=0,
        settings=dict(experiment.settings),
    )


def _write_unmeasured(job: _Job, reason: str) -> None:
    experiment = job.experiment
    for name, folder in job.folders.items():
        if (folder / RECORD).exists() and not _is_unmeasured(folder):
            continue
        model = {"id": experiment.repo, "revision": job.revision, "dtype": dtype_text(experiment.dtype)}
        scores = () if name == DENSE and job.scorer is None else _scores(experiment)
        record = _bare_record(job, name, model)
        record.with_metrics([], dict.fromkeys([*scores, *_COSTS], reason)).save(folder / RECORD)


def _is_unmeasured(folder: Path) -> bool:
    """The folder holds nothing but the record of weights that could not be had."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return names == [RECORD] and load_record(folder).samples == 0


def _scores(experiment: Experiment) -> tuple[str, ...]:
    found = _PAIRED.get(experiment.kind)
    if found is None:
        known = _MODEL_KINDS.get(experiment.kind)
        return (
            tuple(name.format_map({"name": "", **experiment.settings}) for name in known.scores)
            if known
            else ("score",)
        )
    return found
