"""The kernels as a repository of their own, in the layout that Hugging Face's ``kernels`` library loads.

``kernels.get_kernel("name/of-repository", version=1)`` then gives the operators to whoever has no ``diffuse_compress``.
The folder holds the source as ``kernel-builder`` wants it (``build.toml``, ``torch-ext/``), and what it makes of such a
source, which is Python alone (``build/torch-cuda``, ``build/torch-cpu``), so that nothing has to be built.

A build has its own operator namespace, and imports of itself are relative: it and the package can be loaded together.
Format: https://huggingface.co/docs/kernels, as of kernels 0.17.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import diffuse_compress_kernels
from diffuse_compress.errors import ConfigError

__all__ = ["BACKENDS", "export_kernels"]

BACKENDS = ("cpu", "cuda")
_PACKAGE = "diffuse_compress_kernels"
_NAME = _PACKAGE.replace("_", "-")
# Of a checkout: they measure, and need what the rules for such repositories leave out.
_LEFT_OUT = ("benchmarks", "__pycache__")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_OWN_IMPORT = re.compile(rf"^(\s*)from {_PACKAGE}((?:\.\w+)*) import ", re.MULTILINE)
# The oldest GPU with kernels, and those that they were made and tested for.
_CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
_OPS = '''"""The namespace of this build's operators."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
'''
_CARD = """---
license: apache-2.0
library_name: kernels
tags:
- kernels
---

# {title}

Low-bit products of [diffuse_compress](https://github.com/diffuse-compress/diffuse-compress): int8 and float8 linear
layers, int4 weights beside 8-bit and 16-bit inputs, int8 convolutions, and norms and activations that quantize their
results. Triton on NVIDIA GPUs of compute capability 8.0 and more, plain torch elsewhere; both give the same codes and
int32 sums.

```python
import torch
from kernels import get_kernel

kernels = get_kernel("{repo_id}", version={version})
x = torch.randn(32, 256, device="{device}")
weight = torch.randint(-127, 128, (64, 256), dtype=torch.int8, device="{device}")
codes, scale = kernels.quantize_rows(x, -127, 127)
print((kernels.int_matmul(codes, weight) * scale).shape)
```

Functions: {functions}.
"""
_TEST = '''"""The published build, on what it is loaded for: ``pytest tests`` with ``kernels`` installed."""

import torch
from kernels import get_kernel

kernels = get_kernel("{repo_id}", version={version})
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_int_matmul_is_exact():
    a = torch.randint(-127, 128, (33, 256), dtype=torch.int8, device=DEVICE)
    b = torch.randint(-127, 128, (48, 256), dtype=torch.int8, device=DEVICE)
    expected = a.cpu().long() @ b.cpu().long().T
    assert torch.equal(kernels.int_matmul(a, b).cpu().long(), expected)
