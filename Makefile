# The front door. It only calls CMake presets and scripts/.
PREFIX ?= /usr/local

.PHONY: help build demo serve test test-clients test-long fuzz attack oracle bench bench-load bench-peers bench-service connections slow-clients faults bench-recovery recoveries format lint install clean

help:
	@echo "make build            build/release/phalanx (installs what is missing first)"
	@echo "make demo             two nodes on this machine answer a question, then stop"
	@echo "make serve            the same two nodes, and they stay up"
	@echo "make test             unit, system, ASan+UBSan and TSan tests"
	@echo "make test-clients     npm, Hugging Face, Triton, litellm, langchain, lm-eval, schemathesis, promtool, chromium"
	@echo "make test-long        a prompt of 32,768 tokens against its reference"
	@echo "make fuzz             damaged frames, plans, tables, certificates, headers, configs; FUZZ_SECONDS=45 each"
	@echo "make attack           strangers at the ports of two nodes under load for 5 of 10 minutes, ASan; ATTACK_SECONDS=300"
	@echo "make oracle           remakes tests/oracle/data, quantised and adapters (needs torch and transformers)"
	@echo "make bench            memory, kernels, collectives, engine; tables in bench/RESULTS.md"
	@echo "make bench-load       loading beside plain reading and memcpy; 4 GB with experts over two nodes"
	@echo "make bench-peers      the same work by llama.cpp, vLLM and OpenVINO; bench/PEERS.md"
	@echo "make bench-service    what structures cost a step, what prompts that arrive cost others"
	@echo "make connections      1,000 open streams on two nodes, and more than is allowed"
	@echo "make slow-clients     what a slow reader and a slow sender cost everybody else, 2 minutes"
	@echo "make faults           258 faults: every kind in every state over 2 and 3 nodes, under load (root)"
	@echo "make recoveries       100 killed ranks in a row: memory and descriptors stay flat"
	@echo "make bench-recovery   what a loss costs: detection, recovery, first token"
	@echo "make install PREFIX=  lays out PREFIX/mindie-service"
	@echo "make format | lint    clang-format; arrows between rooms and clang-tidy"
	@echo "make clean            removes build/ (not the cached demo model)"

build:
	@scripts/setup
	@scripts/build release

demo: build
	@scripts/demo

serve: build
	@scripts/demo --stay

test:
	@scripts/test

test-clients: build
	@scripts/test_clients

test-long: build
	@PHALANX_LONG_TEST=1 build/release/rooms/models/models_test --gtest_filter='LongPrompt.*'

FUZZ_SECONDS ?= 45
fuzz:
	@scripts/setup --tests
	@scripts/build dev
	@for test in rooms/weights/weights rooms/models/models rooms/net/net rooms/comm/comm \
	  rooms/cluster/cluster rooms/engine/engine apps/apps; do \
	  PHALANX_FUZZ_SECONDS=$(FUZZ_SECONDS) build/dev/$${test}_test --gtest_filter='*Fuzz*' || exit 1; \
	done

attack:
	@scripts/setup --tests
	@scripts/build dev
	@PHALANX_BIN=build/dev/phalanx build/venv/bin/python tests/attack.py

PYTHON ?= python3
oracle:
	@$(PYTHON) tests/oracle/make_reference.py tiny tests/oracle/data
	@$(PYTHON) tests/oracle/make_reference.py families tests/oracle/data
	@$(PYTHON) tests/oracle/make_reference.py long tests/oracle/data
	@$(PYTHON) tests/oracle/make_quantised.py tests/oracle/quantised
	@$(PYTHON) tests/oracle/make_adapters.py tests/oracle/data tests/oracle/adapters

bench: build
	@scripts/bench

bench-load: build
	@scripts/bench load
	@scripts/setup --tests
	@mkdir -p build/load && build/venv/bin/python tests/load_experts.py build/load

bench-peers: build
	@scripts/bench-peers

bench-service: build
	@scripts/setup --tests
	@build/venv/bin/python tests/measure_service.py

connections: build
	@scripts/setup --tests
	@build/venv/bin/python tests/stress_connections.py

slow-clients: build
	@scripts/setup --tests
	@build/venv/bin/python tests/measure_slow_clients.py

faults: build
	@scripts/setup --tests
	@scripts/faults

recoveries: build
	@scripts/setup --tests
	@build/venv/bin/python tests/stress_recovery.py

bench-recovery: build
	@scripts/setup --tests
	@build/venv/bin/python tests/bench_recovery.py

format:
	@scripts/setup --lint
	@scripts/format

lint:
	@scripts/setup --lint
	@scripts/lint

install: build
	@scripts/install "$(PREFIX)"

clean:
	rm -rf build
