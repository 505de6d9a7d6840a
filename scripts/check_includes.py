#!/usr/bin/env python3
"""Prints every include that points up a floor or across one, and every library header outside its room.

It informs; the review decides. Exit status 1 if there is anything to print.
"""
import pathlib
import re
import sys

FLOORS = [["base"], ["net", "tensor", "text"], ["quant", "comm"], ["ops", "weights", "cluster"],
          ["layers"], ["models"], ["engine"], ["api"]]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# Pairs on one floor, or upwards, that the design names.
ALLOWED = {("cluster", "comm")}
OWNERS = {r"grpcpp?/|google/protobuf": {"cluster"}, r"boost/": {"api"}, r"openssl/": {"net", "api"}, r"uc[pst]/": {"comm"},
          r"nlohmann/json\.hpp": None}  # None: any room, but only in a .cc

root = pathlib.Path(__file__).resolve().parent.parent
complaints = []
for path in sorted([*root.glob("phalanx/**/*.h"), *root.glob("phalanx/**/*.cc"),
                    *root.glob("apps/*.h"), *root.glob("apps/*.cc")]):
    name = path.relative_to(root)
    room = name.parts[1] if name.parts[0] == "phalanx" else "apps"
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        match = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
        if not match:
            continue
        header = match.group(1)
        where = f"{name}:{number}: includes {header}"
        other = re.match(r"phalanx/(\w+)/", header)
        if header.startswith("apps/") and room != "apps":
            complaints.append(f"{where}: a room may not know the program")
        if other and room != "apps" and other.group(1) != room:
            target = other.group(1)
            if FLOOR.get(target, 99) >= FLOOR.get(room, -1) and (room, target) not in ALLOWED:
                complaints.append(f"{where}: {target} is not below {room}")
        for pattern, owners in OWNERS.items():
            if re.match(pattern, header):
                if path.suffix == ".h" and not name.name.endswith("_test.h"):
                    complaints.append(f"{where}: such a header belongs into a .cc")
                if owners is not None and room not in owners:
                    complaints.append(f"{where}: only {', '.join(sorted(owners))} may include it")
print("\n".join(complaints) if complaints else "includes: every arrow points down")
sys.exit(1 if complaints else 0)
