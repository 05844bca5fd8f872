"""How much likelihood each block is worth: the loss increase when it alone is off, or in int8.

Shape legend: L layers, 2 blocks (attention, MLP).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Pairs = tuple[tuple[float, float], ...]
"""(attention, MLP) of every layer."""


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """Loss increases in nats per answer token, and their standard errors over the samples they come from.

    ``first-order``: gradients times what would change. ``exact``: the loss itself, block after block.
    ``uniform``: nothing is known (random weights), every block counts alike. They hold for the weights of
    ``fingerprint`` alone.
    """

    kind: Literal["first-order", "exact", "uniform"]
    fingerprint: str
    data_hash: str
    samples: int
    off: Pairs
    off_error: Pairs
    int8: Pairs
    int8_error: Pairs

    def int8_harms(self, layer: int, block: int) -> bool:
        """Whether int8 costs this block likelihood beyond twice its error; unknown counts as harm."""
        if self.kind == "uniform":
            return True
        return self.int8[layer][block] > 2 * self.int8_error[layer][block]

    def harm(self, layer: int, block: int) -> tuple[float, float] | None:
        """What (int8, off) costs this block alone; None where nobody knows."""
        return None if self.kind == "uniform" else (self.int8[layer][block], self.off[layer][block])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Sensitivities:
        pairs = ("off", "off_error", "int8", "int8_error")
        read = {name: tuple((float(a), float(m)) for a, m in document[name]) for name in pairs}
        return cls(**{**document, **read})
