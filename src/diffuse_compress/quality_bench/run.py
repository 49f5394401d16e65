"""Runs the cells that are missing, each in a process of its own, and keeps a record for each.

A process of its own makes a cell's peak memory its own, and one that is killed (out of memory, most often) is one row
and no end of the run. A record is written whole or not at all, so a run that was killed goes on with the same command.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.api import compress
from diffuse_compress.arms import dtype_text
from diffuse_compress.components import model_components
from diffuse_compress.errors import ConfigError, DiffuseCompressError
from diffuse_compress.evaluation.environment import PeakMemory, describe_device
from diffuse_compress.evaluation.outliers import add_outlier_channels
from diffuse_compress.evaluation.records import Record, load_record
from diffuse_compress.integrations.component import quantized_layers
from diffuse_compress.plan import stored_bytes
from diffuse_compress.progress import track
from diffuse_compress.quality_bench.cells import Cell, Settings, Subject
from diffuse_compress.quality_bench.judges import Judge, compressed_models, judge_of, timed
from diffuse_compress.recipe import as_recipe
from diffuse_compress.skeleton import default_dtype, load
from diffuse_compress.versions import installed_versions

__all__ = ["QUALITY", "found_cells", "run_cells"]

QUALITY = "quality"
"""Key of ``not_measured`` that says why a cell cannot be."""
_PRELOADED = ["diffuse_compress.quality_bench.run", "diffusers.pipelines.pipeline_utils", "transformers.modeling_utils"]
_NO_REFERENCE = "the dense model could not be measured"


@dataclass(frozen=True)
class _Job:
    """What the process of a cell is told."""

    cell: Cell
    settings: Settings
    reference: Path
    record: Path
    command: str
    isolated: bool


def run_cells(
    cells: Sequence[Cell],
    settings: Settings,
    out: Path,
    *,
    command: str = "",
    retry: bool = False,
    isolated: bool = True,
) -> list[Record]:
    """The record of each cell; those that are missing are measured.

    Args:
        cells: of :func:`~diffuse_compress.quality_bench.cells.cross_product`, each model's dense one before its others.
        settings: of all.
        out: folder of the records.
        command: as it was typed, for the records.
        retry: measure those anew that have a reason instead of a result.

        isolated: each in a process of its own; else here, which starts sooner and on the CPU tells no peak of memory.

    Raises:
        CheckpointError: a file in the place of a record that is none.
    """
    found: dict[int, Record] = {}
    for index, cell in enumerate(cells):
        path = cell.file(out, settings)
        if path.exists():
            record = load_record(path)
            if not (retry and QUALITY in record.not_measured):
                found[index] = record
    dense = {cell.subject.title: index for index, cell in enumerate(cells) if cell.is_dense}
    todo = [index for index in range(len(cells)) if index not in found]
    for index in track(todo, "Cells", None, None, {}):
        cell, first = cells[index], dense[cells[index].subject.title]
        path = cell.file(out, settings)
        if not cell.is_dense and QUALITY in found[first].not_measured:
            found[index] = _bare_record(cell, settings, command, _NO_REFERENCE)
            continue
        reference = cells[first].file(out, settings).with_suffix("")
        job = _Job(cell, settings, reference, path, command, isolated)
        reason = cell.refusal
        if reason is None and isolated:
            reason = _in_process(job)
        elif reason is None:
            _measure(job)
        found[index] = load_record(path) if reason is None else _bare_record(cell, settings, command, reason)
        if cell.refusal:
            found[index].save(path)
    return [found[index] for index in range(len(cells))]


def found_cells(cells: Sequence[Cell], settings: Settings, out: Path) -> list[Cell]:
    """Those of the cells that :func:`run_cells` would not have to measure, and whose dense model is among them."""
    found = [cell for cell in cells if cell.file(out, settings).exists()]
    dense = {cell.subject.title for cell in found if cell.is_dense}
    return [cell for cell in found if cell.subject.title in dense]


def _in_process(job: _Job) -> str | None:
    """Measure a cell in a process; why it left no record, or None. Its death is not kept: the next run tries again."""
    # A forked process would not have to import everything again, but CUDA does not survive a fork.
    on_cpu = torch.device(job.settings.device).type == "cpu"
    can_serve = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if on_cpu and can_serve else "spawn")
    if on_cpu and can_serve:
        context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_measure, args=(job,))  # type: ignore[attr-defined]
    process.start()
    try:
        process.join()
    finally:
        if process.is_alive():
            process.kill()
            process.join()
    if process.exitcode == 0:
        return None
    killed = process.exitcode is not None and process.exitcode < 0
    how = f"by {signal.Signals(-process.exitcode).name}, out of memory perhaps" if killed else f"({process.exitcode})"
    return f"its process ended {how}; the same command tries again"


# --- in the process of a cell -----------------------------------------------------------------------------------


def _measure(job: _Job) -> None:
    """Measure a cell and write its record; a failure is a record too, which says why."""
    cell, settings = job.cell, job.settings
    try:
        with _silent(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record = _record(job)
    except DiffuseCompressError as error:
        record = _bare_record(cell, settings, job.command, " ".join(str(error).split()))
    except Exception as error:  # whatever an algorithm may raise is one row
        traceback.print_exc(file=sys.stderr)
        record = _bare_record(cell, settings, job.command, f"{type(error).__name__}: {' '.join(str(error).split())}")
    record.save(job.record)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Inside, the libraries show no bars and say nothing: the bar of the cells is the only one."""
    import diffusers
    import transformers

    before = []
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        before.append((logging, logging.is_progress_bar_enabled(), logging.get_verbosity()))
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    try:
        yield
    finally:
        for logging, has_bars, verbosity in before:
            logging.set_verbosity(verbosity)
            if has_bars:
                logging.enable_progress_bar()


