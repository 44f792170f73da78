"""``growth-megatron verify``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from growth_megatron.checkpoint.verify import Check
from growth_megatron.commands.parsing import Subparsers, add_command
from growth_megatron.errors import EXIT_OK, CheckpointError
from growth_megatron.growth.verify import verify_checkpoints


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "verify",
        "growth-megatron verify runs/quickstart",
        "growth-megatron verify runs/quickstart/latest --full",
    )
    parser.add_argument("path", metavar="PATH", help="a checkpoint, a run directory or a Hugging Face folder")
    parser.add_argument("--full", action="store_true", help="every file's checksum and every value of a grown tensor")
    parser.add_argument("--json", action="store_true", help="one object with all checks")


def run(options: argparse.Namespace) -> int:
    verify(Path(options.path), full=options.full, as_json=options.json)
    return EXIT_OK


def verify(path: Path, *, full: bool, as_json: bool) -> None:
    """Check and print: a line for each check as it ends, or one JSON object.

    Raises:
        CheckpointError: something failed; after the last line.
    """
    checks: list[Check] = []
    error: CheckpointError | None = None
    try:
        for check in verify_checkpoints(path, full):
            checks.append(check)
            if not as_json:
                print(check.line, flush=True)
    except CheckpointError as failure:
        error = failure
    if as_json:
        answer = {"ok": error is None, "error": error and str(error), "checks": [check.as_dict() for check in checks]}
        print(json.dumps(answer, indent=1))
    if error is not None:
        raise error
