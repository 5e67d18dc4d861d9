# make setup: environment, dependencies, native module.   make demo: the main job.   make test: everything CI checks.
.DEFAULT_GOAL := help
SHELL := /bin/bash

# The first Python from 3.11 on; PYTHON=/path/to/python chooses another one.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Compiled afterwards, on all cores: pip does it on one. Some packages hold files that are no Python of this version.
INSTALL := $(PIP) install --no-compile
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

# Stamps are named for the content that they stand for, so that a checkout or a revert does what it should.
digest = $(shell { echo "$(CURDIR)"; cat $(1); } | sha256sum | cut -c 1-16)
KERNEL_SOURCES := $(sort $(wildcard kernels/CMakeLists.txt kernels/*.cc kernels/*.h))
DEPENDENCIES := $(VENV)/.dependencies-$(call digest,pyproject.toml constraints.txt)
NATIVE := $(VENV)/.native-$(call digest,pyproject.toml $(KERNEL_SOURCES))

# Processes for the tests: many of them wait for Ray, so three keep two cores busy. The longest files (tests/e2e) begin.
TEST_PROCESSES ?= 3
# Most of the time is that of processes which begin: they find lowprec compiled, also where Python was told to keep nothing.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --durations=20 -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo lint check test test-all test-asan bench clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: | $(NATIVE)  ## Make .venv with the pinned dependencies and build the native module; quick when nothing changed

# Dependencies and tools first, then lowprec itself without build isolation: what builds it is pinned as well.
$(DEPENDENCIES):
	@test -n "$(PYTHON)" || { echo "lowprec needs Python 3.11 or newer; python3 is $$(python3 --version 2>&1)." \
	  "Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@command -v c++ >/dev/null || { echo "lowprec needs a C++17 compiler and found no c++; on Debian: apt-get install g++" >&2; exit 1; }
	@test -e $(BIN)/python && $(BIN)/python -m pip --version >/dev/null || "$(PYTHON)" -m venv --clear $(VENV)
	@$(BIN)/python -c 'import os, sys, sysconfig; header = os.path.join(sysconfig.get_path("include"), "Python.h"); \
	  os.path.exists(header) or sys.exit(f"lowprec builds a native module and misses {header}; on Debian: apt-get install python3-dev")'
	@rm -f $(VENV)/.dependencies-* $(VENV)/.native-*
	$(INSTALL) -c constraints.txt cmake ninja nanobind scikit-build-core
	$(INSTALL) -c constraints.txt --no-build-isolation -e '.[cpu,dev,torchrec]'
	$(INSTALL) -c constraints.txt --no-deps torchrec
	$(COMPILE)
	@touch $@ $(NATIVE)

$(NATIVE): | $(DEPENDENCIES)
	@test -e $@ || $(PIP) install --no-build-isolation --no-deps -e .
	@rm -f $(VENV)/.native-*; touch $@

demo: setup  ## Make traffic, train a small model, search, confirm, report: everything on this machine
	$(BIN)/lowprec demo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -n 2
	MYPYPATH=tests/benchmarks:tests/support $(BIN)/mypy --cache-dir .mypy_cache/benchmarks --allow-untyped-calls --no-warn-return-any tests/benchmarks

# Unit tests that need no model, no Ray and no simulation: what to run after every edit.
FAST_TESTS := $(addprefix tests/,project/test_imports.py project/test_layout.py core plan config cli/render latency \
  traffic/test_decode.py traffic/test_window.py traffic/test_batch.py ops/test_reference.py ops/test_bounds.py \
  search/space/test_space.py)

check: lint  ## The inner loop: format, lint, types and the fast unit tests
	$(PYTEST) -m 'not slow' $(FAST_TESTS)

test: lint  ## What CI checks: format, ruff, mypy and all tests but the slow ones
	$(PYTEST) -m 'not slow'

test-all: lint  ## The slow tests too
	$(PYTEST)

# The installed module stays as it is. Memory of other libraries is not ours to watch: leaks are not looked for.
ASAN_MODULE = build/asan/_native$(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')

test-asan: setup  ## The tests of the kernels on a build that stops at accesses out of bounds and undefined behaviour
	$(BIN)/cmake -S kernels -B build/asan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_BUILD_TYPE=Debug \
	  -DLOWPREC_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -Dnanobind_DIR="$$($(BIN)/python -m nanobind --cmake_dir)"
	$(BIN)/cmake --build build/asan
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  $(BIN)/python tests/sanitized.py $(ASAN_MODULE) --capture=sys tests/ops tests/shards

bench: setup  ## Run one benchmark: make bench NAME=exact (a file in tests/benchmarks)
	@test -f "tests/benchmarks/$(NAME).py" || { echo "make bench NAME=...: one of" \
	  $(filter-out demo_model by_hand hypervolume passes demo_examples large_model sizes,$(basename $(notdir $(wildcard tests/benchmarks/*.py)))) >&2; exit 1; }
	@$(BIN)/python tests/benchmarks/$(NAME).py

clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis lowprec/_native*.so
	rm -rf kernels/.cmake kernels/.ninja_* kernels/.skbuild-info.json kernels/CMakeCache.txt kernels/CMakeFiles \
	  kernels/CMakeInit.txt kernels/build.ninja kernels/cmake_install.cmake kernels/*.a
	find lowprec jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +
