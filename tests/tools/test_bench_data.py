"""The benchmark of data preparation runs, and its figures are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.pool import ROOT, TIMEOUT_S, environment


def test_it_sets_workers_against_the_tokenizer_alone(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    options = ["--megabytes", "1", "--turns", "1", "--workers", "1", "--output", str(output)]
    command = [sys.executable, str(ROOT / "tools" / "bench_data.py"), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(output.read_text())
    assert set(figures) == {"tokenizer alone", "prepare-data, 1 worker(s)"}
    assert all(found["tokens_per_s"] > 0 for found in figures.values())
