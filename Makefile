# Two commands do all the set-up on a machine with Python >= 3.11 and a C++ compiler:
#   make demo    the whole road on the reference pair; leaves runs/demo/report/report.html
#   make test    the tests
# Both make the environment in .venv first (once; llama.cpp is compiled then, which takes some minutes).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST ?= .venv-oldest
STAMP := $(VENV)/.installed

.PHONY: demo test test-oldest lint types env clean

demo: env
	$(BIN)/mpa-edge demo

test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# The lower bounds of pyproject.toml, in an environment of their own; whatever they need is the newest that fits.
test-oldest:
	test -x $(OLDEST)/bin/uv || { $(PYTHON) -m venv $(OLDEST) && $(OLDEST)/bin/pip install --quiet uv; }
	rm -f $(OLDEST)/oldest.txt
	$(OLDEST)/bin/uv pip compile --quiet --extra dev --resolution lowest-direct --python $(OLDEST)/bin/python \
		--output-file $(OLDEST)/oldest.txt pyproject.toml
	$(OLDEST)/bin/uv pip install --python $(OLDEST)/bin/python --requirement $(OLDEST)/oldest.txt
	$(OLDEST)/bin/uv pip install --python $(OLDEST)/bin/python --no-deps --editable .
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads an installed copy: in the tree, the folders are not where their import names say.
types: env
	rm -rf .typecheck build && $(BIN)/pip install --quiet --no-deps --no-build-isolation --target .typecheck .
	cd .typecheck && ../$(BIN)/python -m mypy --config-file ../pyproject.toml -p mpa_edge

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, set PYTHON=") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .typecheck build dist *.egg-info
