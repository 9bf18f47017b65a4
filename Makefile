.PHONY: help demo test test-all test-fast quality style

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.skill-hf-installed
PATHS := src tests examples benchmarks
# A file's tests share fixtures that take long to make, so they stay together.
PYTEST := $(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

help:
	@echo "make demo       distil and prune the small WavLM of examples/demo"
	@echo "make test       the tests"
	@echo "make test-all   the same and those marked nightly: other toolkits, benchmarks, compilers, most of FSDP"
	@echo "make test-fast  the tests without those marked slow or nightly"
	@echo "make quality    check lint and format"
	@echo "make style      fix lint and format"
	@echo "Each first makes $(VENV) if it is missing and installs the package there with the versions of constraints.txt."

# torch comes first, so that pip doesn't look for another build of it once the other packages ask.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo "==> Installing skill-hf and the pinned versions into $(VENV) (once; torch is large, this takes minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The pinned versions need Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -c constraints.txt torch
	@$(VENV)/bin/python -m pip install -c constraints.txt -e ".[dev,export,plots,superb]"
	@touch $@

demo: $(INSTALLED)
	@echo "==> Distilling and pruning the small WavLM of examples/demo (a few minutes on 2 CPU cores)"
	@$(VENV)/bin/python examples/run_skill.py

test: $(INSTALLED)
	@echo "==> Running the tests"
	@$(PYTEST) -m "not nightly"

test-all: $(INSTALLED)
	@echo "==> Running all tests, those marked nightly too"
	@$(PYTEST)

test-fast: $(INSTALLED)
	@echo "==> Running the tests that are marked neither slow nor nightly"
	@$(PYTEST) -m "not slow and not nightly"

quality: $(INSTALLED)
	@echo "==> Checking lint and format"
	@$(VENV)/bin/ruff check $(PATHS)
	@$(VENV)/bin/ruff format --check $(PATHS)

style: $(INSTALLED)
	@echo "==> Fixing lint and format"
	@$(VENV)/bin/ruff check --fix $(PATHS)
	@$(VENV)/bin/ruff format $(PATHS)
