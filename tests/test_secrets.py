"""Keys, passwords and API keys: not in logs, messages, command lines, core dumps, nor left in memory."""
import pathlib
import resource
import signal
import ssl

import certificates as c
from support.instance import SUCCESS, Instance, Process, children_of, run_program
from support.paths import program
from test_planes import ask

API_KEY = "api-key-0123456789-marker"
PASSWORD = "Key-password-7-marker"


def writable_memory(pid):
    """Everything a process has written, piece by piece."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            span, mode = line.split()[:2]
            first, last = (int(x, 16) for x in span.split("-"))
            if not mode.startswith("rw") or "[v" in line:
                continue
            while first < last:
                try:
                    memory.seek(first)
                    piece = memory.read(min(last - first, 16 << 20))
                except OSError:
                    break
                if not piece:
                    break
                yield piece
                first += len(piece)


def test_secrets_stay_inside(tmp_path, model):
    instance = Instance(tmp_path / "i", model, [1], ("ServerConfig.httpsEnabled=true",
                                                     "BackendConfig.multiNodesInferEnabled=false"))
    home = tmp_path / "home"
    (home / "conf").mkdir(parents=True)
    (home / "conf").chmod(0o750)
    authority = c.Authority()
    client, client_key, ca = c.lay_out_planes(home, authority)
    files = c.plane_files(home)["business"]
    store = c.key_store()
    key = c.new_key()
    c.put(files.certificate, c.pem(authority.issue("locked", key)))
    c.put(files.key, c.key_pem(key, PASSWORD))
    c.put(files.password, c.password_file(PASSWORD, store))
    c.put(home / "tools/pmt/master/ksfa", store)
    c.put(home / "tools/pmt/standby/ksfb", store)
    c.close_folders(home)
    keys = c.put(tmp_path / "keys", API_KEY + "\n", 0o600)
    environment = instance.environment(0, MIES_INSTALL_PATH=home, MINDIE_LOG_TO_FILE="1",
                                       MINDIE_LOG_PATH=tmp_path / "log")
    del environment["RANK_TABLE_FILE"]
    number = key.private_numbers().private_value
    secrets = {"API key": API_KEY.encode(), "password": PASSWORD.encode(),
               "key as PEM": b"".join(c.key_pem(key).splitlines()[1:3])[:60],
               "key store": store.removeprefix("PHXKEY1:").encode(),
               "private number": number.to_bytes(32, "big"),
               "private number, as OpenSSL has it": number.to_bytes(32, "little")}

    # Messages: a wrong password, a store in the wrong place of a key.
    c.put(files.password, c.password_file("Another-password-8", store))
    done = run_program("check", "--no-ports", "--api-key-file", keys, environment=environment)
    assert done.returncode == 1 and "password of the private key is wrong" in done.stdout, done.stdout
    for name, secret in secrets.items():
        assert secret.decode("latin-1") not in done.stdout + done.stderr, name
    assert "Another-password-8" not in done.stdout + done.stderr
    c.put(files.password, c.password_file(PASSWORD, store))

    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    (tmp_path / "cwd").mkdir()
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        node = Process("secret", [program(), "serve", "--api-key-file", keys], environment,
                       cwd=tmp_path / "cwd")
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    try:
        node.wait_for(SUCCESS, 120, stream="out")
        context = ssl.create_default_context(cafile=ca)
        context.load_cert_chain(client, client_key)
        assert ask(instance.port, "/v1/models", context)[0] == 401
        assert ask(instance.port, "/v1/models", context,
                   headers={"Authorization": f"Bearer {API_KEY}"})[0] == 200
        pids = [node.pid, *children_of(node.pid)]
        assert len(pids) == 2
        for pid in pids:
            line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
            assert not any(secret in line for secret in secrets.values()), line
            assert int(pathlib.Path(f"/proc/{pid}/coredump_filter").read_text(), 16) == 0
        # What opened the key is overwritten; the private number itself must stay, in locked memory.
        gone = {name: secrets[name] for name in ("password", "key as PEM", "key store")}
        left = {name for piece in writable_memory(node.pid) for name, secret in gone.items()
                if secret in piece}
        assert not left, f"still in memory: {left}"
        # A core dump holds none of it. (Where the system pipes cores away there is no file.)
        node.popen.send_signal(signal.SIGSEGV)
        assert node.wait(20) == -signal.SIGSEGV
        for core in (tmp_path / "cwd").glob("core*"):
            text = core.read_bytes()
            assert not [name for name, secret in secrets.items() if secret in text]
            print(f"core dump of {len(text)} bytes without a secret")
        log = node.text() + "".join(p.read_text() for p in (tmp_path / "log").rglob("*.log"))
        assert not [name for name, secret in secrets.items() if secret.decode("latin-1") in log]
    finally:
        node.kill()
