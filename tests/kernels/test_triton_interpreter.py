"""Runs triton_cases.py in a process of its own: Triton decides at import whether its kernels are interpreted."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("triton_cases.py")
# Interpreters of some triton and numpy versions do not get along: a loop whose bounds are tensors fails.
PROBE = """
import torch, triton, triton.language as tl
@triton.jit
def kernel(out, n):
    for i in tl.range(tl.program_id(0), n):
        tl.store(out + i, i)
kernel[(1,)](torch.zeros(4, dtype=torch.int32), 4)
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("which", "least"),
    [("not slow", 40), pytest.param("slow", 55, marks=pytest.mark.slow)],
    ids=["quick", "all others"],
)
def test_kernels_in_the_interpreter(which: str, least: int, tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    if run_python(str(probe)).returncode != 0:
        pytest.skip("this triton's interpreter does not work with this numpy")
    run = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, str(CASES))
    assert run.returncode == 0, run.stdout[-6000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, "cases were skipped"
    assert int(passed[1]) >= least, "cases were skipped"
