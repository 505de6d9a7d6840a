"""Authorities, certificates, keys and revocation lists for tests, good and bad, made on the spot."""
import base64
import dataclasses
import datetime
import hashlib
import ipaddress
import os
import pathlib

from cryptography import x509
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)


def now():
    return datetime.datetime.now(datetime.timezone.utc)


def name(common_name):
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Phalanx tests"),
                      x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def new_key(bits=0):
    """An EC key, or an RSA key of so many bits."""
    return rsa.generate_private_key(65537, bits) if bits else ec.generate_private_key(ec.SECP256R1())


def put(path, text, mode=0o400):
    """A file of that mode; what is there is replaced."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def key_pem(key, password=None):
    how = (serialization.BestAvailableEncryption(password.encode()) if password
           else serialization.NoEncryption())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def password_file(password, store):
    """As docs/security.md has it; `store` is the text of a key store."""
    key = base64.b64decode(store.removeprefix("PHXKEY1:"))
    nonce = os.urandom(12)
    sealed = nonce + AESGCM(key).encrypt(nonce, password.encode(), b"PHXPASS1")
    return f"PHXPASS1:{hashlib.sha256(key).hexdigest()[:8]}:{base64.b64encode(sealed).decode()}\n"


def key_store():
    return "PHXKEY1:" + base64.b64encode(os.urandom(32)).decode()


class Authority:
    def __init__(self, common_name="test authority"):
        self.key = new_key()
        self.name = name(common_name)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        self.certificate = (
            x509.CertificateBuilder().subject_name(self.name).issuer_name(self.name)
            .public_key(self.key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now() - DAY).not_valid_after(now() + 3650 * DAY)
            .add_extension(x509.BasicConstraints(True, 0), True).add_extension(usage, True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False)
            .sign(self.key, hashes.SHA256()))

    def pem(self):
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, common_name, key, addresses=("127.0.0.1",), server=True, client=False,
              begin=None, end=None):
        usages = [ExtendedKeyUsageOID.SERVER_AUTH] * server + [ExtendedKeyUsageOID.CLIENT_AUTH] * client
        names = [x509.IPAddress(ipaddress.ip_address(a)) for a in addresses]
        return (x509.CertificateBuilder().subject_name(name(common_name)).issuer_name(self.name)
                .public_key(key.public_key()).serial_number(x509.random_serial_number())
                .not_valid_before(begin or now() - DAY).not_valid_after(end or now() + 100 * DAY)
                .add_extension(x509.BasicConstraints(False, None), True)
                .add_extension(x509.ExtendedKeyUsage(usages), False)
                .add_extension(x509.SubjectAlternativeName(names), False)
                .sign(self.key, hashes.SHA256()))

    def revocation_list(self, revoked=(), begin=None, end=None):
        builder = (x509.CertificateRevocationListBuilder().issuer_name(self.name)
                   .last_update(begin or now() - DAY).next_update(end or now() + 100 * DAY)
                   .add_extension(x509.CRLNumber(1), False))
        for certificate in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(certificate.serial_number)
                .revocation_date(now() - DAY / 24).build())
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def pem(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM)


@dataclasses.dataclass
class PlaneFiles:
    """Where config.json's defaults look for the files of one plane."""
    name: str
    certificate: pathlib.Path
    key: pathlib.Path
    authority: pathlib.Path
    revocations: pathlib.Path
    password: pathlib.Path
    client: bool = False  # its certificate is shown to other servers too

    def all(self):
        return (self.certificate, self.key, self.authority, self.revocations)


def plane_files(home):
    """The three HTTPS planes, and the traffic between nodes."""
    security = pathlib.Path(home) / "security"
    planes = {}
    for name, folder, ca in (("business", "", "ca.pem"), ("management", "management", "management_ca.pem"),
                             ("metrics", "metrics", "metrics_ca.pem")):
        planes[name] = PlaneFiles(name, security / "certs" / folder / "server.pem",
                                  security / "keys" / folder / "server.key.pem",
                                  security / "ca" / ca,
                                  security / folder / "certs" / "server_crl.pem",
                                  security / "pass" / folder / "key_pwd.txt")
    grpc = security / "grpc"
    planes["between nodes"] = PlaneFiles(
        "between nodes", grpc / "certs/server.pem", grpc / "keys/server.key.pem", grpc / "ca/ca.pem",
        grpc / "certs/server_crl.pem", grpc / "pass/mindie_server_key_pwd.txt", True)
    return planes


def lay_out_plane(files, authority, address="127.0.0.1"):
    """Good files for one plane; returns its certificate."""
    key = new_key()
    addresses = [address] if isinstance(address, str) else list(address)
    certificate = authority.issue(f"{files.name} of {addresses[0]}", key, addresses,
                                  client=files.client)
    put(files.certificate, pem(certificate))
    put(files.key, key_pem(key))
    put(files.authority, authority.pem())
    put(files.revocations, authority.revocation_list())
    return certificate


def close_folders(home):
    """Modes that the check of the installation asks for."""
    home = pathlib.Path(home)
    home.chmod(0o750)
    for folder in [home / "security", *(p for p in (home / "security").rglob("*") if p.is_dir())]:
        folder.chmod(0o700)


def client_files(folder, authority, common_name="client", **order):
    """A client's certificate and key, and the authority: (certificate file, key file, authority file)."""
    folder = pathlib.Path(folder)
    key = order.pop("key", None) or new_key()
    certificate = order.pop("certificate", None) or authority.issue(
        common_name, key, **{"server": False, "client": True, **order})
    return (put(folder / "client.pem", pem(certificate)), put(folder / "client.key.pem", key_pem(key)),
            put(folder / "ca.pem", authority.pem()))


def lay_out_planes(home, authority, address="127.0.0.1"):
    """Certificates of the three HTTPS planes where config.json's defaults look for them, and a
    client's; returns (client certificate file, client key file, authority file)."""
    home = pathlib.Path(home)
    for name, files in plane_files(home).items():
        if name != "between nodes":
            lay_out_plane(files, authority, address)
    close_folders(home)
    return client_files(home / "client", authority)
