"""Arguments of a forward as tensors and JSON, and back: no pickle; and their hash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from diffuse_compress.errors import CheckpointError, ConfigError

__all__ = ["flatten", "hash_tensor", "hash_tree", "unflatten"]

_CHUNK_ELEMENTS = 16 << 20
_TENSOR, _TUPLE, _DTYPE = "__tensor__", "__tuple__", "__dtype__"


def flatten(tree: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The JSON-able part of ``tree``; its tensors are added to ``tensors`` under keys that start with ``prefix``.

    Raises:
        ConfigError: it holds something that is neither.
    """
    if isinstance(tree, torch.Tensor):
        tensors[prefix] = tree
        return {_TENSOR: prefix}
    if isinstance(tree, torch.dtype):
        return {_DTYPE: str(tree).removeprefix("torch.")}
    if isinstance(tree, Mapping):
        return {str(key): flatten(value, f"{prefix}.{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return {_TUPLE: [flatten(value, f"{prefix}.{index}", tensors) for index, value in enumerate(tree)]}
    if isinstance(tree, list):
        return [flatten(value, f"{prefix}.{index}", tensors) for index, value in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise ConfigError(
        f"calibration: {prefix} is a {type(tree).__name__}, which cannot be stored. A recorded call may hold tensors, "
        "numbers, text, and dicts, lists and tuples of them; for a language model pass use_cache=False."
    )


def unflatten(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Inverse of :func:`flatten`.

    Raises:
        CheckpointError: a tensor is missing.
    """
    if isinstance(tree, list):
        return [unflatten(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        if tree[_TENSOR] not in tensors:
            raise CheckpointError(f"calibration file: the tensor {tree[_TENSOR]} is missing. Record it again.")
        return tensors[tree[_TENSOR]]
    if _DTYPE in tree:
        return getattr(torch, tree[_DTYPE])
    if _TUPLE in tree:
        return tuple(unflatten(value, tensors) for value in tree[_TUPLE])
    return {key: unflatten(value, tensors) for key, value in tree.items()}


def hash_tree(digest: Any, tree: Any, prefix: str) -> None:
    """Add ``tree`` to a hash of hashlib: its JSON-able part, then its tensors.

    Raises:
        ConfigError: as :func:`flatten`.
    """
    tensors: dict[str, torch.Tensor] = {}
    digest.update(json.dumps(flatten(tree, prefix, tensors), sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        hash_tensor(digest, key, tensor)


def hash_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Add name, dtype, shape and bytes of a tensor, on any device and in any layout, to a hash of hashlib."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
        part = flat[start : start + _CHUNK_ELEMENTS].cpu().contiguous()
        # A timestep expanded to a batch of one is contiguous with a stride of 0, which a view as bytes refuses.
        digest.update(part.as_strided(part.shape, (1,)).view(torch.uint8).numpy().data)
