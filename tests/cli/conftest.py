"""One small study, made once: tabs, then hest on 0.6 of its joules, in one store. And known joules."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cli_tools import TRIAL, Study, run_cli

from hestctl.calibration.measure import Calibration
from hestctl.energy.model import Cost, EnergyModel, GenerationPoint, Terms
from hestctl.energy.table import EnergyTable

REST = Terms(1e-3, 2e-5, 0.0, 1e-3)
BLOCKS = (Terms(1e-3, 2e-5, 1e-8, 1e-3, 1e-6), Terms(2e-3, 4e-5, 0.0, 2e-3))
"""Attention and MLP of one layer at full. int8 takes half."""
SHARE = {"off": 0.0, "int8": 0.5, "full": 1.0}


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


def known_j(point: GenerationPoint) -> Cost:
    terms = REST
    for block, state in zip(BLOCKS, (point.attention, point.mlp), strict=True):
        share = SHARE[state]
        half = Terms(block.call_j * share, block.token_j * share, 0.0, block.step_j * share)
        looks = Terms(token2_j=block.token2_j, context_j=block.context_j).times(float(share > 0))
        terms = terms.plus(half.plus(looks).times(2))
    return Cost(terms.total_j(point.prompt_tokens, point.new_tokens), 0.0)


@pytest.fixture(scope="module")
def known_joules() -> Iterator[None]:
    """Energy tables are measured, but hold known joules: estimated ones of tiny blocks are noise, of which no
    share can be promised."""
    made = Calibration._table

    def table(self: Calibration, model: EnergyModel | None) -> EnergyTable:
        if model is not None:
            small = Cost(1e-6, 0.0)
            model = replace(
                model,
                points=tuple(replace(point, cost=known_j(point)) for point in model.points),
                adapters=tuple(replace(one, prefill=small, decode=small) for one in model.adapters),
            )
        return replace(made(self, model), full=Cost(2e-8, 0.0), int8=Cost(1e-8, 0.0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calibration, "_table", table)
        yield
