"""Replayed traces: the meter's windows against the truth of boards that were simulated without its help."""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from hestctl.energy.certificate import certify
from hestctl.energy.counter import open_counter
from hestctl.energy.fake import FakeClock
from hestctl.energy.meter import Meter
from hestctl.energy.protocol import CounterError, PowerSensor
from hestctl.energy.replay import ReplayCounter
from hestctl.energy.trace import Trace, TraceWindow, read_trace
from hestctl.errors import Exit, HestError
from hestctl.records import Window

TRACES = Path(__file__).parent / "traces"
READ_S = 0.0045
"""What one reading takes on an H100 while it is busy."""

Judged = tuple[TraceWindow, Window, float | None]
"""A stretch of a trace, the meter's window over it, and the difference of two plain readings at its edges."""


def path_of(name: str) -> Path:
    return TRACES / f"simulated-h100-{name}.jsonl"


class BusyCounter(ReplayCounter):
    """Takes as long to read as a board at work."""

    def __init__(self, trace: Trace, clock: FakeClock) -> None:
        super().__init__(trace, clock)
        self._spend = clock.spend

    def read_j(self) -> float:
        self._spend(READ_S / 2)
        energy_j = super().read_j()
        self._spend(READ_S / 2)
        return energy_j


@cache
def played(name: str, poll_s: float = 0.005) -> dict[str, Judged]:
    """Every window of a trace by its name, cut by a meter that polls its replay."""
    trace = read_trace(path_of(name))
    clock = FakeClock()
    begin_s = clock()
    plain = ReplayCounter(trace, clock)

    def reading() -> float | None:
        try:
            return plain.read_j()
        except CounterError:
            return None

    meter = Meter(BusyCounter(trace, clock), clock=clock, pace=clock, poll_s=poll_s)
    with meter:
        edges = {}
        for at_s in sorted({at_s for known in trace.windows for at_s in (known.start_s, known.end_s)}):
            clock.advance(begin_s + at_s - clock())
            edges[at_s] = meter.edge(), reading()
    judged = {}
    for known in trace.windows:
        (start, first_j), (end, last_j) = edges[known.start_s], edges[known.end_s]
        naive_j = None if first_j is None or last_j is None else last_j - first_j
        judged[known.name] = known, meter.cut(start, end, name=known.name, phase="p"), naive_j
    return judged


def samples_of(judged: dict[str, Judged]) -> list[Judged]:
    return [one for name, one in judged.items() if name != "all"]


def off(joules: float | None, true_j: float | None) -> float:
    """The relative error of ``joules``."""
    assert joules is not None and true_j is not None
    return abs(joules / true_j - 1)


def within_bound(judged: Judged) -> bool:
    known, window, _ = judged
    assert window.energy_j is not None and window.error_j is not None and known.true_j is not None
    return abs(window.energy_j - known.true_j) <= window.error_j


