"""Spares and fewer ranks together with everything else that an instance may have: TLS between nodes,
LoRA adapters, a draft model, int8 KV, cached prefixes, experts, unequal weights; and losses upon losses.
Whatever is combined, no accepted request is lost and no token differs."""
import concurrent.futures
import json
import pathlib
import shutil
import signal

import openai
import pytest

from support.instance import SUCCESS, Instance, Process, fetch, run_program
from support.paths import program
from support.prompts import PROMPTS
from test_bad_input import edit
from test_faults import wait_running
from test_lora import write_adapter
from test_recovery import status, wait_generation
from test_spares import by_rank, wait_ranks

DEPLOY = "BackendConfig.ModelDeployConfig"
LONG = "In the middle of the night the old man went down to the harbour and looked at the ships. " * 30
KINDS = [("demo", PROMPTS[1]), ("one", PROMPTS[1]), ("two", PROMPTS[1]), ("demo", LONG), ("one", LONG)]


@pytest.fixture(scope="module")
def small(tmp_path_factory, model):
    """Random values, so that every token depends on all of them; starts in no time."""
    folder = tmp_path_factory.mktemp("models") / "small"
    done = run_program("make-random-model", folder, "--hidden", 192, "--layers", 6, "--heads", 6,
                       "--kv-heads", 3, "--intermediate", 512, "--vocab", 49152,
                       "--tokenizer-from", model)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, small):
    folder = tmp_path_factory.mktemp("adapters")
    return {"one": write_adapter(folder / "one", small, seed=1),
            "two": write_adapter(folder / "two", small, rank=3, seed=2,
                                 targets=("k_proj", "up_proj", "o_proj"))}


def with_adapters(instance, modules):
    edit(instance.config_file, lambda config: config["BackendConfig"]["ModelDeployConfig"].update(
        LoraModules=[{"name": name, "path": str(path), "baseModelName": instance.name}
                     for name, path in modules.items()]))
    return instance


OUTPUT = 256  # enough for a loss in the middle


def ask(instance, model, prompt, count=OUTPUT):
    choice = instance.client().completions.create(
        model=model, prompt=prompt, max_tokens=count, temperature=0.8, seed=11,
        extra_body={"ignore_eos": True}).choices[0]
    assert choice.finish_reason == "length"
    return choice.text


def ask_all(instance, kinds=KINDS, disturb=None, count=OUTPUT):
    with concurrent.futures.ThreadPoolExecutor(len(kinds)) as pool:
        running = [pool.submit(ask, instance, *kind, count) for kind in kinds]
        if disturb:
            wait_running(instance, len(kinds))
            disturb()
        return [future.result(120) for future in running]


def load(instance, name, path):
    return fetch(f"http://127.0.0.1:{instance.management_port}/v1/load_lora_adapter",
                 data=json.dumps({"lora_name": name, "lora_path": str(path)}).encode(), seconds=60)


@pytest.fixture(scope="module")
def texts(tmp_path_factory, small, adapters):
    """Of one rank alone: without nodes, TLS, drafts; int8 KV has texts of its own."""
    found = {}
    for kv in ("bf16", "int8"):
        with with_adapters(Instance(tmp_path_factory.mktemp(f"alone-{kv}"), small, [1],
                                    [f"{DEPLOY}.maxLoras=2"], arguments=["--kv-dtype", kv]),
                           adapters) as instance:
            instance.start()
            found[kv] = ask_all(instance)
            instance.stop()
    assert len(set(found["bf16"])) == 5 and found["bf16"] != found["int8"]
    return found


def start_in(instance, index, folder):
    """A node with `folder` as /proc/self/cwd, so that nodes of one machine can have other files."""
    folder.mkdir(exist_ok=True)
    node = Process(f"node {instance.addresses[index]}", [program(), "serve", *instance.arguments],
                   instance.environment(index), cwd=folder)
    instance.nodes[index] = node
    return node


