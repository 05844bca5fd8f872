"""Tables from the Hugging Face hub, through ``datasets``: Parquet alone, no code from the hub is run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from hestctl.data.tables import Table
from hestctl.errors import HestError

_WAITS_S = (2.0, 8.0)
"""Seconds before the second and the third try."""

_TRANSFER_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp")

_T = TypeVar("_T")


def hub_tables(name: str, config: str, splits: tuple[str, ...]) -> dict[str, Table]:
    """The named splits of a data set on the hub, or of its copy in the local cache.

    ``HESTCTL_CACHE`` moves the cache. Raises HestError where neither can be had.
    """
    import datasets

    cache = os.environ.get("HESTCTL_CACHE")
    folder = str(Path(cache) / "datasets") if cache else None
    try:
        loaded = retried(lambda: datasets.load_dataset(name, config, cache_dir=folder))
        return {split: _table(f"{name} ({split})", loaded[split]) for split in splits}
    except Exception as error:  # the hub's libraries raise some forty types, built-in ones among them
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise HestError(
            f"cannot load '{name}' from the Hugging Face hub: {lines[0]}",
            "try again later; or without a network use `--data embedded`, or files of your own: "
            "`--data FOLDER`, or data.train_file and data.test_file",
        ) from error


def retried(call: Callable[[], _T]) -> _T:
    """``call()``, tried again after a passing error (429, 5xx, a broken transfer).

    A host that cannot be reached is not tried again: the hub's client has done that already.
    """
    for wait_s in _WAITS_S:
        try:
            return call()
        except Exception as error:
            if not is_passing(error):
                raise
            time.sleep(wait_s)
    return call()


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    chain = list(_causes(error))
    status = next((code for cause in chain if (code := _status(cause)) is not None), None)
    if status is not None:
        return status in (408, 429) or status >= 500
    if type(error) is ConnectionError:
        return False
    return any(
        isinstance(cause, TimeoutError | ConnectionResetError | ConnectionAbortedError)
        or type(cause).__module__.partition(".")[0] in _TRANSFER_LIBRARIES
        for cause in chain
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _table(where: str, dataset: Any) -> Table:
    return Table(where, "row", tuple(dataset.column_names), enumerate(dataset, start=1))
