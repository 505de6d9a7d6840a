"""Authorities, certificates, keys and revocation lists for tests, good and bad, made on the spot."""
import datetime
import ipaddress
import pathlib

from cryptography import x509
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


def key_pem(key):
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                             serialization.NoEncryption())


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


def lay_out_planes(home, authority, address="127.0.0.1"):
    """Certificates of the three HTTPS planes where config.json's defaults look for them, and a
    client's; returns (client certificate file, client key file, authority file)."""
    home = pathlib.Path(home)
    for plane, folder, ca in (("", "certs", "ca.pem"), ("management", "certs/management", "management_ca.pem"),
                              ("metrics", "certs/metrics", "metrics_ca.pem")):
        key = new_key()
        put(home / "security" / folder / "server.pem",
            pem(authority.issue(f"{plane or 'business'} plane", key, [address])))
        put(home / "security" / folder.replace("certs", "keys") / "server.key.pem", key_pem(key))
        put(home / "security" / "ca" / ca, authority.pem())
        lists = home / "security" / (f"{plane}/certs" if plane else "certs")
        put(lists / "server_crl.pem", authority.revocation_list())
    for folder in [home / "security", *(p for p in (home / "security").rglob("*") if p.is_dir())]:
        folder.chmod(0o700)
    key = new_key()
    client = pem(authority.issue("client", key, server=False, client=True))
    files = home / "client"
    return (put(files / "client.pem", client), put(files / "client.key.pem", key_pem(key)),
            put(files / "ca.pem", authority.pem()))
