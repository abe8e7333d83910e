# `make demo` and `make test` are all that is needed; both set up .venv first, where that is missing.
# Python 3.11 or later and make are assumed; with a C++20 compiler the compiled backend is built too.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

CXX_FILES    = $(shell find csrc tests examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS = setup.py pyproject.toml constraints.txt $(shell find csrc -type f -not -path '*/__pycache__/*')

# The demo: the same small ResNet on handwritten digits, dense and sparse. make demo SEEDS="0 1 2" repeats it.
SEEDS ?= 0
DEMO_DENSE  = $(BIN)/granet train --method dense
DEMO_GRANET = $(BIN)/granet train --method granet --init-sparsity 0.5 --sparsity 0.9

# Clang with libFuzzer, and how long each target runs.
CLANG ?= $(firstword $(notdir $(wildcard /usr/bin/clang++ /usr/bin/clang++-[0-9][0-9])) clang++)
FUZZ_SECONDS ?= 30

# Files of tests at once, each on a core.
JOBS ?= 2

# What bench-cpu measures: all of bench/cpu, or a GROUP: step, selection, update, conv, linear, training, inference, engine.
# QUICK=1: a few cases and rounds of each, in two minutes instead of twenty.
GROUP ?=
QUICK ?=
BENCH_FILES = $(if $(GROUP),bench/cpu/test_$(GROUP).py,bench/cpu)
BENCH_NAME  = $(if $(GROUP),cpu-$(GROUP),cpu)

.PHONY: help setup demo say-demo test say-test docs fuzz lint format bench-cpu say-bench-cpu kernel-report simt clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:
	@echo "make demo     train a dense and a 90 % sparse network on handwritten digits, and compare them"
	@echo "make test     check style and types, run all tests (JOBS=2: so many files at once)"
	@echo "make docs     build the documentation as a site, in build/site"
	@echo "make fuzz     feed the selection and the mask codec random inputs for a minute (needs clang)"
	@echo "make lint     check style and types only"
	@echo "make format   rewrite the sources in the project's style"
	@echo "make bench-cpu  measure every kernel on the CPU against what it replaces: 20 minutes (QUICK=1: 2; GROUP=conv)"
	@echo "make kernel-report  compile every kernel for A100, H100 and B200, and check the code (needs no GPU)"
	@echo "make simt     compile the CUDA kernels for the host; GRANET_SIMT=1 then runs them on the CPU (needs no GPU)"
	@echo "make setup    create $(VENV) and install everything into it (the others do this by themselves)"
	@echo "make clean    remove $(VENV), build products and caches; results in runs/ stay"

demo: say-demo $(VENV)/installed
	@rm -rf runs/demo
	@for seed in $(SEEDS); do \
	  $(DEMO_DENSE) --seed $$seed --output runs/demo --experiment dense-$$seed && \
	  $(DEMO_GRANET) --seed $$seed --output runs/demo --experiment granet-$$seed || exit 1; \
	done
	@$(BIN)/granet report runs/demo

say-demo:
	@echo "make demo: set up $(VENV) where it is missing; train a small ResNet on scikit-learn's handwritten digits,"
	@echo "dense and then with GraNet from 50 % to 90 % sparsity; compare the two in a table. Results: runs/demo."

test: say-test lint
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Warnings are errors; nothing is fetched.
docs: $(VENV)/installed
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "build/site/index.html"

# Random inputs against a plain oracle, under sanitizers. Clang's runtime is in Debian's libclang-rt-*-dev.
fuzz: $(VENV)/installed
	@if ! command -v $(CLANG) >/dev/null; then echo "NOTE: no $(CLANG), so nothing was fuzzed"; exit 0; fi; set -e; \
	$(BIN)/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCMAKE_CXX_COMPILER=$(CLANG) -DGRANET_FUZZ=ON -DGRANET_BUILD_TESTS=OFF >/dev/null; \
	$(BIN)/cmake --build build/fuzz; \
	for target in build/fuzz/fuzz_*; do \
	  if [ -x $$target ]; then $$target -max_total_time=$(FUZZ_SECONDS) -max_len=2048 -print_final_stats=1; fi; \
	done

say-test:
	@echo "make test: set up $(VENV) where it is missing; check style and types; build and run all tests."

lint: $(VENV)/installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	@$(BIN)/mypy

format: $(VENV)/installed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CXX_FILES)

bench-cpu: say-bench-cpu $(VENV)/installed
	@$(BIN)/python -m pytest $(BENCH_FILES) --benchmark-quiet -q --bench-name $(BENCH_NAME) \
	  $(if $(QUICK),--quick --bench-out runs/bench-cpu)

say-bench-cpu:
	@echo "make bench-cpu: set up $(VENV) where it is missing; measure on one thread and on all, print a table, write a CSV."

# Fails where a kernel is not what bench/kernels/claims.py promises; keeps the table in bench/results/kernels.
kernel-report: $(VENV)/installed
	@$(BIN)/python -m bench.kernels
	@$(BIN)/python -m bench.kernels.cubins

simt: $(VENV)/installed
	@$(BIN)/python -m tests.simt.build

setup: $(VENV)/installed

# The project itself, editable; compiled again whenever a native source changes.
$(VENV)/installed: $(VENV)/dependencies $(BUILD_INPUTS)
	@echo "Set-up 2/2: building and installing granet_kernels and granet, with the tools for tests and training"
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@$(BIN)/python csrc/toolchain.py || \
	  echo "NOTE: no C++20 compiler, so only the slow reference backend is installed; install g++ and repeat."
	@touch $@

# What the build needs beforehand: it compiles against the torch that is installed.
$(VENV)/dependencies: constraints.txt
	@echo "Set-up 1/2: creating $(VENV) and installing PyTorch (.venv takes 6.4 GB in the end; some minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu, install the package python3-venv" >&2; exit 1; }
	$(PIP) install --quiet --constraint constraints.txt torch numpy setuptools pybind11 ninja
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info granet_kernels/*.so .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
