"""What import-linter does not see: imports inside functions, what an import drags in, and sizes."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
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


def test_functions_do_not_import_our_own_package() -> None:
    found = []
    for path in MODULES:
        for function, node in _functions(ast.parse(path.read_text())):
            if not {_name(path), f"{_name(path)}:{function}"} & LOCAL_IMPORTS.keys():
                found += [f"{_name(path)}:{i.lineno} in {function}(): {ast.unparse(i)}" for i in _imports_of_ours(node)]
    assert not found, "\n".join(["import at the top, or list it in LOCAL_IMPORTS with the reason:", *found])


def test_modules_and_functions_stay_readable() -> None:
    found = []
    for path in MODULES:
        text = path.read_text()
        sizes = [(_name(path), len(text.splitlines()), MAX_MODULE_LINES)]
        for function, node in _functions(ast.parse(text)):
            is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            limit = MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES
            sizes.append((f"{_name(path)}:{function}", node.end_lineno - node.lineno + 1, limit))
        found += [f"{name}: {n} lines, {limit} allowed" for name, n, limit in sizes if n > limit]
    found = [line for line in found if line.split(": ")[0] not in SIZE_WAIVERS]
    assert not found, "\n".join(["split it, or add a dated waiver with the reason to SIZE_WAIVERS:", *found])


def test_every_module_has_its_layer_in_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    known = {name.strip("() \n").split(".")[-1] for layer in layers for name in re.split("[|:]", layer)}
    package = ROOT / "src" / "diffuse_compress"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert not modules - known, "give each a layer in [tool.importlinter] of pyproject.toml"


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


# The package's own import attaches methods to diffusers' and transformers' classes, so its `__init__` is left out here:
# what counts is what the core's modules themselves pull in.
CORE_IS_PURE = """
import importlib, pkgutil, sys, types
import torch
if "{module}".startswith("diffuse_compress."):
    package = types.ModuleType("diffuse_compress")
    package.__path__ = [{package!r}]
    sys.modules["diffuse_compress"] = package
core = importlib.import_module("{module}")
for found in pkgutil.walk_packages(core.__path__, "{module}."):
    if ".benchmarks" not in found.name:
        importlib.import_module(found.name)
heavy = sorted({{"diffusers", "transformers", "accelerate", "peft"}} & sys.modules.keys())
assert not heavy, f"importing {module} pulls in {{heavy}}"
assert not torch.cuda.is_initialized(), "importing {module} initialises CUDA"
"""


@pytest.mark.parametrize("module", ["diffuse_compress_kernels", "diffuse_compress.quantization"])
def test_core_imports_neither_model_library_nor_cuda(module: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SOURCE_ROOTS))}
    code = CORE_IS_PURE.format(module=module, package=str(ROOT / "src" / "diffuse_compress"))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
