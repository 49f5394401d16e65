"""Algorithms that keep outliers in higher precision, on the reference language model; see docs/calibration.md.

    python eval/kept_outliers.py --model examples/reference_models/python_llama --out kept.json

Each arm compresses a fresh float32 model, as it is and with outlier channels of the same function
(``diffuse_compress.evaluation.outliers``), calibrated on texts of the standard library, and is judged by its perplexity
on held-out text (texts and measure of ``four_bits.py``). Bits are those of the layers that are converted, as they
would be in bfloat16. Results are written after each arm, and arms that the file has already are not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from four_bits import Text

import diffuse_compress as dc
from diffuse_compress.evaluation.environment import command_line, device_name
from diffuse_compress.integrations.component import quantized_layers, weight_elements

W3 = dc.Scheme(dc.WeightScheme("int3", dc.PerGroup(128, pad=True), symmetric=False))
W3_SMALL = dc.Scheme(dc.WeightScheme("int3", dc.PerGroup(32, pad=True), symmetric=False))
ARMS: dict[str, tuple[Any, Any]] = {
    "dense": (None, None),
    "w8a8, RTN": ("w8a8", dc.RTNConfig()),
    "w8a8, RTN (minmax)": ("w8a8", dc.RTNConfig(observer="minmax")),
    "w8a8, LLM.int8": ("w8a8", dc.LLMInt8Config()),
    "w8a8, QUIK": ("w8a8", dc.QUIKConfig()),
    "w4a4, RTN": ("w4a4", dc.RTNConfig()),
    "w4a4, GPTQ": ("w4a4", dc.GPTQConfig()),
    "w4a4, QUIK, 4 bits everywhere": ("w4a4", dc.QUIKConfig(sensitive_bits=None)),
    "w4a4, QUIK": ("w4a4", dc.QUIKConfig()),
    "3 bits, RTN": (W3, dc.RTNConfig()),
    "3 bits, GPTQ": (W3, dc.GPTQConfig()),
    "3 bits, groups of 32, GPTQ": (W3_SMALL, dc.GPTQConfig()),
    "3 bits, OWQ, 0.1 bits": (W3, dc.OWQConfig()),
    "3 bits, OWQ, 0.5 bits": (W3, dc.OWQConfig(extra_bits=0.5)),
    "3 bits, SpQR without outliers": (W3, dc.SpQRConfig(max_share=0)),
    "3 bits, SpQR": (W3, dc.SpQRConfig()),
    "4 bits, RTN": ("w4a16", dc.RTNConfig()),
    "4 bits, GPTQ": ("w4a16", dc.GPTQConfig()),
    "4 bits, OWQ, 0.1 bits": ("w4a16", dc.OWQConfig()),
    "4 bits, SpQR": ("w4a16", dc.SpQRConfig()),
}


def run_arm(case: Text, name: str) -> dict[str, float]:
    """Compress a fresh model and judge it."""
    model, (scheme, algorithm) = case.target(), ARMS[name]
    started = time.perf_counter()
    if scheme is None:
        return case.judge(model)
    given = {"calibration": case.calibration(model)} if algorithm.needs_calibration else {}
    dc.compress(model, dc.QuantizationConfig(scheme, algorithm=algorithm), measure=False, **given)
    seconds = time.perf_counter() - started
    found = case.judge(model)
    layers = quantized_layers(model).values()
    wide = ("bias", "dense_weight", "outlier_values")
    size = sum(
        tensor.numel() * (2 if name in wide else tensor.element_size())
        for layer in layers
        for name, tensor in layer.named_parameters(recurse=False)
        if name != "bias"
    )
    outliers = sum(layer.outlier_values.numel() for layer in layers if layer.outlier_values is not None)
    elements = sum(map(weight_elements, layers))
    return {**found, "bits": 8 * size / elements, "outliers": outliers / elements, "seconds": round(seconds, 2)}


def table(results: dict[str, Any]) -> str:
    """Mean over the seeds, lowest and highest in brackets."""
    lines = ["| | perplexity | with outlier channels | bits per weight | s |", "|---|---|---|---|---|"]
    for name in ARMS:
        by_kind = [
            [arm for key, arm in results["arms"].items() if key.rsplit("/", 1)[0] == f"{name}/{kind}"]
            for kind in ("plain", "outliers")
        ]
        if not by_kind[1]:
            continue
        cells = []
        for found in by_kind:
            values = [arm["perplexity"] for arm in found]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})" if values else "-")
        bits = statistics.mean(arm.get("bits", 0) for arm in by_kind[1])
        seconds = statistics.mean(arm.get("seconds", 0) for arm in by_kind[1])
        lines.append(f"| {name} | {' | '.join(cells)} | {bits:.2f} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with heldout.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS))
    parser.add_argument("--kinds", nargs="+", choices=["plain", "outliers"], default=["plain", "outliers"])
    options = parser.parse_args()
    results: dict[str, Any] = {
        "command": command_line("python eval/kept_outliers.py", ["--model", str(options.model)]),
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "arms": {},
    }
    if options.out.exists():
        results["arms"] = json.loads(options.out.read_text(encoding="utf-8"))["arms"]
    for seed in range(options.seeds):
        for kind in options.kinds:
            case = Text(options.model, seed, kind == "outliers")
            for name in options.arms or ARMS:
                key = f"{name}/{kind}/{seed}"
                if key not in results["arms"]:
                    results["arms"][key] = run_arm(case, name)
                    options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
