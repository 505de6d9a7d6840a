"""TLS between nodes: two commands, nothing readable on the wire, bad certificates refused by name."""
import contextlib
import json
import os
import shutil
import socket
import ssl
import struct
import threading
import time

import pytest

from support.instance import Instance, Process, run_program
from support.paths import program

MARKER = 4242                    # a token id that the prompt repeats
PROMPT = [504] + [MARKER] * 40


class TlsInstance(Instance):
    """Nodes that start with --certs."""

    def __init__(self, folder, model, settings=("BackendConfig.interNodeTLSEnabled=true",)):
        super().__init__(folder, model, [1, 1], settings)
        self.certs = self.folder / "certs"

    def make_certificates(self):
        self._make("certs", "init", "--rank-table", self.table_file, "--out", self.certs)

    def start_node(self, index, **extra):
        node = Process(f"node {self.addresses[index]}",
                       [program(), "serve", "--certs", self.certs],
                       self.environment(index, **extra))
        self.nodes[index] = node
        return node


class Capture:
    """What crosses the loopback device from now on, payloads of TCP one after the other."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        self.socket.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self.socket.bind(("lo", 0))
        self.socket.settimeout(0.2)
        self.streams = {}
        self.done = False
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        while not self.done:
            with contextlib.suppress(TimeoutError):
                frame = self.socket.recv(1 << 17)
                ip = frame[14:]
                if len(ip) < 40 or ip[0] >> 4 != 4 or ip[9] != 6:
                    continue
                header = (ip[0] & 15) * 4
                tcp = ip[header:struct.unpack_from("!H", ip, 2)[0] or len(ip)]
                key = (ip[12:20], tcp[:4])
                self.streams.setdefault(key, bytearray()).extend(tcp[(tcp[12] >> 4) * 4:])

    def stop(self):
        time.sleep(0.3)
        self.done = True
        self.thread.join()
        self.socket.close()
        return self.streams.values()


def between_nodes(capture, ports):
    """The captured bytes, without the client's own connection to the HTTP ports."""
    return [bytes(s) for k, s in capture.streams.items()
            if not set(struct.unpack("!HH", k[1])) & ports]


def captured(instance):
    capture = Capture()
    answer = instance.client().completions.create(model=instance.name, prompt=PROMPT,
                                                  temperature=0, max_tokens=8)
    capture.stop()
    streams = between_nodes(capture, {instance.port, instance.management_port,
                                      instance.metrics_port})
    return answer.choices[0].text, streams


def holds(streams, marker):
    return any(marker in stream for stream in streams)


# Token ids of the step plan, its magic word, and that of the frames that carry tensors.
MARKERS = {"token ids": struct.pack("<I", MARKER) * 20, "step plan": b"PXPL", "tensors": b"PHXD"}


@pytest.mark.skipif(os.geteuid() != 0, reason="capturing packets needs root")
def test_nothing_of_a_request_is_readable_between_nodes(tmp_path, model):
    with Instance(tmp_path / "clear", model, [1, 1]) as clear:
        clear.start()
        text, streams = captured(clear)
        for name, marker in MARKERS.items():
            assert holds(streams, marker), f"{name}: not found in clear, so the test proves nothing"
        clear.stop()
    with TlsInstance(tmp_path / "tls", model) as secret:
        begun = time.monotonic()
        secret.make_certificates()
        secret.start()
        print(f"from nothing to two nodes under TLS: {time.monotonic() - begun:.1f} s")
        encrypted_text, streams = captured(secret)
        assert sum(map(len, streams)) > 10_000, "nothing was captured"
        for name, marker in MARKERS.items():
            assert not holds(streams, marker), f"{name}: readable under TLS"
        assert encrypted_text == text
        strangers(secret)
        assert secret.complete("The capital of France is", max_tokens=4).text
        secret.stop()


def strangers(instance):
    """TLS 1.2, no certificate, a certificate for clients of HTTPS, garbage: the control port closes."""
    for change in ("none", "old", "client"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        if change == "old":
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        if change != "none":
            context.load_cert_chain(instance.certs / "client/client.pem",
                                    instance.certs / "client/client.key.pem")
        with socket.create_connection(("127.0.0.1", instance.node_port), 5) as raw:
            with pytest.raises((ssl.SSLError, ConnectionError, EOFError, AssertionError)):
                with context.wrap_socket(raw) as wrapped:
                    wrapped.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                    assert wrapped.recv(1), "closed"
    with socket.create_connection(("127.0.0.1", instance.node_port), 5) as raw:
        raw.sendall(os.urandom(4096))
    instance.nodes[0].wait_for("control plane refused a peer: certificate of the peer, CN=client", 5)


def test_a_wrong_folder_is_refused_before_anything_starts(tmp_path, model):
    with TlsInstance(tmp_path, model) as instance:
        def refused(*parts):
            done = run_program("serve", "--certs", instance.certs,
                               environment=instance.environment(1))
            assert done.returncode == 1, done.stderr
            for part in parts:
                assert part in done.stderr, f"no {part!r} in:\n{done.stderr}"

        refused("this node has no certificate", "phalanx certs init --rank-table")
        instance.make_certificates()
        own, other = instance.certs / "127.0.0.2", instance.certs / "127.0.0.1"
        kept = tmp_path / "kept"
        own.rename(kept)
        shutil.copytree(other, own)
        refused("certificate is of another node", "127.0.0.2", "phalanx certs init")
        shutil.rmtree(own)
        kept.rename(own)
        done = run_program("certs", "revoke", "--certs", instance.certs, "--node", "127.0.0.2")
        assert done.returncode == 0, done.stderr
        refused("certificate was revoked")
        shown = run_program("certs", "show", instance.certs)
        assert shown.returncode == 1 and "revoked on" in shown.stdout, shown.stdout
        done = run_program("certs", "renew", "--certs", instance.certs, "--node", "127.0.0.2")
        assert done.returncode == 0, done.stderr
        shown = run_program("certs", "show", own)
        assert shown.returncode == 0, shown.stdout
        key = own / "security/grpc/keys/server.key.pem"
        assert key.stat().st_mode & 0o777 == 0o400
        assert "ENCRYPTED" in key.read_text()
        key.chmod(0o644)
        refused("file permissions too wide", str(key))
        for mode in [p.stat().st_mode & 0o77 for p in instance.certs.rglob("*") if p != key]:
            assert mode == 0
        assert json.loads(instance.config_file.read_text())["BackendConfig"]["interNodeTLSEnabled"]
