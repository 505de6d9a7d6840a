"""200 schemas of the public JSON-Schema-Test-Suite: what is accepted is followed, what is refused is
told why."""
import concurrent.futures
import json
import pathlib

import jsonschema

SUITE = json.loads((pathlib.Path(__file__).parent / "data/json_schema_suite.json").read_text())["schemas"]


def test_schemas_of_a_public_suite(two_nodes):
    assert len(SUITE) == 200
    end = end_token(two_nodes)

    def one(case):
        # The end is chosen as soon as the grammar allows it, so that small models end too.
        status, text = two_nodes.post("/v1/completions", {
            "model": "demo", "prompt": "JSON: ", "max_tokens": 100, "logit_bias": {str(end): 100},
            "guided_json": json.dumps(case["schema"])}, seconds=120)
        return case, status, text

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        results = list(pool.map(one, SUITE))
    accepted, refused, cut, wrong = 0, 0, 0, []
    for case, status, text in results:
        where = f"{case['keyword']}: {case['description']}: {json.dumps(case['schema'])}"
        if status == 422:
            refused += 1
            reason = json.loads(text)["error"]
            assert len(reason) > 20, where
            continue
        assert status == 200, (where, text)
        choice = json.loads(text)["choices"][0]
        if choice["finish_reason"] == "length":
            cut += 1
            continue
        accepted += 1
        try:
            jsonschema.Draft202012Validator(case["schema"]).validate(json.loads(choice["text"]))
        except (jsonschema.ValidationError, json.JSONDecodeError) as error:
            wrong.append((where, choice["text"], str(error).splitlines()[0]))
    print(f"{accepted} accepted and valid, {refused} refused with a reason, {cut} cut at max_tokens, "
          f"{len(wrong)} wrong")
    assert not wrong, wrong
    assert accepted >= 100 and cut <= 20


def end_token(instance):
    config = json.loads((instance.model / "config.json").read_text())
    end = config["eos_token_id"]
    return end[0] if isinstance(end, list) else end
