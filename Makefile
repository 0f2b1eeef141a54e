# make setup: a virtual environment with everything. make demo: the main job. make test, test-slow, lint, smoke: the checks.
# make site: the documents as a site, in site/. make clean: caches, sweeps and the site go; runs/ and data/ stay.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS := .venv-docs

.PHONY: setup demo test test-slow lint smoke format site clean

setup: $(VENV)/.installed

# The project itself is installed in place, so that its modules can be imported from any folder.
$(VENV)/.installed: requirements.txt requirements-no-deps.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-no-deps.txt --editable .
	touch $@

demo: setup
	PYTHON=$(BIN)/python bash experiments/demo.sh

test: setup
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -q -n 2 -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smoke: setup
	PYTHON=$(BIN)/python bash experiments/smoke.sh

# An environment of its own: the site needs neither PyTorch nor the project to be installed.
$(DOCS)/.installed: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

site: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

clean:
	rm -rf outputs site .pytest_cache .ruff_cache .mypy_cache .hypothesis
