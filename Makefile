# `make help` lists what there is. Everything installs into .venv; nothing needs the network but pip.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PIP_APART := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile
TRANSFORMERS_4 := transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
TRANSFORMERS_5 := transformers==5.23.0

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench setup tools clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: setup ## from nothing: build shards from real history and train a small model on them
	@$(BIN)/python examples/demo.py

test: tools lint ## from nothing: lint, types, and all tests
	$(BIN)/python -m pytest -q --durations=10

lint: tools ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## every performance claim, ours against the peer in one run; REPOS="a.git" DATASET=data
	@$(PIP) -e '.[bench,datasketch]'
	$(BIN)/python bench/mining.py $(REPOS)
	$(BIN)/python bench/dedup_minhash.py
	$(BIN)/python bench/train_cpu.py
	$(if $(DATASET),$(BIN)/python bench/encoding.py $(DATASET))
	$(if $(REPOS),$(BIN)/python bench/real_repositories.py $(REPOS))

setup: $(VENV)/.installed

tools: $(VENV)/.tools

# pip must never choose torch by itself: on Linux it would bring gigabytes of CUDA libraries. Where
# pip's own sources hold no CPU build, uv is asked, which knows where PyTorch publishes them.
$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v git >/dev/null || { echo "codeflow needs the git command"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "codeflow needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@echo "installing torch (CPU build) and what constraints.txt pins; a few minutes the first time"
	@$(PIP) torch 2>/dev/null || { $(PIP) uv && \
		$(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend=cpu torch==2.13.0; } || \
		{ echo "no CPU build of torch 2.13.0 found: install one into $(VENV) by hand (README)"; exit 1; }
	@$(PIP) -e '.[train]'
	@touch $@

# Ray and a local object store, for their tests, make this the larger part. The exported models are
# tested in two versions of transformers, each in a folder of its own with what it alone needs.
$(VENV)/.tools: $(VENV)/.installed Makefile
	@echo "installing the tools of the tests"
	@$(PIP) -e '.[dev]'
	@rm -rf $(VENV)/transformers-4 $(VENV)/transformers-5
	@$(PIP_APART) --target $(VENV)/transformers-4 $(TRANSFORMERS_4)
	@$(PIP_APART) --target $(VENV)/transformers-5 $(TRANSFORMERS_5)
	@touch $@

clean: ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
