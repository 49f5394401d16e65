"""From a trained model to a pipeline folder."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn
from training.trainer import Trainer

SHARED_VAE_LINK = {"vae": "../emoji_pixart/vae"}


def averaged(trainer: Trainer, *names: str) -> list[nn.Module]:
    """Copies of these parts of the trainer's model, with averaged weights, in eval mode."""
    trainer.average.swap()
    copies = [copy.deepcopy(getattr(trainer.model, name)).eval() for name in names]
    trainer.average.swap()
    return [module.to(memory_format=torch.contiguous_format) for module in copies]


def save_in_half(pipe: DiffusionPipeline, folder: Path, linked: dict[str, str] | None = None) -> None:
    """Write a pipeline in fp16 with `save_pretrained`.

    Args:
        pipe: its modules are rounded to fp16 in place.
        folder: of the pipeline; what else it holds stays.
        linked: components that are those of another folder, and the links to write in their place.
    """
    linked = linked or {}
    for name in linked:
        # Through a link, the other folder's files would be written.
        if (folder / name).is_symlink():
            (folder / name).unlink()
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.half()
    pipe.save_pretrained(folder)
    for name, target in linked.items():
        shutil.rmtree(folder / name)
        (folder / name).symlink_to(target)
    config = folder / "text_encoder" / "config.json"
    if config.exists():
        # transformers loads the recorded dtype when asked for none, diffusers loads fp32: a text
        # encoder recorded as fp16 would meet an fp32 denoiser in a plain from_pretrained.
        content = json.loads(config.read_text()) | {"dtype": "float32"}
        config.write_text(json.dumps(content, indent=2) + "\n")
    if (folder / "tokenizer" / "tokenizer.json").exists():
        compact(folder / "tokenizer" / "tokenizer.json")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def compact(path: Path) -> None:
    """Rewrite a JSON file without its indentation: half of a word list's bytes."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
