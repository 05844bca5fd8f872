"""What a reference run spent, in the positions that budgets bill."""

from __future__ import annotations

import pytest

from hestctl.records import Run
from hestctl.workflows.setup import _reference


def reference(engine: str, beams: int, positions: float) -> float:
    summary = {
        "directions_int8_per_sample": 0.0,
        "directions_full_per_sample": 3.0 * positions,
        "prompt_tokens_per_sample": 900.0,
        "new_tokens_per_sample": 128.0,
    }
    run = Run("r", "train", "finished", "2026", engine=engine, num_beams=beams, summary=summary)
    return _reference(run).full_per_sample


@pytest.mark.parametrize("beams", [1, 4])
def test_a_prompt_counts_once_a_beam_whichever_engine_ran_it(beams: int) -> None:
    billed = beams * (900 + 128)
    # transformers runs the prompt for every beam, hestctl's engine once for all of them.
    assert reference("transformers", beams, billed) == pytest.approx(3.0 * billed)
    assert reference("hestctl", beams, 900 + beams * 128) == pytest.approx(3.0 * billed)
