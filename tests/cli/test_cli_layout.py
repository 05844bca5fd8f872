"""Tables of any width: nothing is cut, and what is there to be copied or compared stays whole."""

from __future__ import annotations

import re

import pytest
from rich.cells import cell_len

from hestctl.cli import out
from hestctl.cli.layout import fit, fold

RUN = "train-hest-20261122-213809-4db4af4a"
TABLES = {
    "runs": (
        ("run", "status", "quality", "energy a sample"),
        [(RUN, "finished", "21.5 R-Lsum", "3.16 J (estimated)"), (RUN, "running", "-", "-")],
    ),
    "measures": (
        ("configuration", "J/sample measured [95 %]", "ROUGE-Lsum points [95 %]", "tokens", "parameters"),
        [
            ("lora int8, last 2 off control", "44.6 [43.9, 45.2]", "29.4 [27.9, 30.9]", "87", "276,480"),
            ("hest 0.6", "1,044 [1,043, 1,045]", "6.79 [5.85, 7.74]", "120", "20,474"),
        ],
    ),
    "facts": (("field", "value"), [("path", "/a/" + "long/" * 40), ("why", "one word after another " * 8)]),
}
WIDTHS = (30, 40, 60, 80, 100, 160)


def printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, width: int
) -> str:
    monkeypatch.setattr(out, "_PIPE_WIDTH", width)
    headers, rows = TABLES[name]
    out.table("A title", headers, rows)
    return capsys.readouterr().out


def squeezed(text: str) -> str:
    """Letters and digits alone: what is left of cells however they are folded and framed."""
    return "".join(re.findall(r"\w", text))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_terminal_and_no_cell_is_lost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, width: int
) -> None:
    text = printed(capsys, monkeypatch, name, width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    headers, rows = TABLES[name]
    found = fit(headers, rows, width)
    if found is None:
        for cell in (*headers, *(cell for row in rows for cell in row)):
            assert squeezed(cell) in squeezed(text), cell
    else:
        for folded, row in zip((found.headers, *found.rows), (headers, *rows), strict=True):
            assert [squeezed(cell) for cell in folded] == [squeezed(cell) for cell in row]
            for line in (line for cell in folded for line in cell.split("\n")):
                assert line in text


@pytest.mark.parametrize("width", WIDTHS)
def test_ids_numbers_and_intervals_stay_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    if width >= 40:
        assert printed(capsys, monkeypatch, "runs", width).count(RUN) == 2
    text = printed(capsys, monkeypatch, "measures", width)
    for whole in ("[43.9, 45.2]", "[1,043, 1,045]", "276,480", "20,474"):
        assert whole in text


def test_names_fold_then_rules_go_then_rows_become_blocks() -> None:
    headers, rows = TABLES["measures"]
    ways = {width: fit(headers, rows, width) for width in range(20, 161)}
    ruled = [width for width, found in ways.items() if found is not None and found.ruled]
    bare = [width for width, found in ways.items() if found is not None and not found.ruled]
    taken_apart = [width for width, found in ways.items() if found is None]
    assert max(taken_apart) < min(bare) <= max(bare) < min(ruled)
    widest, narrow = ways[160], ways[min(ruled)]
    assert widest is not None and narrow is not None
    assert not any("\n" in cell for row in (widest.headers, *widest.rows) for cell in row)
    assert narrow.rows[0][0] == "lora int8,\nlast 2 off\ncontrol"


def test_where_one_interval_goes_below_its_value_all_of_its_column_do() -> None:
    found = fit(("run", "J"), [("a", "1,044 [1,043, 1,045]"), ("b", "4.6 [3.9, 5.2]")], 24)
    assert found is not None
    assert [row[1] for row in found.rows] == ["1,044\n[1,043, 1,045]", "4.6\n[3.9, 5.2]"]


def test_the_fold_that_costs_the_fewest_lines_is_taken() -> None:
    rows = [(f"run {place}", "44.6 [43.9, 45.2]") for place in range(9)]
    found = fit(("run", "J"), [*rows, ("longer name", "44.6 [43.9, 45.2]")], 32)
    assert found is not None
    assert [cell.count("\n") for row in found.rows for cell in row] == [0] * 18 + [1, 0]


def test_what_is_not_measured_never_reads_measured() -> None:
    assert fold("it is not measured (a)", 12) == "it is\nnot measured\n(a)"


def test_wide_letters_count_for_what_they_take() -> None:
    assert fold("汉字汉字", 4) == "汉字\n汉字"
    found = fit(("a", "b"), [("汉字汉字 汉字", "1")], 18)
    assert found is not None
    assert found.rows[0][0] == "汉字汉字\n汉字"


def test_a_text_goes_on_below_what_follows_its_lead(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out.text("one two three", "  next  ")
    assert capsys.readouterr().out == "  next  one two three\n", "a pipe gets the line whole"
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr(out, "_PIPE_WIDTH", 16)
    out.text("one two three", "  next  ")
    assert capsys.readouterr().out == "  next  one two\n        three\n"
