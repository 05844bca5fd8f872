"""The blocks of the backbone in a run: what they are worth, what they cost, and who decides their states."""

from __future__ import annotations

from torch import Tensor

from hestctl.budget import Budget, calibrated, predicted_tabs_j, whole_model
from hestctl.data.articles import Splits
from hestctl.data.prompts import Encoded, encode
from hestctl.energy.model import GateKind, Terms
from hestctl.energy.table import EnergyTable
from hestctl.hardening.network import Blocks, bills_in, choose_blocks
from hestctl.hardening.repair import Lengths, refuse_unreachable
from hestctl.model import sensitivity
from hestctl.model.backbone import Backbone
from hestctl.model.gates import OrdinalGate
from hestctl.model.methods import Tuner
from hestctl.model.sensitivity import Sensitivities
from hestctl.progress import Progress
from hestctl.records import FULL, INT8, OFF, BlockStates, Run
from hestctl.runs import Recorder
from hestctl.settings import Settings
from hestctl.store import queries
from hestctl.store.store import Store
from hestctl.training.network import BlockPrices, BlockTraining
from hestctl.workflows.setup import decides_blocks, learns_blocks


def sensitivities_of(
    settings: Settings,
    backbone: Backbone,
    splits: Splits,
    store: Store,
    recorder: Recorder,
    progress: Progress,
    *,
    resumed: Run | None = None,
) -> Sensitivities:
    """Those of the store for these weights and data, or measured now on training samples, and recorded.

    A ``resumed`` run keeps its own.
    """
    s, cut = settings.budget, settings.data
    # Of the very samples: their texts, how they are cut, and the type that they run in.
    data = f"{splits.data_hash}/{cut.max_tokens}/{cut.max_answer_tokens}/{backbone.dtype}"
    found: Sensitivities | None = None
    own = None if resumed is None else resumed.summary.get("sensitivities")
    if own is not None:
        found = Sensitivities.from_dict(own)
    elif backbone.weights == "random":
        found = sensitivity.uniform(backbone)
        progress.note("sensitivities: random weights have none, every block counts alike")
    else:
        for run in queries.list_runs(store):
            document = run.summary.get("sensitivities")
            if document is None:
                continue
            old = Sensitivities.from_dict(document)
            same = (old.fingerprint, old.data_hash, old.kind, old.samples)
            if same == (backbone.fingerprint, data, s.sensitivity, s.sensitivity_samples):
                found = old
                progress.note(f"sensitivities: {old.kind}, of run {run.run_id}")
                break
    if found is None:
        rows = _first(settings, backbone, splits, s.sensitivity_samples)
        progress.note(f"sensitivities: {s.sensitivity}, from {len(rows)} training samples")
        measure = sensitivity.exact if s.sensitivity == "exact" else sensitivity.by_gradients
        found = measure(backbone, rows, data, recorder.check)
    run = recorder.run
    run.summary = {**run.summary, "sensitivities": found.as_dict()}
    return found


def _first(settings: Settings, backbone: Backbone, splits: Splits, samples: int) -> list[Encoded]:
    return encode(
        splits.train[:samples],
        backbone.tokenizer,
        settings.data,
        task=splits.task,
        labels=splits.labels,
    )


def deciding(
    settings: Settings,
    backbone: Backbone,
    tuner: Tuner,
    known: Sensitivities | None,
    trained: BlockStates | None = None,
) -> Blocks:
    """What hardening decides the blocks' states by; ``known`` None where only joules matter.

    ``trained`` are the states that a training without a gate for them went through: it begins with these.
    """
    fixed = settings.backbone.blocks(backbone.num_layers)
    if not decides_blocks(settings):
        return Blocks(fixed)
    fixed = trained or fixed
    known = known or sensitivity.uniform(backbone)
    logits: Tensor | None = None
    gate = None if tuner.spectral is None else tuner.spectral.gate
    if isinstance(gate, OrdinalGate) and gate.blocks is not None:
        logits = gate.block_logits().detach().cpu()
        if not gate.blocks.off_L2.isnan().any():  # else it was never trained
            known = known.with_off(gate.blocks.off_L2)
    return Blocks(fixed, logits, known, settings.budget.spend, int8=settings.method.precision == "mixed")


