# Every target sets up what it needs: only Python >= 3.11 (with venv) and make must be there.
#   make demo      compress the bundled model and look at what was won and lost
#   make test      the test suite, without the cases marked slow, gpu or network
# On Linux without an NVIDIA GPU, torch's CPU build saves gigabytes:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

PYTHON ?= python3
VENV ?= .venv
# pytest-xdist's number of processes for `make test`; each computes on one thread, or they wait for one another.
WORKERS ?= auto
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
CONSTRAINTS := requirements/constraints-dev.txt

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-all test-gpu docs lint types layering check format bench wheel clean

help:
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## create .venv and install the package in it, once

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "No venv module: install python3-venv, or name another Python: make PYTHON=..."; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	@touch $@

demo: $(STAMP)  ## compress the bundled model, offline, and write a report
	$(BIN)/diffuse-compress demo $(DEMO_ARGS)

test: $(STAMP)  ## tests on the CPU: everything but the cases marked slow, gpu or network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(STAMP)  ## only the cases marked slow
	$(BIN)/python -m pytest -m "slow and not gpu and not sm90 and not network" $(PYTEST_ARGS)

test-all: $(STAMP)  ## test and test-slow in one run
	$(BIN)/python -m pytest -m "not gpu and not sm90 and not network" $(PYTEST_ARGS)

# A GPU machine often brings its own torch: `make test-gpu BIN=/path/to/its/venv/bin STAMP=` uses it as it is.
test-gpu: $(STAMP)  ## the cases that need a CUDA device; what the device lacks is skipped by name
	$(BIN)/python -m pytest -m "gpu or sm90" -rs $(PYTEST_ARGS)

docs: $(STAMP)  ## run every python block of README.md and docs/
	$(BIN)/python -m pytest tests/docs $(PYTEST_ARGS)

lint: $(STAMP)  ## formatting and ruff
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)  ## mypy, strict for the quantization core
	$(BIN)/mypy

layering: $(STAMP)  ## import-linter: which package may import which
	$(BIN)/lint-imports --no-cache

check: lint types layering docs  ## everything a commit must pass besides the tests

format: $(STAMP)  ## rewrite files as ruff wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## the measurements of docs/benchmarks.md, into bench/
	mkdir -p bench
	$(BIN)/python eval/quantization_presets.py --model examples/reference_models/emoji_pixart --prompts 256 --steps 20 \
		--fake 64 --outliers 64 --out bench/presets.json --resume --markdown $(BENCH_ARGS)
	$(BIN)/python -m diffuse_compress_kernels.benchmarks.cpu_linear --rows 1 64 256 1024 4096 --out bench/cpu_linear.jsonl
	$(BIN)/python eval/compress_memory.py --presets w8a8 w4a8 --measure
	$(BIN)/python eval/import_cost.py
	$(BIN)/python eval/reference_results.py --out bench/reference

wheel: $(STAMP)  ## build the sdist, and the wheel from it, into dist/
	rm -rf dist
	$(BIN)/python -m build

clean:  ## remove what these targets made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find src kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
