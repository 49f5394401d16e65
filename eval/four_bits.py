"""What the algorithms make of 4-bit weights and inputs on the reference models; the command of docs/calibration.md.

    python eval/four_bits.py --model examples/reference_models/emoji_pixart --out pixart.json
    python eval/four_bits.py --model examples/reference_models/python_llama --out llama.json
    python eval/four_bits.py --model examples/reference_models/emoji_sd --out sd.json
    python eval/four_bits.py --table pixart.json llama.json sd.json
    python eval/four_bits.py --model examples/reference_models/python_llama --scheme w3g128 --arms RTN OmniQuant

Each arm compresses a fresh float32 model to "w4a4", or another ``--scheme``, once for each seed, as it is and with
outlier channels of the same function (``diffuse_compress.evaluation.outliers``); ``--variants offsets`` moves channels
far off zero. The seed chooses calibration data, starting noise, outliers and
what an algorithm draws. A pipeline is judged by the relative error of its denoiser on recorded calls of prompts that
were not calibrated on, and by the PSNR of pictures against the dense ones; a language model by its perplexity on
held-out text. A UNet is measured as it is only. Results are written after each arm, and arms that the file has already
are not run again; ``--arms`` runs those alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import diffuse_compress as dc
from diffuse_compress.evaluation.environment import command_line, device_name
from diffuse_compress.evaluation.images import accepted_options
from diffuse_compress.evaluation.outliers import add_offset_channels, add_outlier_channels

ALGORITHMS: dict[str, Any] = {
    "dense": None,
    "RTN": dc.RTNConfig(),
    "AWQ, GPTQ": [dc.AWQConfig(), dc.GPTQConfig()],
    "SmoothQuant": dc.SmoothQuantConfig(),
    "QuaRot": dc.QuaRotConfig(),
    "QuaRot, SmoothQuant": [dc.QuaRotConfig(), dc.SmoothQuantConfig()],
    "QuaRot, GPTQ": [dc.QuaRotConfig(), dc.GPTQConfig()],
    "SVDQuant": dc.SVDQuantConfig(),
    "SVDQuant, GPTQ": [dc.SVDQuantConfig(), dc.GPTQConfig()],
    "QuaRot, SVDQuant": [dc.QuaRotConfig(), dc.SVDQuantConfig()],
    "QuaRot residual": dc.QuaRotConfig(residual=True),
    "QuaRot residual, GPTQ": [dc.QuaRotConfig(residual=True), dc.GPTQConfig()],
}
# Only where --arms names them.
MORE: dict[str, Any] = {
    "AWQ": dc.AWQConfig(),
    "GPTQ": dc.GPTQConfig(),
    "OS+": dc.OSPlusConfig(),
    "OS+ scales": dc.OSPlusConfig(shift=False),
    "OmniQuant": dc.OmniQuantConfig(),
    "SpinQuant residual": dc.SpinQuantConfig(),
    "DGQ": dc.DGQConfig(),
    "AdaDim": dc.AdaDimConfig(),
    "AdaDim, GPTQ": [dc.AdaDimConfig(), dc.GPTQConfig()],
    "TesseraQ": dc.TesseraQConfig(iterations=10, stages=10),
    "AWQ, TesseraQ": [dc.AWQConfig(), dc.TesseraQConfig(iterations=10, stages=10)],
    "AWQ, OmniQuant": [dc.AWQConfig(), dc.OmniQuantConfig()],
    "OmniQuant, GPTQ": [dc.OmniQuantConfig(), dc.GPTQConfig()],
    "RTN, norms": [dc.RTNConfig(), dc.NormTweakingConfig()],
    "GPTQ, norms": [dc.GPTQConfig(), dc.NormTweakingConfig()],
}
SCHEMES: dict[str, Any] = {
    "w4a4": "w4a4",
    "w8a8": "w8a8",
    "w4a8": "w4a8",
    "w4g128": dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT4, dc.PerGroup(128), symmetric=False)),
    "w3g64": dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT3, dc.PerGroup(64), symmetric=False)),
    "w3g128": dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT3, dc.PerGroup(128, pad=True), symmetric=False)),
    "w2g64": dc.Scheme(dc.WeightScheme(dc.NumberFormat.INT2, dc.PerGroup(64), symmetric=False)),
}
VARIANTS = ("plain", "outliers", "offsets")
CALIBRATION_PROMPTS, JUDGED_PROMPTS, PICTURES, STEPS, GUIDANCE = 8, 16, 4, 20, 3.0
CALIBRATION_TEXTS, TEXT_CHARACTERS, JUDGED_TOKENS = 16, 1500, 8192


def change(model: nn.Module, variant: str, seed: int) -> None:
    """Give a dense model, in place, the channels that a variant is named after; its function stays."""
    if variant == "outliers":
        add_outlier_channels(model, seed=seed)
    elif variant == "offsets":
        add_offset_channels(model, seed=seed)


class Pictures:
    """A pipeline: denoiser's error and PSNR."""

    def __init__(self, folder: Path, seed: int, variant: str) -> None:
        self.folder, self.seed, self.variant = folder, seed, variant
        # emoji_sd draws the prompts of emoji_pixart.
        prompts = (folder.parent / "emoji_pixart" / "prompts.txt").read_text().splitlines()
        random.Random(seed).shuffle(prompts)
        self.calibrated, rest = prompts[:CALIBRATION_PROMPTS], prompts[CALIBRATION_PROMPTS:]
        self.judged = rest[:JUDGED_PROMPTS]
        dense = self.target()
        wanted = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "use_resolution_binning": False}
        self.options = accepted_options(dense, {**wanted, "clean_caption": False, "max_sequence_length": 24})
        self.calls = dc.Calibration.record(dense, self.judged, num_samples=16, seed=1000 + seed, **self.options)
        self.expected, self.pictures = self._outputs(dense), self._pictures(dense)

    def target(self) -> Any:
        pipe = DiffusionPipeline.from_pretrained(self.folder)
        pipe.set_progress_bar_config(disable=True)
        change(self.model(pipe), self.variant, self.seed)
        return pipe

    def calibration(self, pipe: Any) -> dc.Calibration:
        return dc.Calibration.record(pipe, self.calibrated, num_samples=16, seed=self.seed, **self.options)

    def model(self, pipe: Any) -> nn.Module:
        return pipe.components.get("transformer") or pipe.unet

    def judge(self, pipe: Any) -> dict[str, float]:
        error = sum((a - b).square().sum() for a, b in zip(self._outputs(pipe), self.expected, strict=True))
        norm = sum(b.square().sum() for b in self.expected)
        mse = (self._pictures(pipe) - self.pictures).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        return {"error": math.sqrt(float(error / norm)), "psnr": float((-10 * mse.log10()).mean())}

    def _outputs(self, pipe: Any) -> list[torch.Tensor]:
        (name,) = self.calls.components
        with torch.no_grad():
            return [sample.call.run(self.model(pipe))[0] for sample in self.calls.of(name)]

    def _pictures(self, pipe: Any) -> torch.Tensor:
        noise = [torch.Generator().manual_seed(1000 * self.seed + index) for index in range(PICTURES)]
        return torch.as_tensor(pipe(self.judged[:PICTURES], generator=noise, output_type="np", **self.options).images)


