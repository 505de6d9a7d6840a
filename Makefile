# The front door. It only calls CMake presets and scripts/.
PREFIX ?= /usr/local

.PHONY: help build demo serve test test-clients test-long fuzz oracle bench bench-load bench-peers connections format lint install clean

help:
	@echo "make build            build/release/phalanx (installs what is missing first)"
	@echo "make demo             two nodes on this machine answer a question, then stop"
	@echo "make serve            the same two nodes, and they stay up"
	@echo "make test             unit, system, ASan+UBSan and TSan tests"
	@echo "make test-clients     Hugging Face, Triton, litellm, langchain, schemathesis (installs them)"
	@echo "make test-long        a prompt of 32,768 tokens against its reference"
	@echo "make fuzz             damaged headers, indices, GGUF files and config.json, 10 minutes"
	@echo "make oracle           remakes tests/oracle/data (needs torch and transformers)"
	@echo "make bench            memory, kernels, collectives, engine; tables in bench/RESULTS.md"
	@echo "make bench-load       loading beside plain reading and memcpy"
	@echo "make bench-peers      the same work by llama.cpp, vLLM and OpenVINO; bench/PEERS.md"
	@echo "make connections      1,000 open streams on two nodes, and more than is allowed"
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

fuzz:
	@scripts/setup --tests
	@scripts/build dev
	@PHALANX_FUZZ_SECONDS=150 build/dev/rooms/weights/weights_test --gtest_filter='HeaderFuzz.*'
	@PHALANX_FUZZ_SECONDS=150 build/dev/rooms/models/models_test --gtest_filter='ConfigFuzz.*'

PYTHON ?= python3
oracle:
	@$(PYTHON) tests/oracle/make_reference.py tiny tests/oracle/data
	@$(PYTHON) tests/oracle/make_reference.py families tests/oracle/data
	@$(PYTHON) tests/oracle/make_reference.py long tests/oracle/data

bench: build
	@scripts/bench

bench-load: build
	@scripts/bench load

bench-peers: build
	@scripts/bench-peers

connections: build
	@scripts/setup --tests
	@build/venv/bin/python tests/stress_connections.py

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
