"""An ordinary OpenAI client against two nodes."""
import concurrent.futures
import json
import socket
import time

import openai
import pytest

from support.prompts import PROMPTS


def test_chat_names_paris(two_nodes):
    answer = two_nodes.client().chat.completions.create(
        model=two_nodes.name, temperature=0, max_tokens=40,
        messages=[{"role": "user", "content": "What is the capital of France?"}])
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 40
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_stream_equals_whole_answer(two_nodes):
    request = dict(model=two_nodes.name, temperature=0, max_tokens=30,
                   messages=[{"role": "user", "content": "Name three colours."}])
    whole = two_nodes.client().chat.completions.create(**request)
    pieces, reason = [], None
    for chunk in two_nodes.client().chat.completions.create(stream=True, **request):
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            reason = choice.finish_reason or reason
    assert len([p for p in pieces if p]) > 1
    assert "".join(pieces) == whole.choices[0].message.content
    assert reason == whole.choices[0].finish_reason


def test_completion_of_text_and_of_token_ids(two_nodes):
    client = two_nodes.client()
    text = client.completions.create(model=two_nodes.name, prompt="The capital of France is",
                                     temperature=0, max_tokens=8)
    assert "Paris" in text.choices[0].text
    assert text.usage.completion_tokens == 8
    ids = client.completions.create(model=two_nodes.name, prompt=[504, 3575, 282, 4649, 314],
                                    temperature=0, max_tokens=8)
    assert ids.usage.prompt_tokens == 5 and ids.choices[0].text


def test_stop_sequence_ends_the_text_before_it(two_nodes):
    plain = two_nodes.complete("1, 2, 3, 4,", max_tokens=24).text
    assert "7" in plain
    stopped = two_nodes.complete("1, 2, 3, 4,", max_tokens=24, stop=["7"])
    assert stopped.text == plain[:plain.index("7")]
    assert stopped.finish_reason == "stop"


def test_logprobs_agree_with_the_text(two_nodes):
    answer = two_nodes.client().chat.completions.create(
        model=two_nodes.name, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3,
        messages=[{"role": "user", "content": "Say yes."}])
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        assert token.logprob <= 0
        best = max(token.top_logprobs, key=lambda t: t.logprob)
        assert len(token.top_logprobs) == 3
        assert abs(best.logprob - token.logprob) < 1e-6  # greedy takes the likeliest
    completion = two_nodes.complete("The capital of France is", max_tokens=4, logprobs=2)
    assert len(completion.logprobs.token_logprobs) == 4


