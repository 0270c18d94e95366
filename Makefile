# `make demo` runs the main job, `make test` the tests; both set up .venv first. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
CORE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# What is installed: the checkout, or a file that it was packed into.
PACKAGE ?= --editable .

.PHONY: help setup sdist demo test test-lowest lint format docs bench suite sanitize torture clean

help:
	@echo "make demo      collect, train, distill and evaluate on hopper-medium; writes demo/"
	@echo "make test      run the tests"
	@echo "make test-lowest  run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest"
	@echo "make sdist     pack the source into dist/"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make format    apply ruff's and clang-format's formatting"
	@echo "make docs      build the documentation site into docs/_build; warnings are errors"
	@echo "make bench     time every op beside its peers"
	@echo "make suite     distill and evaluate the papers' table; continues from benchmarks/results/suite.jsonl"
	@echo "make sanitize  run the kernel tests and the whole path under address, undefined-behavior and thread sanitizers"
	@echo "make torture   attack files, processes, memory and disks for an hour; prints a table (docs/reliability.md)"
	@echo "make clean     remove .venv and everything built"

setup: $(VENV)/.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch is pinned and comes first, so that the ranges of the other packages find it already there.
$(VENV)/.installed: $(VENV)/bin/python $(CORE)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet $(PACKAGE)"[mujoco,teacher,faiss,flow,dev]"
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[mujoco,teacher,faiss,flow,bench,dev]"
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py --out demo

test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

sdist: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --sdist --outdir dist

test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct \
		--editable ".[mujoco,teacher,faiss,flow,dev]"
	.venv-lowest/bin/python -m pytest

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

docs: setup
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[docs]"
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.run

suite: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.studies.suite

sanitize: setup
	PYTHON=$(BIN)/python .ci/sanitize.sh

torture: setup
	$(BIN)/python tests/faults --minutes $(or $(MINUTES),60) --seed $(or $(SEED),0)

clean:
	rm -rf $(VENV) .venv-lowest build dist demo docs/_build sdw_fast/_C*.so *.egg-info
