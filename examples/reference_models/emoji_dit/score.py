"""How many generated pictures the classifier names as the class they were asked for.

python score.py                                   # 256 classes
python score.py --count 1000 --guidance 3 --seed 1 --grid /tmp/grid.png
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.scoring import (
    accuracy_text,
    load_for_score,
    picture_generators,
    report_score,
    score_parser,
)

FOLDER = Path(__file__).resolve().parent

# What the model card recommends.
DEFAULTS = {"num_inference_steps": 20, "guidance_scale": 2.0}
COUNT = 256


def evaluation_labels(pipe, count: int | None = COUNT) -> list[str]:
    """The first ``count`` class names of a shuffle with seed 0; all for None."""
    names = sorted(pipe.labels, key=pipe.labels.get)
    random.Random(0).shuffle(names)
    return names[:count]


@torch.no_grad()
def generate(pipe, names: list[str], seed: int = 0, batch_size: int = 32, **options) -> torch.Tensor:
    """Pictures [n, 3, 64, 64] in [0, 1] on the CPU. options: of the pipeline, over `DEFAULTS`."""
    pictures = []
    for start in range(0, len(names), batch_size):
        labels = pipe.get_label_ids(names[start : start + batch_size])
        generators = picture_generators(seed, start, len(labels))
        output = pipe(labels, generator=generators, output_type="pt", **{**DEFAULTS, **options})
        pictures.append(output.images.float().cpu())
    return torch.cat(pictures)


def main() -> None:
    steps, guidance = DEFAULTS["num_inference_steps"], DEFAULTS["guidance_scale"]
    args = score_parser(__doc__.split("\n")[0], FOLDER, steps, guidance).parse_args()

    pipe, classifier = load_for_score(args)
    names = evaluation_labels(pipe, args.count or COUNT)
    start = time.monotonic()
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    pictures = generate(pipe, names, seed=args.seed, **options)
    report_score(args, pictures, accuracy_text(classifier, pictures, names), time.monotonic() - start)


if __name__ == "__main__":
    main()
