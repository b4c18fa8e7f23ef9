# make demo    the whole main job on the Python standard library's source, report at the end
# make test    the tests, under 15 minutes on two cores
# make test-parallel    every arrangement of ranks for every family, five minutes on two cores
# make test-faults      hundreds of kills, damaged checkpoints and full disks; half an hour on two cores
# make test-slurm       the scripts of slurm/ on a real Slurm, started for it; a quarter of an hour on two cores
# make check   formatter, linter, types, imports
# make bench   each recurrence against its time loop
#
# PIP_ARGS reaches every pip call. Without a GPU, torch's CPU build saves gigabytes:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)
TORCH := $(shell grep '^torch==' constraints.txt)
# A CPU build of torch brings no Triton, a CUDA build exactly its own.
CONSTRAINTS = -c $$($(PY) -c 'import torch; print("constraints.txt" if torch.version.cuda else "constraints-cpu.txt")')
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test test-all test-parallel test-faults test-slurm check bench format clean
.DEFAULT_GOAL := help
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# Two layers, so that the demo does not wait for the developers' tools.
setup: $(VENV)/.dev
$(VENV)/.run: pyproject.toml constraints.txt constraints-cpu.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Rondo needs Python >= 3.11, this is {v[0]}.{v[1]}: make PYTHON=python3.11 ..." if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) numpy setuptools wheel
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation $(CONSTRAINTS) -e .
	touch $@
$(VENV)/.dev: $(VENV)/.run
	$(PIP) --no-build-isolation $(CONSTRAINTS) -e '.[dev]'
	touch $@

demo: $(VENV)/.run
	$(PY) -m eval.demo

# Two processes, a file of tests at a time: what a file sets up once stays in one process. In the order of
# tests/conftest.py, where xdist would have files of many tests first.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST)

test-all: setup
	$(PYTEST) -m 'slow or not slow'

test-parallel: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -s -m parallel_matrix tests/parallel/test_matrix.py

test-faults: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -s -m slow tests/faults

test-slurm: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -v -m 'slow or not slow' tests/slurm

check: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_imports.py

bench: setup
	$(PY) -m benchmarks.ops

format: setup
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
