"""What is done to a folder between being saved and being uploaded: every way to the Hub goes through here.

``push_to_hub`` of pipelines and models, and ``save_pretrained(push_to_hub=True)``, write a folder, put the card of the
repository (or an empty form) over its README.md, and call one upload method. That method is wrapped.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from diffuse_compress.errors import CheckpointError
from diffuse_compress.integrations.wrapping import is_wrapped, wrapping

__all__ = ["Prepare", "file_of", "remote_text", "wrap_upload"]

# diffusers' and transformers' names for it; both take the folder and the repository first.
_METHODS = ("_upload_folder", "_upload_modified_files")


class Prepare(Protocol):
    """Completes ``folder``, which is about to be uploaded to ``subfolder`` of ``repo_id`` ("": to its root)."""

    def __call__(self, obj: Any, folder: Path, repo_id: str, *, subfolder: str, token: str | bool | None) -> None: ...


def wrap_upload(cls: type, prepare: Prepare) -> None:
    """Call ``prepare`` before each upload of an object of ``cls``."""
    for name in _METHODS:
        stock = getattr(cls, name, None)
        if stock is None or is_wrapped(stock):
            continue
        setattr(cls, name, _prepared(stock, prepare))


def _prepared(stock: Callable[..., Any], prepare: Prepare) -> Callable[..., Any]:
    signature = inspect.signature(stock)

    @wrapping(stock)
    def upload(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        subfolder, token = given.get("subfolder") or "", given.get("token")
        prepare(args[0], Path(given["working_dir"]), given["repo_id"], subfolder=subfolder, token=token)
        return stock(*args, **kwargs)

    return upload


def file_of(source: str | os.PathLike[str], name: str, *, subfolder: str = "", **hub: Any) -> Path:
    """A file that is given, or that stands in a folder or a repository of the Hub.

    Args:
        source: the file, its folder, or the repository's id.
        name: of the file in a folder or repository.
        subfolder: of it.
        hub: arguments of ``hf_hub_download`` (revision, token, cache_dir).

    Raises:
        CheckpointError: it is in none of these.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        found = path / subfolder / name
        if found.is_file():
            return found
        raise CheckpointError(f"{source}: a folder, which has no {found.relative_to(path)}.")
    try:
        return Path(hf_hub_download(str(source), name, subfolder=subfolder or None, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source}: no file, no folder, and {name} cannot be had from the Hub: {error}"
        ) from error


def remote_text(repo_id: str, file: str, token: str | bool | None = None) -> str | None:
    """Text of a file on the Hub's main branch; None where there is none, or no access."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, file, token=token)).read_text(encoding="utf-8")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, UnicodeDecodeError):
        return None
