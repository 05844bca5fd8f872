"""How many operations a step launches: what a small model's decode time and idle watts hang on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        if not is_view:
            self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_launches(step: Callable[[], object]) -> Counter[str]:
    """Operations that ``step`` dispatches, by name.

    Views are left out; an operation that the library itself makes of several (a norm) counts as one.
    """
    counting = _Counting()
    with torch.inference_mode(), counting:
        step()
    return counting.seen
