"""phalanx doctor: every pair of nodes measured before a start; what is wrong is named."""

import contextlib
import json
import os
import shutil
import socket
import statistics
import struct
import subprocess
import uuid

import pytest

from support.instance import Process, free_ports, run_program
from support.paths import clean_environment, program

ADDRESSES = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]


def make_table(path, addresses):
    done = run_program("ranktable", "make", "--hosts", ",".join(addresses), "-o", path)
    assert done.returncode == 0, done.stderr
    return path


@contextlib.contextmanager
def listeners(table, addresses, *arguments, options=None, prefixes=None, seconds=200):
    """One listener for each address; `options` and `prefixes` have what only some of them get."""
    started = []
    try:
        for address in addresses:
            command = [*(prefixes or {}).get(address, []), program(), "doctor", "--listen",
                       "--rank-table", (options or {}).get(address, {}).get("table", table),
                       "--address", address, "--seconds", seconds, *arguments,
                       *(options or {}).get(address, {}).get("arguments", [])]
            started.append(Process(f"doctor {address}", command, clean_environment(
                **(options or {}).get(address, {}).get("environment", {}))))
        for process in started:
            process.wait_for("listening on", 20)
        yield started
    finally:
        for process in started:
            process.kill()


def examine(table, address, *arguments, prefix=(), seconds=150, **environment):
    done = subprocess.run([*map(str, prefix), str(program()), "doctor", "--rank-table", str(table),
                           "--address", address, *map(str, arguments)], capture_output=True, text=True,
                          timeout=seconds, env=clean_environment(**environment), check=False)
    return done.returncode, done.stdout, done.stderr


def named(report, what, where):
    """Whether a problem or a warning says so."""
    return [f for f in report["problems"] + report["warnings"]
            if what in f["what"] and where in f["where"]]


def test_three_nodes_measured_and_predicted(tmp_path, model):
    table = make_table(tmp_path / "ranktable.json", ADDRESSES)
    port, control, first = free_ports(3, ADDRESSES)
    ports = ["--port", port, "--control-port", control, "--model", model]
    # One node has its data ports named; the system chooses those of the others.
    data = range(first, first + 3)
    with listeners(table, ADDRESSES[1:], *ports, options={
            ADDRESSES[1]: {"environment": {"PHALANX_DATA_PORTS": f"{data[0]}-{data[-1]}"}}}):
        status, out, errors = examine(table, ADDRESSES[0], *ports, "--json")
    report = json.loads(out)
    assert status == 0 and report["ok"], report["problems"]
    assert "127.0.0.3 measures the way to 127.0.0.2 (6 of 6)" in errors
    assert [n["address"] for n in report["nodes"]] == ADDRESSES
    for node in report["nodes"]:
        assert node["build"] and node["wire_version"] and node["numerics_version"] and node["isa"]
        assert node["memory_bytes"] > 0 and node["cores"] > 0 and node["read_bytes_per_s"] > 1e8
        assert node["files"] == report["nodes"][0]["files"] and node["files"]["config.json"]
    assert {(link["from"], link["to"]) for link in report["links"]} == {
        (a, b) for a in ADDRESSES for b in ADDRESSES if a != b}
    for link in report["links"]:
        assert all(p["state"] == "open" for p in link["ports"])
        assert [p["purpose"] for p in link["ports"]] == ["doctor", "control"] + (
            ["data"] * 3 if link["to"] == ADDRESSES[1] else ["any"])
        if link["to"] == ADDRESSES[1]:
            assert [p["port"] for p in link["ports"]] == [port, control, *data]
        assert 0 < link["rtt_us"] < 1e6 and link["bytes_per_s"] > 1e6
        assert abs(link["clock_ms"]) < 500
        assert link["mtu"] == link["mtu_arrived"] == 65536
        assert link["datagrams"] == 200
    assert report["weakest"]
    assert [s["ranks"] for s in report["prediction"]] == [1, 2, 3]
    assert all(0.1 < s["tokens_per_s"] < 1e5 for s in report["prediction"])


def predicted(table, model, ports):
    """ranks -> tokens per second, as the doctor says."""
    with listeners(table, ADDRESSES[1:], *ports):
        status, out, _ = examine(table, ADDRESSES[0], *ports, "--model", model, "--json")
    report = json.loads(out)
    assert status == 0, report["problems"]
    return {s["ranks"]: s["tokens_per_s"] for s in report["prediction"]}


def measured(model, folder):
    """ranks -> tokens per second of decoding through the whole engine."""
    layouts = {n: "+".join(["1x1"] * n) for n in (1, 2, 3)}
    file = folder / "bench.json"
    done = run_program("bench", "engine", "--model", model, "--batch", 1, "--prompt", 128, "--output", 32,
                       "--layout", ",".join(layouts.values()), "--json", file, seconds=300)
    assert done.returncode == 0, done.stderr
    speeds = {r["layout"]: r["rounds"][0][0]["decode_tok_s"] for r in json.loads(file.read_text())}
    return {n: speeds[name] for n, name in layouts.items()}


