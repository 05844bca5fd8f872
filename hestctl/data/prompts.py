"""Samples as token ids: prompts with the answer apart, and padded batches.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hestctl.data.chat import Chat, byte_ids, chat_of, end_of_turn, plain_ids
from hestctl.data.examples import Example, Task
from hestctl.errors import Exit, HestError
from hestctl.settings import DataSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "Encoded",
    "PromptBatch",
    "TrainBatch",
    "encode",
    "end_of_turn",
    "instruction",
    "label_answers",
    "prompt_batch",
    "train_batch",
]

IGNORED = -100
"""The label of a position that the loss leaves out."""

_SUMMARISE = "Summarize the following news article in two or three short sentences, one per line."
_REVIEW = "Is the sentiment of the following review negative or positive? Answer with one word."
_LISTOPS = (
    "Evaluate the following expression. MIN is the smallest of its arguments, MAX the largest, "
    "MED their median rounded down, SM their sum modulo 10. Answer with one digit."
)
_CLASSIFY = "Classify the following text. Answer with one of: {labels}."
_OF_SOURCE = {"lra-text": _REVIEW, "lra-listops": _LISTOPS}
_CUES: dict[Task, str] = {"summarise": "\n\nSummary:\n", "classify": "\n\nAnswer:\n"}
"""What follows the text where the tokenizer has no chat template."""

_AT_ONCE = 512
"""Samples tokenised in one call: enough for the tokenizer's threads, little to hold besides the result."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample in tokens.

    ``answer_ids`` ends with the end-of-turn token. ``truncated_tokens`` counts what was cut from the text
    and from the answer to fit the limits. ``reference`` is the answer uncut.
    """

    sample_id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    truncated_tokens: int
    reference: str
    label: str | None


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Prompts with their answers, padded on the right.

    ``input_ids``, ``attention_mask``, ``labels`` (B, T) int64; ``labels`` is -100 outside the answer.
    ``prompt_tokens``, ``answer_tokens`` (B,) int64.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    prompt_tokens: torch.Tensor
    answer_tokens: torch.Tensor

    def to(self, device: torch.device) -> TrainBatch:
        return TrainBatch(*(getattr(self, name).to(device) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts padded on the left: ``input_ids``, ``attention_mask`` (B, T), ``prompt_tokens`` (B,) int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt_tokens: torch.Tensor


def instruction(task: Task, labels: Sequence[str] = (), settings: DataSettings | None = None) -> str:
    """What the model is asked to do with the text that follows; ``settings`` may have words of their own."""
    if settings is not None and settings.instruction is not None:
        return settings.instruction
    if task == "summarise":
        return _SUMMARISE
    if settings is not None and settings.source in _OF_SOURCE:
        return _OF_SOURCE[settings.source]
    return _CLASSIFY.format(labels=", ".join(labels))


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    task: Task,
    labels: Sequence[str] = (),
) -> list[Encoded]:
    """Every example as a prompt and an answer, in order.

    The user's turn is ``instruction``, a blank line and the text, within the tokenizer's chat template
    (without one: bos if the tokenizer sets it, that turn, a blank line, and ``Summary:`` or ``Answer:`` on
    a line of its own). The text is cut at its end so that the prompt has at most ``max_tokens -
    max_answer_tokens`` tokens whatever its answer's length: a prompt tells nothing of its answer. Special
    tokens spelt out in a text or an answer stay plain text. In ``units`` of bytes a text is the tokens of its
    bytes, the words around it those of the tokenizer.

    Raises HestError (usage) where the limits leave no room for a text or for a whole label, and for a
    tokenizer without tokens of bytes where they are wanted.
    """
    chat = chat_of(tokenizer, _CUES[task])
    request = f"{instruction(task, labels, settings)}\n\n"
    (asked,) = plain_ids(tokenizer, [request], chat.user)
    room = _room(settings, chat, len(asked))
    in_bytes = settings.units == "bytes" or (settings.units == "auto" and settings.source == "lra-text")
    one: dict[int, int] = {}  # a token id is one object, however often it occurs
    encoded: list[Encoded] = []
    for start in range(0, len(examples), _AT_ONCE):
        chunk = examples[start : start + _AT_ONCE]
        texts = [example.text.strip() for example in chunk]
        if in_bytes:
            turns = [asked + text for text in byte_ids(tokenizer, texts)]
        else:
            turns = plain_ids(tokenizer, [request + text for text in texts], chat.user)
        answers = plain_ids(tokenizer, [example.answer for example in chunk], chat.answer)
        for example, turn, answer in zip(chunk, turns, answers, strict=True):
            longest = settings.max_answer_tokens - 1
            if task == "classify" and len(answer) > longest:
                raise HestError(
                    f"the label '{example.answer}' does not fit data.max_answer_tokens = {longest + 1}",
                    f"set data.max_answer_tokens to {len(answer) + 1} or more",
                    Exit.USAGE,
                )
            encoded.append(
                Encoded(
                    sample_id=example.sample_id,
                    prompt_ids=(*chat.head, *(one.setdefault(i, i) for i in turn[:room]), *chat.tail),
                    answer_ids=(*(one.setdefault(i, i) for i in answer[:longest]), chat.end),
                    truncated_tokens=max(len(turn) - room, 0) + max(len(answer) - longest, 0),
                    reference=example.answer,
                    label=example.label,
                )
            )
    return encoded


def label_answers(labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, ...]]:
    """What ``encode`` writes as the answer of each label: its ids and the end-of-turn token."""
    chat = chat_of(tokenizer, _CUES["classify"])
    rows = plain_ids(tokenizer, labels, chat.answer)
    return {label: (*row, chat.end) for label, row in zip(labels, rows, strict=True)}


def train_batch(rows: Sequence[Encoded], pad_id: int) -> TrainBatch:
    """Prompt and answer of each row, padded on the right to the longest. Raises ValueError without rows."""
    import torch

    length = max(len(row.prompt_ids) + len(row.answer_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for index, row in enumerate(rows):
        start, stop = len(row.prompt_ids), len(row.prompt_ids) + len(row.answer_ids)
        input_ids[index, :stop] = torch.tensor(row.prompt_ids + row.answer_ids)
        attention_mask[index, :stop] = 1
        labels[index, start:stop] = input_ids[index, start:stop]
    return TrainBatch(
        input_ids,
        attention_mask,
        labels,
        prompt_tokens=torch.tensor([len(row.prompt_ids) for row in rows]),
        answer_tokens=torch.tensor([len(row.answer_ids) for row in rows]),
    )


def prompt_batch(rows: Sequence[Encoded], pad_id: int) -> PromptBatch:
    """The prompt of each row, padded on the left to the longest. Raises ValueError without rows."""
    import torch

    length = max(len(row.prompt_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        start = length - len(row.prompt_ids)
        input_ids[index, start:] = torch.tensor(row.prompt_ids)
        attention_mask[index, start:] = 1
    return PromptBatch(input_ids, attention_mask, torch.tensor([len(row.prompt_ids) for row in rows]))


def _room(settings: DataSettings, chat: Chat, request_tokens: int) -> int:
    """Tokens for the user's turn, of which the request takes ``request_tokens``."""
    room = settings.max_tokens - settings.max_answer_tokens - len(chat.head) - len(chat.tail)
    if room > request_tokens:
        return room
    own = len(chat.head) + len(chat.tail) + request_tokens
    raise HestError(
        f"data.max_tokens = {settings.max_tokens} leaves no room for a text: the prompt itself takes {own} "
        f"tokens and data.max_answer_tokens {settings.max_answer_tokens}",
        f"set data.max_tokens to {own + settings.max_answer_tokens + 1} at the very least",
        Exit.USAGE,
    )
