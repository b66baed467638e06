# `make test` and `make demo` need nothing but Python 3.10+: the environment is made in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test quick demo lint clean

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Without what trains a model, starts processes or takes long: about two minutes, for between two edits.
quick: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

demo: .venv/installed
	sh demo.sh $(BIN)

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache
