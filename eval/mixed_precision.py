"""Mixed precision against one format for all layers at equal bytes, on two small trained models: docs/calibration.md.

    python eval/mixed_precision.py            # about an hour with one thread; prints the table in markdown
    python eval/mixed_precision.py --models pixart --algorithms GPTQ --seeds 0 1

Each uniform format sets a size; the search gets that size, the formats of "w4a16" and the calibration samples, from
which a report is measured for each algorithm. Both are calibrated on the same samples and judged on others. Of
emoji_pixart: relative error of the denoiser's output over the steps of the loop. Of python_llama: perplexity on the
second half of its held-out text. Calibration is drawn anew for each seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

import diffuse_compress as dc
from diffuse_compress.demo import CALL

MODELS = Path(__file__).resolve().parent.parent / "examples" / "reference_models"
LLAMA = MODELS / "python_llama"
ALGORITHMS: dict[str, Any] = {"rounding": dc.RTNConfig(), "GPTQ": dc.GPTQConfig()}
SIZES = {"3 bits, groups of 128": (3, 128), "4 bits, groups of 128": (4, 128), "4 bits, groups of 32": (4, 32)}
WINDOW = 512


def uniform(bits: int, group_size: int) -> dc.Scheme:
    """Asymmetric, weights only."""
    weights = dc.WeightScheme(dc.NumberFormat(f"int{bits}"), dc.PerGroup(group_size, pad=True), symmetric=False)
    return dc.Scheme(weights)


class Pixart:
    """emoji_pixart: relative error (percent) of the denoiser on calls that calibration has not seen."""

    name, unit = "emoji_pixart", "error of the output, %"

    def __init__(self) -> None:
        self.prompts = [line for line in (MODELS / self.name / "eval_prompts.txt").read_text().splitlines() if line]
        dense = self.load()
        self.fresh = dc.Calibration.record(dense, self.prompts[-16:], num_samples=32, seed=100, **CALL)
        self.expected = self._outputs(dense)

    def load(self) -> Any:
        pipe = DiffusionPipeline.from_pretrained(MODELS / self.name)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def calibration(self, seed: int) -> dc.Calibration:
        prompts = self.prompts[8 * seed : 8 * seed + 8]
        return dc.Calibration.record(self.load(), prompts, num_samples=16, seed=seed, **CALL)

    def score(self, pipe: Any) -> float:
        pairs = zip(self.expected, self._outputs(pipe), strict=True)
        squared = [float((y - found).square().sum() / y.square().sum()) for y, found in pairs]
        return 100 * statistics.mean(squared) ** 0.5

    @torch.no_grad()
    def _outputs(self, pipe: Any) -> list[torch.Tensor]:
        calls = self.fresh.of("transformer")
        return [sample.call.run(pipe.transformer)[0].double() for sample in calls]


class Llama:
    """python_llama: perplexity a token."""

    name, unit = "python_llama", "perplexity"

    def __init__(self) -> None:
        text = (LLAMA / "heldout.txt").read_text(encoding="utf-8")
        tokens = torch.tensor(AutoTokenizer.from_pretrained(LLAMA)(text, verbose=False).input_ids)
        self.windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()

    def calibration(self, seed: int) -> dc.Calibration:
        half = len(self.windows) // 2
        chosen = torch.randperm(half, generator=torch.Generator().manual_seed(seed))[:16]
        return dc.Calibration.record(self.load(), [self.windows[i][None] for i in chosen])

    @torch.no_grad()
    def score(self, model: Any) -> float:
        nats = []
        for rows in self.windows[len(self.windows) // 2 :].split(8):
            logits = model(rows, use_cache=False).logits
            nats.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none"))
        return float(torch.cat(nats).double().mean().exp())


def measured(
    model: Pixart | Llama, seeds: Iterable[int], algorithms: Iterable[str], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row for each size and algorithm: bytes and scores of both, by seed."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for seed in seeds:
        calibration = model.calibration(seed)
        for label in algorithms:
            algorithm, started = ALGORITHMS[label], time.monotonic()
            report = dc.sensitivity(model.load(), calibration=calibration, algorithm=algorithm)
            say(f"{model.name}, seed {seed}, {label}: sensitivity in {time.monotonic() - started:.0f} s")
            given = {"calibration": calibration} if algorithm.needs_calibration else {}
            for size, (bits, group_size) in SIZES.items():
                one, mixed = model.load(), model.load()
                plan = dc.compression_plan(one, dc.QuantizationConfig(uniform(bits, group_size), algorithm), **given)
                own = dc.compression_plan(
                    mixed,
                    "w4a16",
                    algorithm=algorithm,
                    target_size=plan.bytes_after,
                    sensitivity=report,
                    calibration=calibration,
                )
                row = rows.setdefault(
                    (size, label),
                    {"model": model.name, "size": size, "algorithm": label, "uniform": [], "mixed": [], "bytes": []},
                )
                dc.compress(one, plan, measure=False)
                dc.compress(mixed, own, measure=False)
                row["bytes"].append([plan.bytes_after, own.bytes_after])
                row["uniform"].append(model.score(one))
                row["mixed"].append(model.score(mixed))
                say(f"  {size}, {label}: {row['uniform'][-1]:.3f} -> {row['mixed'][-1]:.3f} ({own.search})")
    return list(rows.values())


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=("pixart", "llama"), default=["pixart", "llama"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="two or more, for a deviation")
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every number as JSON")
    args = parser.parse_args()
    found = []
    for name in args.models:
        model = {"pixart": Pixart, "llama": Llama}[name]()
        print(f"{model.name}, dense: {model.score(model.load()):.3f} ({model.unit})", flush=True)
        found += measured(model, args.seeds, args.algorithms, lambda line: print(line, flush=True))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("| model | bytes of | algorithm | uniform | mixed |\n|---|---|---|---|---|")
    for row in found:
        cells = [f"{statistics.mean(row[k]):.2f} ± {_deviation(row[k]):.2f}" for k in ("uniform", "mixed")]
        print(f"| {row['model']} | {row['size']} | {row['algorithm']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
