# make help lists the targets.
#
# Everything runs in .venv, which is created if it is missing. Stamp files in it record the installed extras; they expire when
# the packaging or the native code changes.
#
# PYTHON       the interpreter that creates .venv, 3.10 or newer (python3)
# PIP_ARGS     options for pip, to select a torch build         (none)
# PYTEST_ARGS  options for pytest                               (none)
# JOBS         processes of make test, one thread each; auto: one per core (auto)
# FUZZ_SECONDS how long test-all calls the native code with random arguments (60)
# FAULT_SECONDS how long test-all kills, freezes and damages training, half of it on two processes (600)
# SRC          a checkout of open_clip for test-open-clip
# FAULT_ARGS   options for tests/fault_injection/inject.py (none)
# ICONS        the study's data set, built by `python -m studies icons` (runs/icons/data)
# STUDY_RUNS   checkpoints of the study's runs (runs/icons/runs)
# ICONIFY      the unpacked npm package @iconify/json, for study-converged and those after it, models, demo-start (package)

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= auto
FUZZ_SECONDS ?= 60
FAULT_SECONDS ?= 600
FAULT_ARGS ?=
ICONS ?= runs/icons/data
STUDY_RUNS ?= runs/icons/runs
ICONIFY ?= package
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
SOURCES := pyproject.toml setup.py CMakeLists.txt clipup_kernels/_version.py $(wildcard csrc/*.* csrc/cpu/* csrc/cuda/*)

# pypa's build, and the requirements of pyproject.toml's [build-system]. With these in .venv, reinstalling after an edit needs no network.
BUILD_TOOLS := build 'setuptools>=77' 'cmake>=3.24' ninja 'pybind11>=2.13'

# The stamp file of an extra. Once all extras are installed, their stamp serves every target.
installed = $(firstword $(wildcard $(VENV)/.installed-all) $(VENV)/.installed-$(1))
comma := ,
space := $() $()

.PHONY: help install demo test test-all test-native test-fuzz test-triton test-ptx test-open-clip test-faults test-aarch64 bench study study-runs study-converged study-narrow models demo-start notebooks docs lint format build clean

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: $(VENV)/.installed-all  ## the package with its extras, editable, in .venv (200 s)

demo: $(call installed,demo)  ## upcycle a small CLIP, train and compare; a report (minutes)
	$(BIN)/clipup demo --out runs/demo --overwrite

test: $(call installed,test)  ## all but slow and cuda (5 to 10 minutes on two cores)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not slow and not cuda" $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=0 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "compiled and not slow" tests/clipup_kernels

test-ptx: $(call installed,test)  ## every variant of every kernel for GPUs as compiled, executed
	OMP_NUM_THREADS=1 TRITON_INTERPRET=0 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m compiled tests/clipup_kernels

# Tests marked cuda run if there is a GPU; the tests that interpret Triton's kernels then run in a separate process
# (tests/conftest.py). The tests of the ops run again on every backend and every instruction tier.
HAS_GPU = nvidia-smi -L >/dev/null 2>&1
OP_TESTS = $(addprefix tests/clipup_kernels/test_,ops.py packed_weights.py sparse_mlp.py transforms.py)
test-all: $(call installed,test) test-native test-fuzz test-aarch64 test-triton test-ptx test-faults  ## everything: slow ones, all backends and tiers, faults (hours)
	$(BIN)/python -m pytest -q -m "$$($(HAS_GPU) || echo not cuda)" $(PYTEST_ARGS)
	! $(HAS_GPU) || TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m interpreter
	CLIPUP_BACKEND=torch_eager $(BIN)/python -m pytest -q tests/clipup_kernels -m "not cuda and not interpreter" \
	  -k "not backend_info and not number_of_threads"
	CLIPUP_BACKEND=torch_matmul $(BIN)/python -m pytest -q $(OP_TESTS)
	tiers=$$($(call native_tests,address$(comma)undefined) --tiers) && for tier in $$tiers; do \
	  CLIPUP_CPU_ISA=$$tier $(BIN)/python -m pytest -q $(OP_TESTS) || exit 1; \
	done

# The tests of models, data and training on a checkout of open_clip (SRC) in place of the installed release.
test-open-clip: $(call installed,test)  ## models, data and training on a checkout of open_clip: SRC=DIR
	@test -d "$(SRC)/src/open_clip" || { echo "SRC=$(SRC) is no checkout of open_clip: it has no src/open_clip"; exit 1; }
	PYTHONPATH=$(abspath $(SRC))/src OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(JOBS) \
	  --dist worksteal -m "not slow and not cuda" $(PYTEST_ARGS) tests/clipup

# The Triton kernels interpreted, and compiled for GPUs that need not be there, under the oldest Triton that a supported
# torch brings, and compiled under that of torch 2.13 for CUDA. The oldest interpreter fails under numpy 2.4.
OLDEST_TRITON := build/triton-3.6
CUDA_TRITON := build/triton-3.7.1
test-triton: $(call installed,test)  ## Triton kernels under the oldest Triton and that of CUDA
	test -f $(OLDEST_TRITON)/triton/__init__.py || $(PIP_INSTALL) --target $(OLDEST_TRITON) 'triton==3.6.*' 'numpy<2.4'
	PYTHONPATH=$(OLDEST_TRITON) OMP_NUM_THREADS=1 TRITON_INTERPRET=1 \
	  $(BIN)/python -m pytest -q -n $(JOBS) -m "interpreter and not cuda" tests/clipup_kernels
	PYTHONPATH=$(OLDEST_TRITON) OMP_NUM_THREADS=1 TRITON_INTERPRET=0 \
	  $(BIN)/python -m pytest -q -n $(JOBS) tests/clipup_kernels/compiled/test_ops.py
	test -f $(CUDA_TRITON)/triton/__init__.py || $(PIP_INSTALL) --target $(CUDA_TRITON) 'triton==3.7.1'
	PYTHONPATH=$(CUDA_TRITON) OMP_NUM_THREADS=1 TRITON_INTERPRET=1 \
	  $(BIN)/python -m pytest -q -n $(JOBS) tests/clipup_kernels/interpreter/test_variants.py

# The native code alone: on every instruction tier of this CPU under the address and undefined-behavior sanitizers and as
# shipped, on AMX tiles by emulation, with the int8 results of avx512_vnni, and on the best tier under the thread sanitizer.
NATIVE_BUILD = $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCLIPUP_PYTHON=OFF \
  -DCLIPUP_NATIVE_TESTS=ON
native_tests = OMP_WAIT_POLICY=passive build/native-$(1)/native_tests

test-native: $(VENV)/.build-tools  ## csrc under sanitizers and as shipped, on every tier
	for sanitizer in address,undefined thread; do \
	  $(NATIVE_BUILD) -B build/native-$$sanitizer -DCLIPUP_SANITIZE=$$sanitizer && \
	  $(BIN)/cmake --build build/native-$$sanitizer || exit 1; \
	done
	$(NATIVE_BUILD) -B build/native-release && $(BIN)/cmake --build build/native-release
	tiers=$$($(call native_tests,address$(comma)undefined) --tiers) && for tier in $$tiers; do \
	  CLIPUP_CPU_ISA=$$tier $(call native_tests,address$(comma)undefined) || exit 1; \
	done
	tests="$(call native_tests,address$(comma)undefined)"; \
	if env $$tests --emulate-tiles --tiers | grep -qx amx; then \
	  CLIPUP_CPU_ISA=amx env $$tests --emulate-tiles --quick && \
	  digest=$$(CLIPUP_CPU_ISA=amx env $$tests --emulate-tiles --int8-digest) && \
	  test "$$digest" = "$$(CLIPUP_CPU_ISA=avx512_vnni env $$tests --int8-digest)" || \
	    { echo "FAILED: the emulated AMX tier, or its int8 results are not those of avx512_vnni"; exit 1; }; \
	else \
	  echo "SKIPPED: native tests on emulated AMX (no avx512_bf16, or an assembler without AMX)"; \
	fi
	$(call native_tests,thread) --quick
	tiers=$$($(call native_tests,release) --tiers) && for tier in $$tiers; do \
	  CLIPUP_CPU_ISA=$$tier $(call native_tests,release) --quick || exit 1; \
	  CLIPUP_CPU_ISA=$$tier build/native-release/sparse_layer || exit 1; \
	done

# Random calls for FUZZ_SECONDS. A failure is printed with the seed that reproduces it.
test-fuzz: test-native  ## test-native, then random native calls for FUZZ_SECONDS (60)
	$(call native_tests,address$(comma)undefined) --fuzz $(FUZZ_SECONDS)

# Training under random faults, on one process and then on two. A failure is printed with the seed of its faults. Full disks
# are tested if a small one can be mounted (as root).
test-faults: $(call installed,test)  ## training under kills and damage for FAULT_SECONDS (600)
	$(BIN)/python tests/fault_injection/inject.py --processes 1 2 --seconds $$(($(FAULT_SECONDS) / 2)) $(FAULT_ARGS)

# Aarch64, emulated: a CPU with dot products and one without, each of which must choose its own tier.
# Debian: apt install g++-aarch64-linux-gnu qemu-user
QEMU_AARCH64 = $(firstword $(shell command -v qemu-aarch64; command -v qemu-aarch64-static))
test-aarch64: $(VENV)/.build-tools  ## the native tests on aarch64, emulated
	@if ! command -v aarch64-linux-gnu-g++ >/dev/null || [ -z "$(QEMU_AARCH64)" ]; then \
	  echo "SKIPPED: native tests on aarch64 (no aarch64-linux-gnu-g++ or no qemu-aarch64)"; \
	else \
	  $(NATIVE_BUILD) -B build/native-aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ && \
	  $(BIN)/cmake --build build/native-aarch64 && \
	  for cpu in max:neon_dotprod cortex-a53:portable; do \
	    $(QEMU_AARCH64) -cpu $${cpu%:*} -L /usr/aarch64-linux-gnu build/native-aarch64/native_tests --quick \
	      | tee build/native-aarch64/log && grep -q "^$${cpu#*:}: .* 0 failed" build/native-aarch64/log || exit 1; \
	  done; \
	fi

# Runs the notebooks and saves their outputs.
notebooks: $(call installed,test)  ## run the notebooks and save their outputs
	$(BIN)/python examples/run_notebooks.py examples/*.ipynb

# The manual as HTML, from docs/ and the docstrings, with its tables of measurements filled from benchmarks/results. A warning is an
# error, and so is a figure that its program draws otherwise.
docs: $(call installed,docs)  ## the manual as HTML: build/docs/index.html
	$(BIN)/python docs/tables.py
	$(BIN)/python -m pytest -q tests/docs/test_figures.py
	$(BIN)/sphinx-build -E -W --keep-going -q -d build/doctrees docs build/docs
	@echo build/docs/index.html

bench: $(call installed,bench)  ## benchmarks
	$(BIN)/python -m pytest -q benchmarks --benchmark-only $(PYTEST_ARGS)

# study: the studies' pages from their logs. study-runs: the runs that have no log yet, one at a time, at low priority. They take
# days in total, can be stopped at any time, and resume.
study: $(call installed,test)  ## the studies' pages from their logs
	$(BIN)/python -m studies report studies/icons --out docs/study.md
	$(BIN)/python -m studies report studies/memory --out docs/where_experts_pay.md

study-runs: $(call installed,all)  ## the study's missing runs (days; can be stopped, and resume)
	OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python -m studies run studies/icons --data $(ICONS) --runs $(STUDY_RUNS)

# The runs of the second part, which start from converged dense models, under the conditions of their plan
# (studies/converged/plan.md), and those at a higher rate, which stand apart.
CONVERGED := runs/converged
study-converged: $(call installed,all)  ## the runs of the second part (days)
	test -d $(CONVERGED)/data || $(BIN)/python -m studies icons $(CONVERGED)/data --package $(ICONIFY) --test-drawings
	OMP_NUM_THREADS=1 CLIPUP_CPU_ISA=avx512_bf16 nice -n 19 $(BIN)/python -m studies run studies/converged \
	  --data $(CONVERGED)/data --runs $(CONVERGED)/runs
	OMP_NUM_THREADS=1 CLIPUP_CPU_ISA=avx512_bf16 nice -n 19 $(BIN)/python -m studies run studies/converged_rate '*-lr0.008-*' \
	  --data $(CONVERGED)/data --runs $(CONVERGED)/runs

# The runs of the third part (studies/narrow/plan.md), on the second part's data.
NARROW := runs/narrow
study-narrow: $(call installed,all)  ## the runs of the third part (days)
	test -d $(CONVERGED)/data || $(BIN)/python -m studies icons $(CONVERGED)/data --package $(ICONIFY) --test-drawings
	OMP_NUM_THREADS=1 CLIPUP_CPU_ISA=avx512 nice -n 19 $(BIN)/python -m studies run studies/narrow \
	  --data $(CONVERGED)/data --runs $(NARROW)/runs

# The study's CLIP-UP that is best on validation, and the dense model that it starts from, as directories for others to take: with
# their results, also in int8 (int8.json), in the model cards, and a page about the experts. Trains them first, in hours.
MODELS := runs/models
DENSE_MODEL := dense-30000-lr0.002-s6
SPARSE_MODEL := clip_up-5000-lr0.004-from30000-s6
evaluate = $(BIN)/clipup eval $(MODELS)/$$run --val-data '$(CONVERGED)/data/test_names-*.tar' --multi-positive
models: $(call installed,all)  ## the study's best sparse model and its dense one (hours)
	test -d $(CONVERGED)/data || $(BIN)/python -m studies icons $(CONVERGED)/data --package $(ICONIFY) --test-drawings
	OMP_NUM_THREADS=1 CLIPUP_CPU_ISA=avx512_bf16 nice -n 19 $(BIN)/python -m studies run \
	  studies/converged $(DENSE_MODEL) $(SPARSE_MODEL) \
	  --data $(CONVERGED)/data --runs $(MODELS)/runs --logs $(MODELS)/logs
	for run in $(DENSE_MODEL) $(SPARSE_MODEL); do \
	  rm -rf $(MODELS)/$$run && cp -r $(MODELS)/runs/$$run/model $(MODELS)/$$run && cp $(CONVERGED)/data/LICENSES.md $(MODELS)/$$run && \
	  $(evaluate) --card && $(evaluate) --int8 --precision bf16 --device cpu --out $(MODELS)/$$run/int8.json || exit 1; \
	done
	$(BIN)/clipup inspect $(MODELS)/$(SPARSE_MODEL) --dense $(MODELS)/$(DENSE_MODEL) \
	  --images '$(CONVERGED)/data/test_names-*.tar' --out $(MODELS)/$(SPARSE_MODEL)/experts.html

# The dense model that the demonstration starts from, trained on icons of the npm package in ICONIFY; half an hour.
START := runs/start
demo-start: $(call installed,all)  ## the dense model that the demo starts from (half an hour)
	$(BIN)/python -m studies icons $(START)/data --package $(ICONIFY) --leave-out openmoji twemoji ph
	OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python -m studies run studies/demo --data $(START)/data --runs $(START)/runs
	$(BIN)/python -m studies.demo.ship $(START)/runs/start-5000-lr0.002-s0/model

lint: $(call installed,lint)  ## ruff, mypy and clang-format (a minute)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(call installed,lint)  ## ruff and clang-format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

build: $(VENV)/.build-tools  ## sdist and wheel in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist

clean:  ## remove what was built
	rm -rf build dist *.egg-info clipup_kernels/_C.* $(VENV)/.installed-*

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "clipup needs Python 3.10 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) made no $(VENV): it needs its venv module (Debian: apt install python3-venv)" >&2; exit 1; }

$(VENV)/.build-tools: $(VENV)/bin/python
	$(PIP_INSTALL) $(BUILD_TOOLS)
	@touch $@

# Extras that were installed before are installed together with the requested one, so one build renews every stamp.
extras = $(subst $(space),$(comma),$(sort $* $(patsubst $(VENV)/.installed-%,%,$(wildcard $(VENV)/.installed-*))))
$(VENV)/.installed-%: $(VENV)/.build-tools $(SOURCES)
	@echo "installing clipup[$(extras)] into $(VENV), which takes a minute or more the first time"
	$(PIP_INSTALL) --no-build-isolation --editable ".[$(extras)]"
	@touch $@ $(wildcard $(VENV)/.installed-*)
