"""Weights of several variants in one folder: one config.json speaks for all, so all are dense or all compressed alike.

``model.fp16.safetensors`` beside ``model.safetensors`` is a second set of weights of the same model. A config.json that
says how one of them is compressed makes the other unloadable, and one that no longer says so makes diffusers load
packed weights as dense ones: a save that would do either is refused.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from diffuse_compress.components import unwrap
from diffuse_compress.errors import CheckpointError
from diffuse_compress.integrations.component import get_state
from diffuse_compress.integrations.quantization_config import QUANT_METHOD

__all__ = ["arguments_of", "require_no_leftover_weights", "require_one_kind", "require_one_kind_on_hub", "variant_of"]

_STEMS = ("diffusion_pytorch_model", "pytorch_model", "model")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_CONFIG = "config.json"


def variant_of(file: str) -> str | None:
    """Variant of a weight or index file by its name, "" for the plain one; None if it is neither.

    >>> variant_of("model.fp16-00001-of-00002.safetensors"), variant_of("model.safetensors.index.json")
    ('fp16', '')
    """
    name = file.rpartition("/")[2]
    stem = next((stem for stem in _STEMS if re.match(rf"{stem}[.-]", name)), None)
    if stem is None or not re.search(r"\.(safetensors|bin)(\.|$)", name):
        return None
    rest = _SHARD.sub("", name.removeprefix(stem))
    return ".".join(part for part in rest.split(".") if part not in ("", "safetensors", "bin", "index", "json"))


def arguments_of(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Arguments of a call of a library's function by name; {} if they do not fit, which it will say itself."""
    try:
        bound = inspect.signature(stock).bind_partial(*args, **kwargs).arguments
    except TypeError:
        return {}
    rest = bound.pop("kwargs", {})
    return {**bound, **rest}


def require_one_kind(obj: Any, folder: Path, variant: str | None) -> None:
    """Raise CheckpointError if saving ``obj`` in ``folder`` leaves weights there that its config.json would break."""
    variant = variant or ""
    for name, model in _models(obj):
        here = folder / name
        files = [path.name for path in here.iterdir()] if here.is_dir() else []
        staying = {found for found in map(variant_of, files) if found is not None and found != variant}
        if staying:
            _compare(f"save_pretrained: {here}", model, variant, staying, _read(here / _CONFIG))


def require_one_kind_on_hub(
    obj: Any,
    repo: str,
    *,
    variant: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: Any = None,
) -> None:
    """The same for a push, which also leaves the shards of a checkpoint that the new one does not overwrite."""
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import RevisionNotFoundError

    variant = variant or ""
    try:
        files = list_repo_files(repo, revision=revision, token=token)
    except RevisionNotFoundError:  # a branch that the push makes, from the main one
        revision, files = None, list_repo_files(repo, token=token)
    for name, model in _models(obj):
        folder = "/".join(part for part in (subfolder, name) if part)
        here = {file: variant_of(file) for file in files if file.rpartition("/")[0] == folder}
        staying = {
            found
            for file, found in here.items()
            if found is not None and (found != variant or ".index." in file or _SHARD.search(file))
        }
        config = f"{folder}/{_CONFIG}".lstrip("/")
        if staying and config in here:
            old = _read(hf_hub_download(repo, config, revision=revision, token=token))
            _compare(f"push_to_hub: {repo}/{folder}".rstrip("/"), model, variant, staying, old)


def require_no_leftover_weights(folder: Path, repo: str, subfolder: str, token: str | bool | None) -> None:
    """Raise CheckpointError if the repository keeps a file by which old weights would load, not those of ``folder``.

    Where there is both an index of shards and a whole file, diffusers goes by the index and transformers by the file.
    """
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(repo, token=token)
    except Exception:  # the upload will say what is wrong, if anything is
        return
    prefix = f"{subfolder}/" if subfolder else ""
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors*")}
    for file in files:
        name = file.removeprefix(prefix)
        parent, variant = name.rpartition("/")[0], variant_of(name)
        is_loadable = variant is not None and ".safetensors" in name and not _SHARD.search(name)
        if not file.startswith(prefix) or name in written or not is_loadable:
            continue
        pushed = {other for other in written if (other.rpartition("/")[0], variant_of(other)) == (parent, variant)}
        is_index, is_indexed = ".index." in name, any(".index." in other for other in pushed)
        library = "diffusers" if name.rpartition("/")[2].startswith(_STEMS[0]) else "transformers"
        if pushed and is_index != is_indexed and is_index == (library == "diffusers"):
            what = "shards" if is_index else "a whole file"
            raise CheckpointError(
                f"push_to_hub: {repo} needs a place without {what}, found {file} of an earlier save, by which "
                f"{library} would load the old weights instead of {min(pushed)}. Delete the old files first "
                f"(huggingface_hub.delete_files({repo!r}, [...])), or push to another repository."
            )


def _models(obj: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(obj, nn.Module):
        yield "", unwrap(obj)
        return
    parts = getattr(obj, "components", None)
    for name, part in parts.items() if isinstance(parts, dict) else ():
        if isinstance(part, nn.Module):
            yield name, unwrap(part)


def _compare(where: str, model: nn.Module, variant: str, staying: Iterable[str], old: dict[str, Any] | None) -> None:
    state = get_state(model)
    new = None if state is None else state.config.to_dict()
    if new is None and old is None:
        return
    if new is not None and old is not None and _spec(json.loads(json.dumps(new))) == _spec(old):
        return
    kind = "dense" if old is None else "compressed" if new is None else "otherwise compressed"
    got = "a dense model" if state is None else repr(state.config)
    names = ", ".join(repr(name) for name in sorted(filter(None, staying)))
    what = f"of the variant {names}" if names else "of no variant" if variant else "in shards"
    raise CheckpointError(
        f"{where}: needs a place without other weights, found {kind} ones {what}, got {got} with "
        f"variant={variant or None!r}. One {_CONFIG} speaks for every variant, and they could not be loaded any more. "
        "Give a folder or repository of its own (variant= is not needed there), or remove the old weights first."
    )


def _spec(config: dict[str, Any]) -> dict[str, Any]:
    """What must agree: everything but the dtype, which may differ from variant to variant."""
    return {key: value for key, value in config.items() if key != "compute_dtype"}


def _read(path: str | Path) -> dict[str, Any] | None:
    """Our configuration in a config.json, or None."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD else None
