"""Pipelines of a comparison from what a command line says: a folder or Hub id, and what to compress it with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.api import compress
from diffuse_compress.errors import ConfigError
from diffuse_compress.evaluation.generation import Arm
from diffuse_compress.quantization.algorithms.base import algorithm_from_dict
from diffuse_compress.recipe import Recipe, as_recipe
from diffuse_compress.skeleton import default_dtype, load, local_folder

__all__ = [
    "DENSE",
    "call_options",
    "dtype_text",
    "json_or_text",
    "load_pipeline",
    "make_arm",
    "make_arms",
    "read_recipes",
    "weights_fingerprint",
]

DENSE = "dense"
_BLOCK = 1 << 20


def make_arms(
    pipelines: Sequence[str],
    recipes: Sequence[str] = (),
    *,
    dtype: str | Mapping[str, str] = "auto",
    device: str | torch.device = "cpu",
) -> list[Arm]:
    """Every pipeline with every recipe, named after the recipe, the pipeline, or both where there are several.

    Args:
        pipelines: folders or Hub ids, as ``PATH`` or ``NAME=PATH``.
        recipes: ``dense`` (as it is stored), presets, presets with an algorithm (``w4a4:rtn``), or files of recipes,
            as ``RECIPE`` or ``NAME=RECIPE``; none means ``dense``.
        dtype: "auto" (as stored; float16 becomes float32 on the CPU), "float32", "float16" or "bfloat16"; or one of
            these for each component of a pipeline, and for "default".
        device: where to run.

    Raises:
        ConfigError: no pipeline, names that occur twice, or a folder or recipe that does not exist.
    """
    chosen = read_recipes(recipes or (DENSE,))
    arms = []
    for text in pipelines:
        name, path = _named(text, Path(text.rstrip("/")).name)
        for recipe_name, recipe in chosen.items():
            parts = [name] if len(pipelines) > 1 or not recipes else []
            parts += [recipe_name] if recipes else []
            arms.append(make_arm("-".join(parts), path, recipe, dtype=dtype, device=device))
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not arms:
        raise ConfigError(
            f"arms: need pipelines of different names, got {', '.join(twice) or 'none'}. Write NAME=PATH."
        )
    return arms


def read_recipes(texts: Sequence[str]) -> dict[str, Recipe | None]:
    """{name: recipe} of what a command line says, as in :func:`make_arms`; None stands for dense.

    Raises:
        ConfigError: a recipe that does not exist, or names that occur twice.
    """
    found: dict[str, Recipe | None] = {}
    for text in texts:
        name, recipe = _named(text, Path(text).stem if _is_file(text) else text.replace(":", "-"))
        if name in found:
            raise ConfigError(f"recipes: need different names, got {name} twice. Write NAME=RECIPE.")
        found[name] = _recipe_of(recipe)
    return found


def make_arm(
    name: str,
    path: str,
    recipe: str | Recipe | None = DENSE,
    *,
    dtype: str | Mapping[str, str] = "auto",
    device: str | torch.device = "cpu",
) -> Arm:
    """One pipeline with one recipe; arguments as :func:`make_arms`. Reads no weights."""
    chosen = _recipe_of(recipe) if isinstance(recipe, str) else recipe
    folder = local_folder(path, weights=True)
    if isinstance(dtype, str):
        loaded: Any = default_dtype(dtype, folder, device)
    else:
        loaded = {part: default_dtype(one, folder, device) for part, one in dtype.items()}
    model = {
        "id": path if path.count("/") == 1 and not Path(path).exists() else folder.resolve().name,
        "revision": folder.name if folder.parent.name == "snapshots" else None,
        "dtype": dtype_text(loaded),
        "weights_sha256": weights_fingerprint(folder),
    }
    loader = partial(load_pipeline, folder, chosen, loaded, device)
    return Arm(name, loader, model, None if chosen is None else chosen.to_dict(), folder)


def call_options(texts: Sequence[str], steps: int | None, guidance: float | None) -> dict[str, Any]:
    """Arguments of a pipeline's call.

    Args:
        texts: ``NAME=VALUE``, values in JSON or plain text.
        steps: num_inference_steps; None leaves it to the pipeline.
        guidance: guidance_scale, likewise.

    Raises:
        ConfigError: another form.
    """
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for item in texts:
        name, separator, text = item.partition("=")
        if not separator or not name.isidentifier():
            raise ConfigError(f"--set: need NAME=VALUE, got {item!r}. For example --set height=512.")
        options[name] = json_or_text(text)
    return options


def json_or_text(text: str) -> Any:
    """A value of a command line: what it says in JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def load_pipeline(
    folder: Path,
    recipe: Recipe | None,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None,
    device: str | torch.device,
) -> Any:
    """The pipeline of a folder, compressed."""
    pipe = load(folder, dtype, str(device))
    if recipe is not None:
        compress(pipe, recipe, measure=False)
    return pipe


def weights_fingerprint(folder: Path) -> str:
    """First 16 digits of a hash over every weight file's place, size, first and last MiB: quick for any size."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_BLOCK))
            file.seek(max(0, size - _BLOCK))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def _recipe_of(text: str) -> Recipe | None:
    if text == DENSE:
        return None
    if _is_file(text):
        return Recipe.load(text)
    preset, _, kind = text.partition(":")
    return as_recipe(preset, algorithm=algorithm_from_dict({"kind": kind}) if kind else None)


def dtype_text(dtype: Any) -> str | None:
    """``bfloat16``, or ``bfloat16, vae float32`` of one for each component; None stays None."""
    if isinstance(dtype, Mapping):
        parts = [f"{'' if part == 'default' else part + ' '}{dtype_text(one)}" for part, one in dtype.items()]
        return ", ".join(parts)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _named(text: str, default: str) -> tuple[str, str]:
    name, separator, rest = text.partition("=")
    return (name, rest) if separator and name and rest else (default, text)


def _is_file(text: str) -> bool:
    return text.endswith(".json") or Path(text).is_file()
