"""The command as launchers run it: two processes, clips in a folder, the Hub, and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load

import diffuse_compress  # noqa: F401  reads quantized checkpoints
import tiny
from loopback_hub import LoopbackHub

pytestmark = pytest.mark.slow


def test_two_processes_train_on_clips_and_push_and_a_failure_has_a_code(tmp_path: Path) -> None:
    tiny.build_pipeline("wan").save_pretrained(tmp_path / "wan")
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(4):
        pixels = torch.randint(0, 255, (5, 32, 32, 3), dtype=torch.uint8)
        first, *others = (Image.fromarray(frame.numpy()) for frame in pixels)
        first.save(clips / f"{number}.gif", save_all=True, append_images=others)
        (clips / f"{number}.txt").write_text(f"a red cat, {number}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    launch += [
        "diffuse_compress.train_qat",
        "--pretrained_model_name_or_path",
        str(tmp_path / "wan"),
        "--device",
        "cpu",
    ]
    launch += ["--train_data_dir", str(clips), "--max_train_steps", "3", "--phi_rank", "1", "--json"]
    launch += ["--height", "32", "--width", "32", "--num_frames", "5", "--num_inference_steps", "2"]
    out = tmp_path / "wan-w4a4"
    whole = ["--validation_prompt", "a red cat", "--held_out", "1", "--checkpointing_steps", "2", "--push_to_hub"]
    with LoopbackHub() as hub:
        paths = [str(Path(path).resolve()) for path in ("src", "kernels") if Path(path).is_dir()]
        environment = {**os.environ, **hub.environment(str(tmp_path / "cache")), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([*paths, environment.get("PYTHONPATH", "")])

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            found = [*launch, *arguments]
            return subprocess.run(found, env=environment, capture_output=True, text=True, timeout=300, check=False)

        done = run("--method", "lsq", "--output_dir", str(out), *whole)
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.files("me/wan-w4a4")
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert told["steps"] == len(told["losses"]) == 3
    assert {"task_without_phi", "psnr_without_phi"} <= told["validation"][-1].keys()
    pushed = "transformer/diffusion_pytorch_model.safetensors"
    there, here = load(files[pushed]), load((out / pushed).read_bytes())
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)
    assert not any(name.startswith(("checkpoint-", "data-", "validation")) for name in files)
    assert type(DiffusionPipeline.from_pretrained(out).transformer.blocks[0].ffn.net[2]).__name__ == "QuantizedLinear"
    drawn = sorted(path.parent.name + "/" + path.name for path in (out / "validation").glob("*/*"))
    assert drawn == ["step-0/0-teacher.gif", "step-3/0-with_phi.gif", "step-3/0-without_phi.gif"]
    failed = run("--output_dir", str(tmp_path / "failed"), "--learning_rate", "1e30")
    assert failed.returncode != 0
    assert "the loss of step" in failed.stderr
