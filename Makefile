# Python 3.10 or newer; only `make env` uses it, everything else runs in .venv.
PYTHON ?= python3

# `make env CPU=1` takes the CPU build of torch, gigabytes smaller, from the index that Binder uses.
CPU ?=

BIN := .venv/bin
BENCHMARKS := start_up memory first_step hand_over free_notebook bubble step_time shard snapshots reproducible panel
ENV := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help env demo test test-programs test-conditions test-notebooks test-browser test-hosts test-gpu parity compatibility precisions chaos hf bench \
	bench-quick check lab clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(ENV)  ## Create .venv and install nbdist and all it needs, in the tested versions

$(ENV): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Creating .venv with $(PYTHON)"; $(PYTHON) -m venv .venv; }
ifneq ($(CPU),)
	@echo "Installing the CPU build of torch (a minute or two)"
	@grep -E '^(--extra-index-url|torch==)' binder/requirements.txt > .venv/torch-cpu.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r .venv/torch-cpu.txt
endif
	@echo "Installing nbdist and what it needs into .venv (torch is large: several minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]' -c constraints.txt
	@touch $@

demo: env  ## Train on real data from notebooks/00_quickstart.ipynb and print what came out
	@$(BIN)/python -m nbdist demo

test: env  ## Run the tests, but for those with a target of their own
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not programs and not hf and not compatibility and not parity and not browser and not hosts and not notebooks and not gpu'

test-programs: env  ## Run whole programs (kernels, torchrun, servers), and parts of parity and chaos
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m programs

test-conditions: env  ## Run the same as on other machines: loaded, of one core, of half a core, and late: an hour
	$(BIN)/python tests/conditions.py

test-notebooks: env  ## Run the notebooks under nbval
	$(BIN)/python -m pytest -q -m notebooks

test-browser: env  ## Test the panel in JupyterLab and Chromium, which has to be there; pictures go to shots/
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[browser]' -c constraints.txt
	$(BIN)/python -m pytest -q -m browser tests/browser
	$(BIN)/python tests/hosts/host_network.py --hosts 2 $(BIN)/python -m pytest -q -m browser tests/hosts || test $$? = 77

test-hosts: env  ## Test what runs on several hosts, made of namespaces, for which this must be root: under 8 minutes
	@$(BIN)/python tests/hosts/host_network.py --hosts 0 true
	@# Each worker runs on the head of a network of its own.
	$(BIN)/python -m pytest -q -rs -m hosts --dist loadfile tests/hosts \
		--tx '3*popen//python=$(BIN)/python tests/hosts/host_network.py $(BIN)/python'

test-gpu: env  ## Test what runs on GPUs, of which there has to be one: a few minutes
	$(BIN)/python -m pytest -q -m gpu
	@$(BIN)/python tests/chaos/chaos.py --device cuda --only "every rank"

parity: env  ## Compare every model on every mesh with one process, and print the table: under 40 minutes
	@$(BIN)/python tests/core/matrix.py
	$(BIN)/python -m pytest -q -m parity

compatibility: env  ## Compare models of many shapes on meshes with plain PyTorch, and write the table: ten minutes
	@$(BIN)/python tests/compatibility/table.py

precisions: env  ## Check each of those models on meshes in five precisions: nothing may be refused: half an hour
	@$(BIN)/python tests/compatibility/precisions.py

chaos: env  ## Kill, break and hang ranks in every way, and write the table into tests/README.md: half an hour
	@$(BIN)/python tests/chaos/chaos.py --write
	@$(BIN)/python tests/hosts/host_network.py --hosts 2 $(BIN)/python tests/hosts/host_chaos.py

hf: env  ## Train models of Hugging Face transformers on every mesh: a few minutes
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[hf]' -c constraints.txt
	$(BIN)/python -m pytest -q tests/core/test_transformers.py
	$(BIN)/python -m pytest -q -m notebooks tests/test_how_to.py

bench: env  ## Measure, side by side with what others would write by hand: under 20 minutes
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]' -c constraints.txt
	@for script in $(BENCHMARKS); do echo; $(BIN)/python benchmarks/$$script.py || exit 1; done
	@echo; $(BIN)/python benchmarks/step_time.py --peer one
	@echo; $(BIN)/python benchmarks/shard.py --peer fsdp

bench-quick: env  ## Say what has become slower, beside the figures of benchmarks/README.md: under 4 minutes
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]' -c constraints.txt
	@$(BIN)/python benchmarks/quick.py

check: env  ## Lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: env  ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks/

clean:  ## Remove caches and build output; .venv stays
	rm -rf .mypy_cache .pytest_cache .ruff_cache build dist shots
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
