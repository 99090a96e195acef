# make quickstart   set up and run the main job: a model learns prose, then code, and does not forget
# make test         set up and run the tests
# make test-long    set up and run the tests that take minutes, which `make test` leaves out
# make test-cluster set up and run the tests on a SLURM that they start themselves: root, slurm-wlm, munge, iproute2
# make test-soak    set up and run a run through twenty minutes of faults on such a SLURM
# make lint         what ruff says
# make clean        remove the virtual environment and the quickstart's runs
#
# PYTHON=python3.12                  another interpreter for the virtual environment
# WORKERS=4                          test processes at once; each test may have several of its own, up to 8
# PIP_ARGUMENTS="--extra-index-url URL"   words for pip, such as where to find a CPU-only build of torch

PYTHON ?= python3
VENV ?= .venv
SEED ?= 1
WORKERS ?= 2
PIP_ARGUMENTS ?=
BIN := $(VENV)/bin

.PHONY: setup quickstart test test-long test-cluster test-soak lint clean

setup: $(VENV)/.installed

# Remade when the list of dependencies changes; otherwise a second `make` goes on at once.
$(VENV)/.installed: setup.py constraints.txt
	@"$(PYTHON)" launcher/check_machine.py
	@echo "== virtual environment in $(VENV), dependencies at the versions of constraints.txt (a minute or two) =="
	"$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGUMENTS) -e ".[test]"
	@touch "$@"

quickstart: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" SEED="$(SEED)" sh configs/quickstart/quickstart.sh

test: setup
	@echo "== tests =="
	"$(BIN)/python" -m pytest -n $(WORKERS) --dist loadfile

# The last -m counts, so this one takes the place of the one in pyproject.toml.
test-long: setup
	@echo "== tests that take minutes =="
	"$(BIN)/python" -m pytest -m "long and not cluster" -n $(WORKERS) --dist loadfile

# What they measured stands at the end of the output: the fault table of docs/CLUSTER.md.
test-cluster: setup
	@echo "== tests on a SLURM cluster =="
	"$(BIN)/python" -m pytest tests/cluster -m "cluster and not long" -rs -n 3 --dist worksteal

test-soak: setup
	@echo "== twenty minutes of faults on a SLURM cluster =="
	"$(BIN)/python" -m pytest tests/cluster -m "cluster and long" -rs -s

lint: setup
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

clean:
	rm -rf "$(VENV)" runs/quickstart
