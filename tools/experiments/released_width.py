"""A checkpoint twice as wide by the mapping of the paper's released code, re-created to be compared with ours.

    python tools/experiments/released_width.py BASE CHECKPOINT      (in the folder of the experiments)

What that code (``prts_lit/scaling/bert2bert.py``, its branch that draws at random) does for hidden sizes d to 2 d:

- every axis of size d gets d more coordinates, copies of coordinates drawn with repetition, the same draw everywhere;
- columns that read a copied coordinate are divided by the number of its copies, norms' gains are copied;
- the ffn's new units copy those of the draw repeated, which names its first d units only;
- the fused q, k, v rows (per head q, k, v) get 3 d more: the draw three times over, which names its first d rows only,
  so that a new head's queries, keys and values are mixed out of some heads' queries and keys.

The draw's seed is BASE's own. It is written as a Hugging Face folder beside CHECKPOINT, and imported from there.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CLI = (sys.executable, "-m", "growth_megatron")
Weights = dict[str, torch.Tensor]


def widened(weights: Weights, draw: list[int], head_dim: int) -> Weights:
    """``weights`` (Hugging Face names) of hidden size ``len(draw)`` at twice that, heads and ffn too."""
    size = len(draw)
    residual = [*range(size), *draw]
    found = {}
    for name, weight in weights.items():
        if name.endswith(("norm.weight",)):
            found[name] = weight[residual]
        elif name.endswith(("embed_tokens.weight",)):
            found[name] = weight[:, residual]
        elif name.endswith("lm_head.weight"):
            found[name] = _shared(weight, residual)
        elif name.endswith(("gate_proj.weight", "up_proj.weight")):
            found[name] = _shared(weight, residual)[_units(len(weight), draw)]
        elif name.endswith("down_proj.weight"):
            found[name] = _shared(weight, _units(weight.shape[1], draw))[residual]
        elif name.endswith("o_proj.weight"):
            found[name] = _shared(weight, residual)[residual]
        elif name.endswith("q_proj.weight"):
            prefix = name.removesuffix("q_proj.weight")
            names = [f"{prefix}{letter}_proj.weight" for letter in "qkv"]
            fused = _fused([weights[each] for each in names], head_dim)
            rows = [*range(len(fused)), *draw * 3]
            found |= dict(zip(names, _parted(_shared(fused, residual)[rows], head_dim), strict=True))
    return found


def _units(size: int, draw: list[int]) -> list[int]:
    return [*range(size), *(draw * 4)[:size]]


def _shared(weight: torch.Tensor, columns: list[int]) -> torch.Tensor:
    """Columns copied, each divided by how often it stands there."""
    counts = torch.bincount(torch.tensor(columns), minlength=weight.shape[1])
    return (weight / counts)[:, columns]


def _fused(parts: list[torch.Tensor], head_dim: int) -> torch.Tensor:
    """q, k and v as rows of q, k, v head by head."""
    return torch.stack([part.view(-1, head_dim, part.shape[1]) for part in parts], dim=1).flatten(0, 2)


def _parted(fused: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
    return [part.flatten(0, 1) for part in fused.view(-1, 3, head_dim, fused.shape[1]).unbind(1)]


def main(base: str, checkpoint: str) -> None:
    if Path(checkpoint).exists():
        return
    source, target = (Path(f"{checkpoint}_{name}_hf") for name in ("base", "wide"))
    if not source.exists():
        subprocess.run([*CLI, "export-hf", base, str(source)], check=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    size, heads = config["hidden_size"], config["num_attention_heads"]
    draw = random.Random(base).choices(range(size), k=size)
    wide = widened(load_file(source / "model.safetensors"), draw, size // heads)
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    target.mkdir(exist_ok=True)
    text = json.dumps({**config, **{key: 2 * config[key] for key in keys}}, indent=1)
    (target / "config.json").write_text(text + "\n", encoding="utf-8")
    save_file(wide, target / "model.safetensors")
    subprocess.run([*CLI, "import-hf", str(target), checkpoint], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
