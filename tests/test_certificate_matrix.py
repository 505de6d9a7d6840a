"""Each bad certificate x each of the five listeners: refused with its own sentence, at the start where
it can be known, otherwise on that connection only; everybody else is served. Control and data ports
share their files. The data port with peers of its own is in test_two_networks.py, since it is only
open while a group forms."""
import http.client
import json
import shutil
import socket
import ssl
import time

import pytest

import certificates as c
from support.instance import SUCCESS, Instance, run_program
from support.peers import Peer, bad_peers
from test_bad_input import edit

PLANES = ("business", "management", "metrics", "between nodes")


def lay_out(home, authority, address):
    """Good files of all planes; plane -> (files, certificate)."""
    (home / "conf").mkdir(parents=True, exist_ok=True)
    (home / "conf").chmod(0o750)
    made = {name: (files, c.lay_out_plane(files, authority, address))
            for name, files in c.plane_files(home).items()}
    store = c.key_store()
    c.put(home / "tools/pmt/master/ksfa", store)
    c.put(home / "tools/pmt/standby/ksfb", store)
    c.close_folders(home)
    return made, store


class Secured(Instance):
    """Two nodes with TLS everywhere, each with an install directory of its own."""

    def __init__(self, folder, model):
        super().__init__(folder, model, [1, 1], ("ServerConfig.httpsEnabled=true",
                                                 "BackendConfig.interNodeTLSEnabled=true"))
        self.authority = c.Authority()
        self.homes = [self.folder / f"home{i}" for i in range(2)]
        self.lay_out(1)
        self.lay_out(0)

    def lay_out(self, index):
        self.made, self.store = lay_out(self.homes[index], self.authority, self.addresses[index])

    def environment(self, index, **extra):
        return super().environment(index, MIES_INSTALL_PATH=self.homes[index],
                                   MIES_SERVICE_MONITOR_MODE="1", **extra)


def reissue(order=None, authority=None, key=None):
    """A plant that gives a plane another certificate (and key)."""
    def plant(instance, files):
        new = key() if key else c.new_key()
        terms = {"client": files.client, **(order() if order else {})}
        addresses = terms.pop("addresses", [instance.addresses[0]])
        certificate = (authority() if authority else instance.authority).issue(
            f"bad {files.name}", new, addresses, **terms)
        c.put(files.certificate, c.pem(certificate))
        c.put(files.key, c.key_pem(new))
    return plant


def revoked(instance, files):
    c.put(files.revocations, instance.authority.revocation_list([instance.made[files.name][1]]))


def broken(instance, files):
    text = files.certificate.read_text().splitlines()
    text[3] = "!" + text[3][1:]
    c.put(files.certificate, "\n".join(text) + "\n")


def other_key(instance, files):
    c.put(files.key, c.key_pem(c.new_key()))


def list_expired(instance, files):
    c.put(files.revocations, instance.authority.revocation_list(begin=c.now() - 9 * c.DAY,
                                                                end=c.now() - c.DAY))


def list_broken(instance, files):
    c.put(files.revocations, "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")


def list_unreadable(instance, files):
    files.revocations.unlink()
    files.revocations.mkdir(mode=0o700)


def wrong_password(instance, files):
    key = c.new_key()
    certificate = instance.authority.issue("locked", key, [instance.addresses[0]], client=files.client)
    c.put(files.certificate, c.pem(certificate))
    c.put(files.key, c.key_pem(key, "the right one 1"))
    c.put(files.password, c.password_file("another one 2", instance.store))
    files.password.parent.chmod(0o700)
    files.password.parent.parent.chmod(0o700)


def world_readable(instance, files):
    files.key.chmod(0o644)


def linked(instance, files):
    real = files.key.with_name("real.pem")
    files.key.rename(real)
    files.key.symlink_to(real)


def past():
    return {"begin": c.now() - 9 * c.DAY, "end": c.now() - c.DAY}


