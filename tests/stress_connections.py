"""1,000 open streams on two nodes: all finish, /health stays fast, what is too much is refused at once.

    make connections          (CONNECTIONS=1000 TOKENS=8 ATTEMPTS=3100 to change it)
"""
import asyncio
import json
import os
import pathlib
import re
import resource
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from support.instance import Instance  # noqa: E402
from support.paths import demo_model  # noqa: E402

CONNECTIONS = int(os.environ.get("CONNECTIONS", 1000))
ATTEMPTS = int(os.environ.get("ATTEMPTS", 3100))
TOKENS = int(os.environ.get("TOKENS", 8))
SECONDS = 900


def request(path, body):
    text = json.dumps(body)
    return (f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n{text}").encode()


async def stream(port, index):
    """One streaming request; (status, whether it ended as it should, seconds to the first bytes)."""
    begun = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request("/v1/completions", {
        "model": "demo", "prompt": f"Number {index} is", "max_tokens": TOKENS, "temperature": 0,
        "stream": True, "ignore_eos": True}))
    head = await reader.readuntil(b"\r\n\r\n")
    answered = time.monotonic() - begun
    body = await reader.read()
    writer.close()
    return int(head.split()[1]), body.rstrip().endswith(b"0") and b"[DONE]" in body, answered


async def health(port, stop, seconds):
    while not stop.is_set():
        begun = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.read()
        writer.close()
        seconds.append(time.monotonic() - begun)
        await asyncio.sleep(0.1)


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def resident_kib(pid):
    """(own memory, shared memory): the latter holds the logits that rank 0 hands over, as many rows as
    the largest batch so far had, and never grows beyond maxBatchSize rows."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return tuple(int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("RssAnon", "RssShmem"))


async def load(instance, count):
    stop = asyncio.Event()
    probes = []
    probing = asyncio.create_task(health(instance.management_port, stop, probes))
    answers = await asyncio.wait_for(
        asyncio.gather(*(stream(instance.port, i) for i in range(count)), return_exceptions=True),
        SECONDS)
    stop.set()
    await probing
    return answers, probes


def server_side_health_ms(log):
    return [float(m) for m in re.findall(r'"GET /health" 200 .*?all ([0-9.]+) ms', log)]


def report(title, answers, probes, log, begun, cpu):
    good = [a for a in answers if not isinstance(a, Exception)]
    done = sum(1 for a in good if a[0] == 200 and a[1])
    refused = [a for a in good if a[0] in (429, 503)]
    other = len(answers) - done - len(refused)
    seconds = time.monotonic() - begun
    inside = server_side_health_ms(log)
    print(f"{title}: {done} finished, {len(refused)} refused, {other} otherwise, in {seconds:.1f} s; "
          f"the refused within {max((a[2] for a in refused), default=0):.2f} s")
    print(f"  /health: {len(inside)} answers, p99 {percentile(inside, 0.99):.2f} ms by the server, "
          f"p99 {percentile(probes, 0.99) * 1e3:.1f} ms by the client")
    print(f"  load generator: {cpu / seconds * 100:.1f} % of a core")
    return done, len(refused), other, percentile(inside, 0.99)


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        with Instance(folder, demo_model(), [1, 1]) as instance:
            instance.start()
            pid = instance.nodes[0].pid
            asyncio.run(load(instance, 50))  # what is allocated once
            before = resident_kib(pid)
            print(f"memory of the master: {before[0]} KiB, shared {before[1]} KiB")
            for title, count in ((f"{CONNECTIONS} streams", CONNECTIONS),
                                 (f"{ATTEMPTS} attempts", ATTEMPTS)):
                mark = len(instance.nodes[0].text("err"))
                begun, cpu = time.monotonic(), cpu_seconds()
                answers, probes = asyncio.run(load(instance, count))
                time.sleep(0.5)
                log = instance.nodes[0].text("err")[mark:]
                done, refused, other, p99 = report(title, answers, probes, log, begun,
                                                   cpu_seconds() - cpu)
                time.sleep(3)  # an idle server gives back what is free
                own, shared = resident_kib(pid)
                print(f"  memory of the master: {own} KiB, shared {shared} KiB")
                if other or done != min(count, 3000) or refused != max(0, count - 3000):
                    failed.append(f"{title}: {done} finished, {refused} refused, {other} otherwise")
                if p99 >= 50:
                    failed.append(f"{title}: p99 of /health is {p99:.1f} ms, expected under 50")
            after = resident_kib(pid)
            if after[0] > before[0] * 1.2 + 8192:
                failed.append(f"memory grew from {before[0]} to {after[0]} KiB")
            instance.stop(30)
    print("\n".join(failed) or "connections: all as expected")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
