"""Strangers at the control and data ports while two nodes start and then serve under load:

    make attack          (ATTACK_SECONDS=300 under attack, and as long without; the program is the ASan build)

No crash, no growth, no request lost, throughput within a tenth of that of the minutes without them."""
import http.client
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from support.instance import children_of, free_ports  # noqa: E402
from support.paths import demo_model  # noqa: E402
from support.peers import Peer  # noqa: E402
from test_certificate_matrix import Secured  # noqa: E402

WORKERS = 4
TOKENS = 16


class Load:
    """Clients that ask again and again; counts answers and tokens."""

    def __init__(self, instance, context):
        self.instance, self.context = instance, context
        self.lock = threading.Lock()
        self.asked = self.answered = self.tokens = 0
        self.failures = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.work, args=(i,)) for i in range(WORKERS)]
        for thread in self.threads:
            thread.start()

    def work(self, number):
        body = json.dumps({"model": self.instance.name, "prompt": f"Number {number} is", "stream": True,
                           "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True})
        connection = http.client.HTTPSConnection("127.0.0.1", self.instance.port, timeout=120,
                                                 context=self.context)
        while not self.stop.is_set():
            with self.lock:
                self.asked += 1
            try:
                connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                assert answer.status == 200, answer.read()
                line = b""
                for line in iter(answer.readline, b""):
                    if line.startswith(b"data: {"):
                        with self.lock:
                            self.tokens += 1  # smoother than answers, which come in step
                    elif line.startswith(b"data: [DONE]"):
                        break
                assert line.startswith(b"data: [DONE]"), line
                answer.read()
                with self.lock:
                    self.answered += 1
            except Exception as error:  # noqa: BLE001: whatever it is, a request was lost
                with self.lock:
                    self.failures.append(repr(error))
                return
        connection.close()

    def end(self):
        self.stop.set()
        for thread in self.threads:
            thread.join(150)


def processes(instance):
    pids = [node.pid for node in instance.nodes.values()]
    return pids + [child for pid in pids for child in children_of(pid)]


def resident_mib(pids):
    return [int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) / 1024
            for pid in pids]


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def attack(folder, model, seconds, window):
    """Alternates windows of `window` seconds with and without attackers, until the former add up to
    `seconds`. A dictionary of what was seen."""
    with Secured(pathlib.Path(folder) / "attacked", model) as instance:
        data_ports = free_ports(2, instance.addresses)
        ports = ",".join(map(str, [instance.node_port, *data_ports]))
        taken = Peer.make(folder, instance.authority, "a node that was taken over",
                          [instance.addresses[1]])
        client = Peer.make(folder, instance.authority, "client", [])
        # A host name of loopback addresses: the ports of both nodes are on 127.0.0.1 and .2; rank 0
        # is the one that others connect to.
        attackers = subprocess.Popen(
            [sys.executable, pathlib.Path(__file__).parent / "support/attackers.py",
             instance.addresses[0], ports, taken.certificate_file, taken.key_file],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        def say(word):
            attackers.stdin.write(word + "\n")
            attackers.stdin.flush()
            if word != "end":
                assert attackers.stdout.readline().strip() == word

        try:
            say("on")  # while the nodes join and the group forms, too
            begun = time.monotonic()
            for index in range(2):
                instance.start_node(index, PHALANX_DATA_PORTS=f"{data_ports[0]}-{data_ports[1]}",
                                    ASAN_OPTIONS="quarantine_size_mb=4:"
                                    "malloc_context_size=5:detect_leaks=0")
            instance.wait_serving(240)
            started = time.monotonic() - begun
            load = Load(instance, client.context())
            time.sleep(window)  # what is allocated once, attackers' part included
            pids = processes(instance)
            before, open_before = resident_mib(pids), descriptors(pids[0])
            counts = {"on": [], "off": []}
            attacked = 0.0
            while attacked < seconds or len(counts["off"]) < 2:
                for word in ("off", "on") if len(counts["on"]) % 2 else ("on", "off"):
                    say(word)
                    mark, at = load.tokens, time.monotonic()
                    time.sleep(window)
                    passed = time.monotonic() - at
                    counts[word].append((load.tokens - mark) / passed)
                    attacked += passed if word == "on" else 0
            after = resident_mib(pids)
            say("off")
            load.end()
            say("end")
            report = json.loads(attackers.stdout.readline())
            deadline = time.monotonic() + 10  # handshakes that hang have 5 s
            while descriptors(pids[0]) > 50 and time.monotonic() < deadline:
                time.sleep(0.2)
            open_after = descriptors(pids[0])
            instance.nodes[0].popen.send_signal(signal.SIGTERM)
            statuses = [node.wait(60) for node in instance.nodes.values()]
            log = "".join(node.text("err") for node in instance.nodes.values())
        finally:
            attackers.kill()
            attackers.wait()
    # Of medians, since a busy machine has windows that mean nothing; both ways alternate (ABBA).
    ratio = statistics.median(counts["on"]) / max(statistics.median(counts["off"]), 1e-9)
    return {"started": started, "asked": load.asked, "answered": load.answered,
            "failures": load.failures, "ratio": ratio, "rates": counts, "before_mib": before,
            "after_mib": after, "descriptors": (open_before, open_after), "statuses": statuses,
            "attackers": report, "share": report["cpu_seconds"] / report["seconds"],
            "log_lines": log.count("\n"), "sanitizer": "Sanitizer" in log, "log": log}


def told(seen):
    did = ", ".join(f"{count} {name}" for name, count in sorted(seen["attackers"]["did"].items()))
    rates = {word: statistics.median(rates) for word, rates in seen["rates"].items()}
    return (f"attackers: {seen['attackers']['seconds']:.0f} s, {seen['share'] * 100:.1f} % of a core; {did}\n"
            f"start under attack: {seen['started']:.1f} s\n"
            f"requests: {seen['asked']} asked, {seen['answered']} answered, {len(seen['failures'])} lost\n"
            f"throughput: {rates['off']:.1f} tokens/s alone, {rates['on']:.1f} attacked, "
            f"ratio {seen['ratio']:.3f} (medians of {len(seen['rates']['on'])} windows each)\n"
            f"memory, MiB: {[round(m) for m in seen['before_mib']]} before, "
            f"{[round(m) for m in seen['after_mib']]} after; descriptors of the master {seen['descriptors']}; "
            f"{seen['log_lines']} lines of log")


def problems(seen, least_ratio):
    found = []
    if seen["failures"] or seen["asked"] != seen["answered"]:
        found.append(f"requests were lost: {seen['failures']}")
    if seen["sanitizer"] or set(seen["statuses"]) != {0}:
        found.append(f"a node ended with {seen['statuses']}:\n{seen['log'][-8000:]}")
    for before, after in zip(seen["before_mib"], seen["after_mib"]):
        if after > before * 1.05 + 24:
            found.append(f"a process grew from {before:.0f} to {after:.0f} MiB")
    if seen["descriptors"][1] > 100:  # about 40 when idle
        found.append(f"descriptors leaked: {seen['descriptors']}")
    if seen["share"] > 0.1:
        found.append(f"the attackers took {seen['share']:.3f} of a core, so the figures mean little")
    if seen["ratio"] < least_ratio:
        found.append(f"throughput fell to {seen['ratio']:.3f}, expected {least_ratio} at least")
    return found


def main():
    seconds = float(os.environ.get("ATTACK_SECONDS", 300))
    with tempfile.TemporaryDirectory() as folder:
        seen = attack(folder, demo_model(), seconds, 10)
    print(told(seen))
    found = problems(seen, 0.9)
    print("\n".join(found) or "attack: all as expected")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
