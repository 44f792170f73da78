"""``growth-megatron guideline``: needs no torch."""

from __future__ import annotations

import argparse
import dataclasses
import json

from growth_megatron.commands.parsing import Subparsers, add_command
from growth_megatron.config.units import format_count
from growth_megatron.errors import EXIT_OK, ConfigError
from growth_megatron.report.guideline import guideline


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "guideline", "growth-megatron guideline --params 7e9 --tokens 2e12")
    parser.add_argument("--params", type=float, required=True, metavar="N", help="parameters of the grown model: 7e9")
    parser.add_argument("--tokens", type=float, required=True, metavar="D", help="it is to be trained on: 2e12")
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> int:
    try:
        found = guideline(options.params, options.tokens)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"--params, --tokens: {error}; write them as 7e9 and 2e12") from None
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
        return EXIT_OK
    tokens, parameters = format_count(found.growth_tokens), format_count(found.parameters)
    factor = found.growth_factor
    print(
        f"Train a base of 1/{factor} of the layers on {tokens} tokens, then grow it by {factor} with stack (G_stack, "
        f"arXiv 2405.15319): {parameters} parameters, {format_count(found.tokens)} tokens, {found.flops:.3g} FLOPs "
        "(6 N D)."
    )
    if not found.is_covered:
        print(
            "warning: this is no advice for so small a target: below what it was fitted to the formula rises without "
            "bound. Measure it: growth-megatron probe RUN --candidates growths.yaml --steps N"
        )
    for warning in found.warnings:
        print(f"warning: {warning}")
    return EXIT_OK
