# make install | demo | test | test-all | bench | lint | build | clean
#
# Everything runs in .venv, which is made when it is missing. Stamps in it say which extras are installed; they are renewed
# when the packaging or the native code changes.
#
# PYTHON       the interpreter that makes .venv, 3.10 or newer  (python3)
# PIP_ARGS     options for pip, to choose a torch build         (none)
# PYTEST_ARGS  options for pytest                               (none)

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
SOURCES := pyproject.toml setup.py CMakeLists.txt clipup_kernels/_version.py $(wildcard csrc/*.* csrc/cpu/* csrc/cuda/*)

# What pyproject.toml's [build-system] requires: with it in .venv, installing again after an edit needs no network.
BUILD_TOOLS := 'setuptools>=77' 'cmake>=3.24' ninja 'pybind11>=2.13'

# The stamp of an extra. Once all extras are installed, theirs serves every target.
installed = $(firstword $(wildcard $(VENV)/.installed-all) $(VENV)/.installed-$(1))
comma := ,
space := $() $()

.PHONY: install demo test test-all test-native bench lint format build clean

install: $(VENV)/.installed-all

# Threads wait for each other asleep after a short while, so that another program on one of the cores costs little.
demo: $(call installed,demo)
	GOMP_SPINCOUNT=2000 $(BIN)/clipup demo --out runs/demo --overwrite

test: $(call installed,test)
	$(BIN)/python -m pytest -q -m "not slow and not cuda" $(PYTEST_ARGS)

# Tests marked cuda run where there is a GPU.
test-all: $(call installed,test) test-native
	$(BIN)/python -m pytest -q -m "$$(nvidia-smi -L >/dev/null 2>&1 || echo not cuda)" $(PYTEST_ARGS)
	CLIPUP_BACKEND=reference $(BIN)/python -m pytest -q tests/clipup_kernels -k "not backend_info and not number_of_threads"

# The native code by itself, under the sanitizers.
test-native: $(VENV)/.build-tools
	for sanitizer in address,undefined thread; do \
	  $(BIN)/cmake -S . -B build/native-$$sanitizer -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DCLIPUP_PYTHON=OFF -DCLIPUP_NATIVE_TESTS=ON -DCLIPUP_SANITIZE=$$sanitizer && \
	  $(BIN)/cmake --build build/native-$$sanitizer && build/native-$$sanitizer/native_tests || exit 1; \
	done

bench: $(call installed,bench)
	$(BIN)/python -m pytest -q benchmarks --benchmark-only $(PYTEST_ARGS)

lint: $(call installed,test)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(call installed,test)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

build: $(call installed,test)
	rm -rf dist
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf build dist *.egg-info clipup_kernels/_C.* $(VENV)/.installed-*

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "clipup needs Python 3.10 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) made no $(VENV): it needs its venv module (Debian: apt install python3-venv)" >&2; exit 1; }

$(VENV)/.build-tools: $(VENV)/bin/python
	$(PIP_INSTALL) $(BUILD_TOOLS)
	@touch $@

# Extras that were installed before are installed along with the one asked for, so that one build renews every stamp.
extras = $(subst $(space),$(comma),$(sort $* $(patsubst $(VENV)/.installed-%,%,$(wildcard $(VENV)/.installed-*))))
$(VENV)/.installed-%: $(VENV)/.build-tools $(SOURCES)
	@echo "installing clipup[$(extras)] into $(VENV), which takes a minute or more the first time"
	$(PIP_INSTALL) --no-build-isolation --editable ".[$(extras)]"
	@touch $@ $(wildcard $(VENV)/.installed-*)
