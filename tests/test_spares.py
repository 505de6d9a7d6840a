"""Who computes what is decided for each generation: by measured bandwidth, with a spare in the place of
a lost node, with fewer ranks. Whatever is decided, no accepted request is lost and no token differs."""
import concurrent.futures
import json
import os
import shutil
import signal
import time

import pytest

from support.instance import SUCCESS, Instance, run_program
from support.prompts import PROMPTS
from test_join import other_config, other_model, renamed_tensor_order
from test_recovery import completion, status, under_load, wait_generation

FOUR = PROMPTS[:4]


@pytest.fixture(scope="module")
def texts(tmp_path_factory, model):
    """Of an undisturbed instance with an equal cut."""
    with Instance(tmp_path_factory.mktemp("undisturbed"), model, [1, 1]) as instance:
        instance.start()
        with concurrent.futures.ThreadPoolExecutor(len(FOUR)) as pool:
            return list(pool.map(lambda p: completion(instance, p), FOUR))


def by_rank(now):
    return sorted(now["ranks"], key=lambda r: r["rank"])


def wait_ranks(instance, count, seconds=10):
    """The status once every rank of the present generation has told of itself."""
    deadline = time.monotonic() + seconds
    while True:
        now = status(instance)
        if len(now["ranks"]) == count:
            return now
        assert time.monotonic() < deadline, now
        time.sleep(0.05)


def test_measured_weights_cut_unevenly_and_stay_after_a_recovery(tmp_path, model, texts):
    with Instance(tmp_path, model, [1, 1], weights=["auto"]) as instance:
        instance.start_node(0, PHALANX_MEMORY_GBPS="24")
        instance.start_node(1, PHALANX_MEMORY_GBPS="8.5")
        instance.wait_serving()
        before = wait_ranks(instance, 2)
        assert [r["weight"] for r in by_rank(before)] == [8, 3]
        assert [r["heads"][1] - r["heads"][0] for r in by_rank(before)] == [7, 2]
        assert [n["bytes_per_second"] for n in before["nodes"]] == [24e9, 8.5e9]
        for node in instance.nodes.values():     # the same cut everywhere, before anything is loaded
            node.wait_for("the model is cut anew", 5)
        instance.nodes[0].wait_for("weights decided from measured memory bandwidth", 1)

        def kill():
            os.kill(by_rank(before)[1]["pid"], signal.SIGKILL)
            after = wait_generation(instance, before["generation"] + 1)
            assert [r["weight"] for r in by_rank(after)] == [8, 3]
        assert under_load(instance, FOUR, kill) == texts
        shown = run_program("status", "--address", "127.0.0.1", "--port",
                            instance.management_port).stdout
        assert "weights by measured memory bandwidth" in shown
        table = run_program("ranktable", "show", instance.table_file, "--model", model).stdout
        assert "decided at the start" in table and "predicted balance" in table
        instance.stop()


def test_weights_are_really_measured(tmp_path, model):
    with Instance(tmp_path, model, [1, 1], weights=["auto"]) as instance:
        instance.start()
        now = wait_ranks(instance, 2)
        assert all(n["bytes_per_second"] > 1e8 for n in now["nodes"])
        assert all(1 <= r["weight"] <= 16 and r["weight"] == int(r["weight"])
                   for r in now["ranks"])
        instance.stop()


def without_weights(folder, model):
    copy = folder / "no-weights"
    copy.mkdir(mode=0o750)
    for file in model.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, copy / file.name)
            (copy / file.name).chmod(0o640)
    return copy


def test_a_spare_takes_over_for_good(tmp_path, model, texts):
    with Instance(tmp_path, model, [1, 1], spares=1, arguments=["--spare-seconds=1"]) as instance:
        instance.start_node(0)
        instance.start_node(1)
        instance.wait_serving()                  # a spare is not waited for

        # Spares that could not take over are refused by name; the others do not notice.
        missing = instance.start_node(2, MIES_CONFIG_JSON_PATH=other_config(
            instance, modelWeightPath=str(without_weights(tmp_path, model))))
        assert missing.wait(30) == 1 and "safetensors" in missing.text("err"), missing.text()
        other = instance.start_node(2, MIES_CONFIG_JSON_PATH=other_config(
            instance, modelWeightPath=str(other_model(tmp_path, model, "model.safetensors",
                                                      renamed_tensor_order))))
        assert other.wait(30) == 1
        assert any(line.strip().startswith("weights ") for line in
                   other.text("err").splitlines()), other.text()
        instance.nodes[0].wait_for("node 127.0.0.3 does not fit the master", 5)
        before = status(instance)
        assert before["state"] == "serving" and before["generation"] == 1

        instance.start_node(2).wait_for(SUCCESS, 30, stream="out")
        now = wait_ranks(instance, 2)
        assert [n["state"] for n in now["nodes"]] == ["serving", "serving", "spare"]
        assert [r["node"] for r in by_rank(now)] == ["127.0.0.1", "127.0.0.2"]

        def kill():
            instance.nodes[1].kill()
            wait_generation(instance, before["generation"] + 1)
        assert under_load(instance, FOUR, kill) == texts
        instance.nodes[0].wait_for("spare node 127.0.0.3 takes over rank 1 of 127.0.0.2", 1)
        now = wait_ranks(instance, 2)
        assert [n["state"] for n in now["nodes"]] == ["serving", "absent", "serving"]
        assert [r["node"] for r in by_rank(now)] == ["127.0.0.1", "127.0.0.3"]

        # The lost node is a spare from now on, and takes over in its turn.
        instance.start_node(1).wait_for(SUCCESS, 30, stream="out")
        assert [n["state"] for n in status(instance)["nodes"]] == ["serving", "spare", "serving"]
        instance.nodes[2].popen.send_signal(signal.SIGTERM)
        assert instance.nodes[2].wait(5) == 0
        wait_generation(instance, before["generation"] + 2)
        assert completion(instance, FOUR[1]) == texts[1]
        del instance.nodes[2]
        instance.stop()


def test_fewer_ranks_go_on_when_nobody_comes(tmp_path, model, texts):
    with Instance(tmp_path, model, [1, 1, 1],
                  arguments=["--on-loss=shrink", "--recovery-seconds=1.5"]) as instance:
        instance.start()

        def kill(index, generation):
            def run():
                instance.nodes.pop(index).kill()
                wait_generation(instance, generation)
            return run
        assert under_load(instance, FOUR, kill(1, 2)) == texts
        now = wait_ranks(instance, 2)
        assert (now["world_size"], now["configured_world_size"]) == (2, 3)
        assert [r["node"] for r in by_rank(now)] == ["127.0.0.1", "127.0.0.3"]
        assert "2 of 3 ranks go on" in instance.nodes[0].text("err")
        # And once more, down to the master alone.
        assert under_load(instance, FOUR, kill(2, 3)) == texts
        assert len(wait_ranks(instance, 1)["ranks"]) == 1
        instance.stop()

