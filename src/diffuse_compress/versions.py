"""What is installed, for whatever is to be known of a result later."""

from __future__ import annotations

import sys
from importlib import metadata

__all__ = ["installed_versions"]

_PACKAGES = ("torch", "diffusers", "transformers", "torchao", "accelerate", "triton")


def installed_versions() -> dict[str, str]:
    """Versions of this package and of what it works with, as installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    # By the running package, which need not be installed; importing it here would be a cycle.
    own = getattr(sys.modules.get("diffuse_compress"), "__version__", None)
    if own is not None:
        found["diffuse-compress"] = own
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
