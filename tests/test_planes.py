"""The three planes over HTTPS, the check before a start, metrics, logs and API keys."""
import http.client
import json
import pathlib
import re
import socket
import ssl
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

import certificates
from support.instance import SUCCESS, Instance, Process, fetch, run_program
from support.paths import program
from test_bad_input import edit


def ask(port, path, context, body=None, headers=()):
    """(status, headers, body) over HTTPS."""
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=context)
    try:
        connection.request("POST" if body is not None else "GET", path,
                           json.dumps(body) if body is not None else None,
                           {"Content-Type": "application/json", **dict(headers)})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def single_https(tmp_path, model):
    """A one-node instance with HTTPS on three planes; (instance, environment, TLS context)."""
    instance = Instance(tmp_path / "i", model, [1])
    home = tmp_path / "home"
    (home / "conf").mkdir(parents=True)
    home.chmod(0o750)
    (home / "conf").chmod(0o750)
    authority = certificates.Authority()
    client, key, ca = certificates.lay_out_planes(home, authority)

    def change(config):
        config["ServerConfig"]["httpsEnabled"] = True
        config["BackendConfig"]["multiNodesInferEnabled"] = False
    edit(instance.config_file, change)
    environment = instance.environment(0, MIES_INSTALL_PATH=home, MIES_SERVICE_MONITOR_MODE="1",
                                       MINDIE_LOG_TO_FILE="1", MINDIE_LOG_PATH=tmp_path / "log")
    del environment["RANK_TABLE_FILE"]
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(client, key)
    return instance, environment, context, authority, home


def test_three_https_planes(tmp_path, model):
    instance, environment, context, authority, home = single_https(tmp_path, model)
    secret = "0123456789abcdef-secret"
    node = Process("https", [program(), "serve", "--api-key", secret], environment)
    try:
        node.wait_for(SUCCESS, 120, stream="out")
        assert secret.encode() not in pathlib.Path(f"/proc/{node.pid}/cmdline").read_bytes()
        question = {"model": "demo", "prompt": "the marker prompt", "max_tokens": 4, "temperature": 0}
        status, headers, _ = ask(instance.port, "/v1/completions", context, question)
        assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
        key = {"Authorization": f"Bearer {secret}"}
        status, headers, body = ask(instance.port, "/v1/completions", context, question,
                                    {**key, "X-Request-Id": "marker-id"})
        assert status == 200, body
        assert headers["X-Request-Id"] == "marker-id"
        assert ask(instance.management_port, "/health", context)[0] == 200
        status, _, text = ask(instance.metrics_port, "/metrics", context, headers=key)
        assert status == 200
        families = {f.name: f for f in text_string_to_metric_families(text)}
        for name in ("request_received", "time_to_first_token_seconds", "vllm:num_requests_running",
                     "vllm:inter_token_latency_seconds", "phalanx_rank_compute_seconds",
                     "phalanx_rank_wait_seconds", "phalanx_certificate_end_timestamp_seconds"):
            assert name in families, sorted(families)
        assert {s.labels["plane"] for s in
                families["phalanx_certificate_end_timestamp_seconds"].samples} == \
            {"business", "management", "metrics"}
        status, _, text = ask(instance.management_port, "/metrics-json", context, headers=key)
        assert [m["metric"][0]["__name__"] for m in json.loads(text)["result"]] == \
            ["TTFT", "TBT", "waitingInferRequestNum", "processingInferRequestNum", "remainBlocks"]
        # Planes do not serve each other's routes.
        assert ask(instance.management_port, "/v1/models", context, headers=key)[0] == 404
        # A client without a certificate, and plain HTTP, get nothing.
        bare = ssl.create_default_context(cafile=home / "client/ca.pem")
        with pytest.raises((ssl.SSLError, OSError)):
            ask(instance.port, "/v1/models", bare)
        # A renewed certificate serves new connections of the same process.
        def serial():
            with context.wrap_socket(socket.create_connection(("127.0.0.1", instance.port)),
                                     server_hostname="127.0.0.1") as tls:
                return tls.getpeercert()["serialNumber"]
        old = serial()
        new = certificates.new_key()
        certificates.put(home / "security/keys/server.key.pem", certificates.key_pem(new))
        certificates.put(home / "security/certs/server.pem",
                         certificates.pem(authority.issue("renewed", new)))
        deadline = time.monotonic() + 15
        while serial() == old:
            assert time.monotonic() < deadline, node.text()
            time.sleep(0.2)
        node.popen.terminate()
        assert node.wait(10) == 0
        log = node.text() + "".join(p.read_text() for p in (tmp_path / "log").rglob("*.log"))
        assert "marker-id" in log and '"POST /v1/completions" 200' in log
        assert secret not in log and "marker prompt" not in log
        assert re.search(r"\] \[server\] \[Response mindie server, method=POST, uri is "
                         r"/v1/completions\] \[status code: 200\]", log)
        assert not [p for p in tmp_path.rglob("log/**/*") if p.stat().st_mode & 0o027]
    finally:
        node.kill()


