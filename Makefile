# `make demo` and `make test` work on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	if command -v uv >/dev/null; then VIRTUAL_ENV=$(abspath $(VENV)) uv pip install -q -c constraints.txt -e '.[demo,test]'; \
	else $(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,test]'; fi
	touch $@

demo: $(VENV)/.ready
	$(BIN)/saltern demo

# In the order of collection, so that the files that share a Ray cluster, the longest row, begin early.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(VENV)/.ready
	$(BIN)/saltern bench extract --out bench-out
