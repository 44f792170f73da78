"""``growth-megatron grow``: its arguments. What it does with them is in ``commands.growth``."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

from growth_megatron.commands.growth import grow, plan_grow
from growth_megatron.commands.growth_request import read_request
from growth_megatron.commands.parsing import Subparsers, add_command, add_dtype, add_overwrite
from growth_megatron.errors import EXIT_OK, ConfigError
from growth_megatron.growth.operators import names_by_side


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "grow",
        "growth-megatron grow runs/a/latest runs/b/start --set num_layers=24",
        "growth-megatron grow runs/a/latest runs/b/start --layers '1-234*7-56' --optimizer-state carry",
        "growth-megatron grow runs/a/latest --set num_layers=24 hidden_size=2048 --plan",
        "growth-megatron grow runs/a/latest runs/b/start --operator identity+split --set num_layers=12 "
        "hidden_size=1024 num_attention_heads=16 ffn_hidden_size=2816 shares=uneven",
        "growth-megatron grow hf:models/base hf:models/grown --operator solar --set num_layers=48",
        "torchrun --nproc-per-node 8 -m growth_megatron grow runs/a/latest runs/b/start --config growth.yaml",
    )
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint, RUN/latest, a run, or hf:DIR")
    parser.add_argument(
        "target", metavar="TARGET", nargs="?", help="folder to be made; hf:DIR for a Hugging Face folder"
    )
    _add_growth_options(parser)
    parser.add_argument(
        "--plan",
        action="store_true",
        help="say what the growth would do and cost, from metadata alone, and write nothing; TARGET may be left out",
    )
    parser.add_argument("--json", action="store_true", help="with --plan: machine-readable, sizes in bytes")


def _add_growth_options(parser: argparse.ArgumentParser) -> None:
    names = "; ".join(f"{side}: {', '.join(names)}" for side, names in names_by_side().items())
    parser.add_argument("--operator", metavar="NAME", help=f"{names}; or DEPTH+WIDTH; default: direct")
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="a=b",
        help="num_layers, hidden_size, num_attention_heads, num_query_groups, head_dim, ffn_hidden_size, "
        "tie_embeddings, norm_epsilon; order=interleaved|tiled, shares=even|uneven, cancelling_noise=X, noise=X, "
        "ramp={heads: [0, 500]}, multipliers=true",
    )
    parser.add_argument(
        "--layers",
        metavar="LIST",
        help="source layers: from 0, as 0,1,0,1 or 0-23,6-29 or '0-3 x6'; or the paper's 1-234*7-56",
    )
    parser.add_argument(
        "--optimizer-state",
        choices=["reset", "carry", "asymmetric"],
        help="default: reset (masked: carry, sparkling: asymmetric)",
    )
    parser.add_argument("--maps", metavar="PATH", help="learned maps: their file, or a checkpoint grown by them")
    parser.add_argument("--seed", type=int, help="of new weights, noise and uneven shares; default: 0")
    parser.add_argument("--config", metavar="GROWTH.yaml", help="model:, growth: and seed: as above; options go first")
    parser.add_argument("--materialize", action="store_true", help="write all data, also where links would do")
    add_dtype(parser, "of an hf: TARGET's weights; default: as in the source")
    parser.add_argument("--tokenizer", metavar="PATH", help="of an hf: TARGET; default: the source's")
    parser.add_argument("--verify-source", action="store_true", help="read and sum the files that are linked, too")
    add_overwrite(parser)


def run(options: argparse.Namespace) -> int:
    if options.plan:
        # Hundreds of thousands of small values and no cycles: looking for some would take longer than the plan.
        gc.disable()
    elif options.target is None:
        raise ConfigError("name a TARGET, the folder to be made; or add --plan to see what the growth would do")
    elif options.json:
        raise ConfigError("--json goes with --plan; leave it out, or add --plan")
    request = read_request(
        Path(options.config) if options.config else None,
        settings=options.settings,
        operator=options.operator,
        layers=options.layers,
        optimizer_state=options.optimizer_state,
        seed=options.seed,
        maps=Path(options.maps) if options.maps else None,
    )
    how = {"materialize": options.materialize, "overwrite": options.overwrite, "dtype": options.dtype}
    if options.plan:
        plan_grow(options.source, options.target, request, as_json=options.json, **how)
    else:
        tokenizer = Path(options.tokenizer) if options.tokenizer else None
        grow(options.source, options.target, request, verify_source=options.verify_source, tokenizer=tokenizer, **how)
    return EXIT_OK