def test_check_tells_ten_mistakes_in_one_run(tmp_path, model):
    instance, environment, _, authority, home = single_https(tmp_path, model)
    security = home / "security"
    good = run_program("check", "--json", environment=environment)
    assert good.returncode == 0, good.stdout
    # 1 the configuration's mode, 2 a key out of range
    edit(instance.config_file, lambda c: c["ServerConfig"].update(maxLinkNum=0))
    instance.config_file.chmod(0o644)
    # 3 an expired certificate, 4 a key that is not its, 5 a key the group may read
    key = certificates.new_key()
    certificates.put(security / "certs/server.pem", certificates.pem(authority.issue(
        "old", key, begin=certificates.now() - 9 * certificates.DAY,
        end=certificates.now() - certificates.DAY)))
    certificates.put(security / "keys/server.key.pem", certificates.key_pem(key))
    certificates.put(security / "keys/management/server.key.pem",
                     certificates.key_pem(certificates.new_key()))
    (security / "keys/metrics/server.key.pem").chmod(0o440)
    # 6 a revocation list that has ended, 7 an authority that is a link
    certificates.put(security / "metrics/certs/server_crl.pem", authority.revocation_list(
        begin=certificates.now() - 9 * certificates.DAY, end=certificates.now() - certificates.DAY))
    (security / "ca/management_ca.pem").rename(security / "ca/real.pem")
    (security / "ca/management_ca.pem").symlink_to(security / "ca/real.pem")
    # 8 a port that is taken, 9 more memory than there is, 10 a directory that is open
    (security / "pass").mkdir()
    (security / "pass").chmod(0o755)
    edit(instance.config_file, lambda c: c["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
         .update(npuMemSize=2000000))
    instance.config_file.chmod(0o644)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", instance.metrics_port))
        holder.listen()
        done = run_program("check", "--json", environment=environment)
        text = run_program("check", environment=environment)
        start = run_program("serve", environment=environment)
    assert done.returncode == 1 and text.returncode == 1 and start.returncode == 1
    problems = json.loads(done.stdout)["problems"]
    shown = json.dumps(problems, indent=1)

    def found(where, *parts):
        hits = [p for p in problems if where in p["where"] + p["what"] + p["found"] and
                all(part in json.dumps(p) for part in parts)]
        assert hits, f"{where} {parts} is missing in\n{shown}"
    found(str(instance.config_file), "0644", "chmod 640")
    found("maxLinkNum", "[1, 4096]")
    found("certs/server.pem", "expired")
    found("keys/management/server.key.pem", "does not match")
    found("keys/metrics/server.key.pem", "0440", "chmod")
    found("metrics/certs/server_crl.pem", "expired")
    found("management_ca.pem", "symbolic link")
    found(str(instance.metrics_port), "in use")
    found("npuMemSize", "GiB")
    found("security/pass", "0755", "chmod 700")
    for p in problems:
        assert p["where"] in text.stdout and p["where"] in start.stderr
    assert "not used: shared memory is memfd" in text.stdout


def test_one_way_tls_needs_keys(tmp_path, model):
    authority = certificates.Authority()
    key = certificates.new_key()
    certificate = certificates.put(tmp_path / "c.pem", certificates.pem(authority.issue("s", key)))
    key_file = certificates.put(tmp_path / "k.pem", certificates.key_pem(key))
    arguments = ["check", "--model", model, "--ssl-certfile", certificate, "--ssl-keyfile", key_file,
                 "--no-ports"]
    done = run_program(*arguments)
    assert done.returncode == 1 and "anybody could ask" in done.stdout, done.stdout
    keys = certificates.put(tmp_path / "keys", "# one per line\nfirst-long-key\nsecond-long-key\n", 0o600)
    done = run_program(*arguments, "--api-key-file", keys)
    assert done.returncode == 0, done.stdout
    keys.chmod(0o644)
    done = run_program(*arguments, "--api-key-file", keys)
    assert done.returncode == 1 and "chmod 600" in done.stdout and "first-long-key" not in done.stdout
