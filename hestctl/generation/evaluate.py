"""Generates a split under the meter, then scores it: one Sample record an article.

Samples run back to back and share their window edges, so that their joules add up to the whole.
Scoring comes after the meter has closed: it costs no sample anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from hestctl.data.prompts import Encoded, label_answers
from hestctl.energy.meter import Edge, Meter
from hestctl.energy.shares import apportion
from hestctl.errors import HestError
from hestctl.generation.engine import ENGINE, Generated, Generator
from hestctl.generation.quality import RougeScorer, first_token_of_labels
from hestctl.progress import Progress
from hestctl.records import STATES, LayerUse, Sample, Window
from hestctl.settings import GenerationSettings


@dataclass(slots=True)
class Evaluation:
    """Samples with their windows, the text that was generated, and how the directions were used."""

    samples: list[Sample]
    windows: list[Window]
    texts: dict[str, str]
    layer_use: list[LayerUse]


@dataclass(slots=True)
class _Batch:
    rows: Sequence[Encoded]
    result: Generated
    predicted: list[str] | None
    start: Edge
    end: Edge
    latency_s: float


def evaluate(
    generator: Generator,
    rows: Sequence[Encoded],
    settings: GenerationSettings,
    meter: Meter,
    *,
    split: str,
    labels: tuple[str, ...] = (),
    score: bool = True,
    forced_length: bool = False,
    warm_up: bool = True,
    progress: Progress,
    check: Callable[[], None],
) -> Evaluation:
    """Generate (or, with ``labels``, classify) every row and record joules, latency and quality.

    ``check`` is polled between batches and may raise Interrupted. ``score`` false leaves quality out
    (profile on synthetic prompts has no reference); ``forced_length`` generates exactly
    ``settings.new_tokens``; ``warm_up`` runs the first batch once before the meter.
    Raises HestError when two labels cannot be told apart by their first token.
    """
    names: dict[int, str] = {}
    if labels:
        names = first_token_of_labels(label_answers(labels, generator.backbone.tokenizer))
    run = _runner(generator, settings, names, forced_length)
    if warm_up:
        run(rows[: settings.batch_size])  # pays for lazy initialisation: it is nobody's sample
    batches = list(_generate(run, rows, settings.batch_size, meter, progress, check))
    meter.settle()
    windows = [
        meter.cut(batch.start, batch.end, name=batch.rows[0].sample_id, phase="generation")
        for batch in batches
    ]
    samples: list[Sample] = []
    texts: dict[str, str] = {}
    scorer = RougeScorer() if score and not names else None
    for index, (batch, window) in enumerate(zip(batches, windows, strict=True)):
        check()
        for sample, text in _samples(generator, batch, window, index, settings, split):
            if scorer is not None:
                row = batch.rows[sample.position - index * settings.batch_size]
                rouge = scorer.score(row.reference, text)
                sample = replace(
                    sample,
                    rouge1=rouge.rouge1,
                    rouge2=rouge.rouge2,
                    rouge_l=rouge.rouge_l,
                    rouge_lsum=rouge.rouge_lsum,
                )
            samples.append(sample)
            texts[sample.sample_id] = text
    if score:
        samples = _with_likelihood(generator, rows, samples, settings.batch_size, progress, check)
    return Evaluation(samples, windows, texts, _layer_use(batches))


_Run = Callable[[Sequence[Encoded]], tuple[Generated, list[str] | None]]


def _runner(
    generator: Generator, settings: GenerationSettings, names: dict[int, str], forced_length: bool
) -> _Run:
    """Generates a batch, or classifies it by the logits of the labels' first tokens."""

    def generate(part: Sequence[Encoded]) -> tuple[Generated, list[str] | None]:
        out = generator.generate(
            part,
            new_tokens=settings.new_tokens,
            num_beams=settings.num_beams,
            forced_length=forced_length,
        )
        return out, None

    def classify(part: Sequence[Encoded]) -> tuple[Generated, list[str] | None]:
        logits, counts = generator.label_scores(part)
        ids = list(names)
        best = [ids[i] for i in logits[:, ids].argmax(1).tolist()]
        return Generated([[i] for i in best], [True] * len(part), counts), [names[i] for i in best]

    return classify if names else generate


