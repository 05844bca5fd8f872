"""Generates a split under the meter, then scores it: one Sample record an article.

Scoring comes after the meter has closed: it costs no sample anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from hestctl.data.prompts import Encoded, label_answers
from hestctl.energy.meter import Meter
from hestctl.energy.model import EnergyModel, PhaseJoules
from hestctl.energy.protocol import Unavailable
from hestctl.energy.shares import Share, share_batch
from hestctl.errors import Exit, HestError
from hestctl.generation.engine import Generated
from hestctl.generation.engines import Engine
from hestctl.generation.metered import Batch, Outcome, Run, replicated, telescoped, within_memory
from hestctl.generation.native import NativeGenerator
from hestctl.generation.positions import layer_use
from hestctl.generation.quality import RougeScorer, first_token_of_labels
from hestctl.hardening.plan import Plan
from hestctl.progress import Progress
from hestctl.records import BlockStates, LayerUse, Sample, Window
from hestctl.settings import GenerationSettings


@dataclass(slots=True)
class Evaluation:
    """Samples with their windows, the text that was generated, and how the directions were used."""

    samples: list[Sample]
    windows: list[Window]
    texts: dict[str, str]
    layer_use: list[LayerUse]


def evaluate(
    generator: Engine,
    rows: Sequence[Encoded],
    settings: GenerationSettings,
    meter: Meter,
    *,
    split: str,
    labels: tuple[str, ...] = (),
    score: bool = True,
    forced_length: bool = False,
    model: EnergyModel | None = None,
    precision: float | None = None,
    progress: Progress,
    check: Callable[[], None],
) -> Evaluation:
    """Generate (or, with ``labels``, classify) every row and record joules, latency and quality.

    ``check`` is polled between batches and may raise Interrupted. ``score`` false leaves quality out
    (profile on synthetic prompts has no reference); ``forced_length`` generates exactly
    ``settings.new_tokens``. The engine warms up before the meter. ``model`` tells prefill and decode apart,
    and predicts; ``precision`` repeats each batch until the meter's bound on
    its joules is so narrow. Raises HestError when two labels cannot be told apart by their first token, and
    before anything is generated where a batch cannot be within its plan.
    """
    names: dict[int, str] = {}
    if labels:
        names = first_token_of_labels(label_answers(labels, generator.backbone.tokenizer))
    run = _runner(generator, settings, names, forced_length)
    if generator.plan is not None:
        _check_plan(generator.plan, generator.blocks, rows, settings, labels=bool(names))
    with within_memory(rows, settings.batch_size):
        # Compilation, capture and lazy initialisation are nobody's joules.
        if names:
            generator.warm_up_labels(rows, batch_size=settings.batch_size)
        else:
            generator.warm_up(
                rows,
                batch_size=settings.batch_size,
                new_tokens=settings.new_tokens,
                num_beams=settings.num_beams,
                forced_length=forced_length,
            )
    if precision is None:
        batches = telescoped(run, rows, settings.batch_size, meter, progress, check)
    else:
        batches = replicated(run, rows, settings.batch_size, meter, progress, check, precision=precision)
    samples: list[Sample] = []
    texts: dict[str, str] = {}
    scorer = RougeScorer() if score and not names else None
    for index, batch in enumerate(batches):
        check()
        for sample, text in _samples(generator, batch, index, settings, split, model):
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
    logs = [log for batch in batches if (log := batch.result.log_PQLS) is not None]
    return Evaluation(samples, [batch.window for batch in batches], texts, layer_use(logs))


def _check_plan(
    plan: Plan, blocks: BlockStates, rows: Sequence[Encoded], settings: GenerationSettings, *, labels: bool
) -> None:
    """What a plan refuses should not wait for its batch. Raises HestError: usage, or exit 5."""
    if plan.scope == "network" and blocks != plan.blocks:
        raise HestError(
            "the engine runs the backbone's blocks in other states than the plan counts joules of",
            "leave out --backbone-precision and --skip-last, or harden again with them",
            Exit.USAGE,
        )
    beams, asked = (None, 1) if labels else (settings.num_beams, settings.new_tokens)
    for start in range(0, len(rows), settings.batch_size):
        part = rows[start : start + settings.batch_size]
        prompts = [len(row.prompt_ids) for row in part]
        plan.max_new_tokens_for(prompts, beams, asked, [row.sample_id for row in part])


def _runner(
    generator: Engine, settings: GenerationSettings, names: dict[int, str], forced_length: bool
) -> Run:
    """Generates a batch, or classifies it by the logits of the labels' first tokens."""

    def generate(part: Sequence[Encoded]) -> Outcome:
        out = generator.generate(
            part,
            new_tokens=settings.new_tokens,
            num_beams=settings.num_beams,
            forced_length=forced_length,
        )
        return out, None

    def classify(part: Sequence[Encoded]) -> Outcome:
        logits, log = generator.label_scores(part)
        ids = list(names)
        best = [ids[i] for i in logits[:, ids].argmax(1).tolist()]
        return (
            Generated([[i] for i in best], [True] * len(part), log, generator.blocks),
            [names[i] for i in best],
        )

    return classify if names else generate


