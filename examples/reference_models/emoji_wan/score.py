"""How many generated clips show the emoji and the motion that they were asked for.

python score.py                                   # the prompts of eval_prompts.txt
python score.py --steps 20 --guidance 3 --seed 1 --count 32 --grid /tmp/grid.png
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from clips import find_motions, split_caption
from training.common import save_grid
from training.scoring import load_for_score, score_parser

FOLDER = Path(__file__).resolve().parent

# What the model card recommends. The size and the number of tokens are those of the training: the
# cross-attention also sees the padding, so that another length is another input.
DEFAULTS = {
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
}


@dataclass
class Verdict:
    """Shares of clips, in [0, 1]: the frame's emoji is named first (or among the first five), averaged
    over all frames; the motion is right; both are, the emoji by the frames' mean logits."""

    top1: float
    top5: float
    motion: float
    both: float

    def __str__(self) -> str:
        return f"top-1 {self.top1:.4f} top-5 {self.top5:.4f} motion {self.motion:.4f} both {self.both:.4f}"


def judge(classifier, clips: torch.Tensor, prompts: list[str]) -> Verdict:
    """Args: classifier: of emoji_pixart. clips: [n, frames, 3, 64, 64] in [0, 1]. prompts: n of `clips.caption`."""
    names, motions = zip(*map(split_caption, prompts), strict=True)
    logits = classifier.classify(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
    labels = torch.tensor([classifier.captions.index(name) for name in names])
    hits = logits.topk(5).indices == labels[:, None, None]
    moved = torch.tensor([found == asked for found, asked in zip(find_motions(clips), motions, strict=True)])
    named = logits.mean(1).argmax(1) == labels
    shares = (hits[..., 0], hits.any(-1), moved, moved & named)
    return Verdict(*(share.float().mean().item() for share in shares))


def noise(pipe, count: int, seed: int) -> torch.Tensor:
    """Starting latents, fp32 on the CPU: independent of batch size and device."""
    shape = (
        count,
        pipe.transformer.config.in_channels,
        (DEFAULTS["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1,
        DEFAULTS["height"] // pipe.vae_scale_factor_spatial,
        DEFAULTS["width"] // pipe.vae_scale_factor_spatial,
    )
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generate(pipe, prompts: list[str], seed: int = 0, batch_size: int = 16, **options) -> torch.Tensor:
    """Clips [n, 9, 3, 64, 64] in [0, 1] on the CPU. options: of the pipeline, over `DEFAULTS`."""
    latents = noise(pipe, len(prompts), seed)
    clips = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        output = pipe(prompts[part], latents=latents[part].to(pipe.device), output_type="pt", **{**DEFAULTS, **options})
        clips.append(output.frames.float().cpu())
    return torch.cat(clips)


def main() -> None:
    steps, guidance = DEFAULTS["num_inference_steps"], DEFAULTS["guidance_scale"]
    parser = score_parser(__doc__.split("\n")[0], FOLDER, steps, guidance)
    parser.add_argument("--prompts", type=Path, default=FOLDER / "eval_prompts.txt")
    args = parser.parse_args()

    pipe, classifier = load_for_score(args)
    prompts = args.prompts.read_text().splitlines()[: args.count]
    start = time.monotonic()
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    clips = generate(pipe, prompts, seed=args.seed, **options)
    seconds = time.monotonic() - start
    print(
        f"{len(clips)} clips, {args.steps} steps, guidance {args.guidance}, seed {args.seed}, "
        f"{args.dtype} on {args.device}: {judge(classifier, clips, prompts)} ({seconds:.0f} s)"
    )
    if args.grid:
        # A row of frames for each clip.
        save_grid(clips.flatten(0, 1) * 2 - 1, args.grid, columns=clips.shape[1])


if __name__ == "__main__":
    main()
