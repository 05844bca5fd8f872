"""``profile --method``: methods side by side in one run, in ABBA order, with phases apart and floors beside.

Methods need no training here: adapters are as initialised, or those of the latest hardened run; what they
generate is of no matter. Joules and times are those of the engine, the precision and the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from hestctl.budget import predicted_tabs_j, resolve_budget
from hestctl.data.prompts import Encoded
from hestctl.energy.meter import Meter
from hestctl.energy.table import EnergyTable
from hestctl.errors import Exit, HestError
from hestctl.generation.engines import Engine, EngineKind, engine_for
from hestctl.generation.evaluate import Evaluation, evaluate
from hestctl.hardening.harden import harden
from hestctl.hardening.plan import read_plan
from hestctl.kernels.floors import DecoderShape, decode_floor_s, device_peak, prefill_floor_s
from hestctl.model.backbone import Backbone, load_backbone
from hestctl.model.methods import METHODS
from hestctl.progress import Progress
from hestctl.records import FULL, INT8, BlockStates, Run, Sample
from hestctl.runs import Recorder, new_run_id, recording
from hestctl.settings import GenerationSettings, Settings, with_values
from hestctl.store import queries
from hestctl.store.folder import RunFolder
from hestctl.store.store import Store
from hestctl.workflows.blocks import deciding
from hestctl.workflows.engines import load_hardened, record_engine, with_kernels
from hestctl.workflows.metering import energy_table, open_meter, stored_table
from hestctl.workflows.profile import fits, grid, prompts_of
from hestctl.workflows.setup import PLAN_FILE, describe, load_data, new_tuner, read_inputs
from hestctl.workflows.summary import summarise


@dataclass(frozen=True, slots=True)
class Variant:
    """A method with the precision of its backbone and its engine, such as ``hest+int8``."""

    text: str
    method: str
    settings: Settings


@dataclass(frozen=True, slots=True)
class Row:
    """One variant at one point of the sweep: medians of its samples, and their joules (J, s).

    ``prefill_s``, ``prefill_j`` come from generations of one token, ``decode_j`` is the rest of the whole.
    ``memory_share`` and ``compute_share`` are the datasheet's floor over the time taken, for a decode step
    and for the prefill; None where the device is in no datasheet here.
    """

    variant: str
    prompt_tokens: int
    batch_size: int
    num_beams: int
    samples: int
    latency_s: float
    prefill_s: float
    energy_j: float | None
    error_j: float | None
    prefill_j: float | None
    decode_j: float | None
    decode_tokens_per_s: float | None
    memory_share: float | None
    compute_share: float | None


@dataclass(frozen=True, slots=True)
class Benchmarked:
    """The runs, one a variant, and their rows point by point."""

    runs: list[Run]
    rows: list[Row]
    notes: list[str]


@dataclass(slots=True)
class _Notes:
    """Lets notes through: a bar for every single generation would hide the one for all of them."""

    progress: Progress

    def note(self, text: str) -> None:
        self.progress.note(text)

    def advance(self, stage: str, done: int, total: int, figures: Mapping[str, float | None]) -> None:
        """Says nothing."""


@dataclass(slots=True)
class _Seen:
    """What one variant showed at one point."""

    samples: list[Sample] = field(default_factory=list)
    prefill: list[Sample] = field(default_factory=list)


def variants_of(settings: Settings, texts: Sequence[str]) -> list[Variant]:
    """``METHOD[+int8][+transformers|+hestctl]`` texts as variants. Raises HestError (usage)."""
    found = []
    for text in texts:
        method, *parts = text.strip().split("+")
        values = {"method.name": method}
        for part in parts:
            if part not in ("int8", "full", "hestctl", "transformers"):
                hint = "+int8, +full, +hestctl or +transformers"
                raise HestError(f"--method {text!r}: there is no +{part}", hint, Exit.USAGE)
            key = {"int8": "backbone.precision", "full": "backbone.precision"}.get(part, "generation.engine")
            values[key] = part
        if METHODS.get(method) is None or METHODS[method].lora:
            why = (
                "its matrices are merged: it costs what base costs" if method == "lora" else "no such method"
            )
            raise HestError(
                f"--method {text!r}: {why}",
                "base, tabs, bhsp or hest, with +int8 and +transformers",
                Exit.USAGE,
            )
        found.append(Variant(text.strip(), method, with_values(settings, values)))
    if len({variant.text for variant in found}) < len(found):
        raise HestError(f"--method names a variant twice: {', '.join(texts)}", "name each once", Exit.USAGE)
    return found


def benchmark(
    settings: Settings, store: Store, progress: Progress, variants: Sequence[Variant], beams: Sequence[int]
) -> Benchmarked:
    """Generate ``profile.new_tokens`` tokens with every variant at every point, forwards and backwards.

    A point is warmed up first, then every repetition visits the variants in the opposite order, so that a
    drift of the device falls on all alike. Raises HestError (usage) beyond the backbone's context.
    """
    splits = read_inputs(settings, store)
    backbone = load_backbone(settings.backbone, progress=progress.note)
    fits(backbone, settings.profile.seq_len + settings.profile.new_tokens)
    data = load_data(settings, splits, backbone, progress, needed=("test",))
    with (
        open_meter(settings.energy, backbone.device, store, progress) as meter,
        ExitStack() as stack,
    ):
        recorders: dict[str, Recorder] = {}
        for variant in variants:
            row = replace(
                describe(variant.settings, backbone, meter, data),
                run_id=new_run_id("profile", variant.text),
                command="profile",
                max_new_tokens=settings.profile.new_tokens,
            )
            recorders[variant.text] = stack.enter_context(recording(store, row))
        points = [(b, length, w) for b, length in grid(settings) for w in beams]
        visits = len(points) * len(variants) * settings.profile.repeats
        bench = _Bench(settings, store, progress, backbone, meter, recorders, visits)
        rows: list[Row] = []
        for batch_size, length, num_beams in points:
            prompts = prompts_of(data.test, length, batch_size * settings.profile.repeats)
            rows += bench.point(variants, prompts, batch_size, num_beams)
        for recorder in recorders.values():
            recorder.run.summary = {
                **recorder.run.summary,
                **summarise(bench.samples[recorder.run.run_id]),
                "variants": [variant.text for variant in variants],
            }
    return Benchmarked([recorder.run for recorder in recorders.values()], rows, bench.notes)


@dataclass(slots=True)
class _Bench:
    settings: Settings
    store: Store
    progress: Progress
    backbone: Backbone
    meter: Meter
    recorders: dict[str, Recorder]
    visits: int
    done: int = 0
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kinds: dict[str, EngineKind] = field(default_factory=dict)
    blocks: dict[str, BlockStates] = field(default_factory=dict)
    tables: dict[str, EnergyTable] = field(default_factory=dict)

    def point(
        self, variants: Sequence[Variant], prompts: list[Encoded], batch_size: int, num_beams: int
    ) -> list[Row]:
        """All variants on these prompts, repetition by repetition."""
        engines = {v.text: self._engine(v, prompts, batch_size, num_beams) for v in variants}
        seen = {v.text: _Seen() for v in variants}
        self.blocks = {text: engine.blocks for text, (_, engine) in engines.items()}
        for variant in variants:
            record_engine(self.recorders[variant.text].run, *engines[variant.text])
            for new_tokens in (1, self.settings.profile.new_tokens):
                engines[variant.text][1].warm_up(
                    prompts,
                    batch_size=batch_size,
                    new_tokens=new_tokens,
                    num_beams=num_beams,
                    forced_length=True,
                )
        for repeat in range(self.settings.profile.repeats):
            rows = prompts[repeat * batch_size : (repeat + 1) * batch_size]
            for variant in variants if repeat % 2 == 0 else reversed(variants):
                self._visit(
                    variant, engines[variant.text][1], rows, batch_size, num_beams, seen[variant.text]
                )
        return [self._row(variant, seen[variant.text]) for variant in variants]

    def _visit(
        self,
        variant: Variant,
        engine: Engine,
        rows: list[Encoded],
        batch_size: int,
        num_beams: int,
        seen: _Seen,
    ) -> None:
        recorder = self.recorders[variant.text]
        recorder.check()
        prefill = self._generate(engine, rows, batch_size, num_beams, 1, metered=True)
        whole = self._generate(
            engine, rows, batch_size, num_beams, self.settings.profile.new_tokens, metered=True
        )
        seen.prefill += prefill.samples
        for sample, first in zip(whole.samples, prefill.samples, strict=True):
            sample = _with_phases(sample, first)
            seen.samples.append(sample)
            recorder.sample(sample)
            self.samples.setdefault(recorder.run.run_id, []).append(sample)
        for window in (*(replace(w, phase="prefill") for w in prefill.windows), *whole.windows):
            recorder.window(window)
        recorder.commit()
        self.done += 1
        one = whole.samples[0]
        figures = {f"{variant.text} s": one.latency_s, f"J {self.meter.kind}": one.energy_j}
        self.progress.advance("benchmarking", self.done, self.visits, figures)

    def _generate(
        self,
        engine: Engine,
        rows: list[Encoded],
        batch_size: int,
        num_beams: int,
        new_tokens: int,
        *,
        metered: bool = False,
    ) -> Evaluation:
        asked = GenerationSettings(new_tokens=new_tokens, num_beams=num_beams, batch_size=batch_size)
        return evaluate(
            engine,
            rows,
            asked,
            self.meter,
            split="profile",
            score=False,
            forced_length=True,
            precision=self.settings.profile.precision if metered and self.meter.bounded else None,
            progress=_Notes(self.progress),
            check=self._check,
        )

    def _check(self) -> None:
        for recorder in self.recorders.values():
            recorder.check()

    def _engine(
        self, variant: Variant, prompts: list[Encoded], batch_size: int, num_beams: int
    ) -> tuple[EngineKind, Engine]:
        s, backbone = variant.settings, self.backbone
        if variant.text not in self.kinds:
            self.kinds[variant.text] = with_kernels(
                engine_for(backbone, s.generation.engine, s.backbone.blocks(backbone.num_layers)),
                stored_table(s, backbone, self.meter, self.store, self.progress),
            )
        kind = self.kinds[variant.text]
        if METHODS[variant.method].gate is None:
            return kind, kind.make(backbone, None, None)
        trained = self._hardened(variant.method)
        if trained is not None and self._fits(trained, variant, prompts, batch_size, num_beams):
            self._tell(f"{variant.text}: adapters and plan of run {trained.run_id}")
            # Against no table: a variant runs the plan as it is, in whatever precision it is about.
            return kind, load_hardened(self.store, trained, backbone, self.meter.device_name, kind, None)
        self._tell(
            f"{variant.text}: adapters as initialised"
            + (", hardened for each length" if METHODS[variant.method].budgeted else "")
        )
        return kind, self._untrained(variant, kind, prompts, batch_size, num_beams)

    def _untrained(
        self, variant: Variant, kind: EngineKind, prompts: list[Encoded], batch_size: int, num_beams: int
    ) -> Engine:
        s, backbone = variant.settings, self.backbone
        recorder = self.recorders[variant.text]
        table = self._table(variant, batch_size, num_beams)
        tuner = new_tuner(s, backbone, table.states, s.train.seed)
        assert tuner.spectral is not None
        budget = None
        if METHODS[variant.method].budgeted:
            new_tokens = s.profile.new_tokens
            budget = resolve_budget(
                emax_j=s.budget.emax_j,
                emax_ratio=s.budget.emax_ratio,
                reference=None,
                costs_j=table.costs_j,
                predicted_j=predicted_tabs_j(backbone.num_layers, s.method.rank, table.full.joules),
                prompt_tokens=len(prompts[0].prompt_ids),
                max_new_tokens=new_tokens,
                num_beams=num_beams,
                scope=s.method.scope,
                envelope=s.budget.envelope,
                batch_size=batch_size,
                model=table.model,
            )
        plan = harden(
            backbone,
            tuner.spectral,
            prompts[:2],
            run_id=recorder.run.run_id,
            method=variant.method,
            scope=s.method.scope,
            table=table,
            budget=budget,
            margin=s.budget.margin,
            generation=GenerationSettings(
                new_tokens=s.profile.new_tokens, num_beams=num_beams, batch_size=batch_size
            ),
            blocks=deciding(s, backbone, tuner, None),
            bound=(len(prompts[0].prompt_ids), len(prompts[0].prompt_ids)),
        )
        kind = replace(kind, blocks=plan.blocks)
        return kind.make(backbone, tuner.spectral, plan)

    def _hardened(self, method: str) -> Run | None:
        """The latest hardened run of this method for this backbone on this device."""
        for run in queries.list_runs(self.store, method=method, status="finished", has_plan=True):
            fits_both = (run.summary.get("fingerprint"), run.device_name) == (
                self.backbone.fingerprint,
                self.meter.device_name,
            )
            if run.command in ("train", "harden") and fits_both:
                return run
        return None

    def _fits(
        self, trained: Run, variant: Variant, prompts: list[Encoded], batch_size: int, num_beams: int
    ) -> bool:
        """Whether the plan of a run serves this point; in scope network it is of its blocks and batches."""
        plan = read_plan(RunFolder(self.store.root, trained.run_id).path / PLAN_FILE)
        if plan.scope == "adapter":
            return True
        new_tokens, lengths = self.settings.profile.new_tokens, [len(row.prompt_ids) for row in prompts]
        why = "the variant fixes the blocks"
        if variant.settings.backbone.blocks(self.backbone.num_layers).all_full:
            try:
                if plan.max_new_tokens_for(lengths[:batch_size], num_beams, new_tokens) == new_tokens:
                    return True
                why = f"its E_max ends before {new_tokens} new tokens"
            except HestError as error:
                why = error.message
        self._tell(f"{variant.text}: the plan of run {trained.run_id} does not serve here: {why}")
        return False

    def _table(self, variant: Variant, batch_size: int, num_beams: int) -> EnergyTable:
        """One table an engine: other prices for another variant would be other plans."""
        s, recorder = variant.settings, self.recorders[variant.text]
        key = recorder.run.engine or ""
        if s.method.scope == "network":
            # Whole generations are billed by batch and beams.
            values = {"generation.batch_size": batch_size, "generation.num_beams": num_beams}
            s, key = with_values(s, values), f"{key} {batch_size} x {num_beams}"
        if key not in self.tables:
            self.tables[key] = energy_table(s, self.backbone, self.meter, self.store, recorder, self.progress)
        recorder.run.calibration_id = self.tables[key].calibration_id
        return self.tables[key]

    def _tell(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            self.progress.note(note)

    def _row(self, variant: Variant, seen: _Seen) -> Row:
        first = seen.samples[0]
        figures, prefill = summarise(seen.samples), summarise(seen.prefill)
        latency_s, prefill_s = figures["latency_p50_s"], prefill["latency_p50_s"]
        steps, decode_s = first.new_tokens - 1, latency_s - prefill_s
        peak = device_peak(self.meter.device_name)
        memory_share = compute_share = None
        blocks = self.blocks[variant.text]
        uniform = blocks in (BlockStates.uniform(blocks.layers, state) for state in (INT8, FULL))
        # The floors are those of 16-bit weights, and of a network whose layers are all alike.
        if peak is not None and uniform and self.backbone.dtype.itemsize == 2:
            shape = _shape(self.backbone, 1.0 if blocks.uses_int8 else 2.0)
            # Beams share their prompt's cache: less than that nobody can read.
            context = first.prompt_tokens + first.num_beams * (first.new_tokens // 2)
            if steps and decode_s > 0:
                memory_share = decode_floor_s(shape, peak, first.batch_size, context) * steps / decode_s
            compute_share = prefill_floor_s(shape, peak, first.batch_size, first.prompt_tokens) / prefill_s
        return Row(
            variant=variant.text,
            prompt_tokens=first.prompt_tokens,
            batch_size=first.batch_size,
            num_beams=first.num_beams,
            samples=len(seen.samples),
            latency_s=latency_s,
            prefill_s=prefill_s,
            energy_j=figures["energy_j_per_sample"],
            error_j=figures["energy_error_j_per_sample"],
            prefill_j=figures["prefill_j_per_sample"],
            decode_j=figures["decode_j_per_sample"],
            decode_tokens_per_s=first.batch_size * steps / decode_s if steps and decode_s > 0 else None,
            memory_share=memory_share,
            compute_share=compute_share,
        )


def _with_phases(sample: Sample, prefill: Sample) -> Sample:
    """The sample with its phases told apart by a window of its prefill alone."""
    if sample.energy_j is None or prefill.energy_j is None or not prefill.energy_valid:
        return sample
    return replace(
        sample,
        prefill_j=prefill.energy_j,
        decode_j=sample.energy_j - prefill.energy_j,
        phase_method="subtracted",
    )


def _shape(backbone: Backbone, layer_bytes: float) -> DecoderShape:
    config = backbone.model.config
    heads = config.num_attention_heads
    return DecoderShape(
        layers=backbone.num_layers,
        hidden=backbone.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or backbone.hidden_size // heads,
        vocabulary=config.vocab_size,
        layer_bytes=layer_bytes,
    )


def ratio_to_first(rows: Sequence[Row], row: Row) -> tuple[float | None, float]:
    """Joules and time of ``row`` over those of the first variant at the same point."""
    point = (row.prompt_tokens, row.batch_size, row.num_beams)
    first = next(r for r in rows if (r.prompt_tokens, r.batch_size, r.num_beams) == point)
    joules = None if row.energy_j is None or not first.energy_j else row.energy_j / first.energy_j
    return joules, row.latency_s / first.latency_s
