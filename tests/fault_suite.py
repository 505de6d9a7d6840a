"""Faults of every kind in every state, under load: real processes in network namespaces.

    python tests/fault_suite.py --count 200 --seed 1      (as root; `make faults`)
    python tests/fault_suite.py --only decode:kill_rank   one pair, printed by a failure

Every fault happens while 16 requests run (or, in start-up states, before they come); afterwards every
request must have the text of an undisturbed run. The process moves into a network namespace of its own,
which is the switch between the nodes' namespaces; everything it makes dies with it.
"""
import argparse
import concurrent.futures
import ctypes
import http.client
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from support.instance import SUCCESS, Process, children_of, fetch, run_program  # noqa: E402
from support.paths import clean_environment, demo_model, program  # noqa: E402
from support.prompts import PROMPTS  # noqa: E402

CLONE_NEWNET = 0x40000000
REQUESTS = 16
OUTPUT = 24
DETECTION = {"dead": 0.5, "other": 3.0}
SLACK = 1.0          # of a machine that is busy with other work: log lines and polls come late
RECOVERY_SECONDS = 120

# What must happen: dead (found within 0.5 s), lost (within 3 s), none (nothing is lost at all).
KINDS = {
    "kill_rank": "dead", "kill_node": "dead", "terminate_node": "dead",
    "stop_rank": "lost", "stop_node": "lost", "cut": "lost", "cut_control": "lost",
    "cut_data": "lost", "half_open": "lost",
    "out_of_memory": "dead", "slow_link": "none", "duplicate": "none", "full_disk": "none",
}
STATES = ("idle", "prefill", "decode", "recovering", "draining", "waiting", "joining", "loading",
          "warming")
# Before there is anything to lose, a fault is the death of what starts.
START_KINDS = ("kill_rank", "kill_node", "stop_rank", "duplicate")
NOT_RUN = {
    "delay": "needs tc netem or a relay of packets",
    "wrong_clock": "needs faketime (the join's comparison of clocks has unit tests)",
}


