"""What a calibration has done so far, on disk: recorded samples and finished blocks, so that a killed run goes on.

    work_dir/recording-<hash>.safetensors    samples recorded from items; the hash is that of items and pipeline
    work_dir/<component>/manifest.json       what the blocks were computed from: the fingerprint
    work_dir/<component>/<block>.safetensors parameters of the block's quantized layers, and of its norms that changed
    work_dir/<component>/<name>.state        of what is learned for the whole model before its blocks: rotations

Every file is written under another name, flushed to the disk and renamed, so one that is there is whole. Blocks depend
on all of the fingerprint: those of another one are never mixed in, and never deleted either.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffuse_compress.calibration.recording import Calibration
from diffuse_compress.calibration.trees import hash_tensor, hash_tree
from diffuse_compress.errors import CheckpointError, ConfigError, ModelStateError
from diffuse_compress.logging import get_logger
from diffuse_compress.quantization.layer_base import QuantizedLayer
from diffuse_compress.quantization.scheme import Scheme

__all__ = [
    "FinishedBlock",
    "FinishedBlocks",
    "FinishedLayer",
    "WorkFolder",
    "digest_of_items",
    "digest_of_weights",
    "write_whole",
]

_logger = get_logger(__name__)
_MANIFEST = "manifest.json"
_SCHEMA_VERSION = 1
_BLOCK_KEY = "diffuse_compress_block"
_CHANGED = "changed"
_BLOCKS = "finished blocks"
Fingerprint = Mapping[str, Any]
"""JSON values by subject: "weights", "recipe", "calibration", "versions"; those of the last three may be dicts."""


def digest_of_weights(model: nn.Module) -> str:
    """Hash of the name, dtype, shape and bytes of every parameter and buffer; about a second for a gigabyte."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        hash_tensor(digest, name, tensor)
    return digest.hexdigest()[:16]


def digest_of_items(items: Iterable[Any]) -> str | None:
    """Hash of what samples are recorded from; None where an item is no text, number, tensor, or collection of such."""
    digest = hashlib.sha256()
    try:
        hash_tree(digest, list(items), "items")
    except ConfigError:
        return None
    return digest.hexdigest()[:16]


class WorkFolder:
    """``work_dir`` of :func:`compress`.

    Args:
        path: is made if it is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def recording(self, key: str | None, record: Callable[[], Calibration]) -> Calibration:
        """The samples recorded under ``key``, or those that ``record`` makes now, kept for the next time.

        Args:
            key: stands for everything that decides what is recorded; None records anew and keeps nothing.
            record: runs the model on the items.
        """
        if key is None:
            return record()
        path = self.path / f"recording-{key}.safetensors"
        if path.exists():
            _logger.info("Calibration samples of %s are used again", path)
            return Calibration.load(path)
        found = record()
        write_whole(path, found.save)
        return found

    def blocks(self, component: str, fingerprint: Fingerprint) -> FinishedBlocks:
        """The finished blocks of a component, those of an earlier run with this fingerprint among them.

        Raises:
            ConfigError: the folder holds blocks with another fingerprint; the message says what differs.
            CheckpointError: its manifest cannot be read.
        """
        return FinishedBlocks(self.claim(component, fingerprint))

    def claim(self, component: str, fingerprint: Fingerprint, *, holds: str = _BLOCKS) -> Path:
        """Folder of a component for work with this fingerprint, which is written down; raises as :meth:`blocks`."""
        folder = self.require_same(component, fingerprint, holds=holds)
        if not (folder / _MANIFEST).exists():
            content = {"schema_version": _SCHEMA_VERSION, "fingerprint": dict(fingerprint)}
            write_whole(folder / _MANIFEST, lambda path: path.write_text(json.dumps(content, indent=1)))
        return folder

    def require_same(self, component: str, fingerprint: Fingerprint, *, holds: str = _BLOCKS) -> Path:
        """Folder of a component; ConfigError if it ``holds`` what differs in a subject of ``fingerprint``."""
        folder = self.path / (component or "model")
        path = folder / _MANIFEST
        if not path.exists():
            return folder
        try:
            content = json.loads(path.read_text())
            found, version = content["fingerprint"], int(content["schema_version"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"work_dir: {path} cannot be read ({type(error).__name__}: {error}). Delete the folder {folder}."
            ) from error
        if version > _SCHEMA_VERSION:
            raise CheckpointError(f"{path}: written by a newer release: pip install -U diffuse-compress.")
        # Through JSON, as the stored one went: tuples became lists.
        differing = _differences(found, json.loads(json.dumps(dict(fingerprint))))
        if differing:
            done = len(list(folder.glob("*.safetensors")))
            raise ConfigError(
                f"work_dir: {folder} holds {done} {holds} of another calibration, from which this one differs "
                f"in {'; '.join(differing)}. To go on with it, make these equal; else give another work_dir=, or "
                "delete the folder."
            )
        return folder


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs, of what is in ``new``, in words."""
    found = []
    for subject, value in new.items():
        before = old.get(subject)
        if before == value:
            continue
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            keys = [key for key in {**before, **value} if before.get(key) != value.get(key)]
            parts = [f"{key} {_brief(before.get(key))} -> {_brief(value.get(key))}" for key in keys[:3]]
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            found.append(f"{subject} ({', '.join(parts)}{more})")
        else:
            found.append(f"{subject} ({_brief(before)} -> {_brief(value)})")
    return found


