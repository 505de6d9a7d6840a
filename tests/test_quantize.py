"""phalanx quantize: what it writes is as good as it should be, and is served by two nodes alike."""
import json
import re

import pytest

from support.instance import run_program
from support.paths import ROOT, demo_model

# Lewis Carroll's Alice, which the built-in calibration was tried on, and Newton's Opticks (1730), which
# it was not.
TEXTS = [ROOT / "tests/data/alice.txt", ROOT / "tests/data/opticks.txt"]
# Perplexity of 4,000 tokens against bf16.
ALLOWED = {"w8a8-dynamic": 1.02, "w8a16": 1.005}


def perplexity(model, text):
    done = run_program("bench", "perplexity", "--model", model, "--text", text, "--tokens", 4000,
                       "--threads", 2, seconds=300)
    assert done.returncode == 0, done.stderr
    return float(re.search(r"perplexity ([0-9.]+) over", done.stdout)[1])


def answer(model, ranks):
    done = run_program("run", "--model_path", model, "--max_output_length", 32, "--max_batch_size", 1,
                       "--input_texts", "Once upon a time there was", "--tp", ranks, seconds=120)
    assert done.returncode == 0, done.stderr
    return done.stdout[done.stdout.index("Answer[0]:"):done.stdout.index("Generate[0]")]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    made = {}
    for name in ALLOWED:
        out = tmp_path_factory.mktemp("quantised") / name
        done = run_program("quantize", demo_model(), out, "--format", name, seconds=120)
        assert done.returncode == 0, done.stderr
        assert "quantising" in done.stderr and "MB" in done.stderr  # progress
        made[name] = out
    return made


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_perplexity_stays_near_that_of_bf16(quantised, text):
    float_perplexity = perplexity(demo_model(), text)
    for name, model in quantised.items():
        ratio = perplexity(model, text) / float_perplexity
        print(f"{text.stem}, {name}: {ratio:.4f} of bf16 ({float_perplexity:.3f})")
        assert ratio <= ALLOWED[name], name


def test_ranks_answer_alike(quantised):
    for name, model in quantised.items():
        alone = answer(model, 1)
        assert len(alone) > 20, name
        assert answer(model, 2) == alone, name


def test_refusals(quantised, tmp_path):
    again = run_program("quantize", quantised["w8a16"], tmp_path / "out", "--format", "w8a16")
    assert again.returncode == 1
    assert "config.json: quantization_config: already quantised" in again.stderr
    taken = run_program("quantize", demo_model(), quantised["w8a16"], "--format", "w8a16")
    assert taken.returncode == 1 and "is not an empty directory" in taken.stderr
    unknown = run_program("quantize", demo_model(), tmp_path / "out", "--format", "w2a2")
    assert unknown.returncode != 0 and "w8a8-dynamic" in unknown.stderr
    narrow = run_program("quantize", demo_model(), tmp_path / "out", "--format", "w4a16-g128")
    assert narrow.returncode == 1
    assert "576 columns, groups of 128" in narrow.stderr
    assert not (tmp_path / "out").exists()


def test_the_layout_is_that_of_compressed_tensors(quantised):
    config = json.loads((quantised["w8a8-dynamic"] / "config.json").read_text())
    described = config["quantization_config"]
    assert described["quant_method"] == "compressed-tensors"
    assert described["format"] == "int-quantized"
    group = described["config_groups"]["group_0"]
    assert group["weights"]["strategy"] == "channel"
    assert group["input_activations"]["dynamic"] is True
    assert "lm_head" in described["ignore"]
