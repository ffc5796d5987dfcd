# Everything a newcomer needs; each target makes .venv and installs what it uses.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OLDEST := .venv-oldest

.PHONY: demo test test-oldest check bench bench-gpu clean

demo: $(VENV)/.demo
	$(BIN)/geep demo

# A file of tests to a process, of which there are as many as cores: so each has one thread.
PYTEST := -m pytest -n auto --dist loadfile

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# The same tests at the lower bounds of pyproject.toml.
test-oldest: $(OLDEST)/.dev
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST)

check: $(VENV)/.dev
	$(BIN)/ruff format --check geep tests benchmarks examples
	$(BIN)/ruff check geep tests benchmarks examples
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/report.py

bench-gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/hash_table.py --device cuda
	$(MAKE) bench

$(VENV)/.demo: pyproject.toml constraints.txt geep/backends/kernels.cpp geep/backends/conv_exit.cpp geep/backends/between.cpp geep/backends/few_tokens.cpp geep/backends/calls.h geep/backends/lanes.h geep/hash_table/bags.cpp
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "geep needs Python 3.11 or newer, found %d.%d; run: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(OLDEST)/.dev: pyproject.toml constraints-oldest.txt geep/backends/kernels.cpp geep/backends/conv_exit.cpp geep/backends/between.cpp geep/backends/few_tokens.cpp geep/backends/calls.h geep/backends/lanes.h geep/hash_table/bags.cpp
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .demo build dist *.egg-info geep/backends/_kernels*
