"""The demo: compress the small trained pipeline that comes with the package, offline, and look at what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from diffuse_compress.api import compress, compression_plan, compression_report
from diffuse_compress.components import model_components
from diffuse_compress.errors import ConfigError
from diffuse_compress.pipeline_call import seeded
from diffuse_compress.report_text import format_count

__all__ = ["CALL", "PROMPTS", "demo_model_path", "run_demo"]

# What the model's card recommends.
CALL: dict[str, Any] = {
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "use_resolution_binning": False,
    "clean_caption": False,
    "max_sequence_length": 24,
}
PROMPTS = ("teddy bear", "umbrella", "hot beverage", "rocket", "slice of pizza", "penguin")
_SOURCE = "trained for this package on the glyphs of the Noto Color Emoji font (OFL-1.1)"


def demo_model_path() -> Path:
    """Folder of the demo pipeline: in the installed package, else in a checkout of the sources.

    Raises:
        ConfigError: in neither.
    """
    packaged = Path(str(resources.files("diffuse_compress").joinpath("demo_model")))
    checkout = Path(__file__).resolve().parents[2] / "examples" / "reference_models" / "emoji_pixart"
    for folder in (packaged, checkout):
        if (folder / "model_index.json").is_file():
            return folder
    raise ConfigError(
        f"The demo model is missing: neither {packaged} nor {checkout} holds a pipeline. Install the wheel, or run "
        "from a complete checkout."
    )


def run_demo(
    preset: str = "w4a8",
    folder: str | Path = "diffuse_compress_demo",
    prompts: Sequence[str] = PROMPTS,
    *,
    seed: int = 0,
    device: str | None = None,
    model: Path | None = None,
    call: dict[str, Any] | None = None,
    say: Callable[[str], object] = print,
) -> Path:
    """Load, plan, compress, generate before and after, report, save, reload and compare; returns the report's path.

    Args:
        preset: for the denoiser.
        folder: gets ``report.html`` and the compressed pipeline in ``pipeline/``.
        prompts: pictures to generate.
        seed: of the first picture; each prompt has its own.
        device: where to run; the CPU if None.
        model: another pipeline than the packaged one.
        call: its arguments.
        say: called with every line of text.

    Raises:
        ConfigError: unknown preset; no demo model.
        RuntimeError: the reloaded pipeline does not give the same picture.
    """
    from diffusers import DiffusionPipeline

    source, folder, arguments = model or demo_model_path(), Path(folder), CALL if call is None else call
    pipe = DiffusionPipeline.from_pretrained(source, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe if device is None else pipe.to(device)
    parameters = sum(p.numel() for part in model_components(pipe).values() for p in part.parameters())
    origin = _SOURCE if model is None else "as given"
    say(f"Model: {type(pipe).__name__}, {format_count(parameters)} parameters, {origin}.")
    say(f"       {source}; nothing is downloaded.\n")

    plan = compression_plan(pipe, preset)
    say(f"pipe.compression_plan({preset!r})\n{plan}\n")
    say(f"pipe.compress({preset!r}), with {len(prompts)} pictures before and after ...")
    preview = [{"prompt": prompt, "generator": seeded(seed + i), **arguments} for i, prompt in enumerate(prompts)]
    compress(pipe, plan, preview=preview)
    report = compression_report(pipe)
    say(f"\npipe.compression_report()\n{report}\n")

    saved, page = folder / "pipeline", folder / "report.html"
    pipe.save_pretrained(saved)
    report.save(page)
    again = DiffusionPipeline.from_pretrained(saved)
    again.set_progress_bar_config(disable=True)
    again = again if device is None else again.to(device)
    expected, found = (_pixels(p, {"prompt": prompts[0], **arguments}, seed) for p in (pipe, again))
    if not torch.equal(expected, found):
        raise RuntimeError("demo: the reloaded pipeline gives another picture. Please report this.")
    say("Reloaded with plain DiffusionPipeline.from_pretrained: the picture is bit-identical.\n")
    say(f"Pictures and layers: {page}")
    say(f"Compressed pipeline: {saved}")
    return page


def _pixels(pipe: Any, arguments: dict[str, Any], seed: int) -> torch.Tensor:
    return pipe(**arguments, generator=seeded(seed), output_type="pt").images
