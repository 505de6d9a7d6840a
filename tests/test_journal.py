"""Accepted requests outlive the master's process: --request-journal."""
import concurrent.futures
import http.client
import json
import signal
import time

import pytest

from support.instance import Instance, free_ports, run_program

BODY = {"model": "demo", "max_tokens": 400, "temperature": 0, "ignore_eos": True}


def ask(instance, number):
    connection = http.client.HTTPConnection("127.0.0.1", instance.port, timeout=120)
    connection.request("POST", "/v1/completions",
                       json.dumps({**BODY, "prompt": f"Story number {number}:"}),
                       {"Content-Type": "application/json", "X-Request-Id": f"story-{number}"})
    return json.loads(connection.getresponse().read())["choices"][0]["text"]


def broken(instance, number):
    with pytest.raises((OSError, http.client.HTTPException)):
        ask(instance, number)


def fetched(instance, number, seconds):
    deadline = time.monotonic() + seconds
    while True:
        status, body = instance.get(f"/v1/requests/story-{number}", port=instance.port)
        if status != 202:
            return status, body
        assert time.monotonic() < deadline, body
        time.sleep(0.1)


def test_a_killed_master_answers_after_its_return(tmp_path, model):
    journal = tmp_path / "journal"
    with Instance(tmp_path / "nodes", model, [1, 1]) as instance:
        instance.start(PHALANX_REQUEST_JOURNAL=journal)
        undisturbed = [ask(instance, i) for i in range(3)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            clients = [pool.submit(broken, instance, i) for i in range(3)]
            deadline = time.monotonic() + 20
            while journal.read_text().count("Story") < 6:  # three were answered
                assert time.monotonic() < deadline, journal.read_text()
                time.sleep(0.01)
            instance.nodes[0].popen.send_signal(signal.SIGKILL)
            instance.nodes[0].wait(10)
            for client in clients:
                client.result(30)
        assert instance.nodes[1].popen.poll() is None  # keeps its weights and waits
        instance.start_node(0, PHALANX_REQUEST_JOURNAL=journal)
        instance.wait_serving()
        assert "3 requests of an earlier process will be answered" in instance.nodes[0].text()
        for i, text in enumerate(undisturbed):
            status, body = fetched(instance, i, 60)
            assert status == 200, body
            assert json.loads(body)["choices"][0]["text"] == text
            assert fetched(instance, i, 60)[0] == 404
        instance.stop()


def test_a_journal_that_cannot_be_used_is_named_before_anything_starts(tmp_path, model):
    done = run_program("serve", "--model", model, "--port", free_ports(1)[0], "--request-journal",
                       tmp_path / "none/journal", seconds=30)
    assert done.returncode == 1
    assert (f"request journal {tmp_path}/none/journal cannot be used: No such file or directory. "
            "Fix: name a file in a folder that this user may write") in done.stderr
