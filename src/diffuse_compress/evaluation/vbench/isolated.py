"""The environment of its own that the vbench package gets, since its pins fit no current transformers and NumPy.

Made on first use from ``eval/vbench_runner/requirements.lock`` (Python 3.11, Linux x86-64, about 6.5 GB on disk), and
used again as long as the lock file stays the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from diffuse_compress.errors import ConfigError, UnsupportedHardwareError
from diffuse_compress.evaluation.samples import write_atomically
from diffuse_compress.evaluation.vbench.jobs import runner_folder
from diffuse_compress.progress import bar

__all__ = ["DETECTRON2", "IsolatedEnvironment", "default_environment"]

_PYTHON = "3.11"
_MARKER = "diffuse_compress_vbench.json"
_LOG = "install.log"
_TAIL_LINES = 12
DETECTRON2 = "git+https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833"
"""Has no wheels: built on first use of a dimension that needs it, with the compiler of this machine."""


def lock_file() -> Path:
    """Exact versions and hashes."""
    return runner_folder() / "requirements.lock"


def default_environment() -> Path:
    """``$DIFFUSE_COMPRESS_VBENCH_ENV``, else a folder in the user's cache that is named after the lock file."""
    chosen = os.environ.get("DIFFUSE_COMPRESS_VBENCH_ENV")
    if chosen:
        return Path(chosen)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "diffuse_compress" / f"vbench-{_digest(lock_file())[:12]}"


class IsolatedEnvironment:
    """A virtual environment.

    Args:
        folder: of it; by default :func:`default_environment`. One that was made by other means (conda, a container's)
            is used as it is.
        lock: file of exact versions.
    """

    def __init__(self, folder: Path | None = None, lock: Path | None = None) -> None:
        self.folder = (folder or default_environment()).absolute()
        self.lock = lock or lock_file()

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def is_ready(self) -> bool:
        """Complete, and of this lock file or not made here."""
        state = self._state()
        return self.python.exists() and (state is None or state == {"lock": _digest(self.lock), "complete": True})

    def ensure(self) -> Path:
        """Make the environment unless it is there, and return its Python.

        Raises:
            UnsupportedHardwareError: not Linux on x86-64.
            ConfigError: no Python 3.11, a folder that holds something else, or an installation that failed: the
                message has pip's last lines and says what to do without a network.
        """
        if self.is_ready:
            return self.python
        self._check_platform()
        if self.folder.exists() and any(self.folder.iterdir()) and self._state() is None:
            raise ConfigError(f"{self.folder}: is not empty and holds no Python. Choose another --environment-folder.")
        maker = self._maker()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._mark(complete=False)
        self._run([*maker, str(self.folder)], "make the environment", 0)
        self._mark(complete=False)
        count = self.lock.read_text(encoding="utf-8").count(" \\\n    --hash=") or 1
        pip = ["install", "--no-deps", "--require-hashes", "--requirement", str(self.lock)]
        self._run(self._pip(pip), "install vbench's environment (once)", count)
        self._mark(complete=True)
        return self.python

    def ensure_detectron2(self) -> None:
        """Build detectron2 in it unless it is there. Raises ConfigError where that fails."""
        found = subprocess.run([str(self.python), "-I", "-c", "import detectron2"], capture_output=True)
        if found.returncode:
            arguments = ["install", "--no-deps", "--no-build-isolation", DETECTRON2]
            self._run(self._pip(arguments), "build detectron2 (once)", 0)

    # --- making -------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, object] | None:
        try:
            state: dict[str, object] = json.loads((self.folder / _MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state

    def _mark(self, *, complete: bool) -> None:
        write_atomically(self.folder / _MARKER, json.dumps({"lock": _digest(self.lock), "complete": complete}))

    def _check_platform(self) -> None:
        here = f"{platform.system()} {platform.machine()}"
        if here not in ("Linux x86_64", "Linux AMD64"):
            raise UnsupportedHardwareError(
                f"VBench's environment: its lock file is for Linux x86_64, this is {here}. Give --environment-folder "
                "with an environment of your own that has vbench, or choose dimensions that run in this one."
            )

    def _maker(self) -> list[str]:
        """The command that makes an empty environment of the right Python in a folder."""
        if f"{sys.version_info[0]}.{sys.version_info[1]}" == _PYTHON:
            return [sys.executable, "-m", "venv"]
        found = shutil.which(f"python{_PYTHON}")
        if found:
            return [found, "-m", "venv"]
        uv = shutil.which("uv")
        if uv:
            return [uv, "venv", "--seed", "--python", _PYTHON, "--allow-existing"]
        raise ConfigError(
            f"VBench's environment: needs Python {_PYTHON} (its pins have wheels for no newer one), found no "
            f"python{_PYTHON} and no uv on PATH. Install one of them; `pip install uv` is enough."
        )

    def _pip(self, arguments: Sequence[str]) -> list[str]:
        return [str(self.python), "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]

    def _run(self, command: Sequence[str], what: str, packages: int) -> None:
        """Run a step of the installation; its output goes to a file in the environment, its packages to a bar."""
        log = self.folder / _LOG
        # A constraints file of the user's is about other environments.
        environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
        try:
            with log.open("a", encoding="utf-8") as out, bar(what, packages, None, None) as advance:
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
                with subprocess.Popen([*command], env=environment, **pipes) as process:  # type: ignore[call-overload]
                    done = 0
                    for line in process.stdout:
                        out.write(line)
                        done += line.startswith(("Collecting ", "Processing "))
                        advance(min(done, packages), {})
            status = process.returncode
        except OSError as error:
            raise ConfigError(f"VBench's environment: cannot {what}: {command[0]} does not run ({error}).") from error
        if status:
            said = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
            raise ConfigError(
                f"VBench's environment in {self.folder}: could not {what} (status {status}). Without a network: on a "
                f"machine that has one, `python{_PYTHON} -m pip download --no-deps --require-hashes -r {self.lock} "
                "-d wheels`, copy the folder here, and set PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels. The last lines of "
                f"{log}:\n{said}"
            )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
