"""Loggers under ``diffuse_compress``, their switches, and silence otherwise."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffuse_compress as dc
import tiny
from diffuse_compress.logging import get_logger, get_verbosity

SOURCES = Path(dc.__file__).parent


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    logger = get_logger()
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def test_default_is_warning_and_no_handler() -> None:
    assert get_verbosity() == logging.WARNING
    assert get_logger().handlers == []


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_set_verbosity(level: str) -> None:
    getattr(dc, f"set_verbosity_{level}")()
    assert get_verbosity() == getattr(logging, level.upper())


def test_info_tells_what_is_done(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    dc.set_verbosity_info()
    with caplog.at_level(logging.INFO, "diffuse_compress"):
        model = tiny.build("pixart").compress("w8a8", measure=False)
        model.save_pretrained(tmp_path)
        type(model).from_pretrained(tmp_path)
    names = {record.name for record in caplog.records}
    assert names == {"diffuse_compress.apply", "diffuse_compress.integrations.saving",
                     "diffuse_compress.integrations.quantizer"}  # fmt: skip
    assert any("layers converted in" in record.getMessage() for record in caplog.records)


def test_environment_variable_sets_it() -> None:
    code = (
        "import os, diffuse_compress.logging as l\n"
        "for value in ('nonsense', 'error', 'info'):\n"
        "    os.environ['DIFFUSE_COMPRESS_VERBOSITY'] = value\n"
        "    l.set_verbosity_from_environment(); l.get_logger().info('at ' + value)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if "at " in line] == ["[INFO|diffuse_compress] at info"]
    assert done.stdout == ""


def test_nothing_but_the_command_line_prints() -> None:
    for path in SOURCES.rglob("*.py"):
        if path.name in ("cli.py", "demo.py") or path.name.startswith("cli_"):
            continue
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        assert not any(isinstance(node.func, ast.Name) and node.func.id == "print" for node in calls), path


def test_no_line_comes_twice_where_the_application_logs_itself() -> None:
    code = (
        "import logging, diffuse_compress.logging as l\n"
        "l.set_verbosity_info(); l.get_logger().info('alone')\n"
        "logging.basicConfig(level=logging.INFO, format='APP %(message)s'); l.get_logger().info('both')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("alone") == done.stderr.count("both") == 1
    assert "APP both" in done.stderr
