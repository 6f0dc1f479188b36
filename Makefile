# The words of this project: setup check test demo bench docs; slow suites have their own.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup check test demo bench learning docs slow chaos matrix families foreign browser seeds clean

setup: $(DEV_STAMP)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "danlu needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

# torch first, as pinned in constraints.txt. On Linux the package index's torch brings CUDA libraries; without a GPU,
# `make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu` takes the small CPU build instead.
$(STAMP): $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(INSTALL) -e .
	touch $@

$(DEV_STAMP): $(STAMP)
	$(INSTALL) -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/danlu run recipes/quickstart.yaml

test: $(DEV_STAMP)
	$(BIN)/python -m pytest -m "not slow and not browser and not foreign" -n 2 -rs

check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -c 'import pathlib; from danlu.pipeline.recipe import load_recipe; [load_recipe(p) for p in pathlib.Path("recipes").glob("*.yaml")]'
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(DEV_STAMP)
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: open site/index.html"

# The peers' environments are made once; DATA_ROOT holds alpaca-en and hh-rlhf. Preparing data has its own: `benchmarks data`.
DATA_ROOT ?= ../shared/data
bench: $(DEV_STAMP)
	$(BIN)/python -m benchmarks peers
	$(BIN)/python -m benchmarks core --data-root $(DATA_ROOT)

# Proofs that alignment works, the quick ones: about 20 minutes.
learning: $(DEV_STAMP)
	$(BIN)/python -m benchmarks learning --quick --data-root $(DATA_ROOT)

# Minutes each: not part of `test`.
slow: $(DEV_STAMP)
	$(BIN)/python -m pytest -m slow -rs

# Thirty runs of seven stages, killed at random moments; part of `slow`.
chaos: $(DEV_STAMP)
	$(BIN)/python -m pytest tests/test_chaos.py -m slow -rs

# Families x adapters, for the table in docs/adapters.md; about half an hour.
matrix: $(DEV_STAMP)
	DANLU_MATRIX=docs/adapters.json $(BIN)/python -m pytest tests/test_adapters_matrix.py -m slow -q -rs
	$(BIN)/python docs/generate.py

browser: $(DEV_STAMP)
	$(BIN)/python -m pytest tests/browser -m browser -rs

# llama.cpp is built from source once, by llama-cpp-python, in an environment of its own (10 minutes on two cores).
LLAMA_CPP ?= $(HOME)/.cache/danlu/llama-cpp
LLAMA_CPP_VERSION := 0.3.36

$(LLAMA_CPP)/installed:
	$(PYTHON) -m venv $(LLAMA_CPP)
	CMAKE_BUILD_PARALLEL_LEVEL=2 CMAKE_ARGS="-DGGML_NATIVE=on -DLLAVA_BUILD=OFF" $(LLAMA_CPP)/bin/python -m pip install \
		--disable-pip-version-check llama-cpp-python==$(LLAMA_CPP_VERSION)
	echo $(LLAMA_CPP_VERSION) > $@

foreign: $(DEV_STAMP) $(LLAMA_CPP)/installed
	DANLU_LLAMA_CPP=$(LLAMA_CPP)/bin/python $(BIN)/python -m pytest tests/test_foreign.py -m foreign -rs

seeds: $(DEV_STAMP)
	$(BIN)/python -m benchmarks seeds

# What each model family can do, for the table in docs/families.md.
families: $(DEV_STAMP)
	$(BIN)/python tests/family_table.py docs/families.json
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) site build dist *.egg-info
