# Two commands for a bare clone: `make quickstart` and `make test`.
#   make test PYTHON=python3.12   runs the same tests on the newer row of versions.
PYTHON  ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# The two rows of locked versions: jax 0.11 dropped Python 3.11.
ROW     := $(if $(filter 3.11,$(VERSION)),py311,py312)
VENV    ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(VERSION))
BIN     := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart test test-slow check format lock clean

$(VENV)/.installed: pyproject.toml requirements/$(ROW).txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is Python $(VERSION); 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements/$(ROW).txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/laif run configs/quickstart.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ty check --python $(VENV)
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Both rows are locked; run after a change of dependencies in pyproject.toml.
lock: $(VENV)/.installed
	$(BIN)/uv pip compile --quiet --universal --no-header --upgrade --python-version 3.11 --extra dev pyproject.toml -o requirements/py311.txt
	$(BIN)/uv pip compile --quiet --universal --no-header --upgrade --python-version 3.12 --extra dev pyproject.toml -o requirements/py312.txt

clean:
	rm -rf .venv .venv-3.* runs build *.egg-info
