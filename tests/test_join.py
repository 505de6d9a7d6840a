"""A node that does not fit is refused on both sides, with the same table of what differs."""
import json
import os
import pathlib
import shutil
import struct

import pytest

from support.instance import Instance
from support.paths import program

IDENTITY = b"@(#)phalanx-0001"      # apps/build_identity.h
FAKETIME = pathlib.Path(f"/usr/lib/{os.uname().machine}-linux-gnu/faketime/libfaketime.so.1")


def other_model(folder, model, name, change):
    """A copy of the checkpoint directory, the weights by a link, with one file changed."""
    copy = folder / "other-model"
    copy.mkdir()
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            (copy / file.name).symlink_to(file.resolve())
        elif file.is_file():
            shutil.copy(file, copy / file.name)
    target = copy / name
    data = bytearray(target.read_bytes())
    target.unlink()
    target.write_bytes(change(data))
    return copy


def json_with(**values):
    def change(data):
        content = json.loads(bytes(data))
        content.update(values)
        return json.dumps(content).encode()
    return change


def renamed_tensor_order(data):
    """The header's text in another order: other weights for the digest, the same for the loader."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:8 + size]))
    header.setdefault("__metadata__", {})["note"] = "x"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(data[8 + size:])


def other_config(instance, **model_config):
    """A config.json for the slave alone."""
    content = json.loads(instance.config_file.read_text())
    section = content["BackendConfig"]["ModelDeployConfig"]
    for key, value in model_config.items():
        (section if key in section else section["ModelConfig"][0])[key] = value
    path = instance.config_file.with_name("other-config.json")
    path.write_text(json.dumps(content))
    path.chmod(0o640)
    return path


CASES = {
    "weights": ("weights", lambda i, f, m: {"MIES_CONFIG_JSON_PATH": other_config(
        i, modelWeightPath=str(other_model(f, m, "model.safetensors", renamed_tensor_order)))}),
    "tokenizer": ("tokenizer.json", lambda i, f, m: {"MIES_CONFIG_JSON_PATH": other_config(
        i, modelWeightPath=str(other_model(f, m, "tokenizer.json", lambda d: d + b"\n")))}),
    "model configuration": ("model config.json", lambda i, f, m: {
        "MIES_CONFIG_JSON_PATH": other_config(i, modelWeightPath=str(
            other_model(f, m, "config.json", json_with(rms_norm_eps=1e-6))))}),
    "generation defaults": ("generation_config.json", lambda i, f, m: {
        "MIES_CONFIG_JSON_PATH": other_config(i, modelWeightPath=str(
            other_model(f, m, "generation_config.json", json_with(temperature=0.9))))}),
    "setting": ("maxSeqLen", lambda i, f, m: {
        "MIES_CONFIG_JSON_PATH": other_config(i, maxSeqLen=3584)}),
}


@pytest.fixture(scope="module")
def master(tmp_path_factory, model):
    with Instance(tmp_path_factory.mktemp("join"), model, [1, 1]) as instance:
        instance.start_node(0).wait_for("waiting for 127.0.0.2", 60)
        yield instance


@pytest.mark.parametrize("what", CASES)
def test_mismatch_is_named_on_both_sides(what, master, model, tmp_path):
    row, change = CASES[what]
    seen = len(master.nodes[0].lines)
    slave = master.start_node(1, **change(master, tmp_path, model))
    assert slave.wait(60) == 1
    table = [line for line in slave.text("err").splitlines() if line.strip().startswith(row)]
    assert len(table) == 1, slave.text()
    name, ours, theirs = table[0].strip().rsplit(None, 2)
    assert name == row and ours != theirs
    assert "Fix:" in slave.text("err")
    log = "\n".join(line for _, _, line in master.nodes[0].lines[seen:])
    assert table[0].strip() in log, log
    assert master.nodes[0].popen.poll() is None


def other_build(folder, release=None, **added):
    """A copy of the program that says it is another release, or speaks other versions."""
    data = bytearray(program().read_bytes())
    at = data.index(IDENTITY) + len(IDENTITY)
    assert data.find(IDENTITY, at) < 0
    if release is not None:
        data[at:at + 16] = release.encode().ljust(16, b"\0")
    names = ("wire", "frame", "numerics")
    versions = struct.unpack_from("<3I", data, at + 16)
    struct.pack_into("<3I", data, at + 16,
                     *(v + added.get(n, 0) for n, v in zip(names, versions)))
    copy = folder / "phalanx"
    copy.write_bytes(data)
    copy.chmod(0o755)
    return copy


@pytest.mark.parametrize("what", ["wire", "frame", "numerics"])
def test_a_build_that_speaks_or_computes_otherwise_is_named(what, master, monkeypatch, tmp_path):
    seen = len(master.nodes[0].lines)
    with monkeypatch.context() as patch:
        patch.setenv("PHALANX_BIN", str(other_build(tmp_path, **{what: 1})))
        slave = master.start_node(1)
    assert slave.wait(60) == 1
    table = [line for line in slave.text("err").splitlines()
             if line.strip().startswith(f"{what} version")]
    assert len(table) == 1, slave.text()
    ours, theirs = map(int, table[0].split()[-2:])
    assert theirs == ours + 1 and "Fix: give all nodes the same program" in slave.text("err")
    log = "\n".join(line for _, _, line in master.nodes[0].lines[seen:])
    assert table[0].strip() in log, log


@pytest.mark.skipif(not FAKETIME.exists(), reason="libfaketime is not installed (Debian: faketime)")
def test_another_clock_is_named(master):
    seen = len(master.nodes[0].lines)
    slave = master.start_node(1, LD_PRELOAD=FAKETIME, FAKETIME="+3600s",
                              FAKETIME_DONT_FAKE_MONOTONIC=1)
    assert slave.wait(60) == 1
    table = [line for line in slave.text("err").splitlines() if line.strip().startswith("clock ")]
    assert len(table) == 1 and table[0].endswith(" s apart"), slave.text()
    assert 3590 < int(table[0].split()[-3]) < 3610
    log = "\n".join(line for _, _, line in master.nodes[0].lines[seen:])
    assert table[0].strip() in log, log


def test_another_rank_table_is_named(master, tmp_path):
    table = tmp_path / "ranktable.json"
    shutil.copy(master.table_file, table)
    content = json.loads(table.read_text())
    content["server_list"][1]["device"][0]["weight"] = 2
    table.write_text(json.dumps(content))
    table.chmod(0o640)
    slave = master.start_node(1, RANK_TABLE_FILE=table)
    assert slave.wait(60) == 1
    assert "rank table" in slave.text("err") and "Fix:" in slave.text("err")


def test_the_right_node_is_still_taken_and_another_release_of_the_same_versions(
        master, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setenv("PHALANX_BIN", str(other_build(tmp_path, release="9.8.7-other")))
        master.start_node(1)
    master.wait_serving()
    nodes = json.loads(master.get("/v1/status")[1])["phalanx"]["nodes"]
    assert nodes[1]["build"] == "9.8.7-other" != nodes[0]["build"]
    second = master.start_node(1)
    assert second.wait(60) == 1
    assert "two processes claim the same entry" in second.text("err")
    assert "Paris" in master.complete("The capital of France is", max_tokens=8).text
