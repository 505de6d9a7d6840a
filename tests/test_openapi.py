"""Schemathesis on the document that the server publishes: no 5xx, no undocumented status."""
import os
import subprocess
import sys

import pytest

pytest.importorskip("schemathesis", reason="heavy: make test-clients installs it")


def test_schemathesis_finds_no_5xx_and_no_undocumented_status(two_nodes, tmp_path):
    """PHALANX_FUZZ_EXAMPLES: examples per operation (default 20)."""
    examples = os.environ.get("PHALANX_FUZZ_EXAMPLES", "20")
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{two_nodes.url}/openapi.json",
         "--checks", "not_a_server_error,status_code_conformance", "-n", examples,
         "--request-timeout", "60", "--seed", "1", "--workers", "1", "--phases", "examples,coverage,fuzzing"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    assert two_nodes.complete("x").text is not None
