"""What every command needs before it works: data, backbone, meter, energy table, and an honest run row."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from hestctl.budget import Budget, Reference, predicted_tabs_j, resolve_budget
from hestctl.data.articles import Splits, load_splits
from hestctl.data.prompts import Encoded, encode, label_answers
from hestctl.energy.meter import Meter
from hestctl.energy.table import EnergyTable
from hestctl.errors import Exit, HestError
from hestctl.generation.engines import engine_for
from hestctl.generation.native import NativeGenerator
from hestctl.generation.quality import first_token_of_labels
from hestctl.hardening.certificate import certificate, worst
from hestctl.hardening.harden import harden
from hestctl.hardening.network import Blocks
from hestctl.hardening.plan import Plan
from hestctl.model.backbone import Backbone, resolve_device
from hestctl.model.methods import METHODS, Tuner, build_tuner
from hestctl.progress import Progress
from hestctl.records import OFF, Run
from hestctl.runs import Recorder, new_run_id, versions
from hestctl.settings import Settings
from hestctl.store import queries
from hestctl.store.folder import now
from hestctl.store.store import Store
from hestctl.training.checkpoint import save_tensors
from hestctl.workflows.metering import find_counter

ADAPTER_FILE = "adapter.safetensors"
HARDENED_FILE = "hardened.safetensors"
PLAN_FILE = "plan.json"


@dataclass(frozen=True, slots=True)
class Data:
    """The encoded splits, and what they are."""

    splits: Splits
    train: list[Encoded]
    validation: list[Encoded]
    test: list[Encoded]

    @property
    def identity(self) -> str:
        """SHA-256 over the texts and how they were cut into tokens: equal means the same work."""
        digest = hashlib.sha256(self.splits.data_hash.encode())
        for row in self.test:
            digest.update(repr((row.sample_id, row.prompt_ids, row.answer_ids)).encode())
        return digest.hexdigest()

    @property
    def labels(self) -> tuple[str, ...]:
        return self.splits.labels


def read_inputs(settings: Settings, store: Store) -> Splits:
    """The data; and a look at the meter and the store: what fails should not wait for the backbone.

    Raises HestError: usage for data that cannot be used, no device for a meter demanded that is not
    there, store for one that is locked, newer or damaged.
    """
    queries.list_runs(store, limit=1)
    find_counter(settings.energy, resolve_device(settings.backbone.device))
    return load_splits(settings.data, seed=0)  # data is the same for every training seed


SPLITS = ("train", "validation", "test")


def load_data(
    settings: Settings,
    splits: Splits,
    backbone: Backbone,
    progress: Progress,
    *,
    needed: tuple[str, ...] = SPLITS,
) -> Data:
    """Encode the ``needed`` splits for this backbone; truncation is reported, not hidden.

    The others stay empty: a large training split takes minutes that only training should pay. The
    test split is always needed, for it is part of the data's identity.

    Raises HestError (usage) for labels that this backbone's tokenizer does not tell apart.
    """
    if splits.labels:
        first_token_of_labels(label_answers(splits.labels, backbone.tokenizer))
        if settings.generation.new_tokens > 1:
            progress.note(
                "labels are scored, no token is written: --new-tokens 1 spares a plan the rest of "
                f"{settings.generation.new_tokens} that it would have to fit"
            )
    encoded: dict[str, list[Encoded]] = {
        name: encode(
            getattr(splits, name),
            backbone.tokenizer,
            settings.data,
            task=splits.task,
            labels=splits.labels,
        )
        if name in needed
        else []
        for name in SPLITS
    }
    for name, rows in encoded.items():
        cut = [row.truncated_tokens for row in rows if row.truncated_tokens]
        if cut:
            progress.note(f"{name}: {len(cut)} of {len(rows)} samples truncated, {sum(cut)} tokens left out")
    progress.note(
        f"data: {splits.name}, {len(splits.train)} train, "
        f"{len(splits.validation)} validation, {len(splits.test)} test"
    )
    return Data(splits, encoded["train"], encoded["validation"], encoded["test"])


def describe(settings: Settings, backbone: Backbone, meter: Meter, data: Data | None) -> Run:
    """The row of a new run, filled with all that is known before the work starts.

    Raises HestError (usage) where the engine asked for cannot run this backbone.
    """
    method = settings.method
    spec = METHODS[method.name]
    ordinal = spec.gate == "ordinal"
    engine = engine_for(backbone, settings.generation.engine, settings.backbone.blocks(backbone.num_layers))
    return Run(
        run_id=new_run_id("train", method.name),
        command="train",
        status="started",
        created_at=now(),
        method=method.name,
        scope=method.scope,
        precision=method.precision if ordinal else None,
        dual=settings.budget.dual if spec.budgeted else None,
        controller=method.controller if ordinal else None,
        backbone=backbone.name,
        weights=backbone.weights,
        dataset=None if data is None else data.splits.name,
        data_hash=None if data is None else data.identity,
        dtype=str(backbone.dtype).removeprefix("torch."),
        engine=engine.name,
        num_beams=settings.generation.num_beams,
        batch_size=settings.generation.batch_size,
        max_new_tokens=settings.generation.new_tokens,
        seed=settings.train.seed,
        device_name=meter.device_name,
        device_uuid=meter.device_uuid,
        meter=meter.counter_name,
        energy_kind=meter.kind,
        settings=settings.model_dump(mode="json"),
        versions=versions(),
        summary={"fingerprint": backbone.fingerprint},
    )


def check_reference(settings: Settings, store: Store, run: Run) -> None:
    """Refuse a reference that cannot serve before the run begins. Raises HestError (usage)."""
    needed = METHODS[settings.method.name].budgeted and settings.budget.emax_j is None
    if needed and settings.budget.reference is not None:
        find_reference(store, run, settings.budget.reference)


def find_reference(store: Store, run: Run, wanted: str | None) -> Reference | None:
    """The TABS run that E_max refers to: the one named, or the latest that may be compared.

    Raises HestError (usage) when the named run is unknown or may not be compared with this one.
    """
    if wanted is not None:
        named = queries.get_run(store, wanted)
        different = _differences(named, run)
        if named.status != "finished" or "directions_full_per_sample" not in named.summary or different:
            why = ", ".join(different) or f"status {named.status}, method {named.method}"
            raise HestError(
                f"run {wanted} cannot be the reference: {why}",
                "give a finished tabs run on the same data, backbone, device and generation settings",
                Exit.USAGE,
            )
        return _reference(named)
    runs = queries.list_runs(store, command="train", method="tabs", status="finished")
    # One whose training budget let it take no step is no trained reference.
    fit = [old for old in runs if old.steps and not _differences(old, run)]
    return _reference(fit[0]) if fit else None


_SAME = ("backbone", "weights", "dtype", "data_hash", "num_beams", "batch_size", "max_new_tokens", "scope")


_FREE = (("precision", "full"), ("skip_last", 0))


def _differences(old: Run, new: Run) -> list[str]:
    pairs = [(name, getattr(old, name), getattr(new, name)) for name in (*_SAME, "device_uuid")]
    pairs.append(("fingerprint", old.summary.get("fingerprint"), new.summary.get("fingerprint")))
    # A control's blocks are no reference: E_max is a ratio of the whole network's joules.
    pairs += [(f"backbone.{key}", old.settings["backbone"].get(key, free), free) for key, free in _FREE]
    return [f"{name} {mine} is not {theirs}" for name, mine, theirs in pairs if mine != theirs]


def _reference(run: Run) -> Reference:
    """What the reference spent, a prompt counted once a beam, as budgets count it.

    hestctl's engine runs a prompt once for all beams, and its log says so.
    """
    s, beams = run.summary, run.num_beams or 1
    billed = 1.0
    if run.engine == NativeGenerator.engine and beams > 1:
        prompt, new = s["prompt_tokens_per_sample"], s["new_tokens_per_sample"]
        billed = beams * (prompt + new) / (prompt + beams * new)
    return Reference(
        run_id=run.run_id,
        int8_per_sample=billed * s["directions_int8_per_sample"],
        full_per_sample=billed * s["directions_full_per_sample"],
        prompt_tokens=s["prompt_tokens_per_sample"],
        new_tokens=s["new_tokens_per_sample"],
    )


def decides_blocks(settings: Settings) -> bool:
    """Whether a budget decides the states of the backbone's blocks: scope network, where no setting does."""
    backbone, method = settings.backbone, settings.method
    free = backbone.precision == "full" and backbone.skip_last == 0
    return free and method.scope == "network" and METHODS[method.name].budgeted


