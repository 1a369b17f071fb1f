# Everything happens in .venv; `make quickstart` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: install quickstart demo-hospital test test-slow lint clean

# Without compiling: Python compiles what it imports, and most of what is installed is never imported.
PIP := $(RUN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed"; echo "hint: make PYTHON=python3.12 install"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

# What the checks and the tests need besides. They start many processes, so all is compiled beforehand; what
# packages hold for other versions of Python cannot be.
$(VENV)/dev: $(VENV)/installed
	$(PIP) -e '.[dev]'
	@-$(RUN)/python -m compileall -qq -j 0 $(VENV)/lib
	@touch $@

quickstart: install
	$(RUN)/voxelscale quickstart quickstart

# Needs Debian's packages orthanc and orthanc-dicomweb; Ctrl-C ends it.
demo-hospital: $(VENV)/hospital
	test -e quickstart/run/model.vxs || $(RUN)/voxelscale quickstart quickstart
	$(RUN)/python examples/hospital.py quickstart/run demo-hospital

$(VENV)/hospital: $(VENV)/installed
	$(PIP) -e '.[hospital]'
	@touch $@

test: $(VENV)/dev
	$(RUN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(VENV)/dev
	VOXELSCALE_COLD_STARTS=1 $(RUN)/python -m pytest -m slow -n 2 --dist worksteal

lint: $(VENV)/dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/lint-imports --no-logo --no-cache
	$(RUN)/mypy

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
