# The environment is made once, and made again when the pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.PHONY: demo test test-ci test-all chaos fuzz notebooks test-notebooks lint clean

demo: $(STAMP)  ## Train on handwritten digits, then look at the result.
	$(BIN)/vit-jax train --config=digits --workdir=runs/digits
	$(BIN)/vit-jax evaluate runs/digits

test: $(STAMP)  ## The tests, without the minutes-long ones.
	$(BIN)/pytest -n 2 -m "not slow"

test-ci: $(STAMP)  ## Promises that are too slow for `make test`.
	$(BIN)/pytest -n 2 -m ci

test-all: $(STAMP)  ## Every test.
	$(BIN)/pytest

chaos: $(STAMP)  ## 50 random faults over a run of two processes (a quarter of an hour).
	$(BIN)/python tests/chaos/chaos.py --faults=50

fuzz: $(STAMP)  ## An hour of damaged files for everything that is read.
	$(BIN)/python tests/fuzz/fuzz.py --minutes=60 --keep=fuzz-failures

notebooks: $(STAMP)  ## Run the notebooks and keep what they show in their files.
	$(BIN)/python scripts/run_notebooks.py --write

test-notebooks: $(STAMP)  ## Run the notebooks and change nothing.
	$(BIN)/python scripts/run_notebooks.py

lint: $(STAMP)  ## Style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## Remove the environment, caches and the demo's run.
	rm -rf $(VENV) runs/digits dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: install a newer one, then: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)
