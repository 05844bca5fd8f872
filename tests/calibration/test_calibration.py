"""Calibration on a simulated board: what is fitted predicts what the meter then shows of other lengths."""

from __future__ import annotations

import json
import random
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from hestctl.calibration import measure
from hestctl.calibration.figures import (
    GATES,
    Figure,
    Target,
    Whole,
    Work,
    generation_figures,
    whole_generations,
)
from hestctl.calibration.kernels import layer_weights
from hestctl.calibration.measure import Calibration, table_key
from hestctl.energy.conditions import Conditions
from hestctl.energy.fake import FakeClock, FakeCounter
from hestctl.energy.meter import Meter
from hestctl.energy.model import PhaseJoules, Terms, uniform
from hestctl.energy.replicate import replicate
from hestctl.energy.table import EnergyTable
from hestctl.errors import Exit, HestError
from hestctl.generation.engines import Engine, EngineKind
from hestctl.kernels.choose import Choices
from hestctl.model.backbone import Backbone, tiny_backbone
from hestctl.records import FULL, INT8, OFF, STATES, BlockStates, EnergyKind
from hestctl.settings import EnergySettings, MethodSettings

IDLE_W, PREFILL_W, DECODE_W = 125.0, 700.0, 450.0
LENGTHS = (128, 512, 1024)
HESTCTL, TRANSFORMERS = EngineKind("hestctl", None), EngineKind("transformers", None)


@dataclass
class Board:
    """A board whose counter steps every 100 ms, give or take 5 ms, and whose power depends on the work."""

    clock: FakeClock = field(default_factory=FakeClock)
    name: str = "simulated"
    kind: EnergyKind = "measured"
    device_name: str = "Board"
    device_uuid: str = "GPU-board"
    step_s: float | None = 0.1
    max_w: float | None = 900.0

    def __post_init__(self) -> None:
        self._rng = random.Random(3)
        self._knees = [(self.clock(), 5000.0, IDLE_W)]
        self._steps = [(self.clock(), 5000.0)]

    def work(self, *parts: tuple[float, float]) -> None:
        """Draws so many joules at so many watts, part after part, each with 2 % of noise."""
        for joules, watts in parts:
            self._knee(watts)
            self.clock.advance(joules * (1 + self._rng.uniform(-0.02, 0.02)) / watts)
        self._knee(IDLE_W)
        self.clock.advance(0.002)

    def read_j(self) -> float:
        self.clock.spend(0.0045)
        step_s, _ = self._steps[-1]
        next_s = step_s + 0.1 + random.Random(len(self._steps)).uniform(-0.005, 0.005)
        if next_s <= self.clock():
            # Kept as it was shown: a poll may run into what the caller does next.
            self._steps.append((next_s, self._at(next_s)))
        return self._steps[-1][1]

    def conditions(self) -> Conditions:
        return Conditions()

    def _knee(self, watts: float) -> None:
        now_s = self.clock()
        self._knees.append((now_s, self._at(now_s), watts))

    def _at(self, t_s: float) -> float:
        from_s, joules, watts = self._knees[max(0, bisect_right(self._knees, t_s, key=lambda k: k[0]) - 1)]
        return joules + watts * (t_s - from_s)


SHARE = {"off": 0.0, "int8": 0.55, "full": 1.0}
"""What a block draws in each state, of what it draws in full precision."""


def phases_j(prompt: int, new: int, attention: str = "full", mlp: str = "full") -> tuple[float, float]:
    """What a generation draws: a 7B model's shape, roughly, two thirds of its MatMuls in the MLPs. J."""
    on = 0.15 + 0.25 * SHARE[attention] + 0.6 * SHARE[mlp]
    prefill, decode = on * (2.0 + 0.035 * prompt), on * 2.4 * (new - 1)
    if attention != "off":
        prefill += 6e-7 * prompt**2
        decode += sum(1e-5 * (prompt + k) for k in range(1, new))
    return prefill, decode