def ip(*arguments):
    subprocess.run(["ip", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


class Network:
    """`count` namespaces on two bridges in this process's own namespace: 10.99.0.1, 10.99.0.2, ... for
    the control plane and clients, 10.98.0.1, ... for the data plane."""

    def __init__(self, count):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET): root is needed")
        ip("link", "set", "lo", "up")
        for bridge in ("sw", "dw"):
            ip("link", "add", bridge, "type", "bridge")
            ip("link", "set", bridge, "up")
        ip("address", "add", "10.99.0.100/24", "dev", "sw")
        self.holders = []
        for i in range(count):
            holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
            self.holders.append(holder)
            own = os.readlink("/proc/self/ns/net")
            while os.readlink(f"/proc/{holder.pid}/ns/net") == own:
                time.sleep(0.01)
            subprocess.run(self.inside(i, "ip", "link", "set", "lo", "up"), check=True)
            for port, bridge, device, address in (("p", "sw", "eth0", self.address(i)),
                                                  ("d", "dw", "eth1", self.data_address(i))):
                ip("link", "add", f"{port}{i}", "type", "veth", "peer", "name", device, "netns",
                   holder.pid)
                ip("link", "set", f"{port}{i}", "master", bridge, "up")
                for command in (("link", "set", device, "up"),
                                ("address", "add", f"{address}/24", "dev", device)):
                    subprocess.run(self.inside(i, "ip", *command), check=True)

    def inside(self, node, *command):
        return ["nsenter", "-t", str(self.holders[node].pid), "-n", *map(str, command)]

    def address(self, node):
        return f"10.99.0.{node + 1}"

    def data_address(self, node):
        return f"10.98.0.{node + 1}"

    def close(self):
        for holder in self.holders:
            holder.kill()
            holder.wait()


class Cluster:
    """An instance over the network's namespaces; a node that ended can be started again."""

    PORTS = {"port": 1025, "management-port": 1026, "metrics-port": 1027, "multi-node-port": 1120}

    def __init__(self, folder, network, devices, model, tls):
        self.folder, self.network, self.devices = pathlib.Path(folder), network, devices
        self.name, self.model = "demo", model
        self.nodes = {}
        self.logs = []           # of processes that ended
        hosts = ",".join(f"{network.address(i)}:{d}" for i, d in enumerate(devices))
        self.make("ranktable", "make", "--hosts", hosts, "-o", self.folder / "ranktable.json")
        table = json.loads((self.folder / "ranktable.json").read_text())
        for i, server in enumerate(table["server_list"]):
            for device in server["device"]:
                device["device_ip"] = network.data_address(i)
        (self.folder / "ranktable.json").write_text(json.dumps(table))
        if tls:
            self.make("certs", "init", "--rank-table", self.folder / "ranktable.json",
                      "--out", self.folder / "certs")
        key = "BackendConfig.ModelDeployConfig.ModelConfig[0].npuMemSize"
        ports = itertools.chain.from_iterable((f"--{k}", v) for k, v in self.PORTS.items())
        self.make("config", "make", "--model", model, "--name", self.name, "--multi-node",
                  "--ip", network.address(0), *ports, "--set", f"{key}=1",
                  "--set", "BackendConfig.ModelDeployConfig.maxSeqLen=4096",
                  "--set", "BackendConfig.ModelDeployConfig.maxInputTokenLen=3072",
                  "--set", f"BackendConfig.interNodeTLSEnabled={str(tls).lower()}",
                  "--set", "ServerConfig.httpsEnabled=false",   # clients speak plain HTTP
                  "-o", self.folder / "config.json")

    @staticmethod
    def make(*arguments):
        done = run_program(*arguments)
        assert done.returncode == 0, done.stderr

    def start_node(self, i):
        environment = clean_environment(
            MIES_CONFIG_JSON_PATH=self.folder / "config.json",
            RANK_TABLE_FILE=self.folder / "ranktable.json",
            MIES_CONTAINER_IP=self.network.address(i), MINDIE_LOG_TO_FILE=1,
            MINDIE_LOG_PATH=self.folder / "log" / str(i), PHALANX_DRAIN_SECONDS=120,
            PHALANX_RECOVERY_SECONDS=RECOVERY_SECONDS)
        return Process(f"node {self.network.address(i)}",
                       self.network.inside(i, program(), "serve", "--on-loss=wait", "--certs",
                                           self.folder / "certs"), environment)

    def start(self):
        for i in range(len(self.devices)):
            self.replace(i)
        self.wait_serving()

    def replace(self, i):
        if i in self.nodes:
            self.logs.append(self.nodes[i])
        self.nodes[i] = self.start_node(i)

    def wait_serving(self, seconds=RECOVERY_SECONDS):
        self.nodes[0].wait_for(SUCCESS, seconds, stream="out")

    def status(self):
        code, body = fetch(f"http://{self.network.address(0)}:1026/v1/status", seconds=10)
        assert code == 200, body
        return json.loads(body)

    def phalanx(self):
        return self.status()["phalanx"]

    def wait_generation(self, number, seconds=RECOVERY_SECONDS):
        deadline = time.monotonic() + seconds
        while True:
            now = self.phalanx()
            if now["generation"] >= number and now["state"] == "serving":
                return now
            assert time.monotonic() < deadline, f"no generation {number}: {now}"
            time.sleep(0.02)

    def rank_pid(self, rank):
        return next(r["pid"] for r in self.phalanx()["ranks"] if r["rank"] == rank)

    def stop(self, seconds=20):
        self.nodes[0].popen.send_signal(signal.SIGTERM)
        statuses = {n.name: n.wait(seconds) for n in self.nodes.values()}
        assert set(statuses.values()) == {0}, f"{statuses}\n{self.text()}"

    def kill(self):
        for node in self.nodes.values():
            if node.popen.poll() is None:
                node.popen.send_signal(signal.SIGCONT)
            node.kill()

    def text(self):
        return "\n".join(f"--- {n.name}\n{n.text()[-6000:]}" for n in
                         [*self.logs[-3:], *self.nodes.values()])

    # --- load --------------------------------------------------------------------------------------

    def ask(self, number, output=OUTPUT):
        """One request, whole or as a stream; (text, monotonic time of every piece)."""
        prompt = PROMPTS[number % len(PROMPTS)]
        stream = number % 2 == 1
        body = {"model": self.name, "prompt": prompt, "max_tokens": output, "stream": stream,
                "ignore_eos": True,
                **({"temperature": 0} if number % 3 else {"temperature": 1.0, "seed": number})}
        connection = http.client.HTTPConnection(self.network.address(0), 1025, timeout=180)
        connection.request("POST", "/v1/completions", json.dumps(body),
                           {"Content-Type": "application/json"})
        response = connection.getresponse()
        times, pieces = [], []
        if not stream:
            answer = response.read()
            times.append(time.monotonic())
            assert response.status == 200, f"request {number}: {response.status} {answer[:500]}"
            return json.loads(answer)["choices"][0]["text"], times
        assert response.status == 200, f"request {number}: {response.status} {response.read(500)}"
        done = False
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                done = True
                break
            chunk = json.loads(line[6:])
            assert "choices" in chunk, f"request {number}: {chunk}"
            times.append(time.monotonic())
            pieces += [c.get("text", "") for c in chunk["choices"]]
        assert done, f"request {number}: the stream ended early"
        return "".join(pieces), times

    def load(self, pool, output=OUTPUT):
        return [pool.submit(self.ask, i, output) for i in range(REQUESTS)]

    def wait_running(self, count, tokens=0, seconds=60):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.status()
            running = status["resource"]["runningRequestNum"]
            done = status["phalanx"]["engine"].get("output_tokens", 0)
            if running >= count and done >= tokens:
                return
            time.sleep(0.01)
        raise AssertionError(f"{count} requests were not running within {seconds} s: {status}")


class Fault:
    """One injection into a cluster that serves. `undo` heals what does not heal by itself."""

    def __init__(self, cluster, kind, choice):
        self.cluster, self.kind, self.choice = cluster, kind, choice
        self.node = 1 + choice.randrange(len(cluster.devices) - 1)
        self.rank = choice.randrange(sum(cluster.devices))
        self.at = None

    def inject(self):
        self.pid = self.cluster.rank_pid(self.rank)
        getattr(self, self.kind)()

    def mark(self):
        self.at = time.monotonic()

    def kill_rank(self):
        self.mark()
        os.kill(self.pid, signal.SIGKILL)

    def stop_rank(self):
        self.mark()
        os.kill(self.pid, signal.SIGSTOP)

    def kill_node(self):
        self.mark()
        self.cluster.nodes[self.node].popen.kill()
        self.cluster.nodes[self.node].wait(10)
        self.cluster.replace(self.node)

    def terminate_node(self):
        self.mark()
        self.cluster.nodes[self.node].popen.terminate()
        assert self.cluster.nodes[self.node].wait(20) == 0, "a node that is told to stop ends with 0"
        self.cluster.replace(self.node)

    def stop_node(self):
        process = self.cluster.nodes[self.node].popen
        self.mark()
        process.send_signal(signal.SIGSTOP)
        self.undo_after(4.5, lambda: process.send_signal(signal.SIGCONT))

    def links(self, ports, state):
        for port in ports:
            ip("link", "set", f"{port}{self.node}", state)

    def cut(self, ports="pd"):
        """Packets vanish; nobody is told."""
        self.mark()
        self.links(ports, "down")
        self.undo_after(4.5, lambda: self.links(ports, "up"))

    def cut_control(self):
        self.cut("p")

    def cut_data(self):
        self.cut("d")

    def half_open(self):
        """What this node sends to other nodes goes nowhere; what they send arrives."""
        rule = ("blackhole", "to", "10.98.0.0/15", "priority", "10")
        self.mark()
        subprocess.run(self.cluster.network.inside(self.node, "ip", "rule", "add", *rule), check=True)
        self.undo_after(4.5, lambda: subprocess.run(
            self.cluster.network.inside(self.node, "ip", "rule", "delete", *rule), check=True))

    def slow_link(self):
        self.mark()
        shape = ("root", "tbf", "rate", "20mbit", "burst", "32k", "latency", "400ms")
        port = f"d{self.node}"
        subprocess.run(["tc", "qdisc", "add", "dev", port, *shape], check=True)
        self.undo_after(2, lambda: subprocess.run(["tc", "qdisc", "delete", "dev", port, "root"],
                                                  check=True))

    def duplicate(self):
        self.mark()
        second = self.cluster.start_node(self.node)
        assert second.wait(60) != 0
        assert "two processes claim the same entry" in second.text("err"), second.text()

    def full_disk(self):
        self.mark()
        hog = self.cluster.folder / "log" / "hog"
        try:
            with open(hog, "wb") as file:
                while file.write(b"x" * 4096) and file.tell() < 1 << 30:
                    file.flush()
        except OSError:
            pass
        self.undo_after(1, hog.unlink)

    def out_of_memory(self):
        """A memory limit far below what the rank has: the kernel kills it at its next page."""
        for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
                            ("/sys/fs/cgroup", "memory.max")):
            group = pathlib.Path(root) / f"phalanx-faults-{os.getpid()}"
            try:
                group.mkdir(exist_ok=True)
                (group / limit).write_text("4194304")
                self.mark()
                (group / "cgroup.procs").write_text(str(self.pid))
            except OSError:
                continue
            time.sleep(0.3)
            self.mark()
            os.kill(self.pid, signal.SIGKILL)  # an idle rank asks for no page
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                try:
                    group.rmdir()
                    return
                except OSError:
                    time.sleep(0.05)
            return
        raise NotRun("no memory cgroup can be made here")

    def undo_after(self, seconds, undo):
        # The fault lasts while the load runs and the cluster notices.
        time.sleep(max(0.0, self.at + seconds - time.monotonic()))
        undo()


