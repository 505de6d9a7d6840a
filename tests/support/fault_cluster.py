"""An instance over network namespaces, with the load that runs while faults happen."""
import http.client
import itertools
import json
import pathlib
import signal
import time

from .instance import SUCCESS, Process, fetch, run_program
from .paths import clean_environment, program
from .prompts import PROMPTS

REQUESTS = 16
OUTPUT = 24
LONG_PROMPT = 15          # of PROMPTS
RECOVERY_SECONDS = 120


class Cluster:
    """An instance over the network's namespaces; a node that ended can be started again."""

    PORTS = {"port": 1025, "management-port": 1026, "metrics-port": 1027, "multi-node-port": 1120}

    def __init__(self, folder, network, devices, model, tls):
        self.folder, self.network, self.devices = pathlib.Path(folder), network, devices
        self.name, self.model = "demo", model
        self.nodes = {}
        self.logs = []           # of processes that ended
        hosts = ",".join(f"{network.address(i)}:{d}" for i, d in enumerate(devices))
        self.make("ranktable", "make", "--hosts", hosts, "-o", self.folder / "ranktable.json")
        table = json.loads((self.folder / "ranktable.json").read_text())
        for i, server in enumerate(table["server_list"]):
            for device in server["device"]:
                device["device_ip"] = network.data_address(i)
        (self.folder / "ranktable.json").write_text(json.dumps(table))
        if tls:
            self.make("certs", "init", "--rank-table", self.folder / "ranktable.json",
                      "--out", self.folder / "certs")
        key = "BackendConfig.ModelDeployConfig.ModelConfig[0].npuMemSize"
        ports = itertools.chain.from_iterable((f"--{k}", v) for k, v in self.PORTS.items())
        self.make("config", "make", "--model", model, "--name", self.name, "--multi-node",
                  "--ip", network.address(0), *ports, "--set", f"{key}=1",
                  "--set", "BackendConfig.ModelDeployConfig.maxSeqLen=4096",
                  "--set", "BackendConfig.ModelDeployConfig.maxInputTokenLen=3072",
                  "--set", f"BackendConfig.interNodeTLSEnabled={str(tls).lower()}",
                  "--set", "ServerConfig.httpsEnabled=false",   # clients speak plain HTTP
                  "-o", self.folder / "config.json")

    @staticmethod
    def make(*arguments):
        done = run_program(*arguments)
        assert done.returncode == 0, done.stderr

    def start_node(self, i, **extra):
        environment = clean_environment(**{**self.environment(i), **extra})
        return Process(f"node {self.network.address(i)}",
                       self.network.inside(i, program(), "serve", "--on-loss=wait", "--certs",
                                           self.folder / "certs"), environment)

    def environment(self, i):
        return dict(
            MIES_CONFIG_JSON_PATH=self.folder / "config.json",
            RANK_TABLE_FILE=self.folder / "ranktable.json",
            MIES_CONTAINER_IP=self.network.address(i), MINDIE_LOG_TO_FILE=1,
            MINDIE_LOG_PATH=self.folder / "log" / str(i), PHALANX_DRAIN_SECONDS=120,
            PHALANX_RECOVERY_SECONDS=RECOVERY_SECONDS)

    def start(self):
        for i in range(len(self.devices)):
            self.replace(i)
        self.wait_serving()

    def replace(self, i):
        if i in self.nodes:
            self.logs.append(self.nodes[i])
        self.nodes[i] = self.start_node(i)

    def wait_serving(self, seconds=RECOVERY_SECONDS):
        self.nodes[0].wait_for(SUCCESS, seconds, stream="out")

    def status(self):
        code, body = fetch(f"http://{self.network.address(0)}:1026/v1/status", seconds=10)
        assert code == 200, body
        return json.loads(body)

    def phalanx(self):
        return self.status()["phalanx"]

    def wait_generation(self, number, seconds=RECOVERY_SECONDS):
        deadline = time.monotonic() + seconds
        while True:
            now = self.phalanx()
            if now["generation"] >= number and now["state"] == "serving":
                return now
            assert time.monotonic() < deadline, f"no generation {number}: {now}"
            time.sleep(0.02)

    def stop(self, seconds=20):
        self.nodes[0].popen.send_signal(signal.SIGTERM)
        statuses = {n.name: n.wait(seconds) for n in self.nodes.values()}
        assert set(statuses.values()) == {0}, f"{statuses}\n{self.text()}"

    def kill(self):
        for node in self.nodes.values():
            if node.popen.poll() is None:
                node.popen.send_signal(signal.SIGCONT)
            node.kill()

    def text(self):
        return "\n".join(f"--- {n.name}\n{n.text()[-6000:]}" for n in
                         [*self.logs[-3:], *self.nodes.values()])

    # --- load --------------------------------------------------------------------------------------

    def ask(self, number):
        """One request, whole or as a stream; (text, monotonic time of every piece)."""
        prompt = PROMPTS[number % len(PROMPTS)]
        stream = number % 2 == 1
        body = {"model": self.name, "prompt": prompt, "max_tokens": OUTPUT, "stream": stream,
                "ignore_eos": True,
                **({"temperature": 0} if number % 3 else {"temperature": 1.0, "seed": number})}
        connection = http.client.HTTPConnection(self.network.address(0), 1025, timeout=180)
        connection.request("POST", "/v1/completions", json.dumps(body),
                           {"Content-Type": "application/json"})
        response = connection.getresponse()
        times, pieces = [], []
        if not stream:
            answer = response.read()
            times.append(time.monotonic())
            assert response.status == 200, f"request {number}: {response.status} {answer[:500]}"
            return json.loads(answer)["choices"][0]["text"], times
        assert response.status == 200, f"request {number}: {response.status} {response.read(500)}"
        done = False
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                done = True
                break
            chunk = json.loads(line[6:])
            assert "choices" in chunk, f"request {number}: {chunk}"
            times.append(time.monotonic())
            pieces += [c.get("text", "") for c in chunk["choices"]]
        assert done, f"request {number}: the stream ended early"
        return "".join(pieces), times

    def load(self, pool, long=False):
        """{request: future} of REQUESTS requests, one of them with a prompt of 1,500 tokens if `long`."""
        numbers = [*range(REQUESTS - 1), LONG_PROMPT if long else REQUESTS]
        return {n: pool.submit(self.ask, n) for n in numbers}

    def wait_running(self, count, tokens=0, seconds=60):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.status()
            running = status["resource"]["runningRequestNum"]
            done = status["phalanx"]["engine"].get("output_tokens", 0)
            if running >= count and done >= tokens:
                return
            time.sleep(0.01)
        raise AssertionError(f"{count} requests were not running within {seconds} s: {status}")
