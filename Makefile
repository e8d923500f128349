# Everything below does its own set-up in .venv; PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
ARGS ?=
CHAOS_ARGS ?=

# Compiled programs are kept between runs. Huge pages for malloc save CPU training 5 to 10 % of its time.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.PHONY: help
help: ## This list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); jaxgpt needs Python 3.11 or newer (make PYTHON=python3.12 ...)." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

.PHONY: setup
setup: $(STAMP) ## Install the project and its tools into .venv

.PHONY: quickstart
quickstart: $(STAMP) ## From this Python's own library to a small assistant: every stage
	$(HUGE_PAGES) $(BIN)/python -m experiments.pipeline --config=configs/pipeline.py:quickstart --workdir=runs/quickstart $(ARGS)

.PHONY: lint
lint: $(STAMP) ## Style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: $(STAMP) ## Mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: test
test: lint ## Lint and all tests, in a random order that the end names (ARGS=... goes to pytest)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(ARGS)

.PHONY: chaos
chaos: $(STAMP) ## Mistakes, kills, damage, full disks, a server under load (CHAOS_ARGS="--only=kills --share=0.1")
	$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

.PHONY: clean
clean: ## Remove what the other targets made, but for runs/
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache *.egg-info
