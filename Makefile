# Every target sets up what it needs in .venv, once; running it again is quick.

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
AKOA   ?=
TESTS  ?=
BENCH  ?=
FUZZ   ?=
# CONSTRAINTS=/dev/null installs the newest release of everything, PyTorch included.
CONSTRAINTS ?= constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help akoa test lint docs bench fuzz gpu clean constraints

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'

akoa: $(VENV)/.installed-akoa ## train and test the knee laterality example, results in runs/akoa (AKOA="--toy" for a minute)
	$(RUN) -m examples.akoa.demo $(AKOA)

# Tests compute little: more threads only wait for each other.
test docs: export OMP_NUM_THREADS ?= 1

test: $(VENV)/.installed-dev $(VENV)/.installed-akoa $(VENV)/.installed-ecosystem ## run the tests with coverage, then again with shapes checked
	$(RUN) -m pytest $(WORKERS) --cov --cov-report=term-missing:skip-covered $(TESTS)
	$(RUN) -m pytest $(WORKERS) -q $(SHAPES) $(TESTS)

# A process for each core, four at most: each takes some gigabytes with the models of full size.
WORKERS := -n auto --maxprocesses 4 --dist worksteal

# The markers are described in pyproject.toml; torch.compile cannot trace through the checks.
SHAPES := --jaxtyping-packages=perceiver_core,tools.shapes.check \
  -m "not (compile or slow or gpu or triton or refusal or no_shape_checks)"

lint: $(VENV)/.installed-dev $(VENV)/.installed-akoa ## check style, types and the direction of imports
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

docs: $(VENV)/.installed-dev $(VENV)/.installed-docs $(VENV)/.installed-ecosystem ## build the pages in docs/_build/html and run their examples
	$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	$(RUN) -m sphinx -W --keep-going -q -b doctest docs docs/_build/doctest
	$(RUN) -m pytest -q --doctest-modules src --ignore=src/perceiver_core/kernels/grid/triton_kernels.py

bench: $(VENV)/.installed-dev ## measure for 40 minutes at most, results in benchmarks/results (BENCH="--toy" for a trial run)
	$(RUN) -m benchmarks $(BENCH)

fuzz: export OMP_NUM_THREADS := 1
fuzz: $(VENV)/.installed-dev $(VENV)/.installed-akoa ## run thousands of random cases, or continue with them; logs in runs/fuzz (FUZZ="compositions --seed 7")
	$(RUN) -m tests.robustness.fuzzing $(FUZZ)

# Where there is a GPU there is mostly a PyTorch for it as well, so no .venv is made: PYTHON is the one that has it.
gpu: export PYTHONPATH := src
gpu: ## on a machine with a CUDA GPU: its tests and its tables, by the PyTorch that PYTHON has (BENCH="--toy" for a minute)
	$(PYTHON) -m pytest -q -p no:cacheprovider -m "gpu or triton" $(GPU_TESTS); tests=$$?; \
	$(PYTHON) -m benchmarks read attention models --device cuda $(BENCH) && exit $$tests

GPU_TESTS := tests/integration/test_gpu.py tests/kernels tests/reads tests/blocks tests/checkpoints tests/benchmarks

constraints: $(VENV)/.installed-dev $(VENV)/.installed-akoa $(VENV)/.installed-docs $(VENV)/.installed-ecosystem ## upgrade .venv (torch apart) and pin it in constraints.txt
	$(RUN) -m pip install --quiet --upgrade --upgrade-strategy eager "$$(grep '^torch==' constraints.txt)" -e ".[images,hub,plots,akoa,dev,docs,ecosystem]"
	$(RUN) tools/constraints.py

clean: ## remove what was made, except .venv, data and runs
	rm -rf dist build docs/_build benchmarks/results .coverage coverage.xml htmlcov
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name .venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "perceiver-core needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(RUN)
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[$*]"
	@touch $@
