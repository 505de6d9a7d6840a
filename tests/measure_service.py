"""What structure costs a decode step, and what prompts that arrive cost those that run.

    make bench-service        (MODEL=folder, default the demo model; RANKS=1,1)
"""
import asyncio
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from support.instance import Instance  # noqa: E402
from support.paths import demo_model  # noqa: E402

SCHEMA = {"type": "array", "minItems": 20, "items": {
    "type": "object", "properties": {"name": {"type": "string", "minLength": 30}, "age": {"type": "integer"}},
    "required": ["name", "age"], "additionalProperties": False}}
STRUCTURES = {"none": {"ignore_eos": True}, "json_schema": {"guided_json": SCHEMA},
              "regex": {"guided_regex": "([a-z]{2,9} ){200}"},
              "grammar": {"guided_grammar": 'start: ("(" WORD ")" | WORD " ")+\nWORD: /[a-z]{3,9}/'}}


def engine(instance):
    status, body = instance.get("/v1/status")
    assert status == 200, body
    return json.loads(body)["phalanx"]["engine"]


def step_ms(instance, extra, tokens=48):
    """Milliseconds of a decode step with what the head does around it, by the server's own clocks."""
    before = engine(instance)
    status, body = instance.post("/v1/completions", {
        "model": "demo", "prompt": "Text: ", "max_tokens": tokens, "min_tokens": tokens, "temperature": 0, **extra},
        seconds=300)
    assert status == 200, body
    time.sleep(0.1)
    after = engine(instance)
    steps = after["steps"] - before["steps"]
    spent = sum(after[k] - before[k] for k in ("step_ns", "overhead_ns"))
    return spent / steps / 1e6


def masks(instance, rounds=11):
    """Each structure beside a free text of the same round, so that a machine that drifts does not count."""
    for extra in STRUCTURES.values():
        step_ms(instance, extra)  # compiled once
    found = {name: [] for name in STRUCTURES}
    for _ in range(rounds):
        for name, extra in STRUCTURES.items():
            found[name].append(step_ms(instance, extra))
    for name, values in found.items():
        middle = statistics.median(values)
        more = statistics.median(v / free - 1 for v, free in zip(values, found["none"]))
        print(f"{name:12} {middle:8.3f} ms per step  {more * 100:+6.1f} %   "
              f"({min(values):.3f} to {max(values):.3f})", flush=True)


async def post(port, body, gaps=None, begun=None):
    """Reads a stream; appends the seconds between its pieces to `gaps`. Sets `begun` at the first."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    text = json.dumps({"model": "demo", "temperature": 0, "stream": True, "ignore_eos": True, **body})
    writer.write((f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n"
                  f"Connection: close\r\n\r\n{text}").encode())
    last = None
    while data := await reader.read(65536):
        now = time.monotonic()
        if b"data:" in data:
            if last is not None and gaps is not None:
                gaps.append(now - last)
            last = now
            if begun is not None:
                begun.set()
    writer.close()


async def running(port, tokens, gaps, count=4, begun=None):
    await asyncio.gather(*(post(port, {"prompt": f"Number {i} is", "max_tokens": tokens}, gaps, begun)
                           for i in range(count)))


def p99(values):
    return sorted(values)[int(0.99 * (len(values) - 1))] * 1e3


async def prompts_arrive(instance, rounds=3, tokens=150):
    word = [int(i) for i in json.loads(instance.post("/tokenize", {"prompt": " word"})[1])["tokens"]][-1]
    found = {"without": [], "with": []}
    number = 0
    for _ in range(rounds):
        await running(instance.port, tokens, found["without"])
        begun = asyncio.Event()
        task = asyncio.create_task(running(instance.port, tokens, found["with"], begun=begun))
        await begun.wait()  # requests that run while prompts arrive
        while not task.done():
            number += 1
            prompt = [word, 1000 + number, *([word] * 1498)]
            await asyncio.wait([asyncio.create_task(post(instance.port, {"prompt": prompt, "max_tokens": 1})), task],
                               return_when=asyncio.FIRST_COMPLETED)
        await task
    for name, gaps in found.items():
        print(f"inter-token time {name:8} prompts: p50 {statistics.median(gaps) * 1e3:7.2f} ms, "
              f"p99 {p99(gaps):7.2f} ms, most {max(gaps) * 1e3:.1f} ms, {len(gaps)} gaps")
    print(f"{number} prompts of 1,500 tokens; p99 is {p99(found['with']) / p99(found['without']):.2f} times that without")


def main():
    model = pathlib.Path(os.environ.get("MODEL") or demo_model())
    ranks = [int(r) for r in os.environ.get("RANKS", "1,1").split(",")]
    with tempfile.TemporaryDirectory() as folder, Instance(folder, model, ranks) as instance:
        instance.start()
        for part in sys.argv[1:] or ["masks", "prompts"]:
            if part == "masks":
                masks(instance)
            else:
                asyncio.run(prompts_arrive(instance))
        instance.stop(30)


if __name__ == "__main__":
    main()
