"""The comparison through the store that the commands write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from simulated_runs import a_run, generated, trained, used

from hestctl.compare import frames_budget, frames_runs, frames_states
from hestctl.compare.figures import draw
from hestctl.compare.table import as_json, compare
from hestctl.runs import recording
from hestctl.store.queries import connect
from hestctl.store.store import Store


def test_runs_recorded_by_commands_are_compared(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.duckdb")
    for run, joules in ((a_run("tabs", 1), 60.0), (a_run("hest", 2), 40.0)):
        started = replace(run, status="started", finished_at=None)
        with recording(store, started) as recorder:
            for step in trained(run)[:5]:
                recorder.step(step)
            for sample in generated(run, 120, joules=joules, scope_j=0.01, emax_j=0.02):
                recorder.sample(sample)
            for use in used("hest"):
                recorder.layer_use(use)
    with connect([str(store.db)]) as connection:
        found = compare(connection)
        assert [row.label for row in found.rows] == ["hest 0.6", "tabs"]
        assert found.gap.percent.value is not None
        assert found.gap.percent.value > 25
        json.dumps(as_json(found), allow_nan=False)
        curves = frames_runs.learning(connection, found, "task_loss")
        assert len(curves) == 10
        assert set(frames_states.depth(connection, found)["layer"]) == set(range(30))
        assert frames_states.position(connection, found)[1] == 8
        assert len(frames_budget.budget(connection, found)) == 240
        drawn = draw(connection, found, tmp_path / "figures", dpi=40)
        assert set(drawn.reasons) == {"comparison_length"}
