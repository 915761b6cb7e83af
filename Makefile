# `make demo` and `make test` work on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENVIRONMENT := $(VENV)/pyvenv.cfg

# Tests start many processes: without these files, each would compile Saltern again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo quick test check bench

$(ENVIRONMENT):
	$(PYTHON) -m venv $(VENV)

# .ready-EXTRA: this checkout is installed with the packages of an extra, as constraints.txt pins them.
$(VENV)/.ready-%: pyproject.toml constraints.txt | $(ENVIRONMENT)
	if command -v uv >/dev/null; then VIRTUAL_ENV=$(abspath $(VENV)) uv pip install -q -c constraints.txt -e '.[$*]'; \
	else $(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'; fi
	touch $@

demo: $(VENV)/.ready-demo
	$(BIN)/saltern demo

# What can be tested in two minutes on two cores.
quick: $(VENV)/.ready-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

# One process more than cores, as many tests wait for processes that they have started. Slow files come first.
test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pylint schemas pipeline jobs
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(VENV)/.ready-bench
	$(BIN)/saltern bench extract --out bench-out
