"""Calibration on a simulated board: what is fitted predicts what the meter then shows of other lengths."""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from hestctl.calibration import measure
from hestctl.calibration.figures import Figure, Target, Work, layer_weights
from hestctl.calibration.measure import Calibration, table_key
from hestctl.energy.conditions import Conditions
from hestctl.energy.fake import FakeClock
from hestctl.energy.meter import Meter
from hestctl.energy.model import PhaseJoules
from hestctl.energy.replicate import replicate
from hestctl.energy.table import EnergyTable
from hestctl.errors import Exit, HestError
from hestctl.generation.engines import EngineKind
from hestctl.kernels.choose import Choices
from hestctl.model.backbone import Backbone, tiny_backbone
from hestctl.records import INT8, BlockStates, EnergyKind
from hestctl.settings import EnergySettings, MethodSettings

IDLE_W, PREFILL_W, DECODE_W = 125.0, 700.0, 450.0
LENGTHS = (128, 512, 1024)


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


def phases_j(prompt: int, new: int) -> tuple[float, float]:
    """What a generation draws: a 7B model's shape, roughly. J."""
    prefill = 2.0 + 0.035 * prompt + 6e-7 * prompt**2
    return prefill, sum(2.4 + 1e-5 * (prompt + k) for k in range(1, new))


def generation(board: Board, prompt: int, new: int) -> Work:
    prefill, decode = phases_j(prompt, new)
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

    def generations(_target: object, batches: object, beams: int, lengths: list[int]) -> list[Figure]:
        return [
            Figure(measure.generation_key(1, beams, p, n), lambda p=p, n=n: generation(board, p, n), 1)
            for p in lengths
            for n in measure.NEW_TOKENS
        ]

    def like(name: str) -> None:
        real = getattr(measure, name)

        def figures(*arguments: object) -> list[Figure]:
            return [
                Figure(f.key, drawing(8.0 if "int8" in f.key else 16.0), f.units) for f in real(*arguments)
            ]

        monkeypatch.setattr(measure, name, figures)

    for name in ("direction_figures", "matmul_figures", "adapter_figures"):
        like(name)
    monkeypatch.setattr(measure, "generation_figures", generations)
    # Simulated work takes no time of ours, by which it would be lengthened.
    monkeypatch.setattr(measure, "_lengthened", lambda work: (work, 1))
    return board


def target(backbone: Backbone, **method: object) -> Target:
    return Target(backbone, EngineKind("transformers", None), MethodSettings(**method))


def calibrated(board: Board, meter: Meter, found: dict[str, measure.Cost] | None = None) -> EnergyTable:
    settings = EnergySettings(lengths=LENGTHS)
    calibration = Calibration(
        target(tiny_backbone(max_position_embeddings=8192)),
        settings,
        meter,
        Quiet(),
        lambda: None,
        found={} if found is None else found,
    )
    return calibration.full(1)


def test_what_is_fitted_predicts_lengths_between_and_outside(board: Board) -> None:
    with Meter(board, clock=board.clock, pace=board.clock) as meter:
        table = calibrated(board, meter)
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


def test_every_figure_is_known_to_two_percent(board: Board) -> None:
    with Meter(board, clock=board.clock, pace=board.clock) as meter:
        table = calibrated(board, meter)
    assert table.model is not None
    for point in table.model.points:
        true = sum(phases_j(point.prompt_tokens, point.new_tokens)) + IDLE_W * 0.002
        assert point.cost.joules == pytest.approx(true, rel=0.02)
        assert point.cost.error_j <= 0.03 * point.cost.joules
    per_direction = measure.TOKENS * table.rank
    assert table.full.joules * per_direction == pytest.approx(16 + IDLE_W * 0.002, rel=0.02)
    assert table.int8.joules * per_direction == pytest.approx(8 + IDLE_W * 0.002, rel=0.02)
    assert table.int8_pays


def test_what_was_found_before_is_not_measured_again(board: Board) -> None:
    with Meter(board, clock=board.clock, pace=board.clock) as meter:
        found: dict[str, measure.Cost] = {}
        table = calibrated(board, meter, found)
        before_s = board.clock()
        again = calibrated(board, meter, measure.from_document(measure.as_document(found)))
        assert board.clock() == before_s
    assert again.model == table.model
    assert (again.full, again.int8, again.controller) == (table.full, table.int8, table.controller)


def test_kernels_are_chosen_where_int8_runs_and_cost_nothing_where_one_alone_can(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    backbone = tiny_backbone()
    kept: list[Choices] = []
    with Meter(board, clock=board.clock, pace=board.clock) as meter:
        calibration = Calibration(
            Target(
                backbone,
                EngineKind("hestctl", None, BlockStates.uniform(backbone.num_layers, INT8)),
                MethodSettings(),
            ),
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
    int8 = BlockStates.uniform(backbone.num_layers, INT8)
    note = EngineKind("hestctl", None, int8, choices).make(backbone, None, None).notes["kernels"]
    assert isinstance(note, dict)
    assert {"the only one that runs here" in told for told in note.values()} == {True}


def test_a_table_from_before_kernels_were_chosen_loads(board: Board) -> None:
    with Meter(board, clock=board.clock, pace=board.clock) as meter:
        table = calibrated(board, meter)
    document = table.as_dict()
    assert document.pop("kernels") is None
    assert EnergyTable.from_dict(document) == table


def test_a_counter_that_is_lost_ends_it_with_the_way_to_go_on(board: Board) -> None:
    with Meter(board, clock=board.clock, pace=board.clock) as meter:
        board.max_w = None
        board.read_j = lambda: float("nan")  # type: ignore[method-assign]
        with pytest.raises(HestError) as refused:
            calibrated(board, meter)
    assert refused.value.exit_code == Exit.NO_DEVICE
    assert "calibrate --resume" in (refused.value.hint or "")


def test_the_key_tells_shapes_and_versions() -> None:
    backbone = tiny_backbone()
    meter = Meter(Board())
    key = table_key(target(backbone), meter)
    assert key.subject["device"] == "GPU-board"
    assert set(key.conditions) == {"hestctl", "meter", "driver", "kernels", "torch", "transformers"}
    other = table_key(target(backbone, rank=8), meter)
    assert other.subject_text != key.subject_text
