"""A rank or node that dies under load: no accepted request is lost, no token differs."""
import concurrent.futures
import http.client
import json
import os
import signal
import time

import pytest

from support.instance import Instance, children_of
from support.prompts import PROMPTS
from test_faults import wait_running

OUTPUT = 48
LONG = os.environ.get("PHALANX_LONG_TEST")
FROZEN_SECONDS = 60 if LONG else 5


def completion(instance, prompt):
    choice = instance.complete(prompt, max_tokens=OUTPUT, extra_body={"ignore_eos": True})
    assert choice.finish_reason == "length"
    return choice.text


def stream(instance, prompt):
    """Text of a streamed completion: the client sees a pause, never an error or a token twice."""
    pieces = [chunk.choices[0].text for chunk in instance.client().completions.create(
        model=instance.name, prompt=prompt, max_tokens=OUTPUT, temperature=0, stream=True,
        extra_body={"ignore_eos": True}) if chunk.choices]
    return "".join(pieces)


def under_load(instance, prompts, disturb):
    """Texts of all prompts, run at once as streams and whole answers, while disturb() runs."""
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        running = [pool.submit(stream if i % 2 else completion, instance, prompt)
                   for i, prompt in enumerate(prompts)]
        wait_running(instance, len(prompts))
        disturb()
        return [future.result(120) for future in running]


def status(instance):
    return json.loads(instance.get("/v1/status")[1])["phalanx"]


