"""Real node processes on loopback addresses, with their logs, deadlines and certain ends."""
import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import openai

from .paths import clean_environment, program

SUCCESS = "Daemon start success!"
START_SECONDS = 120


def free_ports(count, addresses=("127.0.0.1",)):
    """Ports that are free on every address now, below the range that the kernel hands out."""
    ports = []
    port = free_ports.next
    while len(ports) < count:
        port = port + 1 if port < 29999 else 20000
        with contextlib.ExitStack() as stack:
            try:
                for address in addresses:
                    stack.enter_context(socket.socket()).bind((address, port))
            except OSError:
                continue
        ports.append(port)
    free_ports.next = port
    return ports


free_ports.next = 20000 + time.time_ns() % 5000


def run_program(*arguments, environment=None, seconds=60):
    """Runs the program to its end; returns the finished process with text output."""
    return subprocess.run([str(program()), *map(str, arguments)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          errors="replace", timeout=seconds,
                          env=environment if environment is not None else clean_environment())


class Process:
    """One program with its output kept line by line."""

    def __init__(self, name, command, environment, cwd=None):
        self.name = name
        self.lines = []          # (seconds since start, stream, text)
        self.changed = threading.Condition()
        self.begun = time.monotonic()
        self.popen = subprocess.Popen([str(c) for c in command], env=environment, cwd=cwd,
                                      stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True, errors="replace")
        self.readers = [threading.Thread(target=self._read, args=(label, stream), daemon=True)
                        for label, stream in (("out", self.popen.stdout),
                                              ("err", self.popen.stderr))]
        for reader in self.readers:
            reader.start()

    def _read(self, label, stream):
        for line in stream:
            with self.changed:
                self.lines.append((time.monotonic() - self.begun, label, line.rstrip("\n")))
                self.changed.notify_all()
        with self.changed:
            self.changed.notify_all()

    def text(self, stream=None):
        with self.changed:
            return "\n".join(line for _, label, line in self.lines if stream in (None, label))

    def wait_for(self, part, seconds, stream=None):
        """Returns the first line that holds `part`; fails with the whole log."""
        deadline = time.monotonic() + seconds
        seen = 0
        while True:
            with self.changed:
                for _, label, line in self.lines[seen:]:
                    if part in line and stream in (None, label):
                        return line
                seen = len(self.lines)
                ended = self.popen.poll() is not None and not any(
                    reader.is_alive() for reader in self.readers)
                if ended and seen == len(self.lines):
                    raise AssertionError(f"{self.name} ended with {self.popen.returncode} without "
                                         f"{part!r}:\n{self.text()}")
                if time.monotonic() > deadline:
                    raise AssertionError(f"{self.name} did not say {part!r} within {seconds} s:\n"
                                         f"{self.text()}")
                self.changed.wait(0.1)

    def wait(self, seconds):
        """Exit status; fails with the log if the process is still there after `seconds`."""
        try:
            status = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {seconds} s:\n{self.text()}") \
                from None
        for reader in self.readers:
            reader.join(5)
        return status

    def kill(self):
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        for reader in self.readers:
            reader.join(5)

    @property
    def pid(self):
        return self.popen.pid


def children_of(pid):
    """Pids of the direct children, as the kernel lists them."""
    children = []
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            children += [int(p) for p in (task / "children").read_text().split()]
    return children


class Instance:
    """Nodes 127.0.0.1, 127.0.0.2, ... with `devices[i]` ranks each, made by the product's own
    generators. A context manager: leaving it kills whatever is still there."""

    def __init__(self, folder, model, devices, settings=(), name="demo", addresses=None,
                 ports=None, weights=None, arguments=(), spares=0):
        self.arguments = list(arguments)   # of every `phalanx serve`
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = model
        self.name = name
        self.devices = list(devices)
        count = len(self.devices) + spares   # the spares come last
        self.addresses = addresses or [f"127.0.0.{i + 1}" for i in range(count)]
        (self.port, self.management_port, self.metrics_port, self.node_port) = \
            ports or free_ports(4, self.addresses)
        self.table_file = self.folder / "ranktable.json"
        self.config_file = self.folder / "config.json"
        self.nodes = {}
        hosts = ",".join(f"{a}:{d}" for a, d in zip(self.addresses, self.devices))
        shares = ("--weights", ",".join(map(str, weights))) if weights else ()
        if spares:
            shares += ("--spares", ",".join(self.addresses[len(self.devices):]))
        self._make("ranktable", "make", "--hosts", hosts, *shares, "-o", self.table_file)
        model_key = "BackendConfig.ModelDeployConfig.ModelConfig[0]"
        defaults = [f"{model_key}.npuMemSize=1",
                    "BackendConfig.ModelDeployConfig.maxSeqLen=4096",
                    "BackendConfig.ModelDeployConfig.maxInputTokenLen=3072"]
        options = [o for s in [*defaults, *settings] for o in ("--set", s)]
        self._make("config", "make", "--model", model, "--name", name, "--multi-node",
                   "--port", self.port, "--management-port", self.management_port,
                   "--metrics-port", self.metrics_port, "--multi-node-port", self.node_port,
                   *options, "-o", self.config_file)

    @staticmethod
    def _make(*arguments):
        done = run_program(*arguments)
        assert done.returncode == 0, done.stderr

    def environment(self, index, **extra):
        own = {"MIES_CONFIG_JSON_PATH": self.config_file, "RANK_TABLE_FILE": self.table_file,
               "MIES_CONTAINER_IP": self.addresses[index]}
        return clean_environment(**{**own, **extra})

    def start_node(self, index, **extra):
        node = Process(f"node {self.addresses[index]}", [program(), "serve", *self.arguments],
                       self.environment(index, **extra))
        self.nodes[index] = node
        return node

    def start(self, **extra):
        for index in range(len(self.addresses)):
            self.start_node(index, **extra)
        self.wait_serving()
        return self

    def wait_serving(self, seconds=START_SECONDS):
        for node in self.nodes.values():
            node.wait_for(SUCCESS, seconds, stream="out")

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is not None:
            for node in self.nodes.values():
                print(f"--- {node.name} (status {node.popen.poll()})\n{node.text()}")
        for node in self.nodes.values():
            node.kill()

    # --- asking it ---------------------------------------------------------------------------------

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def client(self, seconds=120):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=seconds,
                             max_retries=0)

    def complete(self, prompt, **options):
        """One greedy completion; returns the first choice."""
        options = {"max_tokens": 16, "temperature": 0, **options}
        answer = self.client().completions.create(model=self.name, prompt=prompt, **options)
        return answer.choices[0]

    def get(self, path, port=None, seconds=10):
        """(status, body) of a GET on the management plane."""
        url = f"http://127.0.0.1:{port or self.management_port}{path}"
        return fetch(url, seconds=seconds)

    def post(self, path, body, seconds=60):
        """(status, body) of a POST of JSON (or of raw bytes) to the business plane."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return fetch(f"{self.url}{path}", data=data, seconds=seconds)

    def ranks(self):
        """The ranks' part of the status (layout, pids and counters), once the slaves' heartbeats have
        told of the last step."""
        deadline = time.monotonic() + 5
        while True:
            status, body = self.get("/v1/status")
            assert status == 200, body
            ranks = sorted(json.loads(body)["phalanx"]["ranks"], key=lambda r: r["rank"])
            if len(ranks) == sum(self.devices) and len({r["steps_done"] for r in ranks}) == 1:
                return ranks
            assert time.monotonic() < deadline, f"the counters did not settle within 5 s: {ranks}"
            time.sleep(0.1)

    def rank_pids(self):
        """rank -> pid, from the status of the master."""
        return {rank["rank"]: rank["pid"] for rank in self.ranks()}

    # --- ending it ---------------------------------------------------------------------------------

    def stop(self, seconds=5):
        """SIGTERM to the master; every node must end with status 0 in time."""
        deadline = time.monotonic() + seconds
        self.nodes[0].popen.send_signal(signal.SIGTERM)
        statuses = {node.name: node.wait(max(0.1, deadline - time.monotonic()))
                    for node in self.nodes.values()}
        assert set(statuses.values()) == {0}, f"{statuses}\n{self.nodes[0].text()}"


def fetch(url, data=None, seconds=10):
    """(status, body text) whatever the status is."""
    request = urllib.request.Request(url, data=data,
                                     headers={"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=seconds) as response:
            return response.status, response.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")