def test_the_prediction_is_near_the_measurement(tmp_path, model):
    """On 1, 2 and 3 ranks; where cores are fewer, ranks wait for them in both. Up to three rounds. With
    PHALANX_LONG_TEST=1, on a quiet machine, their median within a quarter; else one of them within half: a
    machine that does other work changes between the two."""
    if os.environ.get("PHALANX_LONG_TEST"):
        near = lambda ratios: abs(statistics.median(ratios) - 1) <= 0.25  # noqa: E731
    else:
        near = lambda ratios: min(abs(ratio - 1) for ratio in ratios) <= 0.5  # noqa: E731
    table = make_table(tmp_path / "ranktable.json", ADDRESSES)
    port, control = free_ports(2, ADDRESSES)
    ports = ["--port", port, "--control-port", control]
    ratios = {n: [] for n in (1, 2, 3)}
    for _ in range(3):
        told, found = predicted(table, model, ports), measured(model, tmp_path)
        for n, values in ratios.items():
            values.append(told[n] / found[n])
        print({n: (round(told[n], 1), round(found[n], 1)) for n in ratios})
        if all(near(v) for v in ratios.values()):
            break
    assert all(near(v) for v in ratios.values()), ratios


def test_what_differs_or_is_missing_is_named(tmp_path, model):
    table = make_table(tmp_path / "ranktable.json", ADDRESSES)
    # The same addresses with another weight on one node.
    other = tmp_path / "other.json"
    changed = json.loads(table.read_text())
    changed["server_list"][1]["device"][0]["weight"] = 2
    other.write_text(json.dumps(changed))
    other.chmod(0o640)
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "config.json").unlink()
    (copy / "config.json").write_text((model / "config.json").read_text() + " ")
    port, control = free_ports(2, ADDRESSES)
    ports = ["--port", port, "--control-port", control]
    with listeners(table, ADDRESSES[1:2], *ports, options={
            ADDRESSES[1]: {"table": other, "arguments": ["--model", copy]}}), \
            socket.create_server((ADDRESSES[0], control)):
        status, out, _ = examine(table, ADDRESSES[0], *ports, "--model", model, "--wait", 1)
    assert status == 1

    def finding(where):
        """The lines of the finding at `where` in the text."""
        at = out.index(f". {where}\n")
        return out[at:].split("\n  ", 1)[0] + "".join(
            line + "\n" for line in out[at:].split("\n")[1:6] if line.startswith("     "))

    assert f"doctor port {port}: closed" in finding("127.0.0.3")
    assert "rule:  another rank table" in finding("127.0.0.2")
    assert "rule:  another file of the model" in finding("127.0.0.2 config.json")
    assert "127.0.0.2 tokenizer.json" not in out
    taken = finding(f"127.0.0.1 port {control} (control)")
    assert "Address already in use" in taken and "mend:  stop the program" in taken
    assert "127.0.0.3          no answer" in out
    assert out.rstrip().splitlines()[-1].startswith("phalanx doctor: ")


def test_handshakes_are_judged_from_both_sides(tmp_path):
    table = make_table(tmp_path / "ranktable.json", ADDRESSES)
    good, foreign = tmp_path / "certs", tmp_path / "foreign"
    for folder in (good, foreign):
        done = run_program("certs", "init", "--rank-table", table, "--out", folder)
        assert done.returncode == 0, done.stderr
    port, control = free_ports(2, ADDRESSES)
    ports = ["--port", port, "--control-port", control]
    with listeners(table, ADDRESSES[1:], *ports, options={
            ADDRESSES[1]: {"arguments": ["--certs", good]},
            ADDRESSES[2]: {"arguments": ["--certs", foreign]}}):
        status, out, _ = examine(table, ADDRESSES[0], *ports, "--certs", good, "--json")
    assert status == 1
    report = json.loads(out)
    assert [n["tls"] for n in report["nodes"]] == ["good"] * 3
    verdicts = {(link["from"], link["to"]): link["tls"] for link in report["links"]}
    assert verdicts[ADDRESSES[0], ADDRESSES[1]] == verdicts[ADDRESSES[1], ADDRESSES[0]] == "good"
    for way, verdict in verdicts.items():
        if ADDRESSES[2] in way:
            assert "was signed by another authority" in verdict, verdict
    assert {f["where"] for f in report["problems"]} == {
        f"{a} -> {b}" for a, b in verdicts if ADDRESSES[2] in (a, b)}
    assert {f["what"] for f in report["problems"]} == {"TLS handshake fails"}


