"""``save_pretrained`` of compressed objects: written beside, synced, then moved into place file by file.

``format=`` (a name, or ``{component or group: name}``) writes components in a format of others instead of ours: as
torchao tensors, or language models as compressed-tensors, GPTQ or AWQ (``exports``).
"""

from __future__ import annotations

import errno
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from diffuse_compress.assignment import LayerAssignment
from diffuse_compress.components import model_components, resolve_names
from diffuse_compress.errors import CheckpointError, ConfigError, nearest
from diffuse_compress.integrations.component import get_state, quantized_layers
from diffuse_compress.integrations.exports.writing import LANGUAGE_FORMATS, written_as
from diffuse_compress.integrations.exports.writing import require_exact as require_language_format
from diffuse_compress.integrations.origin import forget_local_paths
from diffuse_compress.integrations.quantization_config import QUANT_METHOD
from diffuse_compress.integrations.torchao import require_exact, written_as_torchao
from diffuse_compress.integrations.variants import arguments_of, require_one_kind, require_one_kind_on_hub, variant_of
from diffuse_compress.integrations.wrapping import is_wrapped, wrapping
from diffuse_compress.logging import get_logger

__all__ = ["FORMATS", "publish", "require_format", "wrap_push_to_hub", "wrap_save_pretrained"]

_logger = get_logger(__name__)
_MODULAR_INDEX = "modular_model_index.json"
# Written last: a reader that finds these finds everything they point to.
_LAST = ("model_index.json", _MODULAR_INDEX)
TORCHAO = "torchao"
FORMATS = (QUANT_METHOD, TORCHAO, *LANGUAGE_FORMATS)
# {id of a model: format of others} that the save in progress writes it in.
_formats: ContextVar[Mapping[int, str]] = ContextVar("diffuse_compress_formats", default=MappingProxyType({}))


@dataclass(frozen=True)
class _Saved:
    """What a save with ``push_to_hub=True`` has written: ``files`` of ``folder``, and the arguments it was given."""

    obj: Any
    folder: Path
    files: list[Path]
    arguments: dict[str, Any]

    def give_to(self, folder: Path) -> None:
        """Put the files into ``folder``, weights without copying them where the system can."""
        for file in self.files:
            source, place = (self.folder / file).absolute(), folder / file
            place.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):
                if file.suffix == ".safetensors":  # the others are completed there, and not here
                    place.symlink_to(source)
                    continue
            shutil.copyfile(source, place)


# What push_to_hub uploads instead of saving once more.
_saved: ContextVar[_Saved | None] = ContextVar("diffuse_compress_saved", default=None)


def wrap_save_pretrained(
    cls: type,
    preparing: Callable[[Any], AbstractContextManager[None]],
    complete: Callable[[Any, Path, Path], None],
) -> None:
    """Wrap ``cls.save_pretrained`` once; objects that carry no compression are saved by the stock function.

    ``preparing(obj)`` surrounds every save: it brings what is written about the object up to date.
    ``complete(obj, staging, target)`` adds what stands beside the weights, before the files move to ``target``; after
    the save of a dense object it takes out what no longer holds.
    """
    stock: Callable[..., Any] = cls.save_pretrained  # type: ignore[attr-defined]
    if is_wrapped(stock) or "save_pretrained" not in cls.__dict__:
        return

    @wrapping(stock)
    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        *args: Any,
        format: str | Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        saved = _saved.get()
        if saved is not None and saved.obj is self:
            saved.give_to(Path(save_directory))
            return complete(self, Path(save_directory), Path(save_directory))
        given = arguments_of(stock, self, save_directory, *args, **kwargs)
        with _requested(self, format), preparing(self):
            if not _staging(save_directory):
                require_one_kind(self, Path(save_directory), given.get("variant"))
            if not _is_compressed(self) or not given:
                result = stock(self, save_directory, *args, **kwargs)
                if not _staging(save_directory):
                    complete(self, Path(save_directory), Path(save_directory))
                return result
            if given.get("safe_serialization") is False:
                raise CheckpointError(
                    "save_pretrained: compressed models are written as safetensors only, got safe_serialization=False. "
                    "Leave it out; pickled files would lack the layer map."
                )
            if _staging(save_directory):
                with _written(self):
                    return stock(self, save_directory, *args, **kwargs)
            return _save(stock, self, Path(save_directory), complete, given)

    cls.save_pretrained = save_pretrained  # type: ignore[attr-defined]


