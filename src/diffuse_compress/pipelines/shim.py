"""The file that diffusers loads a pipeline class of ours from: ``pipeline.py`` of a saved pipeline, and those of
``pipelines/`` in the repository.

``DiffusionPipeline.from_pretrained(path, custom_pipeline="pipeline", trust_remote_code=True)`` runs the file, which
imports this package, and takes the one pipeline class it defines: the stock class with ``CompressedPipelineMixin``,
under the stock name, so that ``_class_name`` stays what it was and plain ``from_pretrained`` loads the same folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from diffuse_compress.integrations.compat import INSTALL_COMMAND

__all__ = ["FILE_NAME", "is_shim", "shim_for", "shim_of_class", "stock_class_of"]

FILE_NAME = "pipeline.py"
_MARK = "Written by diffuse_compress."
_TEMPLATE = '''"""{mark} No `import diffuse_compress` in your code; for other folders pass the path of this file:
DiffusionPipeline.from_pretrained(PATH_OR_REPO, custom_pipeline="pipeline", trust_remote_code=True)"""

import diffusers

try:
    from diffuse_compress.pipelines import mixin
except ImportError as error:
    raise ImportError(
        "this checkpoint needs diffuse_compress: {install}"
    ) from error

# diffusers runs every local pipeline.py in one module and wants exactly one pipeline class there.
for key in [key for key, value in globals().items() if isinstance(value, type)]:
    del globals()[key]


class {name}(mixin.CompressedPipelineMixin, diffusers.{name}):
    __doc__ = diffusers.{name}.__doc__
'''


def stock_class_of(pipe: Any) -> type | None:
    """The pipeline class of diffusers that ``pipe`` is, also where it was loaded through a shim; None for others'."""
    diffusers = sys.modules.get("diffusers")
    base = getattr(diffusers, "DiffusionPipeline", None)
    if not isinstance(base, type) or not isinstance(pipe, base):
        return None
    own = type(pipe)
    stock = getattr(diffusers, own.__name__, None)
    # A subclass of somebody's own, even under the stock name, may have another __init__ and call.
    return (
        stock if own is stock or (isinstance(stock, type) and issubclass(own, stock) and _is_from_shim(own)) else None
    )


def _is_from_shim(cls: type) -> bool:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    try:
        return file is not None and is_shim(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False


def is_shim(text: str) -> bool:
    """True for the text of a file that :func:`shim_for` made."""
    return text.startswith(f'"""{_MARK}')


def shim_for(pipe: Any) -> str | None:
    """Text of the ``pipeline.py`` of ``pipe``; None for a bare model and for a class that diffusers does not have."""
    cls = stock_class_of(pipe)
    return None if cls is None else shim_of_class(cls.__name__)


def shim_of_class(name: str) -> str:
    """Text of the file for the stock pipeline class of this name."""
    return _TEMPLATE.format(mark=_MARK, name=name, install=INSTALL_COMMAND)
