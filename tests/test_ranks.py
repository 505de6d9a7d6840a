"""No cut changes a bit: greedy texts over 1 to 5 ranks, raw logits over 1 to 8 ranks and batches."""
import functools
import hashlib
import pathlib

import pytest

from support.instance import Instance, run_program
from support.paths import clean_environment, demo_model
from support.prompts import PROMPTS

# Ranks per node: several per node and several nodes, equal or not.
LAYOUTS = {1: [1], 2: [1, 1], 3: [2, 1], 4: [1, 3], 5: [2, 1, 2]}


def greedy_texts(folder, ranks):
    with Instance(folder / f"ranks{ranks}", demo_model(), LAYOUTS[ranks]) as instance:
        instance.start()
        texts = [instance.complete(prompt, max_tokens=16).text for prompt in PROMPTS]
        assert len(instance.ranks()) == ranks
        instance.stop()
    return texts


@pytest.fixture(scope="module")
def texts_of_one_rank(tmp_path_factory):
    return greedy_texts(tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_sixteen_prompts_get_the_same_tokens(ranks, texts_of_one_rank, tmp_path):
    assert greedy_texts(tmp_path, ranks) == texts_of_one_rank


@functools.cache
def logits_digests(folder, ranks, batch):
    """Name -> SHA-256 of every raw logits file of an offline run."""
    files = pathlib.Path(folder) / f"logits-{ranks}-{batch}"
    environment = clean_environment(ATB_LLM_LOGITS_SAVE_ENABLE="1", ATB_LLM_LOGITS_SAVE_FOLDER=files)
    short = [p for p in PROMPTS if len(p) < 200]
    texts = (short * 3)[:32]
    done = run_program("run", "--model_path", demo_model(), "--tp", ranks, "--max_batch_size", batch,
                       "--max_output_length", 6, "--input_texts", *texts, environment=environment,
                       seconds=180)
    assert done.returncode == 0, done.stderr
    digests = {}
    for file in sorted(files.glob("*.f32")):
        digests[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        file.unlink()
    return digests


@pytest.fixture(scope="module")
def logits_folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("logits"))


@pytest.mark.parametrize("ranks,batch", [(1, 32), (2, 7), (3, 32), (4, 1), (5, 32), (6, 32),
                                         (7, 32), (8, 32)])
def test_raw_logits_are_equal_bit_for_bit(ranks, batch, logits_folder):
    reference = logits_digests(logits_folder, 1, 1)
    assert len(reference) >= 32
    assert logits_digests(logits_folder, ranks, batch) == reference
