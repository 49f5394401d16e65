"""Every private or version-dependent name of other libraries that this package touches, in one place."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

from diffuse_compress.errors import MissingDependencyError

__all__ = ["mixin_bases", "remove_from_diffusers_config", "require", "usable"]

_PIP = {
    "diffusers": "pip install diffusers",
    "transformers": "pip install transformers",
    "peft": "pip install 'diffuse-compress[lora]'",
    "matplotlib": "pip install 'diffuse-compress[plots]'",
    "torchao": "pip install torchao",
    "triton": "pip install triton",
}


@lru_cache
def usable(library: str) -> bool:
    """True if diffusers or transformers is installed and its model base class imports.

    diffusers fails to import its models where peft is installed and transformers, which peft needs, is not.
    """
    base = {"diffusers": "ModelMixin", "transformers": "PreTrainedModel"}[library]
    try:
        getattr(importlib.import_module(library), base)
    except (AttributeError, ImportError, RuntimeError):
        return False
    return True


def require(package: str, purpose: str) -> Any:
    """Import ``package`` or raise MissingDependencyError naming ``purpose`` and the pip command."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        command = _PIP.get(package.partition(".")[0], f"pip install {package}")
        raise MissingDependencyError(
            f"{purpose} needs {package}, which cannot be imported ({error}): {command}"
        ) from error


def mixin_bases() -> tuple[type, ...]:
    """QuantizationConfigMixin of the libraries that are installed, transformers' first (it has ``to_diff_dict``)."""
    bases: list[type] = []
    if usable("transformers"):
        from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersMixin

        bases.append(TransformersMixin)
    if usable("diffusers"):
        from diffusers.quantizers.quantization_config import QuantizationConfigMixin as DiffusersMixin

        bases.append(DiffusersMixin)
    return tuple(bases) or (object,)


def remove_from_diffusers_config(model: Any, key: str) -> None:
    """Drop ``key`` from a diffusers config; ``register_to_config`` can only add."""
    from diffusers.configuration_utils import FrozenDict

    if key in model._internal_dict:
        model._internal_dict = FrozenDict({name: val for name, val in model._internal_dict.items() if name != key})
