PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs/quickstart
DATA ?= hh-harmless.jsonl.gz
EXECUTED ?= runs/notebooks

.PHONY: quickstart notebooks test test-process test-isa test-torch test-long check docs format \
	benchmark clean

# Generated preference data, SFT, then DPO, and RLHF beside it, in four minutes on two cores.
quickstart: .venv/installed
	$(BIN)/python -m jaxpref.main --config=configs/quickstart.py:sft --workdir=$(RUNS)/sft
	$(BIN)/python -m jaxpref.main --config=configs/quickstart.py:dpo --workdir=$(RUNS)/dpo \
		--config.model.init_from=$(RUNS)/sft
	$(BIN)/python -m jaxpref.main --config=configs/quickstart.py:reward --workdir=$(RUNS)/reward \
		--config.model.init_from=$(RUNS)/sft
	$(BIN)/python -m jaxpref.main --config=configs/rlhf_quickstart.py:rloo --workdir=$(RUNS)/rloo \
		--config.model.init_from=$(RUNS)/sft --config.reward.path=$(RUNS)/reward \
		--config.sampling.compare="('$(RUNS)/dpo',)"

# All notebooks from their first cell to their last, two at a time, with what they show in EXECUTED; an
# error in one of them is an error. What JAX compiles is kept for the next time.
notebooks: .venv/installed-notebooks
	@mkdir -p $(EXECUTED)
	@printf '%s\n' notebooks/*.ipynb | JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.jax_cache/notebooks \
		JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1 xargs -P 2 -n 1 sh -c 'start=$$(date +%s); \
		$(BIN)/jupyter-execute --NbClientApp.log_level=WARN \
			--output="$(abspath $(EXECUTED))/{notebook_name}" $$0 || exit 1; \
		echo "$$0: $$(($$(date +%s) - start)) s"'

# Three workers keep two cores busy: a run waits now and then.
test: .venv/installed-test
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "not long and not process"

# Runs in processes of their own, which are killed, interrupted, or train together.
test-process: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist load -m "process and not long" tests/test_cli.py tests/test_processes.py tests/test_faults.py tests/test_plan.py \
		tests/test_endpoint_judges.py tests/test_reading.py tests/test_workdirs.py

# What compares numbers, as compiled for CPUs with other instructions than this one's may have,
# each from an empty cache: other rounding, the same results.
ISAS ?= SSE4_2 AVX2
NUMERICAL := $(addprefix tests/test_,adapters.py advantages.py algorithms.py attention.py bandits.py enumerable.py \
	frontiers.py grouped.py heads.py linear.py logprobs.py models.py online.py packing.py policy_gradient.py pretrained.py \
	rollouts.py sampling.py sharding.py splash.py trl_rollouts.py vocabulary.py)
test-isa: .venv/installed-test
	for isa in $(ISAS); do \
		rm -rf .jax_cache/$$isa; \
		XLA_FLAGS="$(XLA_FLAGS) --xla_cpu_max_isa=$$isa" JAX_COMPILATION_CACHE_DIR=.jax_cache/$$isa \
			$(BIN)/python -m pytest -n 3 --dist loadfile -m "not long and not torch" $(NUMERICAL) || exit 1; \
	done

# Against transformers' PyTorch models, live; otherwise committed fixtures stand in for them.
test-torch: .venv/installed-torch
	$(BIN)/python -m pytest -n 3 --dist loadfile -m torch

test-long: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Style, types, layers: what CI asks for before the tests.
check: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages that say what knobs and methods declare.
docs: .venv/installed
	$(BIN)/python -c 'from pathlib import Path; from jaxpref import explain; \
		[Path("docs", name).write_text(text) for name, text in explain.pages().items()]'

format: .venv/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# DATA: Anthropic's HH dialogues, .jsonl or .jsonl.gz. Takes about twenty minutes.
benchmark: .venv/installed
	$(BIN)/python benchmarks/logprobs.py
	$(BIN)/python benchmarks/pipeline.py --data=$(DATA)
	$(BIN)/python benchmarks/layouts.py --data=$(DATA)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxpref needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

.venv/installed-notebooks: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[notebooks]'
	@touch $@

.venv/installed-torch: .venv/installed-test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,torch]'
	@touch $@

clean:
	rm -rf .venv .jax_cache runs