def test_the_script_makes_the_committed_traces_from_the_standard_library_alone(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-I", "-S", TRACES / "simulate.py", tmp_path], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in TRACES.glob("simulated-*.jsonl")}
    assert len(made) == 9
    assert sum(map(len, made.values())) < 400_000


@pytest.mark.parametrize("poll_s", [0.002, 0.005, 0.01])
@pytest.mark.parametrize("name", ["samples", "generation"])
def test_interpolation_is_within_2_percent_where_plain_readings_are_6_off(name: str, poll_s: float) -> None:
    judged = samples_of(played(name, poll_s))
    assert len(judged) >= 60
    naive = [off(naive_j, known.true_j) for known, _, naive_j in judged]
    cut = [off(window.energy_j, known.true_j) for known, window, _ in judged]
    assert 0.035 <= statistics.mean(naive) <= 0.09
    assert max(naive) > 0.15
    assert statistics.mean(cut) <= 0.02
    assert max(cut) <= 0.1
    assert statistics.mean(cut) < statistics.mean(naive) / 2


@pytest.mark.parametrize("name", ["samples", "generation"])
def test_windows_agree_with_the_work_done_in_them(name: str) -> None:
    """As on a board whose true joules nobody knows: each sample against its share of the whole."""
    judged = played(name)
    whole, outer, _ = judged["all"]
    assert outer.energy_j is not None
    j_per_work = outer.energy_j / whole.work
    cut = [off(window.energy_j, known.work * j_per_work) for known, window, _ in samples_of(judged)]
    naive = [off(naive_j, known.work * j_per_work) for known, _, naive_j in samples_of(judged)]
    assert statistics.mean(cut) <= 0.02 < 0.035 <= statistics.mean(naive)


@pytest.mark.parametrize("name", ["samples", "generation"])
def test_the_bound_holds_for_nine_windows_of_ten(name: str) -> None:
    """Not for all: the board looks at 25 ms of every 100 ms.

    A gap between samples, or the change from prefill to decode, that falls into the other 75 ms moves the
    truth and not the counter; the bound knows of powers that last for two steps.
    """
    judged = samples_of(played(name))
    assert statistics.mean(map(within_bound, judged)) >= 0.9
    assert statistics.mean(window.error_j / window.energy_j for _, window, _ in judged) < 0.07  # type: ignore[operator]
    for known, window, _ in judged:
        assert (window.kind, window.method, window.valid) == ("estimated", "interpolated", True)
        assert window.device_uuid.startswith("replay-"), known  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["samples", "foreign", "steady"])
def test_the_outer_window_is_within_one_step_of_the_truth(name: str) -> None:
    known, outer, _ = played(name)["all"]
    assert outer.energy_j is not None and known.true_j is not None
    step_j = 0.1 * known.true_j / (known.end_s - known.start_s)
    assert abs(outer.energy_j - known.true_j) <= step_j


def test_where_every_sample_changes_its_power_the_outer_window_is_within_half_a_percent() -> None:
    """Each change is seen or missed by the board, and what it misses adds up: no step bounds that."""
    known, outer, _ = played("generation")["all"]
    assert off(outer.energy_j, known.true_j) <= 0.005


def test_windows_that_share_edges_add_up_to_the_outer_one() -> None:
    judged = played("foreign")
    samples = samples_of(judged)
    assert all(a.end_s == b.start_s for (_, a, _), (_, b, _) in pairwise(samples))
    joules = sum(window.energy_j or 0 for _, window, _ in samples)
    assert joules == pytest.approx(judged["all"][1].energy_j, abs=1e-6)


def test_power_that_alternates_faster_than_the_steps_exceeds_the_bound() -> None:
    """What ``Meter.cut`` warns of: one burst is not known, and a hundred are known to a few percent."""
    judged = played("bursts")
    assert statistics.mean(map(within_bound, samples_of(judged))) < 0.5
    known, outer, _ = judged["all"]
    assert off(outer.energy_j, known.true_j) < 0.05
    assert not within_bound(judged["all"])


def assert_good(judged: Judged) -> None:
    _, window, _ = judged
    assert (window.valid, window.reason) == (True, None)
    assert within_bound(judged)


def assert_not_measured(window: Window, says: str) -> None:
    assert (window.energy_j, window.error_j, window.kind, window.valid) == (None, None, "none", False)
    assert window.reason is not None and says in window.reason


@pytest.mark.parametrize(
    "name, says, from_s, to_s", [("reset", "reset", 5.0, 5.1), ("stuck", "stuck", 5.0, 6.6)]
)
def test_a_fault_costs_the_windows_it_touches_and_no_other(
    name: str, says: str, from_s: float, to_s: float
) -> None:
    judged = played(name)
    assert_not_measured(judged["all"][1], says)
    good = lost = 0
    for known, window, naive_j in samples_of(judged):
        # A window needs the steps next to its edges.
        if known.end_s < from_s - 0.2 or known.start_s > to_s + 0.2:
            assert_good((known, window, naive_j))
            good += 1
        if known.start_s < from_s < known.end_s or from_s < known.start_s < to_s - 0.2:
            assert_not_measured(window, says)
            lost += 1
    assert good >= 10 and lost >= 1


