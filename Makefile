# make demo   the whole story on the embedded model: plan, train, kill, resume, merge, verify
# make test   the ordinary suite; `make test-all` adds what is marked slow
# make lint   format, style and types
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# on every core; each worker holds the libraries, so no more than four
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all lint format clean

demo: $(READY)
	$(BIN)/qlora-lite demo

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test,lint]"
	touch $@

clean:
	rm -rf .venv
