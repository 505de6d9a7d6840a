"""Faults of every kind in every state, under load: real processes in network namespaces.

    python tests/fault_suite.py --seed 1              (as root; `make faults`) every state and kind once
    python tests/fault_suite.py --count 24 --seed 1   a seeded few, every state and every kind at least once
    python tests/fault_suite.py --only decode:kill_rank   one pair, printed by a failure

Every fault happens while 16 requests run (or, in start-up states, before they come); afterwards every
request must have the text of an undisturbed run. The process moves into a network namespace of its own,
which is the switch between the nodes' namespaces; everything it makes dies with it.
"""
import argparse
import concurrent.futures
import http.client
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

from support.fault_cluster import RECOVERY_SECONDS, REQUESTS, Cluster  # noqa: E402
from support.fault_kinds import KINDS, OF_RANKS, Fault, NotRun, state_of  # noqa: E402
from support.fault_network import Network  # noqa: E402
from support.instance import children_of  # noqa: E402
from support.paths import demo_model, program  # noqa: E402

DETECTION = {"dead": 0.5, "lost": 3.0}
RUNNING = ("idle", "prefill", "decode", "recovering", "draining")
STARTING = {"waiting": "waiting for master", "joining": "joined master",
            "loading": "data plane listens", "warming": " blocks of "}
STATES = (*RUNNING, *STARTING)


def all_pairs():
    """(state, kind) of everything that can happen. Before its ranks are there none can be lost."""
    return [(s, k) for s in STATES for k in KINDS
            if not (s in ("waiting", "joining") and k in OF_RANKS)]


def plan(count, choice):
    """`count` pairs: first every state and every kind, then every other pair, then any."""
    pairs = all_pairs()
    choice.shuffle(pairs)
    first = []
    for kind in KINDS:
        missing = [s for s in STATES if s not in {state for state, _ in first}]
        own = [p for p in pairs if p[1] == kind]
        # Starting states cost a start each: one of each is enough here.
        first.append(next((p for p in own if p[0] in missing),
                          next(p for p in own if p[0] in RUNNING[:4])))
    cheap = [p for p in pairs if p not in first and p[0] in RUNNING[:4]]
    rest = cheap + [p for p in pairs if p not in first and p not in cheap]
    choice.shuffle(first)
    while count > len(first) + len(rest):
        rest.append(choice.choice(pairs))
    return (first + rest)[:count]


