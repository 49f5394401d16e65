"""Runs commands in a process of its own: run by test_reproduce.py with HF_ENDPOINT set to a loopback Hub.

``python reproduce_user.py '[["eval", "reproduce", ...], ...]'`` prints a JSON list of exit codes and outputs. With
``--register``, language models are scored by the loss of their last layer on the lines of the data: a scorer as a user
would register one.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.cli import main
from diffuse_compress.evaluation.records import Metric
from diffuse_compress.reproduce import register_scorer


@torch.no_grad()
def loss_on_lines(
    model: Any, folder: Path, data: Sequence[Path], settings: Mapping[str, Any]
) -> tuple[list[Metric], dict[str, str]]:
    assert (folder / "config.json").is_file()
    lines = [line for file in data for line in file.read_text().splitlines()]
    losses = []
    for line in lines[: settings["count"]]:
        ids = torch.tensor([[byte % model.config.vocab_size for byte in line.encode()]])
        losses.append(float(model(input_ids=ids, labels=ids).loss))
    metric = Metric("Loss", sum(losses) / len(losses), None, None, len(losses), "mean over lines", False)
    return [metric], {"Accuracy": "the data has no answers"}


def run(argv: list[str]) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["diffuse-compress", *argv]  # records hold the command as it was typed
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    commands = json.loads(sys.argv[1])
    if "--register" in sys.argv:
        register_scorer("language", loss_on_lines)
    print(json.dumps([run(argv) for argv in commands]))
