"""The evaluation whose tensors a training ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hestctl.training.loop import Trainer


class Best:
    """The best evaluation so far, its tensors, and how long none was better.

    ``ratio`` is the joules that the gates decided for in the latest step, over E_max.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.state: dict[str, Tensor] | None = None
        self.step = 0
        self.judged_step = -1
        self.ratio: float | None = None
        self._score: float | None = None
        self._stale = 0

    @property
    def exhausted(self) -> bool:
        return self._stale >= self.patience

    def offer(self, trainer: Trainer, score: float, *, within: bool) -> None:
        """Lower is better; a step over its budget cannot be the best."""
        self.judged_step = trainer.step
        if not within:
            return
        if self._score is None or score < self._score:
            self._score, self._stale, self.step = score, 0, trainer.step
            self.state = trainer.tuner.state()
        else:
            self._stale += 1

    def tensors(self) -> dict[str, Tensor]:
        return {f"best.{name}": tensor for name, tensor in (self.state or {}).items()}

    def as_state(self) -> dict[str, Any]:
        return {
            "best_step": self.step,
            "best_score": self._score,
            "best_stale": self._stale,
            "judged_step": self.judged_step,
            "ratio": self.ratio,
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.step, self._score, self._stale = state["best_step"], state["best_score"], state["best_stale"]
        self.judged_step, self.ratio = state["judged_step"], state["ratio"]
        kept = {k.removeprefix("best."): t for k, t in tensors.items() if k.startswith("best.")}
        self.state = kept or None
