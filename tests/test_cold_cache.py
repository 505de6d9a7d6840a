"""With a cold page cache each rank takes its own share off the disk, and nothing else."""
import os
import shutil

import pytest

from support.instance import Instance


def evict(folder):
    """Drops the cached pages of the files; needs no privilege."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def io_of(pid):
    with open(f"/proc/{pid}/io", encoding="ascii") as file:
        return {key: int(value) for key, value in
                (line.split(": ") for line in file.read().splitlines())}


def test_ranks_read_their_share_from_disk(tmp_path, model):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    evict(copy)
    with Instance(tmp_path / "nodes", copy, [1, 1]) as instance:
        instance.start()
        ranks = instance.ranks()
        io = [io_of(rank["pid"]) for rank in ranks]
        instance.stop()
    if all(counts["read_bytes"] < 0.05 * rank["bytes_to_read"]
           for counts, rank in zip(io, ranks)):
        pytest.skip("the file system of the temporary folder reads from memory")
    for rank, counts in zip(ranks, io):
        share = rank["bytes_to_read"]
        assert 0.9 * share < counts["read_bytes"] <= 1.05 * share, (rank["rank"], counts, share)
        assert counts["rchar"] <= 1.05 * share, (rank["rank"], counts, share)
