# `make demo` and `make test` need Python 3.11 or newer and nothing else: each makes the virtual environment it runs in.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# Two more than there are processors: some tests wait for processes that they started.
WORKERS = $(shell expr $$(nproc 2>/dev/null || echo 2) + 2)
# Compiled modules are kept, whatever the shell says: tests start other processes, and each would compile them again.
RUN := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python

.PHONY: demo test test-all lint docs bench clean

demo: $(READY)
	@$(VENV)/bin/python -m stgfast.cli demo

test: $(READY)
	$(RUN) -m pytest -n $(WORKERS) --dist loadgroup --durations=20 -rs -m "not again"

test-all: $(READY)  # also the tests that repeat others for another family or size
	$(RUN) -m pytest -n $(WORKERS) --dist loadgroup --durations=20 -rs

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(READY)  # the reference of the public names, from their docstrings: build/docs/stgfast.html
	$(VENV)/bin/python -W error docs/reference.py build/docs

bench: $(READY)
	$(RUN) -m stgfast.cli bench

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