def _record(job: _Job) -> Record:
    cell, settings, subject = job.cell, job.settings, job.cell.subject
    device = torch.device(settings.device)
    target = load(subject.folder, default_dtype(settings.dtype, subject.folder, device), str(device))
    if subject.outliers:
        for model in compressed_models(target):
            add_outlier_channels(model)
    judge = judge_of(subject, settings, target)
    if cell.is_dense:
        metrics, cost = judge.remember(target, job.reference), {}
    else:
        cost = _compress(job, judge, target, device)
        metrics = judge.judge(target, job.reference)
    record = _bare_record(cell, settings, job.command)
    facts = {
        "model": {**record.model, "class": type(target).__name__},
        "data": judge.data,
        "samples": judge.samples,
        "settings": {**record.settings, **judge.settings, **_layers(target)},
        "cost": {**cost, **_sizes(target), "call_seconds": timed(judge.call(target, job.reference), device)},
    }
    return Record(**{**vars(record), **facts}).with_metrics(metrics)


def _compress(job: _Job, judge: Judge, target: Any, device: torch.device) -> dict[str, Any]:
    """Compress in place; what it cost."""
    cell, settings, config = job.cell, job.settings, job.cell.config
    assert config is not None
    given: dict[str, Any] = {}
    if cell.calibration:
        name, _, count = cell.calibration.partition(":")
        given = {"calibration": judge.calibration(target, name, int(count or settings.samples), cell.seed)}
    memory = PeakMemory(device)
    # Right after a reset the peak is what is there.
    before, started = memory.read(), time.perf_counter()
    compress(target, config, measure=False, **given)
    seconds = time.perf_counter() - started
    if not any(quantized_layers(model) for model in compressed_models(target)):
        raise ConfigError("no layer of the model can be compressed this way: all stay dense.")
    if device.type == "cpu" and not job.isolated:
        # What earlier cells have freed stays with the process, and is used again without growing it.
        return {"compress_seconds": seconds}
    return {
        "compress_seconds": seconds,
        "compress_memory_bytes": max(0, memory.read() - before),
        "compress_memory_kind": f"{memory.kind}, peak over the loaded model",
    }


def _layers(target: Any) -> dict[str, int]:
    """How many linears and convolutions are compressed, of all in the compressed models."""
    models = compressed_models(target)
    whole = (torch.nn.Linear, torch.nn.Conv2d)
    return {
        "quantized_layers": sum(len(quantized_layers(model)) for model in models),
        "layers": sum(isinstance(module, whole) for model in models for module in model.modules()),
    }


def _sizes(target: Any) -> dict[str, int]:
    whole = sum(stored_bytes(model) for model in model_components(target).values())
    return {"disk_bytes": whole, "denoiser_disk_bytes": sum(map(stored_bytes, compressed_models(target)))}


def _bare_record(cell: Cell, settings: Settings, command: str, reason: str | None = None) -> Record:
    """Of nothing measured: what was asked for, and why it cannot be."""
    subject = cell.subject
    return Record(
        name=cell.name,
        model={
            "id": subject.id,
            "revision": subject.revision,
            "class": None,
            "dtype": _dtype_name(subject, settings),
            "weights_sha256": subject.fingerprint,
        },
        recipe=None if cell.config is None else as_recipe(cell.config).to_dict(),
        device=describe_device(settings.device),
        versions=installed_versions(),
        date=datetime.date.today().isoformat(),
        command=command,
        data={"kind": "unknown", "name": "none", "sha256": None},
        seeds={"base": cell.seed, "rule": "of calibration samples and of algorithms; what is judged on is fixed"},
        samples=0,
        settings=_row_settings(cell),
        not_measured={} if reason is None else {QUALITY: reason},
    )


def _row_settings(cell: Cell) -> Mapping[str, Any]:
    found = {"outliers": cell.subject.outliers, "scheme": cell.scheme, "algorithm": cell.algorithm or None}
    return {**found, "calibration": cell.calibration or None}


def _dtype_name(subject: Subject, settings: Settings) -> str | None:
    return dtype_text(default_dtype(settings.dtype, subject.folder, settings.device))
