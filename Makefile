# make quickstart   install and train a small model on real text: about 10 minutes on two cores
# make million      two optimizer steps on one sequence of 1,048,576 tokens
# make slurm-demo   the quickstart as a job of a Slurm brought up here, interrupted, resumed by itself (root on Debian or Ubuntu)
# make screenshots  the pictures of docs/monitoring.md, from a small run (Chromium)
# make test         lint and test                 make lint      only ruff, pyright and the import rules
# make install      only the environment          make clean     remove what the others made, runs excepted
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PINS := pyproject.toml scripts/install.sh $(wildcard constraints/*.txt)
# A real book, one document, where it is at hand; else million.yaml's own source.
BOOK := $(firstword $(wildcard ../shared/data/books/war-and-peace.txt))
MILLION := $(if $(BOOK),data.source=text data.path=$(BOOK))
PYTEST_ARGS ?=
SLURM_PACKAGES := slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
DEMO ?=

.PHONY: help install quickstart million slurm-demo screenshots test lint clean

help:
	@sed -n 's/^# make /make /p' Makefile

install: $(VENV)/.installed

$(VENV)/.installed: $(PINS)
	@scripts/install.sh $(VENV)
	@touch $@

$(VENV)/.installed-dev: $(PINS)
	@scripts/install.sh $(VENV) dev
	@touch $@ $(VENV)/.installed

quickstart: install
	@$(BIN)/longstride train quickstart
	@echo 'The commands are in $(BIN): source $(BIN)/activate'

million: install
	@$(BIN)/longstride train million $(MILLION)

# DEMO: a config and settings, such as DEMO='debug_cpu parallel.cp=2 train.steps=300'.
slurm-demo: install
	@[ -x /usr/sbin/slurmctld ] || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES) >/dev/null; }
	@$(BIN)/python scripts/slurm_demo.py $(DEMO)

screenshots: install
	@$(BIN)/python scripts/screenshots.py

# Three workers, also on two cores: ranks and jobs are waited for. The suite is a few long files that start ranks, which come first
# (tests/conftest.py), and many short ones. A file stays in one worker, its runs are shared. Bytecode is written, whatever the shell says:
# without it each of some hundred processes would compile the project's sources again.
test: lint
	@OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
