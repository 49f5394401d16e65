"""What the import adds to other libraries' classes, and that it can be told not to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import transformers

import diffuse_compress as dc
import tiny
from diffuse_compress.api import METHODS
from diffuse_compress.companions import complete_save, complete_upload
from diffuse_compress.feature_cache import CACHE_METHODS
from diffuse_compress.integrations.attach import attach, register_quantizers

ROOT = Path(__file__).parents[2]
CLASSES = [
    diffusers.DiffusionPipeline,
    diffusers.ModularPipeline,
    diffusers.ModelMixin,
    transformers.PreTrainedModel,
]


def python(code: str, **env: str) -> str:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_attach_every_verb(cls: type) -> None:
    for name, function in METHODS.items():
        assert getattr(cls, name) is function


def test_attach_twice_changes_nothing() -> None:
    before = [(cls.save_pretrained, cls.__dict__.get("dtype"), cls.compress) for cls in CLASSES]
    attach(METHODS, CACHE_METHODS, complete_save, complete_upload)
    register_quantizers()
    assert [(cls.save_pretrained, cls.__dict__.get("dtype"), cls.compress) for cls in CLASSES] == before


def test_attach_never_clobbers_and_no_patch_leaves_classes_alone() -> None:
    foreign = (
        "from diffusers import DiffusionPipeline, ModelMixin\n"
        "DiffusionPipeline.compress = 'theirs'\n"
        "import diffuse_compress as dc\n"
        "print(DiffusionPipeline.compress, callable(ModelMixin.compress), callable(dc.compress))\n"
    )
    assert python(foreign) == "theirs True True"
    untouched = (
        "from diffusers import DiffusionPipeline, ModelMixin\n"
        "from transformers import PreTrainedModel\n"
        "classes = (DiffusionPipeline, ModelMixin, PreTrainedModel)\n"
        "before = [dict(vars(cls)) for cls in classes]\n"
        "import diffuse_compress as dc\n"
        "print([dict(vars(cls)) for cls in classes] == before, hasattr(DiffusionPipeline, 'compress'))\n"
    )
    assert python(untouched, DIFFUSE_COMPRESS_NO_PATCH="1") == "True False"


def test_functions_work_on_their_own() -> None:
    pipe = tiny.build_pipeline("pixart")
    assert dc.compress(pipe, "w8a8") is pipe
    assert "transformer" in dc.compression_recipe(pipe).components
    assert dc.decompress(pipe) is pipe


def test_missing_package_error_gives_the_pip_command() -> None:
    from diffuse_compress.integrations.compat import require

    with pytest.raises(dc.MissingDependencyError, match=r"Plots needs not_there.*pip install not_there"):
        require("not_there", "Plots")