def test_a_spare_takes_over_with_tls_adapters_and_drafts(tmp_path, small, adapters, texts):
    """Adapters of the configuration and those loaded later; a spare without the latter's files."""
    instance = Instance(tmp_path, small, [1, 1],
                        [f"{DEPLOY}.maxLoras=2", f"{DEPLOY}.maxLoraRank=8",
                         "BackendConfig.interNodeTLSEnabled=true"], spares=1,
                        arguments=["--spare-seconds=0.5", "--certs", str(tmp_path / "certs"),
                                   "--draft-model", str(small), "--draft-tokens=3"])
    for folder in ("here", "bare"):
        (tmp_path / folder).mkdir(mode=0o750)
    shutil.copytree(adapters["two"], tmp_path / "here/two")
    done = run_program("certs", "init", "--rank-table", instance.table_file, "--out",
                       tmp_path / "certs")
    assert done.returncode == 0 and (tmp_path / "certs/127.0.0.3").is_dir(), done.stderr
    with with_adapters(instance, {"one": adapters["one"]}):
        for index in range(3):
            start_in(instance, index, tmp_path / "here")
        instance.wait_serving()
        code, body = load(instance, "two", "/proc/self/cwd/two")
        assert code == 200, body
        assert ask_all(instance) == texts["bf16"]

        def kill():
            instance.nodes.pop(1).kill()
            wait_generation(instance, 2)
        assert ask_all(instance, disturb=kill) == texts["bf16"]
        now = wait_ranks(instance, 2)
        assert [r["node"] for r in by_rank(now)] == ["127.0.0.1", "127.0.0.3"]
        assert ask_all(instance) == texts["bf16"]      # also by cached prefixes
        assert status(instance)["engine"]["accepted_draft_tokens"] > 0

        # The lost node returns as a spare, without the files of the adapter that was loaded later.
        back = start_in(instance, 1, tmp_path / "bare")
        back.wait_for(SUCCESS, 30, stream="out")
        why = "node 127.0.0.3 took over its rank 1 while it was away"
        back.wait_for(why, 5)
        instance.nodes[0].wait_for("node 127.0.0.2 joined as a spare", 5)
        assert why in instance.nodes[0].text("err")
        kinds = [kind for kind in KINDS if kind[0] != "two"]
        expected = [text for kind, text in zip(KINDS, texts["bf16"]) if kind[0] != "two"]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            def kill_spare():
                instance.nodes.pop(2).kill()
                wait_generation(instance, 3)
            lost = pool.submit(ask, instance, "two", PROMPTS[1])
            assert ask_all(instance, kinds, disturb=kill_spare) == expected
            with pytest.raises(openai.APIStatusError) as error:
                lost.result(60)
        for said in (error.value.response.text, instance.nodes[0].text("err")):
            assert "'two' could not be read again: rank 1 (node 127.0.0.2)" in said, said
            assert "/proc/self/cwd/two: no adapter, found nothing" in said, said
        assert "it is unloaded" in instance.nodes[0].text("err")
        assert ask_all(instance, kinds) == expected
        listed = json.loads(fetch(f"{instance.url}/v1/models")[1])["data"]
        assert [m["id"] for m in listed] == ["demo", "one"]
        instance.stop()


def test_fewer_ranks_and_back_with_adapters_drafts_and_int8(tmp_path, small, adapters, texts):
    """Unequal weights; what is left is cut anew, and cut anew again when the lost node is back."""
    instance = Instance(tmp_path, small, [1, 1, 1], [f"{DEPLOY}.maxLoras=2", f"{DEPLOY}.maxLoraRank=8"],
                        weights=[2, 1, 3],
                        arguments=["--on-loss=shrink", "--recovery-seconds=1.5", "--spare-seconds=0.5",
                                   "--draft-model", str(small), "--draft-tokens=3",
                                   "--kv-dtype", "int8"])
    with with_adapters(instance, adapters):
        instance.start()
        # Prefixes are in the cache when the loss comes.
        assert ask_all(instance) == texts["int8"]

        def kill():
            instance.nodes.pop(1).kill()
            wait_generation(instance, 2)
        assert ask_all(instance, disturb=kill) == texts["int8"]
        now = wait_ranks(instance, 2)
        assert [(r["node"], r["weight"]) for r in by_rank(now)] == [("127.0.0.1", 2), ("127.0.0.3", 3)]

        def come_back():
            instance.start_node(1).wait_for(SUCCESS, 30, stream="out")
            wait_generation(instance, 3)
        assert ask_all(instance, disturb=come_back) == texts["int8"]
        now = wait_ranks(instance, 3)
        assert (now["world_size"], now["configured_world_size"]) == (3, 3)
        assert [(r["node"], r["weight"]) for r in by_rank(now)] == \
            [("127.0.0.1", 2), ("127.0.0.2", 1), ("127.0.0.3", 3)]
        log = instance.nodes[0].text("err")
        assert "3 ranks instead of 2 go on" in log and "went on as 2 of 3 ranks" in log
        assert ask_all(instance) == texts["int8"]
        instance.stop()


