"""What import-linter does not see: imports inside functions, what an import drags in, and sizes."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = (ROOT / "src", ROOT / "kernels")
OUR_PACKAGES = ("diffuse_compress", "diffuse_compress_kernels")
MODULES = sorted(path for root in SOURCE_ROOTS for name in OUR_PACKAGES for path in (root / name).rglob("*.py"))

MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120

# An import of our own package inside a function hides a dependency from import-linter. Each place that needs one, as
# "module" or "module:function", and why.
LOCAL_IMPORTS: dict[str, str] = {}

# Too long, since when and why: {"path" or "path:function": "YYYY-MM-DD reason"}. Keep it short, and empty is best.
SIZE_WAIVERS: dict[str, str] = {}


def _name(path: Path) -> str:
    return next(path.relative_to(root) for root in SOURCE_ROOTS if path.is_relative_to(root)).as_posix()


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + child.name, child
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from visit(child, f"{prefix}{child.name}." if named else prefix)

    yield from visit(tree, "")


def _imports_of_ours(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            names = ["diffuse_compress" if child.level else child.module or ""]
        else:
            continue
        if any(name.split(".")[0] in OUR_PACKAGES for name in names):
            yield child


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_functions_do_not_import_our_own_package(path: Path) -> None:
    for function, node in _functions(ast.parse(path.read_text())):
        for found in _imports_of_ours(node):
            allowed = {_name(path), f"{_name(path)}:{function}"} & LOCAL_IMPORTS.keys()
            assert allowed, (
                f"{_name(path)}:{found.lineno}: `{ast.unparse(found)}` inside {function}(). Import at the top of the "
                "module, or list it in LOCAL_IMPORTS with the reason."
            )


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_modules_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    sizes = {_name(path): (len(text.splitlines()), MAX_MODULE_LINES)}
    for function, node in _functions(ast.parse(text)):
        is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        limit = MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES
        sizes[f"{_name(path)}:{function}"] = (node.end_lineno - node.lineno + 1, limit)
    too_long = {name: size for name, size in sizes.items() if size[0] > size[1] and name not in SIZE_WAIVERS}
    assert not too_long, (
        f"(lines, allowed): {too_long}. Split it, or add a dated waiver to SIZE_WAIVERS with the reason."
    )


def test_allow_lists_name_what_exists() -> None:
    known = set()
    for path in MODULES:
        known |= {_name(path), *(f"{_name(path)}:{name}" for name, _ in _functions(ast.parse(path.read_text())))}
    assert not (LOCAL_IMPORTS.keys() | SIZE_WAIVERS.keys()) - known, "remove the entries of what is gone"
    assert all(re.match(r"\d{4}-\d\d-\d\d \S", waiver) for waiver in SIZE_WAIVERS.values()), "date each waiver"
    assert all(LOCAL_IMPORTS.values()), "give each local import its reason"


def test_no_init_file_outside_the_two_packages() -> None:
    """One in `kernels/` would shadow Hugging Face's `kernels`; one under `tests/` breaks importlib mode."""
    folders = ("tests", "eval", "pipelines", "examples", "docs")
    stray = [path for folder in folders for path in (ROOT / folder).rglob("__init__.py")]
    stray += [root / "__init__.py" for root in SOURCE_ROOTS if (root / "__init__.py").exists()]
    assert not stray


CORE_IS_PURE = """
import sys, torch
before = torch.cuda.is_initialized()
import {module}
heavy = sorted({{"diffusers", "transformers", "accelerate", "peft"}} & sys.modules.keys())
assert not heavy, f"importing {module} pulls in {{heavy}}"
assert torch.cuda.is_initialized() == before == False, "importing {module} initialises CUDA"
"""


@pytest.mark.parametrize("module", ["diffuse_compress_kernels", "diffuse_compress.quantization"])
def test_core_imports_neither_model_library_nor_cuda(module: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SOURCE_ROOTS))}
    # The package's own import attaches `.compress` to diffusers' classes unless told not to.
    environment["DIFFUSE_COMPRESS_NO_PATCH"] = "1"
    code = CORE_IS_PURE.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
