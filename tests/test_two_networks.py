"""Two nodes in network namespaces of their own: what crosses the cable, and who may reach a data port
while a group forms."""
import contextlib
import http.client
import json
import os
import pathlib
import socket
import ssl
import struct
import time

import pytest

import certificates as c
from support.instance import SUCCESS, Instance
from support.network import Capture, TwoNetworks, listening_ports
from support.peers import Peer, bad_peers
from test_bad_input import edit
from test_certificate_matrix import lay_out, list_broken, list_expired

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

MARKER = 4242                      # a token id whose row of the embedding is looked for
WORDS = "the quick marker xylophone jumps"
PORTS = (1025, 1026, 1027, 1120)   # nobody else is in these networks


@pytest.fixture(scope="module")
def networks():
    with TwoNetworks() as two:
        yield two


class Pair(Instance):
    """A node in each network; control on 10.79.0.x, data on 10.79.1.x."""

    def __init__(self, folder, model, networks, secure):
        settings = [f"ServerConfig.httpsEnabled={str(secure).lower()}"]
        if not secure:  # what is not loopback is encrypted unless this is written
            settings.append("BackendConfig.interNodeTLSEnabled=false")
        super().__init__(folder, model, [1, 1], [*settings, 'ServerConfig.ipAddress="10.79.0.1"',
                                                    'ServerConfig.managementIpAddress="10.79.0.1"'],
                         addresses=["10.79.0.1", "10.79.0.2"], ports=PORTS)
        self.networks = networks
        self.data_addresses = ["10.79.1.1", "10.79.1.2"]

        def name_data_addresses(table):
            for server, address in zip(table["server_list"], self.data_addresses):
                server["device"][0]["device_ip"] = address
        edit(self.table_file, name_data_addresses)
        self.authority = c.Authority()
        self.homes = [self.folder / f"home{i}" for i in range(2)]
        if secure:
            for i, home in enumerate(self.homes):
                self.made = lay_out(home, self.authority, (self.addresses[i], self.data_addresses[i]))[0]
            self.client_peer = Peer.make(self.folder, self.authority, "client", [])

    def environment(self, index, **extra):
        return super().environment(index, MIES_INSTALL_PATH=self.homes[index], **extra)

    def start_node(self, index, **extra):
        with self.networks.inside(index):
            return super().start_node(index, **extra)

    def ask(self, secure, body):
        """The master's answer to a client in the other network."""
        with self.networks.inside(1):
            connection = (http.client.HTTPSConnection(self.addresses[0], self.port, timeout=120,
                                                      context=self.client_peer.context())
                          if secure else
                          http.client.HTTPConnection(self.addresses[0], self.port, timeout=120))
            connection.request("POST", "/v1/completions", json.dumps({"model": self.name, **body}),
                               {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
            connection.close()
            assert answer.status == 200, text
            return json.loads(text)["choices"][0]["text"]


def embedding_row(model, token):
    """The row as the checkpoint stores it, which is how ranks exchange it."""
    path = next(pathlib.Path(model).glob("*.safetensors"))
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        entry = json.loads(file.read(size))["model.embed_tokens.weight"]
        row = (entry["data_offsets"][1] - entry["data_offsets"][0]) // entry["shape"][0]
        file.seek(8 + size + entry["data_offsets"][0] + token * row)
        return file.read(row)


def captured(pair, secure):
    """(answers, bytes that crossed) of two requests: words, and token ids."""
    with pair.networks.inside(0):
        capture = Capture(pair.networks.device)
    words = pair.ask(secure, {"prompt": f"{WORDS} {WORDS}. {WORDS}", "max_tokens": 12, "temperature": 0})
    ids = pair.ask(secure, {"prompt": [504] + [MARKER] * 40, "max_tokens": 4, "temperature": 0})
    return (words, ids), capture.stop()


def test_nothing_of_a_request_is_readable_on_the_wire(tmp_path, model, networks):
    with Pair(tmp_path / "clear", model, networks, secure=False) as pair:
        pair.start()
        answers, streams = captured(pair, False)
        assert "TLS between nodes is off" in pair.nodes[1].text("err")
        assert "HTTP without TLS on 10.79.0.1" in pair.nodes[0].text("err")
        pair.stop()
    token_text = answers[0].strip().splitlines()[0].encode()
    assert len(token_text) >= 8, answers
    row = embedding_row(model, MARKER)
    markers = {"prompt": WORDS.encode(), "token text": token_text,
               "token ids": struct.pack("<I", MARKER) * 20, "tensor": row,
               "step plan": b"PXPL", "frames": b"PHXD"}
    for name, marker in markers.items():
        assert any(marker in s for s in streams), f"{name}: not found in clear, so nothing is proved"

    with Pair(tmp_path / "tls", model, networks, secure=True) as pair:
        # The data path is cut at first, so that the data port of rank 0 stays open for strangers.
        networks.block(1, pair.data_addresses[0])
        for index in range(2):
            pair.start_node(index)
        bad_peers_of_the_data_port(tmp_path, pair)
        networks.unblock(1, pair.data_addresses[0])
        pair.wait_serving()
        encrypted_answers, streams = captured(pair, True)
        assert sum(map(len, streams)) > 20_000, "nothing was captured"
        for name, marker in markers.items():
            assert not any(marker in s for s in streams), f"{name}: readable under TLS"
        assert encrypted_answers == answers
        assert "TLS between nodes is off" not in pair.nodes[0].text("err")
        pair.stop()


def bad_peers_of_the_data_port(tmp_path, pair):
    """The data port's row of the matrix, while rank 0 waits for rank 1."""
    master = pair.nodes[0]
    deadline = time.monotonic() + 60
    while not (ports := listening_ports(master.pid, pair.data_addresses[0])):
        assert time.monotonic() < deadline, master.text()
        time.sleep(0.05)

    def come(peer):
        """What a peer gets after a good handshake and a hello without the token: the end."""
        with pair.networks.inside(0):
            raw = socket.create_connection((pair.data_addresses[0], ports[0]), 60)
        with raw, contextlib.suppress(ssl.SSLError, ConnectionError):
            with peer.context().wrap_socket(raw) as tls:
                tls.sendall(b"x" * 64)
                assert tls.recv(1) == b"", f"{peer.name} was answered"

    files = c.plane_files(pair.homes[0])["between nodes"]
    where = [pair.data_addresses[1]]
    bad = bad_peers(tmp_path, pair.authority, "the data port", where, True)
    c.put(files.revocations, pair.authority.revocation_list([bad["revoked"].certificate]))
    for case, peer in bad.items():
        come(peer)
        line = master.wait_for(peer.name, 30, stream="err")
        assert peer.sentence in line and "rank 0" in line, f"{case}: {line}"
    good = Peer.make(tmp_path, pair.authority, "a node without the token", where)
    come(good)
    master.wait_for("a connection without the token of this group was refused", 30, stream="err")
    for plant, sentence in ((list_expired, "revocation list has expired"),
                            (list_broken, "revocation list is broken")):
        plant(pair, files)
        come(good)
        assert str(files.revocations) in master.wait_for(sentence, 30, stream="err")
    with pair.networks.inside(0):
        with socket.create_connection((pair.data_addresses[0], ports[0]), 60) as raw:
            raw.sendall(os.urandom(4096))
    master.wait_for("a TLS handshake failed", 30, stream="err")
    c.put(files.revocations, pair.authority.revocation_list())
    assert SUCCESS not in master.text("out")
