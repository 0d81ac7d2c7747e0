# Everything is done by the tools in .venv, which `make install` builds from the locked
# requirement files; nothing is installed outside this directory.

# The newest Python here that has pip: a newer one is a faster one. PYTHON=… takes another.
ifndef PYTHON
PYTHON := $(shell for p in python3.14 python3.13 python3.12 python3; do \
            $$p -m pip --version >/dev/null 2>&1 && echo $$p && break; done)
endif
ifeq ($(PYTHON),)
$(error Python 3.11 or newer with pip is needed, and none was found: make PYTHON=...)
endif
VENV   := .venv
TOOLS  := .tools
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# FLORA's own SDK, which one test runs with node, and axe-core, which one runs in the dashboard's
# pages; left out where npm is not installed.
NPM    := tests/simulator/sdk tests/browser/axe
NPM_STAMPS := $(if $(shell command -v npm),$(NPM:=/node_modules/.installed))
# The Python that is here is used, and a machine's own settings add nothing to the lock files.
PIP    := PIP_CONSTRAINT=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
          $(PYTHON) -m pip
# This machine's certificates are trusted, as pip does; UV_SYSTEM_CERTS=0 takes uv's own.
UV_SYSTEM_CERTS ?= 1
UV     := UV_PYTHON_DOWNLOADS=never UV_FIND_LINKS= UV_CONSTRAINT= UV_OVERRIDE= \
          UV_SYSTEM_CERTS=$(UV_SYSTEM_CERTS) \
          PYTHONPATH=$(TOOLS) $(PYTHON) -m uv
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test bench soak check format lock audit docs dist screenshots clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) $(NPM_STAMPS)  ## make .venv with everything the project needs (does nothing where it is current)

$(TOOLS)/.installed: requirements/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make install PYTHON=...")'
	@rm -rf $(TOOLS)
	$(PIP) install --quiet --no-deps --require-hashes --target $(TOOLS) -r requirements/uv.txt
	@touch $@

$(STAMP): $(TOOLS)/.installed requirements/dev.txt pyproject.toml
	@$(BIN)/python -c '' 2>/dev/null || \
		$(UV) venv --quiet --clear --python "$$(command -v $(PYTHON))" $(VENV)
	$(UV) pip sync --quiet --python $(BIN)/python --require-hashes requirements/dev.txt
	$(UV) pip install --quiet --python $(BIN)/python --offline --no-deps --no-build-isolation \
		--editable .
	@touch $@

# Without them everything else still works, so only CI insists on them.
%/node_modules/.installed: %/package.json %/package-lock.json
	@if npm ci --prefix $* --ignore-scripts --no-audit --no-fund --loglevel=error \
		--fetch-retries=1 --fetch-timeout=30000; then touch $@; \
	else test -z "$$CI" && echo "the tests with $* are left out: npm could not install it"; fi

demo: install  ## watch the tracker work against a local FLORA, without a key
	$(BIN)/tracker demo

test: install  ## run the test suite, on SQLite and on a PostgreSQL that it starts itself
	@# Seven on two cores: many tests wait for processes rather than compute, but each further worker
	@# collects all tests, starts a PostgreSQL and adds context switches.
	$(BIN)/pytest -n 7 --dist worksteal $(PYTEST_ARGS)

bench: install  ## measure speed, API calls, memory and scale, for twenty minutes (BENCH=ingest takes some)
	$(BIN)/python -m bench $(BENCH)

soak: install  ## break it for half an hour, in every way we know (SOAKS="crash outage" takes some)
	$(BIN)/python -m bench.soaks $(SOAKS)

screenshots: install  ## take pictures of the dashboard, into docs/screenshots (needs Chromium)
	$(BIN)/python -m tools.screenshots

check: install  ## lint, formatting, types and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports

format: install  ## put the code into the project's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lock: $(TOOLS)/.installed  ## resolve the requirement files anew (UPGRADE=--upgrade takes newer releases)
	$(LOCK) --output-file requirements/runtime.txt pyproject.toml
	$(LOCK) --output-file requirements/dev.txt --constraint requirements/runtime.txt --group dev \
		--extra otel pyproject.toml
	$(LOCK) --output-file requirements/uv.txt --group pyproject.toml:bootstrap
	$(LOCK) --output-file requirements/build.txt --group pyproject.toml:build

audit: $(TOOLS)/.installed  ## look up known vulnerabilities of all that is locked (needs the network)
	PYTHONPATH=$(TOOLS) UV_SYSTEM_CERTS=$(UV_SYSTEM_CERTS) $(PYTHON) -m tools.audit

LOCK = UV_NO_CONFIG=1 $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
       --no-annotate --custom-compile-command "make lock" $(UPGRADE)

docs: install  ## build the documentation, into site, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

dist: install  ## build the wheel and the source archive, into dist
	$(BIN)/python -m hatchling build

clean:  ## remove the virtual environment and what the tools left behind
	rm -rf $(VENV) $(TOOLS) $(NPM:=/node_modules) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
