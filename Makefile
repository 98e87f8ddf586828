# Everything that one types. `make` alone lists it.
# PYTHON is the Python that looks for the right one: any Python 3 will do.
PYTHON ?= python3
RUN := .venv/bin
PYTEST := $(RUN)/python -P -m pytest

.DEFAULT_GOAL := help
.PHONY: help serve demo test test-fast promises lint bench clean env env-dev

help:  ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: env  ## serve: MODEL=<directory or name> HOST=127.0.0.1 PORT=8000 DATA=./data
	@exec $(RUN)/burnish serve $(if $(MODEL),--model "$(MODEL)") $(if $(HOST),--host "$(HOST)") \
		$(if $(PORT),--port "$(PORT)") $(if $(DATA),--data "$(DATA)")

demo: env  ## the whole loop in one command: chat, judge, tune, promote (about 15 minutes)
	@exec $(RUN)/burnish demo

test:  ## all: fast, processes, training, promises in small, clients, engine (real vLLM), loop (real model)
	@$(PYTHON) tests/layers.py

test-fast:  ## the fast layer alone: no vLLM, no torch
	@$(PYTHON) tests/layers.py fast

promises: env-dev  ## every promise in full (long): goes on where it was stopped; AGAIN=1, ONLY="1 31"
	BURNISH_PROMISES=full $(PYTEST) -s -m "promises" \
		$(if $(ONLY),--promises-only="$(ONLY)",$(if $(AGAIN),,--promises-go-on))

lint: env-dev  ## ruff, mypy --strict, import directions
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

bench: env-dev  ## the gateway beside its peers (about 15 minutes); the others say what they need
	$(RUN)/python -P benchmarks/gateway.py

clean:  ## remove the environment and all caches; what DATA holds stays
	rm -rf .venv .clients build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

env:
	@$(PYTHON) bootstrap.py env

env-dev:
	@$(PYTHON) bootstrap.py env --dev
