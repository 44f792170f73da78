"""A run's losses and growths from metrics.jsonl, without torch."""

import sys
from pathlib import Path

from growth_megatron.report.curves import summarise
from growth_megatron.train.metrics import read_metrics

if __name__ == "__main__":
    run = Path(sys.argv[1])
    losses = [(record["step"], record["loss"]) for record in read_metrics(run) if record["kind"] == "train"]
    for step, loss in (losses[0], losses[-1]):
        print(f"step {step}: loss {loss:.3f}")
    summary = summarise(run)
    for growth in summary.growths:
        print(f"step {growth.step}: {growth.operator}, {growth.source} -> {growth.target}")
    print(summary.verdict)
