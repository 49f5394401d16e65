"""The files that stand beside an object's weights: README.md, pipeline.py and the schedules of feature caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffuse_compress import model_card
from diffuse_compress.caching.artefact import FILE_NAME, save_schedules, schedules_of
from diffuse_compress.components import is_pipeline, model_components
from diffuse_compress.integrations.component import get_state
from diffuse_compress.integrations.exports.writing import LANGUAGE_FORMATS
from diffuse_compress.integrations.hub import remote_text
from diffuse_compress.integrations.origin import forget_local_paths
from diffuse_compress.integrations.quantization_config import QUANT_METHOD
from diffuse_compress.integrations.variants import require_no_leftover_weights, variant_of
from diffuse_compress.pipelines import shim

__all__ = ["complete_save", "complete_upload"]


def complete_save(obj: Any, staging: Path, target: Path) -> None:
    """Write them into ``staging``, whose files are about to be moved to ``target``; the user's own there stay.

    Schedules are written beside every pipeline that has some: what is saved of a dense one is the stock checkpoint, and
    one in a format of others holds none of ours. No card or pipeline.py is written where no weights of ours are:
    adapters are saved alone, for instance. After the save of a dense object, what an earlier save wrote is taken out
    of ``target``.
    """
    if is_pipeline(obj):
        schedules = schedules_of(obj)
        if schedules:
            save_schedules(staging / FILE_NAME, schedules)
        else:
            (target / FILE_NAME).unlink(missing_ok=True)
    if _is_dense(obj):
        _take_out(obj, target)
        return
    method = _method_in(staging)
    if method is None:
        return
    card, native = _text(target / model_card.FILE_NAME), method != QUANT_METHOD
    if card is None or model_card.is_ours(card):
        _write(
            staging / model_card.FILE_NAME,
            model_card.model_card(obj, existing=card, reader=_reader_of(method), variant=_variant_in(staging)),
        )
    pipeline, there = shim.shim_for(obj), target / shim.FILE_NAME
    if native and there.is_file() and _may_replace(_text(there)):
        there.unlink()  # of an earlier save in our format: nothing here needs it any more
    elif not native and pipeline is not None and _may_replace(_text(there)):
        _write(staging / shim.FILE_NAME, pipeline)


def complete_upload(obj: Any, folder: Path, repo_id: str, *, subfolder: str, token: str | bool | None) -> None:
    """Bring ``folder`` to what the repository should hold.

    Its README.md is that of the repository, or the libraries' form, for they write it after the save. A card
    belongs at the root of a repository, and so does a ``pipeline.py`` that is the owner's. Where a dense model replaces
    a compressed one, the card no longer says otherwise.
    """
    readme = folder / model_card.FILE_NAME
    existing = _text(readme)
    if _is_dense(obj):
        if existing is not None and not subfolder and model_card.is_ours(existing):
            _write(readme, model_card.without_section(existing))
        _take_out(obj, folder)
        return
    require_no_leftover_weights(folder, repo_id, subfolder, token)
    forget_local_paths(folder, uploading=True)
    if subfolder:
        readme.unlink(missing_ok=True)
        return
    method = _method_in(folder)
    if method is None:
        return
    variant = _variant_in(folder)
    reader = _reader_of(method)
    card = model_card.model_card(obj, existing=existing, repo_id=repo_id, token=token, reader=reader, variant=variant)
    _write(readme, card)
    pipeline = folder / shim.FILE_NAME
    if pipeline.is_file() and not _may_replace(remote_text(repo_id, shim.FILE_NAME, token)):
        pipeline.unlink()


def _is_dense(obj: Any) -> bool:
    return all(get_state(model) is None for model in model_components(obj).values())


def _take_out(obj: Any, folder: Path) -> None:
    """Remove our section of README.md, and our pipeline.py, unless they tell of what is still in ``folder``."""
    readme, pipeline = folder / model_card.FILE_NAME, folder / shim.FILE_NAME
    card, code = _text(readme), _text(pipeline)
    has_section, has_shim = card is not None and model_card.is_ours(card), code is not None and shim.is_shim(code)
    if not (has_section or has_shim):
        return
    if not is_pipeline(obj) and (any(folder.glob("*model_index.json")) or _method_in(folder) == QUANT_METHOD):
        return
    if card is not None and has_section:
        rest = model_card.without_section(card)
        if model_card.says_nothing(rest):
            readme.unlink()
        else:
            _write(readme, rest)
    if has_shim:
        pipeline.unlink()


def _method_in(folder: Path) -> str | None:
    """Our ``quant_method`` if a model in ``folder`` has it, else another one that is there, else None."""
    found = set()
    for file in [folder / "config.json", *folder.glob("*/config.json")]:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        found.add((config.get("quantization_config") or {}).get("quant_method"))
    return QUANT_METHOD if QUANT_METHOD in found else next((method for method in found if method), None)


def _reader_of(method: str) -> str | None:
    """Package that loads another format than ours, None for ours."""
    if method == QUANT_METHOD:
        return None
    return LANGUAGE_FORMATS[method].package if method in LANGUAGE_FORMATS else method


def _variant_in(folder: Path) -> str | None:
    """Variant of the weights in ``folder``; None for the plain one, which needs no name, wherever that is there too."""
    found = {variant_of(file.name) for file in [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]}
    return None if "" in found else min((name for name in found if name), default=None)


def _may_replace(text: str | None) -> bool:
    return text is None or shim.is_shim(text)


def _text(file: Path) -> str | None:
    # Whatever bytes a file of the user's holds: it is only asked whether it is one of ours.
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
