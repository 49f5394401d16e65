"""How many generated pictures the classifier names as they were asked for.

python score.py                                   # the 256 evaluation prompts of emoji_pixart
python score.py --steps 20 --guidance 1 --seed 1 --grid /tmp/grid.png
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.scoring import accuracy_text, draw_prompts, load_for_score, report_score, score_parser

FOLDER = Path(__file__).resolve().parent
PROMPTS = FOLDER.parent / "emoji_pixart" / "eval_prompts.txt"

# What the model card recommends.
DEFAULTS = {"num_inference_steps": 20, "guidance_scale": 3.0}


def generate(pipe, prompts: list[str], seed: int = 0, batch_size: int = 32, **options) -> torch.Tensor:
    """Pictures [n, 3, 64, 64] in [0, 1] on the CPU. options: of the pipeline, over `DEFAULTS`."""
    return draw_prompts(pipe, pipe.unet, prompts, {**DEFAULTS, **options}, seed, batch_size)


def main() -> None:
    steps, guidance = DEFAULTS["num_inference_steps"], DEFAULTS["guidance_scale"]
    parser = score_parser(__doc__.split("\n")[0], FOLDER, steps, guidance)
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    args = parser.parse_args()

    pipe, classifier = load_for_score(args)
    prompts = args.prompts.read_text().splitlines()[: args.count]
    start = time.monotonic()
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    pictures = generate(pipe, prompts, seed=args.seed, **options)
    report_score(args, pictures, accuracy_text(classifier, pictures, prompts), time.monotonic() - start)


if __name__ == "__main__":
    main()