def test_experts_that_were_whole_on_a_lost_rank(tmp_path, model):
    small = tmp_path / "mixtral"
    done = run_program("make-random-model", small, "--family", "mixtral", "--layers", 3, "--hidden", 96,
                       "--heads", 6, "--kv-heads", 2, "--intermediate", 160, "--experts", 5,
                       "--vocab", 49152, "--tokenizer-from", model)
    assert done.returncode == 0, done.stderr
    kinds = [("demo", text) for text in PROMPTS[:3]]
    experts = "BackendConfig.ModelDeployConfig.ModelConfig[0]"
    instance = Instance(tmp_path, small, [1, 1], [f"{experts}.moe_ep=2", f"{experts}.moe_tp=1"],
                        arguments=["--on-loss=shrink", "--recovery-seconds=1.5", "--spare-seconds=0.5"])
    with instance:
        instance.start()
        expected = ask_all(instance, kinds, count=512)  # of 2 ms

        def kill():
            instance.nodes.pop(1).kill()
            wait_generation(instance, 2)
        assert ask_all(instance, kinds, disturb=kill, count=512) == expected
        assert len(wait_ranks(instance, 1)["ranks"]) == 1

        def come_back():
            instance.start_node(1).wait_for(SUCCESS, 30, stream="out")
            wait_generation(instance, 3)
        assert ask_all(instance, kinds, disturb=come_back, count=512) == expected
        instance.stop()


def test_losses_upon_losses(tmp_path, small, texts):
    """A spare lost while it takes over; a frozen node whose ranks another has by the time it goes on;
    a second loss after a take-over."""
    kinds, expected = [KINDS[0], KINDS[3]], [texts["bf16"][0], texts["bf16"][3]]
    instance = Instance(tmp_path, small, [1, 1], spares=1, arguments=["--spare-seconds=1"])
    with instance:
        instance.start()

        def lose_the_spare_too():
            instance.nodes.pop(1).kill()
            instance.nodes[0].wait_for("spare node 127.0.0.3 takes over rank 1 of 127.0.0.2", 10)
            instance.nodes.pop(2).kill()
            instance.start_node(1)
            wait_generation(instance, 3)
        assert ask_all(instance, kinds, disturb=lose_the_spare_too) == expected
        now = wait_ranks(instance, 2)
        assert [r["node"] for r in by_rank(now)] == ["127.0.0.1", "127.0.0.2"]

        # Frozen for longer than the others wait.
        instance.start_node(2).wait_for(SUCCESS, 30, stream="out")
        before = status(instance)["generation"]

        def freeze():
            instance.nodes[1].popen.send_signal(signal.SIGSTOP)
            wait_generation(instance, before + 1)
            instance.nodes[1].popen.send_signal(signal.SIGCONT)
        assert ask_all(instance, kinds, disturb=freeze) == expected
        instance.nodes[1].wait_for("node 127.0.0.3 took over its rank 1 while it was away", 10)
        instance.nodes[0].wait_for("node 127.0.0.2 joined as a spare", 10)
        assert [n["state"] for n in status(instance)["nodes"]] == ["serving", "spare", "serving"]

        # And the second loss: back to the node that had been frozen, whose weights were kept.
        def kill():
            instance.nodes.pop(2).kill()
            wait_generation(instance, before + 2)
        assert ask_all(instance, kinds, disturb=kill) == expected
        now = wait_ranks(instance, 2)
        assert [(r["node"], r["bytes_read"]) for r in by_rank(now)] == \
            [("127.0.0.1", 0), ("127.0.0.2", 0)]
        instance.stop()


