"""Runs one job of the ``vbench`` package: a JSON file in, a JSON file out.

    python -I worker.py JOB.json

One file that imports nothing of diffuse_compress, so that any Python with vbench installed can run it; diffuse_compress
also loads it into its own process. Runs on Python 3.10 and newer.

A job:

    protocol    1
    task        "evaluate", "static_filter" or "probe"
    result      path of the result, replaced when it is whole
    dimension   of "evaluate", e.g. "temporal_flickering"
    entries     [{"prompt_en", "dimension", "video_list", "auxiliary_info"?}]: vbench's own form, absolute paths
    device      torch's name of it, e.g. "cuda"
    weights     folder of the weight files (vbench calls it VBENCH_CACHE_DIR)

A result: {"protocol": 1, "ok": true, "versions", "seconds", ...} with

    evaluate        "score", and "videos": [{"path", "score"}]
    static_filter   "static": {path: whether the video is still enough for temporal_flickering}
    probe           "modules": {module: null, or why it cannot be imported}

or {"protocol": 1, "ok": false, "error": {"type", "message", "traceback"}} and exit status 1. While a job runs, standard
output has lines {"done", "total"}; what vbench prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

PROTOCOL = 1
FILTERED_PER_PROMPT = 5
"""The static filter stops at so many still videos of one prompt, as ``vbench static_filter`` does."""
_DINO_FILE = "dino_vitbase16_pretrain.pth"
Progress = Callable[[int, int], None]


def run_job(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Do what the job says and return the result, without ``protocol`` and ``ok``. Errors are the package's own."""
    if job.get("protocol") != PROTOCOL:
        raise ValueError(f"job: need protocol {PROTOCOL}, got {job.get('protocol')!r}")
    tasks = {"evaluate": _evaluate, "static_filter": _static_filter, "probe": _probe}
    if job.get("task") not in tasks:
        raise ValueError(f"job: task must be one of {', '.join(tasks)}, got {job.get('task')!r}")
    started = time.perf_counter()
    with _prepared(job.get("weights")):
        found = tasks[job["task"]](job, progress)
    return {**found, "versions": versions(), "seconds": time.perf_counter() - started}


