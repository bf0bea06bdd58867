# Everything runs from a fresh clone: each target makes .venv first if it is not there.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# images of Python often set it: every start would then compile its libraries anew, for 5 s
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types imports pytest stack-test operations-test slow faults bench evidence clean

demo: $(INSTALLED)  ## the main job on a small example that ships with the project
	@$(BIN)/p2d demo

test: lint imports  ## what CI runs; types are checked beside the tests, which leave a core idle
	$(MAKE) -j 2 types pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

pytest: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: $(INSTALLED)  ## tests of minutes, such as training the demo's base anew
	$(BIN)/pytest -m slow --timeout 3600

stack-test: $(INSTALLED)  ## servers on PostgreSQL, a worker, schedules, for real; make test leaves out the long
	$(BIN)/pytest tests/stack -m ""

operations-test: $(INSTALLED)  ## every command of docs/operations.md on real servers; many minutes
	$(BIN)/pytest tests/test_operations.py -m "" --timeout 1800

faults: $(INSTALLED)  ## every fault that is known to happen, for real; figures into docs/guarantees.md
	$(BIN)/pytest tests/faults -m "" --timeout 3600
	$(BIN)/python -m tests.faults.page

bench: $(INSTALLED)  ## what P2D costs, and against what; SIZE=gpu on a machine with a GPU
	$(BIN)/python -m benchmarks --size $(or $(SIZE),cpu)

evidence: $(INSTALLED)  ## which rankers and scorers find the target, over seeds; hours; docs/evidence.md
	$(BIN)/python -m benchmarks.evidence

clean:  ## artifacts of the demo; .venv stays
	rm -rf artifacts/*/ .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "P2D needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	@echo "Installing pinned dependencies into .venv (once; a few minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@
