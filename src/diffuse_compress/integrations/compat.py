"""Every private or version-dependent name of other libraries that this package touches, in one place."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

from diffuse_compress.errors import MissingDependencyError

__all__ = ["has", "mixin_bases", "remove_from_diffusers_config", "require"]

_PIP = {
    "diffusers": "pip install diffusers",
    "transformers": "pip install transformers",
    "peft": "pip install 'diffuse-compress[lora]'",
    "matplotlib": "pip install 'diffuse-compress[plots]'",
    "torchao": "pip install torchao",
    "triton": "pip install triton",
}


@lru_cache
def has(package: str) -> bool:
    """True if ``package`` can be found (it is not imported)."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def require(package: str, purpose: str) -> Any:
    """Import ``package`` or raise MissingDependencyError naming ``purpose`` and the pip command."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        command = _PIP.get(package.partition(".")[0], f"pip install {package}")
        raise MissingDependencyError(f"{purpose} needs {package}, which cannot be imported ({error}): {command}") from error


def mixin_bases() -> tuple[type, ...]:
    """QuantizationConfigMixin of the libraries that are installed, transformers' first (it has ``to_diff_dict``)."""
    bases: list[type] = []
    if has("transformers"):
        from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersMixin

        bases.append(TransformersMixin)
    if has("diffusers"):
        from diffusers.quantizers.quantization_config import QuantizationConfigMixin as DiffusersMixin

        bases.append(DiffusersMixin)
    return tuple(bases) or (object,)


def remove_from_diffusers_config(model: Any, key: str) -> None:
    """Drop ``key`` from a diffusers config; ``register_to_config`` can only add."""
    from diffusers.configuration_utils import FrozenDict

    if key in model._internal_dict:
        model._internal_dict = FrozenDict({name: val for name, val in model._internal_dict.items() if name != key})
