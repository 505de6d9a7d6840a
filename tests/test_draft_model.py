"""Speculation by a draft model on two nodes: the same tokens in fewer steps, also after a loss."""
import concurrent.futures
import os
import shutil
import signal

import pytest

from support.instance import Instance, run_program
from support.prompts import PROMPTS
from test_recovery import completion, status, under_load, wait_generation

TEXTS = [PROMPTS[1], PROMPTS[3], PROMPTS[8]]


def answers(instance):
    """Requests of many kinds at once, those among them that do not simply take the likeliest token."""
    client = instance.client()

    def mixed(options):
        choice = client.completions.create(model=instance.name, prompt="The river", max_tokens=24,
                                           extra_body={"ignore_eos": True}, **options).choices[0]
        return choice.text, choice.logprobs and choice.logprobs.tokens

    def as_json(_):
        return client.chat.completions.create(
            model=instance.name, temperature=0, max_tokens=40,
            messages=[{"role": "user", "content": "Describe a cat as JSON."}],
            response_format={"type": "json_object"}).choices[0].message.content

    kinds = [(mixed, {"temperature": 0}), (mixed, {"temperature": 0.9, "seed": 7}),
             (mixed, {"temperature": 0, "logprobs": 2}), (as_json, None),
             (mixed, {"temperature": 0, "frequency_penalty": 0.8}),
             *((lambda prompt: completion(instance, prompt), text) for text in TEXTS)]
    with concurrent.futures.ThreadPoolExecutor(len(kinds)) as pool:
        return [f.result(120) for f in [pool.submit(ask, what) for ask, what in kinds]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, model):
    with Instance(tmp_path_factory.mktemp("plain"), model, [1, 1]) as instance:
        instance.start()
        texts = [completion(instance, text) for text in TEXTS]
        steps = status(instance)["engine"]["steps"]
        found = texts, steps, answers(instance)
        instance.stop()
    return found


@pytest.fixture(scope="module")
def drafting(tmp_path_factory, model):
    """The model is its own draft model, so every guess of a likeliest token is right. It is as slow as the
    model, too: after a trial with each number of sequences the engine may hold the guesses back."""
    with Instance(tmp_path_factory.mktemp("drafting"), model, [1, 1],
                  arguments=["--draft-model", model, "--draft-tokens", 4]) as instance:
        instance.start(MIES_SERVICE_MONITOR_MODE=1)
        yield instance
        instance.stop()


def test_the_same_tokens_in_fewer_steps(plain, drafting):
    texts, steps, mixed = plain
    log = drafting.nodes[0].text("err")
    assert "whole on rank 0: weights" in log and "up to 4 guesses per sequence and step" in log
    assert "draft model" not in drafting.nodes[1].text("err")
    assert [completion(drafting, text) for text in TEXTS] == texts
    engine = status(drafting)["engine"]
    assert engine["accepted_draft_tokens"] > 0.9 * engine["draft_tokens"] > 10, engine
    assert engine["steps"] < steps - 0.5 * engine["accepted_draft_tokens"], (engine, steps)
    assert engine["draft_ns"] > 0
    assert answers(drafting) == mixed


