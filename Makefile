# Each target works as the first command on a fresh clone: it creates .venv, installs and builds what it needs.

PYTHON ?= python3
# The build of torch to install. A bare `torch` would bring several GB of CUDA packages; a torch that PYTHON already
# has is used as it is.
TORCH ?= torch==2.13.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find csrc -type f)
TEST_SOURCES := $(shell find tests -name '*.cpp' -o -name '*.h' -o -name '*.cuh')

.PHONY: help install demo test bench lint format gates gpu gpu-quick tune clean

help:
	@echo "make demo     train on handwritten digits by backpropagation and by gradient decoupling; table and picture"
	@echo "make test     run the tests"
	@echo "make bench    time the kernels against PyTorch; table, picture, bench/results/"
	@echo "make install  create .venv and build the package into it"
	@echo "make lint     check the style of Python and C++ (make format: apply it)"
	@echo "make gates    the long checks: sanitizers, symbols, emulated CPUs, no compiler; Triton and CUDA without a GPU"
	@echo "make gpu      on a machine with a CUDA device: build, tests, compute-sanitizer, benchmark; 9 minutes at most"
	@echo "              (make gpu-quick: 3), with the packages that PYTHON=$(PYTHON) has; installs nothing"
	@echo "make tune     on a machine with a CUDA device: find the fastest tiles of the Triton kernels, for its architecture"

install: .venv/installed

.venv/installed: pyproject.toml setup.py $(SOURCES)
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then site=--system-site-packages; fi; \
	test -x $(BIN)/python || $(PYTHON) -m venv $$site .venv
	$(PIP) "setuptools>=77" wheel ninja pybind11 "numpy<2.4"
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
	$(PIP) "$(TORCH)"
	@echo "Building the kernels, once for each instruction set: about two minutes on two cores"
	PYTHONWARNINGS="ignore:Editable installation" $(PIP) --no-build-isolation --editable ".[examples,test,lint]"
	@touch $@

demo: install
	$(BIN)/python examples/train_digits.py

test: install
	$(BIN)/python -m pytest

bench: install
	$(BIN)/python -m bench

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(TEST_SOURCES)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(TEST_SOURCES)

gates: install
	$(BIN)/python -m tools.gates

# no .venv: such a machine often has no network, and its own torch is the one to test
gpu:
	$(PYTHON) -m tools.gpu

gpu-quick:
	$(PYTHON) -m tools.gpu --quick

tune:
	$(PYTHON) -m tools.gpu.tune

clean:
	rm -rf .venv build lgd_kernels/_C*.so *.egg-info
