"""Programs that come to a TLS port with a good or a bad certificate."""
import dataclasses
import pathlib
import ssl

import certificates as c


@dataclasses.dataclass
class Peer:
    name: str                     # common name, by which the log tells it from others
    sentence: str = ""            # what the server has against it
    certificate: object = None
    certificate_file: pathlib.Path = None
    key_file: pathlib.Path = None

    def context(self, alpn=None):
        """Trusts every server: whom the server trusts is what is asked here."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if self.certificate_file:
            context.load_cert_chain(self.certificate_file, self.key_file)
        if alpn:
            context.set_alpn_protocols([alpn])
        return context

    @classmethod
    def make(cls, folder, authority, name, addresses, sentence="", key=None, server=True, client=True,
             **order):
        folder = pathlib.Path(folder) / name.replace(" ", "_")
        key = key or c.new_key()
        certificate = authority.issue(name, key, addresses or ["127.0.0.1"], server=server,
                                      client=client, **order)
        return cls(name, sentence, certificate, c.put(folder / "c.pem", c.pem(certificate)),
                   c.put(folder / "k.pem", c.key_pem(key)))


def bad_peers(folder, authority, listener, addresses, between_nodes):
    """case -> Peer. `revoked` is to be put on the list by the caller. Clients of HTTPS need no address,
    so a wrong name is something between nodes only."""
    def make(case, sentence, signer=authority, where=addresses, **order):
        return Peer.make(folder, signer, f"{case} at {listener}", where, sentence, **order)
    peers = {
        "expired": make("expired", "certificate has expired", begin=c.now() - 9 * c.DAY,
                        end=c.now() - c.DAY),
        "not yet valid": make("early", "certificate is not yet valid", begin=c.now() + c.DAY),
        "wrong authority": make("foreign", "certificate was signed by another authority",
                                signer=c.Authority("another authority")),
        "wrong usage": make("server only", "certificate may not be used by a client", client=False),
        "weak key": make("weak", "certificate has a weak key", key=c.new_key(2048)),
        "revoked": make("revoked", "certificate was revoked"),
    }
    if between_nodes:
        peers["wrong name"] = make("elsewhere", "certificate is of another node",
                                   where=["127.0.0.99"])
    return peers
