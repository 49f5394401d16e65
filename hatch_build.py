"""Puts the demo's model and the VBench runner into the wheel; an editable install finds them in the checkout."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODEL = "examples/reference_models/emoji_pixart"
PARTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae", "prompts.txt")
CARD = "README.md"
RUNNER = "eval/vbench_runner"


class DataHook(BuildHookInterface):
    """A static force-include would be copied beside an editable install as well, and go stale there."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        card = (CARD,) if (Path(self.root) / MODEL / CARD).exists() else ()
        for part in PARTS + card:
            source = Path(self.root) / MODEL / part
            if not source.exists():
                raise FileNotFoundError(f"{source}: the wheel needs the demo's model; build from a complete checkout")
            build_data["force_include"][str(source)] = f"diffuse_compress/demo_model/{part}"
        # What the command `eval vbench` hands to the environment of its own: read as files, never imported from there.
        build_data["force_include"][str(Path(self.root) / RUNNER)] = "diffuse_compress/vbench_runner"
