"""LoRA adapters on two nodes: the same text as one rank, mixed batches, loading and unloading, errors."""
import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import struct
import time

import pytest

from support.instance import Instance, fetch, run_program
from test_bad_input import edit

PROMPTS = ["The capital of France is", "Once upon a time", "1, 2, 3, 4,"]


def write_adapter(folder, model, rank=8, seed=1, strength=0.4, targets=("q_proj", "v_proj", "o_proj",
                                                                         "gate_proj", "down_proj")):
    """A LoRA adapter of pseudo-random values in PEFT's layout, made for the model's shapes."""
    config = json.loads((pathlib.Path(model) / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"q_proj": ("self_attn", q, hidden), "k_proj": ("self_attn", kv, hidden),
              "v_proj": ("self_attn", kv, hidden), "o_proj": ("self_attn", hidden, q),
              "gate_proj": ("mlp", inner, hidden), "up_proj": ("mlp", inner, hidden),
              "down_proj": ("mlp", hidden, inner)}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)}))
    header, data = {}, bytearray()
    state = seed

    def add(name, rows, columns, scale):
        nonlocal state
        values = bytearray()
        for _ in range(rows * columns):
            state = (state * 1103515245 + 12345) & 0x7fffffff
            bits = struct.unpack("<I", struct.pack("<f", (state / 0x40000000 - 1) * scale))[0]
            values += struct.pack("<H", bits >> 16)
        header[name] = {"dtype": "BF16", "shape": [rows, columns],
                        "data_offsets": [len(data), len(data) + len(values)]}
        data.extend(values)

    for layer in range(0, config["num_hidden_layers"], 5):   # a few are enough
        for target in targets:
            block, rows, k = shapes[target]
            stem = f"base_model.model.model.layers.{layer}.{block}.{target}"
            add(f"{stem}.lora_A.weight", rank, k, k ** -0.5)
            add(f"{stem}.lora_B.weight", rows, rank, strength)
    layers = list(range(0, config["num_hidden_layers"], 5))
    patched = json.loads((folder / "adapter_config.json").read_text()) | {"layers_to_transform": layers}
    (folder / "adapter_config.json").write_text(json.dumps(patched))
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o750 if path.is_dir() else 0o640)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("adapters")
    return {"one": write_adapter(folder / "one", model, seed=1),
            "two": write_adapter(folder / "two", model, rank=3, seed=2,
                                 targets=("k_proj", "up_proj", "o_proj"))}


def instance_of(folder, model, devices, adapters, max_loras=3):
    instance = Instance(folder, model, devices, settings=[
        f"BackendConfig.ModelDeployConfig.maxLoras={max_loras}",
        "BackendConfig.ModelDeployConfig.maxLoraRank=16"])

    def change(config):
        config["BackendConfig"]["ModelDeployConfig"]["LoraModules"] = [
            {"name": name, "path": str(path), "baseModelName": "demo"}
            for name, path in adapters.items()]
    edit(instance.config_file, change)
    return instance


def text_of(instance, model, prompt, **options):
    answer = instance.client().completions.create(
        model=model, prompt=prompt, **{"max_tokens": 12, "temperature": 0, **options})
    assert answer.model == model
    return answer.choices[0].text


def post(instance, path, body):
    return fetch(f"http://127.0.0.1:{instance.management_port}{path}",
                 data=json.dumps(body).encode(), seconds=60)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, model, adapters):
    """What one rank answers to every prompt, alone: {(model, prompt): text}."""
    with instance_of(tmp_path_factory.mktemp("lora1"), model, [1], adapters) as instance:
        instance.start()
        texts = {(name, prompt): text_of(instance, name, prompt)
                 for name in ("demo", "one", "two") for prompt in PROMPTS}
        instance.stop()
    return texts


def test_base_and_adapters_in_one_batch_as_one_rank_alone(tmp_path, model, adapters, one_rank):
    assert len({one_rank[name, PROMPTS[1]] for name in ("demo", "one", "two")}) == 3
    with instance_of(tmp_path, model, [1, 1], adapters) as instance:
        instance.start()
        # Each alone was asked of one rank; here nine at once, twice, so that prefixes are cached.
        for _ in range(2):
            with concurrent.futures.ThreadPoolExecutor(9) as pool:
                asked = {key: pool.submit(text_of, instance, *key) for key in one_rank}
                assert {key: answer.result() for key, answer in asked.items()} == one_rank

        listed = json.loads(fetch(f"{instance.url}/v1/models")[1])["data"]
        assert [(m["id"], m["parent"]) for m in listed] == \
            [("demo", "null"), ("one", "demo"), ("two", "demo")]
        # TGI names an adapter in its parameters.
        status, body = instance.post("/generate", {"inputs": PROMPTS[0], "parameters": {
            "adapter_id": "one", "max_new_tokens": 12}})
        assert status == 200 and json.loads(body)["generated_text"] == one_rank["one", PROMPTS[0]]

        # A copy under another name, loaded and unloaded while requests run.
        copy = pathlib.Path(shutil.copytree(adapters["two"], tmp_path / "three"))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            running = [pool.submit(text_of, instance, "one", PROMPTS[1], max_tokens=60) for _ in range(2)]
            status, body = post(instance, "/v1/load_lora_adapter",
                                {"lora_name": "three", "lora_path": str(copy), "master_model": "demo"})
            assert (status, body) == (200, "Success: LoRA adapter 'three' added successfully.")
            assert text_of(instance, "three", PROMPTS[2]) == one_rank["two", PROMPTS[2]]
            assert len({answer.result() for answer in running}) == 1
        status, body = post(instance, "/v1/load_lora_adapter",
                            {"lora_name": "four", "lora_path": str(copy)})
        assert status == 400 and "all 3 slots are taken (maxLoras) by one, two, three" in body
        long = instance.client().completions.create(model="three", prompt=PROMPTS[1], max_tokens=40,
                                                    temperature=0, stream=True)
        next(iter(long))
        assert post(instance, "/v1/unload_lora_adapter", {"lora_name": "three"}) == \
            (200, "Success: LoRA adapter 'three' removed successfully.")
        status, body = instance.post("/v1/completions", {"model": "three", "prompt": "a"})
        assert status == 422 and "Not found given model" in body
        assert [chunk.choices[0].finish_reason for chunk in long][-1] == "length"
        check_refusals(instance, tmp_path, adapters)
        instance.stop()


