# Everything here works on a machine that has make and Python 3.11 or newer, and nothing else.

VENV ?= .venv
# PyTorch is installed first, by itself, so that another build can be chosen, for example:
#   make demo TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.14.1 torchvision==0.29.1
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test quick check soak format clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.ready-demo  ## pretrain on 2,624 real solar-cell images and measure what was learned (about 5 minutes)
	$(VENV)/bin/python examples/solar_cells.py

test: $(VENV)/.ready-dev  ## all checks and tests
	@scripts/system-packages.sh
	@$(MAKE) --no-print-directory check
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

quick: $(VENV)/.ready-dev  ## tests without other processes, browser, Slurm or long training, in under 3 minutes
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not (browser or cluster or processes or slow)" $(PYTEST_ARGS)

check: $(VENV)/.ready-dev  ## style, types and floors
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

soak: $(VENV)/.ready-dev  ## kill a run 50 times, take another through 60 events, and compare their ends with undisturbed ones
	$(VENV)/bin/python tests/faults/soak.py --kills 50 --steps 400
	PYTHONPATH=tests $(VENV)/bin/python tests/faults/chaos.py --events 60

format: $(VENV)/.ready-dev  ## write the code in the common style
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean:  ## remove the environment, caches and builds; keep runs/
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is written last, so an interrupted set-up is not taken for a finished one. The dev environment holds
# everything that the demo needs.
$(VENV)/.ready-demo: pyproject.toml
	@scripts/make-venv.sh $(VENV)
	$(VENV)/bin/python -m pip install $(TORCH)
	$(VENV)/bin/python -m pip install -e '.[demo]'
	@touch $@

$(VENV)/.ready-dev: pyproject.toml
	@scripts/make-venv.sh $(VENV)
	$(VENV)/bin/python -m pip install $(TORCH)
	$(VENV)/bin/python -m pip install -e '.[dev,demo]'
	@touch $@ $(VENV)/.ready-demo
