"""The account of training: what counts, what survives, what a budget still pays for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hestctl.energy.fake import FakeClock, FakeCounter, Faults
from hestctl.energy.meter import Meter
from hestctl.energy.protocol import Unavailable
from hestctl.errors import Exit, HestError
from hestctl.training.account import Account, JoulesUnknown, demand_live_counter


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr("hestctl.training.account.time.monotonic", clock)
    return clock


@pytest.fixture
def path(tmp_path):
    return tmp_path / "spent.json"


def meter_of(clock, *, step_s=None, **more):
    """One watt: joules are the seconds of the clock."""
    return Meter(FakeCounter(1.0, clock, step_s=step_s, **more), clock=clock, pace=clock)


def attempt(clock, path, *stages, budget_j=None, checkpoint=None, **more):
    """What one attempt comes to that spends ``(stage, joules)`` after each other and is then killed."""
    with meter_of(clock, **more) as meter:
        account = Account(meter, path, budget_j)
        account.go_on(checkpoint)
        for stage, joules in stages:
            clock.advance(joules)
            account.book(stage)
    return account


def test_it_counts_from_its_making_on_and_is_kept_at_every_entry(clock, path):
    with meter_of(clock) as meter:
        clock.advance(100.0)
        account = Account(meter, path, None)
        for joules in (3.0, 4.0):
            clock.advance(joules)
            account.book("step")
            assert json.loads(path.read_text()) == account.as_state()
    assert (account.joules, account.seconds) == (7.0, 7.0)
    assert [file.name for file in path.parent.iterdir()] == ["spent.json"]


def test_attempts_add_up_from_the_later_of_checkpoint_and_file(clock, path):
    checkpoint = attempt(clock, path, ("step", 3.0)).as_state()
    attempt(clock, path, ("step", 4.0), checkpoint=checkpoint)  # killed: its checkpoint is that before
    assert attempt(clock, path, ("step", 5.0), checkpoint=checkpoint).joules == 12.0
    path.unlink()
    account = attempt(clock, path, ("step", 5.0), checkpoint=checkpoint)
    assert (account.joules, account.seconds) == (8.0, 8.0)
    later = {**checkpoint, "counted_j": 50.0, "seconds": 50.0}
    assert attempt(clock, path, ("step", 5.0), checkpoint=later).joules == 55.0


def test_a_first_attempt_has_nothing_to_tell_and_a_later_one_the_sum(clock, path):
    with meter_of(clock, kind="estimated") as meter:
        assert Account(meter, path, None).go_on(None) is None
    attempt(clock, path, ("step", 1234.5), kind="estimated")
    with meter_of(clock, kind="estimated") as meter:
        told = Account(meter, path, None).go_on(None)
    assert told == "training has spent 1,234 J (estimated) in 1,234 s so far"


def test_the_next_step_is_taken_to_be_as_dear_as_the_dearest_and_what_ends_training_counts(clock, path):
    stages = (("evaluation", 4.0), ("step", 10.0), ("step", 8.0), ("checkpoint", 1.0), (None, 30.0))
    spent, following = 53.0, 15.0
    for budget_j, paid in ((spent + following - 0.5, False), (spent + following + 0.5, True)):
        path.unlink(missing_ok=True)
        account = attempt(clock, path, *stages, budget_j=budget_j)
        assert account.affords_step() is paid
        assert account.overshoot_j == 0.0
    # What steps cost is known from the earlier attempt: no step is wasted on finding out.
    assert attempt(clock, path, budget_j=60.0).affords_step() is False
    assert attempt(clock, path, budget_j=69.0).affords_step() is True


def test_a_sum_at_the_budget_pays_for_nothing_even_where_no_price_is_known(clock, path):
    account = attempt(clock, path, (None, 7.0), budget_j=7.0)
    assert account.affords_step() is False
    over = attempt(clock, path, (None, 0.5), budget_j=7.0)
    assert (over.overshoot_j, over.affords_step()) == (0.5, False)


@pytest.mark.parametrize(
    ("spent", "ends"), [(30.0, "would take about 10 J"), (42.5, "overshot by 2.5 J")], ids=str
)
def test_the_budget_is_told_with_the_kind_of_its_joules(clock, path, spent, ends):
    account = attempt(clock, path, ("step", 10.0), (None, spent - 10.0), budget_j=40.0, kind="estimated")
    told = account.told("step 1 of 9")
    assert told.startswith(f"training budget: {spent:g} J of 40 J spent (estimated) after step 1 of 9; ")
    assert told.endswith(ends)


def test_without_a_counter_the_joules_are_not_known_and_no_budget_is_held(clock, path):
    with Meter(Unavailable("switched off"), clock=clock) as meter:
        account = Account(meter, path, None)
        clock.advance(5.0)
        account.book("step")
        assert (account.joules, account.unread, account.seconds) == (None, "switched off", 5.0)
        assert account.affords_step()
        with pytest.raises(HestError, match="without a live counter: switched off") as caught:
            demand_live_counter(meter)
    assert caught.value.exit_code == Exit.NO_DEVICE
    later = attempt(clock, path, ("step", 5.0))
    assert (later.joules, later.unread) == (None, "switched off")
    with pytest.raises(JoulesUnknown, match=r"not known \(switched off\)") as caught:
        attempt(clock, path, budget_j=100.0).check()
    assert caught.value.exit_code == Exit.NO_DEVICE


def lost(clock, path, budget_j):
    """Two steps of 5 J, then one of 2 J and one of 3 J in which the counter is lost."""
    stages = (("step", 5.0), ("step", 5.0), ("step", 2.0), ("step", 3.0))
    return attempt(clock, path, *stages, budget_j=budget_j, faults=Faults(lost_at_s=13.0))


def test_a_budget_counts_a_lost_stretch_as_the_dearest_and_goes_on_with_the_counter_back(clock, path):
    account = lost(clock, path, 100.0)
    assert account.joules is None
    with pytest.raises(JoulesUnknown, match="GPU is lost") as caught:
        account.affords_step()
    assert "--resume" in caught.value.hint
    assert account.as_state()["counted_j"] == 17.0
    account.leave()
    assert account.as_state()["counted_j"] == 17.0
    later = attempt(clock, path, ("step", 5.0), budget_j=28.0)
    assert (later.joules, later.affords_step()) == (None, True)
    assert later.told("step 5 of 9").endswith("some joules are a guess: GPU is lost")
    assert attempt(clock, path, budget_j=26.0).affords_step() is False


def test_a_training_without_budget_goes_on_without_its_counter_but_no_budget_can_follow(clock, path):
    account = lost(clock, path, None)
    assert (account.joules, account.affords_step()) == (None, True)
    assert attempt(clock, path, ("step", 5.0)).joules is None
    with pytest.raises(JoulesUnknown, match="GPU is lost"):
        attempt(clock, path, budget_j=100.0).check()


def test_joules_of_two_kinds_are_not_added(clock, path):
    attempt(clock, path, ("step", 5.0))
    account = attempt(clock, path, ("step", 5.0), kind="estimated")
    assert (account.joules, account.seconds) == (None, 10.0)
    assert account.unread == "joules of an earlier attempt are measured, of this one estimated"


def test_an_attempt_that_is_refused_leaves_the_sum_as_it_was(clock, path):
    attempt(clock, path, ("step", 5.0))
    before = path.read_bytes()
    with pytest.raises(JoulesUnknown, match=r"not known \(joules of an earlier attempt are measured"):
        attempt(clock, path, budget_j=100.0, kind="estimated").check()
    assert path.read_bytes() == before
    assert attempt(clock, path, ("step", 5.0), budget_j=100.0).joules == 10.0


@pytest.mark.parametrize("text", ['{"kind": "mea', "null", '{"joules": 3}', ""])
def test_a_damaged_file_is_not_taken_for_nothing_spent(clock, path, text):
    checkpoint = attempt(clock, path, ("step", 3.0)).as_state()
    for given, seconds in ((checkpoint, 8.0), (None, 5.0)):
        path.write_text(text)
        account = attempt(clock, path, ("step", 5.0), checkpoint=given)
        assert (account.joules, account.seconds) == (None, seconds)
        assert account.unread == "spent.json is damaged"


def test_the_window_settles_what_a_counter_that_moves_in_steps_has_not_shown_yet(clock, path):
    attempt(clock, path, ("step", 30.0))
    with meter_of(clock, step_s=1.0) as meter:
        account = Account(meter, path, None)
        account.go_on(None)
        clock.advance(4.7)
        account.book("step")
        live = account.joules
        assert live == pytest.approx(34.0, abs=0.31)
        window = account.close()
        assert window.energy_j == pytest.approx(4.7, abs=0.1)
        assert account.joules == 30.0 + window.energy_j > live
        account.leave()
    assert json.loads(path.read_text())["counted_j"] == account.joules == 30.0 + window.energy_j
    assert (window.name, window.phase) == ("training", "training")


def test_the_window_adds_to_earlier_attempts_and_takes_nothing_back(clock, path, monkeypatch):
    attempt(clock, path, ("step", 30.0))
    with meter_of(clock) as meter:
        account = Account(meter, path, None)
        account.go_on(None)
        clock.advance(5.0)
        cut = meter.cut
        monkeypatch.setattr(meter, "cut", lambda *a, **k: replace(cut(*a, **k), energy_j=4.0))
        account.close()
    assert account.joules == 35.0


def test_a_counter_lost_while_the_window_waits_leaves_no_number(clock, path):
    with meter_of(clock, step_s=1.0, faults=Faults(lost_at_s=5.0)) as meter:
        account = Account(meter, path, None)
        clock.advance(2.7)
        window = account.close()
    assert (window.energy_j, account.joules) == (None, None)
    assert "lost" in account.unread


def test_a_file_that_cannot_be_written_ends_training_but_hides_no_other_error(clock, path, monkeypatch):
    with meter_of(clock) as meter:
        account = Account(meter, path, None)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(HestError, match=r"cannot write .*spent\.json: No space left"):
            account.book("step")
        account.leave()


def test_a_window_that_is_not_valid_leaves_the_budget_its_sum_and_no_figure(clock, path):
    with meter_of(clock, step_s=0.1, faults=Faults(foreign_s=(0.0, 60.0))) as meter:
        account = Account(meter, path, 100.0)
        clock.advance(20.0)
        account.book("step")
        window = account.close()
    assert not window.valid
    assert account.joules is None
    assert "not valid: contention" in account.unread
    assert account.overshoot_j == 0.0
