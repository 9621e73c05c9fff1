# One environment in .venv, one command for each thing to do with it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# No call home, for everything that starts below. DVC finds `python` through PATH.
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup repro test lint ui clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv with the pinned packages and chargpt itself

# Again only when a pin, the metadata or the native module's source changes.
$(READY): constraints.txt pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "chargpt needs Python 3.11 or newer: make PYTHON=python3.11 …"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/chargpt info
	@touch $@

repro: $(READY)  ## run the pipeline: download, tokenize, split, train, sample, compare
	$(BIN)/dvc repro
	@$(BIN)/python -m pipelines.summary

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest

lint: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: $(READY)  ## open MLflow on this machine
	@$(BIN)/python -m pipelines.ui

clean:  ## remove what the pipeline made; the environment and MLflow's store stay
	rm -rf data models samples checkpoints reports/runs .dvc/cache .dvc/tmp build .pytest_cache .mypy_cache .ruff_cache .hypothesis
