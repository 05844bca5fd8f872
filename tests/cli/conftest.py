"""One small study, made once: tabs, then hest on 0.6 of its joules, in one store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_tools import TRIAL, Study, run_cli


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """To be read only; ``copied`` is for tests that write."""
    folder = tmp_path_factory.mktemp("study")
    tabs = run_cli(folder, "train", "--method", "tabs", *TRIAL, "-q", "--json")
    hest = run_cli(folder, "train", "--method", "hest", "--emax-ratio", "0.6", *TRIAL, "-q", "--json")
    assert (tabs.code, hest.code) == (0, 0), tabs.err + hest.err
    return Study(folder, tabs, hest)


@pytest.fixture
def copied(study: Study, tmp_path: Path) -> Study:
    """The same study in a folder of the test's own."""
    folder = tmp_path / "study"
    shutil.copytree(study.folder, folder)
    return Study(folder, study.tabs, study.hest)
