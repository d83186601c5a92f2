# `make run` shows what works; `make test` runs everything that continuous integration runs. Each makes .venv first.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: run test lint clean

run: $(READY)
	@# exit code 1 means that some claim fails or cannot be told, which is a result and not an error
	@$(BIN)/workingpapers check --all --scale smoke || [ $$? -eq 1 ]
	@echo
	@$(BIN)/workingpapers report report

test: $(READY) lint
	$(BIN)/pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(READY): pyproject.toml constraints.txt requirements-data.txt requirements-peers.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all]'
	$(BIN)/pip install --quiet --no-deps --requirement requirements-data.txt --requirement requirements-peers.txt
	@touch $@

clean:
	rm -rf .venv report