class Suite:
    def __init__(self, arguments):
        self.arguments = arguments
        self.results = []
        self.not_run = {}
        self.expected = None
        self.before_shm = set(os.listdir("/dev/shm"))

    def run(self):
        a = self.arguments
        choice = random.Random(a.seed)
        if a.only:
            pairs = [tuple(pair.split(":")) for pair in a.only.split(",")] * (a.count or 1)
        else:
            pairs = plan(a.count or len(all_pairs()), choice)
        print(f"seed {a.seed}, {len(pairs)} faults over {a.nodes} nodes, "
              f"{'in the clear' if a.clear else 'under TLS'}", flush=True)
        model = demo_model()
        with tempfile.TemporaryDirectory(prefix="phalanx-faults-") as folder:
            logs = pathlib.Path(folder) / "log"
            logs.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(logs)], check=True)
            network = Network(a.nodes)
            try:
                self.cluster = Cluster(folder, network, [2] + [1] * (a.nodes - 1), model,
                                       not a.clear)
                with concurrent.futures.ThreadPoolExecutor(REQUESTS + 2) as self.pool:
                    self.cluster.start()
                    self.expected = self.texts(self.cluster.load(self.pool))
                    self.expected |= self.texts(self.cluster.load(self.pool, long=True))
                    for state, kind in pairs:
                        self.one(state, kind, random.Random(choice.random()))
                    self.end()
            finally:
                if hasattr(self, "cluster"):
                    self.cluster.kill()
                network.close()
                subprocess.run(["umount", "-l", str(logs)], check=False)
        return self.report()

    def one(self, state, kind, choice):
        begin = time.monotonic()
        label = f"{state}:{kind}"
        try:
            if state in STARTING:
                figures = self.start_up(state, kind, choice)
            elif state == "draining":
                figures = self.draining(kind, choice)
            elif state == "recovering":
                figures = self.recovering(kind, choice)
            else:
                figures = self.serving(state, kind, choice)
            self.no_zombies()
        except NotRun as reason:
            self.not_run[kind] = str(reason)
            self.restart()
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

    @staticmethod
    def texts(running):
        return {n: future.result(RECOVERY_SECONDS + 60)[0] for n, future in running.items()}

    def check(self, running):
        texts = self.texts(running)
        different = [n for n, text in texts.items() if text != self.expected[n]]
        assert not different, (f"requests {different} have other texts: "
                               f"{[(texts[i], self.expected[i]) for i in different[:2]]}")

    def marks(self, begin, since):
        """Seconds from `since` to the first loss told after it and to the last recovery."""
        master = self.cluster.nodes[0]
        lost = recovered = None
        for at, _, line in master.lines[begin:]:
            now = master.begun + at - since
            if now < 0:
                continue
            told = " is lost: " in line or " was lost before it served: " in line
            if told and lost is None and "generation" in line:
                lost = now
            if "recovered after" in line:
                recovered = now
        return lost, recovered

    def check_found(self, kind, lost):
        what = KINDS[kind]
        limit = DETECTION[what] + self.arguments.slack
        assert lost <= limit, f"found after {lost:.2f} s, at most {limit} s are allowed"

    def begin_load(self, state, before):
        tokens = before["engine"]["output_tokens"]
        running = self.cluster.load(self.pool, long=state == "prefill")
        if state == "prefill":
            self.cluster.wait_running(1)
        else:
            self.cluster.wait_running(REQUESTS // 2, tokens + REQUESTS)
        return running

    def serving(self, state, kind, choice):
        cluster = self.cluster
        before = cluster.wait_generation(0)
        lines = len(cluster.nodes[0].lines)
        running = self.begin_load(state, before) if state != "idle" else {}
        fault = Fault(cluster, kind, choice)
        fault.inject()
        figures = {}
        if KINDS[kind] != "none":
            deadline = time.monotonic() + RECOVERY_SECONDS
            while self.marks(lines, fault.at)[1] is None:
                assert time.monotonic() < deadline, "no recovery"
                time.sleep(0.05)
            lost, recovered = self.marks(lines, fault.at)
            figures = {"found": lost, "recovered": recovered}
            self.check_found(kind, lost)
        self.check(running or cluster.load(self.pool))
        if KINDS[kind] == "none":
            assert cluster.wait_generation(0)["generation"] == before["generation"], \
                "a generation was lost without a fault"
        return figures

    def recovering(self, kind, choice):
        """A second fault while the loss of rank 0 is recovered. It may hit what is replaced anyway."""
        cluster = self.cluster
        before = cluster.wait_generation(0)
        running = self.begin_load("decode", before)
        lines = len(cluster.nodes[0].lines)
        first = Fault(cluster, "kill_rank", choice)
        first.pid = first.ranks()[0]
        first.kill_rank()
        time.sleep(choice.random() * 0.3)
        fault = Fault(cluster, kind, choice)
        fault.inject()
        figures = {}
        self.check(running)
        cluster.wait_generation(before["generation"] + 1)
        figures["recovered"] = self.marks(lines, first.at)[1]
        return figures

    def draining(self, kind, choice):
        cluster = self.cluster
        running = self.begin_load("decode", cluster.wait_generation(0))
        fault = Fault(cluster, kind, choice)
        cluster.nodes[0].popen.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        fault.inject()
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
        others = [i for i in range(len(cluster.devices)) if i != node]
        fault = Fault(cluster, kind, choice, node)
        if state == "waiting":
            cluster.replace(node)
            cluster.nodes[node].wait_for(STARTING[state], 60)
            late = self.pool.submit(self.start_late, others, 1.0)
            fault.inject()
            late.result()
        else:
            for i in [*others, node]:
                cluster.replace(i)
            cluster.nodes[node].wait_for(STARTING[state], 60)
            time.sleep(choice.random() * 0.2)
            fault.inject()
        cluster.wait_serving()
        self.check(cluster.load(self.pool))
        return {}

    def start_late(self, nodes, seconds):
        time.sleep(seconds)
        for i in nodes:
            self.cluster.replace(i)

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
        print("no process, shared memory or port left behind")

    def report(self):
        failed = [label for label, figures in self.results if figures is None]
        good = [(label, f) for label, f in self.results if f is not None]
        print(f"\n{len(good)} of {len(self.results)} faults: no request lost, no token different")
        for title, what in (("dead", "dead"), ("frozen or cut", "lost")):
            for key in ("found", "recovered"):
                values = sorted(f[key] for label, f in good if f.get(key) is not None and
                                KINDS[label.split(":")[1]] == what)
                if not values:
                    continue
                median = values[len(values) // 2]
                limit = DETECTION[what]
                within = sum(v <= limit for v in values)
                note = f", {within} of {len(values)} within {limit} s" if key == "found" else ""
                print(f"{title:>14} {key:<9}: median {median:.2f} s, longest {values[-1]:.2f} s "
                      f"({len(values)}){note}")
                if key == "found" and median > limit:
                    failed.append(f"the median of {title} above {limit} s")
        for what, why in self.not_run.items():
            print(f"not run: {what}: {why}")
        if failed:
            print(f"FAILED (seed {self.arguments.seed}, {self.arguments.nodes} nodes): {failed}")
        return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=0, help="0: every state and kind once")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clear", action="store_true", help="no TLS between the nodes")
    parser.add_argument("--only", help="STATE:KIND,..., each --count times")
    parser.add_argument("--slack", type=float, default=1.0,
                        help="seconds over the limits of detection (3 s, dead 0.5 s) that one fault may "
                        "take on a machine that is busy with other work; their medians may not")
    arguments = parser.parse_args()
    for tool in ("ip", "tc", "unshare", "nsenter", "mount"):
        if shutil.which(tool) is None or os.geteuid() != 0:
            print(f"not run: network namespaces need root and {tool}")
            return 77
    return Suite(arguments).run()


if __name__ == "__main__":
    sys.exit(main())
