"""What can happen to a node, its ranks and its network: one method of Fault per kind."""
import os
import pathlib
import signal
import subprocess
import time

from .fault_network import ip
from .instance import children_of

# What must happen: dead (found within 0.5 s), lost (within 3 s), none (nothing is lost at all).
KINDS = {
    "kill_rank": "dead", "kill_node": "dead", "terminate_node": "dead", "wrong_clock": "dead",
    "out_of_memory": "dead",
    "stop_rank": "lost", "stop_node": "lost", "cut": "lost", "cut_control": "lost",
    "cut_data": "lost", "half_open": "lost",
    "slow_link": "none", "delay": "none", "duplicate": "none", "full_disk": "none",
}
OF_RANKS = ("kill_rank", "stop_rank", "out_of_memory")
OUTAGE_SECONDS = 4.5      # long enough to be noticed
DELAY_SECONDS = 0.003     # of a packet; a token asks for some 120 exchanges
FAKETIME = "/usr/lib/{}-linux-gnu/faketime/libfaketime.so.1"


class NotRun(Exception):
    """This machine lacks what the fault needs."""


def state_of(pid):
    """As in /proc/PID/stat; '?' when there is no such process."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "?"
    return text[text.rindex(")") + 2]


class Fault:
    """One injection into a cluster, at a slave node or any rank. inject() returns when what does not heal
    by itself is healed; `at` is when it hit."""

    def __init__(self, cluster, kind, choice, node=None):
        self.cluster, self.kind, self.choice = cluster, kind, choice
        self.node = node or 1 + choice.randrange(len(cluster.devices) - 1)
        self.any_node = node is None    # ranks of the master's node too
        self.at = None

    def inject(self):
        if self.kind in OF_RANKS:
            self.pid = self.choice.choice(self.ranks())
        getattr(self, self.kind)()

    def ranks(self):
        """Pids of rank processes that live now."""
        deadline = time.monotonic() + 10
        nodes = self.cluster.nodes.values() if self.any_node else [self.cluster.nodes[self.node]]
        while True:
            pids = [pid for node in nodes for pid in children_of(node.pid)
                    if state_of(pid) not in "Z?"]
            if pids:
                return pids
            assert time.monotonic() < deadline, "no rank process lives"
            time.sleep(0.001)

    def mark(self):
        self.at = time.monotonic()

    def signal_rank(self, number):
        self.mark()
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:      # its generation ended just now
            self.inject()

    def kill_rank(self):
        self.signal_rank(signal.SIGKILL)

    def stop_rank(self):
        self.signal_rank(signal.SIGSTOP)

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

    def wrong_clock(self):
        """The node comes back with a clock that is an hour ahead, is refused, and comes back right."""
        library = FAKETIME.format(os.uname().machine)
        if not os.path.exists(library):
            raise NotRun("libfaketime is not installed (Debian: faketime)")
        self.mark()
        self.cluster.nodes[self.node].popen.kill()
        self.cluster.nodes[self.node].wait(10)
        wrong = self.cluster.start_node(self.node, LD_PRELOAD=library, FAKETIME="+3600s",
                                        FAKETIME_DONT_FAKE_MONOTONIC=1)
        status = wrong.wait(60)
        assert status == 1 and "  clock" in wrong.text("err"), wrong.text()
        self.cluster.replace(self.node)

    def stop_node(self):
        process = self.cluster.nodes[self.node].popen
        self.mark()
        process.send_signal(signal.SIGSTOP)
        self.undo_after(OUTAGE_SECONDS, lambda: process.send_signal(signal.SIGCONT))

    def links(self, ports, state):
        for port in ports:
            ip("link", "set", f"{port}{self.node}", state)

    def cut(self, ports="pd"):
        """Packets vanish; nobody is told."""
        self.mark()
        self.links(ports, "down")
        self.undo_after(OUTAGE_SECONDS, lambda: self.links(ports, "up"))

    def cut_control(self):
        self.cut("p")

    def cut_data(self):
        self.cut("d")

    def half_open(self):
        """What this node sends to other nodes goes nowhere; what they send arrives."""
        rule = ("blackhole", "to", "10.98.0.0/15", "priority", "10")
        self.mark()
        subprocess.run(self.cluster.network.inside(self.node, "ip", "rule", "add", *rule), check=True)
        self.undo_after(OUTAGE_SECONDS, lambda: subprocess.run(
            self.cluster.network.inside(self.node, "ip", "rule", "delete", *rule), check=True))

    def slow_link(self):
        self.mark()
        shape = ("root", "tbf", "rate", "20mbit", "burst", "32k", "latency", "400ms")
        port = f"d{self.node}"
        subprocess.run(["tc", "qdisc", "add", "dev", port, *shape], check=True)
        self.undo_after(2, lambda: subprocess.run(["tc", "qdisc", "delete", "dev", port, "root"],
                                                  check=True))

    def delay(self):
        self.mark()
        try:
            relay = self.cluster.network.delay(self.node, DELAY_SECONDS)
        except OSError as error:
            raise NotRun(f"no TUN device can be made: {error}") from None
        self.undo_after(2, lambda: self.cluster.network.undelay(self.node, relay))

    def duplicate(self):
        """A second process claims the node's entry: whoever comes second is refused. If the instance
        stops before that, the first leaves in order and the second finds nobody."""
        self.mark()
        first, second = self.cluster.nodes[self.node], self.cluster.start_node(self.node)
        deadline = time.monotonic() + 60
        while first.popen.poll() is None and second.popen.poll() is None:
            assert time.monotonic() < deadline, "nobody was refused"
            time.sleep(0.05)
        if first.popen.poll() == 0 and "stops the instance" in first.text("err"):
            second.popen.send_signal(signal.SIGTERM)
            assert second.wait(10) == 0
            return
        loser, winner = (second, first) if first.popen.poll() is None else (first, second)
        self.cluster.nodes[self.node] = winner
        assert loser.wait(10) == 1
        assert "two processes claim the same entry" in loser.text("err"), loser.text()

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
            except OSError:
                continue
            self.mark()
            try:
                (group / "cgroup.procs").write_text(str(self.pid))
            except ProcessLookupError:
                return self.inject()
            except OSError:
                continue
            deadline = time.monotonic() + 0.3
            while state_of(self.pid) not in "Z?":
                if time.monotonic() > deadline:
                    self.signal_rank(signal.SIGKILL)   # an idle rank asks for no page
                    break
                time.sleep(0.01)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                try:
                    return group.rmdir()
                except OSError:
                    time.sleep(0.05)
            return None
        raise NotRun("no memory cgroup can be made here")

    def undo_after(self, seconds, undo):
        # The fault lasts while the load runs and the cluster notices.
        time.sleep(max(0.0, self.at + seconds - time.monotonic()))
        undo()
