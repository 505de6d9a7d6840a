"""How long a loss takes, for a model of 1B shape on two nodes: detection, recovery, first token.

    python tests/bench_recovery.py [--model DIR] [--rounds 3] [--running 4]      (`make bench-recovery`)
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from support.instance import Instance  # noqa: E402
from support.paths import program  # noqa: E402


def random_1b():
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    model = cache / "phalanx/random-1b"
    if not (model / "config.json").exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([program(), "make-random-model", model], check=True)
    return model


class Load:
    """Streams of token ids that note when every token came."""

    def __init__(self, instance, running, output):
        self.times = []
        self.lock = threading.Lock()
        self.instance, self.output = instance, output
        self.pool = concurrent.futures.ThreadPoolExecutor(running)
        self.streams = [self.pool.submit(self.stream, i) for i in range(running)]

    def stream(self, number):
        count = 0
        for _ in self.instance.client(600).completions.create(
                model=self.instance.name, prompt=list(range(100 + number, 160 + number)),
                max_tokens=self.output, temperature=0, stream=True,
                extra_body={"ignore_eos": True}):
            count += 1
            with self.lock:
                self.times.append(time.monotonic())
        return count

    def wait_tokens(self, count):
        while len(self.times) < count:
            time.sleep(0.01)

    def first_after(self, moment):
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            with self.lock:
                later = [t for t in self.times if t > moment]
            if later:
                return later[0] - moment
            time.sleep(0.01)
        raise AssertionError("no token within 300 s after the recovery")

    def close(self):
        for stream in self.streams:
            stream.result(600)
        self.pool.shutdown()


def mark(node, begin, text, since, seconds=300):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for at, _, line in node.lines[begin:]:
            if text in line:
                return node.begun + at - since
        time.sleep(0.005)
    raise AssertionError(f"no {text!r} within {seconds} s:\n{node.text()}")


def status(instance):
    return json.loads(instance.get("/v1/status")[1])["phalanx"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--running", type=int, default=4)
    parser.add_argument("--output", type=int, default=48)
    a = parser.parse_args()
    model = a.model or random_1b()
    rows = {}
    with tempfile.TemporaryDirectory() as folder, Instance(folder, model, [1, 1]) as instance:
        begin = time.monotonic()
        instance.start()
        rows["start of the instance"] = {"ready": [time.monotonic() - begin]}
        for what in ("rank process killed", "node killed and started"):
            rows[what] = {}
            for _ in range(a.rounds):
                load = Load(instance, a.running, a.output)
                load.wait_tokens(2 * a.running)
                master = instance.nodes[0]
                seen = len(master.lines)
                pid = next(r["pid"] for r in status(instance)["ranks"] if r["rank"] == 1)
                killed = time.monotonic()
                if what.startswith("rank"):
                    os.kill(pid, signal.SIGKILL)
                else:
                    instance.nodes[1].kill()
                    begun = time.monotonic()
                    node = instance.start_node(1)
                    rows[what].setdefault("its own start", []).append(
                        mark(node, 0, "serving again in generation", begun)
                        if "serving again" in node.text() else
                        mark(node, 0, "Daemon start success!", begun))
                figures = {"found": mark(master, seen, " is lost: ", killed),
                           "recovered": mark(master, seen, "recovered after", killed)}
                figures["first token"] = figures["recovered"] + load.first_after(
                    killed + figures["recovered"])
                load.close()
                for name, value in figures.items():
                    rows[what].setdefault(name, []).append(value)
        ranks = status(instance)["ranks"]
        print(f"model {model}, {a.running} requests running, medians of {a.rounds} in seconds "
              f"(weights of a rank: {ranks[0]['weight_bytes'] / 2**30:.2f} GiB)")
        for what, figures in rows.items():
            print(f"  {what:<26} " + "  ".join(
                f"{name} {statistics.median(values):.2f}" for name, values in figures.items()))
        instance.stop(20)


if __name__ == "__main__":
    main()
