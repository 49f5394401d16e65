"""Distances between sets of pictures: ``diffuse-compress eval fid`` as a file, so that

    accelerate launch --num_processes 8 eval/fid.py runs/dense runs/w4a8

can share the features between processes. The numbers are those of one process. ``--help`` has options and examples.
"""

from __future__ import annotations

import sys

from diffuse_compress.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", "fid", *sys.argv[1:]]))
