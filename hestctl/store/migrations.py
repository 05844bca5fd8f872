"""The schema, as the ordered steps that made it. A step that was released is never edited again.

Every value has its unit in its column's name. There are no keys or secondary indexes: they would
freeze columns against later ALTERs, and one transaction a run under the lock keeps rows unique.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hestctl import __version__
from hestctl.errors import Exit, HestError
from hestctl.store.folder import now

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

Migration = Callable[["DuckDBPyConnection"], object]


def create_tables(con: DuckDBPyConnection) -> None:
    """One table for each record of a run; what differs from run to run is JSON text."""
    con.execute("""
        CREATE TABLE runs (
            run_id VARCHAR, command VARCHAR, status VARCHAR, created_at VARCHAR, parent_run_id VARCHAR,
            finished_at VARCHAR, error VARCHAR, method VARCHAR, scope VARCHAR, precision VARCHAR,
            dual VARCHAR, controller VARCHAR, backbone VARCHAR, weights VARCHAR, dataset VARCHAR,
            data_hash VARCHAR, dtype VARCHAR, engine VARCHAR, num_beams BIGINT, batch_size BIGINT,
            max_new_tokens BIGINT, seed BIGINT, device_name VARCHAR, device_uuid VARCHAR, meter VARCHAR,
            energy_kind VARCHAR, calibration_id VARCHAR, emax_j DOUBLE, emax_ratio DOUBLE,
            emax_origin VARCHAR, steps BIGINT, controller_parameters BIGINT, adapter_parameters BIGINT,
            train_energy_j DOUBLE, train_time_s DOUBLE, hardened_ratio DOUBLE, over_budget_share DOUBLE,
            settings JSON, versions JSON, summary JSON
        )
    """)
    con.execute("""
        CREATE TABLE steps (
            run_id VARCHAR, step BIGINT, split VARCHAR, epoch DOUBLE, loss DOUBLE, task_loss DOUBLE,
            learning_rate DOUBLE, grad_norm DOUBLE, energy_j DOUBLE, energy_ratio DOUBLE,
            multiplier DOUBLE, share_off DOUBLE, share_int8 DOUBLE, share_full DOUBLE,
            rouge_lsum DOUBLE, tokens_per_s DOUBLE, train_energy_j DOUBLE, elapsed_s DOUBLE
        )
    """)
    con.execute("""
        CREATE TABLE samples (
            run_id VARCHAR, sample_id VARCHAR, position BIGINT, split VARCHAR, prompt_tokens BIGINT,
            new_tokens BIGINT, truncated_tokens BIGINT, batch_index BIGINT, batch_size BIGINT,
            num_beams BIGINT, engine VARCHAR, latency_s DOUBLE, energy_kind VARCHAR,
            energy_method VARCHAR, energy_j DOUBLE, energy_net_j DOUBLE, energy_error_j DOUBLE,
            energy_valid BOOLEAN, energy_reason VARCHAR, prefill_j DOUBLE, decode_j DOUBLE,
            scope_energy_j DOUBLE, emax_j DOUBLE, directions_off BIGINT, directions_int8 BIGINT,
            directions_full BIGINT, finish VARCHAR, rouge1 DOUBLE, rouge2 DOUBLE, rouge_l DOUBLE,
            rouge_lsum DOUBLE, nll DOUBLE, answer_tokens BIGINT, label VARCHAR, predicted_label VARCHAR
        )
    """)
    con.execute("""
        CREATE TABLE windows (
            run_id VARCHAR, name VARCHAR, phase VARCHAR, start_s DOUBLE, end_s DOUBLE, kind VARCHAR,
            method VARCHAR, energy_j DOUBLE, net_energy_j DOUBLE, error_j DOUBLE, device_uuid VARCHAR,
            device_name VARCHAR, valid BOOLEAN, reason VARCHAR, temperature_c DOUBLE, sm_clock_mhz DOUBLE
        )
    """)
    con.execute("""
        CREATE TABLE utilisation (run_id VARCHAR, layer BIGINT, state VARCHAR, count BIGINT, share DOUBLE)
    """)
    con.execute("""
        CREATE TABLE calibrations (
            calibration_id VARCHAR, run_id VARCHAR, created_at VARCHAR, device_uuid VARCHAR,
            device_name VARCHAR, kind VARCHAR, key VARCHAR, document JSON
        )
    """)
    con.execute("""
        CREATE TABLE plans (run_id VARCHAR, created_at VARCHAR, scope VARCHAR, emax_j DOUBLE, document JSON)
    """)
    con.execute("""
        CREATE TABLE trials (
            run_id VARCHAR, number BIGINT, state VARCHAR, value DOUBLE, feasible BOOLEAN, params JSON,
            created_at VARCHAR
        )
    """)


def add_sample_prediction(con: DuckDBPyConnection) -> None:
    """What the energy model says of a sample, how its phases were told apart, how often it ran."""
    for column in ("phase_method VARCHAR", "predicted_j DOUBLE", "replicates BIGINT"):
        con.execute(f"ALTER TABLE samples ADD COLUMN {column}")


def say_how_joules_were_had(con: DuckDBPyConnection) -> None:
    """Comments on the columns whose joules have no kind beside them (duckdb_columns() shows them)."""
    predicted = "predicted: energy table x logged states"
    for column, comment in {
        "samples.scope_energy_j": predicted,
        "samples.emax_j": "predicted: the budget, in joules of the energy table",
        "samples.predicted_j": "predicted: energy model x lengths",
        "steps.energy_j": "predicted: energy table x what the gates decide, J a sample",
        "steps.train_energy_j": "of the energy_kind of the run: by the meter, so far",
        "runs.emax_j": "predicted: the budget, in joules of the energy table",
        "plans.emax_j": "predicted: the budget, in joules of the energy table",
        "trials.value": "J a sample where the search has a budget: by the meter if measured, else predicted",
    }.items():
        con.execute(f"COMMENT ON COLUMN {column} IS '{comment}'")


def tell_what_trials_did(con: DuckDBPyConnection) -> None:
    """A trial's score, joules, time, run and worker, so that a search can be drawn from the store alone."""
    for column in (
        "score DOUBLE",
        "energy_j DOUBLE",
        "energy_kind VARCHAR",
        "trial_run_id VARCHAR",
        "duration_s DOUBLE",
        "worker VARCHAR",
        "error VARCHAR",
    ):
        con.execute(f"ALTER TABLE trials ADD COLUMN {column}")
    con.execute("COMMENT ON COLUMN trials.energy_j IS 'of the energy_kind beside it, J a sample'")


