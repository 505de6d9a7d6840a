"""Speculation by prompt look-up on two nodes: the same texts in fewer steps."""
import json

from support.instance import Instance

REPEATING = "1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2,"
PROMPTS = [REPEATING, "The capital of France is", "Repeat: red green blue red green blue red"]


def engine(instance):
    status, body = instance.get("/v1/status")
    assert status == 200, body
    return json.loads(body)["phalanx"]["engine"]


def answers(instance):
    before = engine(instance)["steps"]
    texts = [instance.complete(prompt, max_tokens=40, extra_body={"ignore_eos": True}).text
             for prompt in PROMPTS]
    sampled = instance.complete(REPEATING, max_tokens=24, temperature=0.8, seed=3).text
    return [*texts, sampled], engine(instance)["steps"] - before


def test_the_same_texts_in_fewer_steps(tmp_path, model):
    found = {}
    plugins = json.dumps({"plugin_type": "ngram", "num_speculative_tokens": 6})
    for name, settings in (("plain", []), ("drafted", [
            f"BackendConfig.ModelDeployConfig.ModelConfig[0].plugin_params={plugins}"])):
        with Instance(tmp_path / name, model, [1, 1], settings) as instance:
            instance.start()
            found[name] = answers(instance)
            counts = engine(instance)
            drafts, right = counts["draft_tokens"], counts["accepted_draft_tokens"]
            assert (0 < right <= drafts) if name == "drafted" else drafts == 0
            instance.stop()
    assert found["drafted"][0] == found["plain"][0]
    assert found["drafted"][1] < 0.8 * found["plain"][1], found
