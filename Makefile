# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
SNAKEMAKE := $(BIN)/snakemake --profile workflow/profiles/default

.PHONY: help demo methods test bench lint clean

help:            ## list the targets
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: *.*## */\t/' | expand -t 10

demo: .venv/ready   ## run the demo, from text to results/demo/report.html
	@mkdir -p .snakemake && flock --nonblock --conflict-exit-code 3 .snakemake/demo.flock $(SNAKEMAKE) --nolock \
		|| { status=$$?; [ $$status -ne 3 ] || echo "Another make demo is running in this folder."; exit $$status; }
	@echo "The report is results/demo/report.html"

methods: .venv/ready ## compare every method over three seeds, ends in results/methods/report.html
	$(SNAKEMAKE) --configfile config/methods.yaml
	@echo "The report is results/methods/report.html"

test: .venv/ready   ## run every test that this machine can run
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadscope --no-loadscope-reorder

bench: .venv/ready  ## measure the benchmarks: one table, and results/bench.json
	$(BIN)/python -m tests.benchmarks

lint: .venv/ready   ## check style: ruff, snakefmt, snakemake --lint
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/snakemake --lint

clean:           ## remove results and the environment
	find results -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
	rm -rf .snakemake .venv

.venv/ready: envs/requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r envs/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
