# make demo | test | lint | bench | clean
#
# Every target sets up .venv first, with plain venv and pip, unless it is up to date. Another
# interpreter: make PYTHON=python3.12 test. Further arguments: make demo ARGS="--help".

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.orbq-core
DEV := $(VENV)/.orbq-dev
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-input --no-compile
NEEDED := "orbq needs Python 3.11 or newer: make PYTHON=/path/to/python3"

.PHONY: demo test lint bench clean distclean setup setup-dev FORCE
.DELETE_ON_ERROR:

demo: $(CORE)
	$(BIN)/python -m orbq.cli demo $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(DEV)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

bench: $(DEV)
	set -e; for file in benchmarks/bench_*.py; do $(BIN)/python $$file $(ARGS); done

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .jax_cache
	find orbq tests benchmarks -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

setup: $(CORE)
setup-dev: $(DEV)

# The stamps hold the path of the checkout: one that was moved or copied, or whose interpreter is
# gone, is set up again.
STALE := $(shell if $(BIN)/python -c "" 2>/dev/null; \
	then grep -LFsx -- "$(CURDIR)" $(CORE) $(DEV); else echo $(BIN)/pip $(CORE) $(DEV); fi)
$(STALE): FORCE

# pip and not python: venv makes it last, so that a set-up that broke off starts again
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and $(NEEDED))'
	$(PYTHON) -m venv --clear $(VENV)

$(CORE): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "setting up $(VENV): about half a minute"
	$(PIP) -c constraints.txt -e .
	@echo "$(CURDIR)" > $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "setting up $(VENV) with the tools for development: about a minute"
	$(PIP) -c constraints.txt -e '.[dev]'
	@echo "$(CURDIR)" | tee $(CORE) > $@
