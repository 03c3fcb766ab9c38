# Targets print their own help: make help

PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
CORE    = $(VENV)/core.stamp
DEV     = $(VENV)/dev.stamp
#: What else to tell the program: make test ARGS="-k client", make run ARGS=--check
ARGS   ?=
#: Where `make vm` keeps its image, which it builds there when there is none (1 GB, as root).
UPQ_VM_DIR ?= /var/tmp/upq-vm

.DEFAULT_GOAL = help
.PHONY: help demo run test check format lint types layers bench chaos vm need pins clean

help: ## what can be made
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '  make %-7s %s\n' "$$name" "$$text"; done

demo: $(CORE) ## verify real files, kill the daemon in the middle, see it resume
	$(PY) tools/demo.py $(ARGS)

run: $(CORE) ## the daemon in the foreground, with upq.cfg of this folder
	$(PY) upq.py --foreground -c upq.cfg $(ARGS)

test: $(DEV) need ## every test on SQLite, MariaDB and PostgreSQL
	@tools/test.sh $(PY) $(ARGS)

check: format lint types layers ## format, lint, types, floors, service unit

format: $(DEV)
	$(PY) -m ruff format --check .

lint: $(DEV)
	$(PY) -m ruff check .

types: $(DEV)
	$(PY) -m mypy --strict upq

layers: $(DEV)
	$(PY) -m pytest -q tests/test_layers.py tests/test_packaging.py

bench: $(DEV) need ## figures of speed and cost
	$(PY) -m tests.bench $(ARGS)

chaos: $(DEV) need ## kill -9 at random, full size
	$(PY) -m tests.chaos $(ARGS)

vm: $(DEV) ## install and try upq in a virtual machine, under a real systemd
	@UPQ_VM_DIR=$(UPQ_VM_DIR) $(PY) -m pytest -p no:xdist tests/vm $(ARGS)

pins: ## renew requirements/*.txt with what resolves today
	tools/pins.sh $(PYTHON)

clean: ## remove the virtual environment and all caches, but no data
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

need:
	@tools/need.sh

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'upq needs Python 3.11 or later: make PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(CORE): requirements/core.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/core.txt
	@touch $@

$(DEV): requirements/dev.txt $(CORE)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $@
