"""What ``import diffuse_compress`` costs over the imports that its users have anyway.

    python eval/import_cost.py --runs 7

Each run is a fresh interpreter that imports ``DiffusionPipeline, ModelMixin`` and ``PreTrainedModel`` and then times
``import diffuse_compress``, in wall-clock and in CPU seconds of the process. Prints medians; the exit status is 1 when
the median is over ``--limit``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

BEFORE = "from diffusers import DiffusionPipeline, ModelMixin; from transformers import PreTrainedModel"
CODE = f"""
import json, sys, time
wall, cpu = time.perf_counter(), time.process_time()
{BEFORE}
middle, middle_cpu = time.perf_counter(), time.process_time()
modules = set(sys.modules)
import diffuse_compress
end, end_cpu = time.perf_counter(), time.process_time()
new = sorted({{name.split(".")[0] for name in set(sys.modules) - modules}})
print(json.dumps({{
    "before": middle - wall, "before_cpu": middle_cpu - cpu, "ours": end - middle, "ours_cpu": end_cpu - middle_cpu,
    "modules": len(set(sys.modules) - modules), "packages": new}}))
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--limit", type=float, default=1.0, help="seconds")
    options = parser.parse_args(arguments)
    runs = []
    # The first run fills the file cache and writes bytecode; it is not counted.
    for _ in range(options.runs + 1):
        output = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
        runs.append(json.loads(output.strip().splitlines()[-1]))
    median = {
        key: statistics.median(run[key] for run in runs[1:]) for key in ("before", "ours", "before_cpu", "ours_cpu")
    }
    print(
        f"import diffuse_compress: {median['ours']:.3f} s ({median['ours_cpu']:.3f} s of CPU), {runs[-1]['modules']} "
        f"modules, over {median['before']:.2f} s ({median['before_cpu']:.2f} s of CPU) for: {BEFORE}. "
        f"Medians of {options.runs} runs, Python {sys.version.split()[0]}. "
        f"Packages first imported by it: {', '.join(runs[-1]['packages'])}."
    )
    return 1 if median["ours"] > options.limit else 0


if __name__ == "__main__":
    sys.exit(main())
