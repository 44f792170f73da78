"""``growth-megatron prepare-data``."""

from __future__ import annotations

import argparse

from growth_megatron.commands.parsing import Subparsers, add_command, add_text_inputs
from growth_megatron.data.prepare import merge_data, prepare_data
from growth_megatron.data.records import Fields
from growth_megatron.errors import EXIT_OK, ConfigError


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "prepare-data",
        "growth-megatron prepare-data data/train --tokenizer data/tokenizer.model --output data/train_8k",
        "growth-megatron prepare-data corpus.jsonl.zst --tokenizer t.model --output data/c --validation-every 100",
        "growth-megatron prepare-data slimpajama/ --tokenizer t.model --output data/s --shard 1/64",
        "growth-megatron prepare-data --merge data/s_*of64.idx --output data/s",
        "growth-megatron prepare-data slimpajama/ --tokenizer t.model --output data/s "
        "--where meta.redpajama_set_name!=RedPajamaGithub",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="SentencePiece model, tokenizer.json, or a folder with one")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one a core")
    parser.add_argument("--validation-every", type=int, metavar="N", help="every N-th document to PREFIX_validation")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--shard", type=_shard, metavar="I/N", help="only every N-th file, to PREFIX_IofN; left alone if there already"
    )
    parts.add_argument("--merge", action="store_true", help="inputs are prepared datasets, joined in their order")
    add_text_inputs(parser)


def run(options: argparse.Namespace) -> int:
    if options.merge:
        prefixes = [name.removesuffix(".idx").removesuffix(".bin") for name in options.inputs]
        prepared = merge_data(prefixes, options.output, overwrite=options.overwrite)
    elif options.tokenizer is None:
        raise ConfigError("name a --tokenizer; growth-megatron train-tokenizer makes one")
    else:
        prepared = prepare_data(
            options.inputs,
            options.tokenizer,
            options.output,
            workers=options.workers,
            validation_every=options.validation_every,
            fields=Fields.parse(options.text_field, options.where),
            shard=options.shard,
            overwrite=options.overwrite,
        )
    for prefix, description in prepared.outputs.items():
        state = "" if prepared.seconds else " (there already)"
        print(f"{prefix}: {description.documents:,} documents, {description.tokens:,} tokens{state}")
    if options.where and prepared.seconds and not options.merge:
        print(f"left out by --where: {prepared.other_records:,} records")
    return EXIT_OK


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, as in 3/64")
    return int(number), int(count)
