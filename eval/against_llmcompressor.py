"""GPTQ and AWQ beside llm-compressor: same model, tokens and scheme, one thread; the command of docs/calibration.md.

    python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python eval/against_llmcompressor.py --peer peer/bin/python --out found.json
    python eval/against_llmcompressor.py --table found.json

The model is python_llama in float32, the scheme symmetric int4 in groups of 128 with scales of amax / 7.5, for every
linear of its layers. Calibration data are sequences of this Python's standard library, drawn anew for each seed,
without files that are in the held-out text. Each library runs in a process and an environment of its own, and gives
back the dense weights that it rounded to; this package's scorer judges both. Seconds are CPU time, of one
thread, of the calls that calibrate (``oneshot``; ``record`` and ``compress``), without imports, loading and saving.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

# What only one of the two environments has is imported where it is used.
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = Path(__file__).resolve().parent.parent / "examples" / "reference_models" / "python_llama"
LENGTH, GROUP = 512, 128
ARMS = {
    "rounding": "rounding",
    "GPTQ": "GPTQ, ranges by minimum and maximum",
    "GPTQ-mse": "GPTQ, ranges by the library's own search",
    "GPTQ-default": "`GPTQConfig()` (the same, layers of a block one after the other)",
    "AWQ": "AWQ, scales only",
    "AWQ-default": "`AWQConfig()` (scales and clipping)",
}
"""What is compared; what is not in ``PEER_ARMS`` are this package's own defaults, run by it alone."""
PEER_ARMS = ("rounding", "GPTQ", "GPTQ-mse", "AWQ")


def calibration_tokens(seed: int, samples: int) -> torch.Tensor:
    """[samples, LENGTH] int64: one run of tokens of each chosen file."""
    held_out = set((MODEL / "heldout.txt").read_text(encoding="utf-8").splitlines())
    tokenizer, rows = AutoTokenizer.from_pretrained(MODEL), []
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    draw = random.Random(seed)
    draw.shuffle(files)
    for file in files:
        text = file.read_text(encoding="utf-8")
        lines = {line for line in text.splitlines() if len(line) > 30}
        tokens = tokenizer(text, verbose=False).input_ids
        if len(tokens) < LENGTH or len(lines & held_out) > 0.1 * len(lines):
            continue
        start = draw.randrange(len(tokens) - LENGTH + 1)
        rows.append(tokens[start : start + LENGTH])
        if len(rows) == samples:
            return torch.tensor(rows)
    raise SystemExit(f"--samples: the standard library has {len(rows)} files for it, got {samples}")