def test_a_counter_lost_in_mid_run_keeps_what_was_finished() -> None:
    judged = played("lost")
    assert_not_measured(judged["all"][1], "GPU is lost")
    done = [one for one in samples_of(judged) if one[0].end_s < 4.7]
    rest = [one for one in samples_of(judged) if one[0].end_s > 5.0]
    assert len(done) >= 5 and len(rest) >= 5
    for one in done:
        assert_good(one)
    for _, window, _ in rest:
        assert_not_measured(window, "GPU is lost")


@pytest.mark.parametrize(
    "says, from_s, to_s",
    [("contention: 1 other process", 5.0, 7.0), ("throttled (HW thermal slowdown)", 10.0, 12.0)],
)
def test_another_process_and_throttling_demote_what_they_touch(says: str, from_s: float, to_s: float) -> None:
    judged = played("foreign")
    reasons = {known: window.reason or "" for known, window, _ in samples_of(judged)}
    touched = [known for known in reasons if known.end_s > from_s and known.start_s < to_s]
    clear = [known for known in reasons if known.end_s < from_s - 1.2 or known.start_s > to_s + 1.2]
    assert len(touched) >= 4 and len(clear) >= 10
    assert all(says in reasons[known] for known in touched)
    assert not any(says in reasons[known] for known in clear)
    for known, window, _ in samples_of(judged):
        assert window.energy_j is not None, "kept for inspection"
        assert window.valid == (reasons[known] == "")
    assert says in (judged["all"][1].reason or "")
    assert max(window.temperature_c or 0 for _, window, _ in samples_of(judged)) == 86


def test_a_refused_counter_stays_refused() -> None:
    with pytest.raises(CounterError, match="MIG is enabled"):
        ReplayCounter(read_trace(path_of("mig")))
    with pytest.raises(HestError, match="cannot serve: MIG is enabled") as caught:
        open_counter(f"replay:{path_of('mig')}", cuda_uuid=None, nominal_watts=8)
    assert caught.value.exit_code == Exit.NO_DEVICE and caught.value.hint


@pytest.mark.parametrize("cuda_uuid", [None, "GPU-aaaa"])
def test_it_is_never_taken_for_a_board(cuda_uuid: str | None) -> None:
    counter = open_counter(f"replay:{path_of('steady')}", cuda_uuid=cuda_uuid, nominal_watts=8)
    assert isinstance(counter, ReplayCounter) and isinstance(counter, PowerSensor)
    assert counter.kind == "estimated"
    assert counter.name == "replay of simulated-h100-steady.jsonl (simulated, NVML total energy)"
    assert counter.device_name == "NVIDIA H100 80GB HBM3 (replayed)"
    assert counter.device_uuid.startswith("replay-") and len(counter.device_uuid) == len("replay-") + 12
    other = ReplayCounter(read_trace(path_of("lost")))
    assert other.device_uuid != counter.device_uuid, "one of its own for every file"
    assert (counter.step_s, counter.max_w, counter.driver) == (0.1, 875.0, "simulated")


def test_the_certificate_of_a_steady_board() -> None:
    clock = FakeClock()
    counter = BusyCounter(read_trace(path_of("steady")), clock)
    found = certify(counter, clock=clock, pace=clock, seconds=3.0, load=clock.advance)
    assert found.missing == {}
    assert found.kind == "estimated"
    assert found.step_s == pytest.approx(0.1, abs=0.006)
    assert 119 <= found.idle_w <= 132  # type: ignore[operator]
    assert found.load_w == pytest.approx(700, rel=0.02)
    assert found.power_ratio == pytest.approx(1.004, abs=0.006)
