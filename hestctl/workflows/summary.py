"""The figures of one run in one place: means over its valid samples, with their units in the keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from hestctl.records import Sample

P99_BATCHES = 100
"""Below so many a 99th percentile is little more than the maximum, and is not given. The latency of a sample
is that of its batch."""


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """Means over samples; joules over samples whose window is valid. None where nothing was measured."""
    valid = [s for s in samples if s.energy_valid and s.energy_j is not None]
    latencies = [s.latency_s for s in samples]
    batches = len({s.batch_index for s in samples})
    labelled = [s for s in samples if s.label is not None]
    answer_tokens = sum(s.answer_tokens or 0 for s in samples)
    return {
        "samples": len(samples),
        "energy_samples": len(valid),
        "energy_j_per_sample": _mean([s.energy_j for s in valid]),
        "energy_error_j_per_sample": _mean([s.energy_error_j for s in valid]),
        "prefill_j_per_sample": _mean([s.prefill_j for s in valid]),
        "decode_j_per_sample": _mean([s.decode_j for s in valid]),
        "predicted_j_per_sample": _mean([s.predicted_j for s in samples]),
        "scope_energy_j_per_sample": _mean([s.scope_energy_j for s in samples]),
        "new_tokens_per_sample": _mean([s.new_tokens for s in samples]),
        "prompt_tokens_per_sample": _mean([s.prompt_tokens for s in samples]),
        "latency_p50_s": float(np.percentile(latencies, 50)) if latencies else None,
        "latency_p99_s": float(np.percentile(latencies, 99)) if batches >= P99_BATCHES else None,
        "latency_max_s": max(latencies, default=None),
        "rouge1": _mean([s.rouge1 for s in samples]),
        "rouge2": _mean([s.rouge2 for s in samples]),
        "rouge_l": _mean([s.rouge_l for s in samples]),
        "rouge_lsum": _mean([s.rouge_lsum for s in samples]),
        "nll_per_token": sum(s.nll or 0.0 for s in samples) / answer_tokens if answer_tokens else None,
        "accuracy": _mean([float(s.label == s.predicted_label) for s in labelled]),
        "chance": _most_frequent([s.label for s in labelled]),
        "directions_int8_per_sample": _mean([s.directions_int8 for s in samples]),
        "directions_full_per_sample": _mean([s.directions_full for s in samples]),
        "stopped_share": _mean([float(s.finish != "length") for s in samples]),
    }


def _most_frequent(labels: Sequence[str | None]) -> float | None:
    """The accuracy (0 to 1) of always answering the most frequent label."""
    return max(Counter(labels).values()) / len(labels) if labels else None


def _mean(values: Sequence[float | None]) -> float | None:
    """None where any value is missing, or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
