"""Peak memory of ``compress``, or of quantizing while loading, on a model of about 2 GiB, in a process of its own.

    python eval/compress_memory.py                       # w8a8 and w4a8 on 2 GiB of bfloat16 weights
    python eval/compress_memory.py --presets w4a16 --dtype float32 --json
    python eval/compress_memory.py --load                # from_pretrained(quantization_config=) of a sharded checkpoint
    python eval/compress_memory.py --load --device cuda  # the same with device_map=, and the GPU's memory as well

The model is a stock PixArtTransformer2DModel of the width of FLUX.1 (3072) with random weights. Resident memory after
the imports is subtracted; the highest resident memory while ``compress`` runs must stay within

    dense bytes + bytes of the largest layer + 200 MiB

and while it is loaded, mapped pages of the file included, within

    compressed bytes + bytes of the largest shard + 200 MiB        (without the compressed bytes on a GPU's host)

where the GPU may hold compressed bytes + the largest layer + 200 MiB. transformers (--model t5) keeps every shard
mapped until the last is read: those are clean pages of the file that the system takes back at will, so its private
memory is held to the bound. The exit status is 1 if a bound is broken. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
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
    parser.add_argument("--load", action="store_true", help="quantize while loading a checkpoint of --shard-size")
    parser.add_argument("--model", default="pixart", choices=("pixart", "t5"), help="of --load")
    parser.add_argument("--shard-size", default="512MB", help="max_shard_size of that checkpoint")
    parser.add_argument("--device", default="cpu", help="where --load puts the model")
    parser.add_argument("--allowance", type=int, default=ALLOWANCE // MIB, help="MiB on top of each bound")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
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


def model_class(options: argparse.Namespace) -> Any:
    """The stock class; both libraries are imported before memory is looked at."""
    import diffusers
    import transformers

    return diffusers.PixArtTransformer2DModel if options.model == "pixart" else transformers.T5EncoderModel


def _t5(options: argparse.Namespace) -> Any:
    import transformers

    width = options.heads * 128
    config = transformers.T5Config(
        vocab_size=256,
        d_model=width,
        d_kv=128,
        d_ff=4 * width,
        num_layers=options.layers,
        num_heads=options.heads,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config)


def build_model(options: argparse.Namespace) -> Any:
    """The stock transformer with weights of standard deviation 0.02; only its own bytes are ever allocated."""
    import torch

    cls = model_class(options)
    if options.model == "t5":
        return _t5(options).to(getattr(torch, options.dtype)).eval()
    with torch.device("meta"):
        model = cls(
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
    base, base_private = resident(), resident("RssAnon")
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
        "peak_private_bytes": memory.peak_private - base_private,
        "bound_bytes": dense + largest + ALLOWANCE,
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def measure_load(options: argparse.Namespace) -> dict[str, Any]:
    """Run in the child: load the checkpoint with ``quantization_config=``, compare with the bounds."""
    import torch

    import diffuse_compress as dc
    from diffuse_compress.quantization.convert import quantize_module

    cls, preset, device = model_class(options), options.child, torch.device(options.device)
    # A first use allocates what libraries keep for good, and on a GPU loads kernels.
    warm, spec = torch.nn.Linear(256, 256).to(device, getattr(torch, options.dtype)), dc.QuantizationConfig(preset).spec
    quantize_module(warm, spec.scheme, spec.algorithm)
    arguments = {} if device.type == "cpu" else {"device_map": options.device}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    base, base_private = resident(), resident("RssAnon")
    started = time.perf_counter()
    with PeakMemory() as memory:
        model = cls.from_pretrained(
            options.folder,
            dtype=getattr(torch, options.dtype),
            quantization_config=dc.QuantizationConfig(preset),
            **arguments,
        )
    seconds = round(time.perf_counter() - started, 1)
    dense = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
    largest_shard = max(file.stat().st_size for file in options.folder.glob("*.safetensors"))
    largest_layer = 4 * (options.heads * 128) ** 2 * getattr(torch, options.dtype).itemsize
    compressed = sum(p.numel() * p.element_size() for p in model.parameters())
    allowance = options.allowance * MIB
    on_host = compressed if device.type == "cpu" else 0
    found: dict[str, Any] = {
        "preset": preset,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else options.device,
        "dense_bytes": dense,
        "largest_shard_bytes": largest_shard,
        "largest_layer_bytes": largest_layer,
        "compressed_bytes": compressed,
        "peak_bytes": (memory.peak - base) if options.model == "pixart" else memory.peak_private - base_private,
        "peak_private_bytes": memory.peak_private - base_private,
        "bound_bytes": on_host + largest_shard + allowance,
    }
    if device.type == "cuda":
        found["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["device_bound_bytes"] = compressed + largest_layer + allowance
    return {**found, "seconds": seconds, "threads": torch.get_num_threads(), "torch": torch.__version__}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse_arguments(arguments)
    if options.child:
        print(json.dumps(measure_load(options) if options.load else measure(options)))
        return 0
    if options.load and options.folder is None:
        with tempfile.TemporaryDirectory() as folder:
            build_model(options).save_pretrained(folder, max_shard_size=options.shard_size)
            return main([*(sys.argv[1:] if arguments is None else arguments), "--folder", folder])
    failed = 0
    passed_on = ["--layers", options.layers, "--heads", options.heads, "--dtype", options.dtype]
    for preset in options.presets:
        command = [sys.executable, __file__, *map(str, passed_on), "--child", preset]
        command += ["--measure"] if options.measure else []
        if options.load:
            command += ["--load", "--folder", str(options.folder), "--device", options.device]
            command += ["--allowance", str(options.allowance), "--model", options.model]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result = json.loads(output.strip().splitlines()[-1])
        over = result["peak_bytes"] > result["bound_bytes"]
        over |= result.get("device_peak_bytes", 0) > result.get("device_bound_bytes", 0)
        failed += over
        if options.json:
            print(json.dumps(result), flush=True)
            continue
        size = {key: f"{value / MIB:.0f} MiB" for key, value in result.items() if key.endswith("bytes")}
        parts = (
            f"compressed {size['compressed_bytes']}, largest shard {size['largest_shard_bytes']}"
            if options.load
            else f"dense {size['dense_bytes']} + largest layer {size['largest_layer_bytes']} + 200 MiB"
        )
        on_device = (
            f"on the device {size['device_peak_bytes']}, bound {size['device_bound_bytes']}; "
            if "device_peak_bytes" in size
            else ""
        )
        print(
            f"{preset}: peak {size['peak_bytes']} ({size['peak_private_bytes']} private), "
            f"bound {size['bound_bytes']} = {parts}: {on_device}"
            f"{'OVER' if over else 'ok'} ({result['seconds']} s, {result['threads']} thread(s))",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
