PYTHON := .venv/bin/python
URL ?= http://127.0.0.1:8000

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

serve: ## set up and serve (flags: make serve ARGS="--port 9000")
	./run_server.sh $(ARGS)

quick: ## what starts no process and loads no torch: under 30 s
	./run_tests.sh quick -q

test: ## set up and run every check
	./run_tests.sh

nightly: ## all checks in their long forms: every target of the kernels, fuzzing, soak, other projects' clients (hours)
	./run_tests.sh nightly

test-training: ## the embedded model's course: its lessons and its trainer
	$(PYTHON) -m pytest training/nano/tests

lint: ## formatting, ruff, mypy
	./run_tests.sh lint

type: ## mypy alone
	$(PYTHON) -m mypy

format: ## rewrite the sources in the project's format
	$(PYTHON) -m ruff format . && $(PYTHON) -m ruff check --fix .

bench: ## measure a running server (URL=http://127.0.0.1:8000)
	$(PYTHON) bench/serve.py --url $(URL)

kernel-report: ## compile every Triton kernel for every GPU that we ship for, and show what came out
	$(PYTHON) -m bench.kernels.report

gpu: ## on a machine with an NVIDIA GPU: test and measure all of it (under ten minutes)
	bench/gpu/run.sh

health: ## ask a running server how it is
	@curl -fsS $(URL)/health && echo

config: ## write configs/server_config.yaml and docs/configuration.md from the keys in src/config
	$(PYTHON) scripts/write_config.py

lock: ## write the lock files from what is installed
	./scripts/lock.sh

clean: ## remove what was made here, the environment included
	rm -rf .venv reports logs .mypy_cache .ruff_cache .hypothesis

.DEFAULT_GOAL := help
.PHONY: help serve quick test nightly test-training lint type format bench kernel-report gpu health config lock clean
