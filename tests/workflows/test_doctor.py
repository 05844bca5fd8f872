"""``env``: what cannot be used is told in our own words, with what to do about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hestctl.settings import Settings, load
from hestctl.workflows import doctor


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load("quickstart", {"db": tmp_path / "runs.duckdb"}).settings


def counters(folder: Path) -> Path:
    counter = folder / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir(parents=True)
    counter.write_text("12345\n")
    return counter


def deny(monkeypatch: pytest.MonkeyPatch, *denied: Path) -> None:
    """As root everything may be read and written."""
    allowed = os.access
    monkeypatch.setattr(
        doctor.os, "access", lambda path, mode: Path(path) not in denied and allowed(path, mode)
    )


def test_a_machine_without_counters_is_told_so(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "POWERCAP", tmp_path / "none")
    meter = doctor.examine(settings, {})["meter"]
    assert meter["rapl"] == (
        f"not usable: no RAPL counter in {tmp_path / 'none'}; virtual machines mostly have none"
    )
    assert meter["rapl_files"] == "none readable"
    if not any(str(found).startswith("measured") for found in meter.values()):
        assert meter["next"].startswith("joules are estimated here: an NVIDIA GPU")


def test_counters_that_may_not_be_read_come_with_the_command_that_opens_them(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = counters(tmp_path / "powercap")
    monkeypatch.setattr(doctor, "POWERCAP", tmp_path / "powercap")
    deny(monkeypatch, counter)
    meter = doctor.examine(settings, {})["meter"]
    assert meter["rapl"] == f"not usable: no permission to read {counter}"
    assert meter["next"].startswith(f"sudo chmod a+r {tmp_path / 'powercap'}/*/energy_uj")


def test_a_folder_that_may_not_be_written_comes_with_a_way_out(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "next" not in doctor.examine(settings, {})["paths"]
    deny(monkeypatch, tmp_path)
    paths = doctor.examine(settings, {})["paths"]
    assert (paths["store_writable"], "--db" in paths["next"]) == (False, True)
    elsewhere = load("quickstart", {"db": tmp_path / "new" / "runs.duckdb"}).settings
    assert "is made by the first command" in doctor.examine(elsewhere, {})["paths"]["next"]
