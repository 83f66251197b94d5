# make demo | test | lint | package | docs | extras | bench | clean
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
DOCS := $(VENV)/.orbq-docs
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-input --no-compile
NEEDED := "orbq needs Python 3.11 or newer: make PYTHON=/path/to/python3"

.PHONY: demo test lint package docs extras fuzz bench clean distclean setup setup-dev FORCE
.DELETE_ON_ERROR:

demo: $(CORE)
	$(BIN)/python -m orbq.cli demo $(ARGS)

test: lint package
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(DEV)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# The wheel, in a fresh environment of the interpreter FRESH, at work in an empty directory.
FRESH ?= $(BIN)/python
package: $(CORE)
	set -e; place=$$(mktemp -d); trap 'rm -rf "$$place"' EXIT; mkdir "$$place/empty"; \
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps -w "$$place" .; \
	$(FRESH) -m venv "$$place/venv"; \
	"$$place/venv/bin/python" -m $(subst $(BIN)/python -m ,,$(PIP)) -c constraints.txt \
		"$$place"/orbq-*-py3-none-any.whl; \
	cd "$$place/empty"; "$$place/venv/bin/python" -I "$(CURDIR)/tests/smoke_test.py"

# the site, into site/
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# Whether pip finds a set of versions for each extra. Nothing is installed, but pip fetches wheels
# whose index offers no metadata beside them: gigabytes for cuda. Some only: EXTRAS="dask mkl".
EXTRAS ?= $(shell sed -n '/^\[project.optional/,/^\[project.s/s/^\([a-z-]*\) = \[.*/\1/p' pyproject.toml)
extras: $(CORE)
	set -e; for extra in $(EXTRAS); do \
		$(PIP) --dry-run -c constraints.txt ".[$$extra]"; echo "$$extra: resolves"; done

# until stopped: make fuzz ARGS="structures -max_total_time=600"; or configurations, datasets, runs
fuzz: $(DEV)
	$(PIP) -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz $(ARGS)

bench: $(DEV)
	set -e; for file in benchmarks/bench_*.py; do $(BIN)/python $$file $(ARGS); done

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis .jax_cache
	find orbq tests benchmarks -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

setup: $(CORE)
setup-dev: $(DEV)

# The stamps hold the path of the checkout: one that was moved or copied, or whose interpreter is
# gone, is set up again.
STALE := $(shell if $(BIN)/python -c "" 2>/dev/null; \
	then grep -LFsx -- "$(CURDIR)" $(CORE) $(DEV) $(DOCS); \
	else echo $(BIN)/pip $(CORE) $(DEV) $(DOCS); fi)
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

$(DOCS): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "setting up $(VENV) with the tools for the documents: about half a minute"
	$(PIP) -c constraints.txt -e '.[docs]'
	@echo "$(CURDIR)" | tee $(CORE) > $@
