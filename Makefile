# Every target makes or reuses .venv and installs what it needs. A fresh machine has python3, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test parity bench accelerator lint clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

$(VENV)/.base: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/pip install -q -e '.[test]'
	touch $@

# torch first and by version: peft alone would bring the newest build with its CUDA libraries.
$(VENV)/.parity: $(VENV)/.test
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[test,parity]'
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(BIN)/pip install -q -e '.[test,lint]'
	touch $@

quickstart: $(VENV)/.base
	$(BIN)/python train.py configs/quickstart.py --workdir out/quickstart --overwrite

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --ignore tests/parity

parity: $(VENV)/.parity
	$(BIN)/python -m pytest -n 2 tests/parity

bench: $(VENV)/.parity
	$(BIN)/python benchmarks/train_vs_peft.py

accelerator: $(VENV)/.base
	$(BIN)/python benchmarks/accelerator.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) out
