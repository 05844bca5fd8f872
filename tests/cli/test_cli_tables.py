"""How ``compare`` reads in a terminal: what it comes to, gap, configurations; the rest on demand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_tools import Study, run_cli

from hestctl.cli import out
from hestctl.compare import figures

TITLES = (
    "Gap at",
    "Configurations",
    "Runs",
    "Quality",
    "Energy",
    "Latency",
    "Budget",
    "A/A",
    "The original's",
)


def titles(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(TITLES)]


def test_the_headline_is_first_then_the_gap_then_the_configurations(study: Study) -> None:
    outcome = run_cli(study.folder, "compare", "--no-figures")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0] == "Not shown that HEST saves energy."
    assert lines[1] == "inconclusive: hest 0.6 against tabs, the best baseline"
    assert lines[2].startswith("  energy   not measured: the joules are estimated (CPU time x ")
    assert "  next     a control, which tells choosing from quantising: " in outcome.out
    found = titles(outcome.out)
    assert found == ["Gap at equal quality: hest 0.6 against the others", "Configurations"]
    assert outcome.out.count("saves energy") == 1
    assert "every pair and measure: --all, or as a page: --report FILE.html" in lines
    assert len(lines) < 50


def test_the_rest_is_shown_on_demand(study: Study) -> None:
    every = run_cli(study.folder, "compare", "--no-figures", "--all").out
    found = [title.split()[0] for title in titles(every)]
    assert found == ["Gap", "Quality", "Energy", "Latency", "Budget", "A/A", "The"]
    assert "--all" not in every
    assert "┃ configuration" in every
    runs = run_cli(study.folder, "compare", "--no-figures", "--runs").out
    assert titles(runs)[1:] == ["Runs"]
    assert "┃ run" in runs
    assert "┃ configuration" not in runs


def test_what_it_comes_to_is_told_before_figures_are_drawn(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    draw = figures.draw

    def drawing(*arguments: object, **options: object) -> object:
        told.append(sys.stdout.getvalue())  # type: ignore[attr-defined]
        return draw(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(figures, "draw", drawing)
    outcome = run_cli(study.folder, "compare", "--out", str(tmp_path), "--formats", "svg")
    assert outcome.code == 0, outcome.err
    assert told[0].startswith("Not shown that HEST saves energy.")
    assert "Configurations" in told[0]
    drawn = outcome.out.removeprefix(told[0])
    assert drawn.endswith(f" figures in {tmp_path}\n")
    assert len(drawn.splitlines()) == 1


@pytest.mark.parametrize(("width", "shown"), [(60, "│ 44.6 [43.9, 45.2] │"), (36, "│ [43.9, 45.2] │")])
def test_an_interval_is_not_broken_within(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, shown: str
) -> None:
    monkeypatch.setattr(out, "_PIPE_WIDTH", width)
    out.table("Energy", ("run", "J measured [95 %]", "tokens"), [("tabs", "44.6 [43.9, 45.2]", "87")])
    assert shown in capsys.readouterr().out
