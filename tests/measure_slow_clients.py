"""What a client that reads nothing and one that sends nothing cost everybody else.

    make slow-clients         (SECONDS=60 of each, in turns of 20)

Four clients stream; beside them one more streams and one more sends a long prompt, again and again: in
one turn as fast as they can, in the next the one reads a byte a second and the other sends a byte a
second. The figures are of the four: the time between their pieces, and that of a short request.
"""
import asyncio
import json
import os
import pathlib
import socket
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from support.instance import Instance  # noqa: E402
from support.paths import demo_model  # noqa: E402

SECONDS = int(os.environ.get("SECONDS", 60))
TURN = 20
TOKENS = 400
MOST = 1.10  # times as long as without them


def request(body):
    text = json.dumps({"model": "demo", "temperature": 0, "ignore_eos": True, **body})
    return (f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n"
            f"Connection: close\r\n\r\n{text}").encode()


LONG = request({"prompt": "x " * 2000, "max_tokens": 1})


async def connect(port, small=False):
    peer = socket.socket()
    if small:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.setblocking(False)
    await asyncio.get_running_loop().sock_connect(peer, ("127.0.0.1", port))
    return peer


async def streaming(port, prompt, until, gaps=None):
    """Streams until then; seconds between pieces."""
    while time.monotonic() < until:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request({"prompt": prompt, "max_tokens": TOKENS, "stream": True}))
        last = None
        while time.monotonic() < until and (data := await reader.read(65536)):
            now = time.monotonic()
            if b"data:" in data:
                if last is not None and gaps is not None:
                    gaps.append(now - last)
                last = now
        writer.close()


async def short(port, until, seconds):
    while time.monotonic() < until:
        begun = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request({"prompt": "One, two,", "max_tokens": 1}))
        await reader.read()
        writer.close()
        seconds.append(time.monotonic() - begun)
        await asyncio.sleep(0.25)


async def fast_sender(port, until):
    while time.monotonic() < until:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(LONG[:LONG.index(b"\r\n\r\n")] + b"\r\n\r\n")  # as the slow one: no prompt to compute
        await asyncio.sleep(1)
        writer.close()


async def slow_reader(port, until):
    loop = asyncio.get_running_loop()
    while time.monotonic() < until:
        peer = await connect(port, small=True)
        await loop.sock_sendall(peer, request({"prompt": "Story:", "max_tokens": TOKENS, "stream": True}))
        begun = time.monotonic()
        # The server ends with its tokens long before; begin anew as often as the fast one does.
        while time.monotonic() < min(until, begun + slow_reader.seconds):
            await asyncio.wait_for(loop.sock_recv(peer, 1), 60)
            await asyncio.sleep(1)
        peer.close()


slow_reader.seconds = 5


async def slow_sender(port, until):
    loop = asyncio.get_running_loop()
    while time.monotonic() < until:
        peer = await connect(port)
        try:
            for byte in LONG:
                await loop.sock_sendall(peer, bytes([byte]))
                await asyncio.sleep(1)
                if time.monotonic() > until:
                    break
        except OSError:
            pass  # cut by the server: too slow
        peer.close()


async def turn(port, slow, found):
    until = time.monotonic() + TURN
    others = [slow_reader(port, until), slow_sender(port, until)] if slow else \
        [streaming(port, "Story:", until), fast_sender(port, until)]
    await asyncio.gather(*(streaming(port, f"Number {i} is", until, found["gaps"]) for i in range(4)),
                         short(port, until, found["short"]), *others)


def main():
    found = {slow: {"gaps": [], "short": []} for slow in (False, True)}
    ratios = []
    with tempfile.TemporaryDirectory() as folder, Instance(folder, demo_model(), [1, 1]) as instance:
        instance.start()
        # As long as one stream takes beside four others.
        begun = time.monotonic()
        asyncio.run(turn_of_one(instance.port))
        slow_reader.seconds = time.monotonic() - begun
        for _ in range(max(1, SECONDS // TURN)):
            for slow in (False, True):
                asyncio.run(turn(instance.port, slow, found[slow]))
        instance.stop(30)
    for name in ("gaps", "short"):
        figures = {slow: sorted(found[slow][name]) for slow in (False, True)}
        p50 = {slow: statistics.median(v) * 1e3 for slow, v in figures.items()}
        p95 = {slow: v[int(0.95 * (len(v) - 1))] * 1e3 for slow, v in figures.items()}
        ratios.append(p50[True] / p50[False])
        what = "time between pieces" if name == "gaps" else "short request"
        print(f"{what:20} p50 {p50[False]:7.2f} ms without, {p50[True]:7.2f} ms with a slow reader and a slow "
              f"sender: {(ratios[-1] - 1) * 100:+.1f} %; p95 {p95[False]:.2f} and {p95[True]:.2f} ms; "
              f"{len(figures[False])} and {len(figures[True])} figures")
    bad = [r for r in ratios if r > MOST]
    print("slow clients: as expected" if not bad else f"slow clients: others waited {max(bad):.2f} times as long")
    return 1 if bad else 0


async def turn_of_one(port):
    until = time.monotonic() + 300

    async def once(prompt):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request({"prompt": prompt, "max_tokens": TOKENS, "stream": True}))
        await asyncio.wait_for(reader.read(), until - time.monotonic())
        writer.close()
    await asyncio.gather(*(once(f"Number {i} is") for i in range(5)))


if __name__ == "__main__":
    sys.exit(main())
