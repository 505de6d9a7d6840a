"""Where the program, the scripts and the demo model are."""
import functools
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def program():
    return pathlib.Path(os.environ.get("PHALANX_BIN", ROOT / "build/release/phalanx")).resolve()


@functools.cache
def demo_model():
    """The imported demo checkpoint; fetched only if it is not in the cache."""
    named = os.environ.get("PHALANX_TEST_MODEL")
    if named:
        return pathlib.Path(named)
    done = subprocess.run([ROOT / "scripts/fetch_demo_model"], check=True, stdout=subprocess.PIPE,
                          text=True)
    return pathlib.Path(done.stdout.strip().splitlines()[-1])


def clean_environment(**extra):
    """The caller's environment without anything that steers a node, plus `extra`."""
    steering = ("MIES_", "MINDIE_", "HCCL_", "ATB_", "PHALANX_", "RANK", "LOCAL_", "WORLD_SIZE",
                "MASTER_", "HOST_IP", "NPU_", "OMP_", "http_proxy", "https_proxy", "HTTP_PROXY",
                "HTTPS_PROXY")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(steering)}
    environment["PHALANX_THREADS"] = "1"  # more ranks than cores in most tests
    environment.update({k: str(v) for k, v in extra.items()})
    return environment
