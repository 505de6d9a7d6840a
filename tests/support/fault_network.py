"""Network namespaces for the nodes of a fault suite, on two switches. Needs root."""
import ctypes
import os
import subprocess

from .fault_relay import Relay
from .network import CLONE_NEWNET, hold_network


def ip(*arguments):
    subprocess.run(["ip", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


class Network:
    """`count` namespaces on two bridges in this process's own namespace: 10.99.0.1, 10.99.0.2, ... for
    the control plane and clients, 10.98.0.1, ... for the data plane."""

    def __init__(self, count):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET): root is needed")
        ip("link", "set", "lo", "up")
        for bridge in ("sw", "dw"):
            ip("link", "add", bridge, "type", "bridge")
            ip("link", "set", bridge, "up")
        ip("address", "add", "10.99.0.100/24", "dev", "sw")
        self.holders = []
        for i in range(count):
            holder = hold_network()
            self.holders.append(holder)
            subprocess.run(self.inside(i, "ip", "link", "set", "lo", "up"), check=True)
            for port, bridge, device, address in (("p", "sw", "eth0", self.address(i)),
                                                  ("d", "dw", "eth1", self.data_address(i))):
                ip("link", "add", f"{port}{i}", "type", "veth", "peer", "name", device, "netns",
                   holder.pid)
                ip("link", "set", f"{port}{i}", "master", bridge, "up")
                for command in (("link", "set", device, "up"),
                                ("address", "add", f"{address}/24", "dev", device)):
                    subprocess.run(self.inside(i, "ip", *command), check=True)

    def inside(self, node, *command):
        return ["nsenter", "-t", str(self.holders[node].pid), "-n", *map(str, command)]

    def address(self, node):
        return f"10.99.0.{node + 1}"

    def data_address(self, node):
        return f"10.98.0.{node + 1}"

    def delay(self, node, seconds):
        """Everything on the node's data network comes `seconds` late, either way, until the relay that
        is returned goes to undelay(). OSError where the machine has no TUN devices."""
        relay = Relay((f"near{node}", f"far{node}"), seconds)
        ip("link", "add", f"side{node}", "type", "bridge")
        for device, bridge in ((f"near{node}", f"side{node}"), (f"far{node}", "dw")):
            ip("link", "set", device, "master", bridge, "up")
        ip("link", "set", f"side{node}", "up")
        ip("link", "set", f"d{node}", "master", f"side{node}")
        relay.start()
        return relay

    def undelay(self, node, relay):
        ip("link", "set", f"d{node}", "master", "dw")
        relay.close()
        ip("link", "delete", f"side{node}")

    def close(self):
        for holder in self.holders:
            holder.kill()
            holder.wait()
