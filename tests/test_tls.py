"""From nothing to two nodes with TLS everywhere, by commands typed into a terminal; wrong folders and
strangers refused by name; offline runs."""
import contextlib
import http.client
import json
import os
import pty
import select
import shutil
import socket
import ssl
import subprocess
import time

import pytest

from support.instance import SUCCESS, Instance, Process, free_ports, run_program
from support.paths import clean_environment, demo_model, program


class TlsInstance(Instance):
    """Nodes that start with --certs."""

    def __init__(self, folder, model, settings=("BackendConfig.interNodeTLSEnabled=true",)):
        super().__init__(folder, model, [1, 1], settings)
        self.certs = self.folder / "certs"

    def make_certificates(self):
        self._make("certs", "init", "--rank-table", self.table_file, "--out", self.certs)


class Terminal:
    """A shell behind a pseudo-terminal, for typing."""

    def __init__(self, folder, environment):
        self.end, inner = pty.openpty()
        self.text = ""
        self.shell = subprocess.Popen(["bash", "--norc", "--noprofile"], cwd=folder, env=environment,
                                      stdin=inner, stdout=inner, stderr=inner, start_new_session=True)
        os.close(inner)

    def type(self, command, seconds=60):
        """Types a line and waits until it is done; it must succeed."""
        begun = len(self.text)
        os.write(self.end, f"{command}; echo status-$?-\n".encode())
        deadline = time.monotonic() + seconds
        while "status-0-" not in self.text[begun:]:
            assert time.monotonic() < deadline, self.text
            if select.select([self.end], [], [], 0.1)[0]:
                self.text += os.read(self.end, 65536).decode("utf-8", "replace")

    def close(self):
        self.shell.kill()
        self.shell.wait()
        os.close(self.end)


