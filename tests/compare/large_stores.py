"""Stores as large as a year of studies, and what the comparison of them costs: a command, no test.

    python tests/compare/large_stores.py make FOLDER [--runs 200 --samples 5000 --stores 8]
    python tests/compare/large_stores.py bench FOLDER [--with-figures] [--repeat 3] [-- further options]

``make`` writes ``big-0.duckdb`` … through the store's own schema; ``bench`` runs the command line in a
process of its own and prints its wall and CPU seconds and its largest resident memory, imports included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from simulated_runs import a_run, trained, used

from hestctl.records import Run
from hestctl.store import database
from hestctl.store.index import put_run

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_SEEDS = 10
_BATCH = 4
_SCOPE_J_PER_TOKEN = {"hest": 1.6e-5, "tabs": 3.0e-5, "bhsp": 2.8e-5}

# Method, what differs from the plain run, joules a sample, ROUGE-Lsum in points.
_CONFIGS: Sequence[tuple[str, dict[str, Any], float, float]] = (
    ("base", {}, 52.0, 18.0),
    ("lora", {}, 46.0, 29.4),
    ("tabs", {}, 63.0, 30.1),
    ("bhsp", {}, 58.0, 29.8),
    *(("hest", {"emax_ratio": round(0.35 + 0.05 * k, 2)}, 37.0 + 2 * k, 28.5 + 0.2 * k) for k in range(9)),
    ("hest", {"precision": "fp16-only"}, 47.0, 30.2),
    ("hest", {"dual": "none"}, 46.0, 29.9),
    ("hest", {"controller": "unfactorised"}, 45.5, 30.0),
    ("lora", {"settings": {"backbone": {"precision": "int8"}}}, 41.0, 29.1),
    ("tabs", {"settings": {"backbone": {"precision": "int8"}}}, 55.0, 29.9),
    ("lora", {"settings": {"backbone": {"skip_last": 4}}}, 40.0, 26.0),
    ("hest", {"settings": {"method": {"name": "hest", "scope": "network", "layers": "greedy"}}}, 44.0, 29.5),
)


def runs() -> Iterator[tuple[Run, float, float]]:
    """Runs with their joules a sample and their score: every configuration with ten seeds, again and again
    later, as studies are repeated."""
    number = 0
    while True:
        for seed in range(_SEEDS):
            for method, changes, joules, score in _CONFIGS:
                number += 1
                day, minute = divmod(number, 24 * 60)
                at = f"2025-11-{1 + day % 28:02d}T{minute // 60:02d}:{minute % 60:02d}:00.000000+00:00"
                run = a_run(
                    method, number, seed=seed, created_at=at, finished_at=at, batch_size=_BATCH, **changes
                )
                yield run, joules, score


def samples(run: Run, count: int, joules: float, score: float) -> pa.Table:
    """``count`` samples of ``run`` as columns of the table ``samples``; the articles are shared by all."""
    articles, own = np.random.default_rng(7), np.random.default_rng(int(run.run_id[-4:]))
    position = np.arange(count)
    prompt = np.clip(articles.lognormal(6.4, 0.5, count), 90, 3_900).astype(np.int64)
    hard = articles.normal(0, 8, count)
    written = np.clip(90 + articles.normal(0, 12, count) + own.normal(0, 4, count), 8, 128).astype(np.int64)
    batch = position // _BATCH
    noise = own.normal(1, 0.02, batch[-1] + 1)[batch]
    spent = joules * (0.9 * written / 90 + 0.1 * prompt / prompt.mean()) * noise
    longest = np.maximum.reduceat(written, np.arange(0, count, _BATCH))[batch]
    lsum = np.clip(score + hard + own.normal(0, 3, count), 0, 100)
    per_token = _SCOPE_J_PER_TOKEN.get(run.method or "")
    scope = None if per_token is None else per_token * (prompt + written) * own.normal(1, 0.03, count)
    columns: dict[str, Any] = {
        "run_id": _same(run.run_id, count),
        # Forty hexadecimal digits, as cnn_dailymail names its articles.
        "sample_id": [hashlib.sha1(str(place).encode()).hexdigest() for place in position],
        "position": position,
        "split": _same("test", count),
        "prompt_tokens": prompt,
        "new_tokens": written,
        "truncated_tokens": np.zeros(count, np.int64),
        "batch_index": batch,
        "batch_size": np.full(count, _BATCH),
        "num_beams": np.full(count, run.num_beams),
        "engine": _same(run.engine, count),
        "latency_s": 0.03 + 0.006 * longest * noise,
        "energy_kind": _same(run.energy_kind, count),
        "energy_method": _same("apportioned", count),
        "energy_j": spent,
        "energy_net_j": 0.7 * spent,
        "energy_error_j": np.full(count, 0.5),
        "energy_valid": np.ones(count, bool),
        "energy_reason": pa.nulls(count, pa.string()),
        "prefill_j": 0.1 * spent,
        "decode_j": 0.9 * spent,
        "phase_method": _same("energy model", count),
        "predicted_j": spent / noise,
        "replicates": np.ones(count, np.int64),
        "scope_energy_j": pa.nulls(count, pa.float64()) if scope is None else scope,
        "emax_j": np.full(count, 0.016) if run.method == "hest" else pa.nulls(count, pa.float64()),
        "directions_off": np.full(count, 0 if scope is None else 400),
        "directions_int8": np.full(count, 0 if scope is None else 300),
        "directions_full": np.full(count, 960 if scope is None else 260),
        "finish": np.where(written == 128, "length", "stop").tolist(),
        "rouge1": lsum + 8,
        "rouge2": lsum / 2.4,
        "rouge_l": lsum - 6,
        "rouge_lsum": lsum,
        "nll": np.full(count, 55 * (2.4 - score / 60)),
        "answer_tokens": np.full(count, 55),
    }
    return pa.table(columns)


def windows(run: Run, count: int, joules: float) -> pa.Table:
    """One valid window of the meter for each generated batch."""
    batches = -(-count // _BATCH)
    start = 0.6 * np.arange(batches)
    return pa.table(
        {
            "run_id": _same(run.run_id, batches),
            "name": [f"test-{place}" for place in range(batches)],
            "phase": _same("test", batches),
            "start_s": start,
            "end_s": start + 0.58,
            "kind": _same(run.energy_kind, batches),
            "method": _same("counter", batches),
            "energy_j": np.full(batches, joules * _BATCH),
            "net_energy_j": np.full(batches, 0.7 * joules * _BATCH),
            "error_j": np.full(batches, 0.5),
            "device_uuid": _same(run.device_uuid, batches),
            "device_name": _same(run.device_name, batches),
            "valid": np.ones(batches, bool),
        }
    )


def make(folder: Path, count: int, size: int, stores: int) -> list[Path]:
    """``count`` runs of ``size`` samples each, dealt to ``stores`` files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"big-{number}.duckdb" for number in range(stores)]
    every = list(islice(runs(), count))
    for number, path in enumerate(paths):

        def fill(
            con: DuckDBPyConnection, mine: Sequence[tuple[Run, float, float]] = every[number::stores]
        ) -> None:
            for run, joules, score in mine:
                put_run(con, run)
                _put(con, "samples", samples(run, size, joules, score))
                _put(con, "windows", windows(run, size, joules))
                for table, records in (
                    ("steps", trained(run, run.emax_ratio)),
                    ("utilisation", used(run.method or "")),
                ):
                    if records and run.method in ("hest", "tabs"):
                        rows = [{"run_id": run.run_id, **asdict(record)} for record in records]
                        _put(con, table, pa.Table.from_pylist(rows))

        database.create(path, fill)
    return paths