def check_refusals(instance, tmp_path, adapters):
    def load(path, name="bad"):
        return post(instance, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})

    status, body = load("/nowhere")
    assert status == 400 and "/nowhere: no adapter" in json.loads(body)["error"]
    assert load("relative")[0] == 400 and load(tmp_path / ".." / "x")[0] == 400
    dora = pathlib.Path(shutil.copytree(adapters["one"], tmp_path / "dora"))
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(
        config | {"use_dora": True, "r": 5, "modules_to_save": ["lm_head"]}))
    status, body = load(dora)
    assert status == 400 and "DoRA cannot be served" in body and "modules_to_save" in body
    (dora / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    body = load(dora)[1]
    assert "layers.25.mlp.down_proj.lora_B.weight" in body and "(rank 5)" in body
    wide = pathlib.Path(write_adapter(tmp_path / "wide", instance.model, rank=17, targets=("q_proj",)))
    status, body = load(wide)
    assert status == 400 and "at most 16 (maxLoraRank)" in body
    assert post(instance, "/v1/unload_lora_adapter", {"lora_name": "nobody"})[0] == 404


def test_a_lost_rank_comes_back_with_the_adapters(tmp_path, model, adapters, one_rank):
    with instance_of(tmp_path, model, [1, 1], {"one": adapters["one"]}) as instance:
        instance.start()
        status, _ = post(instance, "/v1/load_lora_adapter",
                         {"lora_name": "two", "lora_path": str(adapters["two"])})
        assert status == 200
        expected = text_of(instance, "two", PROMPTS[1], max_tokens=60)
        pids = instance.rank_pids()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(text_of, instance, "two", PROMPTS[1], max_tokens=60)
            time.sleep(0.3)
            os.kill(pids[1], signal.SIGKILL)
            assert running.result() == expected
        assert json.loads(instance.get("/v1/status")[1])["phalanx"]["recovery"]["count"] == 1
        for key, text in one_rank.items():
            assert text_of(instance, *key) == text
        instance.stop(20)


def test_nodes_with_different_files_do_not_come_together(tmp_path, model, adapters):
    """The second node's configuration names a path where another adapter lies."""
    instance = instance_of(tmp_path, model, [1, 1], {"one": adapters["one"]})
    other = tmp_path / "other.json"
    shutil.copy(instance.config_file, other)
    link = tmp_path / "linked"
    link.mkdir(mode=0o750)
    for source, name in ((adapters["one"], "a"), (adapters["two"], "b")):
        shutil.copytree(source, link / name)
    # Equal settings, other files: the path is the same, what lies there is swapped in between.
    edit(instance.config_file, lambda c: c["BackendConfig"]["ModelDeployConfig"].update(
        LoraModules=[{"name": "one", "path": str(link / "a"), "baseModelName": "demo"}]))
    with instance:
        master = instance.start_node(0)
        master.wait_for("who computes which outputs", 60)
        time.sleep(1)
        shutil.rmtree(link / "a")
        (link / "b").rename(link / "a")
        slave = instance.start_node(1)
        assert slave.wait(60) != 0
        assert "LoRA adapter one" in slave.text() + master.text()


def test_offline_runs_take_adapters(model, adapters, one_rank):
    prompts = [{"prompt": PROMPTS[0], "adapter": name} for name in ("base", "one", "two")]
    done = run_program("run", "--model_path", model, "--max_output_length", 12,
                       "--max_batch_size", 3, "--lora_modules",
                       json.dumps({name: str(path) for name, path in adapters.items()}),
                       "--input_dict", json.dumps(prompts), seconds=120)
    assert done.returncode == 0, done.stderr
    for i, name in enumerate(("demo", "one", "two")):
        assert f"Answer[{i}]: {one_rank[name, PROMPTS[0]]}" in done.stdout
    prompts[1]["adapter"] = "nobody"
    done = run_program("run", "--model_path", model, "--lora_modules",
                       json.dumps({"one": str(adapters["one"])}),
                       "--input_dict", json.dumps(prompts), seconds=120)
    assert done.returncode != 0 and 'found "nobody"' in done.stderr + done.stdout
