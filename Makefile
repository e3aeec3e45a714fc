# Front door. `make demo` and `make test` need nothing but Python >= 3.10 and a C++17 compiler: they create .venv,
# install into it, build the kernels and run. Everything else builds on the same environment.
#
#   PYTHON=python3.12   the interpreter .venv is made of
#   VENV=.venv          where the environment lives
#   TORCH=...           what pip installs as torch when the environment has none (any torch >= 2.10), for example
#                       TORCH="torch==2.13.0 --index-url <the CPU or CUDA index of your choice>"
#   INPAINT_KERNELS_BUILD=auto|none|cpu|cuda   which libraries are built (see CONTRIBUTING.md)
#   ARGS="..."          passed on to the demo, the benchmarks or pytest

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
BIN := $(VENV)/bin
# Compiling every module of every package to bytecode takes longer than installing it; Python does it on import, unless
# the environment forbids it: then every process would compile torch anew, which takes seconds.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# One thread per process: the tests use as many processes as there are cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.NOTPARALLEL:
.PHONY: help demo style test test-interpreter test-emulated test-resources test-torch-2.14 bench tables lint format wheel asan gpu build doctor clean

help:
	@sed -n 's/^\([a-z0-9.-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | column -t -s '|'

demo: $(VENV)/.stamp-demo build ## train a small inpainting network on real photographs
	$(BIN)/python examples/train.py $(ARGS)

style: $(VENV)/.stamp-demo build ## move a photograph toward the style of another one
	$(BIN)/python examples/style_transfer.py $(ARGS)

# Without what `test-resources` compiles ahead of time, on two Tritons of its own. ROWS=all: more rows of the tests that
# wait for compilers.
ROWS ?=
test: export INPAINT_KERNELS_TEST_ROWS := $(or $(ROWS),$(INPAINT_KERNELS_TEST_ROWS))
test: $(VENV)/.stamp-test $(VENV)/.stamp-trunks build ## all tests this machine can run, Triton through its interpreter
	$(PYTEST) -n 2 tests --ignore-glob='*/test_resources*' $(ARGS)
	$(MAKE) test-interpreter
	$(MAKE) test-emulated

# In a process of its own: interpreted and compiled kernels cannot live side by side. Slow: of the tests one in
# INTERPRETED, scattered over all of them; INTERPRETED=1 runs all. Shares take turns from commit to commit.
INTERPRETED ?= 32
SHARE ?= $(shell git rev-list --count HEAD 2>/dev/null || echo 0)
TRITON_OPS = $(basename $(notdir $(wildcard inpaint_kernels/triton_kernels/[a-z]*.py)))
OP_TESTS = $(foreach op,$(TRITON_OPS),$(wildcard tests/test_$(op)*.py)) tests/test_values.py tests/test_training.py tests/test_derivatives.py
test-interpreter: $(VENV)/.stamp-test build ## the Triton kernels on the CPU
	@if $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  set -x; TRITON_INTERPRET=1 TEST_SHARE=$(SHARE)/$(INTERPRETED) PYTHONPATH=tools $(PYTEST) -p pytest_share -n 2 \
	    $(OP_TESTS) $(ARGS); \
	else echo 'Triton has no build for this platform: its kernels are not tested'; fi

# The CUDA kernels as C++, blocks and threads emulated. Slow: of the tests one in EMULATED, in the same way.
EMULATED ?= 24
test-emulated: $(VENV)/.stamp-test build ## the CUDA kernels on the CPU
	INPAINT_KERNELS_TEST_BACKENDS=emulated INPAINT_KERNELS_TEST_ROWS=covering TEST_SHARE=$(SHARE)/$(EMULATED) \
	  PYTHONPATH=tools $(PYTEST) -p pytest_share -n 2 $(OP_TESTS) $(ARGS)

# The oldest Triton served (torch 2.11's) and the newest (torch 2.14's), each in a folder of its own.
TRITONS := 3.6.0 3.8.0
.PRECIOUS: build/triton-%
build/triton-%: | $(VENV)/.stamp-test
	$(PIP) --no-deps --target $@.partial triton==$*
	mv $@.partial $@

test-resources: $(VENV)/.stamp-test build ## compile every Triton kernel ahead of time, check registers and loads
	@if $(BIN)/python -c 'import triton' 2>/dev/null; then $(MAKE) $(TRITONS:%=test-resources-%); \
	else echo 'Triton has no build for this platform: its kernels are not compiled'; fi

