"""A run's own figures: what is given, and what so few batches cannot give."""

from __future__ import annotations

import pytest

from hestctl.records import Sample
from hestctl.workflows.summary import summarise


def samples(batches: int, size: int) -> list[Sample]:
    return [
        Sample(
            sample_id=f"article-{batch}-{place}",
            position=batch * size + place,
            split="test",
            prompt_tokens=10,
            new_tokens=4,
            truncated_tokens=0,
            batch_index=batch,
            batch_size=size,
            num_beams=1,
            engine="hestctl",
            latency_s=float(batch),
            energy_kind="none",
            energy_method="none",
            energy_valid=False,
            finish="length",
        )
        for batch in range(batches)
        for place in range(size)
    ]


@pytest.mark.parametrize(("batches", "size", "given"), [(25, 4, False), (99, 2, False), (100, 1, True)])
def test_a_p99_needs_a_hundred_batches_however_many_samples(batches: int, size: int, given: bool) -> None:
    found = summarise(samples(batches, size))
    assert (found["latency_p99_s"] is not None) == given
    assert found["latency_max_s"] == batches - 1