def bound_of(settings: Settings, data: Data) -> tuple[int, int]:
    """The prompt tokens between which a plan must fit its budget."""
    s = settings.budget
    longest = settings.data.max_tokens if s.longest is None else s.longest
    prompts = [len(row.prompt_ids) for row in (*data.validation, *data.test)]
    return min(min(prompts) if s.shortest is None else s.shortest, longest), longest


def learns_blocks(settings: Settings) -> bool:
    """Whether training learns them, and does not take them from the sensitivities alone."""
    return decides_blocks(settings) and settings.method.layers == "learned"


def new_tuner(settings: Settings, backbone: Backbone, states: tuple[int, ...], seed: int) -> Tuner:
    """An untrained tuner for this backbone, on its device."""
    tuner = build_tuner(
        settings.method,
        backbone.model,
        layers=backbone.num_layers,
        hidden=backbone.hidden_size,
        states=states,
        seed=seed,
        learns_blocks=learns_blocks(settings),
    )
    if tuner.spectral is not None:
        tuner.spectral.to(backbone.device)
    return tuner


def record_plan(plan: Plan, recorder: Recorder, progress: Progress, spend: str) -> None:
    """Store the plan with its certificate, and tell what repair did."""
    energies = plan.energies
    recorder.plan({**plan.as_dict(), "certificate": certificate(plan), "worst": worst(plan)})
    if energies is None or energies.emax_j is None or energies.worst_ratio is None:
        return
    expected, decided, hardened = (
        joules / energies.emax_j for joules in (energies.expected_j, energies.decided_j, energies.hardened_j)
    )
    recorder.run.hardened_ratio = hardened
    progress.note(
        f"hardened: {hardened:.3f} of E_max on {energies.samples} validation samples "
        f"(worst {energies.worst_ratio:.3f}); expected {expected:.3f}, hard gates before repair {decided:.3f}"
    )
    if not 0.95 <= hardened <= 1.0:
        progress.note(f"outside 0.95 to 1.00 of E_max because {_why_outside(plan, spend)}")
    if plan.moved is not None and abs(plan.moved) > 0.1:
        progress.note(
            f"flag: repair moved the energy by {100 * plan.moved:+.0f} %; train longer to need less"
        )