def test_a_take_over_with_decided_weights(tmp_path, small, texts):
    instance = Instance(tmp_path, small, [1, 1], weights=["auto"], spares=1,
                        arguments=["--spare-seconds=0.5"])
    with instance:
        for index, speed in enumerate((24, 8.5, 50)):
            instance.start_node(index, PHALANX_MEMORY_GBPS=speed)
        instance.wait_serving()

        def kill():
            instance.nodes.pop(1).kill()
            wait_generation(instance, 2)
        assert ask_all(instance, KINDS[:1], disturb=kill) == texts["bf16"][:1]
        now = wait_ranks(instance, 2)
        assert [(r["node"], r["weight"]) for r in by_rank(now)] == [("127.0.0.1", 8), ("127.0.0.3", 3)]
        instance.stop()


def has_two_classes():
    flags = set(pathlib.Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split())
    return {"avx2", "avx512_bf16"} <= flags


@pytest.mark.skipif(not has_two_classes(), reason="this machine has one numeric class only")
def test_mixed_numeric_classes(tmp_path, small):
    """Refused, or all in the common class, unless asked for by name on every node."""
    weak, strong = {"PHALANX_CPU_ISA": "avx2"}, {"PHALANX_CPU_ISA": "avx512bf16"}
    with Instance(tmp_path / "common", small, [1, 1], spares=1) as instance:
        instance.start_node(0, **strong)
        instance.start_node(1, **strong)
        instance.wait_serving()
        refused = instance.start_node(2, **weak)
        assert refused.wait(30) == 1
        for part in ("does not offer the numeric class bf16dp", "It offers fma32", "--isa mixed"):
            assert part in refused.text("err"), refused.text("err")
        other = instance.start_node(2, PHALANX_ISA="mixed", **strong)
        assert other.wait(30) == 1
        assert any(line.split() == ["isa", "common", "mixed"]
                   for line in other.text("err").splitlines()), other.text("err")
        del instance.nodes[2]
        instance.stop()
    with Instance(tmp_path / "weakest", small, [1, 1]) as instance:
        instance.start_node(0, **strong)
        instance.start_node(1, **weak)
        instance.wait_serving()
        instance.nodes[0].wait_for("nodes differ in their best numeric class: 127.0.0.1 bf16dp, "
                                   "127.0.0.2 fma32. All compute in fma32", 1)
        common = ask(instance, "demo", PROMPTS[1])
        instance.stop()
    with Instance(tmp_path / "mixed", small, [1, 1], spares=1,
                  arguments=["--isa", "mixed", "--spare-seconds=0.5"]) as instance:
        instance.start_node(0, **strong)
        instance.start_node(1, **weak)
        instance.start_node(2, **weak)
        instance.wait_serving()
        instance.nodes[0].wait_for("numeric classes are mixed, as --isa mixed allows: 127.0.0.1 bf16dp, "
                                   "127.0.0.2 fma32", 1)
        instance.nodes[0].wait_for("kernels: avx512bf16 (numeric class bf16dp, nodes may differ", 1)
        instance.nodes[1].wait_for("kernels: avx2 (numeric class fma32, nodes may differ", 1)
        assert [n["numeric_class"] for n in status(instance)["nodes"]] == ["bf16dp", "fma32", "fma32"]
        mixed = ask(instance, "demo", PROMPTS[1])
        assert mixed == ask(instance, "demo", PROMPTS[1]) != common

        # The spare has the lost node's class, so even here no token differs.
        def kill():
            instance.nodes.pop(1).kill()
            wait_generation(instance, 2)
        assert ask_all(instance, [("demo", PROMPTS[1])], disturb=kill) == [mixed]
        instance.stop()