'''


def export_kernels(folder: str | Path, repo_id: str, *, version: int = 1, backends: Sequence[str] = BACKENDS) -> Path:
    """Write the kernels as a repository that ``kernels`` loads, from the Hub or from the folder.

    Args:
        folder: to write to; must be empty or not be there.
        repo_id: "owner/name" on the Hub, for ``build.toml`` and the card.
        version: of the functions and their arguments; the branch of the repository is ``v<version>``.
        backends: for each of "cpu" and "cuda" a build.

    Returns:
        The folder. ``kernels.get_local_kernel(folder)`` loads it; ``huggingface_hub.upload_folder(repo_id=repo_id,
        folder_path=folder, revision=f"v{version}")`` publishes it.

    Raises:
        ConfigError: a name, version or backend that cannot be, or a folder with something in it.
    """
    folder = Path(folder)
    if not _REPOSITORY.fullmatch(repo_id):
        raise ConfigError(f'export_kernels: repo_id must be "owner/name", got {repo_id!r}.')
    if not isinstance(version, int) or version < 0:
        raise ConfigError(f"export_kernels: version must be 0 (unstable) or more, got {version!r}.")
    unknown = sorted(set(backends) - set(BACKENDS))
    if unknown or not backends:
        raise ConfigError(f"export_kernels: backends are of {', '.join(BACKENDS)}, got {list(backends)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"export_kernels: {folder} must be a new or empty folder, and is not. Name another.")
    files = _sources()
    written = {
        "build.toml": _build_toml(repo_id, version, backends),
        "CARD.md": _card(repo_id, version, backends),
        "README.md": _card(repo_id, version, backends),
        "tests/test_kernels.py": _TEST.format(repo_id=repo_id, version=version),
    }
    for path, text in files.items():
        if path != "_ops.py":  # kernel-builder writes its own
            written[f"torch-ext/{_PACKAGE}/{path}"] = text
    digest = hashlib.sha256("".join(f"{path}\0{text}\0" for path, text in sorted(files.items())).encode()).hexdigest()
    for backend in sorted(set(backends)):
        build = f"build/torch-{backend}"
        identity = f"_{_PACKAGE}_{backend}_{digest[:7]}"
        written |= {f"{build}/{path}": text for path, text in files.items()}
        written[f"{build}/_ops.py"] = _OPS.format(id=identity)
        written[f"{build}/metadata.json"] = json.dumps(_metadata(identity, version, backend), indent=2) + "\n"
    try:
        for path, text in written.items():
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _sources() -> dict[str, str]:
    """{path within the package: text}, with relative imports."""
    assert diffuse_compress_kernels.__file__ is not None
    root = Path(diffuse_compress_kernels.__file__).parent
    found = {}
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        if path.suffix not in (".py", ".json") or inner.parts[0] in _LEFT_OUT or "__pycache__" in inner.parts:
            continue
        text = path.read_text(encoding="utf-8")
        found[inner.as_posix()] = _relative(text, len(inner.parts), inner.as_posix()) if path.suffix == ".py" else text
    return found


def _relative(text: str, depth: int, path: str) -> str:
    """A module's text, ``depth`` levels below the folder with the package, with relative imports of the package."""
    dots = "." * depth
    found = _OWN_IMPORT.sub(lambda match: f"{match[1]}from {dots}{match[2].lstrip('.')} import ", text)
    for node in ast.walk(ast.parse(found)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level and node.module is not None:
            names = [node.module]
        for name in names:
            top = name.partition(".")[0]
            if top not in ("torch", "triton") and top not in sys.stdlib_module_names:
                raise ConfigError(
                    f"export_kernels: {path} imports {name}; a kernel may import torch, triton and the standard "
                    f"library. Import from {_PACKAGE} with `from ... import ...`."
                )
    return found


def _metadata(identity: str, version: int, backend: str) -> dict[str, object]:
    about: dict[str, object] = {"type": backend}
    if backend == "cuda":
        about["archs"] = list(_CAPABILITIES)
    return {
        "name": _NAME,
        "id": identity,
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": about,
    }


def _build_toml(repo_id: str, version: int, backends: Sequence[str]) -> str:
    def listed(values: Sequence[str]) -> str:
        return "[" + ", ".join(f'"{value}"' for value in values) + "]"

    lines = ["[general]", f'name = "{_NAME}"', f"version = {version}", "edition = 5", 'license = "Apache-2.0"']
    lines += [f"backends = {listed(sorted(set(backends)))}", "", "[general.hub]", f'repo-id = "{repo_id}"', ""]
    lines += ["[torch-noarch]", 'pyext = ["json", "py"]']
    if "cuda" in backends:
        lines.append(f"cuda_capabilities = {listed(_CAPABILITIES)}")
    return "\n".join(lines) + "\n"


def _card(repo_id: str, version: int, backends: Sequence[str]) -> str:
    functions = ", ".join(f"`{name}`" for name in diffuse_compress_kernels.__all__)
    device = "cuda" if "cuda" in backends else "cpu"
    title = repo_id.partition("/")[2]
    return _CARD.format(title=title, repo_id=repo_id, version=version, device=device, functions=functions)
