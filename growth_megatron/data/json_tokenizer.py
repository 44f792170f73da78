"""Hugging Face tokenizers: a ``tokenizer.json``, or a folder with one.

Owns: which file of a folder is the tokenizer, which of its tokens ends a text, reading by the package ``tokenizers``.
Does not own: what is asked of any tokenizer, SentencePiece models (``tokenizer``).

Text that spells a special token (``</s>``) becomes that token, as everywhere with these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from growth_megatron.data.tokenizer import LONG_TEXT, Tokenizer, tokenizer_file
from growth_megatron.errors import DataError

_USUAL = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>")
"""Of end-of-text tokens, where no file beside the tokenizer names one."""


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at ``path``: a SentencePiece model, a ``tokenizer.json``, or a folder with one of them.

    Raises: DataError where it is missing, damaged, or has no token that ends a text.
    """
    file = tokenizer_file(path)
    return JsonTokenizer(file) if file.suffix == ".json" else Tokenizer(file)


class JsonTokenizer(Tokenizer):
    """A tokenizer.json; the files beside it say which tokens begin and end a text."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(f"tokenizer {path} needs the package tokenizers: pip install tokenizers") from error
        self.path = path
        try:
            self._json: Any = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the package raises nothing more definite
            raise DataError(f"tokenizer {path} is not an intact tokenizer.json ({error}); fetch it again") from error
        self._json.no_truncation()  # some files ask for it
        self._json.no_padding()
        self.vocab_size = max(self._json.get_vocab().values(), default=-1) + 1  # there may be gaps
        self._longest = LONG_TEXT  # its time grows with the length alone
        self.bos_id = self._special("bos")
        self.eos_id = self._special("eos", _USUAL)
        self.begins_with_bos = self.bos_id >= 0 and self.bos_id in self._json.encode("a").ids[:1]
        if self.eos_id < 0:
            raise DataError(
                f"tokenizer {path} has no token that is known to end a text, which separates documents; put a "
                'tokenizer_config.json with "eos_token" beside it'
            )

    def _special(self, name: str, usual: Sequence[str] = ()) -> int:
        ids = (self._json.token_to_id(token) if isinstance(token, str) else token for token in self._named(name, usual))
        return next((number for number in ids if isinstance(number, int)), -1)

    def _named(self, name: str, usual: Sequence[str]) -> Iterator[Any]:
        """Tokens, or ids, that may be the special token ``name``; the likeliest first."""
        for file, key in (
            ("tokenizer_config.json", f"{name}_token"),
            ("special_tokens_map.json", f"{name}_token"),
            ("generation_config.json", f"{name}_token_id"),
            ("config.json", f"{name}_token_id"),
        ):
            try:
                found = json.loads(self.path.with_name(file).read_text(encoding="utf-8")).get(key)
            except (OSError, ValueError, AttributeError):
                continue  # it is optional
            found = found.get("content") if isinstance(found, dict) else found
            yield from found if isinstance(found, list) else [found]
        yield from usual

    @override
    def encode_whole(self, text: str) -> list[int]:
        return list(self._json.encode(text, add_special_tokens=False).ids)

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return str(self._json.decode([int(token) for token in ids], skip_special_tokens=False))
