"""``accelerate launch -m diffuse_compress.train_qat``: the command ``diffuse-compress train`` as a module."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffuse_compress.cli import main as run

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """As ``diffuse-compress train`` with these arguments; returns its exit code."""
    return run(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
