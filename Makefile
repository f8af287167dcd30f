# `make demo` and `make test` need Python 3.11 or newer and nothing else: each makes the virtual environment it runs in.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RUN := OMP_NUM_THREADS=1 $(VENV)/bin/python

.PHONY: demo test lint bench clean

demo: $(READY)
	@$(VENV)/bin/python -m stgfast.cli demo

test: $(READY)
	$(RUN) -m pytest -n auto --dist loadgroup --durations=20 -rs

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(READY)
	$(RUN) -m stgfast.cli bench

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
