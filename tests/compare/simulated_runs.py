"""A store in memory, built from the dataclasses of records.py, and runs that could have happened."""

from __future__ import annotations

import functools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, Union

import duckdb
import numpy as np

from hestctl.records import NEW_PART, PROMPT_PARTS, STATES, LayerUse, Run, Sample, StepMetric, Window

LAYERS = 30
_CHILDREN = {"steps": StepMetric, "samples": Sample, "windows": Window, "utilisation": LayerUse}


def _sql_type(hint: Any) -> str:
    if typing.get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return "VARCHAR"
    return {float: "DOUBLE", int: "BIGINT", bool: "BOOLEAN"}.get(hint, "VARCHAR")


@functools.cache
def _types(record: type) -> dict[str, str]:
    hints = typing.get_type_hints(record)
    return {field.name: _sql_type(hints[field.name]) for field in fields(record)}


def empty_store() -> duckdb.DuckDBPyConnection:
    """A connection with the views' columns and no rows."""
    connection = duckdb.connect()
    for table, record in {"runs": Run, **_CHILDREN}.items():
        columns = {**_types(record), "run_id": "VARCHAR", "store": "VARCHAR"}
        listed = ", ".join(f'"{name}" {kind}' for name, kind in columns.items())
        connection.execute(f"CREATE TABLE {table} ({listed})")
    connection.execute("CREATE TABLE plans (run_id VARCHAR, store VARCHAR, scope VARCHAR, document JSON)")
    return connection


def add(
    connection: duckdb.DuckDBPyConnection, run: Run, store: str = "runs.duckdb", **children: Sequence[Any]
) -> None:
    """Insert a run and its steps, samples, windows and utilisation."""
    values = _values(run)
    values |= {name: json.dumps(value) for name, value in values.items() if isinstance(value, Mapping)}
    _insert(connection, "runs", Run, [{**values, "store": store}])
    for table, records in children.items():
        extra = {"run_id": run.run_id, "store": store}
        _insert(connection, table, _CHILDREN[table], [_values(one) | extra for one in records])


def add_plan(connection: duckdb.DuckDBPyConnection, run: Run, **document: Any) -> None:
    """Insert the hardening plan of a run."""
    values = [run.run_id, "runs.duckdb", run.scope, json.dumps(document)]
    connection.execute("INSERT INTO plans VALUES (?, ?, ?, ?)", values)