class Text:
    """A language model: perplexity."""

    def __init__(self, folder: Path, seed: int, variant: str) -> None:
        self.folder, self.seed, self.variant = folder, seed, variant
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        text = (folder / "heldout.txt").read_text(encoding="utf-8")
        self.tokens = torch.tensor(self.tokenizer(text, verbose=False).input_ids[: JUDGED_TOKENS + 1])
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        chosen = random.Random(seed).sample([file for file in files if file.stat().st_size > 4000], CALIBRATION_TEXTS)
        self.texts = [file.read_text(encoding="utf-8")[1000 : 1000 + TEXT_CHARACTERS] for file in chosen]

    def target(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        change(model, self.variant, self.seed)
        return model

    def calibration(self, model: Any) -> dc.Calibration:
        return dc.Calibration.record(model, self.texts, tokenizer=self.tokenizer, seed=self.seed)

    def model(self, model: Any) -> nn.Module:
        return model

    def judge(self, model: Any) -> dict[str, float]:
        window = model.config.max_position_embeddings
        nats = 0.0
        with torch.no_grad():
            for start in range(0, JUDGED_TOKENS, window):
                part = self.tokens[start : start + window + 1]
                logits = model(part[None, :-1], use_cache=False).logits[0]
                nats += float(nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
        return {"perplexity": math.exp(nats / JUDGED_TOKENS)}


def run_arm(case: Pictures | Text, name: str, scheme: str = "w4a4") -> dict[str, float]:
    """Compress a fresh model and judge it."""
    target, algorithm = case.target(), {**ALGORITHMS, **MORE}[name]
    started = time.perf_counter()
    if algorithm is not None:
        config = dc.QuantizationConfig(SCHEMES[scheme], algorithm=algorithm, seed=case.seed)
        needs = config.spec.algorithm.needs_calibration
        given = {"calibration": case.calibration(target)} if needs else {}
        started = time.perf_counter()
        dc.compress(target, config, measure=False, **given)
    seconds = time.perf_counter() - started
    size = sum(tensor.numel() * tensor.element_size() for tensor in case.model(target).parameters())
    return {**case.judge(target), "bytes": size, "seconds": round(seconds, 2)}


def run(options: argparse.Namespace, save: Callable[[dict[str, Any]], None], results: dict[str, Any]) -> None:
    """Every arm that ``results`` lacks."""
    kind = Pictures if (options.model / "model_index.json").exists() else Text
    names = [name for name in options.arms or ALGORITHMS if kind is Text or "residual" not in name]
    variants = options.variants or (("plain",) if (options.model / "unet").exists() else ("plain", "outliers"))
    for seed in range(options.seeds):
        for variant in variants:
            arms = {name: f"{name}/{variant}/{seed}" for name in names}
            if all(key in results["arms"] for key in arms.values()):
                continue
            case = kind(options.model, seed, variant)
            for name, key in arms.items():
                if key not in results["arms"]:
                    results["arms"][key] = run_arm(case, name, options.scheme)
                    save(results)


def table(results: dict[str, Any]) -> str:
    """Mean over the seeds, lowest and highest in brackets."""
    arms = results["arms"]
    metrics = [name for name in ("error", "psnr", "perplexity") if name in next(iter(arms.values()))]
    kinds = [kind for kind in VARIANTS if any(f"/{kind}/" in key for key in arms)]
    heads = [f"{metric}, {kind}" for kind in kinds for metric in metrics]
    lines = [
        " | ".join(["", results.get("scheme", "w4a4"), *heads, "bytes", "s", ""]).strip(),
        "|---" * (len(heads) + 3) + "|",
    ]
    for name in (*ALGORITHMS, *MORE):
        cells = []
        for kind in kinds:
            found = [arm for key, arm in arms.items() if key.rsplit("/", 1)[0] == f"{name}/{kind}"]
            for metric in metrics if found else ():
                values = [arm[metric] * (100 if metric == "error" else 1) for arm in found]
                cells.append(f"{statistics.mean(values):.3g} ({min(values):.3g}-{max(values):.3g})")
        if cells:
            seconds = statistics.mean(arm["seconds"] for arm in found)
            lines.append(f"| {name} | " + " | ".join([*cells, f"{found[0]['bytes']:,}", f"{seconds:.0f}"]) + " |")
    about = results["environment"]
    return "\n".join([f"{about['command']} on {about['device']}, {about['date']}", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a reference model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=[*ALGORITHMS, *MORE], help="run these alone")
    parser.add_argument("--scheme", default="w4a4", choices=list(SCHEMES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: plain and, but in UNets, outliers")
    parser.add_argument("--out", type=Path, default=Path("four_bits.json"))
    parser.add_argument("--table", type=Path, nargs="*", metavar="RESULTS", help="only print these results")
    options = parser.parse_args()
    for path in options.table or ():
        print(table(json.loads(path.read_text())), end="\n\n")
    if options.model is None:
        return
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"arms": {}}
    if results.setdefault("scheme", options.scheme) != options.scheme:
        raise SystemExit(f"{options.out}: its arms have the scheme {results['scheme']}, these {options.scheme}.")
    results["environment"] = {
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": command_line("python eval/four_bits.py", sys.argv[1:]),
    }
    run(options, lambda found: options.out.write_text(json.dumps(found, indent=1)), results)
    print(table(results))


if __name__ == "__main__":
    main()
