"""Each mistake gets one message with what, where, found, expected and the fix; nothing hangs."""
import json
import os
import shutil
import socket
import struct

import pytest

from support.instance import SUCCESS, Instance, Process, run_program
from support.paths import program

END_SECONDS = 30


@pytest.fixture
def instance(tmp_path, model):
    with Instance(tmp_path, model, [1]) as made:
        yield made


def edit(path, change):
    """Applies `change` to the JSON of a file and keeps its mode."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1))


def model_entry(config):
    return config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]


def single_node(instance, **keys):
    """A start without the rank table; returns the environment."""
    def change(config):
        config["BackendConfig"]["multiNodesInferEnabled"] = False
        model_entry(config).update(keys)
    edit(instance.config_file, change)
    environment = instance.environment(0)
    del environment["RANK_TABLE_FILE"]
    return environment


def refused(environment, *parts):
    """Starts a node, which must end soon with a small status and say all `parts`, in the last lines
    of stderr, from "phalanx: " on."""
    node = Process("the refused node", [program(), "serve"], environment)
    try:
        status = node.wait(END_SECONDS)
    finally:
        node.kill()
    log = node.text("err")
    assert 0 < status < 64, (status, log)
    assert SUCCESS not in node.text("out")
    assert "phalanx: " in log, log
    reason = log[log.rindex("phalanx: "):]
    for part in parts:
        assert part in reason, f"{part!r} is missing:\n{log}"
    return reason


def copied_model(model, folder):
    """A checkpoint whose big files are links to the original ones, to be spoilt file by file."""
    copy = folder / "weights"
    copy.mkdir(mode=0o750)
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            os.link(file, copy / file.name) if os.stat(file).st_dev == os.stat(copy).st_dev \
                else shutil.copy(file, copy / file.name)
        elif file.is_file():
            shutil.copy(file, copy / file.name)
            (copy / file.name).chmod(0o640)
    return copy


def spoil_tensors(file, change):
    """Rewrites a safetensors file with `change` applied to its header (the data stay)."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.unlink()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length:])
    file.chmod(0o640)


# --- config.json -----------------------------------------------------------------------------------

def test_missing_and_mistyped_keys_are_reported_together(instance):
    def change(config):
        del config["ServerConfig"]["maxLinkNum"]
        config["ServerConfig"]["port"] = "1025"
        config["BackendConfig"]["ScheduleConfig"]["maxBatchSize"] = 0
    edit(instance.config_file, change)
    refused(instance.environment(0), "(3 problems)", "ServerConfig.maxLinkNum\n", "missing key",
            'add "maxLinkNum": 1000', "ServerConfig.port\n", "wrong type", 'string "1025"',
            "[1024, 65535]", "ScheduleConfig.maxBatchSize\n", "value out of range", "mend:")


def test_malformed_json_is_named_with_its_place(instance):
    instance.config_file.write_text('{"ServerConfig": {,}}')
    refused(instance.environment(0), "(1 problem)", str(instance.config_file), "not valid JSON",
            "line 1, column")


def test_absent_file(instance):
    environment = instance.environment(0, MIES_CONFIG_JSON_PATH="/no/such/config.json")
    refused(environment, "(1 problem)", "/no/such/config.json", "MIES_CONFIG_JSON_PATH")


def test_open_mode(instance):
    instance.config_file.chmod(0o644)
    refused(instance.environment(0), str(instance.config_file), "0644", "chmod 640")


def test_unknown_and_effectless_keys_are_accepted_in_one_warning(instance):
    def change(config):
        config["ServerConfig"]["colour"] = "blue"
        config["BackendConfig"]["kvPoolConfig"] = {"backend": ""}
    edit(instance.config_file, change)
    node = instance.start_node(0, HCCL_OP_EXPANSION_MODE="AIV")
    instance.wait_serving()
    lines = [line for line in node.text("err").splitlines() if "accepted without effect" in line]
    assert len(lines) == 1, node.text()
    for part in ("ServerConfig.colour", "BackendConfig.kvPoolConfig", "HCCL_OP_EXPANSION_MODE"):
        assert part in lines[0]
    instance.stop()


# --- rank table ------------------------------------------------------------------------------------

def test_own_address_in_no_entry(instance):
    environment = instance.environment(0, MIES_CONTAINER_IP="127.0.0.77")
    refused(environment, "127.0.0.77", "127.0.0.1", str(instance.table_file))


@pytest.mark.parametrize("name,change,parts", [
    ("gap", lambda t: t["server_list"][0]["device"][0].update(rank_id="1"), ["rank_id", "1"]),
    ("double", lambda t: t["server_list"][0]["device"].append(
        dict(t["server_list"][0]["device"][0], device_id="1")), ["rank_id", "0"]),
    ("count", lambda t: t.update(server_count="3"), ["server_count", "3", "1"]),
    ("no servers", lambda t: t.update(server_list=[]), ["server_list"]),
    ("no rank_id", lambda t: t["server_list"][0]["device"][0].pop("rank_id"), ["rank_id"]),
])
def test_bad_rank_table(instance, name, change, parts):
    edit(instance.table_file, change)
    refused(instance.environment(0), str(instance.table_file), *parts)


