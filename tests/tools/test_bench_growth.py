"""The benchmark of growth runs and its figures are there; what they say of a loaded machine is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.pool import ROOT, TIMEOUT_S, environment

SCRIPT = str(ROOT / "tools" / "bench_growth.py")


def test_a_quick_run_measures_every_part_and_leaves_nothing_behind(tmp_path: Path) -> None:
    figures_file, folder = tmp_path / "figures.json", tmp_path / "scratch"
    folder.mkdir()
    command = [sys.executable, SCRIPT, "--quick", "--directory", str(folder), "--output", str(figures_file)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(figures_file.read_text())
    assert figures["link"]["written_bytes"] < 1e6
    assert figures["depth"]["ratio"] > 0
    assert figures["width"]["noise_ratio"] > 0
    assert 0 < figures["memory"]["peak_bytes"] < 2**28
    assert set(figures["plan"]["seconds"]) == {"link", "write", "imports"}
    assert "--mergekit" in figures["peer"]["skipped"]
    for words in ("<= 1.5", "<= 128 MiB", "of a 70B model"):
        assert words in done.stdout
    assert not list(folder.iterdir())