def generation(board: Board, prompt: int, new: int, attention: str = "full", mlp: str = "full") -> Work:
    prefill, decode = phases_j(prompt, new, attention, mlp)
    return lambda: board.work((prefill, PREFILL_W), (decode, DECODE_W))


class Quiet:
    notes: list[str]

    def __init__(self) -> None:
        self.notes = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, stage: str, done: int, total: int, figures: object) -> None:
        assert 0 <= done <= total


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    """Every figure's work draws known joules from the board."""
    board = Board()

    def drawing(joules: float) -> Callable[[], Work]:
        return lambda: lambda: board.work((joules, DECODE_W))

    def generations(_target: object, wholes: list[Whole]) -> list[Figure]:
        return [Figure(whole.key, lambda w=whole: generation(board, *w[2:]), 1) for whole in wholes]

    def like(name: str) -> None:
        real = getattr(measure, name)

        def figures(*arguments: object) -> list[Figure]:
            return [
                Figure(f.key, drawing(8.0 if "int8" in f.key else 16.0), f.units) for f in real(*arguments)
            ]

        monkeypatch.setattr(measure, name, figures)

    for name in ("direction_figures", "adapter_figures"):
        like(name)
    monkeypatch.setattr(measure, "generation_figures", generations)
    # Simulated work takes no time of ours, by which it would be lengthened.
    monkeypatch.setattr(measure, "_lengthened", lambda work: (work, 1))
    return board


def target(backbone: Backbone, **method: object) -> Target:
    return Target(backbone, TRANSFORMERS, MethodSettings(**method))


def calibrated(
    meter: Meter, found: dict[str, measure.Cost] | None = None, engine: EngineKind = HESTCTL
) -> EnergyTable:
    settings = EnergySettings(lengths=LENGTHS)
    calibration = Calibration(
        Target(tiny_backbone(max_position_embeddings=8192), engine, MethodSettings()),
        settings,
        meter,
        Quiet(),
        lambda: None,
        found={} if found is None else found,
    )
    return calibration.full(1)


@pytest.mark.parametrize("engine", [HESTCTL, TRANSFORMERS])
def test_what_is_fitted_predicts_lengths_between_and_outside(board: Board, engine: EngineKind) -> None:
    with Meter(board, clock=board.clock, pace=board.clock) as meter:
        table = calibrated(meter, engine=engine)
        assert table.model is not None
        errors = []
        for prompt, new in ((64, 128), (300, 64), (700, 128), (1024, 128), (2048, 128), (4000, 32)):
            found = replicate(
                generation(board, prompt, new), meter, name="p", phase="generation", precision=0.02
            )
            predicted = table.model.predict([prompt], [new])
            assert isinstance(predicted, PhaseJoules)
            assert found.energy_j is not None
            errors.append(abs(predicted.total_j / found.energy_j - 1))
            prefill_j, decode_j = phases_j(prompt, new)
            assert predicted.prefill_j == pytest.approx(prefill_j, rel=0.15, abs=1.0)
            assert predicted.decode_j == pytest.approx(decode_j, rel=0.05)
        assert sum(errors) / len(errors) < 0.05


def test_blocks_in_mixed_states_are_predicted_from_uniform_ones(board: Board) -> None:
    with Meter(board, clock=board.clock, pace=board.clock) as meter:
        table = calibrated(meter)
    model = table.model
    assert model is not None
    # Two layers: half of what all of them draw in one state, and half in the other.
    for mixed in (("full", "int8"), ("int8", "off"), ("off", "full")):
        attention = tuple(STATES.index(state) for state in mixed)
        for mlp in (attention, attention[::-1]):
            for prompt, new in ((200, 20), (700, 64)):
                found = model.predict([prompt], [new], blocks=BlockStates(attention, mlp))
                assert isinstance(found, PhaseJoules)
                layers = [
                    sum(phases_j(prompt, new, STATES[a], STATES[m]))
                    for a, m in zip(attention, mlp, strict=True)
                ]
                assert found.total_j == pytest.approx(sum(layers) / 2 + IDLE_W * 0.002, rel=0.03)


