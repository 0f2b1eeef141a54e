# make setup: a virtual environment with everything. make demo: the main job. make test, test-slow, lint, smoke: the checks.
# make clean: caches and sweeps go; runs/ and data/ stay.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-slow lint smoke format clean

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

clean:
	rm -rf outputs .pytest_cache .ruff_cache .mypy_cache .hypothesis
