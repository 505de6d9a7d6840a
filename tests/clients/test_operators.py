"""What operators use: promtool on the metrics, a browser on the page."""
import os
import re
import shutil
import subprocess
import tempfile

import pytest

from support.instance import Instance, fetch

PROMTOOL = shutil.which("promtool") or os.environ.get("PROMTOOL")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# What promtool may say of names that are not ours to choose.
FINDINGS = re.compile(r"metric names should not contain ':'|non-counter metrics should not have \"_total\"|"
                      r"metric names should not contain abbreviated units|"
                      r"counter metrics should have \"_total\" suffix|"
                      r"use base unit|no help text")


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian package prometheus)")
def test_promtool_parses_the_metrics(tmp_path, model):
    with Instance(tmp_path, model, [1, 1]) as instance:
        instance.start(MIES_SERVICE_MONITOR_MODE="1")
        instance.complete("x")
        status, text = instance.get("/metrics", port=instance.metrics_port)
        instance.stop()
    assert status == 200, text
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=text, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=60)
    print(done.stdout)
    assert done.returncode in (0, 3), done.stdout  # 3: findings of style
    for line in done.stdout.splitlines():
        assert FINDINGS.search(line), line
        assert not line.startswith("phalanx_"), line  # of our own names there is none


@pytest.mark.skipif(CHROMIUM is None, reason="needs the Debian package chromium")
def test_the_page_in_a_browser(two_nodes, tmp_path):
    status, page = fetch(f"http://127.0.0.1:{two_nodes.management_port}/")
    assert status == 200 and not re.search(r"(src|href)=", page)
    url = f"http://127.0.0.1:{two_nodes.management_port}/?say=Name+three+colours."
    shot = tmp_path / "page.png"
    options = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--no-first-run", "--disable-background-networking", "--window-size=1200,1000"]

    def browse(*more):
        with tempfile.TemporaryDirectory() as profile:
            done = subprocess.run([*options, f"--user-data-dir={profile}", *more, url], text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=240)
            assert done.returncode == 0, done.stderr[-2000:]
            return done.stdout

    shown = browse("--virtual-time-budget=90000", "--dump-dom")
    assert "127.0.0.1" in shown and "127.0.0.2" in shown, shown[-3000:]
    assert re.search(r"serving, generation \d+", shown) and "<li>none</li>" in shown
    talk = re.search(r'<div id="talk">(.*?)</div>', shown, re.DOTALL)[1]
    assert "Name three colours." in talk and len(talk.split("\n", 1)[1].strip()) > 5, talk
    browse("--virtual-time-budget=90000", f"--screenshot={shot}")
    assert shot.stat().st_size > 10000
    if folder := os.environ.get("PHALANX_SCREENSHOTS"):
        shutil.copy(shot, folder)
