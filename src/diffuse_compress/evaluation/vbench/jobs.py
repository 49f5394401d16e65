"""Jobs of the vbench package: in this process, or in another Python that is handed a JSON file and writes one.

The protocol is described in the worker itself, ``eval/vbench_runner/worker.py``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from diffuse_compress.errors import CheckpointError, ConfigError, DiffuseCompressError
from diffuse_compress.progress import bar

__all__ = ["VBenchError", "import_failure", "in_process", "in_python", "runner_folder"]

_TAIL_LINES = 15


class VBenchError(DiffuseCompressError, RuntimeError):
    """A job of the vbench package failed; the message has its own error.

    Attributes:
        kind: the error's class there, e.g. "ModuleNotFoundError".
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def runner_folder() -> Path:
    """Folder of the worker and of the environment's lock file: in the installed package, else in a checkout.

    Raises:
        ConfigError: in neither.
    """
    packaged = Path(str(resources.files("diffuse_compress").joinpath("vbench_runner")))
    checkout = Path(__file__).resolve().parents[4] / "eval" / "vbench_runner"
    for folder in (packaged, checkout):
        if (folder / "worker.py").is_file():
            return folder
    raise ConfigError(
        f"The VBench runner is missing: neither {packaged} nor {checkout} has a worker.py. Install the wheel, or run "
        "from a complete checkout."
    )


@cache
def load_worker() -> ModuleType:
    """The worker as a module of this process."""
    spec = importlib.util.spec_from_file_location("diffuse_compress_vbench_worker", runner_folder() / "worker.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_failure(module: str, weights: Path) -> str | None:
    """Why ``vbench.<module>`` cannot be imported in this process, or None if it can."""
    worker = load_worker()
    job = {"protocol": worker.PROTOCOL, "task": "probe", "modules": [module], "weights": str(weights)}
    reason: str | None = worker.run_job(job, lambda done, total: None)["modules"][module]
    return reason


def in_process(job: dict[str, Any], label: str) -> dict[str, Any]:
    """Do a job here.

    Raises:
        VBenchError: whatever the package raised.
    """
    worker = load_worker()
    try:
        with bar(label, _size(job), None, None) as advance:
            found: dict[str, Any] = worker.run_job({"protocol": worker.PROTOCOL, **job}, _advance(advance, _size(job)))
    except Exception as error:  # the package raises what it likes
        kind = type(error).__name__
        raise VBenchError(f"vbench, {label}: {kind}: {error}. Python {sys.executable}.", kind) from error
    return found


def in_python(python: Path, job: dict[str, Any], label: str) -> dict[str, Any]:
    """Do a job with another Python.

    Raises:
        VBenchError: it failed there; the message has its error and traceback.
        CheckpointError: no result came, or one of another protocol.
    """
    worker = load_worker()
    with tempfile.TemporaryDirectory(prefix="diffuse_compress_vbench_") as name:
        folder = Path(name)
        target, log = folder / "result.json", folder / "log.txt"
        whole = {"protocol": worker.PROTOCOL, **job, "result": str(target)}
        (folder / "job.json").write_text(json.dumps(whole), encoding="utf-8")
        # -I: neither this process's PYTHONPATH nor the user's own packages may reach in.
        command = [str(python), "-I", str(runner_folder() / "worker.py"), str(folder / "job.json")]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        with bar(label, _size(job), None, None) as advance, log.open("w", encoding="utf-8") as errors:
            show = _advance(advance, _size(job))
            try:
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            except OSError as error:
                raise CheckpointError(f"{python}: does not run ({error}). Delete its environment.") from error
            with process:
                try:
                    assert process.stdout is not None
                    for line in process.stdout:
                        _show_event(line, show)
                except BaseException:
                    process.kill()
                    raise
        said = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
        try:
            result = json.loads(target.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"vbench, {label}: {python} ended with status {process.returncode} and left no result. It said:\n{said}"
            ) from error
        if result.get("protocol") != worker.PROTOCOL:
            raise CheckpointError(f"vbench, {label}: need a result of protocol {worker.PROTOCOL}, got {result!r:.100}.")
        if not result["ok"]:
            failed = result["error"]
            message = f"vbench, {label}: {failed['type']}: {failed['message']}. {python} said:\n{failed['traceback']}"
            raise VBenchError(message, failed["type"])
        return dict(result)


def _size(job: dict[str, Any]) -> int:
    return sum(len(entry["video_list"]) for entry in job.get("entries", ()))


def _advance(advance: Any, size: int) -> Any:
    """Of a worker's (done, total): some dimensions count prompts, others videos, and the bar counts videos."""
    return lambda done, total: advance(size * done // max(total, 1), {})


def _show_event(line: str, show: Any) -> None:
    try:
        event = json.loads(line)
        show(int(event["done"]), int(event["total"]))
    except (ValueError, TypeError, KeyError):
        return  # a line that a library of the environment wrote past Python
