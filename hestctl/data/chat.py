"""What a tokenizer's chat template writes around a user's text, and text that stays plain text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hestctl.errors import Exit, HestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ASSISTANT = "Zqxuserxqz", "Zqxassistantxqz"
"""Stand-ins for the two turns, to find what a template writes around them."""

_DATE = "26 Jul 2024"
"""For templates that state today's date (Llama 3): prompts must not change overnight."""


@dataclass(frozen=True, slots=True)
class Place:
    """A text alone gets its ids there when it is written after ``lead`` and loses its first ``drop`` ids."""

    lead: str = ""
    drop: int = 0


@dataclass(frozen=True, slots=True)
class Chat:
    """Ids before the user's text, ids between it and the answer, and the id that ends the answer."""

    head: tuple[int, ...]
    tail: tuple[int, ...]
    end: int
    user: Place = Place()
    answer: Place = Place()


def chat_of(tokenizer: PreTrainedTokenizerBase, cue: str) -> Chat:
    """The exchange that the tokenizer's chat template writes; without one, bos, the text and ``cue``.

    Raises HestError for a template that cannot write the two turns, or that changes them.
    """
    end = end_of_turn(tokenizer)
    if not tokenizer.chat_template:
        bos = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id]
        return Chat(tuple(bos), tuple(_ids(tokenizer, cue)), end)
    prompt = _rendered(tokenizer, _USER)
    if not tokenizer.is_fast:
        head, tail = prompt.split(_USER)
        return Chat(tuple(_ids(tokenizer, head)), tuple(_ids(tokenizer, tail)), end)
    before, after, user, _ = _around(tokenizer, prompt, _USER)
    _, _, answer, joined = _around(tokenizer, _rendered(tokenizer, _USER, _ASSISTANT), _ASSISTANT)
    if joined and prompt.endswith(joined):
        answer = Place()
    return Chat(tuple(before), tuple(after), end, user, answer)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The special token that ends an answer: the one the chat template closes a turn with, else eos.

    Raises HestError where the tokenizer has neither.
    """
    if tokenizer.chat_template:
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        closing = _rendered(tokenizer, _USER, _ASSISTANT).rpartition(_ASSISTANT)[2]
        found = next((i for i in _ids(tokenizer, closing) if i in special), None)
        if found is not None:
            return found
    if not isinstance(tokenizer.eos_token_id, int):
        raise HestError("the tokenizer has no end-of-text token", "use a backbone whose tokenizer has one")
    return tokenizer.eos_token_id


def plain_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], place: Place = Place()
) -> list[list[int]]:
    """The ids of each text. Special tokens spelt out in it are plain text: no text can open or close a turn.

    Raises HestError for a tokenizer that writes a special token for plain text all the same.
    """
    if not texts:
        return []
    control = _control_tokens(tokenizer)
    written = [place.lead + text for text in texts]
    rows = tokenizer(written, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [
        (row if control.keys().isdisjoint(row) else _in_pieces(tokenizer, text, control))[place.drop :]
        for row, text in zip(rows, written, strict=True)
    ]


def byte_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """One id a byte (UTF-8) of each text: the tokens that stand for single bytes in the vocabulary.

    Bytes that the vocabulary has no token for (rare control characters in some) read as a question mark.
    Raises HestError (usage) for a tokenizer that has no tokens of bytes.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    known = tokenizer.get_vocab()
    spelt = [f"<0x{byte:02X}>" for byte in range(256)]  # SentencePiece; else the letters of byte-level BPE
    if spelt[0] not in known:
        letters = bytes_to_unicode()  # type: ignore[no-untyped-call]
        spelt = [letters[byte] for byte in range(256)]
    if any(spelt[byte] not in known for byte in range(ord(" "), ord("~") + 1)):
        raise HestError(
            "the tokenizer has no tokens of single bytes", "give --set data.units=tokens", Exit.USAGE
        )
    unknown = known[spelt[ord("?")]]
    ids = [known.get(token, unknown) for token in spelt]
    return [[ids[byte] for byte in text.encode("utf-8")] for text in texts]


def _in_pieces(tokenizer: PreTrainedTokenizerBase, text: str, control: dict[int, str]) -> list[int]:
    """The ids of ``text`` cut inside each control token: ``split_special_tokens`` leaves some whole."""
    longest_first = sorted(control.values(), key=len, reverse=True)
    spelt = re.compile("|".join(map(re.escape, longest_first)))
    cuts = [0, *(match.start() + 1 for match in spelt.finditer(text)), len(text)]
    pieces = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
    rows = tokenizer(pieces, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    row = [token for piece in rows for token in piece]
    for token in row:
        if token in control:
            raise HestError(
                f"the tokenizer writes its control token {control[token]} for plain text",
                "use another backbone: a text could end the turn it stands in",
            )
    return row


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special tokens, and other added tokens that the template writes: id and spelling."""
    template = str(tokenizer.chat_template or "")
    tokens = {
        index: token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in template and len(token.content.strip()) > 1)
    }
    if tokenizer.unk_token_id != tokenizer.eos_token_id:
        tokens.pop(tokenizer.unk_token_id, None)
    return tokens


def _around(
    tokenizer: PreTrainedTokenizerBase, text: str, word: str
) -> tuple[list[int], list[int], Place, str]:
    """The ids before and after ``word`` in ``text``, its place, and what of the text before it joins it."""
    start = text.index(word)
    stop = start + len(word)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    located = list(zip(spans["input_ids"], spans["offset_mapping"], strict=True))
    before = [(token, end) for token, (_, end) in located if end <= start]
    within = [token for token, (begin, end) in located if end > start and begin < stop]
    after = [token for token, (begin, _) in located if begin >= stop]
    joined = text[before[-1][1] if before else 0 : start]
    return [token for token, _ in before], after, _place(tokenizer, within, word, joined), joined


def _place(tokenizer: PreTrainedTokenizerBase, within: list[int], word: str, joined: str) -> Place:
    """What gives ``word`` alone the ids ``within``.

    A space before it may be part of its first token; SentencePiece adds one at the start of any text, which
    a line break before it, dropped again, keeps from happening.
    """
    for lead in ("", joined, "\n"):
        ids = _ids(tokenizer, lead + word)
        drop = len(ids) - len(within)
        if drop >= 0 and ids[drop:] == within and (not drop or ids[:drop] == _ids(tokenizer, lead)):
            return Place(lead, drop)
    return Place()


def _rendered(tokenizer: PreTrainedTokenizerBase, user: str, assistant: str | None = None) -> str:
    """The turns as text; without an answer, up to where the answer begins."""
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": user}]
    if assistant is not None:
        turns.append({"role": "assistant", "content": assistant})
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=assistant is None, date_string=_DATE
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise HestError(f"the chat template fails: {error}", "use a backbone with another template") from None
    if not isinstance(text, str) or any(text.count(turn["content"]) != 1 for turn in turns):
        raise HestError(
            "the chat template does not write each turn once, as it is",
            "use a backbone with another template",
        )
    return text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
