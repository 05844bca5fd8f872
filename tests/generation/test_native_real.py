"""The engine against transformers' on a real model: 50 prompts, batches of 1 and 8, beams.

Asked for by HESTCTL_TEST_REAL=1: it fetches SmolLM2-135M where it is not in the cache, and takes minutes on
a CPU. On a GPU it runs there, in float16, with graphs and compiled layers.
"""

from __future__ import annotations

import os

import pytest
import torch
from agreement import beam_partings, partings

from hestctl.data.articles import load_splits
from hestctl.data.prompts import encode
from hestctl.generation.engine import Generator
from hestctl.generation.native import NativeGenerator
from hestctl.model.backbone import load_backbone
from hestctl.settings import BackboneSettings, DataSettings

pytestmark = pytest.mark.skipif(
    os.environ.get("HESTCTL_TEST_REAL") != "1",
    reason="HESTCTL_TEST_REAL=1 runs it: it takes minutes",
)
NEW = 32


@pytest.fixture(scope="module")
def real():
    on_gpu = torch.cuda.is_available()
    settings = BackboneSettings(dtype="float16" if on_gpu else "float32", device="cuda" if on_gpu else "cpu")
    backbone = load_backbone(settings, progress=lambda _: None)
    data = DataSettings(max_tokens=450, max_answer_tokens=96)
    splits = load_splits(data, seed=0)
    rows = encode(
        [*splits.test, *splits.validation, *splits.train][:50],
        backbone.tokenizer,
        data,
        task=splits.task,
        labels=splits.labels,
    )
    return Generator(backbone, None, None), NativeGenerator(backbone, None, None), rows


@pytest.mark.parametrize("size", [1, 8])
def test_greedy_tokens_are_those_of_transformers(real, size):
    theirs, mine, rows = real
    rounding = 1e-4 if theirs.backbone.dtype == torch.float32 else 2e-3
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        a, b = (engine.generate(part, new_tokens=NEW, num_beams=1).new_ids for engine in (theirs, mine))
        found += partings(theirs, part, a, b, rounding=rounding)
    print(f"\nbatch {size}: {len(rows) - len(found)} of {len(rows)} identical; parted: {found}")
    assert all(parting.tie for parting in found), found


def test_beams_are_those_of_transformers(real):
    theirs, mine, rows = real
    a, b = (engine.generate(rows[:4], new_tokens=NEW, num_beams=4).new_ids for engine in (theirs, mine))
    found = beam_partings(theirs, rows[:4], a, b)
    print(f"\n4 beams: {4 - len(found)} of 4 identical; parted: {found}")
    assert all(parting.tie for parting in found), found
