# Every task sets up its own environment in .venv; the first one takes a few minutes, most of them for PyTorch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
OLDEST := .venv-oldest
PEERS := .venv-peers
# A worker takes whole files, in the order of tests/conftest.py.
WORKERS := -n auto --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-long test-oldest bench peers gpu lint clean
.DEFAULT_GOAL := help

help:  ## list the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS)

test-long: $(READY)  ## the tests that `make test` leaves out: every launch compiled for every GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS) -m long

# PyTorch 2.4 pins Triton 3.0, which does not compile the kernels: they are tested with the oldest that does. Its
# interpreter needs NumPy before 2.4.
$(OLDEST)/ready: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || { echo "PyTorch 2.4 needs Python 3.10 to 3.12: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet torch==2.4.1 'numpy<2.4' 'pytest>=8.3' 'pytest-xdist>=3.7' 'scipy>=1.11'
	$(OLDEST)/bin/python -m pip install --quiet --no-deps triton==3.6.0
	@touch $@

test-oldest: $(OLDEST)/ready  ## operators, compilation, evaluation and kernels with PyTorch 2.4 and Triton 3.6
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(WORKERS) -m oldest $$(grep -rl --include='test_*.py' pytest.mark.oldest tests)

bench: $(READY)  ## the benchmark suites: small sizes on the CPU, full sizes on CUDA
	@mkdir -p runs/benchmarks
	$(BIN)/pytest benchmarks/ --benchmark-only --benchmark-json=runs/benchmarks/results.json
	$(BIN)/python -m benchmarks.report runs/benchmarks/results.json

# Each project asks for other versions of the rest: what its functions need is named here, and nothing else is installed.
# fast-reid and OML use names of older Pythons and NumPys, which benchmarks/peers.py puts back.
$(PEERS)/ready: Makefile
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet torch torchvision pytest pytest-timeout parameterized scikit-learn faiss-cpu \
		pytorch-metric-learning opencv-python-headless termcolor yacs tabulate gdown h5py imageio tensorboard matplotlib six \
		open-metric-learning boxmot
	$(PEERS)/bin/python -m pip install --quiet --no-deps torchreid fastreid
	@touch $@

peers: $(PEERS)/ready  ## other Re-ID projects with their functions and with ours: agreement and times, into docs/drop-in.md
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PEERS)/bin/python -m benchmarks.peers --page docs/drop-in.md

gpu:  ## what a CUDA device says in ten minutes: correctness, errors, times; needs torch, triton, pytest, xdist, no venv
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --minutes 10

clean:  ## remove the environment and caches
	rm -rf $(VENV) $(OLDEST) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .benchmarks build *.egg-info