def _why_outside(plan: Plan, spend: str) -> str:
    if plan.scope == "adapter":
        if plan.uses_int8:
            return "a token that the ledger cuts may leave up to one int8 direction unspent"
        return "samples differ in length: short ones cannot spend all, long ones are cut"
    chosen = [choice for pair in plan.choices for choice in pair]
    if any(choice.why == "fixed" for choice in chosen):
        return "the settings fix the states of all blocks"
    if plan.blocks.all_full:
        return "every block is at full: there is nothing left to buy"
    most = worst(plan)
    assert most is not None
    if most["bound_over_emax"] >= 0.95 * (1 - plan.margin):
        return (
            f"{most['length_tokens']:,} + {most['new_tokens']} tokens have to fit too, and take "
            f"{most['bound_over_emax']:.3f} ({100 * plan.margin:.2g} % stay in reserve)"
        )
    if spend == "useful" and all(choice.state != OFF for choice in chosen):
        return (
            "every block that int8 measurably harms is at full: more joules would buy nothing "
            "(--set budget.spend=all spends them)"
        )
    return "the next block would not fit any more"


def budget_of(
    settings: Settings,
    store: Store,
    recorder: Recorder,
    backbone: Backbone,
    data: Data,
    table: EnergyTable,
    progress: Progress,
    resumed: Run | None = None,
) -> Budget:
    """E_max with its origin, written into the run and told. Raises HestError (usage) without a budget.

    A ``resumed`` run keeps its own, even where a later tabs run would give another.
    """
    if resumed is not None and "budget" in resumed.summary:
        budget = Budget.from_dict(resumed.summary["budget"])
    else:
        budget = _new_budget(settings, store, recorder.run, backbone, data, table)
    run = recorder.run
    run.emax_j, run.emax_ratio, run.emax_origin = budget.emax_j, budget.ratio, budget.origin
    run.summary = {**run.summary, "budget": budget.as_dict()}
    lengths = ""
    if budget.envelope == "matched":
        lengths = f" at {budget.prompt_tokens:.0f} + {budget.new_tokens:.0f} tokens, in proportion at others"
    progress.note(
        f"E_max {budget.emax_j:.4g} J a sample in scope {budget.scope}{lengths} (predicted; {budget.origin})"
    )
    return budget


