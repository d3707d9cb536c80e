# make install | demo | test | test-all | bench | lint | build | clean
#
# Everything runs in .venv, which is made when it is missing. A stamp in it says which extras are installed; it is renewed
# when the packaging or the native code changes.
#
# PYTHON     the interpreter that makes .venv          (python3)
# PIP_ARGS   options for pip, to choose a torch build  (none)

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/cpu/* csrc/cuda/*)

.PHONY: install demo test test-all test-native bench lint format build clean

install: $(VENV)/.installed-all

demo: $(VENV)/.installed-demo
	$(BIN)/clipup demo --out runs/demo --overwrite

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -m "not slow and not cuda"

test-all: $(VENV)/.installed-test test-native
	$(BIN)/python -m pytest -q
	CLIPUP_BACKEND=reference $(BIN)/python -m pytest -q tests/clipup_kernels --deselect tests/clipup_kernels/test_backend_info.py

# The native code by itself, under the sanitizers.
test-native: $(VENV)/.installed-test
	for sanitizer in address,undefined thread; do \
	  $(BIN)/cmake -S . -B build/native-$$sanitizer -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DCLIPUP_PYTHON=OFF -DCLIPUP_NATIVE_TESTS=ON -DCLIPUP_SANITIZE=$$sanitizer && \
	  $(BIN)/cmake --build build/native-$$sanitizer && build/native-$$sanitizer/native_tests || exit 1; \
	done

bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q benchmarks --benchmark-only

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

build: $(VENV)/.installed-test
	rm -rf dist
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf build dist *.egg-info clipup_kernels/_C.*

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "clipup needs Python 3.10 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable ".[$*]"
	@touch $@