def test_seeded_sampling_repeats(two_nodes):
    def sample(seed):
        return two_nodes.complete("My favourite animal is", temperature=1.0, seed=seed,
                                  max_tokens=16).text
    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_thirty_two_at_once_give_the_same_texts_as_one_by_one(two_nodes):
    prompts = (PROMPTS[:15] + [f"Number {i} is called" for i in range(17)])[:32]
    alone = [two_nodes.complete(prompt).text for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = [choice.text for choice in pool.map(two_nodes.complete, prompts)]
    assert together == alone


def test_models_and_health(two_nodes):
    assert [m.id for m in two_nodes.client().models.list()] == [two_nodes.name]
    for path in ("/health", "/v2/health/live", "/v2/health/ready",
                 f"/v2/models/{two_nodes.name}/ready"):
        status, body = two_nodes.get(path)
        assert status == 200, (path, body)


@pytest.mark.parametrize("name,body", [
    ("not JSON", b"{"),
    ("no prompt", {"max_tokens": 3}),
    ("prompt of a wrong type", {"prompt": {"a": 1}, "max_tokens": 3}),
    ("max_tokens of a wrong type", {"prompt": "x", "max_tokens": "many"}),
    ("negative max_tokens", {"prompt": "x", "max_tokens": -1}),
    ("temperature of a wrong type", {"prompt": "x", "temperature": []}),
])
def test_bad_request_is_refused_and_disturbs_nobody(two_nodes, name, body):
    expected = two_nodes.complete("Once upon a time").text
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(two_nodes.complete, "Once upon a time")
        if isinstance(body, dict):
            body = {"model": two_nodes.name, **body}
        status, text = two_nodes.post("/v1/completions", body)
        assert 400 <= status < 500, (name, status, text)
        assert json.loads(text)["error"], name
        assert other.result().text == expected


def test_unknown_model_and_too_long_prompt_are_refused_by_name(two_nodes):
    with pytest.raises(openai.APIStatusError) as refused:
        two_nodes.client().completions.create(model="other", prompt="x", max_tokens=1)
    assert 400 <= refused.value.status_code < 500
    with pytest.raises(openai.APIStatusError) as refused:
        two_nodes.complete("word " * 3500)
    assert 400 <= refused.value.status_code < 500
    assert "3072" in str(refused.value.body) or "3072" in refused.value.response.text


def test_client_that_leaves_frees_its_sequence(two_nodes):
    body = json.dumps({"model": two_nodes.name, "prompt": "Tell me a very long story.",
                       "max_tokens": 500, "ignore_eos": True, "stream": True, "temperature": 0})
    with socket.create_connection(("127.0.0.1", two_nodes.port), 10) as connection:
        connection.sendall((f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: "
                            f"application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}").encode())
        assert b"200" in connection.recv(64)
    for _ in range(100):
        resource = json.loads(two_nodes.get("/v1/status")[1])["resource"]
        if (resource["runningRequestNum"] == 0 and
                resource["freeNpuBlockNums"] == resource["totalNpuBlockNums"]):
            return
        time.sleep(0.1)
    raise AssertionError(f"the sequence was not freed within 10 s: {resource}")


def test_slave_opens_no_http_port(two_nodes):
    for port in (two_nodes.port, two_nodes.management_port, two_nodes.metrics_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), 5)
        socket.create_connection(("127.0.0.1", port), 5).close()


def test_both_nodes_compute_and_each_rank_reads_its_share_only(two_nodes):
    before = {r["rank"]: r for r in two_nodes.ranks()}
    two_nodes.complete("Tell me about the sea.", max_tokens=32)
    for rank in two_nodes.ranks():
        old = before[rank["rank"]]
        assert rank["compute_ns"] > old["compute_ns"]
        assert rank["bytes_sent"] > old["bytes_sent"]
        assert rank["bytes_received"] > old["bytes_received"]
        share = rank["bytes_to_read"]
        assert share > 0
        assert rank["bytes_read"] <= 1.05 * share
        io = dict(line.split(": ") for line in
                  open(f"/proc/{rank['pid']}/io", encoding="ascii").read().splitlines())
        assert int(io["rchar"]) <= 1.05 * share, f"rank {rank['rank']}: {io}"
        whole = sum(f.stat().st_size for f in two_nodes.model.glob("*.safetensors"))
        assert share < 0.62 * whole


def test_a_profile_shows_every_rank(two_nodes):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        profile = pool.submit(two_nodes.get, "/v1/profile?steps=6&seconds=60", seconds=90)
        deadline = time.monotonic() + 60
        while not profile.done():
            assert time.monotonic() < deadline
            two_nodes.complete("One, two,", max_tokens=8)
    status, body = profile.result()
    assert status == 200, body
    events = json.loads(body)["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {0: "head", 1: "rank 0, node 127.0.0.1", 2: "rank 1, node 127.0.0.2"}
    for rank in (1, 2):
        own = [e for e in events if e["ph"] == "X" and e["pid"] == rank]
        steps = [at for at, e in enumerate(own) if e["name"] == "step"]
        assert len(steps) == 6
        # Four gathers a layer, each with its bytes.
        assert sum(e["name"] == "transfer" and e["args"]["bytes"] > 0 for e in own) >= 6 * 4 * 30
        for at, end in zip(steps, steps[1:] + [len(own)]):  # a step, then what it was spent on
            inside = sum(e["dur"] for e in own[at + 1:end])
            assert abs(inside - own[at]["dur"]) <= 0.02 * own[at]["dur"] + 50, (inside, own[at])
