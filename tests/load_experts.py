"""What loading and decoding 4 GB checkpoints with experts over two nodes takes (make bench-load).

    python3 tests/load_experts.py FOLDER

Makes a Mixtral-shaped and a DeepSeek-V3-shaped random checkpoint in FOLDER, one after the other, and
removes each. Fails where a rank reads more than 1.05 times its share, or its memory was ever larger
than 1.1 times its weights and one tensor (and what it needs anyway: activations and the program).
"""
import pathlib
import shutil
import sys
import time

from support.instance import Instance, run_program
from support.paths import demo_model

SHAPES = {
    "mixtral": ["--family", "mixtral", "--layers", 5, "--hidden", 2048, "--heads", 16,
                "--kv-heads", 4, "--intermediate", 8192],
    "deepseek_v3": ["--family", "deepseek_v3", "--layers", 4, "--hidden", 2048, "--heads", 16,
                    "--experts", 64, "--experts-per-token", 8, "--expert-intermediate", 1536],
}
VOCABULARY = 49152  # of the demo model, whose tokenizer is taken
MODEL = "BackendConfig.ModelDeployConfig.ModelConfig[0]"


def memory_of(pid):
    """Bytes: the most ever resident, and what is resident now."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines())
    return tuple(int(values[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS"))


def measure(name, model, folder):
    total = (model / "model.safetensors").stat().st_size
    settings = [f"{MODEL}.npuMemSize=1", "BackendConfig.ModelDeployConfig.maxSeqLen=512",
                "BackendConfig.ModelDeployConfig.maxInputTokenLen=256",
                "BackendConfig.ScheduleConfig.maxPrefillTokens=256",
                "BackendConfig.ScheduleConfig.maxBatchSize=8",
                "BackendConfig.ScheduleConfig.maxPrefillBatchSize=8",
                "BackendConfig.ScheduleConfig.maxN=8"]
    if name == "mixtral":
        settings += [f"{MODEL}.moe_ep=2", f"{MODEL}.moe_tp=1"]
    largest = VOCABULARY * 2048 * 2  # the embedding
    begin = time.monotonic()
    failures = []
    with Instance(folder / f"{name}-nodes", model, [1, 1], settings) as instance:
        for index in (0, 1):
            instance.start_node(index)
        instance.wait_serving(600)
        seconds = time.monotonic() - begin
        ranks = instance.ranks()
        for rank in ranks:
            peak, now = memory_of(rank["pid"])
            share = total / len(ranks)
            read = rank["bytes_read"] / share
            allowed = 1.1 * rank["weight_bytes"] + largest
            print(f"{name}, rank {rank['rank']}: {rank['bytes_read'] / 1e9:.3f} GB read, {read:.3f} of "
                  f"its share; weights {rank['weight_bytes'] / 1e9:.3f} GB, most ever resident "
                  f"{peak / 1e9:.3f} GB ({peak / rank['weight_bytes']:.3f} of the weights), now "
                  f"{now / 1e9:.3f} GB; allowed {allowed / 1e9:.3f} GB", flush=True)
            if read > 1.05:
                failures.append(f"rank {rank['rank']} read {read:.3f} of its share")
            if peak > allowed:
                failures.append(f"rank {rank['rank']}: {peak} bytes, allowed {allowed:.0f}")
        begin = time.monotonic()
        answer = instance.complete("The capital of France is", max_tokens=32)
        took = time.monotonic() - begin
        print(f"{name}: {total / 1e9:.2f} GB loaded and ready after {seconds:.1f} s; 32 tokens in "
              f"{took:.2f} s ({len(answer.text)} characters)", flush=True)
        instance.stop(10)
    return failures


def main(folder):
    failures = []
    for name, shape in SHAPES.items():
        model = folder / name
        try:
            done = run_program("make-random-model", model, *shape, "--vocab", VOCABULARY,
                               "--tokenizer-from", demo_model(), seconds=600)
            if done.returncode != 0:
                raise SystemExit(done.stderr)
            failures += measure(name, model, folder)
        finally:
            shutil.rmtree(model, ignore_errors=True)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())
