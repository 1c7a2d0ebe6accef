# The targets are listed by `make help`.
#
# The environment is $(VENV), made with $(PYTHON)'s venv and pip, at pinned versions.
# `make PYTHON=/path/to/python VENV= test` uses that interpreter's own environment instead: then
# nothing is installed but fusedrnn itself.

PYTHON ?= python3
VENV := .venv

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build
export CXX
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CSRC := $(shell find csrc -type f 2>/dev/null)
CXX_FILES := $(filter %.h %.cpp %.cu %.cuh,$(CSRC) $(wildcard bench/cuda/* tests/kernels/*))
# What the extension is compiled from; a stamp below depends on it.
BUILD_INPUTS := setup.py pyproject.toml $(CSRC)

ifneq ($(VENV),)
PY := $(VENV)/bin/python
ENV := $(VENV)/.stamp-dev
BENCH_ENV := $(VENV)/.stamp-bench
# Two tests at a time (pytest-xdist): most of them leave a core idle.
SIDE_BY_SIDE := -n 2 --dist worksteal
else
PY := $(PYTHON)
ENV := build/.stamp-given
BENCH_ENV := $(ENV)
endif

.PHONY: help env bench-env build test demo bench lint format sanitize cuda-probe clean distclean FORCE

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12
	@echo "example-NAME  run examples/NAME.py; ARGS=\"--tiny\" is passed on"

env: $(ENV)  ## make the environment
bench-env: $(BENCH_ENV)  ## the same, with the peers that `make bench` compares with

build: build/.stamp-installed  ## compile what has changed, install in place

# First the tests that do not mind company, then those that measure. pytest's 5 says that ARGS
# selected none: of one half that is no failure, of both it is.
test: build  ## the whole test suite; ARGS="-k gru" is passed on
	@first=0; second=0; \
	$(PY) -m pytest $(SIDE_BY_SIDE) -m "not alone" $(ARGS) || first=$$?; \
	[ $$first -eq 0 ] || [ $$first -eq 5 ] || exit $$first; \
	$(PY) -m pytest -m alone $(ARGS) || second=$$?; \
	[ $$second -eq 5 ] && exit $$first; exit $$second

demo: build  ## train a character model with torch.nn and with fusedrnn, side by side
	$(PY) examples/char_lm.py $(ARGS)

example-%: build
	$(PY) examples/$*.py $(ARGS)

bench: build $(BENCH_ENV)  ## time fusedrnn against its peers; ARGS="--quick" is passed on
	$(PY) -m bench.compare $(ARGS)

lint: $(ENV)  ## ruff and clang-format, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
ifneq ($(CXX_FILES),)
	@sh scripts/tool.sh $(PY) clang-format --dry-run --Werror $(CXX_FILES)
endif

format: $(ENV)  ## let ruff and clang-format change the files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
ifneq ($(CXX_FILES),)
	@sh scripts/tool.sh $(PY) clang-format -i $(CXX_FILES)
endif

# Many minutes to compile (make -j2), so no part of `make test`. SANITIZE_ISAS names what to run.
SANITIZE_SOURCES := tests/kernels/kernel_check.cpp csrc/cpu/isa.cpp csrc/cpu/plan.cpp $(wildcard csrc/cpu/kernels_*.cpp)
SANITIZE_OBJECTS := $(patsubst %.cpp,build/sanitize/%.o,$(SANITIZE_SOURCES))
SANITIZE_FLAGS := -O1 -g -std=c++20 -ffp-contract=fast -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZE_ISAS := baseline avx2 avx512

build/sanitize/%.o: %.cpp $(filter %.h,$(CSRC) $(wildcard tests/kernels/*))
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE_FLAGS) -Icsrc -I. -c $< -o $@

build/sanitize/kernel_check: $(SANITIZE_OBJECTS)
	$(CXX) $(SANITIZE_FLAGS) $^ -pthread -o $@

build/sanitize/tangent_check: $(subst kernel_check,tangent_check,$(SANITIZE_OBJECTS))
	$(CXX) $(SANITIZE_FLAGS) $^ -pthread -o $@

build/sanitize/matrix_check: build/sanitize/tests/kernels/matrix_check.o
	$(CXX) $(SANITIZE_FLAGS) $^ -o $@

sanitize: $(addprefix build/sanitize/,kernel_check tangent_check matrix_check)  ## the kernels alone under AddressSanitizer and UndefinedBehaviorSanitizer
	for isa in $(SANITIZE_ISAS); do $< $$isa && build/sanitize/tangent_check $$isa || exit 1; done
	build/sanitize/matrix_check || [ $$? -eq 77 ]  # no AVX-512 here

cuda-probe:  ## compile build/cuda/probe, which measures a GPU; needs nvcc, no GPU
	bash scripts/build_cuda_probe.sh

clean:  ## remove what was built; the environment stays
	rm -rf build dist *.egg-info fusedrnn/_C*.so .pytest_cache .ruff_cache .benchmarks examples/out
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## remove the environment too
	rm -rf .venv

# --- the environment --------------------------------------------------------------------------

ifneq ($(VENV),)
$(VENV)/bin/python:
	@sh scripts/doctor.sh --venv "$(PYTHON)"
	"$(PYTHON)" -m venv "$(VENV)"

$(VENV)/.stamp-%: requirements/%.txt requirements/build.txt requirements/dev.txt requirements/examples.txt | $(VENV)/bin/python
	$(PY) -m pip install --progress-bar on -r requirements/$*.txt
	@touch $@
endif

# A change of interpreter or of torch must rebuild: this file changes when they do, and only then.
build/.given: FORCE | $(if $(VENV),$(ENV))
	@mkdir -p build
	@sh scripts/python_id.sh "$(PY)" > $@.new
	@if cmp -s $@ $@.new; then rm $@.new; else mv $@.new $@; fi

build/.stamp-given: build/.given
	@sh scripts/doctor.sh --given "$(PYTHON)"
	@touch $@

# --- the package ------------------------------------------------------------------------------

# Two steps. `build_ext --inplace` compiles only what changed and shows the compiler's words; pip's
# editable install, needed once (and when the metadata changes), hides them and is slower.
build/.stamp-compiled: $(BUILD_INPUTS) build/.given $(ENV)
	@sh scripts/doctor.sh "$(PY)"
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

build/.stamp-installed: setup.py pyproject.toml build/.given | build/.stamp-compiled
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
