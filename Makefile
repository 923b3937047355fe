# On a fresh machine with Python 3.11+ and make: `make demo`, `make test`. `make help` lists the rest.

PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
INSTALLED := .venv/.installed
OUTPUT ?= demo
SCALE ?= 1

# NuInsSeg (CC BY 4.0) or any folder with images/ and masks/ of the same names.
DATA ?= ../shared/data/nuinsseg
SLIDE ?= tests/data/cmu-1-small-region.svs
NUCLEI_OUTPUT ?= runs/nuclei

# Where the environment forbids it, each start of Python compiles what it imports again: numba's
# first call takes 1.0 s instead of 0.4 s then. .venv is ours, so bytecode may be kept in it.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test soak lint types bench lock nuclei clean

help: ## List the targets.
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

install: $(INSTALLED) ## Create .venv with every pinned dependency.

# The stamp keeps `make` from asking the registry again while both files are unchanged.
$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "wsiseg needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: $(INSTALLED) ## Run the whole pipeline on built-in slides; results in demo/.
	$(BIN)/wsiseg demo -o $(OUTPUT)

test: $(INSTALLED) ## Run every test.
	$(BIN)/pytest

# The night figures times SCALE; SEED repeats a run. Each run prints its seed and the scorecard.
SOAKED := tests/reliability tests/vector/test_hostile_geojson.py tests/vector/test_invariance.py
soak: $(INSTALLED) ## Kill, fill disks, flip bits for hours, then print the scorecard: make soak SCALE=0.1
	WSISEG_SOAK_SCALE=$(SCALE) WSISEG_SOAK_SEED=$(SEED) $(BIN)/pytest $(SOAKED) --timeout=0

lint: $(INSTALLED) ## Check style, formatting and spelling.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(INSTALLED) ## Check types.
	$(BIN)/mypy

bench: $(INSTALLED) ## Run every benchmark; minutes each, on an otherwise idle machine.
	@set -e; for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file; done

lock: $(INSTALLED) ## Compile requirements.txt from pyproject.toml, with the newest versions.
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command 'make lock' \
	  pyproject.toml -o requirements.txt

nuclei: $(INSTALLED) ## Train the nuclei model, judge it, segment a slide: make nuclei DATA=folder
	$(BIN)/python pipelines/image_cohort.py $(DATA) --mpp 0.25 --slide $(SLIDE) \
	  -o $(NUCLEI_OUTPUT)/cohort.csv
	$(BIN)/snakemake --snakefile pipelines/Snakefile --profile pipelines/profiles/local \
	  --set-threads tile=1 segment=1 --resources gpu=2 \
	  --config cohort=$(NUCLEI_OUTPUT)/cohort.csv output=$(NUCLEI_OUTPUT) \
	  config=configs/experiments/nuclei.yaml classes=configs/classes/nuclei.yaml \
	  segment=test,$(basename $(notdir $(SLIDE)))

clean: ## Remove the environment, caches and demo results.
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .snakemake demo build dist
