"""make install: the documented layout and modes, and the guide's own commands in it."""
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess

import pytest

from support.instance import SUCCESS, Process, fetch, free_ports
from support.paths import ROOT, clean_environment, demo_model, program

MODES = {".": 0o750, "bin": 0o550, "bin/mindieservice_daemon": 0o550, "bin/phalanx": 0o550,
         "bin/llm_engine_test": 0o550, "bin/mindie_llm_server": 0o550, "bin/hccn_tool": 0o550, "lib": 0o550,
         "lib/grpc": 0o550, "include": 0o550, "scripts": 0o550, "logs": 0o750, "conf": 0o750,
         "conf/config.json": 0o640, "security": 0o700, "security/ca": 0o700,
         "security/grpc/keys": 0o700}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("prefix")
    done = subprocess.run([ROOT / "scripts/install", prefix], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    yield prefix / "mindie-service"
    # Read-only directories would keep pytest from removing the folder.
    for folder, _, _ in os.walk(prefix):
        pathlib.Path(folder).chmod(0o750)


def configure(home, **server):
    """The guide's step: edit conf/config.json in place."""
    path = home / "conf/config.json"
    config = json.loads(path.read_text())
    port, management, metrics, between = free_ports(4)
    config["ServerConfig"].update(port=port, managementPort=management, metricsPort=metrics, **server)
    config["BackendConfig"]["multiNodesInferPort"] = between
    entry = config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
    entry.update(modelName="demo", modelWeightPath=str(demo_model()), npuMemSize=1)
    path.write_text(json.dumps(config, indent=4))
    return port


def test_layout_and_modes(home):
    for name, mode in MODES.items():
        found = stat.S_IMODE((home / name).stat().st_mode)
        assert found == mode, f"{name}: found {found:04o}, expected {mode:04o}"
    assert (home / "set_env.sh").exists()


def test_second_install_keeps_the_configuration(home):
    configure(home)
    before = (home / "conf/config.json").read_text()
    done = subprocess.run([ROOT / "scripts/install", home.parent], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert (home / "conf/config.json").read_text() == before
    test_layout_and_modes(home)


def test_guides_start_in_the_background(home):
    port = configure(home)
    script = """
source mindie-service/set_env.sh
cd mindie-service
nohup ./bin/mindieservice_daemon > output.log 2>&1 &
daemon=$!
for i in $(seq 300); do grep -q '^%s$' output.log && break; kill -0 $daemon || break; sleep 0.2; done
python3 - <<'END'
import urllib.request
print(urllib.request.urlopen("http://127.0.0.1:%d/v1/models").read().decode())
END
kill $daemon
wait $daemon
echo "status $?"
""" % (SUCCESS, port)
    done = subprocess.run(["bash", "-c", script], cwd=home.parent, env=clean_environment(),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    log = (home / "output.log").read_text()
    assert SUCCESS in log.splitlines(), log
    assert '"demo"' in done.stdout, done.stdout + log
    assert "status 0" in done.stdout, done.stdout + log
    assert list((home / "logs/debug").glob("mindie-server_*.log"))


def test_engine_self_test(home):
    configure(home)
    node = Process("llm_engine_test", ["bash", "-c", "source set_env.sh && ./bin/llm_engine_test"],
                   clean_environment(), cwd=home)
    try:
        assert node.wait(90) == 0, node.text()
        assert "self-test passed" in node.text("out")
    finally:
        node.kill()


def test_serve_without_files(tmp_path):
    port = free_ports(1)[0]
    node = Process("serve --model", [program(), "serve", "--model", demo_model(), "--tp", "2",
                                     "--port", str(port)],
                   clean_environment(NPU_MEMORY_FRACTION="0.3"))
    try:
        node.wait_for(SUCCESS, 120, stream="out")
        name = json.loads(fetch(f"http://127.0.0.1:{port}/v1/models")[1])["data"][0]["id"]
        body = json.dumps({"model": name, "prompt": "The capital of France is", "max_tokens": 8,
                           "temperature": 0}).encode()
        status, text = fetch(f"http://127.0.0.1:{port}/v1/completions", data=body, seconds=60)
        assert status == 200 and "Paris" in text, text
        node.popen.terminate()
        assert node.wait(5) == 0
    finally:
        node.kill()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_the_unit_is_sound_and_closed(tmp_path):
    """What it starts is replaced, since nothing is installed in /opt."""
    text = (ROOT / "deploy/systemd/phalanx.service").read_text()
    unit = tmp_path / "phalanx.service"
    unit.write_text(text.replace("/opt/mindie-service/bin/phalanx", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and "phalanx.service:" not in done.stdout, done.stdout
    done = subprocess.run(["systemd-analyze", "security", "--offline=true", unit],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    exposure = float(re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)[1])
    assert exposure < 2, done.stdout
    assert "User=phalanx" in text and "ExecStartPre=/opt/mindie-service/bin/phalanx check" in text