def test_a_listener_answers_the_rank_table_only_and_ends_by_itself(tmp_path):
    table = make_table(tmp_path / "ranktable.json", ADDRESSES[:2])
    port, control = free_ports(2, ADDRESSES)
    with listeners(table, ADDRESSES[:1], "--port", port, "--control-port", control, seconds=6) as [node]:
        def talk(source, frame):
            with socket.create_connection((ADDRESSES[0], port), 5, (source, 0)) as s:
                s.settimeout(10)
                with contextlib.suppress(ConnectionError):
                    s.sendall(frame)
                    return s.recv(65536)
                return b""

        def message(value):
            text = json.dumps(value).encode()
            return struct.pack(">I", len(text)) + text

        assert b"error" not in talk(ADDRESSES[1], message({"op": "clock"}))
        assert talk("127.0.0.9", message({"op": "clock"})) == b""
        node.wait_for("turned away: connections or datagrams from addresses outside", 5)
        assert b"no other node" in talk(ADDRESSES[1], message({"op": "probe", "to": 7, "ports": []}))
        assert b"does not know" in talk(ADDRESSES[1], message({"op": "format"}))
        assert b"does not understand" in talk(ADDRESSES[1], message({"op": 5}))
        assert talk(ADDRESSES[1], struct.pack(">I", 0xFFFFFF) + b"x" * 64) == b""
        assert talk(ADDRESSES[1], struct.pack(">I", 5) + b"[[[[[") == b""
        assert b"ns" in talk(ADDRESSES[1], message({"op": "clock"}))
        assert node.wait(30) == 0


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, timeout=20)


@pytest.fixture(name="networks")
def three_networks():
    """Three network namespaces on one bridge in a fourth: 10.78.0.1 to 10.78.0.3."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("network namespaces and shaping need root, ip and tc")
    mark = uuid.uuid4().hex[:6]
    names = [f"phdr{mark}{i}" for i in range(4)]
    made = []
    try:
        for name in names:
            done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True,
                                  timeout=20, check=False)
            if done.returncode != 0:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        hub = names[3]
        ip("-n", hub, "link", "add", "hub", "type", "bridge")
        ip("-n", hub, "link", "set", "hub", "up")
        for i, name in enumerate(names[:3]):
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{i}",
               "netns", hub)
            ip("-n", hub, "link", "set", f"port{i}", "master", "hub")
            ip("-n", hub, "link", "set", f"port{i}", "up")
            ip("-n", name, "addr", "add", f"10.78.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20, check=False)


def test_a_slow_link_and_a_blocked_port_are_named(tmp_path, networks):
    addresses = [f"10.78.0.{i + 1}" for i in range(3)]
    table = make_table(tmp_path / "ranktable.json", addresses)
    inside = {a: ["ip", "netns", "exec", n] for a, n in zip(addresses, networks)}
    # What the hub sends to the third node is held to 80 Mbit/s.
    subprocess.run([*inside[addresses[0]][:3], networks[3], "tc", "qdisc", "add", "dev", "port2", "root",
                    "tbf", "rate", "80mbit", "burst", "64k", "latency", "100ms"], check=True, timeout=20)
    # The second node drops what comes from the third for the first data port.
    ip("-n", networks[1], "rule", "add", "pref", "1", "lookup", "local")
    ip("-n", networks[1], "rule", "add", "pref", "0", "iif", "eth0", "from", addresses[2], "ipproto",
       "tcp", "dport", "20001", "blackhole")
    ip("-n", networks[1], "rule", "del", "pref", "0", "lookup", "local")
    environment = {"PHALANX_DATA_PORTS": "20000-20002"}
    options = {a: {"environment": environment} for a in addresses}
    with listeners(table, addresses[1:], options=options, prefixes=inside):
        status, out, errors = examine(table, addresses[0], "--json", prefix=inside[addresses[0]],
                                      **environment)
    assert status == 1, out + errors
    report = json.loads(out)
    blocked = named(report, "port blocked", "10.78.0.3 -> 10.78.0.2 port 20001")
    assert blocked and "let 10.78.0.3 reach TCP port 20001 of 10.78.0.2" in blocked[0]["fix"]
    assert len([f for f in report["problems"] if "port" in f["what"]]) == 1, report["problems"]
    slow = {f["where"] for f in report["problems"] if f["what"] == "slow link"}
    assert slow == {"10.78.0.1 -> 10.78.0.3", "10.78.0.2 -> 10.78.0.3"}
    assert "-> 10.78.0.3:" in report["weakest"]
    speeds = {(link["from"], link["to"]): link["bytes_per_s"] for link in report["links"]}
    assert 5e6 < speeds[addresses[0], addresses[2]] < 12e6
    assert all(link["mtu_arrived"] == 1500 for link in report["links"])
