# One environment in .venv, one command for each thing to do with it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# No call home, for everything that starts below. DVC finds `python` through PATH.
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup repro ablation serve plots test test-long fuzz mutants lint bench gpu gpu-rehearsal sanitize cuda-build ui clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv with the pinned packages and chargpt itself

# Again only when a pin, the metadata or the native module's source changes.
$(READY): constraints.txt pyproject.toml setup.py $(wildcard csrc/* csrc/*/* csrc/*/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "chargpt needs Python 3.11 or newer: make PYTHON=python3.11 …"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/chargpt info
	-@$(BIN)/python -m pipelines.tools.plots_template
	@touch $@

repro: $(READY)  ## run the pipeline: download, tokenize, split, train, sample, compare
	@$(BIN)/python -m pipelines.tools.expected
	$(BIN)/dvc repro
	@$(BIN)/python -m pipelines.tools.summary

ablation: $(READY)  ## the same for every variant of params.yaml with three seeds, as far as it is missing
	$(BIN)/python -m pipelines.tools.ablation
	@$(BIN)/python -m pipelines.tools.summary

serve: $(READY)  ## serve the best model of the pipeline and the smallest, to a browser and to any OpenAI client; PORT=8000
	@$(BIN)/python -m pipelines.tools.serve --port $(or $(PORT),8000)

plots: $(READY)  ## draw the curves with DVC, as a page that needs no network
	-@$(BIN)/python -m pipelines.tools.plots_template
	$(BIN)/dvc plots show

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-long: $(READY)  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

fuzz: $(READY)  ## give every door input that nobody would write by hand, for an hour; SECONDS=60 for less
	$(BIN)/python -m tests.fuzz $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

# Cosmic Ray in an environment of its own: it changes the code, and .venv runs the tests.
MUTANTS_ENV := build/mutants-venv
mutants: $(MUTANTS_ENV)/.ready $(READY)  ## change the code in 300 places, one at a time, and see whether a test fails; MINUTES=60
	$(MUTANTS_ENV)/bin/python -m tests.mutants $(if $(MINUTES),--minutes $(MINUTES))

$(MUTANTS_ENV)/.ready: tests/mutants/requirements.txt
	$(PYTHON) -m venv $(MUTANTS_ENV)
	$(MUTANTS_ENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

lint: $(READY)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## time the kernels, generation and a training step
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.cross_entropy
	$(BIN)/python -m benchmarks.elementwise
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.training_step --compile
	$(BIN)/python -m benchmarks.cost

# With the Python that is there, because it has the torch that fits the GPU: .venv's where there is one, else $(PYTHON).
# For a first look: make gpu STEPS=smoke,shapes,step SECONDS=180
gpu:  ## prove and measure the GPU kernels, in ten minutes; DRY=1 walks through all of it on the CPU
	$(PYTHON) -m benchmarks.gpu $(if $(filter-out 0,$(DRY)),--dry) $(if $(STEPS),--steps $(STEPS)) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(if $(PREBUILT),--prebuilt $(PREBUILT))

# Python and packages as on the machines that have the GPU. Makes build/gpu-modules, which they can take along.
GPU_ENV := build/gpu-venv
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3) python3.12)
gpu-rehearsal: $(GPU_ENV)/.ready $(READY)  ## rehearse `make gpu` with a GPU machine's versions, carried modules included
	test -e data/raw/corpus.txt || $(BIN)/python -m pipelines.download
	$(GPU_ENV)/bin/python -m benchmarks.gpu.rehearse

$(GPU_ENV)/.ready: benchmarks/gpu/requirements.txt
	$(PYTHON312) -m venv $(GPU_ENV)
	$(GPU_ENV)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/gpu/requirements.txt
	@touch $@

# Each kernel with its test, without torch or Python, on every code path that this CPU has.
SANITIZED := attention cross_entropy block decode product
sanitize: $(SANITIZED:%=build/sanitize/%) build/sanitize/decode-threads  ## run the C++ under Address-, UndefinedBehavior- and ThreadSanitizer
	for kernel in $^; do for isa in plain avx2 avx512 avx512_bf16 amx; do \
		CHARGPT_CPU_ISA=$$isa UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $$kernel || exit 1; done; done

build/sanitize/%: csrc/tests/%_test.cpp csrc/cpu/%.cpp $(wildcard csrc/cpu/* csrc/cpu/simd/* csrc/common/*)
	@mkdir -p $(@D)
	$(CXX) -std=c++20 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined \
		csrc/tests/$*_test.cpp csrc/cpu/$*.cpp -o $@

build/sanitize/decode-threads: csrc/tests/decode_test.cpp csrc/cpu/decode.cpp $(wildcard csrc/cpu/* csrc/cpu/simd/* csrc/common/*)
	@mkdir -p $(@D)
	$(CXX) -std=c++20 -O1 -g -fsanitize=thread csrc/tests/decode_test.cpp csrc/cpu/decode.cpp -o $@

# In an environment of its own, since .venv's torch may be a build without CUDA. `===` takes exactly this release, which
# is the one with CUDA on Linux; `==` would take 2.13.0+cpu for it where that is at hand. About 5 GB.
CUDA_ENV := build/cuda-venv
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
cuda-build: $(CUDA_ENV)/.ready  ## compile the CUDA kernels with nvcc against torch's build with CUDA, and check them; no GPU needed
	$(CUDA_ENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation .
	$(CUDA_ENV)/bin/python tests/cuda/check_build.py

$(CUDA_ENV)/.ready: constraints.txt
	$(PYTHON) -m venv $(CUDA_ENV)
	$(CUDA_ENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch===$(TORCH) setuptools ninja
	@touch $@

ui: $(READY)  ## open MLflow on this machine
	@$(BIN)/python -m pipelines.tools.ui

clean:  ## remove what the pipeline made; the environment and MLflow's store stay
	rm -rf data models samples checkpoints reports/runs .dvc/cache .dvc/tmp build .pytest_cache .mypy_cache .ruff_cache .hypothesis
