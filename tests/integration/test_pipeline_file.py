"""pipeline.py of a saved folder: loads with no import of ours, and never changes what the folder is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import tiny
from diffuse_compress.pipelines.shim import shim_for, stock_class_of

ROOT = Path(__file__).parents[2]
NAMES = ["pixart", "stable_diffusion_xl", "flux"]

USER = """
import sys, json, torch, tiny
from pathlib import Path
from diffusers import DiffusionPipeline

folder = Path(sys.argv[1])
load = dict(custom_pipeline="pipeline", trust_remote_code=True)
found = {}
for turn in range(2):
    for name in json.loads(sys.argv[2]):
        pipe = DiffusionPipeline.from_pretrained(folder / name, **load)
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(folder / f"{name}-again")
        plain = DiffusionPipeline.from_pretrained(folder / f"{name}-again")
        once_more = DiffusionPipeline.from_pretrained(folder / f"{name}-again", **load)
        pictures = []
        for each in (pipe, plain, once_more):
            each.set_progress_bar_config(disable=True)
            out = each(**tiny.call_kwargs(each, output_type="pt")).images
            pictures.append(torch.equal(out, torch.load(folder / f"{name}.pt")))
        classes = [f"{type(each).__module__.split('.')[0]}.{type(each).__name__}" for each in (pipe, plain, once_more)]
        found[f"{name} {turn}"] = [pictures, classes]
print(json.dumps(found))
"""


def run(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(ROOT / name) for name in ("src", "kernels", "tests"))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run([sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_two_families_alternately_in_one_process(tmp_path: Path) -> None:
    classes = {}
    for name in NAMES:
        pipe = tiny.build_pipeline(name, dtype=torch.bfloat16).compress("w8a8", measure=False)
        pipe.save_pretrained(tmp_path / name)
        torch.save(pipe(**tiny.call_kwargs(pipe, output_type="pt")).images, tmp_path / f"{name}.pt")
        classes[name] = type(pipe).__name__
    done = run(USER, str(tmp_path), json.dumps(NAMES), HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in NAMES:
        for turn in range(2):
            pictures, kinds = found[f"{name} {turn}"]
            assert pictures == [True, True, True], (name, turn)
            assert kinds[1] == f"diffusers.{classes[name]}"
            assert kinds[0] == kinds[2] == f"diffusers_modules.{classes[name]}"
        # `_class_name` never changes.
        for folder in (name, f"{name}-again"):
            index = json.loads((tmp_path / folder / "model_index.json").read_text())
            assert index["_class_name"] == classes[name]


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart").compress("w8a8", measure=False)
    pipe.save_pretrained(tmp_path / "saved")
    code = (
        "import sys; sys.modules['diffuse_compress'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        "DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline='pipeline', trust_remote_code=True)"
    )
    done = run(code, str(tmp_path / "saved"), HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert "this checkpoint needs diffuse_compress: pip install" in done.stderr


def test_it_is_short_and_written_only_where_it_can_work(tmp_path: Path) -> None:
    pipe = tiny.build_pipeline("pixart")
    text = shim_for(pipe)
    assert text is not None
    assert len(text.splitlines()) < 20
    compile(text, "pipeline.py", "exec")
    assert shim_for(pipe.transformer) is None

    class Mine(diffusers.PixArtAlphaPipeline):
        """A class that only its author has."""

    assert stock_class_of(Mine(**pipe.components)) is None
    impostor = type("PixArtAlphaPipeline", (diffusers.PixArtAlphaPipeline,), {"__module__": __name__})
    assert stock_class_of(impostor(**pipe.components)) is None
    pipe.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense/pipeline.py").exists()


@pytest.mark.parametrize("text", ["# mine\n", ""])
def test_a_file_of_the_users_stays(text: str, tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text(text)
    (tmp_path / "README.md").write_text(text)
    tiny.build_pipeline("pixart").compress("w8a8", measure=False).save_pretrained(tmp_path)
    assert (tmp_path / "pipeline.py").read_text() == (tmp_path / "README.md").read_text() == text