# name -> (plant, sentence, sentence between nodes if it is another, which file the finding names)
AT_START = {
    "expired": (reissue(past), "certificate has expired", None, "certificate"),
    "not yet valid": (reissue(lambda: {"begin": c.now() + c.DAY}), "certificate is not yet valid", None,
                      "certificate"),
    "wrong authority": (reissue(authority=lambda: c.Authority("another authority")),
                        "certificate was signed by another authority", None, "certificate"),
    "wrong name": (reissue(lambda: {"addresses": ["127.0.0.99"]}),
                   "certificate does not name the address of its plane",
                   "certificate is of another node", "certificate"),
    "wrong usage": (reissue(lambda: {"server": False, "client": True}),
                    "certificate may not be used by a server", None, "certificate"),
    "weak key": (reissue(key=lambda: c.new_key(2048)), "certificate has a weak key", None, "certificate"),
    "revoked": (revoked, "certificate was revoked", None, "certificate"),
    "broken PEM": (broken, "certificate cannot be read", None, "certificate"),
    "key mismatch": (other_key, "private key does not match the certificate", None, "key"),
    "CRL expired": (list_expired, "revocation list has expired", None, "revocations"),
    "CRL broken": (list_broken, "revocation list is broken", None, "revocations"),
    "CRL unreadable": (list_unreadable, "revocation list is not readable", None, "revocations"),
    "wrong password": (wrong_password, "password of the private key is wrong", None, "key"),
    "world-readable key": (world_readable, "file permissions too wide", None, "key"),
    "symlinked key": (linked, "file is a symbolic link", None, "key"),
}


def test_bad_files_are_refused_at_the_start_on_every_plane(tmp_path, model):
    """All planes get the same mistake at once: `check` names the file of each with the sentence."""
    instance = Secured(tmp_path, model)
    for number, (name, (plant, sentence, between, where)) in enumerate(AT_START.items()):
        shutil.rmtree(instance.homes[0])
        instance.lay_out(0)
        for files, _ in instance.made.values():
            plant(instance, files)
        done = run_program("check", "--json", "--no-ports", environment=instance.environment(0))
        assert done.returncode == 1, f"{name}: {done.stdout}"
        problems = json.loads(done.stdout)["problems"]
        for plane in PLANES:
            wanted = between if plane == "between nodes" and between else sentence
            path = str(getattr(instance.made[plane][0], where))
            assert any(wanted in p["what"] and p["where"].split(",")[0] == path and
                       (p["expected"] or p["fix"]) for p in problems), \
                f"{name}, {plane}: no {wanted!r} at {path} in\n{json.dumps(problems, indent=1)}"
        if number == 0:
            start = run_program("serve", environment=instance.environment(0))
            assert start.returncode == 1 and start.stderr.count(sentence) >= len(PLANES), start.stderr


@pytest.fixture(scope="module")
def secured(tmp_path_factory, model):
    with Secured(tmp_path_factory.mktemp("secured"), model) as instance:
        instance.start()
        yield instance
        instance.stop()


class Https:
    """A listener of the HTTP side, as its clients see it."""

    def __init__(self, instance, plane):
        self.instance = instance
        self.files = instance.made[plane][0]
        self.port, self.path = {"business": (instance.port, "/v1/models"),
                                "management": (instance.management_port, "/health"),
                                "metrics": (instance.metrics_port, "/metrics")}[plane]
        self.refusal = f"on the {plane} plane failed"
        self.peer_addresses = []
        self.server_too = False

    def ask(self, peer):
        """Status of a GET; raises where the handshake fails."""
        connection = http.client.HTTPSConnection(self.instance.addresses[0], self.port, timeout=20,
                                                 context=peer.context())
        try:
            connection.request("GET", self.path)
            return connection.getresponse().status == 200
        finally:
            connection.close()


class Control:
    """The control port: good peers get HTTP/2's settings."""

    def __init__(self, instance):
        self.instance = instance
        self.files = instance.made["between nodes"][0]
        self.refusal = "control plane refused a peer"
        self.peer_addresses = [instance.addresses[1]]
        self.server_too = True

    def ask(self, peer):
        with socket.create_connection((self.instance.addresses[0], self.instance.node_port), 20) as raw:
            with peer.context(alpn="h2").wrap_socket(raw) as tls:
                tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
                return tls.recv(1) != b""

    def shown(self, peer):
        """The node's certificate, as PEM."""
        with socket.create_connection((self.instance.addresses[0], self.instance.node_port), 20) as raw:
            with peer.context(alpn="h2").wrap_socket(raw) as tls:
                return ssl.DER_cert_to_PEM_cert(tls.getpeercert(True))


