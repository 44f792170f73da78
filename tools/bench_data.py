"""How fast `prepare-data` is on this machine: by workers, and beside nothing but the tokenizer.

    python tools/bench_data.py                          30 MB of made-up text, a vocabulary of 8000
    python tools/bench_data.py --input data/corpus --tokenizer data/tokenizer.model --output bench.json

The bare side reads the same lines and encodes them in one process, and writes nothing. Ratios hold on a machine with
other work on it, since the sides take turns; MB are of UTF-8 text.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from growth_megatron.config.tables import columns
from growth_megatron.data.corpus import list_sources, read_documents
from growth_megatron.data.json_tokenizer import open_tokenizer
from growth_megatron.data.prepare import default_workers, prepare_data
from growth_megatron.data.tokenizer import train_tokenizer


def made_up_text(path: Path, megabytes: int) -> Path:
    """Lines of words of Zipf's frequencies."""
    source = random.Random(1)
    words = ["".join(source.choices("etaoinshrdlu", k=source.randint(2, 9))) for _ in range(20_000)]
    frequencies = [1 / rank for rank in range(1, len(words) + 1)]
    with open(path, "w", encoding="utf-8") as stream:
        while stream.tell() < megabytes * 1_000_000:
            stream.write(json.dumps({"text": " ".join(source.choices(words, frequencies, k=2000))}) + "\n")
    return path


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="text; default: made up")
    parser.add_argument("--tokenizer", type=Path, help="default: trained on the input")
    parser.add_argument("--megabytes", type=int, default=30, help="of made-up text")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, default_workers()])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = options.input or made_up_text(folder / "text.jsonl", options.megabytes)
        model = options.tokenizer or train_tokenizer([text], folder / "t.model", 8000, max_bytes=10**7).path
        tokenizer, sources = open_tokenizer(model), list_sources([text])
        sides: dict[str, Callable[[], object]] = {
            "tokenizer alone": lambda: [tokenizer.encode(t) for source in sources for t in read_documents(source)]
        }
        for workers in dict.fromkeys(options.workers):
            sides[f"prepare-data, {workers} worker(s)"] = lambda workers=workers: prepare_data(  # type: ignore[misc]
                [text], model, folder / "out", workers, overwrite=True, progress_stream=io.StringIO()
            )
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(options.turns):
            for side, work in sides.items():
                times[side].append(seconds(work))
        size = prepare_data([text], model, folder / "out", overwrite=True, progress_stream=io.StringIO())
    (description,) = size.outputs.values()
    bare = times["tokenizer alone"]
    figures = {
        side: {
            "to_tokenizer_alone": statistics.median(b / a for a, b in zip(taken, bare, strict=True)),
            "mb_per_s": description.text_bytes / 1e6 / statistics.median(taken),
            "tokens_per_s": description.tokens / statistics.median(taken),
        }
        for side, taken in times.items()
    }
    rows = [("", "speed / tokenizer alone", "MB/s", "tokens/s")]
    for side, found in figures.items():
        rows.append(
            (side, f"{found['to_tokenizer_alone']:.2f}", f"{found['mb_per_s']:.2f}", f"{found['tokens_per_s']:,.0f}")
        )
    print(*columns(rows, right=[1, 2, 3]), f"load average {os.getloadavg()[0]:.1f}", sep="\n")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
