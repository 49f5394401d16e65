"""How many generated pictures the classifier names as they were asked for.

python score.py                                   # the 256 prompts of eval_prompts.txt
python score.py --steps 20 --guidance 1.5 --seed 1 --grid /tmp/grid.png
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.scoring import accuracy_text, draw_prompts, load_for_score, report_score, score_parser

FOLDER = Path(__file__).resolve().parent

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


def generate(pipe, prompts: list[str], seed: int = 0, batch_size: int = 32, **options) -> torch.Tensor:
    """Pictures [n, 3, 64, 64] in [0, 1] on the CPU. options: of the pipeline, over `DEFAULTS`."""
    return draw_prompts(pipe, pipe.transformer, prompts, {**DEFAULTS, **options}, seed, batch_size)


def main() -> None:
    steps, guidance = DEFAULTS["num_inference_steps"], DEFAULTS["guidance_scale"]
    parser = score_parser(__doc__.split("\n")[0], FOLDER, steps, guidance)
    parser.add_argument("--prompts", type=Path, default=FOLDER / "eval_prompts.txt")
    args = parser.parse_args()

    pipe, classifier = load_for_score(args)
    prompts = read_prompts(args.prompts)[: args.count]
    start = time.monotonic()
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    pictures = generate(pipe, prompts, seed=args.seed, **options)
    report_score(args, pictures, accuracy_text(classifier, pictures, prompts), time.monotonic() - start)


if __name__ == "__main__":
    main()
