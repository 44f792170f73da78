"""An exported folder measured against transformers: its logits and its tokenizer.

Owns: the comparison, the prompt, the limit.
Does not own: the export (``checkpoint.huggingface.writer``), our own forward pass (``model.reference``).

transformers is imported here and nowhere else, when it is asked for. It holds the whole model in float32.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from growth_megatron.config.schema import ModelConfig
from growth_megatron.data.json_tokenizer import open_tokenizer
from growth_megatron.errors import EXIT_FAULT, CheckpointError
from growth_megatron.model.reference import reference_logits
from growth_megatron.model.tensors import TensorSource

LIMIT = 1e-5
"""Largest difference of two logits, relative to the largest logit, in float32."""

_PROMPT_LENGTH = 64
_TEXTS = (
    "The model grows from 6 to 24 layers.",
    "  two spaces,   three,\ttab\nline\n\n  indented: x += 1234567890 ",
    "na\u00efve fa\u00e7ade, \u65e5\u672c\u8a9e, \u041f\u0440\u0438\u0432\u0435\u0442, \U0001f642\u200d\U0001f33e",
    " ",
    "\n",
)


class ExportMismatchError(CheckpointError):
    """An exported folder that does not compute what its source does."""

    exit_code = EXIT_FAULT


def require_transformers() -> None:
    """Raises CheckpointError with the command that installs transformers, if it is not there."""
    if importlib.util.find_spec("transformers") is None:
        raise CheckpointError("--verify needs transformers: pip install 'growth-megatron[hf]' (or transformers itself)")


def prompt(geometry: ModelConfig) -> torch.Tensor:
    """Fixed token ids ``[2, s]`` spread over the whole vocabulary, in no order."""
    length = min(geometry.sequence_length, _PROMPT_LENGTH)
    ids = torch.linspace(0, geometry.vocab_size - 1, 2 * length, dtype=torch.float64).round().long()
    return ids[torch.randperm(2 * length, generator=torch.Generator().manual_seed(1))].view(2, length)


def check_logits(folder: Path, weights: TensorSource, geometry: ModelConfig) -> float:
    """Largest relative difference between transformers' logits of ``folder`` and ours of ``weights``.

    Raises:
        ExportMismatchError: it is above ``LIMIT``, or transformers cannot load the folder as it is.
    """
    tokens = prompt(geometry)
    theirs = _logits_of(folder, tokens)  # [2, s, v]
    ours = reference_logits(weights, geometry, tokens)[..., : geometry.vocab_size]
    if theirs.shape != ours.shape:
        shapes = f"{tuple(theirs.shape)}, not {tuple(ours.shape)}"
        raise ExportMismatchError(f"{folder}: transformers' logits have the shape {shapes}; do not use the export")
    difference = float((theirs - ours).abs().max() / ours.abs().max())
    if not difference <= LIMIT:
        raise ExportMismatchError(
            f"{folder}: transformers' logits differ from the checkpoint's by {difference:.2e} of the largest; allowed: "
            f"{LIMIT:.0e}. Do not use the export; check the source (growth-megatron verify --full) and export again"
        )
    return difference


def check_tokenizer(folder: Path, tokenizer: Path) -> int:
    """Number of texts for which AutoTokenizer on ``folder`` gives the ids that ``tokenizer`` does: all.

    Raises:
        ExportMismatchError: one for which it does not.
    """
    transformers = _transformers()
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
        open_tokenizer(tokenizer),
    )
    for text in _TEXTS:
        found, expected = theirs(text, add_special_tokens=False).input_ids, ours.encode(text)
        if found != expected:
            raise ExportMismatchError(
                f"{folder}: the exported tokenizer gives {found} for {text!r}, {tokenizer} gives {expected}; do not "
                "use the exported one"
            )
    return len(_TEXTS)


def _transformers() -> Any:
    """The library, told to say nothing but errors."""
    library: Any = importlib.import_module("transformers")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


def _logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    transformers = _transformers()
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, trust_remote_code=False
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise ExportMismatchError(f"{folder}: transformers cannot load it ({error}); do not use the export") from None
    model, report = loaded
    left = [f"{what}: {', '.join(sorted(map(str, names)))}" for what, names in report.items() if names]
    if left:
        raise ExportMismatchError(f"{folder}: transformers does not find this model in it ({'; '.join(left)})")
    with torch.no_grad():
        return torch.as_tensor(model.float().eval()(tokens).logits)