def calibrate_here(model: Any, arm: str, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """Dense weights of this package's result, and seconds."""
    import diffuse_compress as dc
    from diffuse_compress.quantization.scheme import ScaleRule

    weights = dc.WeightScheme(dc.NumberFormat("int4"), dc.PerGroup(GROUP), scale_rule=ScaleRule.AMAX_OVER_HALF_RANGE)
    algorithm: Any = {
        "rounding": dc.RTNConfig(observer="minmax"),
        "GPTQ": dc.GPTQConfig(observer="minmax", true_sequential=False),
        "GPTQ-mse": dc.GPTQConfig(true_sequential=False),
        "GPTQ-default": dc.GPTQConfig(),
        "AWQ": [dc.AWQConfig(clip=False), dc.RTNConfig(observer="minmax")],
        "AWQ-default": dc.AWQConfig(),
    }[arm]
    config = dc.QuantizationConfig(dc.Scheme(weights), algorithm)
    started = time.process_time()
    given = {} if arm == "rounding" else {"calibration": dc.Calibration.record(model, [row[None] for row in tokens])}
    dc.compress(model, config, measure=False, **given)
    seconds = time.process_time() - started
    return dict(dc.decompress(model).state_dict()), seconds


def calibrate_peer(model: Any, arm: str, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """The same of llm-compressor's."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        # AWQ of 0.14.0.1 pins memory, which raises without an accelerator. It is for copies to one: no value changes.
        IntermediatesCache.pin_memory = lambda *args, **kwargs: None
    observer = "memoryless_mse" if arm == "GPTQ-mse" else "memoryless_minmax"
    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP, symmetric=True, observer=observer)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    shared: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if arm.startswith("GPTQ"):
        recipe: Any = GPTQModifier(**shared, block_size=128, dampening_frac=0.01, actorder="static")
    else:
        recipe = ([AWQModifier()] if arm == "AWQ" else []) + [QuantizationModifier(**shared)]
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    given = {} if arm == "rounding" else {"dataset": Dataset.from_dict(rows), "shuffle_calibration_samples": False}
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    started = time.process_time()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        num_calibration_samples=len(tokens),
        max_seq_length=LENGTH,
        **given,
    )
    seconds = time.process_time() - started
    state = {key: value for key, value in model.state_dict().items() if not key.endswith(("_scale", "_zero_point"))}
    for name, layer in model.named_modules():
        if getattr(layer, "quantization_scheme", None) is not None:
            # What the layer multiplies by, however it stores that: its output for unit vectors.
            state[f"{name}.weight"] = layer(torch.eye(layer.in_features)).t()
    return state, seconds


def work(options: argparse.Namespace) -> None:
    """In a process of its own: calibrate once, and write weights and seconds."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().requires_grad_(False)
    calibrate: Callable[..., Any] = calibrate_peer if options.worker == "peer" else calibrate_here
    library = "llmcompressor" if options.worker == "peer" else "diffuse_compress"
    state, seconds = calibrate(model, options.arm, load_file(options.folder / "tokens.safetensors")["tokens"])
    versions = {name: version(name) for name in ("torch", "transformers", library) if _installed(name)}
    # Tied weights are stored once.
    tensors = {key: value.detach().clone().contiguous() for key, value in state.items() if key != "lm_head.weight"}
    save_file(tensors, options.folder / "weights.safetensors")
    (options.folder / "result.json").write_text(json.dumps({"seconds": seconds, "versions": versions}))


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ModuleNotFoundError:
        return False


def run_worker(python: str, worker: str, arm: str, folder: Path) -> dict[str, Any]:
    """Seconds and versions of one calibration; its weights are in ``folder`` then."""
    # What a library writes there (llm-compressor: logs) is not for the caller's folder.
    command = [python, str(Path(__file__).resolve()), "--worker", worker, "--arm", arm, "--folder", str(folder)]
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if worker == "peer":
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{worker}, {arm}: ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads((folder / "result.json").read_text())


def perplexity(state: dict[str, torch.Tensor] | None = None) -> float:
    """Of the held-out text, windows of 512 with stride 256; without weights of the model as it is."""
    from diffuse_compress.evaluation.perplexity import read_text, score_text

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    if state is not None:
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise SystemExit(f"weights do not fit: {missing[:3]} are missing, {unexpected[:3]} are too many")
    text = read_text(MODEL / "heldout.txt")
    return score_text(model, AutoTokenizer.from_pretrained(MODEL), text, stride=256, batch_size=16).perplexity


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every arm of both libraries, one after the other, for each seed."""
    from diffuse_compress.evaluation.environment import command_line, device_name

    found: dict[str, Any] = {
        "command": command_line("python eval/against_llmcompressor.py", sys.argv[1:]),
        "device": device_name("cpu"),
        "date": date.today().isoformat(),
        "dense": perplexity(),
        "samples": options.samples,
        "arms": {},
        "versions": {},
    }
    for seed in options.seeds:
        for arm in options.arms:
            for worker, python in (("here", sys.executable), ("peer", options.peer)):
                if worker == "peer" and arm not in PEER_ARMS:
                    continue
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    save_file({"tokens": calibration_tokens(seed, options.samples)}, folder / "tokens.safetensors")
                    result = run_worker(python, worker, arm, folder)
                    score = perplexity(load_file(folder / "weights.safetensors"))
                cell = found["arms"].setdefault(arm, {}).setdefault(worker, {"perplexity": [], "seconds": []})
                cell["perplexity"].append(score)
                cell["seconds"].append(result["seconds"])
                found["versions"][worker] = result["versions"]
                print(f"seed {seed}, {arm}, {worker}: {score:.4f}, {result['seconds']:.1f} s", flush=True)
                if options.out:
                    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def table(found: dict[str, Any]) -> str:
    """Means over seeds, with the lowest and highest; in markdown."""
    lines = [
        f"Dense: {found['dense']:.3f}. {found['versions']}",
        "| | perplexity here | llm-compressor | seconds here | llm-compressor | ratio of seconds |",
        "|---|---|---|---|---|---|",
    ]
    for arm, cells in found["arms"].items():
        here, peer = cells["here"], cells.get("peer")
        row = [_spread(here["perplexity"], 3), _spread(peer["perplexity"], 3) if peer else ""]
        row += [_spread(here["seconds"], 1), _spread(peer["seconds"], 1) if peer else ""]
        row.append(f"{statistics.mean(here['seconds']) / statistics.mean(peer['seconds']):.2f}" if peer else "")
        lines.append(f"| {ARMS[arm]} | {' | '.join(row)} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    mean, low, high = (f"{f(values):.{digits}f}" for f in (statistics.mean, min, max))
    return mean if low == high else f"{mean} ({low}-{high})"


def main(arguments: list[str] | None = None) -> None:
    """Measure and print the table, or print that of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter of an environment with llmcompressor")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=32, help=f"of {LENGTH} tokens")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every number as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file")
    parser.add_argument("--worker", choices=("here", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options)
    elif options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
    elif options.peer:
        print(table(run(options)))
    else:
        parser.error("--peer: the interpreter of an environment with llmcompressor is needed")


if __name__ == "__main__":
    main()
