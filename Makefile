# Every target uses .venv with the pinned stack and makes it when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DS_STAMP := $(VENV)/.deepspeed
DOCS_STAMP := $(VENV)/.docs
SPACE_STAMP := $(VENV)/.space
# CPU-only machine: make install TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=
CORES := $(shell $(PYTHON) -c "import os; print(max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1)))")
# Tests run in this many processes of one thread each; recipes run in one process with THREADS threads.
WORKERS ?= $(CORES)
THREADS ?= $(CORES)

OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
RUN := $(OFFLINE) OMP_NUM_THREADS=$(THREADS) $(BIN)/python
# A test that hangs tells where and fails: its process is ended, and the others go on.
HANGS := -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true
PYTEST := $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(HANGS)
# pytest leaves with 5 when a mark selects no test.
EMPTY_IS_FINE := || test $$? -eq 5

.PHONY: install demo proof proof-next test test-slow test-multi test-browser space screenshots quality docs style trunk smoke clean

install: $(STAMP)

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "PYTHON=$(PYTHON) must be Python >= 3.11, for example: make PYTHON=python3.12 install"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(TORCH_ARGS) torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[test,quality]"
	touch $(STAMP)

# DeepSpeed has no wheels and only the tests with several processes need it.
$(DS_STAMP): $(STAMP)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -c constraints.txt -e ".[deepspeed]"
	touch $(DS_STAMP)

# The tools of the site, which nothing else needs.
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e ".[docs]"
	touch $(DOCS_STAMP)

# Chromium is the system's: apt-get install --yes chromium
$(SPACE_STAMP): $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e ".[space,browser]"
	touch $(SPACE_STAMP)

demo: $(STAMP)
	@echo "demo: trains PDT adapters on the shipped tiny trunk, decodes three prompts, evaluates."
	@echo "expected time: at most 15 minutes on 2 cores; results in build/demo/index.html"
	$(RUN) recipes/demo.py --threads $(THREADS)

smoke: $(STAMP)
	@echo "smoke: the demo's chain with tiny numbers; expected time: under 2 minutes on 2 cores"
	$(RUN) recipes/demo.py --config recipes/tiny/smoke.yaml --threads $(THREADS)

# Pieces that are finished are kept: a stopped call goes on where it was. Recipes set their own threads.
proof: $(STAMP)
	@echo "proof: trainings, ablations and evaluations of recipes/tiny/proof.yaml; report: docs/benchmarks/worlds.md"
	$(RUN) recipes/proof.py --config recipes/tiny/proof.yaml

proof-next: $(STAMP)
	@echo "proof-next: the next pieces of the proof, about 150 minutes on 2 cores"
	$(RUN) recipes/proof.py --config recipes/tiny/proof.yaml --minutes 150

trunk: $(STAMP)
	@echo "trunk: trains the tiny GPT-OSS trunk again and replaces recipes/tiny/trunk"
	$(RUN) recipes/pretrain_trunk.py --config recipes/tiny/trunk.yaml

test: $(STAMP)
	$(PYTEST) -n $(WORKERS) --dist loadfile --max-worker-restart 1

test-slow: $(STAMP)
	$(PYTEST) -n $(WORKERS) --dist loadfile --max-worker-restart 1 -m "slow and not soak" $(EMPTY_IS_FINE)

test-multi: $(DS_STAMP)
	$(PYTEST) -m "(multi or deepspeed) and not soak" $(EMPTY_IS_FINE)

test-browser: $(SPACE_STAMP)
	$(PYTEST) -m browser

# The page with the model that PDT_MODEL names; the demo's by default.
space: $(SPACE_STAMP)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python hub_cards/space/app.py

screenshots: $(SPACE_STAMP)
	PDT_MODEL=$(or $(PDT_MODEL),build/demo/model) PDT_SCREENSHOTS=docs/images $(PYTEST) -m browser -k "compared or wider"

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(PYTEST) -q tests/test_architecture.py tests/test_recipes.py

# Any page, link or name that is missing is an error.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print -exec rm -rf {} +
