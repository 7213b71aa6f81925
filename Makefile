# The whole developer interface. `make quickstart` and `make test` work on a fresh machine with Python 3.10+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test check bench docs clean

quickstart: $(VENV)/installed ## train a small language model from nothing, and let it speak
	$(BIN)/llmlab run recipes/quickstart.yaml

test: $(VENV)/installed-dev ## run the test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/installed-dev ## lint and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/installed-dev ## speed and memory against peers, as ratios in one process
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/tokenize_corpus.py

docs: $(VENV)/installed-docs ## generate the pages of options and symptoms, and build docs/_build/html
	$(BIN)/python docs/reference.py docs/options.md
	$(BIN)/python -m sphinx -b html -W --keep-going -n -q docs docs/_build/html
	$(BIN)/python -m sphinx -b linkcheck -W --keep-going -q docs docs/_build/linkcheck

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip

# torch first and by its exact version, so that no other package's range picks another build
$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean: ## remove the virtual environment and what runs wrote
	rm -rf $(VENV) runs docs/_build docs/notebooks
