"""A user-space relay between two switches that holds every packet back: delay without netem."""
import fcntl
import heapq
import os
import select
import struct
import threading
import time

TUNSETIFF = 0x400454CA
IFF_TAP_WITHOUT_HEADER = 0x0002 | 0x1000


def open_tap(name):
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP_WITHOUT_HEADER))
    except OSError:
        os.close(fd)
        raise
    return fd


class Relay:
    """Carries packets between the taps `names[0]` and `names[1]`, each `seconds` late, in order. The
    devices vanish with close()."""

    def __init__(self, names, seconds):
        self.seconds = seconds
        self.carried = 0
        self.taps = []
        try:
            for name in names:
                self.taps.append(open_tap(name))
        except OSError:
            self.close_taps()
            raise
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def start(self):
        self.thread.start()

    def run(self):
        late = []     # (when, number, tap, packet)
        while not self.ended.is_set():
            wait = 0.05 if not late else min(0.05, max(0.0, late[0][0] - time.monotonic()))
            readable, _, _ = select.select(self.taps, [], [], wait)
            now = time.monotonic()
            for tap in readable:
                other = self.taps[1 - self.taps.index(tap)]
                try:
                    while True:
                        heapq.heappush(late, (now + self.seconds, self.carried, other,
                                              os.read(tap, 65536)))
                        self.carried += 1
                except BlockingIOError:
                    pass
            while late and late[0][0] <= time.monotonic():
                _, _, tap, packet = heapq.heappop(late)
                try:
                    os.write(tap, packet)
                except OSError:
                    pass   # a queue that is full drops, as a switch does

    def close(self):
        self.ended.set()
        self.thread.join(5)
        self.close_taps()

    def close_taps(self):
        for tap in self.taps:
            os.close(tap)