def _samples(
    generator: Engine,
    batch: Batch,
    index: int,
    settings: GenerationSettings,
    split: str,
    model: EnergyModel | None,
) -> Iterator[tuple[Sample, str]]:
    """One record a request; a batch's joules are apportioned by ``share_batch``'s rule."""
    window = batch.window
    prompt_tokens = [len(row.prompt_ids) for row in batch.rows]
    # A label is read off the prompt's last position: no token is written, and none is decoded.
    new_tokens = [0 if batch.predicted else len(ids) for ids in batch.result.new_ids]
    beams = 1 if batch.predicted else settings.num_beams  # labels are scored without beams
    phases = _predicted(model, generator, batch.result.blocks, prompt_tokens, new_tokens, beams)
    shares: list[Share | None] = [None] * len(batch.rows)
    if batch.energy_j is not None:
        shares = [*share_batch(batch.energy_j, batch.error_j, prompt_tokens, new_tokens, phases)]
    foreseen: list[Share | None] = [None] * len(batch.rows)
    if phases is not None:
        foreseen = [*share_batch(phases.total_j, None, prompt_tokens, new_tokens, phases)]
    plan = generator.plan
    counts = batch.result.counts_QLS
    longest, most = max(prompt_tokens), max(new_tokens)
    if counts is not None and not batch.predicted:
        most = max(most, _ran(generator, counts, prompt_tokens, beams))
    for i, row in enumerate(batch.rows):
        share, prediction = shares[i], foreseen[i]
        net = None
        if share is not None and window.net_energy_j is not None and window.energy_j:
            net = window.net_energy_j * share.energy_j / window.energy_j
        used = None if counts is None else counts[i].sum(0).tolist()
        new_ids = batch.result.new_ids[i]
        scope_j = emax_j = None
        if plan is not None and counts is not None:
            scope_j, emax_j = plan.scope_joules(
                counts[i], len(batch.rows), None if batch.predicted else beams, longest, most
            )
        yield (
            Sample(
                sample_id=row.sample_id,
                position=index * settings.batch_size + i,
                split=split,
                prompt_tokens=prompt_tokens[i],
                new_tokens=new_tokens[i],
                truncated_tokens=row.truncated_tokens,
                batch_index=index,
                batch_size=len(batch.rows),
                num_beams=settings.num_beams,
                engine=generator.engine,
                latency_s=batch.latency_s,
                energy_kind=window.kind,
                energy_method=window.method if len(batch.rows) == 1 or share is None else "apportioned",
                energy_j=None if share is None else share.energy_j,
                energy_net_j=net,
                energy_error_j=None if share is None else share.error_j,
                energy_valid=window.valid,
                energy_reason=window.reason,
                prefill_j=None if share is None else share.prefill_j,
                decode_j=None if share is None else share.decode_j,
                phase_method=None if share is None or share.prefill_j is None else "apportioned",
                predicted_j=None if prediction is None else prediction.energy_j,
                replicates=batch.replicates,
                scope_energy_j=scope_j,
                emax_j=emax_j,
                directions_off=None if used is None else used[0],
                directions_int8=None if used is None else used[1],
                directions_full=None if used is None else used[2],
                finish="label" if batch.predicted else "stop" if batch.result.stopped[i] else "length",
                label=row.label,
                predicted_label=batch.predicted[i] if batch.predicted else None,
            ),
            generator.text(new_ids),
        )


def _ran(generator: Engine, counts_QLS: Tensor, prompt_tokens: Sequence[int], num_beams: int) -> int:
    """New tokens for which a batch ran, by its log: beams may go on beyond the longest answer."""
    assert generator.adapters is not None
    rank = generator.adapters.shape[2]
    prompts = 1 if generator.engine == NativeGenerator.engine else num_beams
    positions_Q: list[int] = (counts_QLS[:, 0].sum(-1) // rank).tolist()
    return max(1 + (p - prompts * n) // num_beams for p, n in zip(positions_Q, prompt_tokens, strict=True))


def _predicted(
    model: EnergyModel | None,
    generator: Engine,
    blocks: BlockStates,
    prompt_tokens: Sequence[int],
    new_tokens: Sequence[int],
    num_beams: int,
) -> PhaseJoules | None:
    """The model's joules of this batch; None without a model, or for what it was not calibrated for.

    ``blocks``: the states that ran.
    """
    if model is None:
        return None
    gate = None if generator.adapters is None else generator.adapters.gate.kind
    found = model.predict(prompt_tokens, new_tokens, num_beams=num_beams, gate=gate, blocks=blocks)
    return None if isinstance(found, Unavailable) else found


def _with_likelihood(
    generator: Engine,
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
