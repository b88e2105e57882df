# Two commands on a fresh machine: `make demo` and `make test`. They need python3.11, make and a package registry.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml constraints.txt

# One thread per worker: two test processes on two cores must not fight over BLAS threads.
export HF_HUB_OFFLINE := 1
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

# The page is tested in a real browser where there is one; .ci/run installs it and so never leaves these tests out.
BROWSER := $(shell command -v chromium >/dev/null && command -v chromedriver)
WITHOUT_BROWSER := $(if $(BROWSER),, and not browser)
ORDINARY := not slow and not gpu$(WITHOUT_BROWSER)

.PHONY: demo test coverage test-slow test-gpu lint types format clean

demo: $(VENV)/.demo
	$(BIN)/fullrank demo --html report.html

test: $(VENV)/.dev lint types
	$(if $(BROWSER),,@echo "chromium or chromedriver not found: the browser tests are left out")
	$(PYTEST) -m "$(ORDINARY)"

# apart from `test`: tracing every line doubles the time of the same tests
coverage: $(VENV)/.dev
	$(PYTEST) -m "$(ORDINARY)" --cov --cov-report=term

test-slow: $(VENV)/.dev
	$(PYTEST) -m "slow and not gpu$(WITHOUT_BROWSER)"

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: whatever asks for torch later finds it installed and pulls nothing else in
$(VENV)/.demo: $(VENV)/bin/python $(SOURCES)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python $(SOURCES)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .coverage .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
