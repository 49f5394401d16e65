"""Calibrations killed with SIGKILL at random moments and started again: ``python killed.py FOLDER NUMBER SEED``.

Each attempt is a process of its own, forked from this one, which imports and runs on one thread. Prints JSON: the
moments in seconds, how many blocks were finished at each, and whether the second run came to the bytes of a run that
nobody killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import diffuse_compress as dc
import tiny
from diffuse_compress.calibration.work_folder import digest_of_weights


def calibrate(work_dir: Path, result: Path) -> None:
    pipe = tiny.build_pipeline("pixart")
    pipe.transformer = tiny.build("pixart", num_layers=4, caption_channels=pipe.transformer.config.caption_channels)
    given = tiny.call_kwargs(pipe, steps=3)
    given.pop("generator")
    pipe.compress(
        dc.QuantizationConfig("w8a8", algorithm=[dc.SmoothQuantConfig(fold=True), dc.GPTQConfig()]),
        calibration=[{**given, "prompt": prompt} for prompt in ("a cat", "a dog")],
        work_dir=work_dir,
        measure=False,
    )
    result.write_text(digest_of_weights(pipe.transformer))


def start(work_dir: Path, result: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        calibrate(work_dir, result)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def finish(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"calibration ended with status {status}")


def main(folder: Path, number: int, seed: int) -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    finish(start(folder / "whole", folder / "whole.txt"))
    seconds, expected = time.perf_counter() - started, (folder / "whole.txt").read_text()
    moments, found = random.Random(seed), []
    for index in range(number):
        work_dir, result = folder / str(index), folder / f"{index}.txt"
        moment = moments.uniform(0, seconds)
        child = start(work_dir, result)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        blocks = len(list(work_dir.glob("transformer/*.safetensors")))
        result.unlink(missing_ok=True)
        finish(start(work_dir, result))
        found.append({"moment": round(moment, 3), "blocks": blocks, "equal": result.read_text() == expected})
    print(json.dumps({"seconds": round(seconds, 3), "runs": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
