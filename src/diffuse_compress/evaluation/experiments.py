"""Pinned experiments on published weights: repository, commit, prompts, seeds and settings; and how they are fetched.

The list is ``experiments.json``; a file of the same form can stand in for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diffuse_compress.errors import ConfigError, DiffuseCompressError, nearest
from diffuse_compress.evaluation.conditions import Condition, read_prompts
from diffuse_compress.evaluation.records import NO_ACCESS
from diffuse_compress.integrations.variants import variant_of
from diffuse_compress.skeleton import MODEL_FILES, local_folder

__all__ = [
    "DataSource",
    "Experiment",
    "NoAccessError",
    "Source",
    "download_size",
    "fetch",
    "load_experiments",
    "pinned_revision",
]

_OWN = Path(__file__).with_name("experiments.json")
_PROMPTS = Path(__file__).parents[1] / "prompts"
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_NAME = re.compile(r"[\w.+-]{1,100}\Z")
_PLAIN_FILES = (".json", ".txt", ".model")
_INDEX = "model_index.json"


class NoAccessError(DiffuseCompressError):
    """Weights or data that could not be had; the message says why and what helps."""


@dataclass(frozen=True)
class DataSource:
    """Files of a data set on the Hub.

    Attributes:
        repo: ``owner/name``.
        files: patterns of paths in it.
        revision: commit; None means that of its main branch when the experiment first runs.
    """

    repo: str
    files: tuple[str, ...]
    revision: str | None = None


@dataclass(frozen=True)
class Experiment:
    """What ``eval reproduce NAME`` measures; everything that fixes its numbers but the device and the recipe.

    Attributes:
        name: of it, and of its folder.
        repo: ``owner/name`` of the weights.
        revision: commit; None means that of the main branch when the experiment first runs.
        kind: who measures it: "pictures", "clips", "language", "vision-language".
        dtype: of the dense model: a name, or one for each component and "default".
        settings: arguments of the pipeline's call, or of the scorer of models.
        prompts: file of prompts, for pictures and clips.
        count: takes the first so many prompts; None means all.
        repetitions: samples of each prompt.
        seed: of sample 0.
        batch_size: samples a call.
        data: of experiments on models.
    """

    name: str
    repo: str
    kind: str
    dtype: str | Mapping[str, str]
    revision: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompts: Path | None = None
    count: int | None = None
    repetitions: int = 1
    seed: int = 0
    batch_size: int = 1
    data: DataSource | None = None

    def conditions(self) -> list[Condition]:
        """The prompts. Raises ConfigError where the experiment has none, or the file cannot be read."""
        if self.prompts is None:
            raise ConfigError(f"{self.name}: experiments of kind {self.kind!r} need prompts, a file of them.")
        return read_prompts(self.prompts, limit=self.count)


@dataclass(frozen=True)
class Source:
    """An experiment's files on this machine.

    Attributes:
        folder: snapshot of the weights; its name is their commit.
        data: files of the data set, in the order of their patterns.
    """

    folder: Path
    data: tuple[Path, ...]


# --- the list ---------------------------------------------------------------------------------------------------


def load_experiments(path: str | Path | None = None) -> dict[str, Experiment]:
    """{name: experiment} of a file of the form of ``experiments.json``; None reads the package's own.

    A prompt file is one of the package's, or lies beside the file.

    Raises:
        ConfigError: not readable, unknown or missing keys, or a name that is no file name.
    """
    where = _OWN.name if path is None else str(path)
    try:
        data = json.loads(Path(path or _OWN).read_text(encoding="utf-8"))
        entries = data["experiments"]
        if data["schema_version"] != 1 or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError("need schema_version 1 and experiments {name: {...}}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: not a readable list of experiments ({error!r}).") from error
    folder = None if path is None else Path(path).parent
    return {name: _experiment(name, entry, folder, where) for name, entry in entries.items()}


def _experiment(name: str, entry: dict[str, Any], folder: Path | None, where: str) -> Experiment:
    known = {item.name for item in fields(Experiment)} - {"name"}
    unknown, missing = sorted(set(entry) - known), sorted({"repo", "kind", "dtype"} - set(entry))
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has {unknown[0]!r}; {nearest(unknown[0], known)}"
        raise ConfigError(f"{where}: {name} {what}.")
    if not _NAME.match(name):
        raise ConfigError(f"{where}: a name is made of letters, digits and ._+-, got {name!r}.")
    chosen = {**entry}
    if "prompts" in entry:
        beside = None if folder is None else folder / entry["prompts"]
        chosen["prompts"] = beside if beside is not None and beside.is_file() else _PROMPTS / entry["prompts"]
    try:
        if "data" in entry:
            chosen["data"] = DataSource(**{**entry["data"], "files": tuple(entry["data"]["files"])})
        return Experiment(name, **chosen)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{where}: {name}: data needs repo and files, and may have revision ({error!r}).") from error


# --- the Hub ----------------------------------------------------------------------------------------------------


def pinned_revision(repo: str, revision: str | None, *, repo_type: str = "model") -> str:
    """The commit that ``revision`` (None: the main branch) stands for, from the Hub, or offline from the cache.

    Raises:
        NoAccessError: no such repository for this user, or no network and nothing in the cache.
    """
    if revision is not None and _COMMIT.match(revision):
        return revision
    from huggingface_hub import HfApi, snapshot_download

    wanted: dict[str, Any] = {"revision": revision or "main", "repo_type": repo_type}
    with _access_to(repo):
        try:
            return str(HfApi().repo_info(repo, **wanted).sha)
        except Exception:
            with suppress(Exception):
                # Also answers from the cache alone.
                return Path(snapshot_download(repo, **wanted, allow_patterns=["*.json"], local_files_only=True)).name
            raise


def fetch(experiment: Experiment, revision: str, data_revision: str | None) -> Source:
    """Bring weights and data into the Hub's cache, as ``from_pretrained`` does, and say where they are.

    Raises:
        NoAccessError: the Hub does not give them to this user, or cannot be reached and they are not in the cache.
        ConfigError: it has no such revision, or gave another error.
    """
    from huggingface_hub import snapshot_download

    data: tuple[Path, ...] = ()
    if experiment.data is not None:
        patterns = list(experiment.data.files)
        wanted: dict[str, Any] = {"revision": data_revision, "allow_patterns": patterns}
        with _access_to(experiment.data.repo):
            snapshot = Path(snapshot_download(experiment.data.repo, repo_type="dataset", **wanted))
        data = tuple(path for pattern in patterns for path in sorted(snapshot.glob(pattern)))
        if not data:
            raise ConfigError(f"{experiment.name}: {experiment.data.repo} has no file {' or '.join(patterns)}.")
    with _access_to(experiment.repo):
        return Source(local_folder(experiment.repo, weights=True, revision=revision), data)


def download_size(repo: str, revision: str) -> tuple[int, int, int]:
    """(files, bytes in all, bytes that are not in the cache yet) of what :func:`fetch` needs of a model's repository.

    Fetches one small file, which a repository gives to those only who have access.

    Raises:
        NoAccessError: as :func:`fetch`.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    with _access_to(repo):
        siblings = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in siblings}
        is_pipeline = _INDEX in sizes
        path = hf_hub_download(repo, _INDEX if is_pipeline else "config.json", revision=revision)
    if is_pipeline:
        index = json.loads(Path(path).read_text(encoding="utf-8"))
        parts = {name for name, value in index.items() if isinstance(value, list) and value[:1] != [None]}
        needed = [name for name in sizes if _is_of_pipeline(name, parts)]
    else:
        needed = list(filter_repo_objects(sizes, allow_patterns=MODEL_FILES))
    there = [name for name in needed if isinstance(try_to_load_from_cache(repo, name, revision=revision), str)]
    total = sum(sizes[name] for name in needed)
    return len(needed), total, total - sum(sizes[name] for name in there)


