"""Which table a run works with: the stored one, or what its scope needs, measured on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hestctl.calibration.measure import table_key
from hestctl.energy.counter import open_counter
from hestctl.energy.meter import Meter
from hestctl.energy.model import VARIANTS
from hestctl.energy.table import EnergyTable, TableKey
from hestctl.errors import Exit, HestError
from hestctl.model.backbone import Backbone
from hestctl.records import Run
from hestctl.runs import recording
from hestctl.settings import Settings, with_values
from hestctl.store.folder import now
from hestctl.store.store import Store
from hestctl.workflows.metering import energy_table, record_table, stored_table, target_of

QUICK = {
    "energy.calibration_s": 0.001,
    "energy.lengths": "4,12",
    "energy.batch_sizes": "1",
    "method.scope": "adapter",
    "generation.batch_size": 2,
    "backbone.device": "cpu",
}


class Notes:
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)

    def advance(self, stage: str, done: int, total: int, figures: object) -> None:
        """Says nothing."""


@pytest.fixture
def meter() -> Iterator[Meter]:
    with Meter(open_counter("estimate", cuda_uuid=None, nominal_watts=8.0)) as meter:
        yield meter


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs.duckdb")


def settings_of(store: Store, **values: object) -> Settings:
    more = {key.replace("__", "."): value for key, value in values.items()}
    return with_values(Settings.model_construct(db=store.db), {**QUICK, **more})


def found(settings: Settings, store: Store, meter: Meter, backbone: Backbone, number: int) -> tuple:
    """The table of a run with these settings, and what was told."""
    notes = Notes()
    with recording(store, Run(f"train-{number}", "train", "started", now())) as recorder:
        table = energy_table(settings, backbone, meter, store, recorder, notes)
        assert recorder.run.calibration_id == table.calibration_id
    return table, notes.told


def keep(table: EnergyTable, store: Store) -> None:
    with recording(store, Run("calibrate-1", "calibrate", "started", now())) as recorder:
        record_table(table, recorder, Notes())


def keep_document(key: str, table: dict[str, object], store: Store, number: int) -> None:
    """A table as an earlier version may have left it."""
    with recording(store, Run(f"old-{number}", "calibrate", "started", now())) as recorder:
        recorder.calibration(
            {
                "calibration_id": f"table-{number}",
                "created_at": "2026",
                "device_uuid": "u",
                "device_name": "d",
                "kind": "estimated",
                "key": key,
                "table": table,
            }
        )


def test_scope_adapter_needs_the_prices_of_directions_alone(
    store: Store, meter: Meter, backbone: Backbone
) -> None:
    table, _ = found(settings_of(store), store, meter, backbone, 1)
    assert table.model is None
    int8 = settings_of(store, backbone__precision="int8")
    assert target_of(int8, backbone) == target_of(settings_of(store), backbone), "measured in all states"
    again, _ = found(int8, store, meter, backbone, 2)
    assert again == table


def test_scope_network_measures_the_model_of_what_is_asked_for(
    store: Store, meter: Meter, backbone: Backbone
) -> None:
    found(settings_of(store), store, meter, backbone, 1)
    network = settings_of(store, method__scope="network")
    table, told = found(network, store, meter, backbone, 2)
    assert {(p.batch_size, p.num_beams) for p in table.model.points} == {(2, 1)}
    assert {(p.attention, p.mlp) for p in table.model.points} == set(VARIANTS)
    assert table.kernels is not None
    lacking = next(note for note in told if "scope network" in note)
    assert lacking.endswith("this device has no energy model of this backbone yet")
    assert any(note.startswith("calibrating: 39 figures, at least ") for note in told)
    # It serves what fits into it, whatever state the settings give the blocks.
    for number, values in enumerate(({"generation__batch_size": 1}, {"backbone__precision": "int8"}), 3):
        same, told = found(
            settings_of(store, method__scope="network", **values), store, meter, backbone, number
        )
        assert same == table
        assert not any("calibrating" in note for note in told)
    wider, told = found(
        settings_of(store, method__scope="network", generation__batch_size=3), store, meter, backbone, 5
    )
    assert {(p.batch_size, p.num_beams) for p in wider.model.points} == {(2, 1), (3, 1)}, "nothing is lost"
    assert any("no batch of 3 or more with 1 beams was calibrated (2 x 1 was)" in note for note in told)


def test_scope_network_measures_anew_what_knows_no_blocks(
    store: Store, meter: Meter, backbone: Backbone
) -> None:
    network = settings_of(store, method__scope="network")
    table, _ = found(network, store, meter, backbone, 1)
    full = tuple(p for p in table.model.points if (p.attention, p.mlp) == ("full", "full"))
    bare = replace(
        table, calibration_id="table-9", created_at="2999", model=replace(table.model, points=full)
    )
    keep(bare, store)
    assert stored_table(network, backbone, meter, store, Notes()) == bare
    again, told = found(network, store, meter, backbone, 2)
    assert {(p.attention, p.mlp) for p in again.model.points} == set(VARIANTS)
    assert any("was calibrated with full blocks alone (hestctl engine)" in note for note in told)


def test_transformers_engine_has_no_blocks_to_be_lacking(
    store: Store, meter: Meter, backbone: Backbone
) -> None:
    values = {"method__scope": "network", "generation__engine": "transformers"}
    table, _ = found(settings_of(store, **values), store, meter, backbone, 1)
    assert {(p.attention, p.mlp) for p in table.model.points} == {("full", "full")}
    assert table.kernels is None
    again, told = found(settings_of(store, **values), store, meter, backbone, 2)
    assert again == table
    assert not any("calibrating" in note for note in told)


@pytest.mark.parametrize("scope", ["adapter", "network"])
def test_a_table_from_before_blocks_is_stale_and_one_of_another_subject_not_there(
    store: Store, meter: Meter, backbone: Backbone, scope: str
) -> None:
    settings = settings_of(store, method__scope=scope)
    key = table_key(target_of(settings, backbone), meter)
    conditions = {name: value for name, value in key.conditions.items() if name != "model"}
    by_precision = TableKey({**key.subject, "precision": "full"}, conditions)
    unreadable = {"model": {"engine": "hestctl", "points": [], "adapters": [], "matmuls": []}}
    keep_document(by_precision.text, unreadable, store, 1)
    assert stored_table(settings, backbone, meter, store, Notes()) is None
    assert found(settings, store, meter, backbone, 2)[0].key == key.text
    keep_document(replace(key, conditions=conditions).text, unreadable, store, 3)
    assert stored_table(settings, backbone, meter, store, Notes()) is not None, "the new one serves"


def test_where_there_is_only_a_table_from_before_blocks_the_hint_renews_it(
    store: Store, meter: Meter, backbone: Backbone
) -> None:
    settings = settings_of(store, method__scope="network", backbone__precision="int8")
    key = table_key(target_of(settings, backbone), meter)
    conditions = {name: value for name, value in key.conditions.items() if name != "model"}
    keep_document(replace(key, conditions=conditions).text, {"model": {"matmuls": []}}, store, 1)
    with pytest.raises(HestError, match="is stale: model was not recorded, is blocks-1") as refused:
        found(settings, store, meter, backbone, 2)
    assert refused.value.exit_code == Exit.USAGE
    assert "renew it: hestctl calibrate" in (refused.value.hint or "")
    assert "precision" not in (refused.value.hint or "")
