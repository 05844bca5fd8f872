"""``profile``: joules and latency of a hardened model over prompt lengths and batch sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hestctl.data.prompts import Encoded
from hestctl.energy.model import EnergyModel
from hestctl.energy.protocol import Unavailable
from hestctl.energy.shares import split_phases
from hestctl.errors import Exit, HestError
from hestctl.generation.evaluate import evaluate
from hestctl.model.backbone import Backbone, load_backbone
from hestctl.progress import Progress
from hestctl.records import Run, Sample
from hestctl.runs import new_run_id, recording
from hestctl.settings import GenerationSettings, Settings
from hestctl.store import queries
from hestctl.store.store import Store
from hestctl.workflows.engines import chosen_engine, load_hardened, record_engine, with_kernels
from hestctl.workflows.metering import calibrate_command, open_meter, stored_table
from hestctl.workflows.setup import describe, load_data, read_inputs
from hestctl.workflows.summary import summarise


@dataclass(frozen=True, slots=True)
class Point:
    """Means over the samples of one prompt length and batch size; ``replicates`` is the most of one sample.

    Joules are means over the ``valid`` ones.
    ``prefill_j`` and ``decode_j`` are apportioned; ``predicted_j`` is the energy model's figure (J).
    """

    prompt_tokens: int
    batch_size: int
    samples: int
    valid: int
    replicates: int
    latency_s: float
    energy_j: float | None
    error_j: float | None
    prefill_j: float | None
    decode_j: float | None
    predicted_j: float | None
    scope_energy_j: float | None
    emax_j: float | None


@dataclass(frozen=True, slots=True)
class Profiled:
    """The run, one point per length and batch size, and what the meter says of phases and predictions."""

    run: Run
    points: list[Point]
    phases: str
    prediction: str
    left_out: str | None
    """Which samples are in no mean of joules, and why; None where all are."""


def profiled_run(store: Store, run_id: str | None) -> Run | None:
    """The run to profile: the one named, else the latest hardened one; None where there is none."""
    if run_id is not None:
        run = queries.get_run(store, run_id)
        if run.status != "finished" or run.command not in ("train", "harden"):
            raise HestError(
                f"run {run_id} cannot be profiled: a {run.status} {run.command} run",
                "`hestctl runs list` shows finished train and harden runs",
                Exit.USAGE,
            )
        return run
    return queries.latest_run(store, status="finished", has_plan=True)


def profile(settings: Settings, store: Store, progress: Progress, *, hardened: Run | None) -> Profiled:
    """Generate ``profile.new_tokens`` tokens from prompts of rising length, under the meter.

    Lengths are an eighth, a quarter, half and the whole of ``profile.seq_len``; prompts are test
    articles repeated to that length, and generation never stops early, so that runs differ in
    nothing but the method. Raises HestError (usage) beyond the backbone's context.
    """
    p = settings.profile
    splits = read_inputs(settings, store)
    backbone = load_backbone(settings.backbone, progress=progress.note)
    fits(backbone, p.seq_len + p.new_tokens)
    data = load_data(settings, splits, backbone, progress, needed=("test",))
    kind = chosen_engine(settings, backbone, progress)
    with open_meter(settings.energy, backbone.device, store, progress) as meter:
        table = stored_table(settings, backbone, meter, store, progress)
        kind = with_kernels(kind, table)
        if hardened is None:
            generator = kind.make(backbone, None, None)
        else:
            generator = load_hardened(store, hardened, backbone, meter.device_name, kind, table)
        row = replace(
            describe(settings, backbone, meter, data),
            run_id=new_run_id("profile", hardened.method if hardened else "base"),
            command="profile",
            parent_run_id=hardened.run_id if hardened else None,
            method=hardened.method if hardened else "base",
            max_new_tokens=p.new_tokens,
            emax_j=generator.plan.emax_j if generator.plan else None,
        )
        record_engine(row, kind, generator)
        model = None if table is None else table.model
        row.calibration_id = None if table is None else table.calibration_id
        if model is None and meter.kind != "none":
            progress.note(
                f"no energy model of this device: nothing is predicted ({calibrate_command(settings)})"
            )
        if not meter.bounded and meter.kind != "none":
            progress.note(f"joules are {meter.kind} and have no error bound: every sample runs once")
        with recording(store, row) as recorder:
            samples: list[Sample] = []
            for batch_size, length in grid(settings):
                rows = prompts_of(data.test, length, batch_size * p.repeats)
                asked = GenerationSettings(
                    new_tokens=p.new_tokens,
                    num_beams=settings.generation.num_beams,
                    batch_size=batch_size,
                )
                result = evaluate(
                    generator,
                    rows,
                    asked,
                    meter,
                    split="profile",
                    score=False,
                    forced_length=True,
                    model=model,
                    precision=p.precision if meter.bounded else None,
                    progress=progress,
                    check=recorder.check,
                )
                samples += result.samples
                for sample in result.samples:
                    recorder.sample(sample)
                for window in result.windows:
                    recorder.window(window)
                recorder.commit()
            phases, prediction = _phases(samples), _prediction(samples, model)
            recorder.run.summary = {
                **recorder.run.summary,
                **summarise(samples),
                "phases": phases,
                "prediction": prediction,
            }
    return Profiled(recorder.run, _points(samples), phases, prediction, _left_out(samples))


def grid(settings: Settings) -> Iterator[tuple[int, int]]:
    longest = settings.profile.seq_len
    lengths = sorted({max(16, longest // part) for part in (8, 4, 2, 1)})
    for batch_size in settings.profile.batch_sizes:
        for length in lengths:
            yield batch_size, length


def fits(backbone: Backbone, tokens: int) -> None:
    context = backbone.model.config.max_position_embeddings
    if tokens > context:
        raise HestError(
            f"{tokens} tokens are more than {backbone.name}'s context of {context}",
            f"lower --seq-len to at most {context} minus the new tokens",
            Exit.USAGE,
        )


def prompts_of(rows: list[Encoded], length: int, count: int) -> list[Encoded]:
    """``count`` prompts of exactly ``length`` tokens, each from another article, repeated as needed."""
    out = []
    for index in range(count):
        ids = rows[index % len(rows)].prompt_ids
        tiled = (ids * (length // len(ids) + 1))[:length]
        out.append(
            Encoded(
                sample_id=f"len{length}-{index}",
                prompt_ids=tiled,
                answer_ids=(),
                truncated_tokens=0,
                reference="",
                label=None,
            )
        )
    return out


def _phases(samples: list[Sample]) -> str:
    """Joules a token of the two phases: by the energy model, or by regression over this run's samples."""
    valid = [s for s in samples if s.energy_j is not None and s.energy_valid and s.batch_size == 1]
    if not valid:
        return "prefill and decode: not measured (no valid sample at batch 1)"
    kind = valid[0].energy_kind
    known = [s for s in valid if s.prefill_j is not None]
    if known:
        prefill_j = sum(s.prefill_j or 0.0 for s in known) / sum(s.prompt_tokens * s.num_beams for s in known)
        decode_j = sum(s.decode_j or 0.0 for s in known) / sum(s.new_tokens * s.num_beams for s in known)
        return (
            f"prefill {prefill_j:.4g} J a prompt token, decode {decode_j:.4g} J a new token "
            f"({kind}, apportioned by the energy model over {len(known)} samples)"
        )
    rows = [(s.prompt_tokens * s.num_beams, s.new_tokens * s.num_beams, s.energy_j or 0.0) for s in valid]
    split = split_phases(rows)
    if isinstance(split, Unavailable):
        return f"prefill and decode: not measured ({split.reason})"
    return (
        f"prefill {split.prompt_j_per_token:.4g} +- {split.prompt_error_j:.2g} J a prompt token, "
        f"decode {split.new_j_per_token:.4g} +- {split.new_error_j:.2g} J a new token, the prefill's fixed "
        f"cost in it ({kind}, apportioned by regression over {split.samples} samples)"
    )