def bench(folder: Path, figures: bool, repeat: int, further: Sequence[str]) -> None:
    """Run ``compare`` over the stores of ``folder``; a line for each time, a JSON line for the best."""
    best: dict[str, float] = {}
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as out:
            draw = ["--figures", "--out", out] if figures else ["--no-figures"]
            command = [
                sys.executable,
                "-m",
                "hestctl",
                "compare",
                "--db",
                str(folder / "big-*.duckdb"),
                *draw,
            ]
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run([*command, *further], check=True, stdout=subprocess.DEVNULL)
            wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        # The largest of all children so far; Linux counts in KiB, macOS in bytes.
        peak = after.ru_maxrss / (1 << 10 if platform.system() == "Linux" else 1 << 20)
        print(f"wall {wall:.2f} s, CPU {cpu:.2f} s, peak memory {peak:,.0f} MiB", flush=True)
        if not best or wall < best["wall_s"]:
            best = {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3), "peak_mib": round(peak)}
    print(json.dumps(best | {"cores": len(os.sched_getaffinity(0)), "figures": figures}))


def _put(con: DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    con.register("incoming", rows)
    con.execute(f"INSERT INTO {table} BY NAME SELECT * FROM incoming")
    con.unregister("incoming")


def _same(text: str | None, count: int) -> pa.Array:
    return pa.array([text] * count, pa.string())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--runs", type=int, default=200)
    making.add_argument("--samples", type=int, default=5_000, help="of each run")
    making.add_argument("--stores", type=int, default=8)
    benching = commands.add_parser("bench")
    benching.add_argument("folder", type=Path)
    benching.add_argument("--with-figures", action="store_true")
    benching.add_argument("--repeat", type=int, default=3)
    benching.add_argument("further", nargs="*", help="options for compare, after --")
    given = parser.parse_args()
    if given.command == "make":
        for path in make(given.folder, given.runs, given.samples, given.stores):
            print(f"{path}: {path.stat().st_size / (1 << 20):.1f} MiB")
    else:
        bench(given.folder, given.with_figures, given.repeat, given.further)


if __name__ == "__main__":
    main()