def _is_of_pipeline(file: str, parts: set[str]) -> bool:
    folder, _, name = file.rpartition("/")
    if not folder:
        return file == _INDEX
    if folder not in parts:
        return False
    variant = variant_of(name)
    return variant == "" and not name.endswith(".bin") if variant is not None else name.endswith(_PLAIN_FILES)


@contextmanager
def _access_to(repo: str) -> Iterator[None]:
    """Turn the Hub client's ways to say that ``repo`` cannot be had into :class:`NoAccessError`."""
    from huggingface_hub import errors

    # Its releases build on httpx or httpx2; the error that theirs derive from is that of the one they use.
    transport = errors.HfHubHTTPError.__bases__[0]
    offline = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, transport)
    try:
        yield
    except Exception as error:
        chain = list(_chain(error))
        refusals = [one for one in chain if isinstance(one, errors.HfHubHTTPError)]
        status = next((one.response.status_code for one in refusals if one.response is not None), None)
        if any(isinstance(one, errors.GatedRepoError) for one in refusals):
            why = f"{repo} is gated; ask for access on its page and log in (hf auth login)"
        elif any(isinstance(one, errors.RepositoryNotFoundError) for one in refusals):
            why = f"{repo} is private or does not exist; log in (hf auth login) if it is yours to read"
        elif status in (401, 403):
            why = f"the Hub answers {status} for {repo}; log in (hf auth login)"
        elif not refusals and any(isinstance(one, offline) for one in chain):
            why = f"the Hub cannot be reached, and what is needed of {repo} is not in the cache"
        else:
            raise
        raise NoAccessError(f"{NO_ACCESS}: {why}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
