"""How near generated faces come to drawn ones, as the emoji classifier sees them.

python score.py                                         # 512 pictures
python score.py --steps 50 --seed 1 --grid /tmp/grid.png
python score.py --baselines --data glyphs.npz           # what drawn faces, blurred ones and noise reach
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.scoring import load_for_score, picture_generators, report_score, score_parser

FOLDER = Path(__file__).resolve().parent

STEPS, COUNT = 20, 512
# Nine drawn faces of ten are named with more confidence, and few pictures of noise.
CONFIDENCE = 0.5
STATISTICS_FILE = "drawn_faces.safetensors"


@dataclass
class Verdict:
    """Attributes:
    named: share of pictures, in [0, 1], that the classifier takes for a face with confidence.
    distinct: how many different faces it names among those.
    distance: Fréchet distance of the pictures' embeddings to those of drawn faces.
    """

    named: float
    distinct: int
    distance: float

    def __str__(self) -> str:
        return f"named {self.named:.4f} distinct {self.distinct} Fréchet distance {self.distance:.3f}"


def enlarge(pictures: torch.Tensor) -> torch.Tensor:
    """[n, 3, 32, 32] to the classifier's [n, 3, 64, 64], both in [0, 1]."""
    return F.interpolate(pictures, scale_factor=2, mode="bicubic").clamp(0, 1)


def feature_statistics(classifier, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean [64] and covariance [64, 64] of the embeddings of pictures [n, 3, 32, 32] in [0, 1]."""
    embeddings = classifier.embeddings(enlarge(pictures))
    return {"mean": embeddings.mean(0), "covariance": embeddings.T.cov()}


def frechet_distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Between two normal distributions (Heusel et al. 2017, arXiv 1706.08500, eq. 6)."""
    shift = (first["mean"] - second["mean"]).double().square().sum()
    one, other = first["covariance"].double(), second["covariance"].double()
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The trace of (one @ other)^(1/2), from a symmetric matrix with the same eigenvalues.
    shared = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    return (shift + one.trace() + other.trace() - 2 * shared).item()


def judge(classifier, pictures: torch.Tensor, faces: list[str], statistics: dict[str, torch.Tensor]) -> Verdict:
    """Args: classifier: of emoji_pixart. pictures: [n, 3, 32, 32] in [0, 1]. statistics: of drawn faces."""
    confidence, best = classifier.classify(enlarge(pictures)).softmax(1).max(1)
    rows = torch.tensor([classifier.captions.index(face) for face in faces])
    sure = (confidence >= CONFIDENCE) & torch.isin(best, rows)
    distance = frechet_distance(feature_statistics(classifier, pictures), statistics)
    return Verdict(sure.float().mean().item(), len(best[sure].unique()), distance)


@torch.no_grad()
def generate(pipe, count: int, seed: int = 0, batch_size: int = 64, steps: int = STEPS) -> torch.Tensor:
    """Pictures [n, 3, 32, 32] in [0, 1] on the CPU."""
    pictures = []
    for start in range(0, count, batch_size):
        generators = picture_generators(seed, start, min(batch_size, count - start))
        output = pipe(batch_size=len(generators), generator=generators, num_inference_steps=steps, output_type="pt")
        pictures.append(output.images.float().cpu())
    return torch.cat(pictures)


def drawn_faces(glyphs: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Augmented faces [count, 3, 32, 32] in [0, 1]. glyphs: [n, 3, 128, 128] uint8, on the CPU."""
    from model import draw_pictures

    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(glyphs), (count,), generator=generator)
    parts = [draw_pictures(glyphs[part], generator) for part in rows.split(256)]
    return (torch.cat(parts) + 1) / 2


def save_statistics(classifier, glyphs: torch.Tensor, folder: Path, count: int = 8192) -> dict[str, torch.Tensor]:
    """Write what pictures are compared to, so that a score needs no font."""
    statistics = feature_statistics(classifier, drawn_faces(glyphs, count, seed=1))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(statistics, folder / STATISTICS_FILE)
    return statistics


def print_baselines(classifier, glyphs: torch.Tensor, faces: list[str], statistics: dict, count: int) -> None:
    """The verdict on pictures that no model made."""
    drawn = drawn_faces(glyphs, count, seed=2)
    noise = torch.rand(drawn.shape, generator=torch.Generator().manual_seed(2))
    baselines = {
        "drawn faces, other augmentations": drawn,
        "the same, blurred over 3 x 3 pixels": F.avg_pool2d(F.pad(drawn, (1, 1, 1, 1), mode="replicate"), 3, stride=1),
        "the same, averaged in pairs": (drawn + drawn.roll(1, 0)) / 2,
        "the same, with noise of 0.1": (drawn + 0.2 * (noise - 0.5) * 3**0.5).clamp(0, 1),
        "noise": noise,
    }
    for name, pictures in baselines.items():
        print(f"{name}: {judge(classifier, pictures, faces, statistics)}")


def main() -> None:
    parser = score_parser(__doc__.split("\n")[0], FOLDER, STEPS)
    parser.add_argument("--baselines", action="store_true", help="judge drawn pictures and noise instead")
    parser.add_argument("--data", type=Path, help="baselines: glyphs as .npz, drawn when missing")
    args = parser.parse_args()

    pipe, classifier = load_for_score(args)
    faces = (FOLDER / "faces.txt").read_text().splitlines()
    statistics = load_file(FOLDER / STATISTICS_FILE)
    count = args.count or COUNT
    if args.baselines:
        from training.glyphs import load_dataset

        glyphs, captions = load_dataset(args.data)
        glyphs = glyphs[[captions.index(face) for face in faces]]
        print_baselines(classifier, glyphs, faces, statistics, count)
        return
    start = time.monotonic()
    pictures = generate(pipe, count, seed=args.seed, steps=args.steps)
    verdict = judge(classifier, pictures, faces, statistics)
    report_score(args, pictures, str(verdict), time.monotonic() - start)


if __name__ == "__main__":
    main()