# SHARED=n: one test in n. The two Tritons take different shares.
SHARED ?= 1
test-resources-%: build/triton-%
	TEST_SHARE=$$(($(SHARE) + $(patsubst 3.%.0,%,$*) / 2))/$(SHARED) PYTHONPATH=$(CURDIR)/$<:tools \
	  $(PYTEST) -p pytest_share -n 2 tests/test_resources*.py $(ARGS)

# The libraries as they were built, under the newest torch they are known to serve. An environment of its own: the
# other one keeps its torch. OTHER_TORCH="torch==... torchvision==... --index-url <index>": another one, from elsewhere.
OTHER_TORCH ?= torch==2.14.1 torchvision==0.29.1
OTHER := .env-torch-2.14
test-torch-2.14: build ## the built libraries under torch 2.14.1, several gigabytes to download
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --no-compile $(OTHER_TORCH) \
	  'pytest>=8' pytest-xdist hypothesis expecttest numpy
	PYTHONPATH=. $(OTHER)/bin/python tools/smoke.py --expect cpu
	PYTHONPATH=. INPAINT_KERNELS_TEST_BACKENDS=cpu OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest -q -n 2 \
	  tests/test_backend.py tests/test_values.py $(wildcard $(TRITON_OPS:%=tests/test_%.py) tests/test_perceptual.py tests/test_trunk_weights.py) $(ARGS)

bench: $(VENV)/.stamp-bench build ## time the kernels against eager and compiled PyTorch
	$(BIN)/python -m inpaint_kernels bench $(ARGS)

tables: $(VENV)/.stamp-bench ## write the tables of the README and the plots from benchmarks/results
	$(BIN)/python -m benchmarks.report $(ARGS)

lint: $(VENV)/.stamp-dev $(VENV)/.stamp-test $(VENV)/.stamp-demo ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files -co --exclude-standard 'csrc/*' 'tests/csrc/*' | grep -E '\.(h|cpp|cu|cuh)$$' \
	  | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.stamp-dev ## rewrite everything as lint wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files -co --exclude-standard 'csrc/*' 'tests/csrc/*' | grep -E '\.(h|cpp|cu|cuh)$$' \
	  | xargs $(BIN)/clang-format -i

wheel: $(VENV)/.stamp-dev ## dist/*.whl, with build isolation
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m build --wheel

asan: $(VENV)/.stamp-test ## the CPU library and its tests under AddressSanitizer and UBSan
	tools/asan.sh $(BIN)/python $(ARGS)

gpu: ## on a machine with a GPU: smoke, tests and benchmarks in ten minutes, results in ./gpu_out
	[ -f inpaint_kernels/_C_cuda.so ] || INPAINT_KERNELS_BUILD=cuda $(PYTHON) setup.py -q build_ext --inplace
	PYTHON=$(PYTHON) tools/gpu_run.sh $(ARGS)

doctor: build ## what is installed, which backend runs, what to do
	$(BIN)/python -m inpaint_kernels doctor

# ---- environment -------------------------------------------------------------------------------------------------

# A library whose sources did not change costs half a second here.
build: $(VENV)/.stamp-package ## compile what changed in csrc/
	$(BIN)/python setup.py -q build_ext --inplace

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is missing or older than 3.10; name another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "make: $(PYTHON) cannot make environments (on Debian: apt install python3-venv)"; exit 1; }

# A torch that is already there stays, whatever its version.
$(VENV)/.stamp-torch: | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || \
	  $(BIN)/python -m pip install --disable-pip-version-check --no-compile $(TORCH)
	$(PIP) 'setuptools>=77' ninja numpy
	@touch $@

# Editable, so that examples, tests and benchmarks import this tree from wherever they are started. Nothing is built:
# pip would compile everything anew, in a folder of its own, for each of these; `build` does it once. Libraries that
# are there stay.
EDITABLE := INPAINT_KERNELS_BUILD=none $(PIP) --no-build-isolation
$(VENV)/.stamp-package: pyproject.toml setup.py $(VENV)/.stamp-torch
	$(EDITABLE) --no-deps -e .
	@touch $@

# Several extras at once: make .venv/.stamp-dev,test
comma := ,
$(VENV)/.stamp-%: pyproject.toml setup.py $(VENV)/.stamp-torch
	$(EDITABLE) -e '.[$*]'
	@touch $@ $(addprefix $(VENV)/.stamp-,package $(subst $(comma), ,$*))

clean: ## remove what was built, keep .venv
	rm -rf build dist *.egg-info inpaint_kernels/*.so inpaint_kernels/_build_info.json
