"""`examples/train_lora_on_compressed.py` in short: the loss falls, and the adapter it writes does what it learned."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("peft")
SCRIPT = Path(__file__).parents[2] / "examples" / "train_lora_on_compressed.py"


@pytest.mark.parametrize("preset", ["w4a16", "w8a8"])
def test_loss_falls_on_a_compressed_base(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("train_lora_on_compressed", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = ["--steps", "12", "--batch", "4", "--sampling-steps", "4"]
    assert (
        script.main(["--preset", preset, "--device", "cpu", "--out", str(tmp_path / "lora.safetensors"), *sizes]) == 0
    )
    before, after = map(float, capsys.readouterr().out.rpartition("held loss ")[2].split(" -> "))
    assert after < 0.8 * before
    state = load_file(tmp_path / "lora.safetensors")
    assert any(key.endswith("lora_B.weight") and tensor.any() for key, tensor in state.items())
