# Every target makes its own virtual environment in .venv first (scripts/setup_venv.sh); the second time that takes no time.
.PHONY: help venv demo test test-long lint format reference families clean
.DEFAULT_GOAL := help

BIN := .venv/bin
# Tests start many small processes beside one another: more than one compute thread each would only fight over the cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Files of tests beside one another: they wait for processes and networks much of the time.
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

help:
	@echo "make demo        a whole swarm on this machine: starts three servers and generates text through them"
	@echo "make test        the tests (minutes)"
	@echo "make test-long   the long tests"
	@echo "make lint        ruff and mypy"
	@echo "make reference   docs/api.md, from the docstrings and the table of settings"
	@echo "make families    the table of docs/models.md, from a test that serves each family (minutes)"
	@echo "make venv        only the virtual environment, .venv"
	@echo "make clean       remove .venv and caches"

venv:
	@sh scripts/setup_venv.sh

demo: venv
	@$(BIN)/petalnet demo

test: venv
	$(PYTEST) --durations=25 -m "not long"

test-long: venv
	$(PYTEST) --durations=25 -m long

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: venv
	$(BIN)/python scripts/make_api_reference.py

families: venv
	folder=$$(mktemp -d) && PETALNET_FAMILIES_RESULTS=$$folder $(TEST_ENV) $(BIN)/python -m pytest -q -m long tests/swarm/test_families.py \
		&& $(BIN)/python scripts/make_families_table.py $$folder

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
