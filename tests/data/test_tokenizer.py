"""Training and reading SentencePiece tokenizers."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from growth_megatron.data import tokenizer as module
from growth_megatron.data.corpus import list_sources
from growth_megatron.data.tokenizer import Tokenizer, sample_lines, train_tokenizer
from growth_megatron.errors import DataError


@pytest.mark.parametrize(
    "text", ["plain words", "  leading and  double ", "日本語 and \x00 zero", "a\n\n\tb\r\n", "<s> </s>", "", "1234 5"]
)
def test_decoding_what_was_encoded_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=200))
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    # U+2581 is SentencePiece's own sign for a space, the one character it cannot tell from what it stands for.
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_llamas(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 320)


def test_digits_are_apart(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("12345")) == 5


def test_long_text_is_cut_without_changing_its_ids(tokenizer: Tokenizer) -> None:
    text = "".join(f"the people of the union {number}\nin the year\n\n" for number in range(2000))
    assert len(text) > 8 * module.SHORT_TEXT
    assert tokenizer.encode(text) == tokenizer.encode_whole(text)


def test_a_tokenizer_that_puts_a_space_in_front_is_not_cut(corpus: Path, tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "t"), vocab_size=320, model_type="bpe", byte_fallback=True,
        minloglevel=2, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    reader = Tokenizer(tmp_path / "t.model")
    text = "of the union\n" * 3000
    assert len(text) > module.SHORT_TEXT
    assert reader.encode(text) == reader.encode_whole(text)


def test_training_is_deterministic_and_independent_of_the_place(corpus: Path, tokenizer: Tokenizer, tmp_path: Path):
    elsewhere = tmp_path / "other.jsonl"
    elsewhere.write_bytes(corpus.read_bytes())
    again = train_tokenizer([elsewhere], tmp_path / "again.model", 320)
    assert again.path.read_bytes() == tokenizer.path.read_bytes()


def test_too_large_a_vocabulary_names_the_largest_possible_which_works(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three\n" * 5)
    with pytest.raises(DataError, match="largest possible is (\\d+)") as caught:
        train_tokenizer([tmp_path], tmp_path / "t.model", 5000)
    largest = int(str(caught.value).split("largest possible is ")[1].split(";")[0])
    assert not (tmp_path / "t.model").exists()
    assert train_tokenizer([tmp_path], tmp_path / "t.model", largest).vocab_size == largest


def test_too_small_a_vocabulary_names_the_smallest(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"smallest possible is \d+"):
        train_tokenizer([corpus], tmp_path / "t.model", 100)


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="corpus is empty"):
        train_tokenizer([tmp_path], tmp_path / "t.model", 300)


def test_existing_output_is_kept(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_text("mine")
    with pytest.raises(DataError, match="--overwrite"):
        train_tokenizer([corpus], tmp_path / "t.model", 320)
    assert (tmp_path / "t.model").read_text() == "mine"
    train_tokenizer([corpus], tmp_path / "t.model", 320, overwrite=True)


def test_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.model does not exist.*train-tokenizer"):
        Tokenizer(tmp_path / "nope.model")


@pytest.mark.parametrize("content", [b"", b"garbage" * 10])
def test_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(DataError, match="not an intact SentencePiece model"):
        Tokenizer(tmp_path / "t.model")


def test_flipped_bits_are_a_message_or_a_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    content, path, rng = tokenizer.path.read_bytes(), tmp_path / "flipped.model", random.Random(7)
    refused = 0
    for _ in range(300):
        position = rng.randrange(len(content))
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x80]) + content[position + 1 :])
        try:
            Tokenizer(path).encode("Growth pays.")
        except DataError:
            refused += 1
    assert refused


def test_truncated_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.path.read_bytes()[:2000])
    with pytest.raises(DataError, match="not an intact SentencePiece model"):
        Tokenizer(tmp_path / "t.model")


def test_a_large_corpus_is_thinned_evenly_and_long_lines_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {number:05d}\n" for number in range(10_000)))
    lines = sample_lines(list_sources([tmp_path]), max_bytes=10_000)
    numbers = [int(line.split()[1]) for line in lines]
    assert 4_000 < sum(map(len, lines)) <= 10_000
    assert {b - a for a, b in itertools.pairwise(numbers)} == {16}
    assert numbers[-1] > 9_900
    (tmp_path / "a.txt").write_text("word " * 20_000)
    lines = sample_lines(list_sources([tmp_path]), max_bytes=10**9)
    assert "".join(lines) == "word " * 20_000
    assert max(len(line.encode()) for line in lines) <= module.MAX_SENTENCE_BYTES
