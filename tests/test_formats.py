"""Number formats, an int8 KV cache, experts and latent attention in service over two nodes."""
import re

import pytest

from support.instance import Instance, run_program
from support.paths import demo_model

MODEL = "BackendConfig.ModelDeployConfig.ModelConfig[0]"
STORY = "Once upon a time there was a miller who had three sons. "


def run_on(model, ranks, *options):
    done = run_program("run", "--model_path", model, "--max_output_length", 24,
                       "--max_input_length", 600, "--max_batch_size", 1, "--input_texts", STORY * 8,
                       "--tp", ranks, *options, seconds=120)
    assert done.returncode == 0, done.stderr
    return done.stdout[done.stdout.index("Answer[0]:"):done.stdout.index("Generate[0]")], done.stderr


def serve_on_two(folder, model, settings, reported):
    """The answer to a prompt of several blocks, asked twice; the second takes them from the cache."""
    with Instance(folder, model, [1, 1], settings) as instance:
        instance.start()
        for line in reported:
            assert line in instance.nodes[0].text(), line
        first = instance.complete(STORY * 16, max_tokens=24).text
        assert instance.complete(STORY * 16, max_tokens=24).text == first
        instance.stop()
    return first


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    made = {"bf16": demo_model()}
    for name in ("w8a8-dynamic", "w8a16"):
        made[name] = tmp_path_factory.mktemp("formats") / name
        done = run_program("quantize", demo_model(), made[name], "--format", name, seconds=120)
        assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("name, reported", [
    ("bf16", ["KV cache: bf16"]),
    ("w8a8-dynamic", ["number formats (compressed-tensors): W8A8", "KV cache: bf16"]),
    ("w8a16", ["number formats (compressed-tensors): W8A16", "KV cache: bf16"])])
def test_each_format_is_served_by_two_nodes(quantised, tmp_path, name, reported):
    text = serve_on_two(tmp_path, quantised[name], [], reported)
    assert len(text.split()) > 8
    assert re.search(r"\b(the|and|to|a|was)\b", text, re.I), text


def test_int8_kv_is_an_option_of_both_ways_to_start(tmp_path):
    text = serve_on_two(tmp_path, demo_model(), [f'{MODEL}.kvCacheDtype="int8"'],
                        ["KV cache: int8 (a scale per token and head)"])
    assert len(text.split()) > 8
    alone, log = run_on(demo_model(), 1, "--kv-dtype", "int8")
    assert "KV cache: int8 (a scale per token and head)" in log
    for ranks in (2, 3):
        assert run_on(demo_model(), ranks, "--kv_cache_dtype", "int8")[0] == alone
    unknown = run_program("run", "--model_path", demo_model(), "--kv-dtype", "fp8")
    assert unknown.returncode != 0
    assert "found fp8, expected auto, bf16 (bfloat16) or int8" in unknown.stderr + unknown.stdout


SHAPES = {"mixtral": ["--family", "mixtral", "--layers", 2, "--hidden", 96, "--heads", 6,
                      "--kv-heads", 2, "--intermediate", 160, "--experts", 5],
          "deepseek_v3": ["--family", "deepseek_v3", "--layers", 3, "--hidden", 96, "--heads", 6,
                          "--experts", 8, "--experts-per-token", 3, "--expert-intermediate", 40]}


@pytest.mark.parametrize("family", SHAPES)
def test_experts_and_latent_attention(tmp_path, family):
    model = tmp_path / family
    done = run_program("make-random-model", model, *SHAPES[family], "--vocab", 49152,
                       "--tokenizer-from", demo_model())
    assert done.returncode == 0, done.stderr
    alone, _ = run_on(model, 1)
    assert run_on(model, 2, "--moe_ep", 2)[0] == alone
    assert run_on(model, 4, "--moe_ep", 2, "--moe_tp", 2)[0] == alone
    wrong = run_program("run", "--model_path", model, "--tp", 4, "--moe_ep", 3)
    assert wrong.returncode == 1
    assert "World size must equal to MoE's ep_size * MoE's tp_size" in wrong.stderr
    assert "found moe_ep 3, moe_tp -1, expected a product of 4" in wrong.stderr
    cut = serve_on_two(tmp_path / "tp", model, [], ["KV cache: bf16"])
    placed = serve_on_two(tmp_path / "ep", model, [f"{MODEL}.moe_ep=2", f"{MODEL}.moe_tp=1"], [])
    assert placed == cut