def tell_where_states_were(con: DuckDBPyConnection) -> None:
    """The use of directions by where in the prompt or the answer a token is, beside its layer."""
    con.execute("ALTER TABLE utilisation ADD COLUMN phase VARCHAR")
    con.execute("ALTER TABLE utilisation ADD COLUMN position BIGINT")
    con.execute("COMMENT ON COLUMN utilisation.position IS 'tenth of the prompt, or first of 8 new tokens'")


MIGRATIONS: tuple[Migration, ...] = (
    create_tables,
    add_sample_prediction,
    say_how_joules_were_had,
    tell_what_trials_did,
    tell_where_states_were,
)
"""The schema version of a store is how many of these were applied to it."""


def schema_version() -> int:
    """The schema version that this hestctl reads and writes."""
    return len(MIGRATIONS)


def version_of(con: DuckDBPyConnection, db: Path) -> int:
    """The schema version of the connection's database; 0 when it is empty.

    Raises HestError (store) when a newer hestctl wrote it, or something else did.
    """
    tables = con.execute(
        "SELECT table_name FROM duckdb_tables() WHERE database_name = current_database()"
    ).fetchall()
    if not tables:
        return 0
    if ("migrations",) not in tables:
        raise HestError(
            f"{db} is a database, but not one that hestctl wrote",
            "name another file with --db",
            Exit.STORE,
        )
    newest = "SELECT number, hestctl FROM migrations ORDER BY number DESC LIMIT 1"
    ((version, writer),) = con.execute(newest).fetchall()
    if version > schema_version():
        raise HestError(
            f"{db} has schema {version}, written by hestctl {writer}; "
            f"this is hestctl {__version__}, which knows schema {schema_version()}",
            f"pip install 'hestctl>={writer}', or name another file with --db",
            Exit.STORE,
        )
    return int(version)


def migrate(con: DuckDBPyConnection, version: int) -> None:
    """Bring the connection's database from ``version`` to this one's, a transaction for each step."""
    for number, migration in enumerate(MIGRATIONS[version:], start=version + 1):
        con.execute("BEGIN")
        con.execute(
            "CREATE TABLE IF NOT EXISTS migrations "
            "(number BIGINT, name VARCHAR, applied_at VARCHAR, hestctl VARCHAR)"
        )
        migration(con)
        name = getattr(migration, "__name__", str(number))
        con.execute("INSERT INTO migrations VALUES (?, ?, ?, ?)", [number, name, now(), __version__])
        con.execute("COMMIT")
