"""How ``compare`` reads in a terminal: the verdict, then the gap, then one row a configuration."""

from __future__ import annotations

import pytest
from cli_tools import Study, run_cli

from hestctl.cli import out


def test_the_verdict_is_first_and_the_gap_table_next(study: Study) -> None:
    outcome = run_cli(study.folder, "compare", "--no-figures")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].startswith("Not shown that HEST saves energy")
    titles = [line for line in lines if line.startswith(("Gap at", "Quality", "Energy", "Latency", "Budget"))]
    assert titles[0].startswith("Gap at equal quality: hest 0.6 against the others")
    assert [title.split()[0] for title in titles] == ["Gap", "Quality", "Energy", "Latency", "Budget"]
    assert any("configuration" in line and "seeds" in line for line in lines)
    every = run_cli(study.folder, "compare", "--no-figures", "--runs").out
    assert "┃ configuration" not in every
    assert "┃ run" in every


@pytest.mark.parametrize(("width", "shown"), [(60, "│ 44.6 [43.9, 45.2] │"), (36, "│     [43.9, 45.2] │")])
def test_an_interval_is_not_broken_within(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, shown: str
) -> None:
    monkeypatch.setattr(out, "_PIPE_WIDTH", width)
    out.table("Energy", ("run", "J measured [95 %]", "tokens"), [("tabs", "44.6 [43.9, 45.2]", "87")])
    assert shown in capsys.readouterr().out
