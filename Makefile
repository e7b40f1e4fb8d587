# Every command of the project; .ci/run calls nothing else.
# Each target sets itself up: a virtual environment in .venv, with the versions pinned in constraints.txt.
# Another interpreter gets an environment of its own:  make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,build/$(notdir $(PYTHON)))
ARGS ?=
TINY ?=
SEEDS ?= 1000
FIRST ?= 0
JOBS ?= 1
EXTRAS := browser flax ray sklearn torch

PY := $(VENV)/bin/python
CODE := distgrad/distgrad broker/distgrad_broker worker/distgrad_worker
CHECKED := $(CODE) tests $(wildcard examples benchmarks deploy/admin deploy/training docs/site)
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-slow test-extras faults simulate mutations fmt lint types bench bench-peers docs site build clean deployment

help: ## list the commands
	@awk 'BEGIN { FS = ":.*## "; print "make demo test ... (ARGS=... goes to the program behind a command)\n" } \
		/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.ready-demo,fast ## train on handwritten digits: a broker and four workers on this machine
	$(PY) -m distgrad demo $(ARGS)

test: $(VENV)/.ready-test ## the tests, without the slow ones (ARGS="-k layout")
	$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-slow: $(VENV)/.ready-dev ## only the slow tests: packaging, soaks
	$(PY) -m pytest -m slow $(ARGS)

test-extras: $(VENV)/.ready-test $(EXTRAS:%=$(VENV)/.ready-%) ## the tests of adapters to other frameworks, and of the dashboard in a browser, which `make test` may skip
	$(PY) -m pytest tests/distgrad_worker/test_jax.py tests/distgrad_worker/test_jax_optimizer.py $(ARGS)
	$(PY) -m pytest tests/distgrad_worker/test_sklearn.py $(ARGS)
	$(PY) -m pytest tests/distgrad_worker/test_ray.py $(ARGS)
	$(PY) -m pytest tests/scenarios/test_dashboard_in_a_browser.py $(ARGS)
	$(PY) -m pytest -m "slow or not slow" $(wildcard tests/distgrad_worker/test_torch*.py) $(ARGS)
	$(PY) -m pytest -m "slow or not slow" tests/scenarios/test_frameworks.py $(ARGS)

faults: $(VENV)/.ready-test ## real processes that are killed, frozen and cut off, disks that are full: at length
	$(PY) -m pytest -m "slow or not slow" tests/scenarios/test_kills.py tests/scenarios/test_write_path.py \
		tests/scenarios/test_disk_full.py tests/scenarios/test_frozen_and_cut_off.py $(ARGS)

simulate: $(VENV)/.ready-test ## brokers and workers in a simulated world that fails them (SEEDS=10000 FIRST=0 JOBS=2)
	PYTHONPATH=tests $(PY) -m simulation.run --seeds $(SEEDS) --first $(FIRST) --jobs $(JOBS) $(ARGS)

mutations: $(VENV)/.ready-test ## faults planted in a copy of the code: does the simulation find them? (ARGS="--seconds 20")
	PYTHONPATH=tests $(PY) -m simulation.mutations $(ARGS)

fmt: $(VENV)/.ready-dev ## format the code, and mend what the linter can
	$(PY) -m ruff format $(CHECKED)
	$(PY) -m ruff check --fix $(CHECKED)

lint: $(VENV)/.ready-dev ## style, formatting, direction of imports, spelling, docstrings
	$(PY) -m ruff check $(CHECKED)
	$(PY) -m ruff format --check $(CHECKED)
	$(VENV)/bin/lint-imports
	$(VENV)/bin/codespell
	find $(CODE) -name '*.py' -exec $(PY) -m numpydoc lint {} +

types: $(VENV)/.ready-dev ## mypy --strict over code and tests
	$(PY) -m mypy

bench: $(VENV)/.ready-test ## the benchmarks, each beside its floor (TINY=1: only to see that they run)
	$(PY) -m benchmarks.run $(if $(TINY),--tiny) $(ARGS)

bench-peers: $(VENV)/.ready-peers ## distgrad beside Ray, torch, MPI and bare floors (TINY=1; ARGS="--only NAMES --work W1,W3")
	$(PY) -m benchmarks.peers $(if $(TINY),--tiny) $(ARGS)

docs: $(VENV)/.ready-test ## links, commands, options and examples in the documentation
	$(PY) -m pytest tests/test_docs.py $(ARGS)

site: $(VENV)/.ready-test,docs ## the documentation as a site in build/site, with a reference made from docstrings
	$(PY) -m mkdocs build --strict
	$(PY) -m pytest tests/test_site.py $(ARGS)

deployment: $(VENV)/.ready-test,deploy ## what is in deploy/: linters, schemas, commands on a read-only system
	$(PY) -m pytest tests/deploy $(ARGS)

build: $(VENV)/.ready-dev ## wheel and source archive in dist/, checked
	rm -rf dist
	$(PY) -m build --no-isolation --outdir dist
	$(PY) -m twine check --strict dist/*

clean: ## remove everything that the commands above made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .grimp_cache .hypothesis

# A fresh machine may have an old python3, or Debian's, which lacks venv: both end in one clear line.
# The stamp is written last, so that a half-made environment is made again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "distgrad needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1 | head -1)"; \
		echo "Name another one, for example: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12"; exit 2; } >&2
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
		echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@touch $@

# The build backend is installed beside the project, with its pinned version, instead of in an isolated
# environment, where pip would take the newest one.
$(VENV)/.ready-%: pyproject.toml constraints.txt $(VENV)/.created
	@echo "installing distgrad[$*] into $(VENV)"
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable ".[$*]"
	@touch $@
