"""make demo: two node processes, an answer naming Paris, the ledger, exit status 0."""
import subprocess

from support.paths import ROOT, clean_environment, demo_model


def test_demo_answers_and_shows_the_ledger():
    done = subprocess.run([ROOT / "scripts/demo", "--model", demo_model(), "--expect", "Paris"],
                          env=clean_environment(), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=180)
    assert done.returncode == 0, done.stdout
    for part in ("Daemon start success!", "[127.0.0.1]", "[127.0.0.2]", "Paris", "Ledger",
                 "query heads", "of its share", "all nodes ended with status 0"):
        assert part in done.stdout, f"{part!r} is missing:\n{done.stdout}"


def test_demo_fails_when_the_answer_is_not_the_expected_one():
    done = subprocess.run([ROOT / "scripts/demo", "--model", demo_model(), "--max-tokens", "4",
                           "--expect", "no such word", "--port", "1425"],
                          env=clean_environment(), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=180)
    assert done.returncode == 1, done.stdout
    assert "demo failed: the answer does not name no such word" in done.stdout
