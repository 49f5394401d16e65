"""Every ```python block of README.md and docs/*.md runs, in order, as one script for each file.

The script runs in a temporary folder in which `examples/`, `eval/` and `pipelines/` of the repository can be found, in
a process of its own and offline. A block that cannot run here has a comment on the line before its fence,

    <!-- no-run: needs the 24 GB checkpoint -->

with the reason; it is still compiled. A traceback names the line of the document.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if path.exists()]
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<language>[\w+-]*)")
NO_RUN = re.compile(r"^\s*<!--\s*no-run(?P<reason>.*?)-->\s*$")

RUNNER = """
import json, linecache, sys
blocks = json.load(open(sys.argv[1]))
sys.argv = [""]
for name, code in blocks:
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    exec(compile(code, name, "exec"), globals())
"""


@dataclass(frozen=True)
class Block:
    line: int
    code: str
    no_run: str | None


def python_blocks(text: str) -> Iterator[Block]:
    """The python blocks of a markdown text; `line` is that of the first line of code, counted from 1."""
    lines = text.splitlines()
    i = 0
    while i < len(lines):
        opening = FENCE.match(lines[i])
        if opening is None:
            i += 1
            continue
        start = i + 1
        i = start
        while i < len(lines) and not lines[i].strip().startswith(opening["ticks"]):
            i += 1
        if i == len(lines):
            raise ValueError(f"line {start}: this code fence is never closed")
        if opening["language"] == "python":
            comment = NO_RUN.match(lines[start - 2]) if start >= 2 else None
            reason = None if comment is None else comment["reason"].removeprefix(":").strip()
            code = textwrap.dedent("\n".join(lines[start:i])) + "\n"
            yield Block(start + 1, code, reason)
        i += 1


def _padded(block: Block) -> str:
    """The code, moved down so that its line numbers are the document's."""
    return "\n" * (block.line - 1) + block.code


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_blocks_run_in_order(document: Path, tmp_path: Path) -> None:
    name = document.relative_to(ROOT).as_posix()
    runnable = []
    for block in python_blocks(document.read_text()):
        compile(_padded(block), name, "exec")
        assert block.no_run != "", f"{name}:{block.line}: say why the block is not run: <!-- no-run: reason -->"
        if block.no_run is None:
            runnable.append((name, _padded(block)))
    if not runnable:
        return
    for folder in ("examples", "eval", "pipelines"):
        if (ROOT / folder).exists():
            (tmp_path / folder).symlink_to(ROOT / folder)
    blocks, runner = tmp_path / ".blocks.json", tmp_path / ".run.py"
    blocks.write_text(json.dumps(runnable))
    runner.write_text(RUNNER)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "kernels")]),
    }
    command = [sys.executable, str(runner), str(blocks)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{name} fails:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"


def test_blocks_are_found_with_their_lines_and_reasons() -> None:
    text = textwrap.dedent(
        """\
        # title
        ```python
        a = 1
        ```
        ```bash
        ```
        <!-- no-run: needs a GPU -->
        ```python
        b = 2
        ```
        - item
          ```python
          c = 3
          ```
        <!-- no-run -->
        ```python
        ```
        ````markdown
        ```python
        not code
        ```
        ````
        """
    )
    blocks = list(python_blocks(text))
    assert blocks == [
        Block(3, "a = 1\n", None),
        Block(9, "b = 2\n", "needs a GPU"),
        Block(13, "c = 3\n", None),
        Block(17, "\n", ""),
    ]
    with pytest.raises(ValueError, match="line 1: this code fence is never closed"):
        list(python_blocks("```python\na = 1\n"))