def _values(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _insert(
    connection: duckdb.DuckDBPyConnection, table: str, record: type, rows: list[dict[str, Any]]
) -> None:
    if rows:
        types = {**_types(record), "run_id": "VARCHAR", "store": "VARCHAR"}
        names = ", ".join(f'"{name}"' for name in types)
        connection.execute(
            f"INSERT INTO {table} ({names}) SELECT {names} "
            "FROM (SELECT unnest(from_json(?::JSON, ?), recursive := true))",
            [json.dumps(rows), json.dumps([types])],
        )


def a_run(method: str = "hest", number: int = 1, **changes: Any) -> Run:
    """A finished train run on one H100 under the counter."""
    budgeted = method == "hest"
    run = Run(
        run_id=f"{method}-{number:04d}",
        command="train",
        status="finished",
        created_at=f"2025-11-20T10:{number % 60:02d}:00+00:00",
        finished_at=f"2025-11-20T11:{number % 60:02d}:00+00:00",
        method=method,
        scope="adapter",
        precision="mixed",
        dual="clamp",
        controller="factorised",
        backbone="HuggingFaceTB/SmolLM2-135M-Instruct",
        weights="pretrained",
        dataset="cnn_dailymail",
        data_hash="9f3c",
        dtype="bfloat16",
        engine="graph",
        num_beams=1,
        batch_size=4,
        max_new_tokens=128,
        seed=42,
        device_name="NVIDIA H100 80GB HBM3",
        device_uuid="GPU-1",
        meter="nvml",
        energy_kind="measured",
        emax_ratio=0.6 if budgeted else None,
        steps=300 if method != "base" else 0,
        controller_parameters={"hest": 21_000, "tabs": 276_480, "bhsp": 480}.get(method),
        adapter_parameters=None if method == "base" else 553_440,
        train_energy_j=None
        if method == "base"
        else {"hest": 61_000.0, "tabs": 52_000.0}.get(method, 40_000.0),
        train_time_s=None if method == "base" else 180.0,
        settings={"backbone": {"name": "smollm2-135m"}},
    )
    return replace(run, **changes)


def generated(
    run: Run,
    count: int = 500,
    *,
    joules: float = 60.0,
    score: float = 30.0,
    spread: float = 3.0,
    tokens: float = 90.0,
    noise: int | None = None,
    scope_j: float | None = None,
    emax_j: float | None = None,
    reason: str | None = None,
    random: bool = True,
) -> list[Sample]:
    """Samples of ``run``: articles are shared by all runs, noise is the run's own.

    ``joules`` a sample, ``score`` ROUGE-Lsum in points, ``scope_j`` and ``emax_j`` per 1,000 tokens.
    """
    articles = np.random.default_rng(7)
    prompts = np.clip(articles.lognormal(6.4, 0.5, count), 90, 3_900).astype(int)
    difficulty = articles.normal(0, 8, count)
    wish = articles.normal(0, 12, count)
    own = np.random.default_rng(sum(map(ord, run.run_id)) if noise is None else noise)
    size = run.batch_size or 1
    batch_noise = own.normal(1, 0.02, count // size + 1)
    limit = run.max_new_tokens or 128
    samples = []
    written = np.clip(tokens + wish + own.normal(0, 4, count), 8, limit).astype(int)
    for place in range(count):
        batch = place // size
        same = slice(batch * size, batch * size + size)
        power = joules / tokens
        spent = float((written[place] * power * 0.9 + prompts[place] * power * 0.02) * batch_noise[batch])
        total = int(prompts[place] + written[place])
        lsum = float(np.clip(score + difficulty[place] + own.normal(0, spread), 0, 100)) if random else score
        held = run.energy_kind != "none" and reason is None
        samples.append(
            Sample(
                sample_id=f"article-{place:05d}",
                position=place,
                split="test",
                prompt_tokens=int(prompts[place]),
                new_tokens=int(written[place]),
                truncated_tokens=0,
                batch_index=batch,
                batch_size=size,
                num_beams=run.num_beams or 1,
                engine=run.engine or "eager",
                latency_s=float(written[same].max() * 0.006 * (power / 0.66) * batch_noise[batch] + 0.03),
                energy_kind=run.energy_kind or "none",
                energy_method="apportioned",
                energy_j=spent if held else None,
                energy_net_j=spent * 0.7 if held else None,
                energy_error_j=0.5 if held else None,
                energy_valid=reason is None,
                energy_reason=reason if run.energy_kind != "none" else "no device",
                prefill_j=spent * 0.1 if held else None,
                decode_j=spent * 0.9 if held else None,
                scope_energy_j=None if scope_j is None else scope_j * total / 1_000 * own.normal(1, 0.03),
                emax_j=emax_j,
                finish="length" if written[place] == limit else "stop",
                rouge1=lsum + 8,
                rouge2=lsum / 2.4,
                rouge_l=lsum - 6,
                rouge_lsum=lsum,
                nll=55 * (2.4 - score / 60),
                answer_tokens=55,
            )
        )
    return samples


def classified(run: Run, count: int, accuracy: float, classes: int = 2, joules: float = 5.0) -> list[Sample]:
    """Samples with labels, answered rightly with probability ``accuracy``."""
    truth = np.random.default_rng(3).integers(0, classes, count)
    own = np.random.default_rng(sum(map(ord, run.run_id)))
    names = ["negative", "positive"] if classes == 2 else [str(place) for place in range(classes)]
    samples = []
    for place, base in enumerate(generated(run, count, joules=joules)):
        answer = (
            truth[place] if own.random() < accuracy else (truth[place] + own.integers(1, classes)) % classes
        )
        samples.append(
            replace(
                base,
                label=names[truth[place]],
                predicted_label=names[answer],
                new_tokens=0,
                finish="label",
                rouge1=None,
                rouge2=None,
                rouge_l=None,
                rouge_lsum=None,
            )
        )
    return samples


def trained(run: Run, target: float | None = 0.6) -> list[StepMetric]:
    """A learning curve: the loss falls, and with ``target`` the expected energy nears E_max."""
    own = np.random.default_rng(5 + 97 * (run.seed or 0))
    steps: list[StepMetric] = []
    ratio, multiplier = 1 / (target or 1), 0.1
    for step in range(10, (run.steps or 0) + 1, 10):
        loss = 2.1 + 1.4 * math.exp(-step / 80) + own.normal(0, 0.05)
        if target is not None and step > 50:
            ratio += (0.98 - ratio) * 0.12 + own.normal(0, 0.01)
            multiplier = max(0.0, multiplier + 0.25 * (ratio - 1))
        steps.append(
            StepMetric(
                step=step,
                split="train",
                epoch=step / 100,
                loss=loss + (multiplier * (ratio - 1) if target is not None else 0),
                task_loss=loss,
                learning_rate=1e-3,
                energy_j=None if target is None else 0.02 * ratio,
                energy_ratio=None if target is None else ratio,
                multiplier=None if target is None else multiplier,
            )
        )
        if step % 50 == 0:
            held_out = loss + 0.08
            steps.append(
                StepMetric(step=step, split="validation", epoch=step / 100, loss=held_out, task_loss=held_out)
            )
    return steps


def used(method: str) -> list[LayerUse]:
    """Shares of the states over ``LAYERS`` layers; later layers are off more often."""
    uses = []
    for layer in range(LAYERS):
        off = 0.1 + 0.6 * layer / LAYERS
        shares = {"off": off, "int8": (1 - off) * 0.55, "full": (1 - off) * 0.45}
        if method != "hest":
            shares = {"off": off * 0.6, "full": 1 - off * 0.6}
        places = [("prompt", part, 40 / PROMPT_PARTS) for part in range(PROMPT_PARTS)]
        places += [("new", first, math.exp(-first / 90)) for first in range(0, 128, NEW_PART)]
        for phase, position, weight in places:
            # Later new tokens need less, the ends of a prompt more.
            worn = 1 - 0.4 * position / 128 if phase == "new" else 0.8 + 0.02 * abs(position - 5)
            on = {state: share * worn for state, share in shares.items() if state != "off"}
            here = {"off": 1 - sum(on.values()), **on}
            uses += [
                LayerUse(layer, state, round(share * weight * 1e6), share, phase, position)
                for state, share in here.items()
                if state in STATES
            ]
    return uses


def metered(run: Run, samples: Sequence[Sample], invalid: int = 0) -> list[Window]:
    """The window of every batch; the first ``invalid`` of them do not count."""
    firsts = {one.batch_index: one for one in reversed(samples)}
    windows, start_s = [], 0.0
    for index in sorted(firsts):
        end_s = start_s + firsts[index].latency_s
        windows.append(
            Window(
                firsts[index].sample_id,
                "generation",
                start_s,
                end_s,
                "measured",
                "counter",
                energy_j=100.0,
                error_j=2.0,
                device_uuid=run.device_uuid,
                valid=index >= invalid,
                reason=None if index >= invalid else "the clock was throttled",
            )
        )
        start_s = end_s
    return windows


def calibrated(number: int = 90, step_s: float | None = 0.1) -> Run:
    """A calibration of the device of ``a_run`` with the certificate of its meter."""
    run = a_run("base", number, command="calibrate")
    summary = {"certificate": {"step_s": step_s, "device_uuid": run.device_uuid}}
    return replace(run, run_id=f"calibrate-{number:04d}", method=None, summary=summary)


CONFIGURATIONS: Sequence[tuple[str, dict[str, Any], dict[str, Any]]] = (
    ("base", {}, {"joules": 52.0, "score": 18.0, "tokens": 112.0}),
    ("lora", {}, {"joules": 46.0, "score": 29.4, "tokens": 84.0}),
    ("tabs", {}, {"joules": 63.0, "score": 30.1, "tokens": 90.0, "scope_j": 0.030}),
    ("tabs", {"scope": "network"}, {"joules": 62.0, "score": 30.0, "tokens": 90.0, "scope_j": 60.0}),
    ("bhsp", {}, {"joules": 51.0, "score": 29.2, "tokens": 88.0, "scope_j": 0.024}),
    ("hest", {}, {"joules": 43.0, "score": 30.0, "tokens": 88.0, "scope_j": 0.017, "emax_j": 0.018}),
    (
        "hest",
        {"emax_ratio": 0.4},
        {"joules": 39.0, "score": 27.1, "tokens": 87.0, "scope_j": 0.011, "emax_j": 0.012},
    ),
    ("hest", {"scope": "network", "emax_ratio": 0.5}, {"joules": 31.0, "score": 26.0, "scope_j": 28.0}),
    ("hest", {"scope": "network", "emax_ratio": 0.7}, {"joules": 38.0, "score": 29.6, "scope_j": 40.0}),
    ("hest", {"scope": "network", "emax_ratio": 0.85}, {"joules": 47.0, "score": 30.3, "scope_j": 49.0}),
    ("hest", {"precision": "fp16-only"}, {"joules": 47.0, "score": 30.2, "scope_j": 0.019, "emax_j": 0.018}),
    ("hest", {"dual": "none"}, {"joules": 45.0, "score": 29.7, "scope_j": 0.021, "emax_j": 0.018}),
    (
        "hest",
        {"controller": "unfactorised"},
        {"joules": 44.5, "score": 29.9, "scope_j": 0.017, "emax_j": 0.018},
    ),
    (
        "lora",
        {"settings": {"backbone": {"name": "smollm2-135m", "precision": "int8"}}},
        {"joules": 36.0, "score": 28.8},
    ),
    (
        "hest",
        {
            "scope": "network",
            "emax_ratio": 0.7,
            "settings": {"method": {"name": "hest", "scope": "network", "layers": "greedy"}},
        },
        {"joules": 39.5, "score": 28.9, "scope_j": 41.0},
    ),
    (
        "lora",
        {"settings": {"backbone": {"name": "smollm2-135m", "skip_last": 4}}},
        {"joules": 41.0, "score": 25.0},
    ),
)
"""A whole study: method, what differs of its run, and what its samples are like."""


def wide_study(count: int = 200, seeds: int = 3) -> duckdb.DuckDBPyConnection:
    """Sixteen configurations in several seeds with all that is recorded of them, and one A/A pair."""
    connection = empty_store()
    add(connection, calibrated())
    number = 0
    for place, (method, changes, like) in enumerate(CONFIGURATIONS):
        for seed in range(seeds):
            number += 1
            run = a_run(method, number, seed=42 + seed, **changes)
            run = replace(run, summary={"settlement": {"step": 120}} if run.scope == "network" else {})
            _add_whole(connection, run, count, like, shift=1 + 0.012 * (seed - 1), invalid=place % 3)
    again = a_run("lora", 99, created_at="2025-11-20T09:00:00+00:00")
    _add_whole(connection, again, count, CONFIGURATIONS[1][2], shift=1.0, invalid=0)
    for method, parent, joules in (("hest", "hest-0016", 43.0), ("tabs", "tabs-0007", 63.0)):
        profile = a_run(method, 60, command="profile", parent_run_id=parent)
        long = [
            replace(one, prompt_tokens=256 * 2 ** (place % 5))
            for place, one in enumerate(generated(profile, 20, joules=joules))
        ]
        add(
            connection,
            profile,
            samples=[replace(one, energy_j=joules / 2_000 * (one.prompt_tokens + 400)) for one in long],
        )
    return connection


def _add_whole(
    connection: duckdb.DuckDBPyConnection,
    run: Run,
    count: int,
    like: Mapping[str, Any],
    *,
    shift: float,
    invalid: int,
) -> None:
    samples = generated(run, count, **{**like, "joules": like["joules"] * shift})
    if run.scope == "network" and run.method == "hest":
        # E_max is a ratio of what TABS spends at the same lengths.
        ratio = run.emax_ratio or 1.0
        samples = [
            replace(one, emax_j=ratio * (60.0 / 1_000 * (one.prompt_tokens + one.new_tokens) + 2.0))
            for one in samples
        ]
    adaptive = run.method in ("hest", "tabs", "bhsp")
    samples = [
        replace(one, directions_off=3000, directions_int8=2000, directions_full=1000) if adaptive else one
        for one in samples
    ]
    add(
        connection,
        run,
        samples=samples,
        steps=[] if run.method == "base" else trained(run, run.emax_ratio if run.method == "hest" else None),
        windows=metered(run, samples, invalid),
        utilisation=used(run.method or "") if adaptive else [],
    )
    if adaptive:
        network = run.scope == "network" and run.method == "hest"
        states = [(2, 1, 0)[(layer * 7 + len(run.run_id)) % 3] if network else 2 for layer in range(LAYERS)]
        blocks = {"attention": states, "mlp": states[::-1]}
        add_plan(connection, run, costs_j=[0.0, 1e-6, 2e-6], blocks=blocks)


def study(count: int = 500) -> duckdb.DuckDBPyConnection:
    """Six runs of one study: two budgets of hest, an ablation, tabs, lora and base."""
    connection = empty_store()
    for run, settings in (
        (a_run("base", 1), {"joules": 52.0, "score": 18.0, "tokens": 112.0}),
        (a_run("lora", 2), {"joules": 46.0, "score": 29.4, "tokens": 84.0}),
        (a_run("tabs", 3), {"joules": 63.0, "score": 30.1, "tokens": 90.0, "scope_j": 0.030, "emax_j": None}),
        (
            a_run("hest", 4),
            {"joules": 43.0, "score": 30.0, "tokens": 88.0, "scope_j": 0.017, "emax_j": 0.016},
        ),
        (
            a_run("hest", 5, emax_ratio=0.4),
            {"joules": 39.0, "score": 27.1, "tokens": 87.0, "scope_j": 0.011, "emax_j": 0.0105},
        ),
        (
            a_run("hest", 6, precision="fp16-only"),
            {"joules": 47.0, "score": 30.2, "tokens": 89.0, "scope_j": 0.019, "emax_j": 0.016},
        ),
    ):
        target = run.emax_ratio
        add(
            connection,
            run,
            samples=generated(run, count, **settings),
            steps=[] if run.method == "base" else trained(run, target),
            utilisation=used(run.method or "") if run.method in ("hest", "tabs") else [],
        )
    return connection
