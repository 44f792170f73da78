# The few commands of a checkout. ARGS goes on to the command.
VENV ?= $(or $(GROWTH_MEGATRON_VENV),.venv)
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: help test check format torture bench quickstart site package

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

test: ## environment, checks and tests (ARGS="-k growth")
	bash tests/run.sh $(ARGS)

check: ## ruff and mypy
	ruff check . && ruff format --check . && mypy

format: ## let ruff put it right
	ruff check --fix . && ruff format .

torture: ## tries to break runs and files for five minutes (ARGS="--kills 20 --seed 7")
	python tools/torture.py $(or $(ARGS),--seconds 300)

bench: ## the benchmarks (and tools/bench_data.py); read docs/benchmarks.md before quoting their figures
	python tools/bench_train.py $(ARGS)
	python tools/bench_growth.py $(ARGS)

quickstart: ## train, grow, go on: minutes on two cores
	bash launch/quickstart.sh

site: ## the pages as a site, in site/ (extra docs); strict
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

package: ## wheel and sdist in dist/, the wheel tried in an environment of its own
	bash .ci/package