def _new_budget(
    settings: Settings, store: Store, run: Run, backbone: Backbone, data: Data, table: EnergyTable
) -> Budget:
    s = settings
    _refuse_short_batches(s, data)
    reference = find_reference(store, run, s.budget.reference) if s.budget.emax_j is None else None
    prompts = [len(row.prompt_ids) for row in data.test]
    return resolve_budget(
        scope=s.method.scope,
        envelope=s.budget.envelope,
        emax_j=s.budget.emax_j,
        emax_ratio=s.budget.emax_ratio,
        reference=reference,
        costs_j=table.costs_j,
        predicted_j=predicted_tabs_j(backbone.num_layers, s.method.rank, table.full.joules),
        prompt_tokens=sum(prompts) / len(prompts),
        max_new_tokens=s.generation.new_tokens,
        num_beams=s.generation.num_beams,
        batch_size=s.generation.batch_size,
        model=table.model,
    )


def _refuse_short_batches(s: Settings, data: Data) -> None:
    """A last batch of fewer requests costs nearly what a whole one does, and a fixed E_max allows it less.

    Raises HestError (usage) where there would be one.
    """
    size, envelope = s.generation.batch_size, s.budget.envelope
    absolute = envelope == "absolute" or (envelope == "auto" and s.budget.emax_j is not None)
    short = [name for name in ("validation", "test") if len(getattr(data, name)) % size]
    if s.method.scope == "network" and absolute and short:
        raise HestError(
            f"one E_max for all samples, and a last batch of fewer than {size} in {' and '.join(short)}",
            "--set generation.batch_size=1, or sizes that batches divide, such as "
            f"--set data.test_samples={max(size, len(data.test) // size * size)}",
            Exit.USAGE,
        )


def harden_into(
    recorder: Recorder,
    settings: Settings,
    backbone: Backbone,
    tuner: Tuner,
    data: Data,
    table: EnergyTable,
    budget: Budget | None,
    progress: Progress,
    blocks: Blocks,
) -> Plan | None:
    """Harden what was trained, and put plan, certificate and hardened tensors into the run.

    A method without directions has no plan; LoRA's tensors are kept as they are. ``blocks`` is what decides
    the states of the backbone's blocks.
    """
    plan = None
    if tuner.spectral is not None:
        progress.note("hardening on the validation split")
        plan = harden(
            backbone,
            tuner.spectral,
            data.validation,
            run_id=recorder.run.run_id,
            method=settings.method.name,
            scope=settings.method.scope,
            table=table,
            budget=budget,
            margin=settings.budget.margin,
            generation=settings.generation,
            blocks=blocks,
            bound=bound_of(settings, data),
        )
        record_plan(plan, recorder, progress, settings.budget.spend)
    if METHODS[settings.method.name].trained:
        metadata = {"plan": "" if plan is None else plan.run_id}
        save_tensors(recorder.folder.path / HARDENED_FILE, tuner.state(), metadata)
    return plan
