"""Tokenizer files of a Hugging Face folder, made from a SentencePiece model or taken over from another folder.

Owns: tokenizer.json with the same ids as the SentencePiece model gives, and the files that go with it.
Does not own: the SentencePiece model itself (``data.tokenizer``).

Only byte-pair models without normalisation are translated; LLaMA's and those of ``train-tokenizer`` are such. Text that
spells a special token (``</s>``) becomes that token in transformers, as everywhere there, and plain text here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from growth_megatron.checkpoint.huggingface.config import CONFIG_NAME, TokenIds, read_config
from growth_megatron.config.schema import ModelConfig
from growth_megatron.data.json_tokenizer import open_tokenizer
from growth_megatron.data.tokenizer import Tokenizer
from growth_megatron.errors import CheckpointError, DataError

MODEL_NAME, IDS_NAME = "tokenizer.model", "generation_config.json"
COPIED_NAMES = (
    "tokenizer.json",
    MODEL_NAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

_MODEL: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # generated, without types
_SPACE = "\u2581"  # SentencePiece's mark of a space


@dataclass(frozen=True)
class TokenizerFiles:
    """Files to be put into a folder: by content, or copied from where they lie; and the ids that config.json names."""

    written: Mapping[str, bytes] = field(default_factory=dict)
    copied: Mapping[str, Path] = field(default_factory=dict)
    ids: TokenIds = field(default_factory=TokenIds)
    origin: str | None = None


def tokenizer_files(tokenizer: Path | None, geometry: ModelConfig) -> TokenizerFiles:
    """The files for ``tokenizer``: a SentencePiece model, a tokenizer.json, a folder, or nothing.

    Raises:
        CheckpointError: a SentencePiece model that cannot be translated, or one larger than the model's vocabulary.
        DataError: a file that is not a SentencePiece model.
    """
    if tokenizer is None:
        return TokenizerFiles()
    if tokenizer.is_dir() or tokenizer.suffix == ".json":
        copied = _files_of(tokenizer)
        return TokenizerFiles(copied=copied, ids=_ids_of(tokenizer), origin=str(tokenizer) if copied else None)
    model = SentencePieceModel(tokenizer)
    if len(model.pieces) > geometry.vocab_size:
        raise CheckpointError(
            f"{tokenizer} has {len(model.pieces)} entries, the model's vocabulary {geometry.vocab_size}; give the "
            "tokenizer that the model was trained with"
        )
    documents = {
        "tokenizer.json": tokenizer_json(model),
        "tokenizer_config.json": _tokenizer_config(model, geometry),
        "special_tokens_map.json": model.special_tokens,
    }
    written = {name: json.dumps(content, indent=1, ensure_ascii=False).encode() for name, content in documents.items()}
    ids = TokenIds(model.id_or_none("bos_token"), model.id_or_none("eos_token"))
    return TokenizerFiles(written, {MODEL_NAME: tokenizer}, ids, str(tokenizer))


def stored_tokenizer(tokenizer: Path) -> dict[str, bytes]:
    """The files by which a checkpoint keeps ``tokenizer``, by name: its own, and one that names the special ids."""
    if tokenizer.is_file() and tokenizer.suffix != ".json":
        return {MODEL_NAME: tokenizer.read_bytes()}
    stored = {name: path.read_bytes() for name, path in _files_of(tokenizer).items()}
    ids = {f"{name}_token_id": value for name, value in asdict(_ids_of(tokenizer)).items() if value is not None}
    return stored | ({IDS_NAME: json.dumps(ids, indent=1).encode()} if ids else {})


def _files_of(tokenizer: Path) -> dict[str, Path]:
    """Of a folder, or of a tokenizer.json and what lies beside it."""
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    found = {name: folder / name for name in COPIED_NAMES if (folder / name).is_file()}
    return found if tokenizer.is_dir() else {**found, "tokenizer.json": tokenizer}


def _ids_of(tokenizer: Path) -> TokenIds:
    """As the model's configuration has them, else as the tokenizer's."""
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    for name in (CONFIG_NAME, IDS_NAME):
        if (folder / name).is_file() and (ids := TokenIds.of_config(read_config(folder, name))) != TokenIds():
            return ids
    with suppress(DataError):
        opened = open_tokenizer(tokenizer)
        return TokenIds(opened.bos_id if opened.bos_id >= 0 else None, opened.eos_id)
    return TokenIds()


class SentencePieceModel:
    """What is needed of a SentencePiece model file beyond what its processor tells: kinds of pieces and options.

    Raises:
        CheckpointError: from the constructor, for a model other than byte-pair without normalisation.
    """

    def __init__(self, path: Path) -> None:
        tokenizer = Tokenizer(path)  # refuses a damaged file
        model = _MODEL.FromString(path.read_bytes())
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        self.pieces = list(model.pieces)
        self.adds_prefix = bool(normalizer.add_dummy_prefix)
        unknown = next((number for number, piece in enumerate(self.pieces) if piece.type == piece.UNKNOWN), -1)
        self._ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": unknown}
        checks = {
            "it is no byte-pair model": trainer.model_type != trainer.BPE,
            "it normalises characters": bool(normalizer.precompiled_charsmap),
            "it removes extra spaces": normalizer.remove_extra_whitespaces,
            "it marks spaces in another way": trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces,
        }
        if problems := [text for text, is_so in checks.items() if is_so]:
            raise CheckpointError(
                f"{path} cannot be written as tokenizer.json: {', '.join(problems)}; allowed: byte-pair models without "
                "normalisation, as train-tokenizer makes them. Export without it and convert it yourself"
            )

    @property
    def special_tokens(self) -> dict[str, str]:
        """Role -> piece, for the roles that the model has."""
        return {role: self.pieces[number].piece for role, number in self._ids.items() if number >= 0}

    def id_or_none(self, role: str) -> int | None:
        """Id of a role such as ``bos_token``; None if the model has none."""
        return self._ids[role] if self._ids[role] >= 0 else None

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        """Pieces that are matched whole, before any merging."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": number, "content": piece.piece, **flags, "special": piece.type != piece.USER_DEFINED}
            for number, piece in enumerate(self.pieces)
            if piece.type in (piece.UNKNOWN, piece.CONTROL, piece.USER_DEFINED)
        ]

    def merges(self) -> list[list[str]]:
        """Pairs in the order in which they are merged.

        SentencePiece joins the neighbours whose union scores highest; so every pair that makes a piece ranks with it.
        """
        ids = {piece.piece: number for number, piece in enumerate(self.pieces) if piece.type == piece.NORMAL}
        ranked = []
        for text, number in ids.items():
            pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
            known = [(ids[left], ids[right], left, right) for left, right in pairs if left in ids and right in ids]
            ranked += [(-self.pieces[number].score, number, *pair) for pair in known]
        return [[left, right] for *_, left, right in sorted(ranked)]


def tokenizer_json(model: SentencePieceModel) -> dict[str, Any]:
    """tokenizer.json of the ``tokenizers`` library."""
    to_mark: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    from_mark: dict[str, Any] = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    decoders: list[dict[str, Any]] = [from_mark, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.adds_prefix:
        to_mark = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, to_mark]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": model.added_tokens,
        "normalizer": to_mark,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.special_tokens.get("unk_token"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.type == piece.BYTE for piece in model.pieces),
            "ignore_merges": False,
            "vocab": {piece.piece: number for number, piece in enumerate(model.pieces)},
            "merges": model.merges(),
        },
    }


def _tokenizer_config(model: SentencePieceModel, geometry: ModelConfig) -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": model.adds_prefix,
        "added_tokens_decoder": {
            str(entry["id"]): {name: value for name, value in entry.items() if name != "id"}
            for entry in model.added_tokens
        },
        **model.special_tokens,
        "clean_up_tokenization_spaces": False,
        "model_max_length": geometry.max_position_embeddings,
        # LlamaTokenizer would build normalizer and decoder anew instead of reading tokenizer.json
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
