"""deploy/: what an orchestrator starts, as far as one machine can tell."""
import json
import os
import re
import subprocess

import pytest

from support.instance import SUCCESS, Process, fetch, free_ports, run_program
from support.paths import ROOT, clean_environment, demo_model, program

START_NODE = ROOT / "deploy/start-node"


def hosts(**environment):
    done = subprocess.run([START_NODE, "--print-hosts"], capture_output=True, text=True, timeout=20,
                          env=clean_environment(**environment), check=False)
    return done.returncode, done.stdout.split(), done.stderr


def test_hosts_of_each_orchestrator(tmp_path):
    assert hosts(PHALANX_HOSTS="a,b:2")[1] == ["a", "b:2"]
    assert hosts(LWS_LEADER_ADDRESS="phalanx-0.phalanx.prod", LWS_GROUP_SIZE="3")[1] == [
        "phalanx-0.phalanx.prod", "phalanx-0-1.phalanx.prod", "phalanx-0-2.phalanx.prod"]
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert hosts(SLURM_JOB_NODELIST="n[1-2]", PATH=path)[1] == ["n1", "n2"]
    status, _, errors = hosts()
    assert status == 1
    assert "no hosts: set PHALANX_HOSTS" in errors


def test_a_name_that_never_resolves_is_named(tmp_path):
    done = subprocess.run([START_NODE], capture_output=True, text=True, timeout=30, check=False,
                          env=clean_environment(PHALANX_HOSTS="127.0.0.1,nobody.invalid", PHALANX_MODEL="/x",
                                                PHALANX=program(), PHALANX_RUN=tmp_path,
                                                PHALANX_WAIT_SECONDS=2))
    assert done.returncode == 1
    assert "waiting for the name nobody.invalid, 0 of 2 s" in done.stderr
    assert "nobody.invalid did not resolve within 2 s" in done.stderr


def test_two_hosts_with_certificates_of_one_authority(tmp_path):
    any_table = tmp_path / "any.json"
    run_program("ranktable", "make", "--hosts", "127.0.0.9", "-o", any_table)
    made = run_program("certs", "init", "--rank-table", any_table, "--out", tmp_path / "certs")
    assert made.returncode == 0, made.stderr
    addresses = ["127.0.0.1", "127.0.0.2"]
    port, management, metrics, between = free_ports(4, addresses)
    nodes = []
    try:
        for address in reversed(addresses):
            nodes.append(Process(f"node {address}", [START_NODE], clean_environment(
                PHALANX_HOSTS=",".join(addresses), PHALANX_OWN_ADDRESS=address, PHALANX=program(),
                PHALANX_MODEL=demo_model(), PHALANX_RUN=tmp_path / address,
                PHALANX_AUTHORITY=tmp_path / "certs/authority",
                PHALANX_SETTINGS=f"ServerConfig.port={port} ServerConfig.managementPort={management} "
                                 f"ServerConfig.metricsPort={metrics} "
                                 f"BackendConfig.multiNodesInferPort={between}")))
        for node in nodes:
            node.wait_for(SUCCESS, 60, "out")
        status, body = fetch(f"http://127.0.0.1:{port}/v1/completions", json.dumps(
            {"model": "model", "prompt": "The capital of France is", "max_tokens": 2, "temperature": 0}
        ).encode(), 30)
        assert status == 200
        assert "Paris" in json.loads(body)["choices"][0]["text"]
        nodes[1].popen.terminate()
        for node in nodes:
            assert node.popen.wait(20) == 0
    finally:
        for node in nodes:
            node.popen.kill()


def test_files_name_what_exists():
    containerfile = (ROOT / "deploy/container/Containerfile").read_text()
    for source in re.findall(r"^COPY (?:--\S+ )*(\S+) ", containerfile, re.M):
        assert source == "." or source.startswith("/opt/") or (ROOT / source).exists(), source
    kubernetes = (ROOT / "deploy/kubernetes/leaderworkerset.yaml").read_text()
    slurm = (ROOT / "deploy/slurm/phalanx.sbatch").read_text()
    known = set(re.findall(r"\bPHALANX_?[A-Z_]*\b", START_NODE.read_text()))
    for text in (kubernetes, containerfile, slurm):
        used = set(re.findall(r"\bPHALANX_[A-Z_]+\b", text)) - {"PHALANX_HOME"}
        assert used <= known
    # The container file's packages are those whose libraries the program is linked with.
    linked = subprocess.run(["ldd", program()], capture_output=True, text=True, check=True).stdout
    for library, package in (("libgrpc++.so", "libgrpc++1.51"), ("libhwloc.so", "libhwloc15"),
                             ("libspdlog.so", "libspdlog1.10"), ("libfmt.so", "libfmt9"),
                             ("libssl.so", "libssl3")):
        if library not in linked:
            pytest.fail(f"{library} is no longer linked: take {package} out of the container file")
        assert package in containerfile