def wrap_push_to_hub(cls: type) -> None:
    """Wrap ``cls.push_to_hub`` once: it takes ``format=``, and does not push beside weights that it would break."""
    stock: Callable[..., Any] | None = getattr(cls, "push_to_hub", None)
    if stock is None or is_wrapped(stock):
        return

    @wrapping(stock)
    def push_to_hub(
        self: Any, repo_id: str, *args: Any, format: str | Mapping[str, str] | None = None, **kwargs: Any
    ) -> Any:
        with _requested(self, format):
            if _is_compressed(self):
                repo_id = _require_one_kind_on_hub(stock, self, repo_id, args, kwargs)
            elif kwargs.get("variant"):
                _require_no_compressed_ones(stock, self, repo_id, args, kwargs)
            return stock(self, repo_id, *args, **kwargs)

    cls.push_to_hub = push_to_hub  # type: ignore[attr-defined]


def _require_one_kind_on_hub(
    stock: Callable[..., Any], obj: Any, repo_id: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """Full id of the repository, which is made if need be, as the stock function does; or an error."""
    from huggingface_hub import create_repo

    given, saved = arguments_of(stock, obj, repo_id, *args, **kwargs), _saved.get()
    if saved is not None:  # transformers' push_to_hub knows no variant=
        given["variant"] = saved.arguments.get("variant")
    made = create_repo(repo_id, private=given.get("private"), token=given.get("token"), exist_ok=True)
    wanted = {key: given.get(key) for key in ("variant", "subfolder", "revision", "token")}
    require_one_kind_on_hub(obj, made.repo_id, **wanted)
    return str(made.repo_id)


def _require_no_compressed_ones(
    stock: Callable[..., Any], obj: Any, repo_id: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """CheckpointError if a dense variant would stand beside compressed weights; what cannot be asked is no obstacle."""
    given = arguments_of(stock, obj, repo_id, *args, **kwargs)
    wanted = {key: given.get(key) for key in ("variant", "subfolder", "revision", "token")}
    try:
        require_one_kind_on_hub(obj, repo_id, **wanted)
    except CheckpointError:
        raise
    except Exception as error:  # no such repository yet, or no network: the stock function says so
        _logger.debug("push_to_hub: %s was not looked at (%s)", repo_id, error)


@contextmanager
def _requested(obj: Any, format: str | Mapping[str, str] | None) -> Iterator[None]:
    """While it lasts, saves inside follow ``format``; None leaves what an outer call asked for."""
    if format is None:
        yield
        return
    token = _formats.set(_formats_of(obj, format))
    try:
        yield
    finally:
        _formats.reset(token)


def require_format(
    format: str, where: str, model: nn.Module, planned: Mapping[str, LayerAssignment] | None = None
) -> None:
    """Raise ConfigError if ``format``, one of ``FORMATS``, cannot hold the layers of ``model`` exactly.

    ``planned`` is what is about to be done to its dense layers, on top of those that are quantized.
    """
    if format == TORCHAO:
        require_exact(where, model, planned)
    elif format != QUANT_METHOD:
        require_language_format(where, model, LANGUAGE_FORMATS[format], planned)


def _formats_of(obj: Any, format: str | Mapping[str, str]) -> dict[int, str]:
    """{id: format} of the models of ``obj`` to be written in a format of others, all of which can be.

    Raises:
        ConfigError: an unknown format or component, nothing compressed, or layers that a format cannot hold exactly.
    """
    models = model_components(obj)
    compressed = {name for name, model in models.items() if quantized_layers(model)}
    if isinstance(format, Mapping):
        wanted = [(name, format[key]) for key, names in resolve_names(format, obj).items() for name in names]
        named = {name for name in format if name in models}
    else:
        wanted, named = [(name, format) for name in compressed], set()
    for value in format.values() if isinstance(format, Mapping) else [format]:
        if value not in FORMATS:
            raise ConfigError(f"save_pretrained: format={value!r}: {nearest(str(value), FORMATS)}.")
    chosen = {name: value for name, value in wanted if value != QUANT_METHOD and name in compressed | named}
    dense = sorted(named - compressed) if compressed else [type(obj).__name__]
    if dense:
        raise ConfigError(
            f"save_pretrained: format= needs compressed components, got {', '.join(dense)}, which is dense. Leave it "
            "out, or compress it first."
        )
    for name, value in chosen.items():
        require_format(value, name or type(models[name]).__name__, models[name])
    return {id(models[name]): value for name, value in chosen.items()}


def _written(obj: Any) -> AbstractContextManager[None]:
    format = _formats.get().get(id(obj))
    if format is None:
        return nullcontext()
    return written_as_torchao(obj) if format == TORCHAO else written_as(obj, LANGUAGE_FORMATS[format])


def _is_compressed(obj: Any) -> bool:
    if get_state(obj) is not None:
        return True
    components = getattr(obj, "components", None)
    return isinstance(components, dict) and any(get_state(getattr(c, "_orig_mod", c)) for c in components.values())


_PREFIX = ".diffuse_compress-"


def _staging(folder: str | os.PathLike[str]) -> bool:
    """True inside a save that is already being staged: a pipeline saves its components through the same wrapper."""
    return any(part.startswith(_PREFIX) for part in Path(folder).parts)


def _save(
    stock: Callable[..., Any],
    obj: Any,
    target: Path,
    complete: Callable[[Any, Path, Path], None],
    given: Mapping[str, Any],
) -> Any:
    """``given``: the arguments of the save by name, the object and the folder first."""
    if target.is_file():
        raise CheckpointError(f"save_pretrained needs a folder, {target} is a file. Give another path.")
    target.mkdir(parents=True, exist_ok=True)
    arguments = dict([*given.items()][2:])
    push, is_modular = arguments.pop("push_to_hub", False), getattr(obj, "config_name", None) == _MODULAR_INDEX
    if push and is_modular:
        # Its index names the repository, which only its own save can write.
        arguments.update(push_to_hub=True, repo_id=arguments.get("repo_id") or target.name)
        push = False
    staging = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target))
    try:
        with _written(obj):
            result = stock(obj, str(staging), **arguments)
        if is_modular:
            _point_index_at(target, obj, staging)
        forget_local_paths(staging)
        complete(obj, staging, target)
        files = publish(staging, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"save_pretrained: the disk of {target} is full ({error}). What was there before is untouched; free "
                "space and save again."
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _logger.info("%s saved in %s", type(obj).__name__, target)
    if push:
        _push(_Saved(obj, target, files, arguments))
    return result


def _point_index_at(target: Path, pipe: Any, staging: Path) -> None:
    """A modular pipeline records the folder that each component was saved in: the final one is meant."""
    moved = {}
    for name, value in pipe.config.items():
        if isinstance(value, list | tuple) and len(value) == 3 and isinstance(value[2], dict):
            library, class_name, spec = value
            if spec.get("pretrained_model_name_or_path") == str(staging):
                moved[name] = (library, class_name, {**spec, "pretrained_model_name_or_path": str(target)})
    if moved:
        pipe.register_to_config(**moved)
        pipe.save_config(save_directory=str(staging))


def publish(staging: Path, target: Path) -> list[Path]:
    """Move every file of ``staging`` over its place in ``target``: synced first, index files last. Returns their names.

    Files in ``target`` that this save did not write stay, except weight files of components it did write: an old
    shard or single file beside a new one would be loaded in its stead.
    """
    files = sorted((path for path in staging.rglob("*") if path.is_file()), key=lambda p: (p.name in _LAST, str(p)))
    for file in files:
        _sync(file)
    stale = list(_stale_weights(staging, target))
    for file in files:
        place = target / file.relative_to(staging)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    for path in stale:
        path.unlink(missing_ok=True)
    for folder in {(target / file.relative_to(staging)).parent for file in files}:
        _sync(folder)
    return [file.relative_to(staging) for file in files]


def _stale_weights(staging: Path, target: Path) -> Iterator[Path]:
    # Other variants are other checkpoints and stay; .bin files lose to safetensors anyway.
    endings = re.compile(r"\.safetensors(\.index(\.[^.]+)?\.json)?$")
    written = {path.relative_to(staging) for path in staging.rglob("*") if path.is_file()}
    saved = {(path.parent, variant_of(path.name)) for path in written if endings.search(path.name)}
    for folder, variant in saved:
        if variant is None:  # not a model's weights, an adapter's: no name tells which other files these replace
            continue
        here = target / folder
        for path in here.glob("*") if here.is_dir() else ():
            ours = endings.search(path.name) and variant_of(path.name) == variant
            if ours and path.relative_to(target) not in written:
                yield path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # folders cannot be synced on every file system
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM):
            raise
    finally:
        os.close(handle)


def _push(saved: _Saved) -> None:
    known = inspect.signature(type(saved.obj).push_to_hub).parameters
    hub = {name: value for name, value in saved.arguments.items() if name in known and name != "repo_id"}
    token = _saved.set(saved)
    try:
        saved.obj.push_to_hub(saved.arguments.get("repo_id") or saved.folder.name, **hub)
    finally:
        _saved.reset(token)
