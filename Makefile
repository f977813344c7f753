# demo, test, bench and lint each begin with nothing but python3, make and a C++ compiler.
#
#   PYTHON=python3.12    the interpreter that the virtual environment is made from
#   TORCH=torch==2.11.0  another torch (pip's own configuration says from where)
#   VENV=.venv-2.11      another environment beside the first
#   FORCE_CUDA=1         the CUDA kernels, beside a torch for the CPU too, which take minutes; test compiles them wherever
#                        nvcc is found, demo and bench only beside a CUDA build of torch, and with 0 nobody does

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

# Of the tests, each of which uses one thread unless it says otherwise.
workers = $(shell $(PYTHON) -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')

# Whether test wants the CUDA kernels.
cuda := $(filter 1,$(or $(FORCE_CUDA),$(if $(shell command -v nvcc),1)))

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONPATH := $(CURDIR)

python := $(VENV)/bin/python
pip := $(python) -m pip install --quiet
say = @printf 'pyperc: %s\n'

DEMO ?= --data digits --compare torch

.PHONY: help build demo test bench gpu lint format clean FORCE

help:
	@printf '%s\n' \
	  'make demo    train on handwritten digits, beside plain torch' \
	  'make test    the tests and the documentation examples' \
	  'make bench   measure against plain torch (12 minutes) and write the README tables' \
	  'make gpu     on a machine with a GPU, torch and nvcc: the tests, then the times (25 minutes, no network)' \
	  'make lint    ruff, mypy --strict, clang-format' \
	  'make format  let ruff and clang-format rewrite the sources' \
	  'make build   compile the kernels only' \
	  'make clean   remove what was built (the environment stays: rm -r $(VENV))'

demo: build $(VENV)/.extra-demo
	@$(python) -m pyperc train $(DEMO)

test: build $(VENV)/.extra-test $(if $(cuda),build/cuda.stamp $(VENV)/.extra-cuda)
	$(python) -m pytest -n $(workers) $(PYTEST_ARGS)

bench: build $(VENV)/.extra-bench
	$(python) -m pyperc bench --full --json bench/results/cpu.json --plot bench/results
	$(python) bench/report.py bench/results/cpu.json

# The environment as it is found: nothing is installed, and what it lacks is skipped. The times follow failed tests too.
gpu_workers = $(if $(shell $(PYTHON) -c 'import xdist; print(1)' 2>/dev/null),-n $(workers))
gpu_lacks = --doctest-ignore-import-errors --continue-on-collection-errors
gpu:
	@mkdir -p build bench/results
	FORCE_CUDA=1 $(PYTHON) setup.py build_ext --inplace > build/native.log 2>&1 || { tail -n 60 build/native.log; exit 1; }
	status=0; $(PYTHON) -m pytest -q $(gpu_workers) $(gpu_lacks) $(PYTEST_ARGS) || status=1; \
	  $(PYTHON) bench/gpu.py --json bench/results/gpu.json || status=1; exit $$status

python_sources := pyperc $(wildcard tests bench tools) setup.py
native_sources = $(shell find csrc tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

lint: $(VENV)/.extra-lint
	$(python) -m ruff check $(python_sources)
	$(python) -m ruff format --check $(python_sources)
	$(python) -m mypy --strict pyperc
	@printf 'clang-format --dry-run -Werror csrc tests/cuda\n'
	@$(VENV)/bin/clang-format --dry-run -Werror $(native_sources)

format: $(VENV)/.extra-lint
	$(python) -m ruff check --fix $(python_sources)
	$(python) -m ruff format $(python_sources)
	@$(VENV)/bin/clang-format -i $(native_sources)

clean:
	rm -rf build dist *.egg-info pyperc/*.so pyperc/_build.py
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find pyperc tests bench tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# One stamp for each concern: the environment with torch, the native module, each extra of pyproject.toml.

$(python):
	$(say) 'making $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv $(VENV)

# Holds the torch that was asked for, and is rewritten only when that changes.
$(VENV)/.torch-wanted: FORCE | $(python)
	@printf '%s\n' '$(TORCH)' | cmp -s - $@ || printf '%s\n' '$(TORCH)' > $@

$(VENV)/.torch: $(VENV)/.torch-wanted tools/requirements.py
	$(say) 'installing $(TORCH) into $(VENV)'
	@$(python) -m pip install '$(TORCH)' $$($(python) tools/requirements.py build)
	@touch $@

$(VENV)/.extra-%: pyproject.toml tools/requirements.py $(VENV)/.torch
	$(say) 'installing what $* needs'
	@$(pip) $$($(python) tools/requirements.py $*)
	@touch $@

build: build/native.stamp

define compile
mkdir -p build
$(python) setup.py build_ext --inplace 2>&1 | tee build/native.log | \
  sed -nu 's#^\(\[[0-9]*/[0-9]*\]\).* -c [^ ]*/\(csrc/[^ ]*\) .*#  \1 \2#p' || \
  { grep -v -e '^\[' -e '^FAILED' build/native.log | cut -c -300 | tail -n 60; exit 1; }
touch $@
endef

# The list of files holds directories too, whose time changes when a file is added or removed.
build/native.stamp: setup.py pyproject.toml $(shell find csrc 2>/dev/null) $(VENV)/.torch
	$(say) 'compiling the kernels (one to three minutes the first time; everything in build/native.log)'
	@$(compile)

# Links the same objects once more, with those of CUDA.
build/cuda.stamp: export FORCE_CUDA := 1
build/cuda.stamp: build/native.stamp
	$(say) 'compiling the CUDA kernels (some minutes the first time)'
	@$(compile)