def wait_generation(instance, number, seconds=20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = status(instance)
        if now["generation"] >= number and now["state"] == "serving":
            return now
        time.sleep(0.02)
    raise AssertionError(f"no generation {number} within {seconds} s: {now}")


def wait_state(instance, state, seconds=20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = status(instance)
        if now["state"] == state:
            return now
        time.sleep(0.02)
    raise AssertionError(f"not {state} within {seconds} s: {now}")


@pytest.fixture(scope="module")
def instance(tmp_path_factory, model):
    with Instance(tmp_path_factory.mktemp("recovery"), model, [2, 1]) as instance:
        instance.start(MIES_SERVICE_MONITOR_MODE=1)
        yield instance
        instance.stop()


@pytest.fixture(scope="module")
def expected(instance):
    prompts = PROMPTS[:6]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        return prompts, list(pool.map(lambda p: completion(instance, p), prompts))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_killed_rank_under_load_loses_nothing(instance, expected, rank):
    prompts, texts = expected
    before = status(instance)
    pid = next(r["pid"] for r in before["ranks"] if r["rank"] == rank)

    def kill():
        os.kill(pid, signal.SIGKILL)
        wait_generation(instance, before["generation"] + 1)
        # What the slaves told last may be of the generation before.
        deadline = time.monotonic() + 5
        while any(r["bytes_read"] != 0 for r in status(instance)["ranks"]):
            assert time.monotonic() < deadline, "weights were read again"
            time.sleep(0.05)
    assert under_load(instance, prompts, kill) == texts
    log = instance.nodes[0].text("err")
    assert f"rank {rank} (pid {pid}) was killed by signal 9" in log


def test_a_frozen_rank_is_named_stuck_and_replaced(instance, expected):
    prompts, texts = expected
    before = status(instance)
    pid = next(r["pid"] for r in before["ranks"] if r["rank"] == 2)

    def freeze():
        os.kill(pid, signal.SIGSTOP)
        wait_generation(instance, before["generation"] + 1)
    assert under_load(instance, prompts, freeze) == texts
    log = instance.nodes[0].text("err")
    assert f"rank 2 (pid {pid}) is stuck" in log and "stopped by a signal" in log


def test_a_frozen_node_is_named_stuck_and_goes_on_after_sigcont(instance, expected):
    """For 60 s with PHALANX_LONG_TEST=1."""
    prompts, texts = expected
    before = status(instance)
    slave = instance.nodes[1].popen

    def freeze():
        frozen = time.monotonic()
        slave.send_signal(signal.SIGSTOP)
        now = wait_state(instance, "recovering")
        assert time.monotonic() - frozen < 4
        assert now["nodes"][1]["verdict"] == "stuck", now["nodes"]
        assert "node 127.0.0.2 is stuck" in now["recovery"]["loss"]
        live, body = instance.get("/health")
        assert live == 200 and json.loads(body)["no_contact_node"] == ["node(127.0.0.2) is abnormal."]
        ready, body = instance.get("/v2/health/ready")
        assert ready == 503 and "node 127.0.0.2 is stuck" in json.loads(body)["reason"]
        metrics = instance.get("/metrics", port=instance.metrics_port)[1]
        assert 'node="127.0.0.2",verdict="stuck"} 0' in metrics
        time.sleep(max(0, frozen + FROZEN_SECONDS - time.monotonic()))
        slave.send_signal(signal.SIGCONT)
        wait_generation(instance, before["generation"] + 1)
        assert instance.get("/v2/health/ready")[0] == 200
    assert under_load(instance, prompts, freeze) == texts
    after = status(instance)
    assert after["generation"] == before["generation"] + 1 and after["nodes"][1]["verdict"] == ""


def test_a_node_that_is_killed_and_started_again_goes_on(instance, expected):
    prompts, texts = expected
    before = status(instance)

    def kill():
        instance.nodes[1].kill()
        assert wait_state(instance, "recovering")["nodes"][1]["verdict"] == "dead"
        instance.start_node(1)
        wait_generation(instance, before["generation"] + 1, 60)
    assert under_load(instance, prompts, kill) == texts


def raw_completion(instance, path, body):
    """(status, Retry-After, body text) of one request over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", instance.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.getheader("Retry-After"), response.read().decode()


def test_a_drain_limit_passed_while_recovering_answers_everybody(tmp_path, model):
    """Nobody comes back; the master is told to stop: 503 for whole answers, an error in streams."""
    body = {"model": "demo", "prompt": "Tell me a long story.", "max_tokens": 3000,
            "temperature": 0, "ignore_eos": True}
    chat = {"model": "demo", "messages": [{"role": "user", "content": "A long story."}],
            "max_tokens": 3000, "ignore_eos": True}
    with Instance(tmp_path, model, [1, 1], arguments=["--drain-seconds=1"]) as instance, \
            concurrent.futures.ThreadPoolExecutor(3) as pool:
        instance.start()
        running = [pool.submit(raw_completion, instance, path, request) for path, request in
                   (("/v1/completions", body), ("/v1/chat/completions", chat),
                    ("/v1/completions", {**body, "stream": True}))]
        wait_running(instance, 3)
        deadline = time.monotonic() + 30
        while status(instance)["engine"]["output_tokens"] < 10:   # so that the stream has begun
            assert time.monotonic() < deadline, "no tokens"
            time.sleep(0.02)
        instance.nodes[1].kill()
        wait_state(instance, "recovering")
        instance.nodes[0].popen.send_signal(signal.SIGTERM)
        whole, spoken, streamed = (future.result(30) for future in running)
        for status_code, retry, text in (whole, spoken):
            assert status_code == 503 and int(retry) > 0, text
            assert "the service is stopping: SIGTERM" in text
        assert streamed[0] == 200 and "the service is stopping: SIGTERM" in streamed[2][-300:]
        assert instance.nodes[0].wait(10) == 0


def test_a_drain_limit_passed_in_a_step_that_does_not_end_answers_everybody(tmp_path, model):
    body = {"model": "demo", "prompt": "Tell me a long story.", "max_tokens": 3000,
            "temperature": 0, "ignore_eos": True}
    with Instance(tmp_path, model, [1, 1],
                  arguments=["--drain-seconds=1", "--stuck-seconds=0"]) as instance, \
            concurrent.futures.ThreadPoolExecutor(1) as pool:
        instance.start()
        running = pool.submit(raw_completion, instance, "/v1/completions", body)
        wait_running(instance, 1)
        for pid in children_of(instance.nodes[1].pid):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(0.2)
        instance.nodes[0].popen.send_signal(signal.SIGTERM)
        status_code, retry, text = running.result(15)
        assert status_code == 503 and int(retry) > 0, text
        assert "the service is stopping: SIGTERM" in text
        assert instance.nodes[0].wait(15) == 0