def test_two_commands_give_tls_everywhere(tmp_path, model):
    with Instance(tmp_path, model, [1, 1]) as instance:
        assert not json.loads(instance.config_file.read_text())["ServerConfig"]["httpsEnabled"]
        (tmp_path / "node2").mkdir()
        terminal = Terminal(tmp_path, clean_environment(PATH=f"{program().parent}:{os.environ['PATH']}"))
        try:
            begun = time.monotonic()
            terminal.type("phalanx certs init --rank-table ranktable.json --config config.json --out certs")
            terminal.type("cp -r certs/127.0.0.2 node2/certs")
            typed = time.monotonic() - begun
        finally:
            terminal.close()
        for index, certs in ((0, "certs"), (1, "node2/certs")):
            instance.nodes[index] = Process(f"node {index}",
                                            [program(), "serve", "--certs", tmp_path / certs],
                                            instance.environment(index, MIES_SERVICE_MONITOR_MODE="1"))
        instance.wait_serving()
        context = ssl.create_default_context(cafile=tmp_path / "certs/client/ca.pem")
        context.load_cert_chain(tmp_path / "certs/client/client.pem",
                                tmp_path / "certs/client/client.key.pem")
        for port, path, body in ((instance.port, "/v1/completions", {"model": instance.name, "prompt": "Hello",
                                                                     "max_tokens": 4}),
                                 (instance.management_port, "/health", None),
                                 (instance.metrics_port, "/metrics", None)):
            connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=context)
            connection.request("POST" if body else "GET", path, body and json.dumps(body),
                               {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status == 200, text
            connection.close()
            with pytest.raises(OSError):  # plain HTTP is not spoken here
                plain = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                plain.request("GET", path)
                assert plain.getresponse().status == 0
        print(f"\ntwo commands typed: {typed:.2f} s; from nothing to an answer of two nodes with TLS "
              f"everywhere: {time.monotonic() - begun:.1f} s")
        # The planes' certificates, that of the traffic between nodes included, are watched.
        assert 'phalanx_certificate_end_timestamp_seconds{plane="between nodes"}' in text
        done = run_program("check", "--json", "--no-ports", "--certs", tmp_path / "certs",
                           environment=instance.environment(0))
        report = json.loads(done.stdout)
        assert done.returncode == 0, done.stdout
        for fact in ("between nodes: certificate CN=127.0.0.1", "TLS on the control port and the data ports",
                     "business plane: certificate", "metrics plane: certificate"):
            assert any(fact in f for f in report["facts"]), f"no {fact!r} in {report['facts']}"
        assert not any("share a certificate" in w["what"] for w in report["warnings"])
        strangers(instance, tmp_path / "certs/client")
        instance.stop()


def strangers(instance, client):
    """TLS 1.2, no certificate, a certificate for clients of HTTPS, garbage: the control port closes."""
    silent = socket.create_connection(("127.0.0.1", instance.node_port), 5)
    for change in ("none", "old", "client"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        if change == "old":
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        if change != "none":
            context.load_cert_chain(client / "client.pem", client / "client.key.pem")
        with socket.create_connection(("127.0.0.1", instance.node_port), 5) as raw:
            with pytest.raises((ssl.SSLError, ConnectionError, EOFError, AssertionError)):
                with context.wrap_socket(raw) as wrapped:
                    wrapped.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                    assert wrapped.recv(1), "closed"
    with silent:  # a handshake that does not come has 5 s
        silent.settimeout(15)
        with contextlib.suppress(ConnectionError):
            assert silent.recv(1) == b""
    # More than may be open without a proof: the oldest are closed, the newest is still heard.
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(socket.create_connection(("127.0.0.1", instance.node_port), 5))
                for _ in range(80)]
        many[0].settimeout(10)
        with contextlib.suppress(ConnectionError):
            assert many[0].recv(1) == b""
        instance.nodes[0].wait_for("connections that have not proved themselves", 10)
    instance.nodes[0].wait_for("control plane refused a peer: certificate of the peer, CN=client", 10)


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


def test_offline_ranks_run_under_tls(tmp_path):
    """`phalanx run`, one process per rank: --certs encrypts; clear between hosts must be written."""
    table, certs = tmp_path / "ranktable.json", tmp_path / "certs"
    for arguments in (("ranktable", "make", "--hosts", "127.0.0.1,127.0.0.2", "-o", table),
                      ("certs", "init", "--rank-table", table, "--out", certs)):
        done = run_program(*arguments)
        assert done.returncode == 0, done.stderr
    port = free_ports(1)[0]
    command = [program(), "run", "--model_path", demo_model(), "--max_output_length", 4,
               "--input_texts", "What's Deep Learning?"]

    def environment(rank, table=table):
        return clean_environment(WORLD_SIZE=2, RANK=rank, LOCAL_RANK=0, RANK_TABLE_FILE=table,
                                 MASTER_PORT=port, MIES_CONTAINER_IP=f"127.0.0.{rank + 1}")

    ranks = [Process(f"rank {rank}", [*command, "--certs", certs], environment(rank)) for rank in range(2)]
    try:
        ranks[0].wait_for("join", 60)
        with socket.create_connection(("127.0.0.1", port), 10) as raw:  # clear text gets nothing
            raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            raw.settimeout(15)
            with contextlib.suppress(ConnectionError):
                assert not raw.recv(64).startswith(b"\0\0")
        for rank in ranks:
            assert rank.wait(120) == 0, rank.text()
        assert "Answer[0]:" in ranks[0].text("out")
    finally:
        for rank in ranks:
            rank.kill()

    far = tmp_path / "far.json"
    done = run_program("ranktable", "make", "--hosts", "10.99.0.1,10.99.0.2", "-o", far)
    assert done.returncode == 0, done.stderr
    one = {**environment(1, far), "MIES_CONTAINER_IP": "10.99.0.2"}
    done = run_program(*command[1:], environment=one)
    assert done.returncode == 1 and SUCCESS not in done.stdout
    for part in ("this node has no certificate", "--inter-node-tls=off", "phalanx certs init"):
        assert part in done.stderr, done.stderr
