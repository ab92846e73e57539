# Every target creates or reuses a virtual environment and installs what it needs. Required: python3, pip and make.
PYTHON ?= python3
VENV ?= .venv
# Exact versions for every Python and system; empty for the newest versions that pyproject.toml permits.
LOCK ?= requirements.txt
BIN := $(VENV)/bin
# uv reads no settings of pip. The build constraints pin setuptools, which builds this package and dependencies that have
# no wheel.
INSTALL := UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(BIN)/uv pip install -q --python $(BIN)/python
LOCKED := $(INSTALL) $(if $(LOCK),-c $(LOCK) --build-constraints $(LOCK),--upgrade)
# The last version with whose models PEFT 0.21.2 can use a prefix.
OLDER := transformers==5.23.0

COMPILE := $(BIN)/uv pip compile -q pyproject.toml --extra test --extra parity --extra lint --extra docs \
	--universal --python-version 3.11 --no-annotate --no-emit-index-url --no-emit-find-links

.PHONY: quickstart test parity bench accelerator lint docs package release lock newest lowest clean

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(if $(LOCK),-c $(LOCK)) --upgrade pip uv

$(VENV)/.base: pyproject.toml $(LOCK) | $(BIN)/uv
	$(LOCKED) -e '.[metrics,plots,datasets]'
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(LOCKED) -e '.[test]'
	touch $@

$(VENV)/.parity: $(VENV)/.test
	$(LOCKED) -e '.[test,parity]'
	rm -rf $(VENV)/older
	$(INSTALL) --no-deps --target $(VENV)/older $(OLDER)
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(LOCKED) -e '.[test,lint]'
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(LOCKED) -e '.[docs]'
	touch $@

quickstart: $(VENV)/.base
	$(BIN)/python train.py configs/quickstart.py --workdir out/quickstart --overwrite

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/parity

# Tests of PEFT's prefixes, which need an older transformers, run again with that version.
parity: $(VENV)/.parity
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/parity
	PYTHONPATH=$(VENV)/older $(BIN)/python -m pytest -n 2 --dist worksteal -m older_transformers tests/parity

bench: $(VENV)/.parity
	$(BIN)/python benchmarks/train_vs_peft.py

accelerator: $(VENV)/.base
	$(BIN)/python benchmarks/accelerator.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The site in out/site. The reference is read from the source, and nothing is imported.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The wheel and the source archive in dist/, with their metadata checked.
package: | $(BIN)/uv
	$(LOCKED) build twine
	rm -rf dist
	$(BIN)/python scripts/build_package.py $(BUILD)
	$(BIN)/twine check --strict dist/*

# The same for an upload: refused without the address of the project.
release:
	$(MAKE) package BUILD=--release

lock: | $(BIN)/uv
	$(COMPILE) requirements.in --upgrade --custom-compile-command 'make lock' -o requirements.txt

# The tests on the newest versions of everything, after a list of what differs from the lock file.
newest:
	rm -rf .venv-newest
	$(MAKE) VENV=.venv-newest LOCK= .venv-newest/.parity
	.venv-newest/bin/python scripts/compare_lock.py requirements.txt
	$(MAKE) VENV=.venv-newest LOCK= test parity

# The tests on the lowest versions that pyproject.toml permits.
lowest: | $(BIN)/uv
	rm -rf .venv-lowest && mkdir .venv-lowest
	$(COMPILE) --resolution lowest-direct -o .venv-lowest/requirements.txt
	$(MAKE) VENV=.venv-lowest LOCK=.venv-lowest/requirements.txt test

clean:
	rm -rf .venv .venv-newest .venv-lowest out