def test_the_metrics_count_drafts(drafting):
    code, text = drafting.get("/metrics", port=drafting.metrics_port)
    assert code == 200
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    value = {name: float(number) for name, number in values.items() if "draft" in name or "spec_" in name}
    label = '{model_name="demo",engine="0"'
    drafts = value[f"vllm:spec_decode_num_drafts_total{label}}}"]
    tokens = value[f"vllm:spec_decode_num_draft_tokens_total{label}}}"]
    right = value[f"vllm:spec_decode_num_accepted_tokens_total{label}}}"]
    places = [value[f'vllm:spec_decode_num_accepted_tokens_per_pos_total{label},position="{i}"}}']
              for i in range(4)]
    assert 0 < drafts <= tokens <= 4 * drafts and right <= tokens
    assert sum(places) == right and places[0] >= places[3] > 0
    assert 'position="4"' not in text
    assert value['phalanx_draft_seconds_total{model_name="demo"}'] > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_under_load_changes_no_token(drafting, rank):
    prompts = PROMPTS[:4]
    texts = [completion(drafting, prompt) for prompt in prompts]
    before = status(drafting)
    pid = next(r["pid"] for r in before["ranks"] if r["rank"] == rank)

    def kill():
        os.kill(pid, signal.SIGKILL)
        wait_generation(drafting, before["generation"] + 1)
    assert under_load(drafting, prompts, kill) == texts
    after = status(drafting)["engine"]
    guesses = after["draft_tokens"] - before["engine"]["draft_tokens"]
    right = after["accepted_draft_tokens"] - before["engine"]["accepted_draft_tokens"]
    # Of what was under way at the loss no guess counts.
    assert right >= 0.8 * guesses - 4 * len(prompts), (before, after)
    # The draft model's weights outlive its process too.
    assert all(r["bytes_read"] == 0 for r in status(drafting)["ranks"] if r["rank"] == 0)


def check(model, *arguments):
    done = run_program("check", "--no-ports", "--model", model, *arguments)
    return done.returncode, done.stdout + done.stderr


def random_model(folder, *options):
    done = run_program("make-random-model", folder, "--hidden", 64, "--layers", 1, "--heads", 2,
                       "--kv-heads", 1, "--intermediate", 64, *options)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_draft_model_that_does_not_fit_is_refused(tmp_path, model):
    code, text = check(model, "--draft-model", model)
    assert code == 0 and "whole on rank 0: weights" in text, text

    other = random_model(tmp_path / "other", "--vocab", 1000, "--tokenizer-from", model)
    code, text = check(model, "--draft-model", other)
    assert code == 1
    assert "the draft model has another vocabulary than the model" in text
    assert "vocab_size 1000 in" in text and "vocab_size 49152, as in" in text

    bare = random_model(tmp_path / "bare", "--vocab", 49152)
    code, text = check(model, "--draft-model", bare)
    assert code == 1
    assert "the draft model has another tokenizer than the model" in text
    assert "tokenizer.json: absent" in text and "copy the tokenizer.json" in text

    # Files that differ in their bytes alone are the same tokenizer; other tokens are not.
    source = (model / "tokenizer.json").read_text()
    (bare / "tokenizer.json").write_text(source + "\n")
    assert check(model, "--draft-model", bare)[0] == 0
    assert source.count('"Ġthe":') == 1 and source.count('"Ġof":') == 1
    (bare / "tokenizer.json").write_text(
        source.replace('"Ġthe":', '"Ġ<>":').replace('"Ġof":', '"Ġthe":').replace('"Ġ<>":', '"Ġof":'))
    code, text = check(model, "--draft-model", bare)
    assert code == 1 and "has another tokenizer" in text
    assert 'is " of"' in text and 'is " the"' in text, text

    broken = tmp_path / "broken"
    shutil.copytree(other, broken)
    (broken / "model.safetensors").unlink()
    code, text = check(model, "--draft-model", broken)
    assert code == 1 and "the draft model cannot be used" in text and str(broken) in text

    code, text = check(model, "--draft-model", tmp_path / "nowhere")
    assert code == 1 and "no weight directory" in text and "--draft-model" in text


def test_every_way_to_ask_for_it(model, tmp_path):
    for arguments in ([f'--speculative-config={{"model": "{model}", "num_speculative_tokens": 3}}'],
                      [f'--speculative-config={{"method": "draft_model", "model": "{model}", '
                       '"num_speculative_tokens": 3, "draft_tensor_parallel_size": 1}'],
                      ["--draft-model", model, "--draft-tokens", 3]):
        code, text = check(model, *arguments)
        assert code == 0 and "up to 3 guesses" in text, text
    code, text = check(model, "--draft-tokens", 3)
    assert code == 1 and "guesses of no draft model" in text
    code, text = check(model, "--draft-model", model, "--speculative-config",
                       '{"method": "ngram", "num_speculative_tokens": 3}')
    assert code == 1 and "speculation is asked for twice" in text
    assert "here and by --speculative-config" in text
