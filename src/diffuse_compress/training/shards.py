"""Items of a training on disk: safetensors shards and an index, read one item at a time.

    index.json               what each item is (JSON with the places of its tensors), and how they were made
    items-00000.safetensors  tensors of so many items

Nothing is pickled. Captions and file names are not stored, only what the model is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from diffuse_compress.calibration.trees import flatten, unflatten
from diffuse_compress.calibration.work_folder import write_whole
from diffuse_compress.errors import CheckpointError

__all__ = ["INDEX", "StoredItems", "store_items"]

INDEX = "index.json"
_SCHEMA_VERSION = 1


def store_items(
    folder: str | Path,
    items: Iterable[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any],
    notes: Callable[[Mapping[str, Any]], Mapping[str, str]] | None = None,
    per_shard: int = 64,
) -> StoredItems:
    """Write ``items`` (trees of tensors and JSON values) as they come; the index last, so a folder with one is whole.

    Args:
        folder: is made if it is not there.
        items: may be a generator: one shard is in memory at a time.
        settings: how they were made, JSON-able.
        notes: what the index says of an item, so that it need not be read for that.
        per_shard: items in a file.

    Raises:
        ModelStateError: the disk is full or cannot be written.
    """
    folder = Path(folder)
    (folder / INDEX).unlink(missing_ok=True)  # of shards that are about to be overwritten
    places: list[dict[str, Any]] = []
    for number, part in enumerate(_parts(items, per_shard)):
        tensors: dict[str, torch.Tensor] = {}
        name = f"items-{number:05d}.safetensors"
        for at, item in enumerate(part):
            known = {} if notes is None else {"notes": dict(notes(item))}
            places.append({"shard": name, "tree": flatten(dict(item), str(at), tensors), **known})
        _write_shard(folder / name, tensors)
    content = {"schema_version": _SCHEMA_VERSION, "settings": dict(settings), "items": places}
    write_whole(folder / INDEX, lambda path: path.write_text(json.dumps(content)))
    return StoredItems(folder)


def _write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    write_whole(path, lambda part: save_file(copies, part))


class StoredItems(Sequence[Any]):
    """Items of a folder; each access reads one from its shard.

    Args:
        folder: written by :func:`store_items`.

    Attributes:
        settings: how they were made.

    Raises:
        CheckpointError: the folder holds no index, or that of a newer release.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            content = json.loads((self.folder / INDEX).read_text())
            self.settings: dict[str, Any] = content["settings"]
            self._places, version = content["items"], int(content["schema_version"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder}: not a folder of training items ({type(error).__name__}: {error})."
            ) from error
        if version > _SCHEMA_VERSION:
            raise CheckpointError(f"{self.folder}: written by a newer release: pip install -U diffuse-compress.")

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        from safetensors import SafetensorError, safe_open

        place = self._places[index]
        path = self.folder / place["shard"]
        try:
            with safe_open(str(path), framework="pt") as handle:
                return unflatten(place["tree"], _Lazy(handle))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error}). Make the items anew.") from error

    @property
    def notes(self) -> list[Mapping[str, str]] | None:
        """What the index says of each item; None without notes."""
        found = [place.get("notes") for place in self._places]
        return None if any(note is None for note in found) else found

    def part(self, name: str) -> Sequence[Any]:
        """What each item has under ``name``."""
        return _Part(self, name)


class _Part(Sequence[Any]):
    def __init__(self, items: StoredItems, name: str) -> None:
        self._items, self._name = items, name

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        found = self._items[index]
        return [item[self._name] for item in found] if isinstance(index, slice) else found[self._name]


class _Lazy(Mapping[str, torch.Tensor]):
    """Tensors of an open shard, each read when it is asked for."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._keys = handle, set(handle.keys())

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._keys:
            raise KeyError(key)
        found: torch.Tensor = self._handle.get_tensor(key)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _parts(items: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    part: list[Mapping[str, Any]] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