class NotRun(Exception):
    pass


class Suite:
    def __init__(self, arguments):
        self.arguments = arguments
        self.results = []
        self.not_run = dict(NOT_RUN)
        self.expected = None
        self.before_shm = set(os.listdir("/dev/shm"))

    def run(self):
        a = self.arguments
        choice = random.Random(a.seed)
        print(f"seed {a.seed}, {a.count} faults over {a.nodes} nodes, "
              f"{'in the clear' if a.clear else 'under TLS'}", flush=True)
        model = demo_model()
        with tempfile.TemporaryDirectory(prefix="phalanx-faults-") as folder:
            self.folder = pathlib.Path(folder)
            logs = self.folder / "log"
            logs.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(logs)], check=True)
            network = Network(a.nodes)
            try:
                self.cluster = Cluster(folder, network, [2] + [1] * (a.nodes - 1), model,
                                       not a.clear)
                with concurrent.futures.ThreadPoolExecutor(REQUESTS + 2) as self.pool:
                    self.cluster.start()
                    self.expected = [f.result()[0] for f in self.cluster.load(self.pool)]
                    for state, kind in self.plan(choice):
                        self.one(state, kind, random.Random(choice.random()))
                    self.end()
            finally:
                if hasattr(self, "cluster"):
                    self.cluster.kill()
                network.close()
                subprocess.run(["umount", "-l", str(logs)], check=False)
        return self.report()

    def plan(self, choice):
        if self.arguments.only:
            return [tuple(self.arguments.only.split(":"))] * self.arguments.count
        running = [(s, k) for s in STATES[:4] for k in KINDS]
        # A drained instance is over: its nodes start anew, so that it costs more time.
        rest = [("draining", k) for k in ("kill_rank", "stop_rank")]
        rest += [(s, k) for s in STATES[5:] for k in START_KINDS]
        # Every state and every kind at least once, then as they come.
        first = [(STATES[i % 4], k) for i, k in enumerate(KINDS)]
        first += [("draining", "kill_rank")]
        first += [(s, START_KINDS[i % len(START_KINDS)]) for i, s in enumerate(STATES[5:])]
        pairs = running + rest
        more = [choice.choice(pairs) for _ in range(max(0, self.arguments.count - len(first)))]
        choice.shuffle(first)
        return (first + more)[:self.arguments.count]

    def one(self, state, kind, choice):
        begin = time.monotonic()
        label = f"{state}:{kind}"
        try:
            if state in STATES[5:]:
                figures = self.start_up(state, kind, choice)
            elif state == "draining":
                figures = self.draining(kind, choice)
            else:
                figures = self.serving(state, kind, choice)
            self.no_zombies()
        except NotRun as reason:
            self.not_run[label] = str(reason)
            return
        except (AssertionError, OSError, http.client.HTTPException, subprocess.SubprocessError,
                concurrent.futures.TimeoutError, KeyError) as error:
            print(f"FAILED {label}: {type(error).__name__}: {error}\n{self.cluster.text()}",
                  flush=True)
            self.results.append((label, None))
            self.restart()
            return
        figures["seconds"] = time.monotonic() - begin
        self.results.append((label, figures))
        print(f"{len(self.results):4} {label:<26} " + " ".join(
            f"{k} {v:.2f} s" for k, v in figures.items()), flush=True)

    def restart(self):
        self.cluster.kill()
        self.cluster.start()

    def check(self, running):
        texts = [f.result(RECOVERY_SECONDS + 60)[0] for f in running]
        different = [i for i, (a, b) in enumerate(zip(texts, self.expected)) if a != b]
        assert not different, (f"requests {different} have other texts: "
                               f"{[(texts[i], self.expected[i]) for i in different[:2]]}")

    def marks(self, begin, since):
        """Seconds from `since` to the first loss and to the last recovery told after it."""
        master = self.cluster.nodes[0]
        lost = recovered = None
        for at, _, line in master.lines[begin:]:
            now = master.begun + at - since
            if " is lost: " in line and lost is None and "generation" in line:
                lost = now
            if "recovered after" in line:
                recovered = now
        return lost, recovered

    def serving(self, state, kind, choice):
        cluster = self.cluster
        before = cluster.wait_generation(0)
        lines = len(cluster.nodes[0].lines)
        running = []
        if state != "idle":
            tokens = before["engine"]["output_tokens"]
            running = cluster.load(self.pool)
            if state == "prefill":
                cluster.wait_running(1)
            else:
                cluster.wait_running(REQUESTS // 2, tokens + REQUESTS)
        fault = Fault(cluster, kind, choice)
        if state == "recovering":
            os.kill(cluster.rank_pid(0), signal.SIGKILL)
            if KINDS[kind] == "none":
                time.sleep(0.1)
            else:
                cluster.wait_generation(before["generation"] + 1)
                lines = len(cluster.nodes[0].lines)
        fault.inject()
        figures = {}
        what = KINDS[kind]
        if what != "none":
            deadline = time.monotonic() + RECOVERY_SECONDS
            while self.marks(lines, fault.at)[1] is None:
                assert time.monotonic() < deadline, "no recovery"
                time.sleep(0.05)
            lost, recovered = self.marks(lines, fault.at)
            figures = {"found": lost, "recovered": recovered}
            limit = DETECTION["dead" if what == "dead" else "other"]
            assert lost <= limit + SLACK, f"found after {lost:.2f} s, at most {limit} s are allowed"
        elif state != "recovering":
            assert cluster.wait_generation(0)["generation"] == before["generation"], \
                "a generation was lost without a fault"
        self.check(running or cluster.load(self.pool))
        return figures

    def draining(self, kind, choice):
        cluster = self.cluster
        running = cluster.load(self.pool)
        cluster.wait_running(REQUESTS)
        fault = Fault(cluster, kind, choice)
        fault.pid = cluster.rank_pid(fault.rank)
        cluster.nodes[0].popen.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        getattr(fault, kind)()
        self.check(running)
        statuses = {n.name: n.wait(RECOVERY_SECONDS) for n in cluster.nodes.values()}
        assert set(statuses.values()) == {0}, statuses
        cluster.start()
        return {}

    def start_up(self, state, kind, choice):
        """The fault hits a node while the instance starts; it must come up all the same."""
        cluster = self.cluster
        cluster.stop(60)
        node = 1 + choice.randrange(len(cluster.devices) - 1)
        order = [i for i in range(len(cluster.devices)) if i != node]
        for i in order if state != "waiting" else [node]:
            cluster.replace(i)
        if state == "waiting":
            cluster.nodes[node].wait_for("waiting for master", 60)
        else:
            cluster.replace(node)
            cluster.nodes[node].wait_for({"joining": "joined master", "loading": "data plane listens",
                                          "warming": " blocks of "}[state], 60)
            time.sleep(choice.random() * 0.2)
        victim = cluster.nodes[node]
        if kind == "duplicate":
            second = cluster.start_node(node)
            if state == "waiting":
                time.sleep(0.5)
                second.kill()
            else:
                assert second.wait(60) != 0, "two processes claim one entry"
        elif kind == "kill_node" or not children_of(victim.pid):
            victim.kill()
            cluster.replace(node)
        else:
            for pid in children_of(victim.pid):
                os.kill(pid, signal.SIGKILL if kind == "kill_rank" else signal.SIGSTOP)
        if state == "waiting":
            for i in order:
                cluster.replace(i)
        cluster.wait_serving()
        self.check(cluster.load(self.pool))
        return {}

    def no_zombies(self):
        for node in self.cluster.nodes.values():
            deadline = time.monotonic() + 5
            while zombies := [pid for pid in children_of(node.pid) if state_of(pid) == "Z"]:
                assert time.monotonic() < deadline, f"{node.name} has zombies {zombies}"
                time.sleep(0.05)

    def end(self):
        self.cluster.stop(60)
        own = str(program())
        left = []
        for entry in pathlib.Path("/proc").iterdir():
            try:
                inside = entry.name.isdigit() and os.readlink(entry / "ns/net") in {
                    os.readlink(f"/proc/{h.pid}/ns/net") for h in self.cluster.network.holders}
                if inside and os.readlink(entry / "exe") == own:
                    left.append(entry.name)
            except OSError:
                continue
        assert not left, f"processes left behind: {left}"
        new = {n for n in set(os.listdir("/dev/shm")) - self.before_shm if "phalanx" in n}
        assert not new, f"left in /dev/shm: {new}"
        for i in range(len(self.cluster.devices)):
            ports = subprocess.run(self.cluster.network.inside(i, "ss", "-Hltn"), check=True,
                                   stdout=subprocess.PIPE, text=True).stdout
            assert not ports.strip(), f"ports still open on node {i}: {ports}"

    def report(self):
        failed = [label for label, figures in self.results if figures is None]
        good = [(label, f) for label, f in self.results if f is not None]
        print(f"\n{len(good)} of {len(self.results)} faults: no request lost, no token different")
        for title, kinds in (("dead", ("dead",)), ("frozen or cut", ("lost",))):
            for key in ("found", "recovered"):
                values = sorted(f[key] for label, f in good if key in f and
                                KINDS[label.split(":")[1]] in kinds)
                if values:
                    print(f"{title:>14} {key:<9}: median {values[len(values) // 2]:.2f} s, "
                          f"longest {values[-1]:.2f} s ({len(values)})")
        for what, why in self.not_run.items():
            print(f"not run: {what}: {why}")
        if failed:
            print(f"FAILED (seed {self.arguments.seed}, {self.arguments.nodes} nodes): {failed}")
        return 1 if failed else 0


def state_of(pid):
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "?"
    return text[text.rindex(")") + 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clear", action="store_true", help="no TLS between the nodes")
    parser.add_argument("--only", help="STATE:KIND")
    arguments = parser.parse_args()
    for tool in ("ip", "tc", "unshare", "nsenter", "mount"):
        if shutil.which(tool) is None or os.geteuid() != 0:
            print(f"not run: network namespaces need root and {tool}")
            return 77
    return Suite(arguments).run()


if __name__ == "__main__":
    sys.exit(main())
