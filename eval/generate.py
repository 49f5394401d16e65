"""Samples of pipelines for the same prompts and seeds: ``diffuse-compress eval generate`` as a file, so that

    accelerate launch --num_processes 8 eval/generate.py ./pixart --recipe dense w4a8 --prompts prompts.txt --out runs

can start it on several processes. They make the same files as one does. ``--help`` has the options and examples.
"""

from __future__ import annotations

import sys

from diffuse_compress.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", "generate", *sys.argv[1:]]))
