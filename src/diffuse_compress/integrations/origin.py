"""Where a model came from: the repository on the Hub, never a path of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffuse_compress.integrations.component import ASK_THE_MODEL, ComponentState

__all__ = ["base_model_of", "folder_of", "forget_local_paths", "repository_of"]

_KEY, _INDEX_KEY = "_name_or_path", "pretrained_model_name_or_path"
_KEYS = {_KEY, "base_model_name_or_path"}
_REPOSITORY = re.compile(r"[\w.-]+(?:/[\w.-]+)?\Z")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)\Z")


def repository_of(obj: Any) -> str | None:
    """Hub id that a pipeline or model was loaded from; None if it was a folder, a file, or nothing."""
    return _repository(_name_or_path(obj))


def base_model_of(model: Any, state: ComponentState) -> str | None:
    """Hub id of the dense model that ``model``, which ``state`` describes, was made from, as far as it is known."""
    return repository_of(model) if state.base_model == ASK_THE_MODEL else state.base_model


def folder_of(obj: Any) -> Path | None:
    """Folder that a pipeline or model was loaded from, if it was one and is still there."""
    name = _name_or_path(obj)
    return Path(name) if name and Path(name).is_dir() else None


def forget_local_paths(folder: Path, *, uploading: bool = False) -> None:
    """Rewrite the names of what was loaded in the JSON files of a save: the repository if it tells one, else nothing.

    Both libraries, and peft, write the folder that a model was loaded from, with the user's name in it. The index of a
    modular pipeline needs its folders where it is, and loses them when it is ``uploading``.
    """
    keys = _KEYS | ({_INDEX_KEY} if uploading else set())
    for file in folder.rglob("*.json"):
        if not file.name.endswith(("config.json", "model_index.json")):
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        if _forget(content, keys):
            file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _forget(tree: Any, keys: set[str]) -> bool:
    """Rewrite paths under ``keys`` anywhere in ``tree``; True if there were any."""
    if isinstance(tree, list):
        return any([_forget(value, keys) for value in tree])
    if not isinstance(tree, dict):
        return False
    changed = any([_forget(value, keys) for value in tree.values()])
    for key in keys & tree.keys():
        name = tree[key]
        if isinstance(name, str) and _repository(name) != name:
            tree[key] = _repository(name)
            if key == _KEY and tree[key] is None:
                del tree[key]
            changed = True
    return changed


def _name_or_path(obj: Any) -> str | None:
    config = getattr(obj, "config", None)
    name = config.get(_KEY) if isinstance(config, Mapping) else getattr(config, _KEY, None)
    return str(name) if name else None


def _repository(name: str | None) -> str | None:
    if not name:
        return None
    for part in re.split(r"[/\\]", name):
        cached = _CACHED.match(part)
        if cached:
            return f"{cached[1]}/{cached[2]}"
    # A relative path reads like an id. What lies there on disk is a path, as it is for from_pretrained.
    is_id = _REPOSITORY.match(name) and not name.startswith(".") and not Path(name).exists()
    return name if is_id else None
