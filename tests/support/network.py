"""Two network namespaces joined by a cable of their own; nothing reaches beyond them. Needs root."""
import contextlib
import ctypes
import os
import socket
import struct
import subprocess
import threading
import time

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _enter(path):
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {path}")
    finally:
        os.close(fd)


def hold_network():
    """A process in a network namespace of its own, whose end is the caller's to bring."""
    holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    mine = os.readlink("/proc/self/ns/net")
    deadline = time.monotonic() + 10
    while os.readlink(f"/proc/{holder.pid}/ns/net") == mine:  # until unshare has done it
        if time.monotonic() > deadline or holder.poll() is not None:
            holder.kill()
            holder.wait()
            raise AssertionError("no network namespace within 10 s: root is needed")
        time.sleep(0.01)
    return holder


class TwoNetworks:
    """Network i has the addresses 10.79.0.<i+1> and 10.79.1.<i+1> on the device `wire`."""
    device = "wire"

    def __init__(self):
        self.holders = []
        self._home_fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._home = f"/proc/self/fd/{self._home_fd}"
        try:
            for _ in range(2):
                self.holders.append(hold_network())
            self.ip(0, "link", "add", self.device, "type", "veth", "peer", "name", self.device,
                    "netns", str(self.holders[1].pid))
            for i in range(2):
                self.ip(i, "link", "set", "lo", "up")
                for net in range(2):
                    self.ip(i, "addr", "add", f"10.79.{net}.{i + 1}/24", "dev", self.device)
                self.ip(i, "link", "set", self.device, "up")
        except BaseException:
            self.close()
            raise

    def ip(self, index, *words):
        subprocess.run(["nsenter", "-t", str(self.holders[index].pid), "-n", "ip", *words], check=True)

    def block(self, index, address):
        """Nothing from network `index` reaches the address any more."""
        self.ip(index, "route", "add", "unreachable", f"{address}/32")

    def unblock(self, index, address):
        self.ip(index, "route", "del", "unreachable", f"{address}/32")

    @contextlib.contextmanager
    def inside(self, index):
        """Sockets and processes that this thread makes are of network `index`."""
        _enter(f"/proc/{self.holders[index].pid}/ns/net")
        try:
            yield
        finally:
            _enter(self._home)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        for holder in self.holders:
            holder.kill()
            holder.wait()
        os.close(self._home_fd)


class Capture:
    """What crosses a device from now on: payloads of TCP in order of arrival, by connection and way.
    Make it inside the network whose device it is."""

    def __init__(self, device):
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        with contextlib.suppress(PermissionError):
            self.socket.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self.socket.bind((device, 0))
        self.socket.settimeout(0.2)
        self.streams = {}
        self.done = False
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        while not self.done:
            with contextlib.suppress(TimeoutError):
                ip = self.socket.recv(1 << 17)[14:]
                if len(ip) < 40 or ip[0] >> 4 != 4 or ip[9] != 6:
                    continue
                tcp = ip[(ip[0] & 15) * 4:struct.unpack_from("!H", ip, 2)[0] or len(ip)]
                key = (ip[12:20], tcp[:4])
                self.streams.setdefault(key, bytearray()).extend(tcp[(tcp[12] >> 4) * 4:])

    def stop(self):
        """The streams' bytes."""
        time.sleep(0.3)
        self.done = True
        self.thread.join()
        self.socket.close()
        return [bytes(s) for s in self.streams.values()]


def listening_ports(pid, address):
    """Ports of the address on which somebody listens, in the network of the process."""
    wanted = socket.inet_aton(address)[::-1].hex().upper()
    ports = []
    with open(f"/proc/{pid}/net/tcp") as table:
        for line in table.readlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            host, port = local.split(":")
            if host == wanted and state == "0A":
                ports.append(int(port, 16))
    return ports
