"""The kernels as a Hub repository: what Hugging Face's ``kernels`` makes of the folder, beside the package's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from kernels._rust import Backend, Build

import diffuse_compress as dc
import diffuse_compress_kernels as own
import kernels
from diffuse_compress.cli import main
from diffuse_compress.integrations import hub_kernels
from diffuse_compress.integrations.hub_kernels import export_kernels

REPOSITORY = "someone/low-bit"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_kernels(tmp_path_factory.mktemp("export") / "repository", REPOSITORY, version=3)


def test_library_loads_the_folder_beside_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = kernels.get_local_kernel(folder, backend="cpu")
    monkeypatch.setenv("LOCAL_KERNELS", f"{REPOSITORY}={folder}")
    assert kernels.get_kernel(REPOSITORY, version=3, backend="cpu") is loaded
    assert loaded.__all__ == own.__all__
    files = [Path(module.__file__ or "") for name, module in sys.modules.items() if name.startswith(loaded.__name__)]
    assert len(files) > 10
    assert all(folder / "build/torch-cpu" in file.parents for file in files)
    assert loaded._ops.add_op_namespace_prefix("x") != own._ops.add_op_namespace_prefix("x")


def test_loaded_operators_give_the_package_s_bits(folder: Path) -> None:
    loaded = kernels.get_local_kernel(folder, backend="cpu")
    x, bias = torch.randn(33, 256), torch.randn(48)
    weight = torch.randint(-127, 128, (48, 256), dtype=torch.int8)
    scale = torch.rand(48) + 0.1
    codes, rows = own.quantize_rows(x, -127, 127)
    assert torch.equal(loaded.quantize_rows(x, -127, 127)[0], codes)
    found = loaded.int8_linear_codes(codes, rows, None, weight, scale.view(-1, 1), bias, torch.float32)
    exact = (codes.long() @ weight.long().T).double() * rows.double().view(-1, 1) * scale.double() + bias.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-3)
    assert torch.equal(found, own.int8_linear_codes(codes, rows, None, weight, scale.view(-1, 1), bias, torch.float32))
    assert torch.equal(loaded.int_matmul(codes, weight).long(), codes.long() @ weight.long().T)
    compiled = torch.compile(lambda a: loaded.int_matmul(a, weight), backend="eager", fullgraph=True)
    assert torch.equal(compiled(codes), loaded.int_matmul(codes, weight))


def test_builder_reads_the_source(folder: Path) -> None:
    assert set(Build.open(folder).general.backends) == {Backend.CPU, Backend.CUDA}
    source = folder / "torch-ext/diffuse_compress_kernels"
    assert not (source / "_ops.py").exists()  # the builder's
    assert (folder / "build/torch-cuda/_ops.py").exists()
    assert (folder / "CARD.md").read_text().startswith("---\nlicense: apache-2.0")
    compile((folder / "tests/test_kernels.py").read_text(), "test_kernels.py", "exec")


def test_builds_have_names_of_their_content(folder: Path, tmp_path: Path) -> None:
    again = export_kernels(tmp_path / "again", REPOSITORY, version=3, backends=["cpu"])
    for name in ("_ops.py", "metadata.json"):
        assert (again / "build/torch-cpu" / name).read_text() == (folder / "build/torch-cpu" / name).read_text()
    assert not (again / "build/torch-cuda").exists()
    assert (folder / "build/torch-cpu/_ops.py").read_text() != (folder / "build/torch-cuda/_ops.py").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repo_id": "low-bit"}, "must be \"owner/name\", got 'low-bit'"),
        ({"version": -1}, "version must be 0"),
        ({"backends": ["rocm"]}, r"backends are of cpu, cuda, got \['rocm'\]"),
        ({"backends": []}, "backends are of cpu, cuda"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str, tmp_path: Path) -> None:
    given: dict[str, object] = {"repo_id": REPOSITORY} | change
    with pytest.raises(dc.ConfigError, match=message):
        export_kernels(tmp_path / "out", given.pop("repo_id"), **given)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(dc.ConfigError, match="must be a new or empty folder"):
        export_kernels(tmp_path, REPOSITORY)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_imports_of_others_are_refused() -> None:
    text = "import torch\nfrom diffuse_compress_kernels.a.b import c\n\n\ndef f():\n    import diffusers\n"
    with pytest.raises(dc.ConfigError, match=r"x/y\.py imports diffusers; a kernel may import torch, triton"):
        hub_kernels._relative(text, 2, "x/y.py")
    assert "from ..a.b import c" in hub_kernels._relative(text.replace("diffusers", "json"), 2, "x/y.py")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export-kernels", str(out), "--repo-id", REPOSITORY, "--backends", "cpu"]) == 0
    assert "get_local_kernel" in capsys.readouterr().out
    assert (out / "build/torch-cpu/metadata.json").exists()
