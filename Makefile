# Two commands: `make demo` shows the whole path, `make test` checks the package. Both install what they need, once.

PYTHON ?= python3
CORPUS ?= stdlib
WORKERS ?= 2
VENV := .venv
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest
# what depends on versions: other packages' formats and models, what imports what, the order and the shards
VERSION_TESTS := tests/convert tests/benchmarks tests/test_imports.py tests/test_versions.py tests/model/test_published.py \
  tests/data/test_mds.py tests/data/test_order.py tests/data/test_shards.py tests/data/test_tokenizer.py
UV = $(VENV)/bin/uv pip install --quiet --python

.PHONY: demo test test-full test-oldest lint bench install clean

demo: $(INSTALLED)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash recipes/demo.sh "$(CORPUS)" $(STEPS)

# each worker takes a file at a time, the long ones first; most tests start processes of their own
RUN_TESTS := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(RUN_TESTS) -m "not slow" $(PYTEST)
	@echo "Tests marked slow were left out; make test-full runs all."

test-full: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python $(RUN_TESTS) $(PYTEST)

# the same with the oldest versions, of the tests that depend on them
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(RUN_TESTS) -m "not slow" $(or $(PYTEST),$(VERSION_TESTS))

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# prints how training steps compare with the committed results; no time is an error
bench: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.training_step --against benchmarks/results/training_step_cpu.json

install: $(INSTALLED)

# The stamp is newer than what it was made from; another PYTHON needs `make clean` first.
$(INSTALLED): pyproject.toml constraints/newest.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V); use make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' \
	  || { echo "$(PYTHON) has no venv module; install it (Debian: apt-get install python3-venv)"; exit 2; }
	@echo "installing into $(VENV): a download of about 3 GB and 7 GB on disk, with the CUDA libraries"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet uv
	$(UV) $(VENV)/bin/python --constraints constraints/newest.txt --editable '.[dev]'
	@touch $@

# The oldest versions that are supported, for the tests that depend on them.
$(OLDEST)/.installed: pyproject.toml constraints/oldest.txt $(INSTALLED)
	$(PYTHON) -m venv $(OLDEST)
	$(UV) $(OLDEST)/bin/python --constraints constraints/oldest.txt --editable . transformers pytest pytest-timeout \
	  pytest-xdist
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