def listener(instance, name):
    return Control(instance) if name == "control" else Https(instance, name)


def refused(where, peer):
    try:
        assert not where.ask(peer), f"{peer.name} was let in"
    except (ssl.SSLError, OSError, EOFError):
        pass


@pytest.mark.parametrize("name", ["control", "business", "management", "metrics"])
def test_bad_peers_are_refused_on_their_connection_only(tmp_path, secured, name):
    where = listener(secured, name)
    node = secured.nodes[0]
    good = Peer.make(tmp_path, secured.authority, f"good client of {name}", where.peer_addresses)
    assert where.ask(good), node.text()
    bad = bad_peers(tmp_path, secured.authority, name, where.peer_addresses, where.server_too)
    try:
        c.put(where.files.revocations, secured.authority.revocation_list([bad["revoked"].certificate]))
        for case, peer in bad.items():
            refused(where, peer)
            line = node.wait_for(peer.name, 20, stream="err")
            assert where.refusal in line and peer.sentence in line, f"{case}: {line}"
            assert where.ask(good), f"after {case}:\n{node.text()}"
        # The list itself: unusable, nobody is let in; mended, everybody is, without a restart.
        for plant, sentence in ((list_expired, "revocation list has expired"),
                                (list_broken, "revocation list is broken"),
                                (list_unreadable, "revocation list is not readable")):
            plant(secured, where.files)
            refused(where, good)
            line = node.wait_for(f"{where.files.revocations}: {sentence}", 20, stream="err")
            assert where.refusal in line, line
            if plant is list_unreadable:
                where.files.revocations.rmdir()
    finally:
        c.put(where.files.revocations, secured.authority.revocation_list())
    assert where.ask(good), node.text()


def test_certificates_swapped_while_running(tmp_path, secured):
    """What would not pass a start is told of and not used; what is good serves new connections."""
    node = secured.nodes[0]
    kept = {name: [(path, path.read_bytes()) for path in files.all()]
            for name, (files, _) in secured.made.items()}
    listeners = [listener(secured, name) for name in ("control", "business", "management", "metrics")]
    good = Peer.make(tmp_path, secured.authority, "good", [secured.addresses[1]])

    def wait_for_all(text, sentence=""):
        deadline = time.monotonic() + 30
        while True:
            lines = [line for line in node.text("err").splitlines() if text in line]
            told = {plane for plane in PLANES for line in lines
                    if (f"{plane} plane: " if plane != "between nodes" else f"{plane}: ") in line}
            if told == set(PLANES):
                break
            assert time.monotonic() < deadline, f"{told}\n{node.text()}"
            time.sleep(0.1)
        assert sentence in node.text("err")

    for name, (files, _) in secured.made.items():
        reissue(past)(secured, files)
    wait_for_all("its certificate files changed, but cannot be used", "certificate has expired")
    for where in listeners:
        assert where.ask(good), node.text()
    for name in PLANES:
        for path, text in kept[name]:
            c.put(path, text)
    # Back again is a change like any other.
    wait_for_all("new connections use the certificate")
    for where in listeners:
        assert where.ask(good), node.text()
    # And so is a renewed one: the control port shows it to new connections, without a restart.
    control, files = listeners[0], secured.made["between nodes"][0]
    before = control.shown(good)
    reissue(lambda: {"client": True})(secured, files)
    deadline = time.monotonic() + 30
    while control.shown(good) == before:
        assert time.monotonic() < deadline, node.text()
        time.sleep(0.1)
    assert control.shown(good).split() == files.certificate.read_text().split()
    assert control.ask(good), node.text()
    answer = Peer.make(tmp_path, secured.authority, "asker", [])
    connection = http.client.HTTPSConnection(secured.addresses[0], secured.port, timeout=60,
                                             context=answer.context())
    connection.request("POST", "/v1/completions",
                       json.dumps({"model": secured.name, "prompt": "Hello", "max_tokens": 2}),
                       {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()
    assert SUCCESS in node.text("out")
