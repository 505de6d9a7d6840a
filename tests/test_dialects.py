"""Every dialect and feature of a request once, against two nodes, with the clients people have."""
import json
import threading
import time

import pytest

from support.instance import fetch

WEATHER = {"type": "function",
           "function": {"name": "get_weather", "description": "Current weather",
                        "parameters": {"type": "object",
                                       "properties": {"city": {"type": "string", "maxLength": 20},
                                                      "days": {"type": "integer", "minimum": 1,
                                                               "maximum": 9}},
                                       "required": ["city", "days"], "additionalProperties": False}}}
PERSON = {"type": "object",
          "properties": {"name": {"type": "string", "maxLength": 12},
                         "age": {"type": "integer", "minimum": 0, "maximum": 120},
                         "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}},
          "required": ["name", "age", "tags"], "additionalProperties": False}
USER = [{"role": "user", "content": "Tell me about Ann, who is 41."}]


@pytest.fixture(scope="module")
def client(two_nodes):
    return two_nodes.client()


def ask(instance, path, body, status=200):
    got, text = instance.post(path, body)
    assert got == status, text
    return json.loads(text)


# --- structured output -------------------------------------------------------------------------------

def test_json_schema_is_followed_in_order(client):
    answer = client.chat.completions.create(
        model="demo", messages=USER, max_tokens=120,
        response_format={"type": "json_schema",
                         "json_schema": {"name": "person", "strict": True, "schema": PERSON}})
    person = json.loads(answer.choices[0].message.content)
    assert list(person) == ["name", "age", "tags"]
    assert 0 <= person["age"] <= 120 and set(person["tags"]) <= {"a", "b"}
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_other_structures(two_nodes, client, stream):
    for extra, allowed in (({"guided_choice": ["red", "dark green"]}, ["red", "dark green"]),
                           ({"structured_outputs": {"regex": "[0-9]{3}-x"}}, None),
                           ({"guided_grammar": 'start: "ab" | "cd"'}, ["ab", "cd"])):
        answer = client.completions.create(model="demo", prompt="Answer: ", max_tokens=30, stream=stream,
                                           extra_body=extra)
        text = "".join(c.choices[0].text for c in answer) if stream else answer.choices[0].text
        assert text in allowed if allowed else (len(text) == 5 and text.endswith("-x")), (extra, text)


def test_json_object_and_sampling(client):
    for seed in (1, 2, 3):
        answer = client.chat.completions.create(
            model="demo", messages=USER, max_tokens=200, temperature=1.0, seed=seed,
            response_format={"type": "json_object"})
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_bad_structures_are_refused_soon(two_nodes):
    bad = [{"guided_regex": "("}, {"guided_regex": "(?=a)b"}, {"guided_grammar": "start: missing"},
           {"guided_json": {"$ref": "#/nowhere"}}, {"guided_json": "[1]"},
           {"guided_json": {"type": "integer", "minimum": 2, "maximum": 1}}]
    # Within the bounds of work or not, but soon.
    bombs = [{"guided_regex": "(((a{0,999}){0,999}){0,999}){0,999}"},
             {"guided_regex": "(.{0,9000}x.{0,9000}){999}"},
             {"guided_json": {"type": "array", "minItems": 100000000, "items": {"type": "string"}}}]
    for extra in bad + bombs:
        begun = time.monotonic()
        status, text = two_nodes.post("/v1/completions",
                                      {"model": "demo", "prompt": "x", "max_tokens": 2, **extra})
        assert status == 422 or (status == 200 and extra in bombs), (extra, text)
        assert status == 200 or len(json.loads(text)["error"]) > 20, (extra, text)
        assert time.monotonic() - begun < 5, extra  # under 1 s on a quiet machine


# --- calls and reasoning -----------------------------------------------------------------------------

@pytest.mark.parametrize("choice", ["required",
                                    {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call(client, choice):
    answer = client.chat.completions.create(model="demo", messages=USER, tools=[WEATHER],
                                            tool_choice=choice, max_tokens=200,
                                            parallel_tool_calls=False)
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather" and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "days"} and 1 <= arguments["days"] <= 9
    assert answer.choices[0].finish_reason == "tool_calls"
    streamed = client.chat.completions.create(model="demo", messages=USER, tools=[WEATHER],
                                              tool_choice=choice, max_tokens=200, stream=True,
                                              parallel_tool_calls=False)
    pieces = [c.choices[0].delta.tool_calls[0] for c in streamed
              if c.choices and c.choices[0].delta.tool_calls]
    assert pieces[0].function.name == "get_weather"
    assert json.loads("".join(p.function.arguments or "" for p in pieces)) == arguments


def test_a_conversation_with_a_call(client):
    messages = [*USER,
                {"role": "assistant", "content": None,
                 "tool_calls": [{"id": "call_1", "type": "function",
                                 "function": {"name": "get_weather", "arguments": "{\"city\":\"x\"}"}}]},
                {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"}]
    answer = client.chat.completions.create(model="demo", messages=messages, tools=[WEATHER], max_tokens=8)
    assert answer.choices[0].message.content is not None


# --- sampling and control ----------------------------------------------------------------------------

def test_a_seeded_request_gives_the_same_tokens_at_any_load(two_nodes, client):
    def one():
        return client.completions.create(model="demo", prompt="Once", max_tokens=24, temperature=1.0,
                                         top_p=0.9, seed=7).choices[0].text
    alone = one()
    stop = threading.Event()

    def load(i):
        while not stop.is_set():
            client.completions.create(model="demo", prompt=f"Number {i}", max_tokens=40,
                                      temperature=1.0)
    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert [one() for _ in range(2)] == [alone, alone]
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_bias_and_bounds(two_nodes, client):
    ids = ask(two_nodes, "/tokenize", {"prompt": " yes"})["tokens"]
    text = client.completions.create(model="demo", prompt="Say:", max_tokens=3,
                                     logit_bias={str(ids[-1]): 100}).choices[0].text
    assert text == " yes" * 3
    many = client.completions.create(model="demo", prompt="Say:", max_tokens=6, temperature=1, n=3,
                                     seed=1, extra_body={"min_tokens": 6})
    assert len(many.choices) == 3 and many.usage.completion_tokens == 18
    beams = client.completions.create(model="demo", prompt="The capital of France is", max_tokens=6, n=2,
                                      extra_body={"use_beam_search": True}, best_of=3)
    assert len(beams.choices) == 2 and "Paris" in beams.choices[0].text + beams.choices[1].text


def test_log_probabilities_of_a_prompt(two_nodes, client):
    """Those of a prompt's tokens are those with which the same tokens are generated, to the last bit,
    whether or not the prefix cache knows the prompt."""
    ids = ask(two_nodes, "/tokenize", {"prompt": "The capital of France is Paris, and that of Italy is "
                                                 "Rome. " * 12})["tokens"]
    for _ in range(2):
        answer = client.completions.create(model="demo", prompt=ids, max_tokens=1, echo=True, logprobs=5,
                                           temperature=0, extra_body={"prompt_logprobs": 5}).choices[0]
        scores = answer.logprobs
        assert answer.text.startswith("The capital of France") and len(scores.tokens) == len(ids) + 1
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
        assert max(scores.token_logprobs[1:]) <= 0 and sum(scores.token_logprobs[30:-1]) > -60
        for place in (1, 17, len(ids) - 1):
            best = client.completions.create(model="demo", prompt=ids[:place], max_tokens=1, logprobs=5,
                                             temperature=0).choices[0].logprobs
            assert best.top_logprobs[0].items() <= scores.top_logprobs[place].items()
        listed = answer.model_extra["prompt_logprobs"]
        assert len(listed) == len(ids) and listed[0] is None
        for place, entry in enumerate(listed[1:], 1):
            own = entry[str(ids[place])]
            assert own["logprob"] == scores.token_logprobs[place] and len(entry) in (5, 6)
            assert (own["rank"] <= 5) == (len(entry) == 5)
    pieces = list(client.completions.create(model="demo", prompt=ids[:9], max_tokens=2, echo=True, logprobs=1,
                                            temperature=0, stream=True))
    told = [value for piece in pieces for value in piece.choices[0].logprobs.token_logprobs]
    assert told[1:9] == scores.token_logprobs[1:9] and len(told) == 11


def test_unknown_fields_are_ignored_by_name(client):
    raw = client.completions.with_raw_response.create(
        model="demo", prompt="x", max_tokens=1, extra_body={"colour": "blue"})
    assert "colour" in raw.headers["x-phalanx-ignored"]


def test_malformed_bodies(two_nodes):
    bodies = [b"", b"{", b"\xff\xfe", b'{"model":"demo","prompt":"\\ud800"}',
              b'{"model":"demo","prompt":"a\x00b"}', b'{"model":"demo","prompt":"x","temperature":1e999}',
              b'{"model":"demo","prompt":"x","x":' + b"[" * 90000 + b"]" * 90000 + b"}",
              b'{"model":"demo","prompt":"x","max_tokens":' + b"9" * 400 + b"}"]
    for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/infer", "/v1/messages",
                 "/v1/responses", "/v2/models/demo/infer", "/tokenize", "/v1/tokenizer"):
        for body in bodies:
            status, text = two_nodes.post(path, body)
            assert 400 <= status < 500 and json.loads(text)["error"], (path, body[:60], text)
    assert two_nodes.complete("x").text is not None


# --- the other dialects ------------------------------------------------------------------------------

def test_all_dialects_say_the_same(two_nodes, client):
    """One greedy continuation, by every interface."""
    prompt, count = "The capital of France is", 6
    want = client.completions.create(model="demo", prompt=prompt, max_tokens=count, temperature=0)
    want = want.choices[0].text
    p = {"max_new_tokens": count, "do_sample": False}
    assert ask(two_nodes, "/generate", {"prompt": prompt, "max_tokens": count,
                                        "temperature": 0})["text"] == [f"{prompt} {want}"]
    assert ask(two_nodes, "/generate", {"inputs": prompt, "parameters": p})["generated_text"] == want
    assert ask(two_nodes, "/", {"inputs": prompt, "parameters": p})[0]["generated_text"] == want
    assert ask(two_nodes, "/infer", {"inputs": prompt, "parameters": p})["generated_text"] == want
    ids = ask(two_nodes, "/tokenize", {"prompt": prompt})["tokens"]
    assert ask(two_nodes, "/infer_token", {"input_id": ids, "parameters": p})["generated_text"] == want
    assert ask(two_nodes, "/v2/models/demo/generate",
               {"text_input": prompt, "parameters": p})["text_output"] == want
    tensor = {"name": "input0", "shape": [1, len(ids)], "datatype": "UINT32", "data": ids, "parameters": p}
    out = ask(two_nodes, "/v2/models/demo/infer", {"inputs": [tensor], "outputs": [{"name": "o"}]})
    text = ask(two_nodes, "/detokenize", {"tokens": out["outputs"][0]["data"]})["prompt"]
    assert text.startswith(want)


def test_responses_with_the_openai_client(client):
    answer = client.responses.create(model="demo", input="Say hello.", max_output_tokens=8)
    assert answer.output_text and answer.usage.output_tokens <= 8
    with client.responses.stream(model="demo", input="Say hello.", max_output_tokens=8) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    assert text == answer.output_text


def test_anthropic_messages(two_nodes):
    body = {"model": "demo", "max_tokens": 8, "messages": [{"role": "user", "content": "Say hello."}]}
    answer = ask(two_nodes, "/v1/messages", body)
    assert answer["content"][0]["type"] == "text" and answer["stop_reason"] in ("max_tokens", "end_turn")
    status, text = two_nodes.post("/v1/messages", {**body, "stream": True})
    assert status == 200 and "event: message_stop" in text
    assert ask(two_nodes, "/v1/messages", {"model": "demo"}, 422)["type"] == "error"


def test_embeddings_are_refused_with_a_reason(two_nodes):
    error = ask(two_nodes, "/v1/embeddings", {"model": "demo", "input": "x"}, 400)["error"]
    assert "not an embedding model" in error["message"]


def test_metadata(two_nodes):
    assert json.loads(fetch(f"{two_nodes.url}/v2/models/demo")[1])["inputs"][0]["datatype"] == "UINT32"
    assert json.loads(fetch(f"{two_nodes.url}/info")[1])["models"][0]["model_id"] == "demo"
    assert json.loads(fetch(f"{two_nodes.url}/v1/models")[1])["data"][0]["id"] == "demo"
