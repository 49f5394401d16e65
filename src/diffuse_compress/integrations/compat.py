"""Every private or version-dependent name of other libraries that this package touches, in one place."""

from __future__ import annotations

import importlib
import os
import sys
from functools import lru_cache
from typing import Any

from diffuse_compress.errors import MissingDependencyError

__all__ = [
    "INSTALL_COMMAND",
    "NO_PATCH_VARIABLE",
    "add_to_diffusers_config",
    "called_by_pipeline",
    "may_patch",
    "mixin_bases",
    "remove_from_diffusers_config",
    "require",
    "torchao_classes",
    "usable",
]

INSTALL_COMMAND = "pip install git+https://github.com/diffuse-compress/diffuse-compress"
_FRAMES = 8  # other packages may wrap from_pretrained, too
NO_PATCH_VARIABLE = "DIFFUSE_COMPRESS_NO_PATCH"

_PIP = {
    "diffusers": "pip install diffusers",
    "transformers": "pip install transformers",
    "peft": "pip install 'diffuse-compress[lora]'",
    "matplotlib": "pip install 'diffuse-compress[plots]'",
    "torchao": "pip install torchao",
    "triton": "pip install triton",
}


def may_patch() -> bool:
    """False if the user wants the classes of both libraries left alone."""
    return os.environ.get(NO_PATCH_VARIABLE, "") in ("", "0")


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


def torchao_classes(library: str) -> tuple[Any, Any]:
    """(TorchAoConfig, its quantizer) of diffusers or transformers; torchao must be there."""
    if library == "diffusers":
        from diffusers import TorchAoConfig
        from diffusers.quantizers.torchao import TorchAoHfQuantizer
    else:
        from transformers import TorchAoConfig
        from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
    return TorchAoConfig, TorchAoHfQuantizer


def called_by_pipeline() -> bool:
    """True in a call that diffusers' pipeline loader makes, which loads one component after the other.

    Told by the stack: a ``from_pretrained`` that was under way when this package was imported can leave no other mark.
    """
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_code.co_name == "load_sub_model":
            return True
        if frame.f_back is None:
            break
        frame = frame.f_back
    return False


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


def add_to_diffusers_config(model: Any, key: str, value: Any) -> None:
    """Set ``key`` of a diffusers config."""
    _replace_diffusers_config(model, {**model._internal_dict, key: value}, key)


def remove_from_diffusers_config(model: Any, key: str) -> None:
    """Drop ``key`` from a diffusers config; ``register_to_config`` can only add."""
    if key in model._internal_dict or key in vars(model._internal_dict):
        _replace_diffusers_config(model, {name: val for name, val in model._internal_dict.items() if name != key}, key)


def _replace_diffusers_config(model: Any, entries: dict[str, Any], changed: str) -> None:
    """A config of these entries, and of the attributes that were set on the old one without being entries.

    ``load_ip_adapter`` sets such, and ``register_to_config`` loses them: the adapter would silently be off. Of the key
    ``changed`` only the entry counts: saving makes a plain dict of it, beside which the old attribute still stands.
    """
    from diffusers.configuration_utils import FrozenDict

    old = model._internal_dict
    model._internal_dict = FrozenDict(entries)
    for name, value in vars(old).items():
        if name == changed:
            continue
        if name not in old or (name in entries and old[name] is not value):
            setattr(model._internal_dict, name, value)