def test_the_longest_come_first_and_other_states_at_the_ends_of_the_lengths() -> None:
    backbone = tiny_backbone()
    wholes = whole_generations(Target(backbone, HESTCTL, MethodSettings()), [1, 4], 2, [16, 64, 32])
    assert [w for w in wholes if (w.attention, w.mlp) == ("full", "full")] == [
        (batch, 2, prompt, new, "full", "full")
        for batch in (1, 4)
        for prompt in (64, 32, 16)
        for new in (33, 9, 1)
    ]
    others = [("off", "full"), ("full", "off"), ("off", "off")]
    others += [("int8", "int8"), ("off", "int8"), ("int8", "off")]
    assert [w for w in wholes if (w.attention, w.mlp) != ("full", "full")] == [
        (batch, 2, prompt, new, *states)
        for states in others
        for batch in (1, 4)
        for prompt in (64, 16)
        for new in (33, 1)
    ]
    assert len({w.key for w in wholes}) == len(wholes)
    alone = whole_generations(Target(backbone, TRANSFORMERS, MethodSettings()), [1], 1, [16, 64])
    assert {(w.attention, w.mlp) for w in alone} == {("full", "full")}


def test_every_generation_runs_in_its_states(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[BlockStates | None] = []
    make = EngineKind.make

    def watched(kind: EngineKind, *arguments: Any) -> Engine:
        made.append(kind.blocks)
        return make(kind, *arguments)

    monkeypatch.setattr(EngineKind, "make", watched)
    target = Target(tiny_backbone(), HESTCTL, MethodSettings())
    wholes = whole_generations(target, [1], 1, [16])
    for figure in generation_figures(target, wholes):
        figure.make()
    expected = [uniform(2, w.attention, w.mlp) for w in wholes]
    assert [blocks or BlockStates.uniform(2) for blocks in made] == expected


def test_the_tiny_backbone_is_calibrated_from_end_to_end() -> None:
    """Real work of real engines; the joules of a counter that runs on the machine's own clock."""
    counter = FakeCounter(clock=time.monotonic, power=100.0, step_s=None)
    settings = EnergySettings(
        lengths=(4, 12), batch_sizes=(2,), calibration_s=0.002, calibration_precision=0.9
    )
    with Meter(counter) as meter:
        table = Calibration(
            Target(tiny_backbone(), HESTCTL, MethodSettings()), settings, meter, Quiet(), lambda: None
        ).full(1)
    model = EnergyTable.from_dict(json.loads(json.dumps(table.as_dict()))).model
    assert model is not None
    assert model == table.model
    assert (model.layers, model.engine, len(model.points)) == (2, "hestctl", 2 * 3 + 6 * 4)
    blocks = BlockStates((OFF, INT8), (FULL, OFF))
    for gate in (None, *GATES):
        found = model.predict([5, 9], [3, 20], gate=gate, blocks=blocks)
        assert isinstance(found, PhaseJoules)
        assert found.total_j > 0
    assert all(isinstance(model.component(2, 1, block, s), Terms) for block in (0, 1) for s in range(3))
    assert set(table.kernels or ()) == {"device_name", "by_shape"}


def test_every_figure_is_known_to_two_percent(board: Board) -> None:
    with Meter(board, clock=board.clock, pace=board.clock) as meter:
        table = calibrated(meter)
    assert table.model is not None
    for point in table.model.points:
        drawn = phases_j(point.prompt_tokens, point.new_tokens, point.attention, point.mlp)
        true = sum(drawn) + IDLE_W * 0.002
        assert point.cost.joules == pytest.approx(true, rel=0.02)
        assert point.cost.error_j <= 0.03 * point.cost.joules
    per_direction = measure.TOKENS * table.rank
    assert table.full.joules * per_direction == pytest.approx(16 + IDLE_W * 0.002, rel=0.02)
    assert table.int8.joules * per_direction == pytest.approx(8 + IDLE_W * 0.002, rel=0.02)
    assert table.int8_pays


def test_what_was_found_before_is_not_measured_again(board: Board) -> None:
    with Meter(board, clock=board.clock, pace=board.clock) as meter:
        found: dict[str, measure.Cost] = {}
        table = calibrated(meter, found)
        before_s = board.clock()
        again = calibrated(meter, measure.from_document(measure.as_document(found)))
        assert board.clock() == before_s
    assert again.model == table.model
    assert (again.full, again.int8, again.controller) == (table.full, table.int8, table.controller)


def test_kernels_are_chosen_where_blocks_run_in_int8_and_cost_nothing_where_one_alone_can(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    backbone = tiny_backbone()
    kept: list[Choices] = []
    with Meter(board, clock=board.clock, pace=board.clock) as meter:
        calibration = Calibration(
            Target(backbone, HESTCTL, MethodSettings()),
            EnergySettings(lengths=LENGTHS),
            meter,
            Quiet(),
            lambda: None,
            keep_choices=kept.append,
        )
        before_s = board.clock()
        calibration._choose([2])
        assert board.clock() == before_s
        table = calibration.full(2)
    assert table.kernels is not None
    # Four products, each at decode and at two lengths of prompts.
    assert len(kept) == len(table.kernels["by_shape"]) == 12
    read = EnergyTable.from_dict(json.loads(json.dumps(table.as_dict())))
    assert read == table
    choices = Choices.from_dict(read.kernels or {})
    assert choices == kept[-1]
    for part in layer_weights(backbone.layers[0]):
        kernels = choices.kernels(sum(len(weight) for weight in part), part[0].shape[1])
        assert set(kernels.values()) == {"torch._int_mm"}
    int8 = EngineKind("hestctl", None, choices=choices, blocks=BlockStates.uniform(2, INT8))
    note = int8.make(backbone, None, None).notes["kernels"]
    assert isinstance(note, dict)
    assert {"the only one that runs here" in told for told in note.values()} == {True}


def test_a_table_from_before_kernels_were_chosen_loads(board: Board) -> None:
    with Meter(board, clock=board.clock, pace=board.clock) as meter:
        table = calibrated(meter, engine=TRANSFORMERS)
    document = table.as_dict()
    assert document.pop("kernels") is None
    assert EnergyTable.from_dict(document) == table


def test_a_counter_that_is_lost_ends_it_with_the_way_to_go_on(board: Board) -> None:
    with Meter(board, clock=board.clock, pace=board.clock) as meter:
        board.max_w = None
        board.read_j = lambda: float("nan")  # type: ignore[method-assign]
        with pytest.raises(HestError) as refused:
            calibrated(meter)
    assert refused.value.exit_code == Exit.NO_DEVICE
    assert "calibrate --resume" in (refused.value.hint or "")


def test_the_key_tells_shapes_and_versions() -> None:
    backbone = tiny_backbone()
    meter = Meter(Board())
    key = table_key(target(backbone), meter)
    assert key.subject["device"] == "GPU-board"
    assert "precision" not in key.subject
    measured_with = {"hestctl", "model", "meter", "driver", "kernels", "torch", "transformers"}
    assert set(key.conditions) == measured_with
    before = replace(key, conditions={k: v for k, v in key.conditions.items() if k != "model"})
    assert key.changes(before.text) == ["model was not recorded, is blocks-1"]
    int8 = replace(HESTCTL, blocks=BlockStates.uniform(2, INT8))
    keys = [table_key(Target(backbone, engine, MethodSettings()), meter) for engine in (HESTCTL, int8)]
    assert keys[0] == keys[1]
    other = table_key(target(backbone, rank=8), meter)
    assert other.subject_text != key.subject_text
