# make demo [VIDEOS=dir [LABELS=file]] | make test | make lint | make soak BUDGET_MIN=20 SEED=1 | make soak-peers | make constraints
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BUDGET_MIN ?= 20
SEED   ?= 1
# Most tests wait for processes that they start; more than two at a time need more than two cores. Files in the order of their folders, the
# long one first: sorted by their number of tests, as is the default, those that train and submit would come last and one by one.
TEST_PROCESSES ?= 2
.PHONY: demo test lint soak soak-peers damage docs constraints clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "Python 3.11 is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/posmlp demo $(if $(VIDEOS),--videos '$(VIDEOS)') $(if $(LABELS),--labels '$(LABELS)')

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder tests/test_docs.py tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: $(STAMP)
	$(BIN)/python -m tests.soak --budget-min $(BUDGET_MIN) --seed $(SEED)

# What other loaders lose and repeat when they are killed, of those that are installed: the table at the end of docs/soak.md.
soak-peers: $(STAMP)
	$(BIN)/python -m tests.pipeline.soak_peers --seed $(SEED)

# What becomes of damaged videos, counted: docs/damage.md.
damage: $(STAMP)
	$(BIN)/python -m tests.soak_damage

# The pages that are made from the code.
docs: $(STAMP)
	$(BIN)/python -m jobs.recipe_reference > docs/recipe.md

# Resolves the newest allowed versions in a fresh environment and pins them.
constraints:
	./.ci/constraints

clean:
	rm -rf $(VENV) build dist *.egg-info
