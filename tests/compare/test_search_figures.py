"""The figures and the table of a search: which trials stand where, and what is said of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hestctl.compare.search import find_search, search_document, trial_table, trials
from hestctl.compare.search_figures import draw_search, front
from hestctl.errors import HestError
from hestctl.records import Run
from hestctl.runs import recording
from hestctl.store.queries import connect
from hestctl.store.store import Store

GOAL = {
    "quality": "ROUGE-Lsum",
    "floor_points": 31.4,
    "reference": "train-tabs-1",
    "joules": "measured",
    "ends_at": "2026-11-22T12:00:00.000000+00:00",
}
IMPORTANCE = {
    "joules": {
        "budget.emax_ratio": 0.71,
        "method.tau": 0.12,
        "train.learning_rate": 0.1,
        "budget.alpha": 0.07,
    },
    "score": {
        "train.learning_rate": 0.58,
        "budget.emax_ratio": 0.3,
        "method.tau": 0.08,
        "budget.alpha": 0.04,
    },
}


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    """A figure that warns has points left out or a legend that fails."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        yield


def simulated(count: int = 20) -> list[dict[str, Any]]:
    """Trials of a hest search that could have happened: less budget, fewer joules, a lower score."""
    draw = np.random.default_rng(3)
    rows = []
    for number in range(count):
        ratio, rate = draw.uniform(0.4, 0.8), 10 ** draw.uniform(-5, -3.3)
        score = float(31.9 - 6 * (0.6 - ratio) ** 2 * 10 - abs(np.log10(rate) + 4) + draw.normal(0, 0.25))
        energy_j = float(210 + 160 * ratio + draw.normal(0, 4))
        rows.append(
            trial(
                number,
                score,
                energy_j,
                params={"budget.emax_ratio": ratio, "train.learning_rate": rate, "b": 2},
            )
        )
    rows[4] = trial(4, None, None, error="training diverged at step 12", params=rows[4]["params"])
    return rows


def trial(
    number: int, score: float | None, energy_j: float | None, *, error: str | None = None, params: Any = None
) -> dict[str, Any]:
    return {
        "number": number,
        "state": "complete" if error is None else "failed",
        "value": energy_j,
        "feasible": score is not None and score >= GOAL["floor_points"],
        "params": params or {"train.learning_rate": 1e-4 * (1 + number)},
        "score": score,
        "energy_j": energy_j,
        "energy_kind": None if energy_j is None else "measured",
        "trial_run_id": f"trial-{number}",
        "duration_s": 90.0 + number,
        "worker": "17 on host",
        "error": error,
    }


def a_search(folder: Path, rows: Sequence[dict[str, Any]], **changes: Any) -> Store:
    """A store with one finished search of these trials."""
    store = Store(folder / "runs.duckdb")
    run = Run("search-1", "search", "started", "2026-11-22T10:00:00", method="hest", backbone="org/small-1b")
    run.dataset, run.weights = "cnn_dailymail", "pretrained"
    run.summary = {"search": GOAL, "best_trial": 12, "importance": IMPORTANCE, **changes}
    with recording(store, run) as recorder:
        for row in rows:
            recorder.trial(row)
    return store


def test_the_store_has_what_a_trial_did(tmp_path: Path) -> None:
    rows = [*simulated(6), {"number": 6, "state": "interrupted", "params": {}, "worker": "18 on host"}]
    store = a_search(tmp_path, rows)
    with connect([str(store.db)]) as connection:
        found = trials(connection, "search-1")
        document = search_document(find_search(connection, "search-1"), found)
    assert found == [{**row} for row in rows[:6]]
    assert document["floor_points"] == 31.4
    assert document["trials"] == found


def test_every_figure_is_drawn(tmp_path: Path) -> None:
    store = a_search(tmp_path, simulated())
    with connect([str(store.db)]) as connection:
        drawn = draw_search(connection, "search-1", tmp_path / "figures", dpi=40)
    names = [f"search-1_{topic}.png" for topic in ("history", "importance", "front")]
    assert [path.name for path in drawn] == names
    assert not drawn.reasons
    assert all(path.stat().st_size > 1000 for path in drawn)


@pytest.mark.parametrize("rows", [[], [trial(0, None, None, error="diverged")]], ids=["none", "all failed"])
def test_a_search_without_results_says_so(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    store = a_search(tmp_path, rows)
    with connect([str(store.db)]) as connection:
        drawn = draw_search(connection, "search-1", tmp_path / "figures", dpi=40)
    assert list(drawn) == []
    assert set(drawn.reasons.values()) == {"no trial was completed"}


def test_a_search_for_quality_is_drawn_without_joules(tmp_path: Path) -> None:
    rows = [{**trial(n, 30.0 + n % 3, None), "feasible": True, "value": 30.0 + n % 3} for n in range(3)]
    goal = {**GOAL, "floor_points": None, "reference": None, "joules": "predicted"}
    store = a_search(tmp_path, rows, search=goal, importance={})
    with connect([str(store.db)]) as connection:
        drawn = draw_search(connection, "search-1", tmp_path / "figures", dpi=40)
    assert [path.name for path in drawn] == ["search-1_history.png"]
    assert drawn.reasons["search-1_front"] == "the trials have no joules"
    assert "too few trials" in drawn.reasons["search-1_importance"]


def test_the_front_has_feasible_trials_that_none_beats() -> None:
    columns = ["number", "energy_j", "score", "feasible"]
    rows = [
        (0, 9.0, 33.0, True),
        (1, 5.0, 32.0, True),
        (2, 6.0, 31.5, True),  # beaten by 1 in both
        (3, 4.0, 30.0, False),  # below the baseline
        (4, 5.0, 31.8, True),  # as many joules as 1, a lower score
        (5, float("nan"), 40.0, True),
        (6, 7.0, 32.0, True),  # the score of 1, for more joules
    ]
    assert list(front(pd.DataFrame(rows, columns=columns))["number"]) == [1, 0]


def test_the_table_tells_trials_apart(tmp_path: Path) -> None:
    rows = [trial(0, 32.0, 5.0), trial(1, 30.0, 4.0), trial(2, None, None, error="diverged")]
    store = a_search(tmp_path, rows, best_trial=0)
    with connect([str(store.db)]) as connection:
        table = trial_table(find_search(connection, "search-1"), trials(connection, "search-1"))
    assert [row[:2] for row in table.rows] == [("1 *", "complete"), ("2", "below baseline"), ("3", "failed")]
    assert table.rows[0][2:] == ("learning_rate 1.00e-04", "32.0", "5.00", "1.5")
    assert table.headers[4] == "J a sample measured"
    assert "31.40 points, by train-tabs-1" in table.notes[1]


def test_another_search_is_not_found_but_named(tmp_path: Path) -> None:
    store = a_search(tmp_path, [])
    with connect([str(store.db)]) as connection, pytest.raises(HestError) as caught:
        find_search(connection, "search-2")
    assert "search-1" in (caught.value.hint or "")