def versions() -> dict[str, str]:
    """Of what decides about scores."""
    found = {"python": platform.python_version()}
    for name in ("vbench", "torch", "torchvision", "transformers", "numpy", "timm", "pyiqa", "decord"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    for name in ("opencv-python-headless", "opencv-python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.setdefault("opencv", importlib.metadata.version(name))
    return found


def import_dimension(name: str) -> types.ModuleType:
    """``vbench.<name>``; the call of :func:`run_job` that uses it must be around."""
    return importlib.import_module(f"vbench.{name}")


# --- tasks --------------------------------------------------------------------------------------------------------


def _evaluate(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    dimension = job["dimension"]
    module = import_dimension(dimension)
    import torch

    module.tqdm = _counted(progress)
    device = torch.device(job["device"])
    with _files(job["entries"]) as info, _dino_hub(dimension, job.get("weights")) as dino:
        submodules = importlib.import_module("vbench.utils").init_submodules([dimension], local=True)[dimension]
        if dino is not None:
            submodules = {**submodules, **dino}
            submodules.pop("path", None)
        score, videos = getattr(module, f"compute_{dimension}")(str(info), device, submodules)
    return {
        "score": float(score),
        "videos": [{"path": entry["video_path"], "score": float(entry["video_results"])} for entry in videos],
    }


def _static_filter(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    import torch

    module = importlib.import_module("vbench.cli.static_filter")
    degree = import_dimension("dynamic_degree")
    # Its own loader knows GPUs only. The network of dynamic_degree is the same one and loads anywhere.
    device = torch.device(job["device"])
    weights = Path(job["weights"]) / "raft_model" / "models" / "raft-things.pth"
    settings = _Settings(model=str(weights), small=False, mixed_precision=False, alternate_corr=False)
    judge = object.__new__(module.StaticFilter)
    judge.args, judge.device, judge.model = settings, device, degree.DynamicDegree(settings, device).model
    module.DEVICE = device
    total, done = sum(len(entry["video_list"]) for entry in job["entries"]), 0
    static: dict[str, bool] = {}
    for entry in job["entries"]:
        kept = 0
        # The order in which vbench's glob meets them: -0, -1, -10, -11, ...
        for path in sorted(entry["video_list"]):
            if kept < FILTERED_PER_PROMPT:
                static[path] = bool(judge.infer(path))
                kept += static[path]
            done += 1
            progress(done, total)
    return {"static": static}


def _probe(job: dict[str, Any], progress: Progress) -> dict[str, Any]:
    modules: dict[str, str | None] = {}
    for number, name in enumerate(job["modules"], start=1):
        try:
            import_dimension(name)
            modules[name] = None
        except Exception as error:  # whatever a foreign module raises while it is imported
            modules[name] = f"{type(error).__name__}: {error}"
        progress(number, len(job["modules"]))
    return {"modules": modules}


# --- around a task ------------------------------------------------------------------------------------------------


class _Settings(dict):
    """A dict whose keys are attributes too: RAFT asks for both."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


@contextlib.contextmanager
def _prepared(weights: str | None) -> Iterator[None]:
    """What vbench expects of its surroundings, and the surroundings as they were afterwards."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    added = _add_pkg_resources()
    before = os.environ.get("VBENCH_CACHE_DIR")
    try:
        if weights is not None:
            os.environ["VBENCH_CACHE_DIR"] = weights
            utils = sys.modules.get("vbench.utils")
            if utils is not None:
                utils.CACHE_DIR = weights
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            os.environ.pop("VBENCH_CACHE_DIR", None)
        else:
            os.environ["VBENCH_CACHE_DIR"] = before
        if added:
            sys.modules.pop("pkg_resources", None)
        logger.handlers[:] = handlers  # vbench configures the root logger when it is imported
        logger.setLevel(level)


def _add_pkg_resources() -> bool:
    """openai-clip takes ``packaging`` from ``pkg_resources``, which setuptools 81 and newer do not have."""
    try:
        importlib.import_module("pkg_resources")
        return False
    except ImportError:
        pass
    import packaging.version

    stub = types.ModuleType("pkg_resources")
    stub.packaging = packaging  # type: ignore[attr-defined]
    sys.modules["pkg_resources"] = stub
    return True


@contextlib.contextmanager
def _files(entries: list[dict[str, Any]]) -> Iterator[Path]:
    """The entries as the file that vbench's dimensions read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "full_info.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        yield path


@contextlib.contextmanager
def _dino_hub(dimension: str, weights: str | None) -> Iterator[dict[str, Any] | None]:
    """For subject_consistency: DINO's code takes its weights from torch.hub's folder, so give it one that has them."""
    if dimension != "subject_consistency" or weights is None:
        yield None
        return
    import torch

    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        checkpoints.mkdir()
        (checkpoints / _DINO_FILE).symlink_to(Path(weights, "dino_model", _DINO_FILE).resolve())
        torch.hub.set_dir(folder)
        try:
            yield {"repo_or_dir": str(Path(weights) / "dino_model" / "facebookresearch_dino_main"), "source": "local"}
        finally:
            torch.hub.set_dir(before)


def _counted(progress: Progress) -> Callable[..., Iterator[Any]]:
    """Takes the place of tqdm in a dimension's module."""

    def count(items: Iterable[Any], *_: Any, **__: Any) -> Iterator[Any]:
        listed = list(items)
        for done, item in enumerate(listed, start=1):
            yield item
            progress(done, len(listed))

    return count


# --- the command --------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -I worker.py JOB.json", file=sys.stderr)
        return 2
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    events = sys.stdout

    def progress(done: int, total: int) -> None:
        print(json.dumps({"done": done, "total": total}), file=events, flush=True)

    try:
        result: dict[str, Any] = {"ok": True, **run_job(job, progress)}
    except Exception as error:  # every failure is an answer, and its traceback belongs to it
        text = traceback.format_exc()
        result = {"ok": False, "error": {"type": type(error).__name__, "message": str(error), "traceback": text}}
    target = Path(job["result"])
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"protocol": PROTOCOL, **result}), encoding="utf-8")
    temporary.replace(target)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
