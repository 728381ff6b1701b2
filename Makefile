# Every task sets up its own environment in .venv; the first one takes a few minutes, most of them for PyTorch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: help demo test bench gpu lint clean
.DEFAULT_GOAL := help

help:  ## list the tasks
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "No venv module: install it (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	@touch $@

demo: $(READY)  ## train a baseline and APD on drawn people and test both on an unseen domain, in minutes; writes report.html
	$(BIN)/apd demo

lint: $(READY)  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, then every test that needs no GPU (on a CUDA machine: also those that do)
	$(BIN)/pytest -n auto

bench: $(READY)  ## the benchmark suites: small sizes on the CPU, full sizes on CUDA
	@mkdir -p runs/benchmarks
	$(BIN)/pytest benchmarks/ --benchmark-only --benchmark-json=runs/benchmarks/results.json
	$(BIN)/python -m benchmarks.report runs/benchmarks/results.json

gpu:  ## what a CUDA device says in ten minutes: correctness, errors, times; needs torch, triton, pytest, xdist, no venv
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --minutes 10

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .benchmarks build *.egg-info