def _generate(
    run: _Run,
    rows: Sequence[Encoded],
    size: int,
    meter: Meter,
    progress: Progress,
    check: Callable[[], None],
) -> Iterator[_Batch]:
    start_j = meter.total_j()
    edge = meter.edge()
    spent = 0.0
    for done in range(0, len(rows), size):
        check()
        part = rows[done : done + size]
        started = time.perf_counter()
        try:
            result, predicted = run(part)
        except torch.OutOfMemoryError as error:
            longest = max(len(row.prompt_ids) for row in part)
            raise HestError(
                f"out of memory generating {len(part)} prompts of up to {longest} tokens at once",
                f"--set generation.batch_size={max(1, len(part) // 2)}, or fewer --num-beams",
            ) from error
        start, edge = edge, meter.edge()
        latency = time.perf_counter() - started
        spent += latency
        progress.advance(
            "generating",
            min(done + size, len(rows)),
            len(rows),
            {f"J {meter.kind}": _since(meter, start_j), "s_per_sample": spent / (done + len(part))},
        )
        yield _Batch(part, result, predicted, start, edge, latency)


def _since(meter: Meter, start_j: float | None) -> float | None:
    total_j = meter.total_j()
    return None if total_j is None or start_j is None else total_j - start_j


def _samples(
    generator: Generator,
    batch: _Batch,
    window: Window,
    index: int,
    settings: GenerationSettings,
    split: str,
) -> Iterator[tuple[Sample, str]]:
    """One record a request; a batch's joules are apportioned by token positions."""
    work = [len(r.prompt_ids) + len(n) for r, n in zip(batch.rows, batch.result.new_ids, strict=True)]
    alone = len(batch.rows) == 1
    shares: list[tuple[float | None, float | None]] = [(None, None)] * len(work)
    if window.energy_j is not None:
        bound_j = window.error_j
        shares = [
            (joules, None if bound_j is None else error)
            for joules, error in apportion(window.energy_j, bound_j or 0.0, work)
        ]
    plan = generator.plan
    counts = batch.result.counts_QLS
    for i, row in enumerate(batch.rows):
        energy, error = shares[i]
        net = None
        if window.net_energy_j is not None and window.energy_j:
            net = window.net_energy_j * (energy or 0.0) / window.energy_j
        used = None if counts is None else counts[i].sum(0).tolist()
        new_ids = batch.result.new_ids[i]
        yield (
            Sample(
                sample_id=row.sample_id,
                position=index * settings.batch_size + i,
                split=split,
                prompt_tokens=len(row.prompt_ids),
                new_tokens=len(new_ids),
                truncated_tokens=row.truncated_tokens,
                batch_index=index,
                batch_size=len(batch.rows),
                num_beams=settings.num_beams,
                engine=ENGINE,
                latency_s=batch.latency_s,
                energy_kind=window.kind,
                energy_method=window.method if alone else "apportioned",
                energy_j=energy,
                energy_net_j=net,
                energy_error_j=error,
                energy_valid=window.valid,
                energy_reason=window.reason,
                scope_energy_j=None if plan is None or counts is None else plan.joules(counts[i]),
                emax_j=None if plan is None else plan.emax_j,
                directions_off=None if used is None else used[0],
                directions_int8=None if used is None else used[1],
                directions_full=None if used is None else used[2],
                finish="label" if batch.predicted else "stop" if batch.result.stopped[i] else "length",
                label=row.label,
                predicted_label=batch.predicted[i] if batch.predicted else None,
            ),
            generator.text(new_ids),
        )


def _with_likelihood(
    generator: Generator,
    rows: Sequence[Encoded],
    samples: list[Sample],
    size: int,
    progress: Progress,
    check: Callable[[], None],
) -> list[Sample]:
    scored: list[Sample] = []
    for start in range(0, len(rows), size):
        check()
        part = rows[start : start + size]
        for row, nll, sample in zip(part, generator.answer_nll(part), samples[start:], strict=False):
            scored.append(replace(sample, nll=nll, answer_tokens=len(row.answer_ids)))
        progress.advance("scoring answers", len(scored), len(rows), {})
    return scored


def _layer_use(batches: list[_Batch]) -> list[LayerUse]:
    counts = [batch.result.counts_QLS for batch in batches if batch.result.counts_QLS is not None]
    if not counts:
        return []
    total_LS = torch.cat(counts).sum(0)
    return [
        LayerUse(layer, STATES[state], int(count), int(count) / max(1, int(row.sum())))
        for layer, row in enumerate(total_LS)
        for state, count in enumerate(row)
    ]
