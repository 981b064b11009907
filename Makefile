# Needs Python 3.11+ and make; everything else is set up here. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs setup constraints clean

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z]+:.*##/ {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## train on three Atari games in turn, evaluate, write a report (3 minutes)
	$(BIN)/ooc-moe train --preset demo --games krull,road_runner,crazy_climber --steps-per-game 16384 --eval-steps 400

test: lint docs  ## lint, build the docs, then run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)  ## check style, types and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## build the pages as a site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

setup: $(READY)  ## make .venv and install everything into it (the others do it when needed)

constraints: $(READY)  ## pin the newest releases that pyproject.toml allows
	$(BIN)/python deploy/constraints.py

clean:  ## remove .venv, caches and build outputs; runs/ stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist

# The build backend comes first and from the same constraints, which pip's build isolation would not read.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "Setting up .venv; this takes some minutes, once."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt hatchling
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
