"""Peak memory of ``compress`` on a model of about 2 GiB, in a process of its own.

    python eval/compress_memory.py                       # w8a8 and w4a8 on 2 GiB of bfloat16 weights
    python eval/compress_memory.py --presets w4a16 --dtype float32 --json

The model is a stock PixArtTransformer2DModel of the width of FLUX.1 (3072) with random weights. Resident memory after
the imports is subtracted; the highest resident memory while ``compress`` runs must stay within

    dense bytes + bytes of the largest layer + 200 MiB

and the exit status is 1 if it does not. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20
ALLOWANCE = 200 * MIB


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["w8a8", "w4a8"])
    parser.add_argument("--layers", type=int, default=7, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=24, help="heads of 128: the width over 128")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--measure", action="store_true", help="with the error measurement of compress, its default")
    parser.add_argument("--json", action="store_true", help="print one JSON object a preset")
    parser.add_argument("--child", metavar="PRESET", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def resident(field: str = "VmRSS") -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}; this script needs Linux.")


class PeakMemory:
    """Highest resident memory between ``start`` and ``stop``, sampled every two milliseconds."""

    def __init__(self) -> None:
        self.peak = self.peak_private = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, resident())
            self.peak_private = max(self.peak_private, resident("RssAnon"))
            time.sleep(0.002)

    def __enter__(self) -> PeakMemory:
        # Makes the kernel's own high-water mark start here; it misses nothing, where it is allowed.
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._kernel = True
        except OSError:
            self._kernel = False
        self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._done.set()
        self._thread.join()
        if self._kernel:
            self.peak = max(self.peak, resident("VmHWM"))


def build_model(options: argparse.Namespace) -> Any:
    """The stock transformer with weights of standard deviation 0.02; only its own bytes are ever allocated."""
    import torch
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            num_attention_heads=options.heads,
            attention_head_dim=128,
            num_layers=options.layers,
            cross_attention_dim=options.heads * 128,
            sample_size=32,
            use_additional_conditions=False,
        )
    model = model.to(getattr(torch, options.dtype)).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
        for buffer in model.buffers():
            buffer.zero_()
    return model.requires_grad_(False)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run in the child: build, compress, compare with the bound."""
    import torch

    import diffuse_compress as dc
    from diffuse_compress.quantization.algorithms.rtn import RTNConfig
    from diffuse_compress.quantization.presets import PRESETS

    preset = options.child
    # A first use allocates what libraries keep for good.
    torch.nn.Linear(128, 128).to(torch.float32)(torch.zeros(2, 128))
    base = resident()
    model = build_model(options)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    algorithm = RTNConfig() if PRESETS[preset].needs_calibration else None
    started = time.perf_counter()
    with PeakMemory() as memory:
        model.compress(dc.QuantizationConfig(preset, algorithm=algorithm), measure=options.measure)
    return {
        "preset": preset,
        "dtype": options.dtype,
        "measure": options.measure,
        "dense_bytes": dense,
        "largest_layer_bytes": largest,
        "compressed_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "peak_bytes": memory.peak - base,
        "peak_private_bytes": memory.peak_private - base,
        "bound_bytes": dense + largest + ALLOWANCE,
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse_arguments(arguments)
    if options.child:
        print(json.dumps(measure(options)))
        return 0
    failed = 0
    passed_on = ["--layers", options.layers, "--heads", options.heads, "--dtype", options.dtype]
    for preset in options.presets:
        command = [sys.executable, __file__, *map(str, passed_on), "--child", preset]
        command += ["--measure"] if options.measure else []
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result = json.loads(output.strip().splitlines()[-1])
        over = result["peak_bytes"] > result["bound_bytes"]
        failed += over
        if options.json:
            print(json.dumps(result), flush=True)
            continue
        size = {key: f"{value / MIB:.0f} MiB" for key, value in result.items() if key.endswith("bytes")}
        print(
            f"{preset}: peak {size['peak_bytes']} ({size['peak_private_bytes']} private), "
            f"bound {size['bound_bytes']} = dense {size['dense_bytes']} + "
            f"largest layer {size['largest_layer_bytes']} + 200 MiB: "
            f"{'OVER' if over else 'ok'} ({result['seconds']} s, {result['threads']} thread(s))",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
