"""How good an answer is: ROUGE of what was generated, likelihood of the reference."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hestctl.errors import Exit, HestError

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


@dataclass(frozen=True, slots=True)
class Rouge:
    """F1 scores in points (0 to 100), with stemming."""

    rouge1: float
    rouge2: float
    rouge_l: float
    rouge_lsum: float


class RougeScorer:
    """ROUGE-1, -2, -L and -Lsum by the ``rouge-score`` package.

    Lsum wants one sentence a line: generated text without line breaks is split at sentence ends.
    """

    def __init__(self) -> None:
        from rouge_score.rouge_scorer import RougeScorer as Scorer

        self._scorer = Scorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)

    def score(self, reference: str, generated: str) -> Rouge:
        scores = self._scorer.score(_lines(reference), _lines(generated))
        points = {name: 100 * float(value.fmeasure) for name, value in scores.items()}
        return Rouge(points["rouge1"], points["rouge2"], points["rougeL"], points["rougeLsum"])


def _lines(text: str) -> str:
    text = text.strip()
    return text if "\n" in text else "\n".join(_SENTENCE_END.split(text))


def first_token_of_labels(answers: dict[str, tuple[int, ...]]) -> dict[int, str]:
    """Which label a first answer token stands for.

    Raises HestError (usage) where two labels start with the same token: they could not be told apart.
    """
    first: dict[int, str] = {}
    for label, ids in answers.items():
        other = first.setdefault(ids[0], label)
        if other != label:
            raise HestError(
                f"the labels '{other}' and '{label}' begin with the same token under this tokenizer: "
                "labels are scored by their first token",
                "rename them in the data, so that the first tokens of all labels differ",
                Exit.USAGE,
            )
    return first
