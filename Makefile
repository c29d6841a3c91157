# Two commands: `make demo` shows the whole path, `make test` checks everything. Both install what they need, once.

PYTHON ?= python3
CORPUS ?= stdlib
WORKERS ?= 2
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench install clean

demo: $(INSTALLED)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash recipes/demo.sh "$(CORPUS)" $(STEPS)

# each worker takes a file at a time, the long ones first; most tests start processes of their own
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# prints how training steps compare with the committed results; no time is an error
bench: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.training_step --against benchmarks/results/training_step_cpu.json

install: $(INSTALLED)

# the stamp holds the interpreter's version: another PYTHON makes another environment
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V); use make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' \
	  || { echo "$(PYTHON) has no venv module; install it (Debian: apt-get install python3-venv)"; exit 2; }
	@echo "installing into $(VENV): about 7 GB with the CUDA libraries, 2 to 5 minutes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
