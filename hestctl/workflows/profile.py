"""``profile``: joules and latency of a hardened model over prompt lengths and batch sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hestctl.data.prompts import Encoded
from hestctl.energy.protocol import Unavailable
from hestctl.energy.shares import split_phases
from hestctl.errors import Exit, HestError
from hestctl.generation.engine import Generator
from hestctl.generation.evaluate import evaluate
from hestctl.model.backbone import Backbone, load_backbone
from hestctl.progress import Progress
from hestctl.records import Run, Sample
from hestctl.runs import new_run_id, recording
from hestctl.settings import GenerationSettings, Settings
from hestctl.store import queries
from hestctl.store.store import Store
from hestctl.workflows.setup import describe, load_data, load_hardened, open_meter, read_inputs
from hestctl.workflows.summary import summarise


@dataclass(frozen=True, slots=True)
class Point:
    """Means over the samples of one prompt length and batch size."""

    prompt_tokens: int
    batch_size: int
    samples: int
    latency_s: float
    energy_j: float | None
    error_j: float | None
    scope_energy_j: float | None
    emax_j: float | None


@dataclass(frozen=True, slots=True)
class Profiled:
    """The run, one point per length and batch size, and joules per token of the two phases."""

    run: Run
    points: list[Point]
    phases: str


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
    _fits(backbone, p.seq_len + p.new_tokens)
    data = load_data(settings, splits, backbone, progress, needed=("test",))
    with open_meter(settings.energy, backbone.device, store, progress) as meter:
        generator = Generator(backbone, None, None)
        if hardened is not None:
            generator = load_hardened(store, hardened, backbone, meter.device_name)
        row = replace(
            describe(settings, backbone, meter, data),
            run_id=new_run_id("profile", hardened.method if hardened else "base"),
            command="profile",
            parent_run_id=hardened.run_id if hardened else None,
            method=hardened.method if hardened else "base",
            max_new_tokens=p.new_tokens,
            emax_j=generator.plan.emax_j if generator.plan else None,
        )
        with recording(store, row) as recorder:
            samples: list[Sample] = []
            warm = True
            for batch_size, length in _grid(settings):
                rows = _prompts(data.test, length, batch_size * p.repeats)
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
                    warm_up=warm,
                    progress=progress,
                    check=recorder.check,
                )
                warm = False
                samples += result.samples
                for sample in result.samples:
                    recorder.sample(sample)
                for window in result.windows:
                    recorder.window(window)
                recorder.commit()
            phases = _phases(samples)
            recorder.run.summary = {**recorder.run.summary, **summarise(samples), "phases": phases}
    return Profiled(recorder.run, _points(samples), phases)


def _grid(settings: Settings) -> Iterator[tuple[int, int]]:
    longest = settings.profile.seq_len
    lengths = sorted({max(16, longest // part) for part in (8, 4, 2, 1)})
    for batch_size in settings.profile.batch_sizes:
        for length in lengths:
            yield batch_size, length


def _fits(backbone: Backbone, tokens: int) -> None:
    context = backbone.model.config.max_position_embeddings
    if tokens > context:
        raise HestError(
            f"{tokens} tokens are more than {backbone.name}'s context of {context}",
            f"lower --seq-len to at most {context} minus the new tokens",
            Exit.USAGE,
        )


def _prompts(rows: list[Encoded], length: int, count: int) -> list[Encoded]:
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
    rows = [
        (s.prompt_tokens * s.num_beams, s.new_tokens * s.num_beams, s.energy_j)
        for s in samples
        if s.energy_j is not None and s.energy_valid and s.batch_size == 1
    ]
    if not rows:
        return "prefill and decode: not measured (no valid sample at batch 1)"
    split = split_phases(rows)
    if isinstance(split, Unavailable):
        return f"prefill and decode: not measured ({split.reason})"
    kind = samples[0].energy_kind
    return (
        f"prefill {split.prompt_j_per_token:.4g} +- {split.prompt_error_j:.2g} J a prompt token, "
        f"decode {split.new_j_per_token:.4g} +- {split.new_error_j:.2g} J a new token "
        f"({kind}, apportioned by regression over {split.samples} samples)"
    )


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
                latency_s=figures["latency_p50_s"],
                energy_j=figures["energy_j_per_sample"],
                error_j=figures["energy_error_j_per_sample"],
                scope_energy_j=figures["scope_energy_j_per_sample"],
                emax_j=group[0].emax_j,
            )
        )
    return points