def _brief(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class FinishedLayer:
    """A quantized layer of a finished block: its parameters by name, on the CPU, whether a scale was folded, and its
    format, which may follow from the samples."""

    tensors: dict[str, torch.Tensor]
    folded: bool
    scheme: Scheme


@dataclass(frozen=True)
class FinishedBlock:
    """A finished block: its layers, and its other parameters that were changed, by names relative to it."""

    layers: dict[str, FinishedLayer]
    parameters: dict[str, torch.Tensor]


class FinishedBlocks:
    """Quantized layers of the blocks that are done, one file for each block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, block: str, layers: Iterable[str]) -> FinishedBlock | None:
        """A finished block, or None if it is not done.

        Args:
            block: qualified name.
            layers: names relative to the block.

        Raises:
            CheckpointError: the file cannot be read, or holds other layers.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(block)
        if not path.exists():
            return None
        try:
            with safe_open(str(path), framework="pt") as handle:
                described = json.loads((handle.metadata() or {})[_BLOCK_KEY])
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}
            folded, changed = set(described.pop("folded")), described.pop("changed")
            schemes = [Scheme.from_dict(scheme) for scheme in described.pop("schemes")]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"work_dir: {path} is damaged ({type(error).__name__}: {error}). Delete it; the block is done again."
            ) from error
        wanted = list(layers)
        if described != {"block": block, "layers": wanted}:
            raise CheckpointError(
                f"work_dir: {path} must hold {block} with the layers {wanted}, got {described}. Delete the folder "
                f"{self.folder}."
            )
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            owner, _, leaf = key.rpartition(".")
            found.setdefault(owner, {})[leaf] = tensor
        return FinishedBlock(
            {
                name: FinishedLayer(found[str(index)], name in folded, scheme)
                for index, (name, scheme) in enumerate(zip(wanted, schemes, strict=True))
            },
            {name: found[_CHANGED][str(index)] for index, name in enumerate(changed)},
        )

    def save(
        self, block: str, layers: Mapping[str, QuantizedLayer], changed: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write the layers of a finished block, and its other parameters that were changed, by name relative to it.

        Raises:
            ModelStateError: the disk is full or cannot be written.
        """
        from safetensors.torch import save_file

        changed = changed or {}
        parameters: dict[str, torch.Tensor] = {
            f"{index}.{key}": parameter
            for index, layer in enumerate(layers.values())
            for key, parameter in layer.named_parameters(recurse=False)
        }
        parameters |= {f"{_CHANGED}.{index}": parameter for index, parameter in enumerate(changed.values())}
        tensors = {key: parameter.detach().cpu().clone().contiguous() for key, parameter in parameters.items()}
        folded = [name for name, layer in layers.items() if getattr(layer, "folded", False)]
        schemes = [layer.scheme.to_dict() for layer in layers.values()]
        described = {
            "block": block,
            "layers": list(layers),
            "folded": folded,
            "changed": list(changed),
            "schemes": schemes,
        }
        write_whole(self._path(block), lambda path: save_file(tensors, path, {_BLOCK_KEY: json.dumps(described)}))

    def load_state(self, name: str) -> dict[str, torch.Tensor] | None:
        """What :meth:`save_state` wrote last under a name, or None.

        Raises:
            CheckpointError: the file cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / f"{name}.state"
        if not path.exists():
            return None
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"work_dir: {path} is damaged ({type(error).__name__}: {error}). Delete it; that part is done again."
            ) from error

    def save_state(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the state of work that is no block's; raises as :meth:`save`."""
        from safetensors.torch import save_file

        found = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        write_whole(self.folder / f"{name}.state", lambda path: save_file(found, path))

    def _path(self, block: str) -> Path:
        return self.folder / f"{block or 'model'}.safetensors"


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """``save`` to a file that appears under its name only when it is whole and on the disk."""
    from safetensors import SafetensorError

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise ModelStateError(
            f"work_dir: {path} cannot be written ({error}). Free space there or pass work_dir= on a larger disk."
        ) from error