def _prediction(samples: list[Sample], model: EnergyModel | None) -> str:
    """How far the energy model is off, over samples whose joules are valid."""
    if model is None:
        return "predicted against metered: not measured (no energy model of this device)"
    known = [s for s in samples if s.energy_valid and s.energy_j and s.predicted_j is not None]
    if not known:
        return "predicted against metered: not measured (no valid sample that the energy model covers)"
    off = [abs((s.predicted_j or 0.0) / (s.energy_j or 1.0) - 1) for s in known]
    lengths = [point.prompt_tokens for point in model.points]
    outside = {s.prompt_tokens for s in known if not min(lengths) <= s.prompt_tokens <= max(lengths)}
    where = (
        f", {len(outside)} lengths outside the calibrated {min(lengths)} to {max(lengths)}" if outside else ""
    )
    return (
        f"predicted against {known[0].energy_kind} joules: mean error {100 * sum(off) / len(off):.1f} %, "
        f"worst {100 * max(off):.1f} %, over {len(known)} samples{where}"
    )


def _left_out(samples: list[Sample]) -> str | None:
    reasons: dict[str, int] = {}
    for sample in samples:
        if sample.energy_j is None or not sample.energy_valid:
            why = sample.energy_reason or "no joules"
            reasons[why] = reasons.get(why, 0) + 1
    told = "; ".join(f"{count} of {len(samples)} samples: {why}" for why, count in reasons.items())
    return f"left out of the means of joules: {told}" if told else None


def _points(samples: list[Sample]) -> list[Point]:
    groups: dict[tuple[int, int], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.batch_size, sample.prompt_tokens), []).append(sample)
    points = []
    for (batch_size, length), group in groups.items():
        figures = summarise(group)
        points.append(
            Point(
                prompt_tokens=length,
                batch_size=batch_size,
                samples=len(group),
                valid=figures["energy_samples"],
                replicates=max(sample.replicates for sample in group),
                latency_s=figures["latency_p50_s"],
                energy_j=figures["energy_j_per_sample"],
                error_j=figures["energy_error_j_per_sample"],
                prefill_j=figures["prefill_j_per_sample"],
                decode_j=figures["decode_j_per_sample"],
                predicted_j=figures["predicted_j_per_sample"],
                scope_energy_j=figures["scope_energy_j_per_sample"],
                emax_j=group[0].emax_j,
            )
        )
    return points
