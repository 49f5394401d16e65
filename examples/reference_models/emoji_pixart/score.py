"""How many generated pictures the classifier names as they were asked for.

python score.py                                   # the 256 prompts of eval_prompts.txt
python score.py --steps 20 --guidance 1.5 --seed 1 --grid /tmp/grid.png
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
sys.path.insert(0, str(FOLDER))

from classifier import load_classifier  # noqa: E402

# What the model card recommends. Binning is off because diffusers only bins to pictures of 256
# pixels and more; 24 tokens hold every caption, and padding to the default 120 costs time only.
DEFAULTS = {
    "num_inference_steps": 20,
    "guidance_scale": 2.0,
    "use_resolution_binning": False,
    "clean_caption": False,
    "max_sequence_length": 24,
}


def read_prompts(path: Path = FOLDER / "eval_prompts.txt") -> list[str]:
    """One prompt a line."""
    return Path(path).read_text().splitlines()


def noise(pipe, prompts: list[str], seed: int) -> torch.Tensor:
    """Starting latents [n, 4, 16, 16], fp32 on the CPU: independent of batch size and device."""
    size = pipe.transformer.config.sample_size
    shape = (len(prompts), pipe.transformer.config.in_channels, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generate(pipe, prompts: list[str], seed: int = 0, batch_size: int = 32, **options):
    """Pictures [n, 3, 64, 64] in [0, 1] on the CPU. options: of the pipeline, over `DEFAULTS`."""
    latents = noise(pipe, prompts, seed)
    pictures = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        output = pipe(
            prompts[part],
            latents=latents[part].to(pipe.device, pipe.transformer.dtype),
            output_type="pt",
            **{**DEFAULTS, **options},
        )
        pictures.append(output.images.float().cpu())
    return torch.cat(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--prompts", type=Path, default=FOLDER / "eval_prompts.txt")
    parser.add_argument("--count", type=int, default=None, help="use the first COUNT prompts only")
    parser.add_argument("--steps", type=int, default=DEFAULTS["num_inference_steps"])
    parser.add_argument("--guidance", type=float, default=DEFAULTS["guidance_scale"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--grid", type=Path, help="write the pictures there as one PNG")
    args = parser.parse_args()

    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    pipe.to(args.device).set_progress_bar_config(disable=True)
    classifier = load_classifier(args.model)
    prompts = read_prompts(args.prompts)[: args.count]
    start = time.monotonic()
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    pictures = generate(pipe, prompts, seed=args.seed, **options)
    seconds = time.monotonic() - start
    top1, top5 = (classifier.accuracy(pictures, prompts, k) for k in (1, 5))
    print(
        f"{len(prompts)} prompts, {args.steps} steps, guidance {args.guidance}, seed {args.seed}, "
        f"{args.dtype} on {args.device}: top-1 {top1:.4f} top-5 {top5:.4f} ({seconds:.0f} s)"
    )
    if args.grid:
        from training.common import save_grid

        save_grid(pictures * 2 - 1, args.grid)


if __name__ == "__main__":
    main()
