"""Feature extraction for FID beside pytorch-fid's own loop on the same folder, on a GPU.

    python eval/fid_throughput.py --count 8192 --size 256                  # makes a folder of noise pictures first

Both run the Inception network with the same weights, random ones where the published file is absent: the time does not
depend on them, and the two distances must agree to 1e-3. Prints one JSON line. Needs pytorch-fid and torchvision.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffuse_compress.evaluation.environment import device_name
from diffuse_compress.evaluation.features import InceptionExtractor, default_workers, extract_features
from diffuse_compress.evaluation.frechet import GaussianStatistics, feature_statistics, frechet_distance
from diffuse_compress.evaluation.inception import WEIGHTS_FILE
from diffuse_compress.evaluation.samples import open_pictures


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8192, help="pictures")
    parser.add_argument("--size", type=int, default=256, help="their side")
    parser.add_argument("--batch-size", type=int, default=64, help="ours; pytorch-fid runs with its default of 50")
    parser.add_argument("--weights", type=Path, help="the file; random weights without it")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(arguments)


def write_picture(task: tuple[Path, int, int]) -> None:
    """A smooth random picture with some noise, as PNG."""
    from PIL import Image

    path, seed, size = task
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray((generator.random((8, 8, 3)) * 255).astype(np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)
    noisy = smooth + generator.normal(0, 4, smooth.shape)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)


def random_weights(path: Path) -> Path:
    """A weight file of random numbers that keep the signal's size."""
    module = importlib.import_module("pytorch_fid.inception")
    # pytorch-fid makes its network only with the weights it downloads: none are loaded meanwhile.
    module.load_state_dict_from_url = lambda *args, **kwargs: {}
    load = torch.nn.Module.load_state_dict
    torch.nn.Module.load_state_dict = lambda self, state, *a, **k: load(self, state, *a, **k) if state else None  # type: ignore[method-assign,assignment]
    network = module.fid_inception_v3()
    torch.nn.Module.load_state_dict = load  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return path


def time_theirs(files: list[Path], device: str) -> tuple[float, Any]:
    """Seconds and activations of pytorch-fid's loop with its defaults."""
    from pytorch_fid.fid_score import get_activations
    from pytorch_fid.inception import InceptionV3

    model = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).to(device)
    workers = min(8, len(os.sched_getaffinity(0)))
    get_activations(files[:100], model, 50, 2048, device, workers)
    started = time.perf_counter()
    found = get_activations(files, model, 50, 2048, device, workers)
    return time.perf_counter() - started, found


def time_ours(folder: Path, weights: Path, options: argparse.Namespace) -> tuple[float, torch.Tensor]:
    """Seconds and features of ours."""
    extractor = InceptionExtractor(weights=weights, device=options.device)
    extract_features(open_pictures(folder, limit=100), extractor, batch_size=options.batch_size)
    started = time.perf_counter()
    found = extract_features(open_pictures(folder), extractor, batch_size=options.batch_size)["features"].cpu()
    return time.perf_counter() - started, found


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder, hub = Path(temporary) / "pictures", Path(temporary) / "hub"
        folder.mkdir()
        tasks = [(folder / f"{i:06d}.png", i, options.size) for i in range(options.count)]
        with ProcessPoolExecutor() as pool:
            list(pool.map(write_picture, tasks, chunksize=64))
        weights = options.weights or random_weights(hub / "checkpoints" / WEIGHTS_FILE)
        inception = importlib.reload(importlib.import_module("pytorch_fid.inception"))
        inception.load_state_dict_from_url = lambda *args, **kwargs: torch.load(weights, map_location="cpu")
        ours, features = time_ours(folder, weights, options)
        theirs, activations = time_theirs([path for path, *_ in tasks], options.device)
        again, _ = time_ours(folder, weights, options)
        half = options.count // 2
        distances = []
        for found in (features.double(), torch.from_numpy(activations).double()):
            sides: list[GaussianStatistics] = [feature_statistics(part) for part in (found[:half], found[half:])]
            distances.append(frechet_distance(*sides))
    print(
        json.dumps(
            {
                "pictures": options.count,
                "size": options.size,
                "device": device_name(options.device),
                "cores": len(os.sched_getaffinity(0)),
                "torch": torch.__version__,
                "weights": "random" if options.weights is None else options.weights.name,
                "ours_per_second": round(options.count / min(ours, again), 1),
                "ours_workers": default_workers(torch.device(options.device)),
                "pytorch_fid_per_second": round(options.count / theirs, 1),
                "ratio": round(theirs / min(ours, again), 3),
                "frechet_of_halves_ours": distances[0],
                "frechet_of_halves_pytorch_fid_features": distances[1],
                "largest_relative_feature_difference": float(
                    (features - torch.from_numpy(activations)).abs().max() / np.abs(activations).max()
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
