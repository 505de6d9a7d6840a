"""100 losses in a row: what survives them neither grows nor leaks.

    python tests/stress_recovery.py [--cycles 100] [--model DIR]      (`make recoveries`)

Kills one rank process of a two-node instance after another while requests run, and prints memory,
descriptors and threads of both node processes (the ranks themselves are new in every generation).
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from support.fault_kinds import state_of  # noqa: E402
from support.instance import Instance, children_of  # noqa: E402
from support.paths import demo_model  # noqa: E402

WARM_CYCLES = 10          # until every buffer has its size
GROWTH_BYTES = 16 << 20   # of one node process over all later cycles; allocators breathe
RUNNING = 4


def figures(pid):
    status = dict(line.split(":", 1) for line in
                  pathlib.Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {"anonymous": int(status["RssAnon"].split()[0]) << 10,
            "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": int(status["Threads"]), "children": len(children_of(pid))}


def living_ranks(instance):
    """Pids of the rank processes of all nodes."""
    return [pid for node in instance.nodes.values() for pid in children_of(node.pid)
            if state_of(pid) not in "Z?"]


def shared_bytes():
    line = next(l for l in pathlib.Path("/proc/meminfo").read_text().splitlines()
                if l.startswith("Shmem:"))
    return int(line.split()[1]) << 10


def status(instance):
    return json.loads(instance.get("/v1/status")[1])["phalanx"]


def wait_serving(instance, generation, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        now = status(instance)
        if now["generation"] >= generation and now["state"] == "serving":
            return now
        assert time.monotonic() < deadline, now
        time.sleep(0.02)


def wait_token(instance, before, seconds=60):
    """Until this generation has given a token: one that gives none is no return."""
    deadline = time.monotonic() + seconds
    while status(instance)["engine"]["output_tokens"] <= before["engine"]["output_tokens"]:
        assert time.monotonic() < deadline, "no token after a recovery"
        time.sleep(0.02)


def text_of(instance, number):
    return instance.complete(f"Count: {number}", max_tokens=24,
                             extra_body={"ignore_eos": True}).text


def keep_busy(instance, number, expected, done):
    answers = 0
    while not done.is_set():
        text = text_of(instance, number)
        assert text == expected, f"{text!r} instead of {expected!r}"
        answers += 1
    return answers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=pathlib.Path)
    a = parser.parse_args()
    choice = random.Random(a.seed)
    seconds, samples = [], []
    with tempfile.TemporaryDirectory() as folder, \
            Instance(folder, a.model or demo_model(), [1, 1]) as instance, \
            concurrent.futures.ThreadPoolExecutor(RUNNING) as pool:
        instance.start()
        expected = [text_of(instance, i) for i in range(RUNNING)]
        done = threading.Event()
        busy = [pool.submit(keep_busy, instance, i, expected[i], done) for i in range(RUNNING)]
        now = wait_serving(instance, 0)
        try:
            for cycle in range(a.cycles):
                # Not by the status: what slaves told last may be of the generation before.
                victim = choice.choice(living_ranks(instance))
                begun = time.monotonic()
                os.kill(victim, signal.SIGKILL)
                now = wait_serving(instance, now["generation"] + 1)
                seconds.append(time.monotonic() - begun)
                wait_token(instance, now)
                for future in busy:
                    if future.done():
                        future.result()
                time.sleep(0.2)
                samples.append(({n: figures(node.pid) for n, node in instance.nodes.items()},
                                shared_bytes()))
                if cycle % 10 == 9:
                    print(f"{cycle + 1:4} kills: " + "; ".join(
                        f"node {n}: " + ", ".join(f"{v >> 20} MiB anonymous" if k == "anonymous" else
                                                  f"{v} {k}" for k, v in f.items())
                        for n, f in samples[-1][0].items()) +
                        f"; shared memory of the machine {samples[-1][1] >> 20} MiB", flush=True)
        finally:
            done.set()
        answers = sum(future.result(60) for future in busy)
        instance.stop(20)
    seconds.sort()
    print(f"{a.cycles} kills: recovery median {seconds[len(seconds) // 2]:.2f} s, longest "
          f"{seconds[-1]:.2f} s; {answers} answers, none different")
    failed = False
    for n in instance.nodes:
        warm, last = samples[min(WARM_CYCLES, len(samples) - 1)][0][n], samples[-1][0][n]
        growth = last["anonymous"] - warm["anonymous"]
        flat = last["descriptors"] <= warm["descriptors"] and last["threads"] <= warm["threads"] \
            and growth <= GROWTH_BYTES
        failed |= not flat
        print(f"node {n}: {'flat' if flat else 'NOT FLAT'}: from {warm} to {last}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
