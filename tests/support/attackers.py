"""Strangers at a port, in a process of their own that takes at most a tenth of a core:

    attackers.py HOST PORT,PORT... [CERTIFICATE KEY]

Reads "on", "off" and "end" from standard input; says at the end, as JSON, what it did and what it cost.
With a certificate it also speaks as a node that was taken over: broken frames behind a good handshake."""
import collections
import contextlib
import json
import os
import random
import socket
import ssl
import struct
import sys
import threading
import time

SHARE = 0.09                # of a core, so that it stays below a tenth
STRANGERS = 8               # at work at once
OPEN_AT_ONCE = 150
TLS_RECORD_OF_16_MB = b"\x16\x03\x03\xff\xff"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"


def client_hello():
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


HELLO = client_hello()


class Attackers:
    def __init__(self, host, ports, certificate=None, key=None):
        self.host, self.ports = host, ports
        self.counts = collections.Counter()
        self.slow = []               # (socket, bytes left)
        self.held = collections.deque()
        self.random = random.Random(7)
        self.lock = threading.Lock()
        self.on = threading.Event()
        self.begun = self.cpu_mark = 0.0
        self.node = None
        if certificate:
            self.node = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self.node.check_hostname = False
            self.node.verify_mode = ssl.CERT_NONE
            self.node.load_cert_chain(certificate, key)
            self.node.set_alpn_protocols(["h2"])

    def connect(self, port):
        try:
            return socket.create_connection((self.host, port), 1)
        except OSError:
            self.counts[f"refused at {'the control port' if port == self.ports[0] else 'a data port'}"] += 1
            return None

    def hold(self, raw):
        with self.lock:
            self.held.append(raw)
            gone = self.held.popleft() if len(self.held) > OPEN_AT_ONCE else None
        if gone:
            gone.close()

    def one(self):
        kinds = ["random bytes", "truncated hello", "oversized record", "half-open", "slow handshake",
                 "hello without token"]
        kind = self.random.choice(kinds + ["broken frames of a node"] * (self.node is not None))
        raw = self.connect(self.random.choice(self.ports))
        if raw is None:
            return
        self.counts[kind] += 1
        with contextlib.suppress(OSError, ssl.SSLError):
            if kind == "random bytes":
                raw.sendall(self.random.randbytes(self.random.randrange(1, 4096)))
            elif kind == "truncated hello":
                raw.sendall(HELLO[:self.random.randrange(1, len(HELLO))])
                raw.shutdown(socket.SHUT_WR)
            elif kind == "oversized record":
                raw.sendall(TLS_RECORD_OF_16_MB + self.random.randbytes(2048))
            elif kind == "hello without token":
                raw.sendall(struct.pack("<QIIIIQ32s", 0x315854414E4C4850, 1, 1, 0, 2, 1, os.urandom(32)))
            elif kind == "slow handshake":
                raw.sendall(HELLO[:10])
                with self.lock:
                    self.slow.append([raw, HELLO[10:]])
                return
            elif kind == "broken frames of a node":
                raw.settimeout(1)
                with self.node.wrap_socket(raw) as tls:
                    tls.sendall(self.random.choice([
                        PREFACE + b"\xff\xff\xff\0\0\0\0\0\1" + self.random.randbytes(512),  # 16 MiB frame
                        PREFACE + self.random.randbytes(1024),
                        self.random.randbytes(512)]))
                return
        if kind == "half-open" or self.random.random() < 0.5:
            self.hold(raw)
        else:
            raw.close()

    def drip(self):
        """Slow handshakes go on by a byte each."""
        with self.lock:
            slow, self.slow = self.slow, []
        going = []
        for raw, rest in slow:
            try:
                raw.send(rest[:1])
                going.append([raw, rest[1:]])
            except OSError:
                going.append([raw, b""])
        done = [entry for entry in going if not entry[1]] + going[:-OPEN_AT_ONCE]
        for raw, _ in done:
            raw.close()
        with self.lock:
            self.slow += [entry for entry in going if entry not in done]

    def pause(self):
        """Until the share of a core is kept again."""
        ahead = ((time.process_time() - self.cpu_mark) / SHARE - (time.monotonic() - self.begun))
        time.sleep(min(max(ahead, 0.001), 0.5))

    def stranger(self):
        while True:
            self.on.wait()
            self.one()
            self.pause()

    def dripper(self):
        while True:
            self.on.wait()
            self.drip()
            time.sleep(0.2)

    def run(self):
        seconds = cpu = 0.0
        for work in [self.stranger] * STRANGERS + [self.dripper]:
            threading.Thread(target=work, daemon=True).start()
        for word in map(str.strip, sys.stdin):
            if self.on.is_set():
                seconds += time.monotonic() - self.begun
                cpu += time.process_time() - self.cpu_mark
            self.begun, self.cpu_mark = time.monotonic(), time.process_time()
            if word == "on":
                self.on.set()
            else:
                self.on.clear()
            if word == "end":
                break
            print(word, flush=True)
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "did": dict(self.counts)}), flush=True)


if __name__ == "__main__":
    Attackers(sys.argv[1], [int(p) for p in sys.argv[2].split(",")], *sys.argv[3:5]).run()
