"""Tensors over UCX (PHALANX_DATA_PLANE=ucx), by its TCP transport: the same texts, faults named, and
refused where it would be a surprise."""
import os
import pathlib
import signal
import time

import pytest

from support.instance import Instance, run_program
from support.prompts import PROMPTS

WARNING = "tensors travel over UCX: in clear"


def loads_ucx(pid):
    return "libucp.so" in pathlib.Path(f"/proc/{pid}/maps").read_text(encoding="ascii")


def texts(instance):
    return [instance.complete(prompt, max_tokens=24).text for prompt in PROMPTS[:6]]


@pytest.fixture(scope="module", autouse=True)
def has_ucx(tmp_path_factory, model):
    """This build and this machine have UCX, else all is left out, by name."""
    with Instance(tmp_path_factory.mktemp("probe"), model, [1, 1]) as instance:
        node = instance.start_node(1, PHALANX_DATA_PLANE="ucx")
        deadline = time.monotonic() + 30
        while WARNING not in node.text():
            if node.popen.poll() is not None:
                assert "there are no links over UCX here" in node.text()
                pytest.skip(node.text())
            assert time.monotonic() < deadline, node.text()
            time.sleep(0.1)


def test_the_same_texts_as_over_tcp_and_a_killed_rank_is_replaced(tmp_path, model):
    with Instance(tmp_path / "tcp", model, [1, 2]) as instance:
        instance.start()
        assert not any(loads_ucx(pid) for pid in instance.rank_pids().values())
        expected = texts(instance)
        instance.stop()
    with Instance(tmp_path / "ucx", model, [1, 2]) as instance:
        instance.start(PHALANX_DATA_PLANE="ucx")
        for node in instance.nodes.values():
            assert node.text().count(WARNING) == 1, node.text()
        assert all(loads_ucx(pid) for pid in instance.rank_pids().values())
        assert texts(instance) == expected
        victim = instance.rank_pids()[2]
        os.kill(victim, signal.SIGKILL)
        assert texts(instance) == expected
        assert instance.rank_pids()[2] != victim
        instance.stop()


def test_nodes_that_differ_in_it_are_refused_by_name(tmp_path, model):
    with Instance(tmp_path, model, [1, 1]) as instance:
        master = instance.start_node(0, PHALANX_DATA_PLANE="ucx")
        slave = instance.start_node(1)
        assert slave.wait(30) != 0
        assert "tensors between nodes" in slave.text(), slave.text()
        assert "over UCX" in slave.text() and "over TCP" in slave.text(), slave.text()
        master.kill()


def test_under_tls_clear_text_must_be_admitted_by_name(tmp_path, model):
    with Instance(tmp_path, model, [1, 1],
                  settings=["BackendConfig.interNodeTLSEnabled=true"]) as instance:
        node = instance.start_node(0, PHALANX_DATA_PLANE="ucx")
        assert node.wait(30) != 0
        assert "UCX carries tensors in clear, and TLS between nodes is on" in node.text()
        assert "export PHALANX_DATA_PLANE=clear,ucx" in node.text()
    certs = tmp_path / "admitted" / "certs"
    with Instance(tmp_path / "admitted", model, [1, 1], arguments=["--certs", certs],
                  settings=["BackendConfig.interNodeTLSEnabled=true"]) as instance:
        done = run_program("certs", "init", "--rank-table", instance.table_file, "--out", certs)
        assert done.returncode == 0, done.stderr
        instance.start(PHALANX_DATA_PLANE="clear,ucx")
        assert all(loads_ucx(pid) for pid in instance.rank_pids().values())
        assert "Paris" in instance.complete("The capital of France is", max_tokens=8).text
        instance.stop()
