"""The files that stand beside a compressed object's weights: README.md and pipeline.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffuse_compress import model_card
from diffuse_compress.components import model_components
from diffuse_compress.integrations.component import get_state
from diffuse_compress.integrations.hub import remote_text
from diffuse_compress.integrations.quantization_config import QUANT_METHOD
from diffuse_compress.pipelines import shim

__all__ = ["complete_save", "complete_upload"]


def complete_save(obj: Any, staging: Path, target: Path) -> None:
    """Write both into ``staging``, whose files are about to be moved to ``target``; the user's own there stay."""
    card, ours = _text(target / model_card.FILE_NAME), _is_ours(staging)
    if card is None or model_card.is_ours(card):
        _write(staging / model_card.FILE_NAME, model_card.model_card(obj, existing=card, needs_package=ours))
    pipeline = shim.shim_for(obj) if ours else None
    if pipeline is not None and _may_replace(_text(target / shim.FILE_NAME)):
        _write(staging / shim.FILE_NAME, pipeline)


def complete_upload(obj: Any, folder: Path, repo_id: str, *, at_root: bool, token: str | bool | None) -> None:
    """Bring ``folder`` to what the repository should hold; nothing for objects that are not compressed.

    Its README.md is that of the repository, or the libraries' form, for they write it after the save. A card
    belongs at the root of a repository, and so does a ``pipeline.py`` that is the owner's.
    """
    if all(get_state(model) is None for model in model_components(obj).values()):
        return
    readme = folder / model_card.FILE_NAME
    if not at_root:
        readme.unlink(missing_ok=True)
        return
    existing, ours = _text(readme), _is_ours(folder)
    _write(readme, model_card.model_card(obj, existing=existing, repo_id=repo_id, token=token, needs_package=ours))
    pipeline = folder / shim.FILE_NAME
    if pipeline.is_file() and not _may_replace(remote_text(repo_id, shim.FILE_NAME, token)):
        pipeline.unlink()


def _is_ours(folder: Path) -> bool:
    """False for a save of ``format="torchao"`` throughout, which plain diffusers and transformers load."""
    for file in [folder / "config.json", *folder.glob("*/config.json")]:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if (config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD:
            return True
    return False


def _may_replace(text: str | None) -> bool:
    return text is None or shim.is_shim(text)


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
