"""Texts as the tokens of their bytes, which is what Long Range Arena's reviews are."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hestctl.data.chat import byte_ids
from hestctl.data.examples import Example
from hestctl.data.prompts import encode
from hestctl.errors import HestError
from hestctl.settings import DataSettings

SETTINGS = DataSettings(max_tokens=512, max_answer_tokens=64)


def byte_level(*left_out: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE that knows whole words and single bytes, as far as they are not ``left_out``."""
    letters = [letter for byte, letter in bytes_to_unicode().items() if byte not in left_out]
    merges = [("g", "o"), ("go", "o"), ("goo", "d")]
    vocabulary = [*letters, "go", "goo", "good", "<end>"]
    model = BPE({token: place for place, token in enumerate(vocabulary)}, merges)
    inner = Tokenizer(model)
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def test_reviews_are_read_byte_by_byte_and_their_question_is_not() -> None:
    tokenizer = byte_level(0x04)
    review = Example("x", "good\x04 na\u00efve", "good", "good")
    told = {}
    for source, units in (("lra-text", "auto"), ("lra-text", "tokens"), ("own.csv", "bytes")):
        settings = SETTINGS.model_copy(update={"source": source, "units": units, "instruction": "good?"})
        (row,) = encode([review], tokenizer, settings, task="classify", labels=("good", "bad"))
        told[source, units] = row
        assert tokenizer.decode(row.answer_ids) == "good<end>"
    read = told["lra-text", "auto"]
    assert read.prompt_ids == told["own.csv", "bytes"].prompt_ids
    turn = [tokenizer.convert_ids_to_tokens(i) for i in read.prompt_ids]
    assert turn[:5] == ["good", "?", "\u010a", "\u010a", "g"]
    # A byte that the vocabulary has no token for is a question mark, and every other one itself.
    assert tokenizer.decode(read.prompt_ids).startswith("good?\n\ngood? na\u00efve")
    assert len(read.prompt_ids) == len(told["lra-text", "tokens"].prompt_ids) + 3 + 1


def test_bytes_are_cut_to_the_limit() -> None:
    settings = DataSettings(source="lra-text", instruction="good?", max_tokens=60, max_answer_tokens=8)
    (row,) = encode(
        [Example("x", "a" * 500, "good", "good")], byte_level(), settings, task="classify", labels=("good",)
    )
    assert len(row.prompt_ids) == 52
    assert row.truncated_tokens == 500 - (52 - len("\n\nAnswer:\n") - len(["good", "?", "\n", "\n"]))


def test_a_vocabulary_without_bytes_is_refused() -> None:
    with pytest.raises(HestError, match="no tokens of single bytes") as caught:
        byte_ids(byte_level(ord("q")), ["text"])
    assert caught.value.hint == "give --set data.units=tokens"


def test_sentencepiece_spells_bytes_in_hexadecimal() -> None:
    words = {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"<unk>": 0}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")))
    assert byte_ids(tokenizer, ["a\u00ef", ""]) == [[0x62, 0xC4, 0xB0], []]
