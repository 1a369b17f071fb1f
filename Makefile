# Everything happens in .venv; `make quickstart` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: install quickstart demo-hospital docs site notebooks test test-slow lint clean

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
	@$(RUN)/python -m compileall -qq -j 0 $(VENV)/lib || true
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

# The site; every warning is an error. Nothing in it is loaded from elsewhere, so its files can be read where they are.
SITE := build/site/index.html

site: $(VENV)/docs
	$(RUN)/sphinx-build -W --keep-going -q -j auto -b html docs build/site

docs: site
	@$(RUN)/python -m webbrowser "file://$(CURDIR)/$(SITE)" > /dev/null 2>&1 || true
	@echo $(CURDIR)/$(SITE)

$(VENV)/docs: $(VENV)/installed
	@test $(VENV)/dev -nt $(VENV)/installed || $(PIP) -e '.[docs]'  # dev holds it
	@touch $@

# Runs the notebooks and keeps what their cells give; look at the difference before you commit it.
notebooks: $(VENV)/dev
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/jupyter execute --inplace --NotebookClient.record_timing=False \
		examples/notebooks/*.ipynb

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
