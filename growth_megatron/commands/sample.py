"""``growth-megatron sample``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from growth_megatron.commands.parsing import Subparsers, add_command, add_live_model, announce
from growth_megatron.errors import EXIT_OK, ConfigError

if TYPE_CHECKING:
    from growth_megatron.data.tokenizer import Tokenizer
    from growth_megatron.evaluate.live_model import LiveModel


BETWEEN = "-" * 40
"""Between the texts of several prompts, which may hold empty lines themselves."""


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "sample",
        'growth-megatron sample runs/quickstart "The state of the Union"',
        'growth-megatron sample hf:models/base "One" "Two" --temperature 0 --max-tokens 100',
        "growth-megatron sample runs/a/latest < prompts.txt     # one prompt a line",
        'torchrun --nproc-per-node 4 -m growth_megatron sample runs/a "Once" --tp 2 --pp 2',
    )
    add_live_model(parser)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: the lines of standard input")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="new ones; default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token; default: %(default)s"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw from the likeliest tokens that have P together; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another text; default: 0")


def run(options: argparse.Namespace) -> int:
    _check(options)
    announce(f"reading {options.checkpoint}")
    from growth_megatron.evaluate.opened import opened  # seconds of imports, which a wrong option need not wait for
    from growth_megatron.parallel import collectives

    with opened(options) as (_, model, tokenizer):
        prompts = collectives.on_rank_zero(lambda: _prompts(options))
        texts = write(model, tokenizer, prompts, options)
        if collectives.rank() == 0:
            print(f"\n{BETWEEN}\n".join(texts))
    return EXIT_OK


def write(model: LiveModel, tokenizer: Tokenizer, prompts: list[str], options: argparse.Namespace) -> list[str]:
    """Each prompt with what the model writes behind it.

    Raises: ConfigError for a prompt that leaves too little of the model's length.
    """
    from growth_megatron.evaluate.generation import Sampling, generate

    start = [tokenizer.bos_id] if tokenizer.begins_with_bos else []
    # Nothing yet is what stands behind the end of the document before.
    rows = [[*start, *tokenizer.encode(prompt)] or [tokenizer.eos_id] for prompt in prompts]
    room = model.max_length - max(map(len, rows))
    if room < options.max_tokens:
        raise ConfigError(
            f"--max-tokens {options.max_tokens} and a prompt of {max(map(len, rows))} tokens are above the model's "
            f"length of {model.max_length}; " + (f"give at most {room}" if room > 0 else "shorten the prompt")
        )
    found = generate(
        model,
        rows,
        [options.max_tokens] * len(rows),
        lambda _, ids: ids[-1] == tokenizer.eos_id,
        [Sampling(options.temperature, options.top_p, options.seed, number) for number in range(len(rows))],
    )
    texts = []
    for prompt, row, ids in zip(prompts, rows, found, strict=True):
        row, ids = row[len(start) :], [token for token in ids if token != tokenizer.eos_id]
        # Together, since a piece's leading space shows behind another one only.
        texts.append(prompt + tokenizer.decode([*row, *ids])[len(tokenizer.decode(row)) :])
    return texts


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompts:
        return list(options.prompts)
    if sys.stdin.isatty():
        raise ConfigError('give a PROMPT ("" begins a document), or lines on standard input')
    try:
        prompts = [line.rstrip("\n").encode().decode() for line in sys.stdin]
    except UnicodeError:  # what was no UTF-8 may have come through as half characters
        raise ConfigError("standard input is not UTF-8; convert it (iconv -f ENCODING -t UTF-8)") from None
    if not prompts:
        raise ConfigError('no PROMPT is given, and standard input is empty; "" as PROMPT begins a document')
    return prompts


def _check(options: argparse.Namespace) -> None:
    for name, right, allowed in (
        ("temperature", 0 <= options.temperature < float("inf"), "0 or more"),
        ("top_p", 0 < options.top_p <= 1, "above 0 and at most 1"),
        ("max_tokens", options.max_tokens > 0, "1 or more"),
    ):
        if not right:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name):g}; allowed: {allowed}")
