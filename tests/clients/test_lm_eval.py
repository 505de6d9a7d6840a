"""lm-eval's local-completions (echo with logprobs) against two nodes: one small task made here."""
import json
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval", reason="heavy: make test-clients installs it")

QUESTIONS = [("The capital of France is", [" Paris", " a potato", " seven"]),
             ("One, two, three,", [" four", " Monday", " purple"]),
             ("The sun rises in the", [" east", " fridge", " quickly"]),
             ("Water freezes into", [" ice", " Tuesday", " software"])]
TASK = """task: small
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_local_completions(two_nodes, tmp_path):
    data = tmp_path / "data.json"
    data.write_text("\n".join(json.dumps({"question": q, "choices": c}) for q, c in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "small.yaml").write_text(TASK % data)
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", "small",
         "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--model_args",
         f"model=demo,base_url={two_nodes.url}/v1/completions,tokenizer={two_nodes.model},"
         "tokenizer_backend=huggingface,num_concurrent=2,max_retries=1,max_length=1024"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    result = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())
    assert result["results"]["small"]["acc,none"] == 1, done.stdout[-2000:]