def test_multi_node_without_a_table(instance):
    environment = instance.environment(0)
    del environment["RANK_TABLE_FILE"]
    refused(environment, "RANK_TABLE_FILE", "multiNodesInferEnabled")


def test_single_node_with_the_table_of_two_servers(tmp_path, model):
    with Instance(tmp_path, model, [1, 1]) as two:
        environment = single_node(two)
        environment["RANK_TABLE_FILE"] = str(two.table_file)
        refused(environment, "RANK_TABLE_FILE", "single-node", "2 servers", "unset RANK_TABLE_FILE")


def test_more_ranks_than_query_heads(tmp_path, model):
    with Instance(tmp_path, model, [10]) as many:
        refused(many.environment(0), "more ranks than query heads", "10", "9")


def test_tables_that_differ_are_refused_on_both_sides_by_name(tmp_path, model):
    with Instance(tmp_path, model, [1, 1]) as two:
        other = tmp_path / "other.json"
        shutil.copy(two.table_file, other)
        edit(other, lambda t: t["server_list"][0]["device"][0].update(device_ip="127.0.0.9"))
        other.chmod(0o640)
        two.start_node(0)
        slave = two.start_node(1, RANK_TABLE_FILE=other)
        assert slave.wait(END_SECONDS) != 0
        assert "rank table" in slave.text("err")
        two.nodes[0].wait_for("rank table", 10)


# --- model -----------------------------------------------------------------------------------------

def test_unknown_model_type(instance, model, tmp_path):
    copy = copied_model(model, tmp_path)
    edit(copy / "config.json", lambda c: c.update(model_type="gpt17", architectures=["Gpt17"]))
    environment = single_node(instance, modelWeightPath=str(copy))
    refused(environment, "gpt17", "llama")


def test_missing_weight_directory(instance):
    refused(single_node(instance, modelWeightPath="/no/such/weights"), "modelWeightPath",
            "/no/such/weights")


def test_missing_weight_file(instance, model, tmp_path):
    copy = copied_model(model, tmp_path)
    for file in copy.glob("*.safetensors"):
        file.unlink()
    refused(single_node(instance, modelWeightPath=str(copy)), str(copy), "safetensors")


def test_truncated_weight_file(instance, model, tmp_path):
    copy = copied_model(model, tmp_path)
    file = next(copy.glob("*.safetensors"))
    raw = file.read_bytes()
    file.unlink()
    file.write_bytes(raw[:-1000])
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    refused(single_node(instance, modelWeightPath=str(copy)), str(file), "outside the file",
            str(len(raw) - 1000 - header), "fetch it again")


def test_index_that_names_an_absent_tensor(instance, model, tmp_path):
    copy = copied_model(model, tmp_path)
    file = next(copy.glob("*.safetensors"))
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    names = [n for n in json.loads(raw[8:8 + length]) if n != "__metadata__"]
    # A directory with model.safetensors needs no index, so the file takes a part's name.
    file = file.rename(copy / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {n: file.name for n in [*names, "model.absent.weight"]}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors.index.json").chmod(0o640)
    refused(single_node(instance, modelWeightPath=str(copy)), "model.absent.weight", file.name)


def test_tensor_of_another_shape(instance, model, tmp_path):
    copy = copied_model(model, tmp_path)

    def change(header):
        tensor = header["model.layers.0.self_attn.q_proj.weight"]
        rows, columns = tensor["shape"]
        tensor["shape"] = [rows // 2, columns * 2]
    spoil_tensors(next(copy.glob("*.safetensors")), change)
    refused(single_node(instance, modelWeightPath=str(copy)),
            "model.layers.0.self_attn.q_proj.weight", "[288, 1152]", "[576, 576]")


def test_absent_tensor(instance, model, tmp_path):
    copy = copied_model(model, tmp_path)

    def change(header):
        header["model.layers.1.renamed"] = header.pop("model.layers.1.mlp.up_proj.weight")
    spoil_tensors(next(copy.glob("*.safetensors")), change)
    refused(single_node(instance, modelWeightPath=str(copy)), "model.layers.1.mlp.up_proj.weight")


# --- machine ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("plane", ["port", "management_port", "metrics_port"])
def test_port_in_use_is_found_before_anything_loads(instance, plane):
    port = getattr(instance, plane)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        reason = refused(instance.environment(0), str(port), "127.0.0.1")
    assert "in use" in reason


def test_not_enough_memory_is_said_with_figures_before_loading(instance):
    environment = single_node(instance, npuMemSize=2000000)
    refused(environment, "npuMemSize", "GiB")


def test_unknown_option_and_command():
    for arguments in (["serve", "--colour", "blue"], ["dance"]):
        done = run_program(*arguments)
        assert 0 < done.returncode < 256
        assert arguments[-1] in done.stderr or arguments[1] in done.stderr, done.stderr