def training_blocks(
    settings: Settings,
    backbone: Backbone,
    tuner: Tuner,
    table: EnergyTable,
    budget: Budget | None,
    known: Sensitivities | None,
    *,
    prompts: list[int],
    bound: tuple[int, int],
    warmup_steps: int,
    total_steps: int,
) -> BlockTraining:
    """The blocks of a training: learned, fixed by settings, or fixed by the sensitivities.

    ``prompts`` are the tokens of the reference's prompts, ``bound`` as for ``harden``. Raises HestError: exit
    5 where the least that can be reached exceeds the budget, usage for what was not calibrated.
    """
    layers, s = backbone.num_layers, settings.budget
    gate = None if tuner.spectral is None else tuner.spectral.gate
    fixed: BlockStates | None = settings.backbone.blocks(layers)

    def choose(decided: BlockStates, by: Sensitivities) -> BlockStates:
        assert budget is not None
        states, _ = choose_blocks(
            whole_model(table.model, budget.batch_size, budget.num_beams),
            budget,
            Blocks(decided, None, by, s.spend, int8=settings.method.precision == "mixed"),
            gate="ordinal",
            margin=s.margin,
            position_j=predicted_tabs_j(layers, settings.method.rank, table.full.joules),
            lengths=Lengths.of(prompts, budget, settings.generation.new_tokens, bound),
        )
        return states

    if decides_blocks(settings):
        assert known is not None
        # Asked for before the first step also where it is learned: what cannot be reached should not wait.
        greedy = choose(BlockStates.uniform(layers), known)
        fixed = None if learns_blocks(settings) else greedy
    elif budget is not None and settings.method.scope == "network" and gate is not None:
        assert fixed is not None
        refuse_unreachable(
            bills_in(whole_model(table.model, budget.batch_size, budget.num_beams), budget, fixed, gate.kind),
            s.margin,
            Lengths.of(prompts, budget, settings.generation.new_tokens, bound),
            emax_j=budget.emax_j,
            ratio=budget.ratio,
            what="the network, its blocks as the settings fix them,",
        )
    prices = _prices(settings, table, budget, None if gate is None else gate.kind, layers)
    return BlockTraining(
        layers,
        prices,
        gate if isinstance(gate, OrdinalGate) else None,
        known,
        fixed=fixed,
        tighten_steps=round(s.tighten * (total_steps - warmup_steps)),
        # The multiplier stands still while rates warm up: nothing would have been decided before that.
        settle_step=warmup_steps + max(1, round(s.settle * (total_steps - warmup_steps))),
        choose=choose,
        swaps=s.swaps,
        samples=s.sensitivity_samples,
    )


def _prices(
    settings: Settings, table: EnergyTable, budget: Budget | None, gate: GateKind | None, layers: int
) -> BlockPrices:
    """Joules of one sample of a batch as it is generated; nothing but E_max in scope adapter."""
    nothing = (Terms.zero(), Terms.zero(), Terms.zero())
    emax = None if budget is None else budget.sample_emax()
    if settings.method.scope == "adapter" or gate is None:
        return BlockPrices(Terms.zero(), (nothing, nothing), emax)
    batch, beams = settings.generation.batch_size, settings.generation.num_beams
    model = whole_model(table.model, batch, beams)
    size = calibrated(model.padded(batch, beams), batch, beams)
    off = BlockStates.uniform(layers, OFF)

    def block(kind: int, state: int) -> Terms:
        return calibrated(model.component(size, beams, kind, state), size, beams).times(1 / batch)

    blocks = tuple((Terms.zero(), block(kind, INT8), block(kind, FULL)) for kind in range(2))
    rest = calibrated(model.generation(size, beams, gate, off), size, beams).times(1 / batch)
    return BlockPrices(rest, (blocks[0], blocks[1]), emax)
