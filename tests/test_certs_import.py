"""`phalanx certs import` and `encrypt`: files of one's own authority, by the rules of the import tool."""
import json
import stat
import subprocess

import pytest

import certificates as c
from support.instance import Instance
from support.paths import clean_environment, program

PASSWORD = "Import-password-7"
PLANES = {"inter-node": "between nodes", "service": "business", "management": "management",
          "metrics": "metrics"}


def certs(*arguments, typed=""):
    return subprocess.run([program(), "certs", *map(str, arguments)], input=typed, timeout=60,
                          capture_output=True, text=True, env=clean_environment())


class Own:
    """Files of an authority of one's own, as its owner would have them."""

    def __init__(self, folder):
        folder.mkdir(exist_ok=True)
        self.authority = c.Authority("own authority")
        self.key = c.new_key()
        self.ca = c.put(folder / "root.pem", self.authority.pem(), 0o600)
        self.certificate = folder / "node.pem"
        self.key_file = c.put(folder / "node.key.pem", c.key_pem(self.key, PASSWORD))
        self.crl = c.put(folder / "list.pem", self.authority.revocation_list(), 0o600)
        self.issue()

    def issue(self, authority=None, key=None, **terms):
        certificate = (authority or self.authority).issue("own node", key or self.key,
                                                          **{"client": True, **terms})
        c.put(self.certificate, c.pem(certificate), 0o600)

    def import_to(self, home, plane="service", typed=PASSWORD):
        return certs("import", "--home", home, "--plane", plane, "--ca", self.ca, "--cert",
                     self.certificate, "--key", self.key_file, "--crl", self.crl, typed=typed + "\n")


def test_imported_files_pass_the_check(tmp_path, model):
    instance = Instance(tmp_path / "i", model, [1, 1], ("ServerConfig.httpsEnabled=true",
                                                        "BackendConfig.interNodeTLSEnabled=true"))
    home = tmp_path / "home"
    (home / "conf").mkdir(parents=True)
    home.chmod(0o750)
    (home / "conf").chmod(0o750)
    own = Own(tmp_path / "own")
    for plane in PLANES:
        # A key of its own for each, as the guides advise.
        own.key = c.new_key()
        c.put(own.key_file, c.key_pem(own.key, PASSWORD))
        own.issue()
        done = own.import_to(home, plane)
        assert done.returncode == 0, done.stderr
        assert PASSWORD not in done.stdout + done.stderr
        for line in done.stdout.splitlines():
            assert stat.S_IMODE((home / line).stat().st_mode) == 0o400, line
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o700 for p in (home / "security").rglob("*")
               if p.is_dir())
    checked = subprocess.run([program(), "check", "--json", "--no-ports"], timeout=60,
                             capture_output=True, text=True,
                             env=instance.environment(0, MIES_INSTALL_PATH=home))
    report = json.loads(checked.stdout)
    assert checked.returncode == 0, report["problems"]
    for plane in PLANES.values():
        assert any(plane in fact and "CN=own node" in fact for fact in report["facts"]), report["facts"]
    assert not any("share a certificate" in w["what"] for w in report["warnings"])


def leave(own):
    """Nothing is wrong."""


def weak(own):
    own.key = c.new_key(2048)
    c.put(own.key_file, c.key_pem(own.key, PASSWORD))
    own.issue()


def open_key(own):
    own.key_file.chmod(0o600)


def open_certificate(own):
    own.certificate.chmod(0o640)


def linked_key(own):
    own.key_file.rename(own.key_file.with_name("real.pem"))
    own.key_file.symlink_to("real.pem")


def easy_password(own):
    c.put(own.key_file, c.key_pem(own.key, "easypassword"))


# name -> (what is wrong, what is typed, sentence)
REFUSED = {
    "expired": (lambda own: own.issue(end=c.now() - c.DAY / 2), PASSWORD, "certificate has expired"),
    "not yet valid": (lambda own: own.issue(begin=c.now() + c.DAY), PASSWORD,
                      "certificate is not yet valid"),
    "other authority": (lambda own: own.issue(c.Authority("other")), PASSWORD,
                        "certificate was signed by another authority"),
    "client's": (lambda own: own.issue(server=False), PASSWORD,
                 "certificate may not be used by a server"),
    "weak key": (weak, PASSWORD, "certificate has a weak key"),
    "another key": (lambda own: c.put(own.key_file, c.key_pem(c.new_key(), PASSWORD)), PASSWORD,
                    "private key does not match the certificate"),
    "wrong password": (leave, "Another-password-8", "password"),
    "easy password": (easy_password, "easypassword", "password of the private key is too weak"),
    "no password": (leave, "", "no password was given"),
    "open key": (open_key, PASSWORD, "file permissions too wide"),
    "open certificate": (open_certificate, PASSWORD, "file permissions too wide"),
    "linked key": (linked_key, PASSWORD, "file is a symbolic link"),
    "empty list": (lambda own: c.put(own.crl, "", 0o600), PASSWORD, "list.pem"),
    "list expired": (lambda own: c.put(own.crl, own.authority.revocation_list(
        begin=c.now() - 9 * c.DAY, end=c.now() - c.DAY), 0o600), PASSWORD,
        "revocation list has expired"),
    "list of another": (lambda own: c.put(own.crl, c.Authority("other").revocation_list(), 0o600),
                        PASSWORD, "list.pem"),
    "broken": (lambda own: c.put(own.certificate, "-----BEGIN CERTIFICATE-----\nAAAA\n"
                                                  "-----END CERTIFICATE-----\n", 0o600), PASSWORD,
               "node.pem"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_breaks_a_rule_is_refused_whole(tmp_path, name):
    change, typed, sentence = REFUSED[name]
    own = Own(tmp_path / "own")
    change(own)
    done = own.import_to(tmp_path / "home", typed=typed)
    assert done.returncode != 0 and sentence in done.stderr, done.stdout + done.stderr
    assert "nothing was imported" in done.stderr, done.stderr
    assert not (tmp_path / "home").exists()


def test_encrypt_makes_a_password_file(tmp_path):
    out = tmp_path / "security/pass/key_pwd.txt"
    done = certs("encrypt", "--out", out, "--home", tmp_path, typed="easy\n")
    assert done.returncode != 0 and "this password is too weak" in done.stderr, done.stderr
    done = certs("encrypt", "--out", out, "--home", tmp_path, typed=PASSWORD + "\n")
    assert done.returncode == 0, done.stderr
    assert out.read_text().startswith("PHXPASS1:") and PASSWORD not in out.read_text()
    for path in (out, tmp_path / "tools/pmt/master/ksfa", tmp_path / "tools/pmt/standby/ksfb"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o400
    # It opens a key that was encrypted with it.
    home = tmp_path / "home"
    own = Own(tmp_path / "own")
    assert own.import_to(home).returncode == 0
    assert certs("encrypt", "--out", home / "security/pass/key_pwd.txt", "--home", home,
                 typed=PASSWORD + "\n").returncode == 0
    shown = certs("show", home / "security")
    assert shown.returncode == 0 and "good" in shown.stdout, shown.stdout
