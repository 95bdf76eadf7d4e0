# Two commands: `make demo` trains a small model on real text, `make test` checks everything.
# Both build .venv first.

PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest -q
# Figures of the official LLR code, where they are at hand.
export LLR_GOLDEN_DIR ?= $(abspath $(wildcard ../shared/golden))
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-te setup lint side-by-side unit dist gpu clean

setup:
	@tools/bootstrap.sh

demo: setup
	@bash examples/demo.sh

test: setup lint side-by-side dist

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports --no-cache
	.venv/bin/shellcheck tools/*.sh examples/*.sh examples/*.sbatch examples/common/*.sh .ci/run

unit:
	$(PYTEST) --ignore tests/dist --ignore tests/te tests

# The tests that start processes wait for them half of their time: all others of up to two ranks run
# beside them.
side-by-side:
	@log=$$(mktemp); \
	{ $(PYTHON) tests/torchrun.py 1 && $(PYTEST) tests/unit tests/docs && \
		$(PYTHON) tests/torchrun.py 2; } >$$log 2>&1 & others=$$!; \
	$(PYTEST) tests/cli; cli=$$?; \
	wait $$others; status=$$?; echo "== world size 1, unit, docs, world size 2"; cat $$log; rm $$log; \
	[ $$cli -eq 0 ] && [ $$status -eq 0 ]

# One launch per world size; a test runs in those that it names. Three data-parallel replicas matter to
# where shards are cut alone.
dist:
	@echo "== world size 4"
	@$(PYTHON) tests/torchrun.py 4
	@for world in 3 6; do \
		echo "== world size $$world"; \
		$(PYTHON) tests/torchrun.py $$world tests/dist/test_llama.py || exit 1; \
	done

# On a machine with a GPU and without a network; tools/gpu_wheels.sh gets the wheels beforehand.
WHEELS ?= wheels
gpu:
	@tools/bootstrap_gpu.sh $(WHEELS)
	@.venv-gpu/bin/python -m benchmarks.gpu $(GPU_ARGS)

# With Transformer Engine's real classes, in an environment of their own; builds it once.
test-te: setup
	@tools/bootstrap_te.sh
	.venv-te/bin/python -m pytest -q tests/te

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
